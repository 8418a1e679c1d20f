"""Routers of other papers: small MLPs, fitted on stored inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from prunepath.nn import SparseFFN

_MINIBATCH = 256
_MIN_STEPS = 512
_LEARNING_RATE = 1e-3


class Standardised(nn.Module):
    """Subtracts the features' mean and divides by their standard deviation over `x` [N, H]; float32 out."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        values = x.float()
        self.register_buffer("mean", values.mean(0))
        self.register_buffer("std", values.std(0, correction=0).clamp_(min=1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() - self.mean) / self.std


def mlp_router(x: torch.Tensor, width: int, num_experts: int, activation: nn.Module) -> nn.Sequential:
    """H → width → E on standardised inputs, float32 [T, E]; `x` [N, H] sets the standardisation."""
    factory = {"device": x.device, "dtype": torch.float32}
    return nn.Sequential(
        Standardised(x),
        nn.Linear(x.shape[1], width, **factory),
        activation,
        nn.Linear(width, num_experts, **factory),
    )


def fit_routers(
    ffns: Sequence[SparseFFN],
    routers: Sequence[nn.Module],
    inputs: Sequence[torch.Tensor],
    loss: Callable[[SparseFFN, torch.Tensor], torch.Tensor],
    seed: int,
) -> None:
    """Trains all layers' routers at once by Adam with a cosine schedule.

    One epoch over the inputs x [N, H] of each FFN in minibatches of 256 tokens, as PrunePath's routers get, or 512
    steps where that is more.

    Args:
        loss: the loss of one FFN's router on x [256, H].
    """
    optimizer = torch.optim.Adam([p for router in routers for p in router.parameters()], lr=_LEARNING_RATE)
    steps = max(_MIN_STEPS, max(map(len, inputs)) // _MINIBATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.empty(0, dtype=torch.int64)] * len(ffns)
    with torch.enable_grad():
        for _ in range(steps):
            total = 0.0
            for i, (ffn, x) in enumerate(zip(ffns, inputs, strict=True)):
                if len(orders[i]) < _MINIBATCH:
                    orders[i] = torch.cat([orders[i], torch.randperm(len(x), generator=generator)])
                chosen, orders[i] = orders[i][:_MINIBATCH], orders[i][_MINIBATCH:]
                total = total + loss(ffn, x[chosen.to(x.device)])
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
