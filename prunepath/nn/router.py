"""The router: one linear map from a token's hidden state to a logit for each expert."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Router(nn.Linear):
    """z = W_r·x + b_r, whose softmax is each expert's share of the FFN's output.

    Args:
        hidden_size: H, the width of the FFN's input.
        num_experts: E.
    """

    def __init__(self, hidden_size: int, num_experts: int, *, device=None, dtype=None) -> None:
        super().__init__(hidden_size, num_experts, bias=True, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 logits [T, E] of x [T, H] in any dtype.

        They are computed in float32 because half-precision logits tie often, and ties are broken by index alone.
        """
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())
