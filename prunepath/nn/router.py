"""The router: a linear map, of low rank or full rank, from a token's hidden state to a logit for each expert."""

from __future__ import annotations

import torch
from torch import nn

from prunepath.ops import reference


class Router(nn.Module):
    """z = W_out·(W_in·x) + b, whose softmax is each expert's share of the FFN's output.

    Its parameters require no gradient, since no model output has one for them: what trains routers says so.

    Args:
        hidden_size: H, the width of the FFN's input.
        num_experts: E.
        rank: r; W_in is [r, H] and W_out [E, r]. 0 is full rank: W_out is [E, H], and there is no W_in.
    """

    def __init__(self, hidden_size: int, num_experts: int, rank: int = 0, *, device=None, dtype=None) -> None:
        super().__init__()

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, device=device, dtype=dtype), requires_grad=False)

        self.rank = rank
        self.register_parameter("w_in", zeros(rank, hidden_size) if rank else None)
        self.w_out = zeros(num_experts, rank or hidden_size)
        self.bias = zeros(num_experts)

    def extra_repr(self) -> str:
        return f"num_experts={len(self.bias)}, rank={self.rank or 'full'}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 logits [T, E] of x [T, H] in any dtype.

        They are computed in float32 because half-precision logits tie often, and ties are broken by index alone.
        """
        with torch.autocast(x.device.type, enabled=False):
            return reference.router_logits(x.float(), self.w_in, self.w_out, self.bias)
