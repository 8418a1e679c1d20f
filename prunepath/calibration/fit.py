"""Calibration: a budget, the wanted active fraction of the whole model, becomes a threshold for each FFN."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from prunepath import ops
from prunepath.nn import SparseFFN
from prunepath.nn.observers import observing_hidden, observing_inputs, valid_tokens
from prunepath.nn.thresholds import LARGEST_THRESHOLD, SMALLEST_THRESHOLD
from prunepath.train.router import RouterQuality, contributions

BUDGETS = (0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NODES = (0.05, 0.1, 0.2, 0.4, 0.7)
"""Budgets at which FFNs run while thresholds are fitted, those of other budgets on the inputs of the nearest node."""
SLOPE_STEPS = ((0.5, 0.3), (0.5, 0.2), (0.2, 0.3), (0.2, 0.2))
"""(budget, step size) of each step along the loss's slope."""
COMPARED_BUDGETS = (0.2, 0.5)
"""Where what the steps found is compared with equal fractions."""
STATIC_BUDGET = 0.5
"""Where the model is compared with static pruning; one of `COMPARED_BUDGETS`."""
_ROUTED_TOKENS = 512
"""Tokens whose masses give a threshold, and whose contributions show a router's quality."""
_BAND = (0.8, 1.25)
"""The experts that a step asks for the loss's slope, by multiples of the active fraction."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Calibration tokens, of three texts.

    Attributes:
        encode: runs those that thresholds are fitted on through the FFNs, each in one call.
        loss: the model's mean loss on those that choices are made on, or None if it has none.
        backward: runs a part of those that slopes are taken on, named by the number of the step, forwards and
            backwards; only for a model with a loss.
        costs: what a call of each takes, in tokens of a forward pass.
    """

    encode: Callable[[], object]
    loss: Callable[[], float | None]
    backward: Callable[[int], object]
    costs: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def fitting_cost(self) -> float:
        """What `fit_budgets` reports to its `progress` for any model."""
        return (1 + len(NODES)) * self.costs[0] + self.costs[1]

    @property
    def choosing_cost(self) -> float:
        """What comes to that for a model with a loss."""
        return (1 + 2 * len(COMPARED_BUDGETS)) * self.costs[1] + len(SLOPE_STEPS) * self.costs[2]

    @property
    def cost(self) -> float:
        return self.fitting_cost + self.choosing_cost


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The outcome.

    Attributes:
        table: budget -> one threshold per FFN, none of which falls as the budget grows.
        fractions: budget of `COMPARED_BUDGETS` -> each FFN's active fraction, where steps along the loss's slope found
            fractions better than equal ones; others are between them.
        losses: `equal` and `slopes` -> loss at each of `COMPARED_BUDGETS` on text that nothing was fitted on; empty for
            a model without a loss.
        dense_loss: the dense model's there; None without one.
        static_loss: there, of the dense model without the neurons of least rms activation × norm of output weights, as
            many in each FFN as a budget of `STATIC_BUDGET` skips.
        routers: for each FFN, how well its router predicts the dense model's contributions.
    """

    table: dict[float, list[float]]
    fractions: dict[float, list[float]]
    losses: dict[str, list[float]]
    dense_loss: float | None
    static_loss: float | None
    routers: list[RouterQuality]

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint's description keeps."""
        return {
            "fractions": {f"{budget:g}": fractions for budget, fractions in self.fractions.items()},
            "losses": {
                name: {f"{budget:g}": loss for budget, loss in zip(COMPARED_BUDGETS, losses, strict=True)}
                for name, losses in self.losses.items()
            },
            "dense_loss": self.dense_loss,
            "static_loss": self.static_loss,
            "routers": [dataclasses.asdict(quality) for quality in self.routers],
        }


