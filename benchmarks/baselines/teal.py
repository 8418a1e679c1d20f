"""TEAL: Training-Free Activation Sparsity (arXiv 2408.14690)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch

from baselines.activations import ffn_inputs
from baselines.base import Batch, Method
from baselines.experts import batch_threshold, draw_budget, sample_values
from prunepath.conversion.batches import merge
from prunepath.errors import PrunePathError
from prunepath.families import find_ffns
from prunepath.nn import SparseFFN
from prunepath.nn.observers import valid_tokens
from prunepath.train.any_budget import AnyBudgetConfig

_GREEDY_TOKENS = 1024
_STEP = 0.05
_SAMPLED_MAGNITUDES = 2**18


class TEAL(Method):
    """Entries of small magnitude in what the projections read are zero: of x for gate and up, of h for down.

    A projection then reads the weights of the entries that are left. A budget is the mean kept share of an FFN's
    matrices, weighed by their size, the same in all FFNs. Which matrix is thinned how much, the paper's greedy search
    says: from all entries on, the matrix is thinned a step further whose thinning adds the least squared error to the
    FFN's output. Steps are 5 % of a matrix. The paper searches whole Transformer blocks, attention included; here only
    FFNs are sparse.

    Thresholds are the magnitudes' quantiles on calibration data, each projection's as it is with those before it
    thinned, where the paper takes the dense model's. In fine-tuning, which the paper does not have, each step runs at
    a drawn budget, with the quantiles of its batch and the shares that the search found in the dense model.
    """

    name = "teal"
    one_checkpoint = True

    @torch.no_grad()
    def install(self, batches: Sequence[Batch]) -> None:
        # One expert, which always runs: sparse FFNs know their inputs and which tokens are padding in every family.
        self.ffns: list[SparseFFN] = [site.install(1) for site in find_ffns(self.model)]
        self._inputs: list[list[ThinnedInput]] = []
        for ffn in self.ffns:
            ffn.selector = _everything
            thinned = {name: ThinnedInput(ffn, name) for name in ffn.layout.projections}
            self._inputs.append(list(thinned.values()))
            ffn._call = _ThinnedCalls(ffn, thinned)  # not forward hooks, which not all families' projections get
        self._draws = random.Random(self.settings.seed)
        self._table: dict[float, list[list[torch.Tensor]]] = {}
        self._paths: list[Path] = []
        self._fitting = batches

    @torch.no_grad()
    def _search(self, batches: Sequence[Batch]) -> None:
        self._set(1.0)
        inputs = ffn_inputs(self.model, self.ffns, batches, _GREEDY_TOKENS)
        least = min(AnyBudgetConfig().min_budget, *self.settings.budgets)
        searched = zip(self.ffns, self._inputs, inputs, strict=True)
        self._paths = [greedy_path(ffn, thinned, x, least) for ffn, thinned, x in searched]

    def _set(self, budget: float, mode: str | None = None) -> None:
        """Sets all projections to kept shares, whose thresholds the next batches give (`mode`), or to the fitted."""
        for i, thinned in enumerate(self._inputs):
            shares = [1.0] * len(thinned) if budget >= 1.0 else shares_at(self._paths[i], budget)
            for j, each in enumerate(thinned):
                each.share, each.mode = shares[j], mode
                each.threshold = None if budget >= 1.0 or mode is not None else self._table[budget][i][j]
                each.reset()

    def before_step(self, progress: float) -> None:
        if not self._paths:  # of the dense model; without training, calibration alone searches
            self._search(self._fitting)
        self.step_budget = draw_budget(self._draws)
        self._set(self.step_budget, "batch")

    @torch.no_grad()
    def calibrate(self, batches: Sequence[Batch]) -> None:
        self._search(batches)
        batches = [merge(batches)]
        for budget in self.settings.budgets:
            if budget < 1.0:
                self._set(budget, "batch")
                self.model(**batches[0])  # each projection's threshold is set before the next one reads
                self._table[budget] = [[each.threshold for each in thinned] for thinned in self._inputs]

    def set_budget(self, budget: float) -> None:
        if budget < 1.0 and budget not in self._table:
            raise PrunePathError(f"Expected one of the calibrated budgets {sorted(self._table)} or 1.0, got {budget}.")
        self._set(budget)

    def per_layer(self) -> list[float]:
        return [sum(each.weight * each.kept_share() for each in thinned) for thinned in self._inputs]

    def active_fraction(self) -> float:
        """The share of FFN weights that meet an entry that was kept."""
        sizes = [sum(table.numel() for table in ffn.tables()) for ffn in self.ffns]
        return sum(size * kept for size, kept in zip(sizes, self.per_layer(), strict=True)) / sum(sizes)


class ThinnedInput:
    """What a projection reads: entries whose magnitude is at most a threshold become zero.

    Attributes:
        weight: the projection's share of the FFN's weights.
        share: how many entries are kept, where `mode` is not None.
        mode: None to use `threshold`; `batch` to set it by each call's valid tokens, `all` by all of its tokens.
        threshold: None keeps everything.
    """

    def __init__(self, ffn: SparseFFN, name: str) -> None:
        self._ffn = ffn
        self.weight = ffn.matrix(name).numel() / sum(table.numel() for table in ffn.tables())
        self.share, self.mode, self.threshold = 1.0, None, None
        self.reset()

    def reset(self) -> None:
        """Forgets how many entries were kept."""
        self._kept = self._seen = 0

    def kept_share(self) -> float:
        return float(self._kept) / float(self._seen) if torch.is_tensor(self._seen) or self._seen else float("nan")

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [..., F] with zeros."""
        with torch.no_grad():
            magnitudes = values.detach().abs().flatten(0, -2)
            valid = None if self.mode == "all" else valid_tokens(self._ffn, len(magnitudes))
            if self.mode is not None:
                self.threshold = None if self.share >= 1.0 else self._quantile(magnitudes, valid)
            if self.threshold is None:
                kept = torch.ones_like(magnitudes, dtype=torch.bool)
            else:
                kept = magnitudes > self.threshold
            counts = kept.sum(-1)
            self._kept = self._kept + (counts.sum() if valid is None else (counts * valid).sum())
            self._seen = self._seen + values.shape[-1] * (len(magnitudes) if valid is None else valid.sum())
        return values if self.threshold is None else torch.where(kept.view_as(values), values, 0.0)

    def _quantile(self, magnitudes: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        if self.mode == "all":  # the search asks often
            magnitudes = sample_values(magnitudes, None, _SAMPLED_MAGNITUDES)
        # The largest come first, so that those that tie at the threshold go.
        return -batch_threshold(-magnitudes.float(), valid, self.share)


class _ThinnedCalls:
    """Calls an FFN's projections on what is left of their inputs."""

    def __init__(self, ffn: SparseFFN, thinned: dict[str, ThinnedInput]) -> None:
        self._ffn = ffn
        self._thinned = thinned

    def __call__(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return type(self._ffn)._call(self._ffn, name, self._thinned[name](x))


def _everything(ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(x), 1, dtype=torch.bool, device=x.device)


Path = list[tuple[float, tuple[float, ...]]]
"""Points of a greedy search: the mean share of an FFN's weights, and the share of each projection's input."""


def greedy_path(ffn: SparseFFN, thinned: Sequence[ThinnedInput], x: torch.Tensor, least: float) -> Path:
    """What to keep, from everything to a mean share of `least` or less (the paper's algorithm 1).

    A step takes the same number of weights from any projection: 5 % of one, if all are equally large.

    Args:
        x: [N, H], on which errors of the output are measured.
    """
    steps = [_STEP / (len(thinned) * each.weight) for each in thinned]

    def point(shares: tuple[float, ...]) -> tuple[float, tuple[float, ...]]:
        return sum(each.weight * share for each, share in zip(thinned, shares, strict=True)), shares

    def output(shares: tuple[float, ...]) -> torch.Tensor:
        for each, share in zip(thinned, shares, strict=True):
            each.mode, each.share = "all", share
        return ffn.project(ffn.hidden(x)).float()

    now = (1.0,) * len(thinned)
    dense = output(now)
    path = [point(now)]
    while path[-1][0] > least:
        tries = [(*now[:i], max(0.0, now[i] - steps[i]), *now[i + 1 :]) for i in range(len(now)) if now[i] > 0]
        errors = torch.stack([(output(shares) - dense).square().sum() for shares in tries])
        now = tries[int(errors.argmin())]
        path.append(point(now))
    return path


def shares_at(path: Path, budget: float) -> list[float]:
    """Each projection's share where the mean is `budget`, on a straight line between two points of the path."""
    for (above, before), (below, after) in itertools.pairwise(path):
        if below <= budget:
            part = (above - budget) / (above - below)
            return [a + part * (b - a) for a, b in zip(before, after, strict=True)]
    raise PrunePathError(f"Expected a budget of at least {path[-1][0]:g}, got {budget}.")
