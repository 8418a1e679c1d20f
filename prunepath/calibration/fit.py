"""Calibration: a budget, the wanted active fraction of the whole model, becomes a threshold for each FFN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from prunepath.nn import SparseFFN
from prunepath.nn.observers import counting, observing_inputs
from prunepath.nn.thresholds import LARGEST_THRESHOLD, SMALLEST_THRESHOLD
from prunepath.ops.reference import mass_before
from prunepath.train.router import RouterQuality, contributions

BUDGETS = (0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHARED_THRESHOLDS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98)
DESCENT_BUDGETS = (0.1, 0.25, 0.5)
"""Where descent spends its evaluations; other budgets take the proportions found at the nearest of these."""
DESCENT_EVALUATIONS = 12
"""Losses measured at each of them."""
_DESCENT_GROUPS = 8
_DESCENT_FACTOR = 1.5
_CORRECTIONS = 3
_QUANTILES = 4096


@dataclasses.dataclass
class Calibration:
    """The outcome.

    Attributes:
        table: budget -> one threshold per FFN, none of which falls as the budget grows.
        shapes: budget -> how the active fraction is spread over FFNs: `per_layer` gives each the same, `shared` what
            one threshold for all would, `energy` the share of its experts whose contribution exceeds a λ that all FFNs
            share, `descent` what coordinate descent on the loss found.
        losses: shape -> held-out loss at each of `BUDGETS`; empty where the model has no loss.
        routers: for each FFN, how well its router predicts the dense model's contributions on these tokens.
    """

    table: dict[float, list[float]]
    shapes: dict[float, str]
    losses: dict[str, list[float]]
    routers: list[RouterQuality]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Calibration tokens.

    Attributes:
        encode: runs them through the FFNs, each in one call.
        loss: the model's mean loss on them, or None if it has none.
    """

    encode: Callable[[], object]
    loss: Callable[[], float | None]


def num_passes() -> int:
    """About how often `fit_budgets` reports progress for a model with a loss."""
    return 1 + len(SHARED_THRESHOLDS) + 5 * len(BUDGETS) + len(DESCENT_BUDGETS) * DESCENT_EVALUATIONS


@torch.no_grad()
def fit_budgets(
    ffns: list[SparseFFN],
    fit: Sample,
    choose: Sample,
    both: Sample,
    progress: Callable[[], None] | None = None,
) -> Calibration:
    """Finds out how to spread each budget over the FFNs, and the thresholds that obtain it.

    Every shape is an active fraction for each FFN. Its thresholds are fitted on-policy, in one pass over the tokens:
    while an FFN is fitted, those before it already skip experts. Shapes are fitted on one sample and compared by their
    loss on another, at each budget, so that descent cannot win by fitting its sample alone.

    Args:
        ffns: in the order in which a forward pass reaches them. Their thresholds are left changed.
        fit: tokens that shapes are fitted on.
        choose: tokens that they are compared on.
        both: all tokens, on which the chosen shapes' thresholds are fitted.
        progress: called after each of about `num_passes` passes over a sample.
    """
    search = Search(ffns, progress or (lambda: None))
    routers, contributed = search.observe_dense(both)
    if fit.loss() is None:
        chosen, losses = {budget: ("per_layer", search.scaled([1.0] * len(ffns), budget)) for budget in BUDGETS}, {}
    else:
        chosen, losses = _choose(search, fit, choose, contributed)
    table, before = {}, [SMALLEST_THRESHOLD] * len(ffns)
    for budget in BUDGETS:
        table[budget] = before = search.fit(both, chosen[budget][1], before)
        search.advance()
    return Calibration(table, {budget: shape for budget, (shape, _) in chosen.items()}, losses, routers)


