"""MoEfication (arXiv 2110.01786)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from baselines.experts import TopK
from baselines.routers import fit_routers, mlp_router, router_targets
from prunepath.nn import SparseFFN


class MoEfication(TopK):
    """Experts from balanced k-means on the input weights; an MLP router; the k best experts, k the same in all layers.

    The router (two layers, tanh, as wide as there are experts) learns each expert's sum of activations,
    divided by the token's largest, by binary cross-entropy. For ReLU that is the paper's sum of positive activations;
    other functions count by magnitude. The paper fits routers to a finished model. Here they also follow the backbone
    while it is fine-tuned.
    """

    name = "moefication"
    expert_width = 32
    partition = "weights"

    def install_routers(self, inputs: list[torch.Tensor]) -> None:
        for ffn, x in zip(self.ffns, inputs, strict=True):
            ffn.predictor = mlp_router(x, ffn.num_experts, ffn.num_experts, nn.Tanh())
        targets = router_targets(self.ffns, inputs, self._target)
        routers = [ffn.predictor for ffn in self.ffns]
        fit_routers(routers, inputs, targets, self._losses, self.settings.seed)

    def scores(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return ffn.predictor(x)

    def token_losses(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self._losses(ffn.predictor(x.detach()), self._target(ffn, hidden.detach())).mean(-1)

    @staticmethod
    def _target(ffn: SparseFFN, hidden: torch.Tensor) -> torch.Tensor:
        sums = hidden.abs().float().unflatten(-1, (ffn.num_experts, -1)).sum(-1)
        return sums / sums.amax(-1, keepdim=True).clamp(min=1e-12)

    @staticmethod
    def _losses(predictions: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(predictions, target, reduction="none")
