"""Any-budget training: every step runs at a budget drawn at random, so that one checkpoint serves them all."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F

from prunepath import ops
from prunepath.errors import PrunePathError
from prunepath.nn import SparseFFN
from prunepath.nn.experts import router_target
from prunepath.nn.model import require_sparse_ffns
from prunepath.nn.observers import padding_masks, valid_tokens
from prunepath.nn.thresholds import LARGEST_THRESHOLD, SMALLEST_THRESHOLD, check_fraction
from prunepath.train.router import contributions

SAMPLED_LOGITS = 2**22
"""A router's loss is of a sample of tokens with so many logits, tokens times experts: all may not fit into memory."""
THRESHOLD_TOKENS = 256
"""So many of them, or more, tell which threshold gives a step its budget: sorting the logits of all would take long."""


@dataclasses.dataclass(frozen=True)
class AnyBudgetConfig:
    """Which budgets the training steps draw.

    Args:
        dense_share: the share of steps that run densely, in [0, 1].
        min_budget: the other steps' budgets are uniform on a logarithmic scale between this and 1.
    """

    dense_share: float = 0.125
    min_budget: float = 0.05

    def __post_init__(self) -> None:
        check_fraction("min_budget", self.min_budget)
        if not 0.0 <= self.dense_share <= 1.0:
            raise PrunePathError(f"dense_share must be a number in [0, 1], got {self.dense_share!r}.")