def _choose(
    search: Search, fit: Sample, choose: Sample, contributed: list[torch.Tensor]
) -> tuple[dict[float, tuple[str, list[float]]], dict[str, list[float]]]:
    """(budget -> best shape and its fractions; shape -> losses), by held-out loss."""
    at_thresholds = search.fractions_at_thresholds(fit)
    candidates: dict[float, dict[str, list[float]]] = {}
    losses: dict[float, dict[str, float]] = {}
    for budget in BUDGETS:
        candidates[budget] = {
            "per_layer": search.scaled([1.0] * len(search.ffns), budget),
            "shared": search.scaled(search.shared(at_thresholds, budget), budget),
            "energy": search.scaled(search.energy(contributed, budget), budget),
        }
        losses[budget] = {shape: search.loss(fit, choose, fractions) for shape, fractions in candidates[budget].items()}
    found = {}
    for budget in DESCENT_BUDGETS:
        start = candidates[budget][min(losses[budget], key=losses[budget].get)]
        end = search.descend(fit, start, budget)
        found[budget] = [b / a for a, b in zip(start, end, strict=True)]
    for budget in BUDGETS:
        start = candidates[budget][min(losses[budget], key=losses[budget].get)]
        nearest = min(DESCENT_BUDGETS, key=lambda other: abs(other - budget))
        fractions = search.scaled([f * a for f, a in zip(start, found[nearest], strict=True)], budget)
        candidates[budget]["descent"] = fractions
        losses[budget]["descent"] = search.loss(fit, choose, fractions)
    best = {budget: min(by_shape, key=by_shape.get) for budget, by_shape in losses.items()}
    chosen = {budget: (shape, candidates[budget][shape]) for budget, shape in best.items()}
    shapes = ("per_layer", "shared", "energy", "descent")
    return chosen, {shape: [losses[budget][shape] for budget in BUDGETS] for shape in shapes}


