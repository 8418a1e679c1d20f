"""The FFN on the active experts alone, in Triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import checks
from .ffn import ffn, mark_kernel, power_of_2
from .route import TILE


def sparse_ffn(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    expert_ids: Tensor,
    counts: Tensor,
    activation: str,
    *,
    num_experts: int,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """y = b_down + Σ over active experts' neurons of h_j·down_t[j]; see `prunepath.ops.sparse_ffn`."""
    op = "sparse_ffn"
    checks.check_ffn(op, x, gate, up, down_t, activation, gate_bias, up_bias, down_bias)
    checks.check_num_experts(op, up, num_experts)
    checks.check_selection(op, x, expert_ids, counts)
    num_tokens, columns = expert_ids.shape
    token_bits = torch.zeros(triton.cdiv(num_tokens, TILE), num_experts, dtype=torch.int64, device=x.device)
    block = power_of_2(columns, 32, 1024)
    with torch.cuda.device_of(x):
        if expert_ids.numel() > 0:
            mark_kernel[(num_tokens, triton.cdiv(columns, block))](
                expert_ids, counts, token_bits, num_experts, columns, BLOCK=block
            )
        return ffn(x, gate, up, down_t, token_bits, activation, gate_bias, up_bias, down_bias)
