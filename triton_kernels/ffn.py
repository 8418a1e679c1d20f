"""Kernels of the FFN on the active experts alone: the experts that any of up to 64 tokens runs, listed; their neurons'
activations; the product with the down projection, in parts of the neurons; the parts' sums. The same order of
summation every time."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import DOT_TOKENS, INTERPRETED, activate, dot, narrow, project, round_to_tf32, to_float
from .route import TILE

_DOT_TOKENS = tl.constexpr(DOT_TOKENS)


@triton.jit
def mark_kernel(expert_ids, counts, token_bits, num_experts, columns, BLOCK: tl.constexpr):
    """Sets the tokens' bits of the experts given to them. Grid: tokens, blocks of columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < tl.minimum(tl.load(counts + token), columns)
    expert = tl.load(expert_ids + token * columns + column, mask=valid, other=-1)
    valid = (expert >= 0) & (expert < num_experts)
    bit = tl.full((BLOCK,), 1, tl.int64) << (token % 64)
    tl.atomic_or(token_bits + token // 64 * num_experts + expert, bit, mask=valid, sem="relaxed")


@triton.jit
def list_kernel(token_bits, experts, bits, num_listed, num_experts, BLOCK: tl.constexpr):
    """Lists the experts that a token runs, ascending, with their tokens. Grid: blocks of experts, tiles of tokens."""
    block = tl.program_id(0)
    tile = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    row = tile.to(tl.int64) * num_experts
    seen = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, block * BLOCK, BLOCK):
        seen += (tl.load(token_bits + row + start + lane) != 0).to(tl.int32)
    expert = block * BLOCK + lane
    word = tl.load(token_bits + row + expert, mask=expert < num_experts, other=0)
    listed = (word != 0).to(tl.int32)
    place = row + tl.sum(seen, axis=0) + tl.cumsum(listed, axis=0) - 1
    tl.store(experts + place, expert, mask=word != 0)
    tl.store(bits + place, word, mask=word != 0)
    if block == tl.num_programs(0) - 1:
        tl.store(num_listed + tile, tl.sum(seen, axis=0) + tl.sum(listed, axis=0))


