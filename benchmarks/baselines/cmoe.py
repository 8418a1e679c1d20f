"""CMoE: Carving Mixture-of-Experts (arXiv 2502.04416)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from baselines.base import Settings
from baselines.experts import TopK, largest
from prunepath.conversion.partition import partition_neurons
from prunepath.errors import PrunePathError
from prunepath.nn import SparseFFN

_ACTIVE_SHARE = 1 / 16
_TOKENS = 4096


class CMoE(TopK):
    """Shared experts that always run, and routed experts with a router made of their representative neurons.

    A neuron is activated by a token if its |h| is among the token's K largest. The neurons with the highest activation
    rates form the shared experts; the others are clustered, in equal parts, by the tokens that activate them. A routed
    expert's score is |act(gate·x)·(up·x)| of its representative: the neuron nearest to the centroid of the expert's
    activation patterns. The representatives' rows of gate and up are the router, which has nothing to train.

    There are 16 experts in an FFN, and half of a token's experts are shared (rounded, at least one), as in the paper's
    settings; so there is one checkpoint for each budget. The number of routed experts is drawn for each token where the
    budget asks for no whole number. K is D / 16. Clusters are those of the balanced k-means that all methods use;
    the paper solves its balanced assignment exactly. The paper's scaling of experts by learned gates and its
    load-balancing bias, which starts at zero, are left out: selected experts count as in the dense model.
    """

    name = "cmoe"
    one_checkpoint = False
    num_experts = 16

    def __init__(self, model: torch.nn.Module, settings: Settings, budget: float | None = None) -> None:
        if budget is None:
            raise PrunePathError("Expected a budget for cmoe, which makes one checkpoint for each, got None.")
        super().__init__(model, settings, budget)
        self.num_shared = min(self.num_experts - 1, max(1, round(budget * self.num_experts / 2)))

    def partition_name(self) -> str:
        return f"cmoe-{self.num_shared}-shared"

    def group(self, ffn: SparseFFN, hidden: torch.Tensor) -> torch.Tensor:
        active = activated(hidden)
        order = active.mean(0).argsort(descending=True, stable=True)
        shared, routed = order.tensor_split([self.num_shared * ffn.expert_width])
        routed = routed.sort().values
        clusters = partition_neurons(
            "coactivation",
            ffn.num_experts - self.num_shared,
            intermediate_size=len(routed),
            profiles=active[:, routed],
            seed=self.settings.seed,
        )
        return torch.cat([shared.sort().values, routed[clusters.to(routed.device)]])

    def install_routers(self, inputs: list[torch.Tensor]) -> None:
        for ffn, x in zip(self.ffns, inputs, strict=True):
            patterns = activated(ffn.hidden(x[:_TOKENS]).float()).t()  # neurons are in the experts' order by now
            points = F.normalize(patterns - patterns.mean(1, keepdim=True), dim=1)
            experts = points.unflatten(0, (ffn.num_experts, -1))[self.num_shared :]  # [E_routed, n, P]
            distances = (experts - experts.mean(1, keepdim=True)).norm(dim=-1)
            first = torch.arange(self.num_shared, ffn.num_experts, device=x.device) * ffn.expert_width
            ffn.register_buffer("representatives", first + distances.argmin(-1), persistent=False)

    def choose(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            routed = ffn.num_experts - self.num_shared
            share = max(0.0, (self.step_budget * ffn.num_experts - self.num_shared) / routed)
            chosen = largest(self.scores(ffn, x, hidden), x, share, least=0.0)
            return torch.cat([chosen.new_ones(len(x), self.num_shared), chosen], dim=1)

    def scores(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Of the routed experts, [T, E_routed]."""
        return hidden[:, ffn.representatives].abs()

    def router_weights(self, ffn: SparseFFN) -> float:
        return len(ffn.representatives) * ffn.hidden_size * (len(ffn.tables()) - 1)


def activated(hidden: torch.Tensor) -> torch.Tensor:
    """The tokens' K = D / 16 neurons of the largest |h| (the paper's ATopK): float32 [P, D] of ones and zeros."""
    count = max(1, round(hidden.shape[1] * _ACTIVE_SHARE))
    return torch.zeros_like(hidden).scatter_(1, hidden.abs().topk(count).indices, 1.0)
