"""Bounds: experts chosen by what they truly contribute, which no router knows."""

from __future__ import annotations

import torch

from baselines.experts import ThresholdMethod, TopK, mass_before
from prunepath.nn import SparseFFN
from prunepath.nn.experts import router_target
from prunepath.train.router import contributions


class OracleTopK(TopK):
    """The k experts that contribute most, k the same in all layers."""

    name = "oracle-topk"

    def scores(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return contributions(ffn, hidden)


class OracleTopMass(ThresholdMethod):
    """The fewest experts that make up the share τ of all contributions: PrunePath with a perfect router."""

    name = "oracle-topmass"

    def priority(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return mass_before(router_target(contributions(ffn, hidden)))


class OracleExperts(OracleTopMass):
    """The same over experts as wide as other methods have them: the bound of every router of such experts."""

    name = "oracle-experts"
    expert_width = 32
