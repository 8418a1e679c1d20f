"""Calibration: a budget, the wanted active fraction of the whole model, becomes a threshold for each FFN."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from prunepath.nn import SparseFFN
from prunepath.nn.observers import observing_hidden, observing_inputs
from prunepath.nn.thresholds import LARGEST_THRESHOLD, SMALLEST_THRESHOLD
from prunepath.train.router import RouterQuality, contributions

BUDGETS = (0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.9)
COMPARED_BUDGETS = (0.25, 0.5)
"""Where the ways to spread a budget over the FFNs are compared by their loss."""
STATIC_BUDGET = 0.5
"""Where the model is compared with static pruning."""
_ROUTED_TOKENS = 512
"""Tokens whose masses give a threshold, and whose contributions show a router's quality."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Calibration tokens, of two texts.

    Attributes:
        encode: runs those that thresholds are fitted on through the FFNs, each in one call.
        loss: the model's mean loss on the others, or None if it has none.
        tokens: how many `encode` and `loss` run.
    """

    encode: Callable[[], object]
    loss: Callable[[], float | None]
    tokens: tuple[int, int] = (1, 1)

    @property
    def total_tokens(self) -> int:
        """How many tokens `fit_budgets` reports to its `progress`."""
        return (1 + len(BUDGETS)) * self.tokens[0] + self.tokens[1] + self.comparing_tokens

    @property
    def comparing_tokens(self) -> int:
        """Those of them that only a model with a loss runs."""
        return len(SHAPES) * len(COMPARED_BUDGETS) * sum(self.tokens) + self.tokens[1]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The outcome.

    Attributes:
        table: budget -> one threshold per FFN, none of which falls as the budget grows.
        shape: how active fractions are spread over FFNs, a name of `SHAPES`.
        losses: shape -> loss at each of `COMPARED_BUDGETS` on text that nothing was fitted on; empty for a model
            without a loss.
        dense_loss: the dense model's there; None without one.
        static_loss: there, of the dense model without the neurons of least rms activation × norm of output weights, as
            many in each FFN as a budget of `STATIC_BUDGET` skips.
        routers: for each FFN, how well its router predicts the dense model's contributions.
    """

    table: dict[float, list[float]]
    shape: str
    losses: dict[str, list[float]]
    dense_loss: float | None
    static_loss: float | None
    routers: list[RouterQuality]

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint's description keeps."""
        return {
            "shape": self.shape,
            "losses": {s: dict(zip(map(str, COMPARED_BUDGETS), v, strict=True)) for s, v in self.losses.items()},
            "dense_loss": self.dense_loss,
            "static_loss": self.static_loss,
            "routers": [dataclasses.asdict(quality) for quality in self.routers],
        }


def equal_fractions(search: Search, budget: float) -> list[float]:
    """The same active fraction in every FFN."""
    return search.scaled([1.0] * len(search.ffns), budget)


def shared_threshold(search: Search, budget: float) -> list[float]:
    """What one threshold for all FFNs gives each in the dense model."""

    def at(threshold: float) -> list[float]:
        return [(torch.searchsorted(o.masses, threshold) / len(o.masses)).item() for o in search.observed]

    return search.scaled(at(_solve(lambda threshold: search.mean(at(threshold)), budget, 0.0, 1.0)), budget)


SHAPES: dict[str, Callable[[Search, float], list[float]]] = {"equal": equal_fractions, "shared": shared_threshold}
"""Ways to spread a budget over the FFNs: (search, budget) -> each FFN's active fraction."""


