"""What every method of the quality benchmark has in common."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from prunepath.nn.observers import CountRecord

Batch = dict[str, torch.Tensor]
"""Inputs of one call `model(**batch)`, `labels` among them."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all methods of a comparison share.

    Attributes:
        expert_width: neurons n of every expert, for methods without a width of their own.
        router_rank: rank of PrunePath's routers; 0 is full rank, None suits the model's hidden size.
        budgets: active fractions of FFN neurons at which methods are compared.
        seed: of partitions, random choices and drawn budgets.
        partitions: a folder that keeps partitions, for methods that share one; None to compute each anew. It is of one
            dense model and one seed.
    """

    expert_width: int
    router_rank: int | None
    budgets: tuple[float, ...]
    seed: int
    partitions: Path | None = None


class Method(abc.ABC):
    """A way to make a dense model's FFNs sparse.

    A method owns a private copy of the dense model, which `install` changes in place. The harness then calls `install`;
    for results with fine-tuning, at every training step `before_step` and a forward and backward pass of `model` with
    `auxiliary_loss` added to the loss; then `calibrate`, and for each budget `set_budget` before evaluating. What comes
    after `install` is inside `prunepath.nn.observers.padding_masks`. An installed method may be deep-copied.

    Args:
        model: the dense model, in evaluation mode, on its device.
        settings: shared by all methods.
        budget: the one budget that this checkpoint is for; None where one checkpoint serves all of them.
    """

    name: str
    """As tables call it."""
    one_checkpoint: bool
    """Whether one checkpoint serves all budgets; otherwise the harness makes one for each."""
    counts: CountRecord | None = None
    """Experts per token since the last `set_budget`; None for a method without experts."""

    def __init__(self, model: nn.Module, settings: Settings, budget: float | None = None) -> None:
        self.model = model
        self.settings = settings
        self.budget = budget

    @abc.abstractmethod
    def install(self, batches: Sequence[Batch]) -> None:
        """Makes the model sparse, from batches of training data."""

    def before_step(self, progress: float) -> None:  # noqa: B027
        """Prepares a training step, if need be; `progress` is the share of all steps done, in [0, 1)."""

    def auxiliary_loss(self) -> torch.Tensor | float:
        """The method's own loss terms of the forward pass just run."""
        return 0.0

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @abc.abstractmethod
    def calibrate(self, batches: Sequence[Batch]) -> None:
        """Fits the knob on batches that were not trained on, so that each budget is the active fraction obtained."""

    @abc.abstractmethod
    def set_budget(self, budget: float) -> None:
        """Turns the knob; evaluation follows."""

    def active_fraction(self) -> float:
        """The share of FFN neurons computed, over valid (unpadded) tokens since the last `set_budget`."""
        return self.counts.active_fraction

    def bytes_read(self) -> float:
        """FFN weight bytes read for a token, routers included, as a share of those of the dense FFNs.

        At the setting last chosen, over valid tokens since the last `set_budget`. Weights and routers count 2 bytes a
        number (bfloat16); biases are left out.
        """
        return self.active_fraction()

    def per_layer(self) -> list[float] | None:
        """The same of each FFN, in the order of the model's modules; None where the method cannot say."""
        return None if self.counts is None else self.counts.per_layer
