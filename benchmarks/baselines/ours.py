"""PrunePath, and PrunePath's router with top-k in place of top-mass."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from baselines.experts import ExpertMethod, ThresholdMethod, TopK, mass_before
from baselines.oracle import contributions
from baselines.routers import Standardised
from prunepath.config import PrunePathConfig
from prunepath.nn import SparseFFN
from prunepath.nn.experts import router_target
from prunepath.train.router import RouterTraining


class _SoftmaxRouted(ExpertMethod):
    """A linear router whose softmax learns each expert's share of the output, before and during fine-tuning."""

    center = True

    def install_routers(self, inputs: list[torch.Tensor]) -> None:
        super().install_routers(inputs)
        config = PrunePathConfig(num_experts=self.settings.num_experts)
        for ffn, x in zip(self.ffns, inputs, strict=True):
            statistics = Standardised(x)
            training = RouterTraining(ffn, statistics.mean, statistics.std, config)
            chunks = x.split(1024)
            for i, chunk in enumerate(chunks):
                training.schedule(i / len(chunks))
                training.observe(ffn, chunk)
            training.finish()
            ffn.router.requires_grad_(True)

    def token_losses(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = router_target(contributions(ffn, hidden))
        return F.kl_div(ffn.router(x.detach()).log_softmax(-1), target, reduction="none").sum(-1)


class TopKRouted(_SoftmaxRouted, TopK):
    """PrunePath's router and training, but the k best experts for every token, k the same in all layers."""

    name = "topk"

    def scores(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return ffn.router(x)


class PrunePath(_SoftmaxRouted, ThresholdMethod):
    """The fewest experts whose probability adds up to τ."""

    name = "prunepath"

    def priority(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return mass_before(ffn.router(x).softmax(-1))
