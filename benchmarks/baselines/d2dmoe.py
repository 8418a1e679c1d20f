"""D2DMoE: Dense to Dynamic-k Mixture-of-Experts (arXiv 2310.04361)."""

from __future__ import annotations

import torch
from torch import nn

from baselines.experts import ThresholdMethod
from baselines.routers import fit_routers, mlp_router, router_targets
from prunepath.nn import SparseFFN
from prunepath.train.router import contributions

_ROUTER_WIDTH = 128
_ENFORCEMENT_SHARE = 1 / 3
_HOYER_WEIGHT = 0.1


class _D2DMoE(ThresholdMethod):
    """Routers that regress the norms of the experts' outputs; experts run where the prediction is large.

    The router has two layers, 128 wide, ReLU inside and an absolute value at its end, and learns
    ‖E_i(x)‖₂ by mean squared error; norms are measured in units of the layer's mean norm. The first third of
    fine-tuning is the paper's sparsity enforcement: the dense model, plus a square-Hoyer penalty on the
    activations. The rest is any-budget training with the rule of selection, which the paper does not have. Experts are
    those of the model before enforcement, and routers follow the backbone throughout.
    """

    partition = "coactivation"
    expert_width = 32
    enforcing = False

    def install_routers(self, inputs: list[torch.Tensor]) -> None:
        super().install_routers(inputs)
        for ffn, x in zip(self.ffns, inputs, strict=True):
            ffn.predictor = mlp_router(x, _ROUTER_WIDTH, ffn.num_experts, nn.ReLU())
            ffn.register_buffer("norm_scale", contributions(ffn, ffn.hidden(x[:4096])).mean().clamp(min=1e-12))
        targets = router_targets(self.ffns, inputs, self._target)
        routers = [ffn.predictor for ffn in self.ffns]
        fit_routers(routers, inputs, targets, self._losses, self.settings.seed)

    def predicted_norms(self, ffn: SparseFFN, x: torch.Tensor) -> torch.Tensor:
        """Float32 [T, E], in units of the layer's mean norm."""
        return ffn.predictor(x).abs()

    def draw_budget(self, progress: float) -> float:
        self.enforcing = progress < _ENFORCEMENT_SHARE
        return 1.0 if self.enforcing else super().draw_budget(progress)

    def token_losses(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        losses = self._losses(ffn.predictor(x.detach()), self._target(ffn, hidden)).mean(-1)
        return losses + _HOYER_WEIGHT * square_hoyer(hidden) if self.enforcing else losses

    @torch.no_grad()
    def _target(self, ffn: SparseFFN, hidden: torch.Tensor) -> torch.Tensor:
        return contributions(ffn, hidden) / ffn.norm_scale

    @staticmethod
    def _losses(predictions: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (predictions.abs() - target).square()


class D2DMoERelative(_D2DMoE):
    """Dynamic-k, the paper's rule: experts whose predicted norm is at least τ times the token's largest."""

    name = "d2dmoe-relative"

    def priority(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        norms = self.predicted_norms(ffn, x)
        return -norms / norms.amax(-1, keepdim=True).clamp(min=1e-12)


class D2DMoEAbsolute(_D2DMoE):
    """Experts whose predicted norm is at least τ: tokens with small outputs run fewer."""

    name = "d2dmoe-absolute"

    def priority(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return -self.predicted_norms(ffn, x) * ffn.norm_scale


def square_hoyer(hidden: torch.Tensor) -> torch.Tensor:
    """(Σ|h|)² / (D·Σh²) of each token of [T, D]: 1 for equal magnitudes, 1/D for a single active neuron."""
    h = hidden.float()
    return h.abs().sum(-1).square() / (h.shape[-1] * h.square().sum(-1).clamp(min=1e-12))
