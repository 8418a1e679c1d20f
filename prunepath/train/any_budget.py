"""Any-budget training: every step runs at a budget drawn at random, so that one checkpoint serves them all."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from prunepath.errors import PrunePathError
from prunepath.nn import SparseFFN
from prunepath.nn.experts import expert_contributions, router_target
from prunepath.nn.observers import padding_masks
from prunepath.nn.thresholds import check_fraction


@dataclasses.dataclass(frozen=True)
class AnyBudgetConfig:
    """Which budgets the training steps draw.

    Args:
        dense_share: the share of steps that run densely, in [0, 1].
        min_budget: the other steps' budgets are uniform on a logarithmic scale between this and 1.
        layer_jitter: standard deviation of the logarithm of each FFN's own active fraction around the step's budget,
            which prepares the model for layers that differ; 0 gives all the same.
    """

    dense_share: float = 0.125
    min_budget: float = 0.05
    layer_jitter: float = 0.3

    def __post_init__(self) -> None:
        check_fraction("min_budget", self.min_budget)
        if not 0.0 <= self.dense_share <= 1.0:
            raise PrunePathError(f"dense_share must be a number in [0, 1], got {self.dense_share!r}.")
        if not 0.0 <= self.layer_jitter < math.inf:
            raise PrunePathError(f"layer_jitter must be a number of at least 0, got {self.layer_jitter!r}.")


class AnyBudget:
    """Makes a sparse model's forward passes in training mode run at the budget that `draw` drew last.

    A token's experts are those whose mass before is under a threshold, which is the quantile of all tokens' masses
    before that gives the drawn budget. The choice is hard and passes no gradient; the backbone learns from what the
    chosen experts compute, and the routers from `router_loss` alone:

        with AnyBudget(model) as any_budget:
            for batch in batches:
                any_budget.draw()
                loss = model(**batch).loss + any_budget.router_loss()
                ...

    In evaluation mode the model runs at its thresholds, as without this object, or at a budget: `evaluating_at`.

    Args:
        model: a sparse model.
        config: see `AnyBudgetConfig`.
        seed: of the drawn budgets. Processes that train one model together must use the same.
    """

    def __init__(self, model: nn.Module, config: AnyBudgetConfig | None = None, *, seed: int = 0) -> None:
        self.config = config or AnyBudgetConfig()
        self.budget = 1.0
        self._model = model
        self._seed = seed
        self._ffns = [module for module in model.modules() if isinstance(module, SparseFFN)]
        if not self._ffns:
            raise PrunePathError(f"Expected a model converted by prunepath, got a dense {type(model).__name__}.")
        self._random = random.Random(seed)
        self._fractions = dict.fromkeys(self._ffns, 1.0)
        self._evaluation_budget: float | None = None
        self._losses: dict[SparseFFN, torch.Tensor] = {}
        self._attached: contextlib.ExitStack | None = None

    def attach(self) -> None:
        """Hooks the model's FFNs."""
        if self._attached is None:
            self._attached = contextlib.ExitStack()
            self._attached.enter_context(padding_masks(self._model))
            for ffn in self._ffns:
                ffn.select = self._select

    def detach(self) -> None:
        """Leaves the FFNs as they were before `attach`."""
        if self._attached is not None:
            for ffn in self._ffns:
                ffn.select = None
            self._attached.close()
            self._attached = None
            self._losses.clear()

    def __enter__(self) -> AnyBudget:
        self.attach()
        return self

    def __exit__(self, *_) -> None:
        self.detach()

    def draw(self) -> float:
        """Draws the budget of the next training step, and returns it."""
        config = self.config
        self._losses.clear()
        if self._random.random() < config.dense_share:
            self.budget = 1.0
        else:
            self.budget = config.min_budget ** self._random.random()
        shares = {ffn: math.exp(self._random.gauss(0.0, config.layer_jitter)) for ffn in self._ffns}
        # Each FFN gets its share of the neurons that the budget affords, and those that would get more than all of
        # theirs leave the rest to the others.
        affordable = self.budget * sum(ffn.intermediate_size for ffn in self._ffns)
        wanted = sum(ffn.intermediate_size * share for ffn, share in shares.items())
        for ffn, share in sorted(shares.items(), key=lambda item: item[1], reverse=True):
            width = ffn.intermediate_size
            self._fractions[ffn] = 1.0 if self.budget == 1.0 else min(1.0, affordable * share / wanted)
            affordable -= width * self._fractions[ffn]
            wanted -= width * share
        return self.budget

    def restart(self, draws: int = 0) -> None:
        """Draws the same budgets again, those after the first `draws` of them: a resumed training goes on with them."""
        self._random = random.Random(self._seed)
        for _ in range(draws):
            self.draw()

    @contextlib.contextmanager
    def evaluating_at(self, budget: float) -> Iterator[None]:
        """Inside the `with` block, passes in evaluation mode run at `budget`, in every FFN, and not at thresholds.

        Each batch gets the thresholds that fit it best, so this needs no calibration.
        """
        was_attached = self._attached is not None
        self._evaluation_budget = check_fraction("budget", budget)
        self.attach()
        try:
            yield
        finally:
            self._evaluation_budget = None
            if not was_attached:
                self.detach()

    def router_loss(self) -> torch.Tensor:
        """Mean over FFNs and tokens of KL(c/Σc ‖ softmax(z)) in the last forward pass, a scalar in nats.

        c are the experts' contributions to the output of the current weights (`expert_contributions`), where W_down is
        without what an adapter on it adds. Only routers get gradients from it.

        Raises:
            PrunePathError: without a forward pass in training mode and with gradients since `draw`.
        """
        if len(self._losses) != len(self._ffns):
            raise PrunePathError("Expected a forward pass in training mode, after draw(), before router_loss().")
        loss = torch.stack(list(self._losses.values())).mean()
        self._losses.clear()
        if (
            torch.is_grad_enabled()
            and not loss.requires_grad
            and any(f.router.weight.requires_grad for f in self._ffns)
        ):
            raise PrunePathError(
                "Expected a forward pass with gradients before router_loss(), got one without: reentrant gradient "
                "checkpointing hides them, use_reentrant=False does not."
            )
        return loss

    def _select(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        valid = ffn.valid_tokens(len(x))
        if not ffn.training:
            if self._evaluation_budget is None:
                return ffn.active_mask(x)
            return mass_quantile_mask(ffn.router(x), valid, self._evaluation_budget, ffn.min_experts, ffn.max_experts)
        with torch.autocast(x.device.type, enabled=False):  # logits in half precision tie
            logits = ffn.router(x.detach())
            with torch.no_grad():
                weight = ffn.contribution_weight()
                target = router_target(expert_contributions(hidden, weight, ffn.num_experts, ffn.center))
                mask = mass_quantile_mask(logits, valid, self._fractions[ffn], ffn.min_experts, ffn.max_experts)
            losses = F.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)
            self._losses[ffn] = losses.mean() if valid is None else (losses * valid).sum() / valid.sum().clamp(min=1)
        return mask


