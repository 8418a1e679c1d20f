"""Top-mass routing (arXiv 2605.28283) in Triton: the same experts, order and probabilities, bit for bit, as
`torch.ops.prunepath.route`. One program routes one token."""

import ctypes
import math

import torch
import triton
import triton.language as tl

from .arithmetic import to_float

# One program holds and sorts a whole row in registers; beyond this they spill.
MAX_NUM_EXPERTS = 4096

_LOG2_E = tl.constexpr(1.44269502162933349609375)  # log2(e) rounded to float32


@triton.jit
def expert_mass(z, top):
    """About 2^30·exp(z - top) as int64, for float32 z <= top. Integers, so that sums do not depend on their order;
    the float32 operations are a subtraction and then a product, which no compiler can fuse."""
    t = tl.where(z == top, 0.0, (top - z) * _LOG2_E)
    u = (tl.minimum(t, 30.0) * 1048576.0).to(tl.int64)
    k = u >> 20
    f = u & 1048575
    # A degree-5 fit of 2^-f in 30-bit fixed point.
    a = ((-1017037 * f) >> 20) + 9885125
    a = ((a * f) >> 20) - 59368625
    a = ((a * f) >> 20) + 257885219
    a = ((a * f) >> 20) - 744255587
    a = ((a * f) >> 20) + 1073741694
    return a >> k


@triton.jit
def _flip_negative(bits):
    """Maps float32 bits to int32 whose order is the floats' order; it is its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def route_row(z, tau, num_experts, width, min_experts, BLOCK: tl.constexpr):
    """The experts of one token, most mass first, from its float32 logits z [BLOCK], -inf beyond the row.

    Returns the expert and the mass of every rank, the mass of all in float64, and how many are active."""
    lane = tl.arange(0, BLOCK)
    exists = lane < num_experts
    has_nan = tl.max((z != z).to(tl.int32), axis=0) != 0
    # A row with a NaN runs every expert, in index order with equal shares.
    z = tl.where(has_nan & exists, 0.0, z)
    # -0 and +0 are one logit, so that their tie goes to the lower index.
    z = tl.where(z == 0.0, 0.0, z)
    top = tl.max(z, axis=0)

    # One int64 holds a logit and its index, and sorts as (logit descending, index ascending). The lanes beyond the
    # row hold -inf and the largest indices, so they stay last.
    high = _flip_negative(z.to(tl.int32, bitcast=True)).to(tl.int64)
    low = (BLOCK - 1 - lane).to(tl.int64)
    key = tl.sort((high << 32) | low, descending=True)
    expert = BLOCK - 1 - key.to(tl.int32)
    z = _flip_negative((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)

    q = tl.where(exists, expert_mass(z, top), 0)
    before = tl.cumsum(q, axis=0) - q
    total = tl.sum(q, axis=0).to(tl.float64)
    reached = before.to(tl.float64) >= tau.to(tl.float64) * total
    count = tl.sum((exists & (reached == 0)).to(tl.int32), axis=0)
    # Written so that a NaN threshold is dense.
    is_dense = has_nan | ((tau < 1.0) == 0)
    count = tl.where(is_dense, num_experts, tl.maximum(count, min_experts))
    count = tl.minimum(count, width)
    return expert, q, total, count


@triton.jit
def route_kernel(
    logits,
    threshold,
    expert_ids,
    probs,
    counts,
    stride_token,
    stride_expert,
    stride_threshold,
    num_experts,
    width,
    min_experts,
    THRESHOLD_IS_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    exists = lane < num_experts
    z = tl.load(logits + token * stride_token + lane.to(tl.int64) * stride_expert, mask=exists, other=-float("inf"))
    z = to_float(z)  # before any arithmetic: the mass of a logit is that of its float32 value
    if THRESHOLD_IS_TENSOR:
        tau = tl.load(threshold + token * stride_threshold)
    else:
        tau = tl.full((), threshold, tl.float32)

    expert, q, total, count = route_row(z, tau, num_experts, width, min_experts, BLOCK)
    written = lane < width
    active = lane < count
    out = token * width + lane
    tl.store(expert_ids + out, tl.where(active, expert, -1), mask=written)
    # The quotient is rounded to float64 and then to float32 on every backend.
    tl.store(probs + out, tl.where(active, (q.to(tl.float64) / total).to(tl.float32), 0.0), mask=written)
    tl.store(counts + token, count)


def route(
    logits: torch.Tensor, threshold: float | torch.Tensor, *, min_experts: int = 1, max_experts: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Picks per token the fewest experts, most mass first, whose mass reaches the threshold.

    Args:
        logits: [T, E] float32, bfloat16 or float16, any strides, E from 1 to 4096.
        threshold: a number greater than 0 (rounded to float32; 1 and above is dense), or a float32 tensor of shape
            [] or [T] on the logits' device. A tensor on a GPU is not checked: there NaN is dense, 0 or less is
            `min_experts`.
        min_experts: at least this many experts a token.
        max_experts: at most this many; 0 is all E.

    Returns:
        expert_ids: int32 [T, K], K = max_experts or E, -1 after a row's count.
        probs: float32 [T, K], each expert's share of the row's mass, 0 after a row's count.
        counts: int32 [T].

    A row with a NaN runs every expert; -inf has no mass; several +inf share the mass equally.
    Raises RuntimeError where an argument is not as above. Nothing waits for the GPU.
    """
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise RuntimeError(f"route: expected logits float32, bfloat16 or float16, got {logits.dtype}.")
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_NUM_EXPERTS:
        raise RuntimeError(
            f"route: expected logits of shape [T, E] with E from 1 to {MAX_NUM_EXPERTS} in Triton (the other "
            f"backends take any E), got {list(logits.shape)}."
        )
    num_tokens, num_experts = logits.shape
    if not 1 <= min_experts <= num_experts:
        raise RuntimeError(
            f"route: expected min_experts from 1 to the number of experts, {num_experts}, got {min_experts}."
        )
    if max_experts != 0 and not min_experts <= max_experts <= num_experts:
        raise RuntimeError(
            f"route: expected max_experts to be 0 (all) or from min_experts, {min_experts}, to the number of "
            f"experts, {num_experts}, got {max_experts}."
        )
    width = max_experts or num_experts

    is_tensor = isinstance(threshold, torch.Tensor)
    stride_threshold = _check_threshold_tensor(threshold, logits) if is_tensor else 0
    if not is_tensor:
        # Rounded here too: 1e-50 is 0 in float32.
        threshold = ctypes.c_float(threshold).value
        if not (math.isfinite(threshold) and threshold > 0):
            raise RuntimeError(
                f"route: expected threshold to be finite and greater than 0 in float32, got {threshold}."
            )

    expert_ids = torch.empty((num_tokens, width), dtype=torch.int32, device=logits.device)
    probs = torch.empty((num_tokens, width), dtype=torch.float32, device=logits.device)
    counts = torch.empty(num_tokens, dtype=torch.int32, device=logits.device)
    if num_tokens == 0:
        return expert_ids, probs, counts

    with torch.cuda.device_of(logits):
        route_into(logits, threshold, stride_threshold, min_experts, expert_ids, probs, counts)
    return expert_ids, probs, counts


