"""Experts of several neurons: which neurons they are, by the activations of one pass of the dense model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from prunepath.config import PrunePathConfig
from prunepath.conversion.partition import partition_neurons
from prunepath.nn import SparseFFN


class ExpertGrouping:
    """An input hook that groups the neurons of each FFN as a pass of the dense model reaches it.

    Reordering neurons leaves an FFN's output as it is, so the calibration batch goes through the model once, and the
    activations of one FFN at a time are in memory.

    Args:
        config: the partition method and the seed.
        reorder: makes neuron order[j] of an FFN neuron j, as `reorder_neurons`.
        progress: called with the share of an FFN's grouping that has been done since the last call.
    """

    def __init__(
        self,
        config: PrunePathConfig,
        reorder: Callable[[SparseFFN, torch.Tensor], None],
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self.config, self.reorder, self.progress = config, reorder, progress

    @torch.no_grad()
    def __call__(self, ffn: SparseFFN, x: torch.Tensor) -> None:
        reported = 0.0

        def report(done: int, total: int) -> None:
            nonlocal reported
            self.progress(done / max(1, total) - reported)
            reported = done / max(1, total)

        hidden = ffn.hidden(x).float()
        with torch.autocast(x.device.type, enabled=False):
            order = partition_neurons(
                self.config.partition,
                ffn.num_experts,
                intermediate_size=ffn.intermediate_size,
                profiles=hidden,
                weights=ffn.tables()[0].float(),
                seed=self.config.seed,
                progress=report,
            ).to(x.device)
            self.reorder(ffn, order)
        self.progress(1.0 - reported)


@torch.no_grad()
def reorder_neurons(ffn: SparseFFN, order: torch.Tensor) -> None:
    """Makes neuron `order[j]` neuron j in all projections and their biases, in place."""
    for tensor in (*ffn.tables(), *ffn.biases()[:-1]):
        if tensor is not None:
            tensor.copy_(tensor[order])
