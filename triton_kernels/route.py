"""Top-mass routing (arXiv 2605.28283) in Triton: the same experts and probabilities, bit for bit, as the operators
`route` and `select`. One program finds one token's cutoff, the last active expert by (logit descending, index
ascending), without a sort."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .arithmetic import to_float

TILE = 64  # tokens that one 64-bit word of an expert stands for

_MAX_HELD = 16384  # logits of a row that a program holds in registers
_LOG2_E = tl.constexpr(1.44269502162933349609375)  # log2(e) rounded to float32
_LOWEST = tl.constexpr(-2139095041)  # ordered key of -inf, the lowest of a logit
_NONE = tl.constexpr(-(1 << 63))  # the word of no expert, below all others
# A sum of masses takes 46 bits, for 65,536 experts of less than 2^30 each; the bits above count its experts.
_ONE_EXPERT = tl.constexpr(1 << 46)


@triton.jit
def _step(a, f, coefficient):
    return ((a.to(tl.int64) * f) >> 20).to(tl.int32) + coefficient


@triton.jit
def expert_mass(z, top):
    """About 2^30·exp(z - top) as int32, for float32 z <= top. Integers, so that sums do not depend on their order;
    the float32 operations are a subtraction and then a product, which no compiler can fuse."""
    t = tl.where(z == top, 0.0, (top - z) * _LOG2_E)
    u = (tl.minimum(t, 30.0) * 1048576.0).to(tl.int32)
    f = u & 1048575
    # A degree-5 fit of 2^-f in 30-bit fixed point.
    a = _step(tl.full(f.shape, -1017037, tl.int32), f, 9885125)
    a = _step(_step(_step(_step(a, f, -59368625), f, 257885219), f, -744255587), f, 1073741694)
    return a >> (u >> 20)


@triton.jit
def _load_logits(row, stride, index, num_experts):
    """In float32 before any arithmetic, -inf beyond the row, and -0 as +0 so that the two are a tie."""
    z = to_float(tl.load(row + index.to(tl.int64) * stride, mask=index < num_experts, other=-float("inf")))
    return tl.where(z == 0.0, 0.0, z)


@triton.jit
def _top(z):
    """The greatest logit, and whether there is a NaN."""
    return tl.max(tl.where(z == z, z, -float("inf")), axis=0), tl.max((z != z).to(tl.int32), axis=0)


@triton.jit
def _words(z, top, has_nan, exists):
    """An ordered key of each logit in the high and its mass in the low half of an int64; the lowest where none is."""
    z = tl.where(has_nan, 0.0, z)  # a row with a NaN has equal logits
    bits = z.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return tl.where(exists, (key << 32) | expert_mass(z, top).to(tl.int64), _NONE)


@triton.jit
def _read(words, held, index, num_experts, HELD: tl.constexpr):
    if HELD:
        word = held
    else:
        word = tl.load(words + index, mask=index < num_experts, other=_NONE)
    return word


@triton.jit
def _counted(word, key):
    """The mass of an expert whose key is greater, and one expert."""
    is_above = (word >> 32).to(tl.int32) > key.to(tl.int32)
    return tl.where(is_above, (word & 0xFFFFFFFF) + _ONE_EXPERT, 0)


@triton.jit
def _sum_above(words, held, key, num_experts, HELD: tl.constexpr, BLOCK: tl.constexpr):
    """Mass and number of the experts whose key is greater."""
    if HELD:
        total = _counted(held, key)
    else:
        total = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, num_experts, BLOCK):
            word = _read(words, held, start + tl.arange(0, BLOCK), num_experts, HELD)
            total += _counted(word, key)
    return tl.sum(total, axis=0)


@triton.jit
def _is_active(above, limit, min_experts, max_experts):
    """Whether an expert is, with the experts `above` before it."""
    number = above // _ONE_EXPERT
    mass = above % _ONE_EXPERT
    return (number < max_experts) & ((number < min_experts) | (mass < limit))


@triton.jit(do_not_specialize=["min_experts", "max_experts"])
def select_kernel(
    logits,
    threshold,
    words,  # int64 [T, E], or None where HELD
    mask,  # bool [T, E] or None
    keys,  # int32 [T, E] or None: ordered keys of the active experts, below them those of the others
    probs,  # float32 [T, E] or None
    token_bits,  # int64 [ceil(T / 64), E] or None: bits of the tokens that run an expert are set
    counts,
    stride_token,
    stride_expert,
    stride_threshold,
    num_experts,
    min_experts,
    max_experts,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    row = logits + token * stride_token
    if HELD:
        end: tl.constexpr = BLOCK  # which unrolls the loops
    else:
        end = num_experts
        words += token * num_experts

    held = _load_logits(row, stride_expert, lane, num_experts)
    top, has_nan = _top(held)
    for start in range(BLOCK, end, BLOCK):
        block_top, block_has_nan = _top(_load_logits(row, stride_expert, start + lane, num_experts))
        top = tl.maximum(top, block_top)
        has_nan |= block_has_nan
    top = tl.where(has_nan != 0, 0.0, top)
    held = _words(held, top, has_nan != 0, lane < num_experts)
    if not HELD:
        for start in range(0, end, BLOCK):
            index = start + lane
            z = _load_logits(row, stride_expert, index, num_experts)
            tl.store(words + index, _words(z, top, has_nan != 0, index < num_experts), mask=index < num_experts)
        tl.debug_barrier()  # other threads read them

    low = tl.full((), _LOWEST - 1, tl.int64)
    above_low = _sum_above(words, held, low, num_experts, HELD, BLOCK)
    total = above_low % _ONE_EXPERT

    # A mass is less than threshold·total, in float64, iff it is less than the next integer up.
    tau = tl.load(threshold + token * stride_threshold)
    needed = tl.maximum(tau.to(tl.float64) * total.to(tl.float64), 0.0)
    limit = needed.to(tl.int64)
    limit += (limit.to(tl.float64) < needed).to(tl.int64)
    is_dense = (has_nan != 0) | ((tau < 1.0) == 0)  # so that a NaN threshold is dense
    limit = tl.where(is_dense, 1 << 62, limit)

    # Experts of a key are active, or the first of them, iff `_is_active` is true of those above the key. It is true of
    # `high`, false of `low`: bisect, until one expert or one key is left between them.
    bits = top.to(tl.int32, bitcast=True)
    high = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    high = tl.where(is_dense & (max_experts == num_experts), low + 1, high)
    above = tl.zeros((), tl.int64)
    while (high - low > 1) & ((above_low - above) // _ONE_EXPERT > 1):
        middle = (low + high) >> 1
        above_middle = _sum_above(words, held, middle, num_experts, HELD, BLOCK)
        active = _is_active(above_middle, limit, min_experts, max_experts)
        low = tl.where(active, low, middle)
        above_low = tl.where(active, above_low, above_middle)
        high = tl.where(active, middle, high)
        above = tl.where(active, above_middle, above)

    # The cutoff's key, its mass, and how many experts have it.
    cutoff = tl.full((), _NONE, tl.int64)
    for start in range(0, end, BLOCK):
        word = _read(words, held, start + lane, num_experts, HELD)
        cutoff = tl.maximum(cutoff, tl.max(tl.where((word >> 32) <= high, word, _NONE), axis=0))
    q = cutoff & 0xFFFFFFFF
    cutoff = tl.maximum(cutoff >> 32, _LOWEST)  # there may be none where every expert is active
    above = _sum_above(words, held, cutoff, num_experts, HELD, BLOCK)
    equal = (_sum_above(words, held, cutoff - 1, num_experts, HELD, BLOCK) - above) // _ONE_EXPERT
    number = above // _ONE_EXPERT
    mass = above % _ONE_EXPERT
    by_mass = tl.where(q == 0, num_experts, (limit - mass + q - 1) // tl.maximum(q, 1))
    by_mass = tl.where(mass < limit, by_mass, 0)
    ties = tl.minimum(tl.minimum(tl.maximum(by_mass, min_experts - number), max_experts - number), equal)
    tl.store(counts + token, (number + ties).to(tl.int32))

    # The index of the last active one of equal experts: bisect again.
    first = tl.full((), -1, tl.int32)
    last = num_experts - 1 + first * 0
    if ties < equal:
        while last - first > 1:
            middle = (first + last) >> 1
            found = tl.zeros((BLOCK,), tl.int64)
            for start in range(0, end, BLOCK):
                index = start + lane
                word = _read(words, held, index, num_experts, HELD)
                found += (((word >> 32) == cutoff) & (index <= middle)).to(tl.int64)
            enough = tl.sum(found, axis=0) >= ties
            first = tl.where(enough, first, middle)
            last = tl.where(enough, middle, last)

    for start in range(0, end, BLOCK):
        index = start + lane
        exists = index < num_experts
        word = _read(words, held, index, num_experts, HELD)
        key = word >> 32
        active = exists & ((key > cutoff) | ((key == cutoff) & (index <= last)))
        out = token * num_experts + index
        if mask is not None:
            tl.store(mask + out, active, mask=exists)
        if keys is not None:
            tl.store(keys + out, tl.where(active, key, _LOWEST - 1).to(tl.int32), mask=exists)
        if probs is not None:
            # The quotient is rounded to float64 and then to float32 on every backend.
            share = (word & 0xFFFFFFFF).to(tl.float64) / total.to(tl.float64)
            tl.store(probs + out, share.to(tl.float32), mask=exists)
        if token_bits is not None:
            bit = tl.full((BLOCK,), 1, tl.int64) << (token % 64)
            tl.atomic_or(token_bits + token // 64 * num_experts + index, bit, mask=active, sem="relaxed")


def select_into(
    logits: Tensor,
    threshold: Tensor,
    min_experts: int,
    max_experts: int,
    counts: Tensor,
    *,
    mask: Tensor | None = None,
    keys: Tensor | None = None,
    probs: Tensor | None = None,
    token_bits: Tensor | None = None,
) -> None:
    """Launches the selection; the arguments are checked already."""
    num_tokens, num_experts = logits.shape
    if num_tokens == 0:
        return
    is_held = num_experts <= _MAX_HELD
    block = max(32, triton.next_power_of_2(num_experts)) if is_held else _MAX_HELD // 2
    words = None if is_held else torch.empty(num_tokens, num_experts, dtype=torch.int64, device=logits.device)
    with torch.cuda.device_of(logits):
        select_kernel[(num_tokens,)](
            logits,
            threshold,
            words,
            mask,
            keys,
            probs,
            token_bits,
            counts,
            *logits.stride(),
            threshold.stride(0) if threshold.dim() > 0 else 0,
            num_experts,
            min_experts,
            max_experts or num_experts,
            HELD=is_held,
            BLOCK=block,
            num_warps=max(1, min(16, block // 512)),
        )


def _checked(
    op: str, logits: Tensor, threshold: float | Tensor, min_experts: int, max_experts: int
) -> tuple[Tensor, Tensor]:
    """The threshold as a tensor, and uninitialised counts."""
    checks.check_logits(op, logits)
    checks.check_threshold(op, threshold, "logits", logits)
    checks.check_limits(op, logits.shape[1], min_experts, max_experts)
    if not isinstance(threshold, Tensor):
        threshold = torch.full((), threshold, dtype=torch.float32, device=logits.device)
    return threshold, torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)


def select(
    logits: Tensor, threshold: float | Tensor, *, min_experts: int = 1, max_experts: int = 0
) -> tuple[Tensor, Tensor]:
    """Which experts `route` selects: mask bool [T, E], counts int32 [T]; see `prunepath.ops.select`."""
    threshold, counts = _checked("select", logits, threshold, min_experts, max_experts)
    mask = torch.empty(logits.shape, dtype=torch.bool, device=logits.device)
    select_into(logits, threshold, min_experts, max_experts, counts, mask=mask)
    return mask, counts


def route(
    logits: Tensor, threshold: float | Tensor, *, min_experts: int = 1, max_experts: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The fewest experts, most mass first, whose mass reaches the threshold; see `prunepath.ops.route`."""
    threshold, counts = _checked("route", logits, threshold, min_experts, max_experts)
    keys = torch.empty(logits.shape, dtype=torch.int32, device=logits.device)
    probs = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    select_into(logits, threshold, min_experts, max_experts, counts, keys=keys, probs=probs)

    columns = max_experts or logits.shape[1]
    order = keys.sort(dim=1, descending=True, stable=True).indices[:, :columns]
    inactive = torch.arange(columns, device=logits.device) >= counts[:, None]
    expert_ids = order.to(torch.int32).masked_fill_(inactive, -1)
    return expert_ids, probs.gather(1, order).masked_fill_(inactive, 0.0), counts