def route_into(
    logits: torch.Tensor,
    threshold: float | torch.Tensor,
    stride_threshold: int,
    min_experts: int,
    expert_ids: torch.Tensor,
    probs: torch.Tensor,
    counts: torch.Tensor,
) -> None:
    """Launches the kernel on the current device, for outputs as `route` returns them."""
    num_tokens, num_experts = logits.shape
    block = max(16, triton.next_power_of_2(num_experts))
    route_kernel[(num_tokens,)](
        logits,
        threshold,
        expert_ids,
        probs,
        counts,
        logits.stride(0),
        logits.stride(1),
        stride_threshold,
        num_experts,
        expert_ids.shape[1],
        min_experts,
        THRESHOLD_IS_TENSOR=isinstance(threshold, torch.Tensor),
        BLOCK=block,
        num_warps=num_warps(block),
    )


def _check_threshold_tensor(threshold: torch.Tensor, logits: torch.Tensor) -> int:
    """The threshold's stride from token to token."""
    num_tokens = logits.shape[0]
    if threshold.dtype != torch.float32 or threshold.shape not in ((), (num_tokens,)):
        raise RuntimeError(
            f"route: expected threshold float32 of shape [] or [T] = [{num_tokens}], got {threshold.dtype} of "
            f"shape {list(threshold.shape)}."
        )
    if threshold.device != logits.device:
        raise RuntimeError(
            f"route: expected threshold on the device of logits ({logits.device}), got {threshold.device}."
        )
    if threshold.device.type == "cpu" and not bool((threshold.isfinite() & (threshold > 0)).all()):
        raise RuntimeError("route: expected threshold to be finite and greater than 0 in every element.")
    return threshold.stride(0) if threshold.dim() else 0


def num_warps(block: int) -> int:
    """Warps a program of `block` lanes runs with: 4 keys a thread, or 8 where 4 would leave a thread few registers."""
    return min(16, max(1, block // 128))
