"""Which experts the tokens of a decoding call run: a part of the FFN's kernels, at whose start it runs.

A call's tokens are bits of one word for each expert, so that an expert's weights are read once for all of them.
"""

import triton
import triton.language as tl

from .route import route_row

# With up to this many experts, every program of `fused_kernel` selects for itself.
MAX_ALONE_EXPERTS = 256

# int32 counters at the start of the workspace, zero when the first kernel that uses them starts.
TICKETS = tl.constexpr(0)  # programs that have started
SELECTED = tl.constexpr(1)  # programs that have selected all of their tokens' experts
LISTED = tl.constexpr(2)  # 0 until the active experts are listed; then their number plus one
PARTIALS = tl.constexpr(3)  # programs that have written their partial sums
NUM_COUNTERS = 4  # and from here on one for each block of output columns


@triton.jit
def wait_for(counter, value):
    """Waits until a counter that other programs raise is at least `value`, and returns it.

    What they wrote before is seen by loads that depend on the result; compilers move other loads to before the wait.
    """
    seen = tl.atomic_add(counter, 0, sem="acquire")
    while seen < value:
        seen = tl.atomic_add(counter, 0, sem="acquire")
    return seen


@triton.jit
def _load_logits(logits, token, expert, num_tokens, num_experts, SPLITS: tl.constexpr):
    """float32 logits of one token, -inf beyond the last expert: the sum of their SPLITS parts."""
    exists = expert < num_experts
    z = tl.load(logits + token * num_experts + expert, mask=exists, other=-float("inf"))
    for split in tl.static_range(1, SPLITS):
        z += tl.load(logits + (split * num_tokens + token) * num_experts + expert, mask=exists, other=0.0)
    return z


@triton.jit
def sort_experts(
    logits,
    token,
    tau,
    num_tokens,
    num_experts,
    min_experts,
    max_experts,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which of the BLOCK experts are active for a token: the last of `route_row`'s, and those before it."""
    i = tl.arange(0, BLOCK)
    z = _load_logits(logits, token, i, num_tokens, num_experts, SPLITS)
    expert, _, _, count = route_row(z, tau, num_experts, max_experts, min_experts, BLOCK)
    last = tl.sum(tl.where(i == count - 1, expert, 0), axis=0)
    # Where there is a NaN, all logits are equal.
    z = tl.where(tl.max((z != z).to(tl.int32), axis=0) != 0, 0.0, z)
    least = tl.sum(tl.where(i == last, z, 0.0), axis=0)
    return (i < num_experts) & ((z > least) | ((z == least) & (i <= last)))


@triton.jit
def match_experts(expert_ids, count, token, num_columns, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Which of the BLOCK experts are among the first `count` that expert_ids [T, K] has for a token."""
    i = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, CHUNK):
        k = start + tl.arange(0, CHUNK)
        ids = tl.load(expert_ids + token * num_columns + k, mask=k < count, other=-1)
        found += tl.sum((ids[:, None] == i[None, :]).to(tl.int32), axis=0)
    return found != 0


@triton.jit
def select_all(
    logits,
    threshold,
    threshold_stride,
    expert_ids,
    counts,
    num_tokens,
    num_experts,
    min_experts,
    max_experts,
    writes_counts,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The words [BLOCK] of all experts, for TOKENS tokens: by the router's logits, or given expert_ids and counts.

    With logits, `counts` is an output, of the one program for which `writes_counts` holds. `max_experts` is K."""
    words = tl.zeros((BLOCK,), tl.int64)
    for token in tl.static_range(TOKENS):
        if expert_ids is None:
            tau = tl.load(threshold + token * threshold_stride)
            active = sort_experts(logits, token, tau, num_tokens, num_experts, min_experts, max_experts, SPLITS, BLOCK)
            if writes_counts:
                tl.store(counts + token, tl.sum(active.to(tl.int32), axis=0))
        else:
            active = match_experts(expert_ids, tl.load(counts + token), token, max_experts, BLOCK, CHUNK)
        words += active.to(tl.int64) << token
    return words


@triton.jit
def _mark_token(
    logits,
    threshold,
    threshold_stride,
    expert_ids,
    counts,
    words,
    token,
    num_tokens,
    num_experts,
    min_experts,
    max_experts,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sets a token's bit in the words of its experts."""
    lane = tl.arange(0, BLOCK)
    bit = tl.full((BLOCK,), 1, tl.int64) << token
    if expert_ids is not None:
        active = lane < tl.load(counts + token)
        expert = tl.load(expert_ids + token * max_experts + lane, mask=active, other=0)
    else:
        tau = tl.load(threshold + token * threshold_stride)
        z = _load_logits(logits, token, lane, num_tokens, num_experts, SPLITS)
        expert, _, _, count = route_row(z, tau, num_experts, max_experts, min_experts, BLOCK)
        active = lane < count
        tl.store(counts + token, count)
    tl.atomic_or(words + expert, bit, mask=active, sem="relaxed")


@triton.jit
def list_experts(
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
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lists the experts that any token chose, in ascending order, and their words; waits until they are.

    The first `num_selectors` programs select the tokens' experts, and the last of these to finish makes the list. The
    others wait for them, which is safe: tickets are drawn in the order in which programs start, so that those that
    are waited for are running. (The interpreter runs one program after the other: there the first selects alone.)

    Returns the program's ticket, from 0 to the number of programs less 1, and how many experts are listed."""
    lane = tl.arange(0, BLOCK)
    ticket = tl.atomic_add(counters + TICKETS, 1, sem="relaxed")
    if ticket < num_selectors:
        for token in range(ticket, num_tokens, num_selectors):
            _mark_token(
                logits,
                threshold,
                threshold_stride,
                expert_ids,
                counts,
                words,
                token,
                num_tokens,
                num_experts,
                min_experts,
                max_experts,
                SPLITS,
                BLOCK,
            )
        tl.debug_barrier()  # the whole program's bits before its arrival
        if tl.atomic_add(counters + SELECTED, 1, sem="acq_rel") == num_selectors - 1:
            word = tl.load(words + lane, mask=lane < num_experts, other=0, cache_modifier=".cg")
            active = word != 0
            position = tl.cumsum(active.to(tl.int32), axis=0) - 1
            tl.store(listed_experts + position, lane, mask=active)
            tl.store(listed_words + position, word, mask=active)
            tl.debug_barrier()
            tl.atomic_xchg(counters + LISTED, tl.sum(active.to(tl.int32), axis=0) + 1, sem="release")
    return ticket, wait_for(counters + LISTED, 1) - 1
