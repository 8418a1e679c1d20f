"""Routers of other papers: small MLPs, fitted on stored inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from prunepath.nn import SparseFFN

_MINIBATCH = 256
_MIN_STEPS = 512
_CHUNK = 4096
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


@torch.no_grad()
def router_targets(
    ffns: Sequence[SparseFFN],
    inputs: Sequence[torch.Tensor],
    target: Callable[[SparseFFN, torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """`target(ffn, hidden)` [T, E] of each FFN's inputs x [N, H] and their activations: float32 [N, E] each."""
    return [
        torch.cat([target(ffn, ffn.hidden(part)).float() for part in x.split(_CHUNK)])
        for ffn, x in zip(ffns, inputs, strict=True)
    ]


def fit_routers(
    routers: Sequence[nn.Module],
    inputs: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    seed: int,
) -> None:
    """Trains all layers' routers, which are alike, at once by Adam with a cosine schedule.

    One epoch over the inputs x [N, H] of each layer in minibatches of 256 tokens, as PrunePath's routers get, or 512
    steps where that is more. The layers are one batched computation: they are small, and there are many steps.

    Args:
        targets: what each router shall predict, [N, E].
        loss: of predictions and targets [L, 256, E], elementwise; a router's loss is its mean over the last two.
    """
    parameters, buffers = torch.func.stack_module_state(list(routers))
    skeleton = copy.deepcopy(routers[0]).to("meta")

    def predict(parameters: dict, buffers: dict, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(skeleton, (parameters, buffers), (x,))

    trained = list(parameters.values())
    optimizer = torch.optim.Adam(trained, lr=_LEARNING_RATE, fused=trained[0].is_cuda or None)
    steps = max(_MIN_STEPS, max(map(len, inputs)) // _MINIBATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    generator = torch.Generator().manual_seed(seed)
    orders = []
    for x in inputs:
        epochs = [torch.randperm(len(x), generator=generator) for _ in range(-(-steps * _MINIBATCH // len(x)))]
        orders.append(torch.cat(epochs)[: steps * _MINIBATCH].view(steps, _MINIBATCH).to(x.device))
    with torch.enable_grad():
        for step in range(steps):
            x, target = (
                torch.stack([each[order[step]] for each, order in zip(values, orders, strict=True)])
                for values in (inputs, targets)
            )
            predictions = torch.func.vmap(predict)(parameters, buffers, x)
            optimizer.zero_grad()
            loss(predictions, target).mean((1, 2)).sum().backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        for i, router in enumerate(routers):
            for name, parameter in router.named_parameters():
                parameter.copy_(parameters[name][i])
