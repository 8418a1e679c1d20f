"""The FFN of up to 64 tokens, which costs what reading the active experts' weights costs.

An active neuron k is neuron list[k / n]·n + k % n, where `list` are the experts that any token chose. Every program
takes an equal range of active neurons, whatever their number, which it reads on the device: grids depend on shapes
alone. Tokens that did not choose an expert get zeros for its neurons' activations.

One token, in float32 up to 4: `router_kernel`, then `fused_kernel`, whose programs each compute their neurons'
activations and these neurons' part of the output, and the last programs to finish add the parts. More tokens:
`router_dot_kernel`, `hidden_kernel` for the activations, `output_kernel` for the output. All sums have a fixed order.
"""

import triton
import triton.language as tl

from .arithmetic import activate, dot, narrow, round_to_tf32, to_float
from .selection import LISTED, NUM_COUNTERS, PARTIALS, list_experts, select_all, wait_for

_NUM_COUNTERS = tl.constexpr(NUM_COUNTERS)


@triton.jit
def _wait_for_previous(OVERLAPS: tl.constexpr):
    """The first thing that a kernel does, in every program: one that OVERLAPS may start while the one before it on the
    stream runs. After this that one has ended, and those before it, which it waited for; the next one may start."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _fill_zeros(region, size, program, num_programs, BLOCK: tl.constexpr):
    """The program's share of setting int32 region [size] to zero."""
    for start in range(program * BLOCK, size, num_programs * BLOCK):
        lane = start + tl.arange(0, BLOCK)
        tl.store(region + lane, tl.zeros((BLOCK,), tl.int32), mask=lane < size)


@triton.jit(do_not_specialize=["num_tokens", "num_experts", "zeros_size"])
def router_kernel(
    x,
    weight,
    bias,
    logits,  # [T, E]
    zeros,  # what the next kernels want to be zero, int32 [zeros_size]
    zeros_size,
    num_tokens,
    num_experts,
    hidden_size,
    x_token_stride,
    x_stride,
    TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    _wait_for_previous(OVERLAPS)
    program = tl.program_id(0)
    expert = program * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    exists = expert < num_experts
    row = weight + expert.to(tl.int64)[:, None] * hidden_size
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros((BLOCK_EXPERTS, BLOCK_HIDDEN), tl.float32),)
    for start in range(0, hidden_size, BLOCK_HIDDEN):
        column = start + tl.arange(0, BLOCK_HIDDEN)
        inside = column < hidden_size
        w = to_float(tl.load(row + column[None, :], mask=exists[:, None] & inside[None, :], other=0.0))
        new = ()
        for token in tl.static_range(TOKENS):
            value = tl.load(x + token * x_token_stride + column.to(tl.int64) * x_stride, mask=inside, other=0.0)
            new = new + (sums[token] + w * to_float(value)[None, :],)
        sums = new
    for token in tl.static_range(TOKENS):
        z = tl.sum(sums[token], axis=1)
        if bias is not None:
            z += to_float(tl.load(bias + expert, mask=exists, other=0.0))
        tl.store(logits + token * num_experts + expert, z, mask=exists)
    _fill_zeros(zeros, zeros_size, program, tl.num_programs(0), 128)


