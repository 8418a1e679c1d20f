"""LTE: Learn To be Efficient (arXiv 2402.06126)."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from baselines.base import Settings
from baselines.experts import ThresholdMethod
from baselines.routers import Standardised, fit_routers, router_targets
from prunepath.errors import PrunePathError
from prunepath.nn import SparseFFN
from prunepath.nn.observers import valid_tokens
from prunepath.train.router import contributions

_SOFT_SHARE = 0.5
_EFFICIENCY_WEIGHT = 0.1
_EFFICIENCY_GAIN = 0.5
_THRESHOLD_GAIN = 1.0
_SEPARABILITY_WEIGHT = 0.02
_SEPARABILITY_FLOOR = 0.05


class LTE(ThresholdMethod):
    """Sigmoid routers trained by the task's own loss, in two stages; one checkpoint for each budget.

    First half of fine-tuning: every expert runs, scaled by its gate g = σ(z). An efficiency loss, the mean of g², makes
    gates small; a separability loss, the mean of 1 / ((g − 0.5)² + ε), drives them away from the threshold 0.5. Second
    half: routers are frozen, experts above the threshold run unscaled, and the backbone adapts to that. ε bounds the
    separability loss; it and the weights of both losses are this implementation's, not the paper's.

    Where the paper tries coefficients of the efficiency loss for a wanted sparsity, here the coefficient grows while
    more gates than the budget are above 0.5, and shrinks while fewer are; what is left of the difference moves the
    threshold in the second half. Routers start from a classifier of the experts that contribute most, not from noise,
    so that LTE has a result without fine-tuning too.
    """

    name = "lte"
    expert_width = 32
    one_checkpoint = False
    shapes = ("shared",)

    def __init__(self, model: nn.Module, settings: Settings, budget: float | None = None) -> None:
        if budget is None:
            raise PrunePathError("Expected a budget for lte, which makes one checkpoint for each, got None.")
        super().__init__(model, settings, budget)

    def install_routers(self, inputs: list[torch.Tensor]) -> None:
        super().install_routers(inputs)
        for ffn, x in zip(self.ffns, inputs, strict=True):
            linear = nn.Linear(ffn.hidden_size, ffn.num_experts, device=x.device, dtype=torch.float32)
            ffn.predictor = nn.Sequential(Standardised(x), linear)
        targets = router_targets(self.ffns, inputs, self._target)
        loss = functools.partial(F.binary_cross_entropy_with_logits, reduction="none")
        fit_routers([ffn.predictor for ffn in self.ffns], inputs, targets, loss, self.settings.seed)
        self.soft = True
        self._log_weight = torch.zeros((), device=inputs[0].device)
        self._cut = torch.zeros((), device=inputs[0].device)
        self._shares: list[torch.Tensor] = []

    def _target(self, ffn: SparseFFN, hidden: torch.Tensor) -> torch.Tensor:
        values = contributions(ffn, hidden)
        best = values.topk(max(1, round(self.budget * ffn.num_experts))).indices
        return torch.zeros_like(values).scatter_(1, best, 1.0)

    def priority(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return -ffn.predictor(x)

    def before_step(self, progress: float) -> None:
        super().before_step(progress)
        if self._shares:
            excess = torch.stack(self._shares).mean() - self.budget
            if self.soft:
                self._log_weight += _EFFICIENCY_GAIN * excess
            else:
                self._cut += _THRESHOLD_GAIN * excess
        self._shares.clear()
        self.soft = progress < _SOFT_SHARE

    def choose(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().choose(ffn, x, hidden)
        with torch.set_grad_enabled(self.soft and torch.is_grad_enabled()):
            logits = ffn.predictor(x)
        active = logits.detach() > self._cut
        valid = valid_tokens(ffn, len(x))
        if valid is None:
            self._shares.append(active.float().mean())
        else:
            self._shares.append((active & valid.unsqueeze(1)).sum() / (valid.sum() * ffn.num_experts))
        if not self.soft:
            return active
        self._gates = logits.sigmoid()
        return self._gates.to(hidden.dtype)

    def token_losses(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor | None:
        if not self.soft:
            return None
        gates, self._gates = self._gates, None
        efficiency = _EFFICIENCY_WEIGHT * self._log_weight.exp() * gates.square()
        separability = _SEPARABILITY_WEIGHT / ((gates - 0.5).square() + _SEPARABILITY_FLOOR)
        return (efficiency + separability).mean(-1)