@torch.no_grad()
def fit_budgets(
    ffns: list[SparseFFN], sample: Sample, progress: Callable[[int], None] = lambda tokens: None
) -> Calibration:
    """Finds out how to spread budgets over the FFNs, and the thresholds that obtain them.

    Thresholds are fitted on-policy, in one pass over the tokens: while an FFN is fitted, those before it already skip
    experts. How to spread is chosen by the loss on other text.

    Args:
        ffns: in the order in which a forward pass reaches them. Their thresholds are left changed.
        sample: see `Sample`.
        progress: called with the numbers of tokens that have been run.

    Warns:
        UserWarning: the model is worse than static pruning of the same size.
    """
    search = Search(ffns, sample, progress)
    dense = search.loss()
    losses: dict[str, list[float]] = {}
    static = None
    if dense is None:
        progress(sample.comparing_tokens)
    else:
        for name, shape in SHAPES.items():
            losses[name] = []
            for budget in COMPARED_BUDGETS:
                search.fit(shape(search, budget))
                losses[name].append(search.loss())
        static = search.static_loss()
    chosen = min(losses, key=lambda name: sum(losses[name]), default="equal")
    table, before = {}, [SMALLEST_THRESHOLD] * len(ffns)
    for budget in BUDGETS:
        table[budget] = before = search.fit(SHAPES[chosen](search, budget), before)
    if static is not None and not losses[chosen][COMPARED_BUDGETS.index(STATIC_BUDGET)] <= static:
        warnings.warn(
            f"At a budget of {STATIC_BUDGET:g} this model is worse than static pruning of the same size, a loss of "
            f"{losses[chosen][COMPARED_BUDGETS.index(STATIC_BUDGET)]:.3f} against {static:.3f} on held-out text: give "
            "its routers more tokens or a higher rank, or fine-tune it.",
            stacklevel=5,  # beyond two decorators, to who called convert or calibrate,
        )
    return Calibration(table, chosen, losses, dense, static, [o.quality for o in search.observed])


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a pass of the dense model shows of an FFN.

    Attributes:
        quality: of its router.
        masses: the mass before each expert, sorted, float32 [tokens · E].
        useful: which neurons static pruning to `STATIC_BUDGET` keeps, bool [D].
    """

    quality: RouterQuality
    masses: torch.Tensor
    useful: torch.Tensor


class Search:
    """The steps of the search over active fractions of the FFNs."""

    def __init__(self, ffns: list[SparseFFN], sample: Sample, progress: Callable[[int], None]) -> None:
        self.ffns, self.sample, self.progress = ffns, sample, progress
        self.widths = [ffn.intermediate_size for ffn in ffns]
        self.lowest = [ffn.min_experts / ffn.num_experts for ffn in ffns]
        self.highest = [(ffn.max_experts or ffn.num_experts) / ffn.num_experts for ffn in ffns]
        found: dict[SparseFFN, Observed] = {}

        def observe(ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> None:
            importance = hidden.float().square().mean(0) * ffn.tables()[-1].float().square().sum(1)
            useful = torch.zeros_like(importance, dtype=torch.bool)
            useful[importance.topk(max(1, round(STATIC_BUDGET * len(importance)))).indices] = True
            masses = masses_before(ffn, ffn.router(spread(x))).flatten().sort().values.float()
            found[ffn] = Observed(router_quality(ffn, x, hidden), masses, useful)

        for ffn in ffns:
            ffn.threshold = 1.0
        with observing_hidden(dict.fromkeys(ffns, observe)):
            self.encode()
        self.observed = [found[ffn] for ffn in ffns]

    def encode(self) -> None:
        self.sample.encode()
        self.progress(self.sample.tokens[0])

    def loss(self) -> float | None:
        value = self.sample.loss()
        self.progress(self.sample.tokens[1])
        return float("inf") if value is not None and value != value else value

    def mean(self, fractions: Sequence[float]) -> float:
        """The model's active fraction."""
        return sum(w * f for w, f in zip(self.widths, fractions, strict=True)) / sum(self.widths)

    def scaled(self, fractions: Sequence[float], budget: float) -> list[float]:
        """`fractions` times one number, within each FFN's limits, so that the model's active fraction is `budget`."""

        def at(factor: float) -> list[float]:
            limits = zip(fractions, self.lowest, self.highest, strict=True)
            return [min(max(fraction * factor, low), high) for fraction, low, high in limits]

        # At the largest factor every FFN is at its upper limit.
        return at(_solve(lambda f: self.mean(at(f)), budget, 0.0, 1.0 / max(min(fractions), 1e-6)))

    def fit(self, fractions: Sequence[float], lowest: Sequence[float] | None = None) -> list[float]:
        """Gives each FFN the threshold of its active fraction, and at least `lowest`; returns the thresholds."""
        lowest = lowest or [SMALLEST_THRESHOLD] * len(self.ffns)
        fits = [FitFraction(fraction, low) for fraction, low in zip(fractions, lowest, strict=True)]
        with observing_inputs(dict(zip(self.ffns, fits, strict=True))):
            self.encode()
        for ffn, fit in zip(self.ffns, fits, strict=True):
            ffn.threshold = fit.threshold.item()
        return [ffn.threshold for ffn in self.ffns]

    def static_loss(self) -> float | None:
        """The loss with static pruning in the place of routing."""
        with contextlib.ExitStack() as hooks:
            for ffn, observed in zip(self.ffns, self.observed, strict=True):
                ffn.threshold = 1.0
                down = ffn.projection(ffn.layout.down)
                hooks.enter_context(down.register_forward_pre_hook(functools.partial(_prune, observed.useful)))
            return self.loss()


