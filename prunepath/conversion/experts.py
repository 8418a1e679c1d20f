"""Grouping an FFN's neurons into experts, from the activations of one forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from prunepath.config import PrunePathConfig
from prunepath.conversion.partition import partition_neurons
from prunepath.nn import SparseFFN
from prunepath.nn.experts import expert_contributions

_CENTERING_FRACTION = 0.25
_CENTERING_TOKENS = 512


@dataclasses.dataclass
class InputStatistics:
    """Mean and standard deviation of an FFN's input features, float32 [H] each."""

    mean: torch.Tensor
    std: torch.Tensor


class ExpertGrouping:
    """Groups the neurons of each FFN as a forward pass reaches it.

    Reordering neurons leaves an FFN's output as it is, so it is done inside the pass: the calibration batch goes
    through the model once, and the activations of one FFN at a time are in memory.

    Args:
        config: the partition method, the seed, and whether to centre.
        progress: called with the hundredths of an FFN's grouping that have been done since the last call.

    Attributes:
        orders: FFN -> which neuron each has become, int64 [D], as of `reorder_neurons`.
        inputs: FFN -> statistics of its input.
    """

    def __init__(self, config: PrunePathConfig, progress: Callable[[int], None] | None = None) -> None:
        self.config = config
        self.progress = progress or (lambda hundredths: None)
        self.orders: dict[SparseFFN, torch.Tensor] = {}
        self.inputs: dict[SparseFFN, InputStatistics] = {}
        self._errors: list[tuple[float, float]] = []

    @property
    def centering_helps(self) -> bool:
        """Whether centring reduced the output error that skipping experts causes, on average over the FFNs.

        Measured with a quarter of the experts active, those that contribute most to each token.
        """
        return sum(centered / plain for plain, centered in self._errors) < len(self._errors)

    @torch.no_grad()
    def observe(self, ffn: SparseFFN, x: torch.Tensor) -> None:
        """An `observe_input` hook: x [T, H]."""
        hidden = ffn.hidden(x).float()
        with torch.autocast(x.device.type, enabled=False):
            self._group(ffn, x, hidden)

    def _group(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> None:
        reported = 0

        def report(done: int, total: int) -> None:
            nonlocal reported
            hundredths = 100 * done // max(1, total)
            self.progress(hundredths - reported)
            reported = hundredths

        order = partition_neurons(
            self.config.partition,
            ffn.num_experts,
            intermediate_size=ffn.intermediate_size,
            profiles=hidden,
            weights=ffn.input_weights()[0].float(),
            seed=self.config.seed,
            progress=report,
        ).to(x.device)
        hidden = hidden[:, order]
        self.orders[ffn] = order
        reorder_neurons(ffn, order)
        if ffn.center is not None:
            ffn.center.copy_(hidden.mean(0))
            self._errors.append(skipping_errors(ffn, hidden[:_CENTERING_TOKENS]))
        values = x.float()
        self.inputs[ffn] = InputStatistics(values.mean(0), values.std(0, correction=0).clamp_(min=1e-6))
        self.progress(100 - reported)


def reorder_neurons(ffn: SparseFFN, order: torch.Tensor) -> None:
    """Makes neuron `order[j]` neuron j: rows of the input projections and columns of `down`, in place."""
    for tensor in (*ffn.input_weights(), *ffn.input_biases()):
        if tensor is not None:
            tensor.copy_(tensor[order])
    down = ffn.down_weight()
    down.copy_(down[:, order])


def skipping_errors(ffn: SparseFFN, hidden: torch.Tensor) -> tuple[float, float]:
    """Squared output error of running the best experts alone: with skipped neurons at zero, and at their mean."""
    weight = ffn.down_weight().float()
    errors = []
    for center in (None, ffn.center):
        contributions = expert_contributions(hidden, weight, ffn.num_experts, center)
        active = max(1, round(_CENTERING_FRACTION * ffn.num_experts))
        skipped = torch.ones_like(contributions).scatter_(1, contributions.topk(active).indices, 0.0)
        missing = hidden if center is None else hidden - center.float()
        missing = missing * skipped.repeat_interleave(ffn.expert_width, dim=1)
        errors.append((missing @ weight.t()).square().sum().item())
    plain, centered = errors
    return max(plain, 1e-30), centered
