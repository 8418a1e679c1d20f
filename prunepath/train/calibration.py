"""Calibration: a budget, the wanted active fraction of the whole model, becomes a threshold for each FFN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from prunepath.nn import SparseFFN
from prunepath.nn.observers import counting, observing_inputs
from prunepath.nn.thresholds import SMALLEST_THRESHOLD
from prunepath.ops.reference import mass_before

BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHARED_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.87, 0.92, 0.95, 0.97, 0.985, 0.995)


@dataclasses.dataclass
class Calibration:
    """The outcome.

    Attributes:
        table: budget -> one threshold per FFN.
        shape: `per_layer` (every FFN gets the same active fraction) or `shared` (one threshold for all FFNs).
        losses: shape -> held-out loss at each of `BUDGETS`; empty where the model has no loss.
    """

    table: dict[float, list[float]]
    shape: str
    losses: dict[str, list[float]]


def num_passes() -> int:
    """How often `fit_budgets` reports progress."""
    return 2 * len(BUDGETS) + len(SHARED_THRESHOLDS)


@torch.no_grad()
def fit_budgets(
    ffns: list[SparseFFN],
    encode: Callable[[], None],
    loss: Callable[[], float | None],
    progress: Callable[[], None] | None = None,
) -> Calibration:
    """Fits both shapes on the model's own sparse activations, and keeps the one with the lower mean loss.

    Thresholds are fitted on-policy: while an FFN is fitted, those before it already skip experts.

    Args:
        ffns: in the order in which a forward pass reaches them. Their thresholds are left changed.
        encode: runs the calibration tokens through the FFNs, each in one call.
        loss: the mean loss over the same tokens, or None if the model has none; then `per_layer` is taken.
        progress: called after each pass over the tokens.
    """
    advance = progress or (lambda: None)
    per_layer: dict[float, list[float]] = {}
    per_layer_losses: list[float | None] = []
    for budget in BUDGETS:
        with observing_inputs({ffn: _FitFraction(budget) for ffn in ffns}):
            encode()
        advance()
        per_layer[budget] = [ffn.threshold for ffn in ffns]
        per_layer_losses.append(loss())
        advance()
    if None in per_layer_losses:
        return Calibration(per_layer, "per_layer", {})

    fractions, losses = [], []
    for threshold in SHARED_THRESHOLDS:
        for ffn in ffns:
            ffn.threshold = threshold
        with counting(ffns) as record:
            losses.append(loss())
        fractions.append(record.active_fraction)
        advance()
    shared = {b: [_interpolate(b, fractions, SHARED_THRESHOLDS)] * len(ffns) for b in BUDGETS}
    shared_losses = [_interpolate(b, fractions, losses) for b in BUDGETS]
    result = {"per_layer": per_layer_losses, "shared": shared_losses}
    if sum(shared_losses) < sum(per_layer_losses):
        return Calibration(shared, "shared", result)
    return Calibration(per_layer, "per_layer", result)


class _FitFraction:
    """An `observe_input` hook that gives the FFN the threshold at which `fraction` of its experts are active."""

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def __call__(self, ffn: SparseFFN, x: torch.Tensor) -> None:
        # An expert is active iff the mass before it is under τ, so τ is a quantile of that mass over all experts.
        before = mass_before(ffn.router(x)).flatten().sort().values
        rank = min(round(self.fraction * len(before)), len(before) - 1)
        ffn.threshold = min(1.0, max(before[rank].item(), SMALLEST_THRESHOLD))


def _interpolate(x: float, xs: list[float], ys: list[float] | tuple[float, ...]) -> float:
    """Piecewise-linear y(x) through the points, whose xs do not decrease; constant beyond their ends."""
    if x <= xs[0]:
        return ys[0]
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1]
