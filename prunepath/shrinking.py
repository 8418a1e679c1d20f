"""Shrinking: experts that a budget hardly uses are removed for good."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from prunepath.config import SHRINK_CRITERIA
from prunepath.convert.batches import Batch, backbone_inputs, count_tokens, first_tokens, sample_batches, split_held_out
from prunepath.errors import PrunePathError
from prunepath.modeling import (
    Shrinking,
    calibration_sample,
    converting,
    description_of,
    fit_table,
    set_budget,
    set_threshold,
    sparse_ffns,
)
from prunepath.nn import SparseFFN
from prunepath.nn.observers import counting, observing_inputs
from prunepath.nn.thresholds import check_fraction
from prunepath.train.calibration import Search, num_passes

MIN_TOKENS = 16384
"""Tokens that candidates are measured on, if the data has them: rare experts need more than budgets do."""
REFIT_TOKENS = 65536
"""Tokens that the remaining experts are refitted on, if the data has them."""
STEP = 0.1
"""The share of all experts by which one candidate is smaller than the one before."""
SMALLEST = 0.4
"""The share of its experts that the smallest candidate keeps."""
_PRIOR_TOKENS = 2
"""How many tokens, for each neuron left, a neuron's output weights outweigh when they are refitted."""
_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to shrink, and what it costs.

    Attributes:
        rate: experts below it are removed, as `by` of `plan` measures them.
        kept: for each FFN the experts that stay, ascending.
        ffn_bytes: what the FFNs' weights, routers included, then take.
        share: that, as a share of what they take now.
        loss: the model's on held-out calibration data, at the budget.
        rise: by what part that is above the loss before shrinking; bits per byte rise by the same part.
    """

    rate: float
    kept: list[list[int]]
    ffn_bytes: int
    share: float
    loss: float
    rise: float


class Plan:
    """What a model would be with fewer experts, measured on a model that stays as it is.

    Removing is imitated: an expert whose logit is −∞ has no mass and is never run. Candidates are nested: each begins
    with the one before, and measures anew which of the experts left are used least. The output weights of those left
    then take over what they can: FFN by FFN, least squares bring what the selected experts give for calibration tokens
    close to what the dense FFN gives for the same input, W' = argmin Σ‖W'·a(x) − W·h(x)‖² + λ‖W' − W‖² with a the
    activations h of which those of experts that do not run are skipped. OBS (Hassibi and Stork, 1993) does that for
    single weights, SparseGPT (arXiv 2301.00774) for a layer.

    Args:
        model: a sparse causal language model with a calibrated budget, on the device to work on.
        tokenizer, texts: calibration data, as for `prunepath.convert`. A part tells which experts to remove and refits
            those left, another what that costs.
        budget: the active fraction that the model is to be used at.
        by: `rate`: the share of tokens that run an expert. `loss`: the mean square of what an expert's output changes
            the loss by, to first order, over all tokens, with zero where it does not run; as a multiple of the mean
            over the model's experts.
        fold: put the mean of what an expert adds in its place, instead of zero. None does that where skipped experts
            contribute their means, in centred models.
        refit_tokens: how many tokens to refit the experts left on; 0 leaves their weights as they are. Takes a copy of
            the FFNs' output weights, and of one FFN a matrix [D, D].
        progress: show a progress bar.

    Attributes:
        candidates: from the largest to the smallest; the first is the model as it is.
        fractions: each FFN's active fraction at the budget, which candidates keep as far as their experts allow.

    Raises:
        PrunePathError: a dense model or one without calibrated budgets, one that has no loss, or too little data.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any | None,
        texts: Iterable,
        budget: float,
        *,
        by: str = "loss",
        fold: bool | None = None,
        refit_tokens: int = REFIT_TOKENS,
        progress: bool = False,
    ) -> None:
        if by not in SHRINK_CRITERIA:
            raise PrunePathError(f"by must be one of {', '.join(SHRINK_CRITERIA)}, got {by!r}.")
        self.model, self.by = model, by
        self.budget = check_fraction("budget", budget)
        description = description_of(model)
        config = description.config
        if description.shrinking is not None:
            raise PrunePathError("Expected a model that has all of its experts, got one that was shrunk already.")
        self.fold = description.centered if fold is None else fold
        self._ffns = list(sparse_ffns(model).values())
        half = max(MIN_TOKENS // 2, config.calibration_tokens)
        wanted = half + max(half, refit_tokens)
        batches = sample_batches(model, texts, tokenizer, config.sequence_length, wanted, config.seed)
        if "labels" not in batches[0]:
            raise PrunePathError(f"Expected a model with a loss to shrink by it, got {type(model).__name__}.")
        self._choose, rest = split_held_out(batches, min(half, sum(map(count_tokens, batches)) // 2))
        self._fit = list(first_tokens(rest, half))
        self._refit = list(first_tokens(rest, refit_tokens)) if refit_tokens else []
        self._downs = [ffn.down_weight().detach().clone() for ffn in self._ffns] if refit_tokens else None
        self._biases = [ffn.router.bias.detach().clone() for ffn in self._ffns]
        self._means: list[torch.Tensor] = []
        thresholds = [ffn.threshold for ffn in self._ffns]
        set_budget(model, self.budget)
        was_training = model.training
        model.eval()
        try:
            with converting(model, config), tqdm(total=_steps(), desc="Measuring", disable=not progress) as bar:
                self.candidates = self._measure(bar.update)
        finally:
            self._restore()
            set_threshold(model, thresholds)
            model.train(was_training)

    def choose(self, *, max_rise: float | None = None, rate: float | None = None) -> Candidate:
        """The smallest candidate whose loss rises by at most `max_rise`, or the last that removes nothing at `rate`."""
        if rate is not None:
            return max((c for c in self.candidates if c.rate <= rate), key=lambda c: c.rate)
        return min((c for c in self.candidates if c.rise <= max_rise), key=lambda c: c.share)

    def apply(self, candidate: Candidate, *, pad: bool = False, progress: bool = False) -> None:
        """Shrinks the model in place and calibrates its budgets anew. They stay shares of the dense model.

        Args:
            candidate: one of `candidates`.
            pad: fill FFNs up with zeros to the widest, for programs that know one width for all of them.
            progress: show a progress bar.

        Raises:
            PrunePathError: `pad` where means were folded in, which a plain FFN has no place for.
        """
        if pad and self.fold:
            raise PrunePathError("Expected no folding with padding: a plain FFN has no place for folded means.")
        model, description = self.model, description_of(self.model)
        dense = description.config.num_experts
        left = [len(kept) for kept in candidate.kept]
        was_training = model.training
        model.eval()
        if candidate.kept != self.candidates[0].kept:
            with converting(model, description.config):
                self._imitate(candidate.kept)
            self._restore(downs=False)
        for ffn, kept, mean in zip(self._ffns, candidate.kept, self._means, strict=True):
            if self.fold:
                ffn.removed_output = _removed(ffn, kept, mean).to(ffn.router.weight.dtype)
            ffn.keep_experts(kept)
            if pad:
                ffn.pad_experts(max(left))
        description.shrinking = Shrinking(dense, left, self.fold, pad)
        if pad:
            description.config = dataclasses.replace(
                description.config,
                num_experts=max(left),
                min_experts=min(description.config.min_experts, max(left)),
                max_experts=min(description.config.max_experts, max(left)),
            )
            _set_width(model.config, self._ffns[0].intermediate_size)
        model.config.quantization_config = description.to_dict()
        with (
            converting(model, description.config),
            tqdm(total=num_passes(), desc="Calibrating budgets", disable=not progress) as bar,
        ):
            batches = list(first_tokens(self._choose, description.config.calibration_tokens))
            fit_table(model, description, batches, bar.update)
        model.train(was_training)
        for ffn in self._ffns:
            ffn.pack()

    def _measure(self, advance: Callable[[], None]) -> list[Candidate]:
        ffns = self._ffns
        choose = calibration_sample(self.model, self._choose)
        with counting(ffns) as record:
            calibration_sample(self.model, self._fit).encode()
        self.fractions = record.per_layer
        before = choose.loss()
        if before is None:
            raise PrunePathError(f"Expected a model with a loss to shrink by it, got {type(self.model).__name__}.")
        kept = [list(range(ffn.num_experts)) for ffn in ffns]
        everything = self._bytes(kept)
        candidates = [Candidate(0.0, kept, everything, 1.0, before, 0.0)]
        total = sum(ffn.num_experts for ffn in ffns)
        for step in range(1, _steps() + 1):
            scores = self._scores()
            if not self._means:
                self._means = [mean for _, mean in scores]
            order = sorted((score[e].item(), i, e) for i, (score, _) in enumerate(scores) for e in kept[i])
            kept, rate = self._without(kept, order, math.floor(total * (1 - step * STEP)))
            self._imitate(kept)
            loss = choose.loss()
            size = self._bytes(kept)
            candidates.append(Candidate(rate, kept, size, size / everything, loss, loss / before - 1))
            advance()
        return candidates

    def _imitate(self, kept: Sequence[Sequence[int]]) -> None:
        """Makes the model what it would be with these experts alone, refitted, at the budget."""
        for ffn, bias, left, mean in zip(self._ffns, self._biases, kept, self._means, strict=True):
            gone = torch.ones_like(bias, dtype=torch.bool)
            gone[torch.tensor(left, device=bias.device)] = False
            ffn.router.bias.data.copy_(bias.masked_fill(gone, -torch.inf))
            ffn.removed_output = self._imitated(ffn, left, mean)
        if self._refit:
            for ffn, down in zip(self._ffns, self._downs, strict=True):
                ffn.down_weight().copy_(down)
        search, sample = Search(self._ffns, lambda: None), calibration_sample(self.model, self._fit)
        search.highest = [
            min(len(left), ffn.max_experts or len(left)) / ffn.dense_experts
            for ffn, left in zip(self._ffns, kept, strict=True)
        ]
        fractions = search.scaled(self.fractions, self.budget)
        search.fit(sample, fractions)
        if self._refit:
            for ffn, left in zip(self._ffns, kept, strict=True):
                self._refit_output(ffn, left)
            search.fit(sample, fractions)

    def _refit_output(self, ffn: SparseFFN, kept: Sequence[int]) -> None:
        """Fits the output weights of the experts `kept` to what the FFN with all of them gives for its inputs now."""
        least_squares = _LeastSquares(ffn, kept)
        with observing_inputs({ffn: least_squares.observe}):
            for batch in self._refit:
                with contextlib.suppress(_Observed):
                    self.model.base_model(**backbone_inputs(batch))
        least_squares.solve()

    def _restore(self, *, downs: bool = True) -> None:
        """Undoes `_imitate`, or all of it but the refitting."""
        for ffn, bias in zip(self._ffns, self._biases, strict=True):
            ffn.router.bias.data.copy_(bias)
            ffn.removed_output = None
        if self._refit and downs:
            with torch.no_grad():
                for ffn, down in zip(self._ffns, self._downs, strict=True):
                    ffn.down_weight().copy_(down)

    def _without(
        self, kept: list[list[int]], order: Sequence[tuple[float, int, int]], wanted: int
    ) -> tuple[list[list[int]], float]:
        """(experts that stay, and the rate below which others went), `wanted` of them if the FFNs' minima allow."""
        left, going = [set(experts) for experts in kept], sum(map(len, kept)) - wanted
        rate = 0.0
        for score, i, expert in order:
            rate = score
            if going <= 0:
                break
            if len(left[i]) > self._ffns[i].min_experts:
                left[i].discard(expert)
                going -= 1
        return [sorted(experts) for experts in left], rate

    def _imitated(self, ffn: SparseFFN, kept: Sequence[int], mean: torch.Tensor) -> torch.Tensor | None:
        """What has to be added to the output of an FFN that never runs an expert, to be that of one without it."""
        added = _removed(ffn, kept, mean) if self.fold else 0.0
        if ffn.center is not None:
            added = added - _removed(ffn, kept, ffn.center.float())
        return added if isinstance(added, torch.Tensor) else None

    def _bytes(self, kept: Sequence[Sequence[int]]) -> int:
        total = 0
        for ffn, experts in zip(self._ffns, kept, strict=True):
            linears = [ffn.router, *(ffn.projection(name) for name in ffn.layout.projections)]
            weights = sum(linear.weight.numel() * linear.weight.element_size() for linear in linears)
            total += weights * len(experts) // ffn.num_experts
        return total

    def _scores(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each FFN, as it routes now: its experts' use [E], and its neurons' mean activations [D] with those of
        experts that did not run at zero, or in centred models at their means."""
        usage = {ffn: _Usage(ffn) for ffn in self._ffns}
        with observing_inputs({ffn: usage[ffn].observe for ffn in self._ffns}):
            if self.by == "rate":
                for batch in self._fit:
                    calibration_sample(self.model, [batch]).encode()
            else:
                for batch in self._fit:
                    self._add_gradients(batch, usage)
        scores = [usage[ffn].rate if self.by == "rate" else usage[ffn].effect for ffn in self._ffns]
        if self.by == "loss":
            mean = sum(score.sum().item() for score in scores) / sum(map(len, scores))
            scores = [score / max(mean, 1e-30) for score in scores]
        return [(score.cpu(), usage[ffn].mean) for score, ffn in zip(scores, self._ffns, strict=True)]

    def _add_gradients(self, batch: Batch, usage: dict[SparseFFN, _Usage]) -> None:
        outputs: dict[SparseFFN, torch.Tensor] = {}

        def keep(ffn: SparseFFN, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            outputs[ffn] = output if output.requires_grad else output.requires_grad_()
            return outputs[ffn]

        hooks = [
            ffn.projection(ffn.layout.down).register_forward_hook(functools.partial(keep, ffn)) for ffn in self._ffns
        ]
        try:
            with torch.enable_grad():
                loss = self.model(**batch).loss
                # The outputs' gradients alone: the parameters' would take as much memory as the model.
                gradients = torch.autograd.grad(loss * count_tokens(batch), [outputs[ffn] for ffn in self._ffns])
        finally:
            for hook in hooks:
                hook.remove()
        for ffn, gradient in zip(self._ffns, gradients, strict=True):
            usage[ffn].add_gradient(gradient.reshape(-1, ffn.hidden_size))


class _Observed(Exception):
    """Ends a forward pass of which nothing more is needed."""


class _LeastSquares:
    """Output weights of experts left, by an FFN's inputs, gathered by `observe` as an `observe_input` hook."""

    def __init__(self, ffn: SparseFFN, kept: Sequence[int]) -> None:
        self.ffn = ffn
        device = ffn.router.weight.device
        neurons = torch.arange(ffn.intermediate_size, device=device).view(ffn.num_experts, ffn.expert_width)
        self.neurons = neurons[torch.tensor(kept, device=device)].flatten()
        self.tokens = 0
        self._gram = torch.zeros(len(self.neurons), len(self.neurons), device=device)
        self._product = torch.zeros(len(self.neurons), ffn.hidden_size, device=device)

    def observe(self, ffn: SparseFFN, x: torch.Tensor) -> None:
        with torch.autocast(x.device.type, enabled=False):
            for rows in x.split(_ROWS):
                self._add(ffn, rows)
        raise _Observed

    def _add(self, ffn: SparseFFN, x: torch.Tensor) -> None:
        hidden = ffn.hidden(x)
        active = ffn.skip(hidden, ffn.active_mask(x)).float()
        missing = (hidden.float() - active) @ ffn.down_weight().float().t()
        if ffn.removed_output is not None:
            missing -= ffn.removed_output.float()
        active = active[:, self.neurons]
        self._gram.addmm_(active.t(), active)
        self._product.addmm_(active.t(), missing)
        self.tokens += len(x)

    def solve(self) -> None:
        """Adds to the FFN's output weights what makes up for most of what was missing."""
        gram = self._gram.double()
        prior = _PRIOR_TOKENS * len(gram) / self.tokens * gram.diagonal().mean()
        gram.diagonal().add_(prior.clamp(min=1e-12))
        change = torch.linalg.solve(gram, self._product.double())
        weight = self.ffn.down_weight()
        weight[:, self.neurons] += change.t().to(weight.dtype)


class _Usage:
    """How an FFN's experts are used, gathered by `observe` as an `observe_input` hook, and `add_gradient` after it."""

    def __init__(self, ffn: SparseFFN) -> None:
        self.ffn = ffn
        self.tokens = 0
        self._runs = self._activations = self._squares = 0
        self._active: torch.Tensor | None = None
        self._contributing: torch.Tensor | None = None

    @torch.no_grad()
    def observe(self, ffn: SparseFFN, x: torch.Tensor) -> None:
        hidden, active = ffn.hidden(x), ffn.active_mask(x)
        self.tokens += len(x)
        self._runs = self._runs + active.sum(0)
        activations = ffn.skip(hidden, active).float()
        self._activations = self._activations + activations.sum(0)
        self._contributing = activations if ffn.center is None else activations - ffn.center.float()

    @torch.no_grad()
    def add_gradient(self, gradient: torch.Tensor) -> None:
        """gradient: [T, H], of the loss at the output of the call that was observed last."""
        ffn = self.ffn
        valid = ffn.valid_tokens(len(gradient))
        gradient = gradient if valid is None else gradient[valid]
        change = (gradient.float() @ ffn.down_weight().float()) * self._contributing
        change = change.unflatten(-1, (ffn.num_experts, ffn.expert_width)).sum(-1)
        self._squares = self._squares + change.square().sum(0)
        self._contributing = None

    @property
    def rate(self) -> torch.Tensor:
        return self._runs / self.tokens

    @property
    def effect(self) -> torch.Tensor:
        return self._squares / self.tokens

    @property
    def mean(self) -> torch.Tensor:
        return self._activations / self.tokens


def _removed(ffn: SparseFFN, kept: Sequence[int], activations: torch.Tensor) -> torch.Tensor:
    """What experts that are not kept add to the output with these activations [D]: float32 [H]."""
    experts = activations.clone().view(ffn.num_experts, ffn.expert_width)
    experts[torch.tensor(kept, device=experts.device)] = 0.0
    return ffn.down_weight().float() @ experts.flatten()


def _set_width(config: Any, intermediate_size: int) -> None:
    """Tells a transformers configuration the width of all FFNs."""
    for name in ("ffn_dim", "n_inner", "d_ff", "intermediate_size"):
        if hasattr(config, name):
            setattr(config, name, intermediate_size)
            return
    raise PrunePathError(
        f"Expected a {type(config).__name__} to have a width of FFNs that can be set, but it has none."
    )


def _steps() -> int:
    return round((1 - SMALLEST) / STEP)
