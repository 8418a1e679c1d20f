"""Router, selection and FFN in one call, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .arithmetic import DOT_TOKENS, project, router_activate, to_float
from .ffn import block_tokens, ffn, power_of_2, stages
from .route import TILE, select_into


@triton.jit
def log_of_factor(factor, floor, row, valid):
    """¼·log(factor² + floor²), [rows, tokens]."""
    low = to_float(tl.load(floor + row, mask=valid, other=1.0))[:, None]
    return 0.25 * tl.log(factor * factor + low * low)


@triton.jit
def project_rows(
    weight,
    scale,
    bias,
    row,
    valid,
    tokens,
    stride,
    present,
    size,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Float32 scale·(weight·x) + bias, [rows, tokens]."""
    rows = weight + row.to(tl.int64) * size
    z = project(rows, valid, tokens, stride, present, size, ROWS, TOKENS, BLOCK)
    if scale is not None:
        z *= to_float(tl.load(scale + row, mask=valid, other=0.0))[:, None]
    if bias is not None:
        z += to_float(tl.load(bias + row, mask=valid, other=0.0))[:, None]
    return z


@triton.jit(do_not_specialize=["num_tokens"])
def router_kernel(
    x,
    weight,  # [rows, size], or [FACTORS * rows, size]; scale, bias and floor have as many
    scale,  # of weights in 4 bits, two in uint8; else None
    bias,
    floor,
    log_scale,  # [rows]
    out,  # float32 [T, rows]
    token_bits,  # int64 [ceil(T / 64), rows] or None: set to zero
    num_tokens,
    num_rows,
    size,
    x_token_stride,
    x_stride,
    FACTORS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scale·(weight·x) + bias in float32, or the logits of a router of so many factors. Grid: blocks of rows, tiles of
    64 tokens or fewer."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    valid = row < num_rows
    present = token < num_tokens
    tokens = x + token * x_token_stride
    z = project_rows(weight, scale, bias, row, valid, tokens, x_stride, present, size, ROWS, TOKENS, BLOCK)
    if FACTORS > 0:
        z = log_of_factor(router_activate(z, ACTIVATION), floor, row, valid)
        if FACTORS == 2:
            other = num_rows + row
            v = project_rows(weight, scale, bias, other, valid, tokens, x_stride, present, size, ROWS, TOKENS, BLOCK)
            z += log_of_factor(v, floor, other, valid)
        z += to_float(tl.load(log_scale + row, mask=valid, other=0.0))[:, None]
    tl.store(out + token[None, :] * num_rows + row[:, None], z, mask=valid[:, None] & present[None, :])
    if token_bits is not None:
        zeros = tl.zeros((ROWS,), tl.int64)
        tl.store(token_bits + tl.program_id(1).to(tl.int64) * num_rows + row, zeros, mask=valid)


def _project(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None = None,
    token_bits: Tensor | None = None,
    *,
    floor: Tensor | None = None,
    log_scale: Tensor | None = None,
    factors: int = 0,
    activation: str = "",
) -> Tensor:
    num_tokens, size, num_rows = x.shape[0], weight.shape[1], weight.shape[0] // max(factors, 1)
    out = torch.empty(num_tokens, num_rows, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    tokens = block_tokens(num_tokens)
    if tokens >= DOT_TOKENS:
        rows, block = 16, 32 if x.dtype == torch.float32 else 128
    else:
        block = power_of_2(size, 16, 4096 // tokens)
        rows = power_of_2(num_rows, 1, 4096 // tokens // block)
    router_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(num_tokens, TILE))](
        x,
        weight,
        scale,
        bias,
        floor,
        log_scale,
        out,
        token_bits,
        num_tokens,
        num_rows,
        size,
        *x.stride(),
        FACTORS=factors,
        ACTIVATION=activation,
        TOKENS=tokens,
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
        num_stages=stages(),
    )
    return out


def routed_ffn(
    x: Tensor,
    router_in: Tensor | None,
    router_out: Tensor,
    router_bias: Tensor | None,
    threshold: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    activation: str,
    *,
    router_in_scale: Tensor | None = None,
    router_out_scale: Tensor | None = None,
    router_floor: Tensor | None = None,
    router_log_scale: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    min_experts: int = 1,
    max_experts: int = 0,
) -> tuple[Tensor, Tensor]:
    """Router, top-mass selection and FFN: y [T, H], counts int32 [T]; see `prunepath.ops.routed_ffn`."""
    op = "routed_ffn"
    checks.check_ffn(op, x, gate, up, down_t, activation, gate_bias, up_bias, down_bias)
    num_experts, factors = checks.check_router(
        op,
        x,
        up,
        gate,
        router_in,
        router_out,
        router_bias,
        router_in_scale,
        router_out_scale,
        router_floor,
        router_log_scale,
    )
    num_tokens = x.shape[0]
    checks.check_threshold(op, threshold, "x", x)
    checks.check_limits(op, num_experts, min_experts, max_experts)
    counts = torch.empty(num_tokens, dtype=torch.int32, device=x.device)
    token_bits = torch.empty(triton.cdiv(num_tokens, TILE), num_experts, dtype=torch.int64, device=x.device)
    with torch.cuda.device_of(x):
        u = x if router_in is None else _project(x, router_in, router_in_scale)
        logits = _project(
            u,
            router_out,
            router_out_scale,
            router_bias,
            token_bits,
            floor=router_floor,
            log_scale=router_log_scale,
            factors=factors,
            activation=activation if factors > 0 else "",  # a linear router's kernel is the same for all
        )
        select_into(logits, threshold, min_experts, max_experts, counts, token_bits=token_bits)
        return ffn(x, gate, up, down_t, token_bits, activation, gate_bias, up_bias, down_bias), counts
