"""Upper and lower bounds: experts chosen by what they truly contribute, which no router knows, and at random."""

from __future__ import annotations

import torch

from baselines.experts import ThresholdMethod, TopK, mass_before
from prunepath.nn import SparseFFN
from prunepath.nn.experts import expert_contributions, router_target


def contributions(ffn: SparseFFN, hidden: torch.Tensor) -> torch.Tensor:
    """What each expert adds to the output, float32 [T, E]."""
    return expert_contributions(hidden, ffn.down_weight(), ffn.num_experts, ffn.center)


class OracleTopK(TopK):
    """The k experts that contribute most, k the same in all layers."""

    name = "oracle-topk"
    center = True

    def scores(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return contributions(ffn, hidden)


class OracleTopMass(ThresholdMethod):
    """The fewest experts that make up the share τ of all contributions: PrunePath with a perfect router."""

    name = "oracle-topmass"
    center = True

    def priority(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return mass_before(router_target(contributions(ffn, hidden)))


class RandomExperts(TopK):
    """k experts at random."""

    name = "random"
    center = True

    def install_routers(self, inputs: list[torch.Tensor]) -> None:
        self._random = torch.Generator(inputs[0].device).manual_seed(self.settings.seed)

    def scores(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return torch.rand(len(x), ffn.num_experts, device=x.device, generator=self._random)
