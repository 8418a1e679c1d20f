"""The FFN of more than 64 tokens: activations of the tokens that chose an expert, gathered, then a dense product.

The activations that nobody computes are zeros that the caller fills in. Nothing is read on the host: grids are for the
most tokens that an expert can have, and programs without tokens return.
"""

import triton
import triton.language as tl

from .arithmetic import narrow, round_to_tf32
from .decode import project


@triton.jit(do_not_specialize=["num_tokens", "num_columns"])
def mark_kernel(expert_ids, counts, chosen, num_tokens, num_columns, BLOCK: tl.constexpr):
    """One program a token: chosen int8 [E, T], zeros before, is 1 where the token chose the expert."""
    token = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + token)
    for start in range(0, count, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        active = lane < count
        expert = tl.load(expert_ids + token * num_columns + lane, mask=active, other=0)
        tl.store(chosen + expert.to(tl.int64) * num_tokens + token, tl.full((BLOCK,), 1, tl.int8), mask=active)


@triton.jit(do_not_specialize=["num_tokens"])
def group_kernel(chosen, tokens, num_chosen, num_tokens, BLOCK: tl.constexpr):
    """One program an expert: its tokens [E, T], in ascending order, and their number [E]."""
    expert = tl.program_id(0)
    row = expert.to(tl.int64) * num_tokens
    count = tl.zeros((), tl.int32)
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        flag = tl.load(chosen + row + token, mask=token < num_tokens, other=0).to(tl.int32)
        place = count + tl.cumsum(flag, axis=0) - 1
        tl.store(tokens + row + place, token, mask=flag != 0)
        count += tl.sum(flag, axis=0)
    tl.store(num_chosen + expert, count)


@triton.jit(do_not_specialize=["num_tokens", "num_experts", "expert_width"])
def grouped_hidden_kernel(
    x,
    w_in,
    b_in,
    center,
    tokens,
    num_chosen,
    hidden,  # [T, D]
    num_tokens,
    num_experts,
    expert_width,
    hidden_size,
    x_token_stride,
    x_stride,
    in_neuron_stride,
    in_inner_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ROUNDED: tl.constexpr,  # to tf32
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_NEURONS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Grid: blocks of neurons of all experts, blocks of an expert's tokens."""
    blocks = tl.cdiv(expert_width, BLOCK_NEURONS)
    expert = tl.program_id(0) // blocks
    count = tl.load(num_chosen + expert)
    start = tl.program_id(1) * BLOCK_TOKENS
    if start >= count:
        return
    position = start + tl.arange(0, BLOCK_TOKENS)
    present = position < count
    token = tl.load(tokens + expert.to(tl.int64) * num_tokens + position, mask=present, other=0).to(tl.int64)
    local = (tl.program_id(0) % blocks) * BLOCK_NEURONS + tl.arange(0, BLOCK_NEURONS)
    valid = local < expert_width
    neuron = (expert * expert_width + local).to(tl.int64)
    h = project(
        x + token[:, None] * x_token_stride,
        x_stride,
        present,
        w_in + neuron[:, None] * in_neuron_stride,
        in_inner_stride,
        b_in,
        center,
        neuron,
        valid,
        hidden_size,
        ACTIVATION,
        GATED,
        BLOCK_TOKENS,
        BLOCK_NEURONS,
        BLOCK_HIDDEN,
    )
    if ROUNDED:
        h = round_to_tf32(h)
    place = hidden + token[:, None] * (num_experts * expert_width) + neuron[None, :]
    tl.store(place, narrow(h, hidden.dtype.element_ty), mask=present[:, None] & valid[None, :])