@triton.jit(do_not_specialize=["num_tokens", "num_experts", "zeros_size"])
def router_dot_kernel(
    x,
    weight,
    bias,
    logits,  # [SPLITS, T, E], to be added up
    zeros,
    zeros_size,
    num_tokens,
    num_experts,
    hidden_size,
    x_token_stride,
    x_stride,
    SPLITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: blocks of experts, SPLITS, blocks of tokens."""
    _wait_for_previous(OVERLAPS)
    split = tl.program_id(1)
    expert = tl.program_id(0) * BLOCK_EXPERTS + tl.arange(0, BLOCK_EXPERTS)
    exists = expert < num_experts
    token = tl.program_id(2).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    present = token < num_tokens
    x_row = x + token[:, None] * x_token_stride
    w_row = weight + expert.to(tl.int64)[:, None] * hidden_size
    z = tl.zeros((BLOCK_TOKENS, BLOCK_EXPERTS), tl.float32)
    for start in range(split * BLOCK_HIDDEN, hidden_size, SPLITS * BLOCK_HIDDEN):
        column = start + tl.arange(0, BLOCK_HIDDEN)
        inside = column < hidden_size
        value = tl.load(
            x_row + column.to(tl.int64)[None, :] * x_stride, mask=present[:, None] & inside[None, :], other=0.0
        )
        w = tl.load(w_row + column[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
        z = dot(value, tl.trans(w), z, "ieee")
    if bias is not None:
        if split == 0:
            z += to_float(tl.load(bias + expert, mask=exists, other=0.0))[None, :]
    out = logits + (split * num_tokens.to(tl.int64) + token)[:, None] * num_experts + expert[None, :]
    tl.store(out, z, mask=present[:, None] & exists[None, :])
    program = tl.program_id(0) + tl.num_programs(0) * (split + SPLITS * tl.program_id(2))
    _fill_zeros(zeros, zeros_size, program, tl.num_programs(0) * SPLITS * tl.num_programs(2), 128)


@triton.jit
def _pre_activation(tile, x, bias, index, valid, is_gated: tl.constexpr):
    """Σ over columns of tile [N, H]·x [H], and the bias."""
    pre = tl.sum(to_float(tile) * x[None, :], axis=1)
    if bias is not None:
        pre += to_float(tl.load(bias + index, mask=valid, other=0.0))
    return pre


@triton.jit
def _listed(listed_experts, listed_words, rank, num_listed, BLOCK_EXPERTS: tl.constexpr):
    """The word and the expert of a rank in the list, as one number."""
    inside = rank < num_listed
    expert = tl.load(listed_experts + rank, mask=inside, other=0, cache_modifier=".cg")
    word = tl.load(listed_words + rank, mask=inside, other=0, cache_modifier=".cg").to(tl.int32)
    return word * BLOCK_EXPERTS + expert


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_experts",
        "expert_width",
        "min_experts",
        "max_experts",
        "num_selectors",
        "num_reducers",
        "threshold_stride",
    ]
)
def fused_kernel(
    x,
    w_in,
    w_out,
    b_in,
    b_out,
    center,
    logits,
    threshold,
    threshold_stride,
    expert_ids,
    counts,
    counters,
    words,
    listed_experts,
    listed_words,
    partials,  # float32 [programs, T, H]
    y,
    num_tokens,
    num_experts,
    expert_width,
    hidden_size,
    min_experts,
    max_experts,
    num_selectors,
    num_reducers,
    x_token_stride,
    x_stride,
    in_neuron_stride,
    in_inner_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    EXPERT_CHUNK: tl.constexpr,
    ALONE: tl.constexpr,
    BLOCK_NEURONS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_REDUCED: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of w_in and w_out to 16 bytes, H to 16 elements
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program holds whole rows: BLOCK_HIDDEN is at least H, BLOCK_NEURONS at most n, and TOKENS is T."""
    _wait_for_previous(OVERLAPS)
    inner: tl.constexpr = 2 if GATED else 1
    num_programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK_HIDDEN)
    inside = column < hidden_size
    xs = ()
    for token in tl.static_range(TOKENS):
        value = tl.load(x + token * x_token_stride + column.to(tl.int64) * x_stride, mask=inside, other=0.0)
        xs = xs + (to_float(value),)

    lane = tl.arange(0, BLOCK_EXPERTS)
    if ALONE:  # every program for itself, which takes less time than waiting for another
        program = tl.program_id(0)
        all_words = select_all(
            logits,
            threshold,
            threshold_stride,
            expert_ids,
            counts,
            num_tokens,
            num_experts,
            min_experts,
            max_experts,
            program == 0,
            TOKENS,
            1,
            BLOCK_EXPERTS,
            EXPERT_CHUNK,
        ).to(tl.int32)
        position = tl.cumsum((all_words != 0).to(tl.int32), axis=0) - 1
        num_listed = tl.sum((all_words != 0).to(tl.int32), axis=0)
        position = tl.where(all_words != 0, position, -1)
    else:
        program, num_listed = list_experts(
            logits,
            threshold,
            threshold_stride,
            expert_ids,
            counts,
            counters,
            words,
            listed_experts,
            listed_words,
            num_tokens,
            num_experts,
            min_experts,
            max_experts,
            num_selectors,
            1,
            BLOCK_EXPERTS,
        )

    num_active = num_listed * expert_width
    share = tl.maximum(tl.cdiv(num_active, num_programs), BLOCK_NEURONS)
    end = tl.minimum((program + 1) * share, num_active)
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros((BLOCK_HIDDEN,), tl.float32),)
    for start in tl.range(program * share, end, BLOCK_NEURONS, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_NEURONS)
        valid = k < end
        # A step has neurons of at most two experts. Scalars leave the layout of the blocks to the loads.
        rank = start // expert_width
        if ALONE:
            here = tl.sum(tl.where(position == rank, all_words * BLOCK_EXPERTS + lane, 0), axis=0)
            after = tl.sum(tl.where(position == rank + 1, all_words * BLOCK_EXPERTS + lane, 0), axis=0)
        else:
            here = _listed(listed_experts, listed_words, rank, num_listed, BLOCK_EXPERTS)
            after = _listed(listed_experts, listed_words, rank + 1, num_listed, BLOCK_EXPERTS)
        entry = tl.where(k // expert_width == rank, here, after)
        expert = entry % BLOCK_EXPERTS
        word = entry // BLOCK_EXPERTS
        neuron = (expert * expert_width + k % expert_width).to(tl.int64)
        mask = valid[:, None] & inside[None, :]
        in_row = w_in + neuron[:, None] * in_neuron_stride + column[None, :]
        out_row = w_out + neuron[:, None] * hidden_size + column[None, :]
        if ALIGNED:  # which Triton 3.9 does not find out by itself
            mask = tl.max_constancy(mask, [1, 16])
            in_row = tl.multiple_of(tl.max_contiguous(in_row, [1, BLOCK_HIDDEN]), [1, 16])
            out_row = tl.multiple_of(tl.max_contiguous(out_row, [1, BLOCK_HIDDEN]), [1, 16])
        first = tl.load(in_row, mask=mask, other=0.0, eviction_policy="evict_first")
        if GATED:
            second = tl.load(in_row + in_inner_stride, mask=mask, other=0.0, eviction_policy="evict_first")
        down = tl.load(out_row, mask=mask, other=0.0, eviction_policy="evict_first")

        new = ()
        for token in tl.static_range(TOKENS):
            h = activate(_pre_activation(first, xs[token], b_in, neuron * inner, valid, GATED), ACTIVATION)
            if GATED:
                h *= _pre_activation(second, xs[token], b_in, neuron * inner + 1, valid, GATED)
            if center is not None:
                h -= to_float(tl.load(center + neuron, mask=valid, other=0.0))
            h = tl.where(valid & (((word >> token) & 1) != 0), h, 0.0)
            new = new + (sums[token] + tl.sum(to_float(down) * h[:, None], axis=0),)
        sums = new

    if program * share < end:
        for token in tl.static_range(TOKENS):
            part = partials + (program * num_tokens + token).to(tl.int64) * hidden_size
            tl.store(part + column, sums[token], mask=inside)

    # The last programs to get here each add up some columns.
    tl.debug_barrier()  # the whole program's part before its arrival
    turn = tl.atomic_add(counters + PARTIALS, 1, sem="acq_rel") - (num_programs - num_reducers)
    if turn >= 0:
        arrived = wait_for(counters + PARTIALS, num_programs)
        num_parts = tl.where(arrived < num_programs, 0, tl.cdiv(num_active, share))
        ROWS: tl.constexpr = 8192 // BLOCK_REDUCED
        row = tl.arange(0, ROWS)
        for block in range(turn, tl.cdiv(hidden_size, BLOCK_REDUCED), num_reducers):
            out = block * BLOCK_REDUCED + tl.arange(0, BLOCK_REDUCED)
            out_inside = out < hidden_size
            for of_token in range(num_tokens):
                total = tl.zeros((ROWS, BLOCK_REDUCED), tl.float32)
                for first_part in range(0, num_parts, ROWS):
                    part = first_part + row
                    total += tl.load(
                        partials + (part * num_tokens + of_token).to(tl.int64)[:, None] * hidden_size + out[None, :],
                        mask=(part < num_parts)[:, None] & out_inside[None, :],
                        other=0.0,
                        cache_modifier=".cg",
                    )
                result = tl.sum(total, axis=0)
                if b_out is not None:
                    result += to_float(tl.load(b_out + out, mask=out_inside, other=0.0))
                place = y + of_token * hidden_size + out
                tl.store(place, narrow(result, y.dtype.element_ty), mask=out_inside)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_experts",
        "expert_width",
        "min_experts",
        "max_experts",
        "num_selectors",
        "threshold_stride",
    ]
)
def hidden_kernel(
    x,
    w_in,
    b_in,
    center,
    logits,
    threshold,
    threshold_stride,
    expert_ids,
    counts,
    counters,
    words,
    listed_experts,
    listed_words,
    hidden,  # [T, D], of which the active neurons' columns are written, and zeros up to a multiple of 8
    num_tokens,
    num_experts,
    expert_width,
    hidden_size,
    min_experts,
    max_experts,
    num_selectors,
    x_token_stride,
    x_stride,
    in_neuron_stride,
    in_inner_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ROUNDED: tl.constexpr,  # to tf32
    SPLITS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_NEURONS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    _wait_for_previous(OVERLAPS)
    program, num_listed = list_experts(
        logits,
        threshold,
        threshold_stride,
        expert_ids,
        counts,
        counters,
        words,
        listed_experts,
        listed_words,
        num_tokens,
        num_experts,
        min_experts,
        max_experts,
        num_selectors,
        SPLITS,
        BLOCK_EXPERTS,
    )
    num_active = num_listed * expert_width
    share = tl.maximum(tl.cdiv(num_active, tl.num_programs(0)), BLOCK_NEURONS)
    end = tl.minimum((program + 1) * share, num_active)
    token = tl.arange(0, BLOCK_TOKENS)
    present = token < num_tokens
    x_row = x + token.to(tl.int64)[:, None] * x_token_stride
    h_row = hidden + token.to(tl.int64)[:, None] * (num_experts * expert_width)
    for start in range(program * share, end, BLOCK_NEURONS):
        k = start + tl.arange(0, BLOCK_NEURONS)
        valid = k < end
        rank = k // expert_width
        expert = tl.load(listed_experts + rank, mask=valid, other=0, cache_modifier=".cg")
        word = tl.load(listed_words + rank, mask=valid, other=0, cache_modifier=".cg")
        neuron = (expert * expert_width + k % expert_width).to(tl.int64)
        h = project(
            x_row,
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
        h = tl.where(((word[None, :] >> token[:, None]) & 1) != 0, h, 0.0)
        if ROUNDED:
            h = round_to_tf32(h)
        tl.store(h_row + k[None, :], narrow(h, hidden.dtype.element_ty), mask=present[:, None] & valid[None, :])
    if program == 0:  # zeros up to a multiple of 8, which `output_kernel` reads
        tail = num_active + tl.arange(0, 8)
        place_inside = (tail < tl.cdiv(num_active, 8) * 8) & (tail < num_experts * expert_width)
        zeros = tl.zeros((BLOCK_TOKENS, 8), hidden.dtype.element_ty)
        tl.store(h_row + tail[None, :], zeros, mask=present[:, None] & place_inside[None, :])


@triton.jit
def project(
    x_row,
    x_stride,
    present,
    in_row,
    in_inner_stride,
    b_in,
    center,
    neuron,
    valid,
    hidden_size,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_NEURONS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """The centred activations [BLOCK_TOKENS, BLOCK_NEURONS] of tokens and neurons whose rows the pointers name."""
    first = tl.zeros((BLOCK_TOKENS, BLOCK_NEURONS), tl.float32)
    second = tl.zeros((BLOCK_TOKENS, BLOCK_NEURONS), tl.float32)
    for start in range(0, hidden_size, BLOCK_HIDDEN):
        column = start + tl.arange(0, BLOCK_HIDDEN)
        inside = column < hidden_size
        value = tl.load(
            x_row + column.to(tl.int64)[None, :] * x_stride, mask=present[:, None] & inside[None, :], other=0.0
        )
        mask = valid[:, None] & inside[None, :]
        first = dot(value, tl.trans(tl.load(in_row + column[None, :], mask=mask, other=0.0)), first, "ieee")
        if GATED:
            w = tl.load(in_row + in_inner_stride + column[None, :], mask=mask, other=0.0)
            second = dot(value, tl.trans(w), second, "ieee")
    inner: tl.constexpr = 2 if GATED else 1
    if b_in is not None:
        first += to_float(tl.load(b_in + neuron * inner, mask=valid, other=0.0))[None, :]
    h = activate(first, ACTIVATION)
    if GATED:
        if b_in is not None:
            second += to_float(tl.load(b_in + neuron * inner + 1, mask=valid, other=0.0))[None, :]
        h *= second
    if center is not None:
        h -= to_float(tl.load(center + neuron, mask=valid, other=0.0))[None, :]
    return h


@triton.jit(do_not_specialize=["num_tokens", "expert_width"])
def output_kernel(
    hidden,
    w_out,
    b_out,
    counters,
    listed_experts,
    partials,  # float32 [SPLITS, T, H]
    y,
    num_tokens,
    num_neurons,  # D
    expert_width,
    hidden_size,
    PRECISION: tl.constexpr,
    LISTED_ALONE: tl.constexpr,  # hidden holds the listed experts' neurons, else all
    SPLITS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_NEURONS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: blocks of columns, SPLITS of the neurons, blocks of tokens (one, if there are SPLITS)."""
    _wait_for_previous(OVERLAPS)
    column_block = tl.program_id(0)
    split = tl.program_id(1)
    num_active = num_neurons
    if LISTED_ALONE:
        num_active = (tl.load(counters + LISTED) - 1) * expert_width
    share = tl.cdiv(tl.cdiv(num_active, SPLITS), 16) * 16  # aligned, for wide loads
    end = tl.minimum((split + 1) * share, num_active)
    token = tl.program_id(2).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    present = token < num_tokens
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < hidden_size
    h_row = hidden + token[:, None] * num_neurons
    total = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), tl.float32)
    for start in range(split * share, end, BLOCK_NEURONS):
        k = start + tl.arange(0, BLOCK_NEURONS)
        valid = k < end
        neuron = k
        if LISTED_ALONE:
            expert = tl.load(listed_experts + k // expert_width, mask=valid, other=0)
            neuron = expert * expert_width + k % expert_width
        # In whole groups of 8, for wide loads: the columns up to a multiple of 8 are zeros.
        loaded = (k // 8 * 8 < end) & (k < num_neurons)
        h = tl.load(h_row + k[None, :], mask=present[:, None] & loaded[None, :], other=0.0)
        w = tl.load(
            w_out + neuron.to(tl.int64)[:, None] * hidden_size + column[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0.0,
        )
        total = dot(h, w.to(h.dtype), total, PRECISION)

    mask = present[:, None] & inside[None, :]
    if SPLITS == 1:
        is_last = True
    else:
        part = partials + token[:, None] * hidden_size + column[None, :]
        part_size = num_tokens.to(tl.int64) * hidden_size
        tl.store(part + split * part_size, total, mask=mask)
        tl.debug_barrier()  # the whole program's part before its arrival
        arrivals = tl.atomic_add(counters + _NUM_COUNTERS + column_block, 1, sem="acq_rel")
        is_last = arrivals == SPLITS - 1
        if is_last:
            total = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), tl.float32)
            for other in tl.static_range(SPLITS):
                total += tl.load(part + other * part_size, mask=mask, other=0.0, cache_modifier=".cg")
    if is_last:
        if b_out is not None:
            total += to_float(tl.load(b_out + column, mask=inside, other=0.0))[None, :]
        place = y + token[:, None] * hidden_size + column[None, :]
        tl.store(place, narrow(total, y.dtype.element_ty), mask=mask)