class Search:
    """The steps of the search over active fractions of the FFNs."""

    def __init__(self, ffns: list[SparseFFN], advance: Callable[[], None]) -> None:
        self.ffns = ffns
        self.advance = advance
        self.widths = [ffn.dense_experts * ffn.expert_width for ffn in ffns]
        self.highest = [(ffn.max_experts or ffn.num_experts) / ffn.dense_experts for ffn in ffns]

    def mean(self, fractions: Sequence[float]) -> float:
        """The model's active fraction."""
        return sum(w * f for w, f in zip(self.widths, fractions, strict=True)) / sum(self.widths)

    def scaled(self, fractions: Sequence[float], budget: float) -> list[float]:
        """`fractions` times one number, within each FFN's limits, so that the model's active fraction is `budget`."""
        lowest = [ffn.min_experts / ffn.dense_experts for ffn in self.ffns]

        def at(factor: float) -> list[float]:
            limits = zip(fractions, lowest, self.highest, strict=True)
            return [min(max(fraction * factor, low), high) for fraction, low, high in limits]

        # At the largest factor every FFN is at its upper limit.
        return at(_solve(lambda f: self.mean(at(f)), budget, 0.0, 1.0 / max(min(fractions), 1e-6)))

    def fit(self, sample: Sample, fractions: list[float], lowest: list[float] | None = None) -> list[float]:
        """Gives each FFN the threshold of its active fraction, and at least `lowest`; returns the thresholds.

        Where `lowest` makes an FFN run more than its fraction, the others run less.
        """
        lowest = lowest or [SMALLEST_THRESHOLD] * len(self.ffns)
        budget, wanted = self.mean(fractions), fractions
        for _ in range(_CORRECTIONS):
            fits = [FitFraction(f, low) for f, low in zip(wanted, lowest, strict=True)]
            with observing_inputs(dict(zip(self.ffns, fits, strict=True))):
                sample.encode()
            device = fits[0].outcome.device
            thresholds, shares = torch.stack([f.outcome.to(device) for f in fits]).unbind(1)
            obtained = shares.tolist()
            for ffn, threshold in zip(self.ffns, thresholds.tolist(), strict=True):
                ffn.threshold = threshold
            bound = [share > f.fraction + 1e-3 for f, share in zip(fits, obtained, strict=True)]
            if not any(bound) or all(bound):
                break
            fixed = self.mean([o if b else 0.0 for o, b in zip(obtained, bound, strict=True)])
            free = self.mean([0.0 if b else f.fraction for f, b in zip(fits, bound, strict=True)])
            share = max(0.0, budget - fixed) / free
            wanted = [f.fraction if b else f.fraction * share for f, b in zip(fits, bound, strict=True)]
        return [ffn.threshold for ffn in self.ffns]

    def loss(self, fit: Sample, measure: Sample, fractions: list[float]) -> float:
        self.fit(fit, fractions)
        value = measure.loss()
        self.advance()
        return float("inf") if value != value else value

    def observe_dense(self, sample: Sample) -> tuple[list[RouterQuality], list[torch.Tensor]]:
        """For each FFN of the dense model: its router's quality, and its experts' contributions in ascending order."""
        qualities, contributed = {}, {}

        def observe(ffn: SparseFFN, x: torch.Tensor) -> None:
            true = contributions(ffn, x)
            qualities[ffn] = RouterQuality.of(ffn.router(x), true)
            values = true.flatten().sort().values
            contributed[ffn] = values[torch.linspace(0, len(values) - 1, _QUANTILES, device=x.device).long()].cpu()

        for ffn in self.ffns:
            ffn.threshold = 1.0
        with observing_inputs(dict.fromkeys(self.ffns, observe)):
            sample.encode()
        self.advance()
        return [qualities[ffn] for ffn in self.ffns], [contributed[ffn] for ffn in self.ffns]

    def fractions_at_thresholds(self, sample: Sample) -> list[list[float]]:
        """Each FFN's active fraction with each of `SHARED_THRESHOLDS` for all of them."""
        rows = []
        for threshold in SHARED_THRESHOLDS:
            for ffn in self.ffns:
                ffn.threshold = threshold
            with counting(self.ffns) as record:
                sample.encode()
            rows.append(record.per_layer)
            self.advance()
        return rows

    def shared(self, rows: list[list[float]], budget: float) -> list[float]:
        """The FFNs' active fractions where one threshold makes the model's `budget`, between the rows' thresholds."""
        rows = [*rows, self.highest]
        above = next(i for i, row in enumerate(rows) if self.mean(row) >= min(budget, self.mean(rows[-1])))
        if above == 0:
            return rows[0]
        low, high = rows[above - 1], rows[above]
        share = (budget - self.mean(low)) / (self.mean(high) - self.mean(low))
        return [a + share * (b - a) for a, b in zip(low, high, strict=True)]

    def energy(self, contributed: list[torch.Tensor], budget: float) -> list[float]:
        """P(c_i ≥ λ) of each FFN, with the λ that makes the model's active fraction `budget`."""

        def at(level: float) -> list[float]:
            shares = [1.0 - torch.searchsorted(values, level).item() / len(values) for values in contributed]
            return [s * ffn.num_experts / ffn.dense_experts for s, ffn in zip(shares, self.ffns, strict=True)]

        high = max(values[-1].item() for values in contributed)
        return at(high - _solve(lambda drop: self.mean(at(high - drop)), budget, 0.0, high))

    def descend(self, sample: Sample, fractions: list[float], budget: float) -> list[float]:
        """Coordinate descent: groups of neighbouring FFNs run more, or less, for all the others, while it helps."""
        size = -(-len(self.ffns) // _DESCENT_GROUPS)
        groups = [range(i, min(i + size, len(self.ffns))) for i in range(0, len(self.ffns), size)]
        best, lowest = fractions, self.loss(sample, sample, fractions)
        factor, left = _DESCENT_FACTOR, DESCENT_EVALUATIONS - 1
        while left > 0 and len(groups) > 1:
            improved = False
            for group in groups:
                for step in (factor, 1.0 / factor):
                    if left <= 0:
                        return best
                    moved = [f * step if i in group else f for i, f in enumerate(best)]
                    trial = self.scaled(moved, budget)
                    loss = self.loss(sample, sample, trial)
                    left -= 1
                    if loss < lowest:
                        best, lowest, improved = trial, loss, True
                        break
            if not improved:
                factor = factor**0.5
        return best


class FitFraction:
    """An `observe_input` hook that gives the FFN the threshold at which `fraction` of its experts are active.

    The threshold is raised to `lowest` if need be. The host does not wait for it: the FFN runs at it before
    anybody has read it.

    Attributes:
        outcome: float64 [2], the threshold and the active fraction that it obtains.
    """

    outcome: torch.Tensor

    def __init__(self, fraction: float, lowest: float = SMALLEST_THRESHOLD) -> None:
        self.fraction = fraction
        self.lowest = lowest

    def __call__(self, ffn: SparseFFN, x: torch.Tensor) -> None:
        # An expert is active iff the mass before it is under τ, so τ is a quantile of that mass over all experts.
        before = mass_before(ffn.router(x)).sort(1).values
        before[:, : ffn.min_experts] = 0.0
        if ffn.max_experts:
            before[:, ffn.max_experts :] = 2.0  # no threshold reaches them
        before = before.flatten().sort().values
        left = ffn.num_experts / ffn.dense_experts  # what shrinking left of the FFN
        rank = min(round(self.fraction / left * len(before)), len(before) - 1)
        threshold = before[rank].clamp(min=self.lowest, max=LARGEST_THRESHOLD)
        if self.fraction >= left:
            threshold = torch.ones_like(threshold)
        self.outcome = torch.stack([threshold, (before < threshold).double().mean() * left])
        ffn.try_threshold(threshold.float())


def _solve(function: Callable[[float], float], value: float, low: float, high: float) -> float:
    """x in [low, high] where the non-decreasing `function` reaches `value`, by bisection."""
    for _ in range(50):
        middle = 0.5 * (low + high)
        if function(middle) < value:
            low = middle
        else:
            high = middle
    return high
