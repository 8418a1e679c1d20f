"""Calibration: a budget, the wanted active fraction of the whole model, becomes a threshold for each FFN."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from prunepath.nn import SparseFFN
from prunepath.nn.observers import observing_hidden, observing_inputs
from prunepath.nn.thresholds import LARGEST_THRESHOLD, SMALLEST_THRESHOLD
from prunepath.train.router import RouterQuality, contributions

BUDGETS = (0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NODES = (0.05, 0.1, 0.2, 0.4, 0.7)
"""Budgets at which FFNs run while thresholds are fitted, those of other budgets on the inputs of the nearest node."""
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
        costs: what a call of each takes, in tokens of a forward pass.
    """

    encode: Callable[[], object]
    loss: Callable[[], float | None]
    costs: tuple[float, float] = (1.0, 1.0)

    @property
    def fitting_cost(self) -> float:
        """What `fit_budgets` reports to its `progress` for any model."""
        return (1 + len(NODES)) * self.costs[0] + self.costs[1]

    @property
    def comparing_cost(self) -> float:
        """What comes to that for a model with a loss."""
        return 2 * self.costs[1]

    @property
    def cost(self) -> float:
        return self.fitting_cost + self.comparing_cost


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The outcome. Losses are on text that no threshold was fitted on, and None for a model without one.

    Attributes:
        table: budget -> one threshold per FFN, none of which falls as the budget grows.
        dense_loss: of the dense model.
        routed_loss: at `STATIC_BUDGET`.
        static_loss: of the dense model without the neurons of least rms activation × norm of output weights, as many in
            each FFN as a budget of `STATIC_BUDGET` skips.
        routers: for each FFN, how well its router predicts the dense model's contributions.
    """

    table: dict[float, list[float]]
    dense_loss: float | None
    routed_loss: float | None
    static_loss: float | None
    routers: list[RouterQuality]

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint's description keeps."""
        return {
            "dense_loss": self.dense_loss,
            "routed_loss": self.routed_loss,
            "static_loss": self.static_loss,
            "routers": [dataclasses.asdict(quality) for quality in self.routers],
        }


@torch.no_grad()
def fit_budgets(
    ffns: list[SparseFFN], sample: Sample, progress: Callable[[float], None] = lambda cost: None
) -> Calibration:
    """Finds the thresholds at which every FFN has a budget's active fraction, as far as its limits allow.

    They are fitted on-policy: while an FFN's are, those before it skip experts. All FFNs get the same fraction:
    spreading a budget by the slope of the loss on calibration text did worse on other text (docs/quality.md).

    Args:
        ffns: in the order in which a forward pass reaches them. Their thresholds are left changed.
        sample: see `Sample`.
        progress: called with the costs of what has been run.

    Warns:
        UserWarning: the model is worse than static pruning of the same size.
    """
    fitting = Fitting(ffns, sample, progress)
    dense, routed, static = fitting.loss(), None, None
    if dense is None:
        progress(sample.comparing_cost)
    else:
        routed = fitting.loss(STATIC_BUDGET)
        static = fitting.static_loss()
        if not routed <= static:
            warnings.warn(
                f"At a budget of {STATIC_BUDGET:g} this model is worse than static pruning of the same size, a loss of "
                f"{routed:.3f} against {static:.3f} on held-out text: give its routers more tokens or a higher rank, "
                "or fine-tune it.",
                stacklevel=5,  # beyond two decorators, to who called convert or calibrate
            )
    return Calibration(fitting.fit(), dense, routed, static, [o.quality for o in fitting.observed])


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a pass of the dense model shows of an FFN.

    Attributes:
        quality: of its router.
        useful: which neurons static pruning to `STATIC_BUDGET` keeps, bool [D].
    """

    quality: RouterQuality
    useful: torch.Tensor


class Fitting:
    """The passes that thresholds, and losses to judge them by, take."""

    def __init__(self, ffns: list[SparseFFN], sample: Sample, progress: Callable[[float], None]) -> None:
        self.ffns, self.sample, self.progress = ffns, sample, progress
        self.widths = [ffn.intermediate_size for ffn in ffns]
        found: dict[SparseFFN, Observed] = {}

        def observe(ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> None:
            importance = hidden.float().square().mean(0) * ffn.tables()[-1].float().square().sum(1)
            useful = torch.zeros_like(importance, dtype=torch.bool)
            useful[importance.topk(max(1, round(STATIC_BUDGET * len(importance)))).indices] = True
            found[ffn] = Observed(router_quality(ffn, x, hidden), useful)

        with observing_hidden(dict.fromkeys(ffns, observe)):
            self.encode()
        self.observed = [found[ffn] for ffn in ffns]

    def encode(self) -> None:
        self.sample.encode()
        self.progress(self.sample.costs[0])

    def loss(self, budget: float | None = None) -> float | None:
        """The loss where each batch runs at a budget; without one, of the dense model."""
        fits = {} if budget is None else self._fits([budget], budget)
        for ffn in self.ffns:
            ffn.threshold = 1.0
        with observing_inputs(fits):
            value = self.sample.loss()
        self.progress(self.sample.costs[1])
        return math.inf if value is not None and math.isnan(value) else value

    def fractions(self, budget: float) -> list[float]:
        """Each FFN's active fraction: the same within their limits, so that the model's is the budget."""

        def at(fraction: float) -> list[float]:
            return [nearest_fraction(ffn, fraction) for ffn in self.ffns]

        def mean(fraction: float) -> float:
            return sum(w * f for w, f in zip(self.widths, at(fraction), strict=True)) / sum(self.widths)

        return at(_solve(mean, budget, 0.0, 1.0))

    def fit(self) -> dict[float, list[float]]:
        """budget -> thresholds, for each of `BUDGETS`; one pass for each of `NODES`."""
        table: dict[float, list[float]] = {}
        lowest = [SMALLEST_THRESHOLD] * len(self.ffns)
        for node, budgets in budgets_of_nodes().items():
            fits = self._fits(budgets, node)
            with observing_inputs(fits):
                self.encode()
            for budget in budgets:
                fitted = [fit.thresholds[budget].item() for fit in fits.values()]
                table[budget] = lowest = list(map(max, fitted, lowest))
        return table

    def _fits(self, budgets: Iterable[float], node: float) -> dict[SparseFFN, FitFractions]:
        rows = {budget: self.fractions(budget) for budget in budgets}
        return {
            ffn: FitFractions({budget: row[i] for budget, row in rows.items()}, node) for i, ffn in enumerate(self.ffns)
        }

    def static_loss(self) -> float | None:
        """The loss with static pruning in the place of routing."""
        with contextlib.ExitStack() as hooks:
            for ffn, observed in zip(self.ffns, self.observed, strict=True):
                down = ffn.projection(ffn.layout.down)
                hooks.enter_context(down.register_forward_pre_hook(functools.partial(_prune, observed.useful)))
            return self.loss()


def nearest_fraction(ffn: SparseFFN, fraction: float) -> float:
    """The active fraction nearest to `fraction` that the FFN's limits allow."""
    highest = (ffn.max_experts or ffn.num_experts) / ffn.num_experts
    return min(max(fraction, ffn.min_experts / ffn.num_experts), highest)