def mass_quantile_mask(
    logits: torch.Tensor, valid: torch.Tensor | None, fraction: float, min_experts: int = 1, max_experts: int = 0
) -> torch.Tensor:
    """The top-mass selection with the one threshold at which `fraction` of all the valid tokens' experts are active.

    Args:
        logits: float32 [T, E].
        valid: bool [T], tokens that count; None for all. The others are routed too.
        fraction: active fraction in (0, 1].
        min_experts, max_experts: bounds on a token's experts, which the fraction gives way to; `max_experts` 0 means
            all.

    Returns:
        bool [T, E].
    """
    if fraction >= 1.0:
        return torch.ones_like(logits, dtype=torch.bool)
    probs, order = logits.softmax(-1).sort(-1, descending=True)
    before = probs.cumsum(-1) - probs
    # The host never waits for the device: padding goes behind all others, and only there is the rank a tensor, which
    # index_select takes as it is.
    if valid is None:
        values = before.flatten().sort().values
        threshold = values[min(round(fraction * len(values)), len(values) - 1)]
    else:
        values = before.masked_fill(~valid.unsqueeze(1), 2.0).flatten().sort().values
        rank = (valid.sum(0, keepdim=True) * (fraction * logits.shape[1])).round().long()
        threshold = values.index_select(0, rank.clamp(max=len(values) - 1))
    active = before < threshold
    active[:, :min_experts] = True
    if max_experts:
        active[:, max_experts:] = False
    return torch.empty_like(active).scatter_(1, order, active)


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """KL(teacher ‖ student) of the output distributions, in nats, mean over positions (arXiv 1503.02531, section 2).

    Args:
        student_logits, teacher_logits: [..., V]; no gradient goes to the teacher.
        mask: bool [...], positions that count; None for all.
        temperature: both logits are divided by it, and the loss is multiplied by its square.

    Raises:
        PrunePathError: for a teacher with other positions or another vocabulary.
    """
    if student_logits.shape != teacher_logits.shape:
        raise PrunePathError(
            f"Expected teacher logits of the student's shape {list(student_logits.shape)}, got "
            f"{list(teacher_logits.shape)}."
        )
    student, teacher = (
        (logits.float() if temperature == 1.0 else logits.float() / temperature).log_softmax(-1)
        for logits in (student_logits, teacher_logits.detach())
    )
    losses = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    mean = losses.mean() if mask is None else (losses * mask).sum() / mask.sum().clamp(min=1)
    return mean * temperature**2