@triton.jit(do_not_specialize=["num_tokens", "expert_width"])
def hidden_kernel(
    x,
    gate,
    up,
    gate_bias,
    up_bias,
    experts,
    bits,
    num_listed,
    hidden,  # [D, TOKENS], of which the rows of active neurons, in the list's order, are written
    num_tokens,
    expert_width,
    hidden_size,
    x_token_stride,
    x_stride,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    ROUNDED: tl.constexpr,  # to tf32
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.arange(0, TOKENS)
    present = token < num_tokens
    x_rows = x + token.to(tl.int64) * x_token_stride
    num_active = tl.load(num_listed) * expert_width
    for start in range(tl.program_id(0) * NEURONS, num_active, tl.num_programs(0) * NEURONS):
        place = start + tl.arange(0, NEURONS)
        valid = place < num_active
        expert = tl.load(experts + place // expert_width, mask=valid, other=0)
        word = tl.load(bits + place // expert_width, mask=valid, other=0)
        neuron = (expert * expert_width + place % expert_width).to(tl.int64)
        rows = up + neuron * up_stride
        h = project(rows, valid, x_rows, x_stride, present, hidden_size, NEURONS, TOKENS, BLOCK)
        if up_bias is not None:
            h += to_float(tl.load(up_bias + neuron, mask=valid, other=0.0))[:, None]
        if gate is None:
            h = activate(h, ACTIVATION)
        else:
            rows = gate + neuron * gate_stride
            g = project(rows, valid, x_rows, x_stride, present, hidden_size, NEURONS, TOKENS, BLOCK)
            if gate_bias is not None:
                g += to_float(tl.load(gate_bias + neuron, mask=valid, other=0.0))[:, None]
            h *= activate(g, ACTIVATION)
        h = tl.where(((word[:, None] >> token[None, :]) & 1) != 0, h, 0.0)
        if ROUNDED:
            h = round_to_tf32(h)
        out = hidden + place.to(tl.int64)[:, None] * TOKENS + token[None, :]
        tl.store(out, narrow(h, hidden.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["expert_width"])
def down_kernel(
    hidden,
    down_t,
    experts,
    num_listed,
    partials,  # float32 [splits, TOKENS, H]
    expert_width,
    hidden_size,
    down_stride,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: blocks of columns, equal ranges of the active neurons."""
    split = tl.program_id(1)
    num_active = tl.load(num_listed) * expert_width
    share = tl.cdiv(tl.cdiv(num_active, NEURONS), tl.num_programs(1)) * NEURONS
    end = tl.minimum((split + 1) * share, num_active)
    lane = tl.arange(0, NEURONS)
    token = tl.arange(0, TOKENS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden_size
    if TOKENS >= _DOT_TOKENS:
        total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    else:  # summed along neurons once, at the end
        total = tl.zeros((NEURONS, TOKENS, COLUMNS), tl.float32)
    for start in range(split * share, end, NEURONS):
        place = start + lane
        valid = place < end
        expert = tl.load(experts + place // expert_width, mask=valid, other=0)
        row = down_t + (expert * expert_width + place % expert_width).to(tl.int64) * down_stride
        h = hidden + place.to(tl.int64) * TOKENS
        if TOKENS >= _DOT_TOKENS:
            w = tl.load(row[:, None] + column[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
            value = tl.load(h[None, :] + token[:, None], mask=valid[None, :], other=0.0)
            if value.dtype == tl.float32:
                w = to_float(w)
            total = dot(value, w, total, PRECISION)
        else:
            mask = valid[:, None, None] & inside[None, None, :]
            w = tl.load(row[:, None, None] + column[None, None, :], mask=mask, other=0.0)
            value = tl.load(h[:, None, None] + token[None, :, None], mask=valid[:, None, None], other=0.0)
            total += to_float(w) * value
    if TOKENS < _DOT_TOKENS:
        total = tl.sum(total, axis=0)
    out = partials + (split * TOKENS + token).to(tl.int64)[:, None] * hidden_size + column[None, :]
    tl.store(out, total, mask=inside[None, :])


@triton.jit(do_not_specialize=["splits"])
def sum_kernel(
    partials,
    down_bias,
    y,
    splits,
    hidden_size,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds the parts and the bias. Grid: blocks of columns, tokens."""
    token = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden_size
    total = tl.zeros((SPLITS, COLUMNS), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        part = partials + (split * TOKENS + token).to(tl.int64)[:, None] * hidden_size + column[None, :]
        total += tl.load(part, mask=(split < splits)[:, None] & inside[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    if down_bias is not None:
        result += to_float(tl.load(down_bias + column, mask=inside, other=0.0))
    out = y + token.to(tl.int64) * hidden_size + column
    tl.store(out, narrow(result, y.dtype.element_ty), mask=inside)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def block_tokens(num_tokens: int) -> int:
    """The tokens that a tile of so many is padded to: up to 4 are summed alone, more are multiplied as a matrix."""
    tokens = triton.next_power_of_2(min(num_tokens, TILE))
    return tokens if tokens <= 4 else max(DOT_TOKENS, tokens)


def power_of_2(value: int, least: int, most: int) -> int:
    """`value` rounded up to a power of two, within bounds that are powers of two."""
    return max(least, min(most, triton.next_power_of_2(max(value, 1))))


def stages() -> int:
    return 2 if torch.version.hip is not None else 3


def ffn(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    token_bits: Tensor,
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """y [T, H]. `token_bits` int64 [ceil(T / 64), E] says which tokens of a tile of 64 run an expert."""
    device = x.device
    y = torch.empty(x.shape, dtype=x.dtype, device=device)
    if y.numel() == 0:
        return y
    (num_tokens, hidden_size), num_neurons = x.shape, up.shape[0]
    tiles, num_experts = token_bits.shape
    width = num_neurons // num_experts
    tokens = block_tokens(num_tokens)
    is_dot, is_wide = tokens >= DOT_TOKENS, x.dtype == torch.float32

    if is_dot:
        neurons, block = (16, 32) if is_wide else (min(64, 2 * tokens), 128)
        down_neurons, columns = (16, 64) if is_wide else (32, 128)
        programs = 4 * num_multiprocessors(device)
    else:
        neurons, block = max(2, 4 // tokens), power_of_2(hidden_size, 16, 1024)
        down_neurons, columns = max(4, 16 // tokens), power_of_2(hidden_size, 16, 256)
        programs = 8 * num_multiprocessors(device)
    column_blocks = max(1, triton.cdiv(hidden_size, columns))
    splits = max(1, min(programs // column_blocks, 64, triton.cdiv(num_neurons, down_neurons)))
    precision = "tf32" if x.dtype == torch.float16 and torch.version.hip is None else "ieee"

    experts = torch.empty(tiles, num_experts, dtype=torch.int32, device=device)
    bits = torch.empty(tiles, num_experts, dtype=torch.int64, device=device)
    num_listed = torch.empty(tiles, dtype=torch.int32, device=device)
    # Large activations do not fit in float16.
    hidden_dtype = torch.bfloat16 if is_dot and x.dtype == torch.bfloat16 else torch.float32
    hidden = torch.empty(num_neurons, tokens, dtype=hidden_dtype, device=device)
    partials = torch.empty(splits, tokens, hidden_size, dtype=torch.float32, device=device)

    block_experts = power_of_2(num_experts, 32, 4096)
    list_kernel[(triton.cdiv(num_experts, block_experts), tiles)](
        token_bits, experts, bits, num_listed, num_experts, BLOCK=block_experts, num_warps=8
    )
    for tile in range(tiles):
        x_tile, y_tile = x[tile * TILE : (tile + 1) * TILE], y[tile * TILE : (tile + 1) * TILE]
        hidden_kernel[(max(1, min(2 * programs, triton.cdiv(num_neurons, neurons))),)](
            x_tile,
            gate,
            up,
            gate_bias,
            up_bias,
            experts[tile],
            bits[tile],
            num_listed[tile:],
            hidden,
            x_tile.shape[0],
            width,
            hidden_size,
            *x.stride(),
            0 if gate is None else gate.stride(0),
            up.stride(0),
            ACTIVATION=activation,
            ROUNDED=is_dot and precision == "tf32",
            TOKENS=tokens,
            NEURONS=neurons,
            BLOCK=block,
            num_warps=8 if neurons * tokens >= 4096 else 4,
            num_stages=stages(),
        )
        down_kernel[(column_blocks, splits)](
            hidden,
            down_t,
            experts[tile],
            num_listed[tile:],
            partials,
            width,
            hidden_size,
            down_t.stride(0),
            PRECISION=precision,
            TOKENS=tokens,
            NEURONS=down_neurons,
            COLUMNS=columns,
            num_warps=4,
            num_stages=stages(),
        )
        sum_columns = power_of_2(hidden_size, 16, 128)
        sum_kernel[(triton.cdiv(hidden_size, sum_columns), x_tile.shape[0])](
            partials,
            down_bias,
            y_tile,
            splits,
            hidden_size,
            TOKENS=tokens,
            SPLITS=power_of_2(splits, 1, 16),
            COLUMNS=sum_columns,
            num_warps=4,
        )
    return y
