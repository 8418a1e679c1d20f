"""The dense model, which gets the same extra training as every other method."""

from __future__ import annotations

from collections.abc import Sequence

from baselines.base import Batch, Method


class Dense(Method):
    name = "dense"
    one_checkpoint = True

    def install(self, batches: Sequence[Batch]) -> None:
        """Leaves the model as it is."""

    def calibrate(self, batches: Sequence[Batch]) -> None:
        """There is no knob."""

    def set_budget(self, budget: float) -> None:
        """Every budget gets the dense model."""

    def active_fraction(self) -> float:
        return 1.0