class AnyBudget:
    """Makes a sparse model's forward passes in training mode run at the budget that `draw` drew last.

    The first pass after a draw gives each FFN one threshold for all tokens: the one at which the drawn share of experts
    is active, as a sample of its tokens says. The choice is hard and passes no gradient; the backbone learns from what
    the chosen experts compute, and the routers from `router_loss` alone:

        with AnyBudget(model) as any_budget:
            optimizer = torch.optim.AdamW(model.parameters())
            for batch in batches:
                any_budget.draw()
                loss = model(**batch).loss + any_budget.router_loss()
                ...

    While it is attached, the routers require gradients, and their tables are not packed. In evaluation mode the model
    runs at its thresholds, as without this object, or at a budget: `evaluating_at`.

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
        self._ffns = list(require_sparse_ffns(model).values())
        self._random = random.Random(seed)
        self._sample_start = 0
        # Of passes since the last draw, by FFN and number of tokens: recomputing a pass must choose the same experts.
        self._choices: dict[tuple[SparseFFN, int], _Choice] = {}
        self._losses: dict[SparseFFN, torch.Tensor] = {}
        self._attached: contextlib.ExitStack | None = None

    def attach(self) -> None:
        """Takes over the FFNs' choice of experts, and lets the routers learn."""
        if self._attached is None:
            self._attached = contextlib.ExitStack()
            self._attached.enter_context(self._choosing(self._choose))
            for ffn in self._ffns:
                if ffn.router.is_packed:
                    self._attached.callback(ffn.router.pack)
                    ffn.router.unpack()
                for parameter in router_parameters(ffn):
                    self._attached.callback(parameter.requires_grad_, parameter.requires_grad)
                    parameter.requires_grad_(True)

    def detach(self) -> None:
        """Leaves the model as it was before `attach`."""
        if self._attached is not None:
            self._attached.close()
            self._attached = None
            self._choices.clear()
            self._losses.clear()

    def __enter__(self) -> AnyBudget:
        self.attach()
        return self

    def __exit__(self, *_) -> None:
        self.detach()

    def draw(self) -> float:
        """Draws the budget of the next training step, and returns it."""
        config = self.config
        self._choices.clear()
        self._losses.clear()
        self._sample_start = self._random.getrandbits(32)
        if self._random.random() < config.dense_share:
            self.budget = 1.0
        else:
            self.budget = config.min_budget ** self._random.random()
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
        budget = check_fraction("budget", budget)

        def choose(ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
            if ffn.training:
                return self._choose(ffn, x, hidden)
            with torch.no_grad():
                logits = ffn.router(x)
                return select_at(ffn, logits, mass_quantile(logits[_sample(ffn, x)], budget))

        with self._choosing(choose):
            yield

    def router_loss(self) -> torch.Tensor:
        """Mean over FFNs and tokens of KL(√c/Σ√c ‖ softmax(z)) in the last forward pass, a scalar in nats.

        c are the experts' contributions to the output of the current weights (`expert_contributions`), where W_down is
        without what an adapter on it adds. Of many tokens, a sample counts (`SAMPLED_LOGITS`). Only routers get
        gradients from it.

        Raises:
            PrunePathError: without a forward pass in training mode and with gradients since `draw`.
        """
        if len(self._losses) != len(self._ffns):
            raise PrunePathError("Expected a forward pass in training mode, after draw(), before router_loss().")
        loss = torch.stack(list(self._losses.values())).mean()
        self._losses.clear()
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise PrunePathError(
                "Expected a forward pass with gradients before router_loss(), got one without: reentrant gradient "
                "checkpointing hides them, use_reentrant=False does not."
            )
        return loss

    @contextlib.contextmanager
    def _choosing(self, selector: Callable[[SparseFFN, torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Makes `selector` that of all FFNs, which know inside the block which tokens are padding."""
        before = [ffn.selector for ffn in self._ffns]
        with padding_masks(self._model):
            for ffn in self._ffns:
                ffn.selector = selector
            try:
                yield
            finally:
                for ffn, selector in zip(self._ffns, before, strict=True):
                    ffn.selector = selector

    def _choose(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """A selector: bool [T, E]."""
        if not ffn.training:
            return ffn.select(x)[0]
        choice = self._choices.get((ffn, len(x)))
        if choice is None:
            choice = self._choices[ffn, len(x)] = _Choice(_sample(ffn, x, self._sample_start))
        sampled = ffn.router(x[choice.tokens].detach())
        with torch.no_grad():
            target = router_target(contributions(ffn, hidden[choice.tokens]))
        self._losses[ffn] = F.kl_div(sampled.log_softmax(-1), target, reduction="batchmean")
        if self.budget >= 1.0:
            return torch.ones(len(x), ffn.num_experts, dtype=torch.bool, device=x.device)
        with torch.no_grad():
            if choice.threshold is None:
                choice.threshold = mass_quantile(sampled[:THRESHOLD_TOKENS], self.budget)
            return select_at(ffn, ffn.router(x), choice.threshold)


@dataclasses.dataclass
class _Choice:
    """What the first pass after a draw found for an FFN: its sample of tokens, and the threshold of the budget."""

    tokens: torch.Tensor | slice
    threshold: torch.Tensor | None = None


def is_router(name: str) -> bool:
    """Whether a parameter of this dotted name belongs to a router."""
    return "router" in name.split(".")


def router_parameters(ffn: SparseFFN) -> list[nn.Parameter]:
    """The parameters of an FFN's router; of one that peft trains a copy of, the copy's."""
    router = ffn.router
    parameters = (router.w_in, router.w_out, router.bias, router.floor, router.log_scale)
    return [p for p in parameters if p is not None]


def _sample(ffn: SparseFFN, x: torch.Tensor, start: int = 0) -> torch.Tensor | slice:
    limit = max(THRESHOLD_TOKENS, SAMPLED_LOGITS // ffn.num_experts)
    return sample_tokens(len(x), valid_tokens(ffn, len(x)), limit, start, device=x.device)


def sample_tokens(
    num_tokens: int, valid: torch.Tensor | None, limit: int, start: int = 0, *, device: torch.device
) -> torch.Tensor | slice:
    """Indices of `limit` tokens, spread evenly over the valid ones of T; so are the first few of them.

    The points are multiples of the golden ratio modulo 1, in units of 2⁻³², which no length of a sequence divides.

    Args:
        num_tokens: T.
        valid: bool [T], the tokens to draw from; None for all. The host does not wait for it, so that of fewer than
            `limit` valid tokens some come twice.
        limit: how many are wanted.
        start: the first point, which moves all.

    Returns:
        int64 [min(limit, T)], or a slice of all T.
    """
    if valid is None and num_tokens <= limit:
        return slice(None)
    points = (torch.arange(min(limit, num_tokens), device=device) * 2654435769 + start) % 2**32
    if valid is None:
        return (points * num_tokens) >> 32
    ranks = (points * valid.sum()) >> 32
    return torch.searchsorted(valid.cumsum(0), ranks, right=True).clamp(max=num_tokens - 1)


def mass_quantile(logits: torch.Tensor, fraction: float) -> torch.Tensor:
    """The threshold at which the top-mass selection activates `fraction` of all tokens' experts.

    Args:
        logits: float32 [T, E].
        fraction: in (0, 1].

    Returns:
        τ, float32 [] on the logits' device, for which the host does not wait.
    """
    if fraction >= 1.0:
        return logits.new_ones(())
    probs = logits.softmax(-1).sort(-1, descending=True).values
    before = (probs.cumsum(-1, dtype=torch.float64) - probs).flatten().sort().values
    threshold = before[min(round(fraction * len(before)), len(before) - 1)]
    return threshold.clamp(SMALLEST_THRESHOLD, LARGEST_THRESHOLD).float()


def select_at(ffn: SparseFFN, logits: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """The experts of an FFN at a threshold [], from its router's logits: bool [T, E]."""
    kernels = ops.resolve_backend(logits.device)
    return kernels.select(logits, threshold, min_experts=ffn.min_experts, max_experts=ffn.max_experts)[0]


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
