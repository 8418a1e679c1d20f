"""A router that nothing trains: a copy of the FFN's input weights, rounded to few bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from baselines.base import Batch
from baselines.experts import ThresholdMethod, mass_before
from prunepath.nn import SparseFFN
from prunepath.nn.experts import router_target
from prunepath.ops.reference import ACTIVATIONS

_GROUP = 64
_CLIP_FACTORS = 18


class _CopyRouter(ThresholdMethod):
    """The neurons that make up the share τ of all contributions, as a rounded copy of gate and up predicts them.

    ĉ_i = |act(ĝ_i·x)·(û_i·x)|·‖W_down[:, i]‖₂, in wider experts the root of the sum of their neurons' squares. The copy
    is rounded anew from the current weights before every training step and before calibration; no gradient goes
    through it. It reads `bits` for each weight of gate and up, and its scales; biases are not rounded.

    Attributes:
        bits: of a weight of the copy.
        group_size: weights that share a scale; None for a whole row.
    """

    bits: int
    group_size: int | None = _GROUP

    def install_routers(self, inputs: list[torch.Tensor]) -> None:
        super().install_routers(inputs)
        for ffn in self.ffns:
            ffn.register_buffer("copied", None, persistent=False)
            ffn.register_buffer("down_norm", None, persistent=False)
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for ffn in self.ffns:
            *inputs, down_t = ffn.tables()
            ffn.copied = torch.stack([rounded(table.float(), self.bits, self._group_of(ffn)) for table in inputs])
            ffn.down_norm = down_t.float().norm(dim=1)

    def _group_of(self, ffn: SparseFFN) -> int:
        whole = self.group_size is None or ffn.hidden_size % self.group_size
        return ffn.hidden_size if whole else self.group_size

    def before_step(self, progress: float) -> None:
        super().before_step(progress)
        self._round()

    def calibrate(self, batches: Sequence[Batch]) -> None:
        self._round()
        super().calibrate(batches)

    def priority(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        biases = [None if bias is None else bias.float() for bias in ffn.biases()]
        first, *second = (F.linear(x.float(), table, bias) for table, bias in zip(ffn.copied, biases, strict=False))
        predicted = ACTIVATIONS[ffn.layout.activation](first)
        for up in second:
            predicted = predicted * up
        contributions = predicted.abs() * ffn.down_norm
        if ffn.expert_width > 1:
            contributions = contributions.unflatten(-1, (ffn.num_experts, -1)).norm(dim=-1)
        return mass_before(router_target(contributions))

    def router_weights(self, ffn: SparseFFN) -> float:
        scales = 1 / self._group_of(ffn)  # in 16 bits
        return sum(table.numel() for table in ffn.tables()[:-1]) * (self.bits / 16 + scales)


class Copy2Bit(_CopyRouter):
    name = "copy-2bit"
    bits = 2
    group_size = None


class Copy3Bit(_CopyRouter):
    name = "copy-3bit"
    bits = 3


class Copy4Bit(_CopyRouter):
    name = "copy-4bit"
    bits = 4


def rounded(weights: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Weights [D, H] rounded to a symmetric grid of 2^bits levels, with a scale for each group of a row: float32.

    With 2 bits the levels are ±½ and ±1½ times the scale; with more, whole multiples, one more below zero than above.
    Scales are float16, the best in squared error of those that clip the group's largest magnitude by some factor.

    Args:
        group: weights of a row that share a scale; divides H.
    """
    values = weights.unflatten(1, (-1, group))
    peak = values.abs().amax(-1, keepdim=True)
    levels = 2**bits
    has_zero = bits > 2
    best = error = None
    for factor in torch.linspace(0.4 if has_zero else 0.15, 1.0, _CLIP_FACTORS).tolist():
        scale = peak * (2 * factor / (levels - 1 if has_zero else levels))
        scale = scale.half().float().clamp(min=2.0**-24)  # the smallest that float16 has
        if has_zero:
            candidate = (values / scale).round().clamp(-levels // 2, levels // 2 - 1) * scale
        else:
            candidate = ((values / scale).floor().clamp(-levels // 2, levels // 2 - 1) + 0.5) * scale
        errors = (candidate - values).square().sum(-1, keepdim=True)
        if best is None:
            best, error = candidate, errors
        else:
            better = errors < error
            best, error = torch.where(better, candidate, best), torch.where(better, errors, error)
    return best.flatten(1)
