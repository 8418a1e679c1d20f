"""CATS: Contextually-Aware Thresholding for Sparsity (arXiv 2404.08763)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from baselines.experts import ThresholdMethod, ffn_weights
from prunepath.nn import SparseFFN
from prunepath.ops.reference import ACTIVATIONS


class CATS(ThresholdMethod):
    """Neurons whose |act(gate·x)| is above a threshold of the layer; up and down are read for those alone.

    The gate's matrix is read whole and is the router. In an FFN without a gate the router is `up`, and only `down` is
    read in part. Every layer has the same active fraction, as in the paper. Thresholds are fitted on-policy, one layer
    after another, where the paper's come from the dense model; and fine-tuning is any-budget training, where the
    paper's is at one sparsity.
    """

    name = "cats"
    expert_width = 1
    shapes = ("per_layer",)

    def priority(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if ffn.layout.gate is None:
            return -hidden.abs()
        gate, bias = ffn.tables()[0], ffn.biases()[0]
        return -ACTIVATIONS[ffn.layout.activation](F.linear(x.to(gate.dtype), gate, bias)).abs()

    def bytes_read(self) -> float:
        router = sum(ffn.tables()[0].numel() for ffn in self.ffns) / sum(map(ffn_weights, self.ffns))
        return router + (1 - router) * self.active_fraction()