@torch.no_grad()
def fit_budgets(
    ffns: list[SparseFFN], sample: Sample, progress: Callable[[float], None] = lambda cost: None
) -> Calibration:
    """Finds out how to spread budgets over the FFNs, and the thresholds that obtain them.

    Starting from equal active fractions, each FFN's is moved along the slope of the loss, which the gradients of the
    experts near the cutoff give, while all FFNs skip experts. What that finds is kept where it is better than equal
    fractions on other text. Thresholds are fitted on-policy too: while an FFN's are, those before it skip experts.

    Args:
        ffns: in the order in which a forward pass reaches them. Their thresholds are left changed.
        sample: see `Sample`.
        progress: called with the costs of what has been run.

    Warns:
        UserWarning: the model is worse than static pruning of the same size.
    """
    search = Search(ffns, sample, progress)
    dense = search.loss()
    losses: dict[str, list[float]] = {}
    fractions: dict[float, list[float]] = {}
    static = None
    if dense is None:
        progress(sample.choosing_cost)
    else:
        found = search.descend()
        equal = {budget: search.scaled([1.0] * len(ffns), budget) for budget in COMPARED_BUDGETS}
        losses = {
            name: [search.loss(shapes[budget]) for budget in COMPARED_BUDGETS]
            for name, shapes in (("equal", equal), ("slopes", found))
        }
        for budget, a, b in zip(COMPARED_BUDGETS, losses["equal"], losses["slopes"], strict=True):
            if b < a:
                fractions[budget] = found[budget]
        static = search.static_loss()
        at_budget = COMPARED_BUDGETS.index(STATIC_BUDGET)
        routed = min(values[at_budget] for values in losses.values())
        if not routed <= static:
            warnings.warn(
                f"At a budget of {STATIC_BUDGET:g} this model is worse than static pruning of the same size, a loss of "
                f"{routed:.3f} against {static:.3f} on held-out text: give its routers more tokens or a higher rank, "
                "or fine-tune it.",
                stacklevel=5,  # beyond two decorators, to who called convert or calibrate
            )
    table = search.fit({budget: search.between(fractions, budget) for budget in BUDGETS})
    return Calibration(table, fractions, losses, dense, static, [o.quality for o in search.observed])


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a pass of the dense model shows of an FFN.

    Attributes:
        quality: of its router.
        useful: which neurons static pruning to `STATIC_BUDGET` keeps, bool [D].
    """

    quality: RouterQuality
    useful: torch.Tensor


class Search:
    """The steps of the search over active fractions of the FFNs."""

    def __init__(self, ffns: list[SparseFFN], sample: Sample, progress: Callable[[float], None]) -> None:
        self.ffns, self.sample, self.progress = ffns, sample, progress
        self.widths = [ffn.intermediate_size for ffn in ffns]
        self.lowest = [ffn.min_experts / ffn.num_experts for ffn in ffns]
        self.highest = [(ffn.max_experts or ffn.num_experts) / ffn.num_experts for ffn in ffns]
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

    def loss(self, fractions: Sequence[float] | None = None) -> float | None:
        """The loss at these active fractions of each batch; without them, of the dense model."""
        fits = {} if fractions is None else self._fits([{0.0: fraction} for fraction in fractions], 0.0)
        for ffn in self.ffns:
            ffn.threshold = 1.0
        with observing_inputs(fits):
            value = self.sample.loss()
        self.progress(self.sample.costs[1])
        return math.inf if value is not None and math.isnan(value) else value

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

    def descend(self) -> dict[float, list[float]]:
        """Active fractions at each of `COMPARED_BUDGETS`, moved along the loss's slope from equal ones."""
        found: dict[float, list[float]] = {}
        fractions = [1.0] * len(self.ffns)
        for step, (budget, size) in enumerate(SLOPE_STEPS):
            fractions = self.scaled(fractions, budget)
            gains = torch.tensor(fractions) * self._gains(step, fractions)
            direction = ((gains - gains.mean()) / gains.std(correction=0).clamp(min=1e-30)).clamp(-2.0, 2.0)
            if direction.isfinite().all():
                moved = [f * math.exp(size * d) for f, d in zip(fractions, direction.tolist(), strict=True)]
                fractions = self.scaled(moved, budget)
            found[budget] = fractions
        return found

    def _gains(self, step: int, fractions: Sequence[float]) -> torch.Tensor:
        """How much the loss falls with each FFN's active fraction, to first order: −dL/df, float32 [FFNs].

        An expert's share of that is the gradient of its gate, of active and skipped experts alike.
        """
        wanted = dict(zip(self.ffns, fractions, strict=True))
        gains = {ffn: torch.zeros((), device=ffn.router.w_out.device) for ffn in self.ffns}

        def select(ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                valid = valid_tokens(ffn, len(x))
                logits = ffn.router(x)
                masses = masses_before(ffn, logits if valid is None else logits[valid])
                fewer, active, more = (
                    _select(ffn, logits, quantile(masses, factor * wanted[ffn])) for factor in (_BAND[0], 1.0, _BAND[1])
                )
                gates, band = active.to(hidden.dtype), more & ~fewer
                if valid is not None:
                    band &= valid.unsqueeze(1)

            def gather(gradient: torch.Tensor) -> None:
                gains[ffn] -= torch.where(band, gradient.float(), 0.0).sum() / band.float().mean().clamp(min=1e-6)

            gates.requires_grad_().register_hook(gather)
            return gates

        for ffn in self.ffns:
            ffn.selector = select
        try:
            with torch.enable_grad():
                self.sample.backward(step)
        finally:
            for ffn in self.ffns:
                ffn.selector = None
        self.progress(self.sample.costs[2])
        return torch.stack([gain.cpu() for gain in gains.values()])

    def between(self, known: Mapping[float, Sequence[float]], budget: float) -> list[float]:
        """The fractions for a budget: log(fraction / budget) is linear in log(budget), and zero at budget 1.

        Below the lowest known budget, as there.
        """
        points = [*sorted(known), 1.0]
        above = next(point for point in points if point >= budget or point == 1.0)
        below = max((point for point in points if point <= budget), default=points[0])
        weight = 0.0 if above <= below else math.log(budget / below) / math.log(above / below)
        low, high = (known.get(point, [1.0] * len(self.ffns)) for point in (below, above))
        if not known:
            return self.scaled([1.0] * len(self.ffns), budget)
        return self.scaled(
            [(a / below) ** (1 - weight) * (b / above) ** weight for a, b in zip(low, high, strict=True)], budget
        )

    def fit(self, wanted: dict[float, list[float]]) -> dict[float, list[float]]:
        """budget -> thresholds, for budget -> active fractions of each FFN; one pass for each of `NODES`."""
        table: dict[float, list[float]] = {}
        lowest = [SMALLEST_THRESHOLD] * len(self.ffns)
        for node, budgets in budgets_of_nodes().items():
            rows = [{budget: wanted[budget][i] for budget in budgets} for i in range(len(self.ffns))]
            fits = self._fits(rows, node)
            with observing_inputs(fits):
                self.encode()
            for budget in budgets:
                fitted = [fit.thresholds[budget].item() for fit in fits.values()]
                table[budget] = lowest = list(map(max, fitted, lowest))
        return table

    def _fits(self, rows: Iterable[dict[float, float]], node: float) -> dict[SparseFFN, FitFractions]:
        return {ffn: FitFractions(row, node) for ffn, row in zip(self.ffns, rows, strict=True)}

    def static_loss(self) -> float | None:
        """The loss with static pruning in the place of routing."""
        with contextlib.ExitStack() as hooks:
            for ffn, observed in zip(self.ffns, self.observed, strict=True):
                down = ffn.projection(ffn.layout.down)
                hooks.enter_context(down.register_forward_pre_hook(functools.partial(_prune, observed.useful)))
            return self.loss()


def _select(ffn: SparseFFN, logits: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Which experts are active: bool [T, E]."""
    kernels = ops.resolve_backend(logits.device)
    limits = {"min_experts": ffn.min_experts, "max_experts": ffn.max_experts}
    return kernels.select(logits, threshold.float(), **limits)[0]


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