def _prune(useful: torch.Tensor, projection: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (torch.where(useful, args[0], 0.0),)


class FitFraction:
    """An input hook that gives the FFN the threshold at which `fraction` of its experts are active.

    The threshold is raised to `lowest` if need be. The host does not wait for it: the FFN runs at it before anybody has
    read it.

    Attributes:
        threshold: float32 [].
    """

    threshold: torch.Tensor

    def __init__(self, fraction: float, lowest: float = SMALLEST_THRESHOLD) -> None:
        self.fraction = fraction
        self.lowest = lowest

    def __call__(self, ffn: SparseFFN, x: torch.Tensor) -> None:
        if self.fraction >= 1.0:
            self.threshold = torch.ones((), device=x.device, dtype=torch.float32)
        else:
            # An expert is active iff the mass before it is under τ, so τ is a quantile of that mass over all experts.
            before = masses_before(ffn, ffn.router(spread(x))).flatten()
            rank = min(round(self.fraction * len(before)), len(before) - 1)
            threshold = before.kthvalue(rank + 1).values.clamp(min=self.lowest, max=LARGEST_THRESHOLD)
            self.threshold = threshold.float()
        ffn.try_threshold(self.threshold)


def router_quality(ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> RouterQuality:
    """How well the FFN's router does on some of the tokens x [T, H] with the activations `hidden` [T, D]."""
    return RouterQuality.of(ffn.router(spread(x)), contributions(ffn, spread(hidden)))


def spread(tokens: torch.Tensor) -> torch.Tensor:
    """About `_ROUTED_TOKENS` of the rows, evenly spread."""
    return tokens[:: max(1, len(tokens) // _ROUTED_TOKENS)]


def masses_before(ffn: SparseFFN, logits: torch.Tensor) -> torch.Tensor:
    """The share of mass before each expert within the FFN's limits, float64 [T, E], in ascending order."""
    probs = logits.softmax(-1).sort(-1, descending=True).values.double()
    before = probs.cumsum(-1) - probs
    before[:, : ffn.min_experts] = 0.0
    if ffn.max_experts:
        before[:, ffn.max_experts :] = 2.0  # no threshold reaches them
    return before


def _solve(function: Callable[[float], float], value: float, low: float, high: float) -> float:
    """x in [low, high] where the non-decreasing `function` reaches `value`, by bisection."""
    for _ in range(50):
        middle = 0.5 * (low + high)
        if function(middle) < value:
            low = middle
        else:
            high = middle
    return high