def _prune(useful: torch.Tensor, projection: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (torch.where(useful, args[0], 0.0),)


def budgets_of_nodes() -> dict[float, list[float]]:
    """node -> the budgets nearest to it, in ascending order."""
    nearest = {budget: min(NODES, key=lambda node: abs(math.log(node / budget))) for budget in BUDGETS}
    return {node: [budget for budget in BUDGETS if nearest[budget] == node] for node in NODES}


class FitFractions:
    """An input hook that finds an FFN's thresholds for active fractions, and has it run at one of them.

    The host does not wait for them: the FFN runs before anybody has read the threshold.

    Args:
        fractions: budget -> active fraction.
        node: at which of these budgets the FFN runs.

    Attributes:
        thresholds: budget -> float32 [].
    """

    def __init__(self, fractions: Mapping[float, float], node: float) -> None:
        self.fractions, self.node = fractions, node
        self.thresholds: dict[float, torch.Tensor] = {}

    def __call__(self, ffn: SparseFFN, x: torch.Tensor) -> None:
        masses = masses_before(ffn, ffn.router(spread(x)))
        self.thresholds = {budget: quantile(masses, fraction).float() for budget, fraction in self.fractions.items()}
        ffn.try_threshold(self.thresholds[self.node])


def router_quality(ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> RouterQuality:
    """How well the FFN's router does on some of the tokens x [T, H] with the activations `hidden` [T, D]."""
    return RouterQuality.of(ffn.router(spread(x)), contributions(ffn, spread(hidden)))


def spread(tokens: torch.Tensor) -> torch.Tensor:
    """About `_ROUTED_TOKENS` of the rows, evenly spread."""
    return tokens[:: max(1, len(tokens) // _ROUTED_TOKENS)]


def masses_before(ffn: SparseFFN, logits: torch.Tensor) -> torch.Tensor:
    """The share of mass before each expert of each token within the FFN's limits, ascending: float64 [T · E].

    An expert is active iff the mass before it is under the threshold.
    """
    probs = _sorted(logits.softmax(-1)).flip(-1).double()
    before = probs.cumsum(-1) - probs
    before[:, : ffn.min_experts] = 0.0
    if ffn.max_experts:
        before[:, ffn.max_experts :] = 2.0  # no threshold reaches them
    return _sorted(before.flatten())


def _sorted(values: torch.Tensor) -> torch.Tensor:
    """The values in ascending order along the last dimension."""
    if values.is_cpu:  # with vector instructions, ten times as fast as torch's
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(-1).values


def quantile(masses: torch.Tensor, fraction: float) -> torch.Tensor:
    """The threshold under which `fraction` of ascending masses before experts are: float64 []."""
    rank = round(fraction * len(masses))
    if rank >= len(masses):
        return torch.ones((), dtype=masses.dtype, device=masses.device)
    return masses[rank].clamp(min=SMALLEST_THRESHOLD, max=LARGEST_THRESHOLD)


def _solve(function: Callable[[float], float], value: float, low: float, high: float) -> float:
    """x in [low, high] where the non-decreasing `function` reaches `value`, by bisection."""
    for _ in range(50):
        middle = 0.5 * (low + high)
        if function(middle) < value:
            low = middle
        else:
            high = middle
    return high
