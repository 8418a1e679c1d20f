"""The operators in plain torch, for any device: the ground truth that every kernel is tested against.

They read like the paper's formulas (arXiv 2605.28283), check little, and are slow: the FFNs compute every expert and
mask what was not selected. The shapes and dtypes are those of `prunepath.ops`; the FFNs take float64 too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = 1.44269502162933349609375  # log2(e) rounded to float32
# 2^-f for f in [0, 1) as a polynomial of f, coefficients in Q30, constant term first.
EXP2_COEFFICIENTS = (1073741694, -744255587, 257885219, -59368625, 9885125, -1017037)

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
}
ROUTER_ACTIVATIONS = {
    "relu": F.softplus,
    "gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu_tanh": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu2": lambda x: F.softplus(x).square(),
}
"""What a factored router applies in an activation's place: of exponentials alone, and not flat below zero, where
estimates have to keep their order. For GELU it is the approximation of arXiv 1606.08415, section 2."""


def mass(logits: Tensor) -> Tensor:
    """Integer softmax mass q of each expert, about 2^30·exp(z − max z); int64 [T, E].

    An integer, so that sums do not depend on their order. A row with a NaN counts as a row of equal logits.
    """
    z = _routed_logits(logits)
    largest = z.amax(-1, keepdim=True)
    t = torch.where(z == largest, 0.0, (largest - z) * LOG2_E)
    u = (t.clamp(max=30.0) * 2.0**20).to(torch.int64)
    k, f = u >> 20, u & (2**20 - 1)
    a = torch.full_like(f, EXP2_COEFFICIENTS[-1])
    for coefficient in EXP2_COEFFICIENTS[-2::-1]:
        a = ((a * f) >> 20) + coefficient
    return torch.bitwise_right_shift(a, k)


def mass_before(logits: Tensor) -> Tensor:
    """Share of the mass that comes before each expert, float64 [T, E], in expert order.

    Experts come in order of descending logit, ties by index. An expert is active at a threshold τ < 1 iff its mass
    before is less than τ (`route` compares mass with τ·total, which rounds differently in the last bit). A row with a
    NaN has zero before every expert.
    """
    order = _order(logits)
    q = mass(logits)
    sorted_q = q.gather(1, order)
    before = torch.empty_like(q).scatter_(1, order, sorted_q.cumsum(1) - sorted_q)
    before = before.to(torch.float64) / q.sum(1, keepdim=True)
    return before.masked_fill(_has_nan(logits), 0.0)


def route(
    logits: Tensor, threshold: float | Tensor, *, min_experts: int = 1, max_experts: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-mass routing; see `prunepath.ops.route`."""
    num_tokens, num_experts = logits.shape
    _check_limits(num_experts, min_experts, max_experts)
    columns = max_experts or num_experts
    tau = _threshold_column(threshold, num_tokens, logits.device)

    order = _order(logits)
    q = mass(logits).gather(1, order)  # most mass first from here on
    total = q.sum(1, keepdim=True)
    before = q.cumsum(1) - q
    needed = before.to(torch.float64) < tau.to(torch.float64) * total.to(torch.float64)
    needed = needed | ~(tau < 1.0) | _has_nan(logits)
    counts = needed.sum(1, keepdim=True).clamp(min_experts, columns)
    probs = (q.to(torch.float64) / total.to(torch.float64)).to(torch.float32)

    inactive = torch.arange(columns, device=logits.device) >= counts
    expert_ids = order[:, :columns].to(torch.int32).masked_fill(inactive, -1)
    return expert_ids, probs[:, :columns].masked_fill(inactive, 0.0), counts[:, 0].to(torch.int32)


def select(
    logits: Tensor, threshold: float | Tensor, *, min_experts: int = 1, max_experts: int = 0
) -> tuple[Tensor, Tensor]:
    """Top-mass routing as membership; see `prunepath.ops.select`."""
    expert_ids, _, counts = route(logits, threshold, min_experts=min_experts, max_experts=max_experts)
    return _active_mask(expert_ids, counts, logits.shape[1]), counts


def pack_experts(gate: Tensor | None, up: Tensor, down: Tensor, order: Tensor | None = None) -> list[Tensor]:
    """Weights of an FFN as tables with a row for each neuron; see `prunepath.ops.pack_experts`."""
    tables = [up, down.t()] if gate is None else [gate, up, down.t()]
    if order is not None:
        tables = [table[order] for table in tables]
    return [table.clone(memory_format=torch.contiguous_format) for table in tables]


def pack_rows(codes: Tensor) -> Tensor:
    """Rows of whole numbers from −8 to 7 in 4 bits each.

    Args:
        codes: [R, C] of any integer dtype; C is even.

    Returns:
        uint8 [R, C / 2]: byte k of a row has element 2k in its low four bits and element 2k + 1 in its high ones, each
        as its value + 8.
    """
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack_rows(packed: Tensor, scale: Tensor) -> Tensor:
    """The rows that a router's table in 4 bits stands for: what `pack_rows` packed, times the row's scale.

    Args:
        packed: uint8 [R, C / 2].
        scale: [R].

    Returns:
        float32 [R, C]; float64 for a float64 scale.
    """
    wide = torch.promote_types(scale.dtype, torch.float32)
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return (nibbles.to(wide) - 8) * scale.to(wide)[:, None]


def router_logits(
    x: Tensor,
    router_in: Tensor | None,
    router_out: Tensor,
    router_bias: Tensor | None = None,
    router_floor: Tensor | None = None,
    router_log_scale: Tensor | None = None,
    activation: str = "silu",
    *,
    router_in_scale: Tensor | None = None,
    router_out_scale: Tensor | None = None,
) -> Tensor:
    """z [T, E] of `prunepath.ops.routed_ffn`: in float32, or float64 for float64 inputs."""
    wide = torch.promote_types(x.dtype, torch.float32)
    v = x.to(wide)
    for weight, scale in ((router_in, router_in_scale), (router_out, router_out_scale)):
        if weight is not None:
            v = v @ (weight if scale is None else unpack_rows(weight, scale)).to(wide).t()
    if router_bias is not None:
        v = v + router_bias.to(wide)
    if router_log_scale is None:
        return v
    first, *others = v.unflatten(-1, (-1, len(router_log_scale))).unbind(-2)
    factors = torch.cat([ROUTER_ACTIVATIONS[activation](first), *others], -1)
    logs = 0.25 * torch.log(factors.square() + router_floor.to(wide).square())
    return logs.unflatten(-1, (-1, len(router_log_scale))).sum(-2) + router_log_scale.to(wide)


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
    active = _active_mask(expert_ids, counts, num_experts)
    return masked_ffn(x, gate, up, down_t, active, activation, gate_bias, up_bias, down_bias)


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
    """Router, top-mass selection and FFN; see `prunepath.ops.routed_ffn`."""
    logits = router_logits(
        x,
        router_in,
        router_out,
        router_bias,
        router_floor,
        router_log_scale,
        activation,
        router_in_scale=router_in_scale,
        router_out_scale=router_out_scale,
    )
    active, counts = select(logits, threshold, min_experts=min_experts, max_experts=max_experts)
    return masked_ffn(x, gate, up, down_t, active, activation, gate_bias, up_bias, down_bias), counts


def masked_ffn(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    active: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """All neurons' activations, those of inactive experts set to zero, projected down.

    Args:
        active: bool [T, E]; expert e is neurons e·n to (e + 1)·n − 1.
        others: as of `prunepath.ops.sparse_ffn`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        z = x.to(wide) @ weight.to(wide).t()
        return z if bias is None else z + bias.to(wide)

    act = ACTIVATIONS[activation]
    h = act(project(up, up_bias)) if gate is None else act(project(gate, gate_bias)) * project(up, up_bias)
    neurons = active.repeat_interleave(up.shape[0] // active.shape[1], dim=1)
    y = torch.where(neurons, h, 0.0) @ down_t.to(wide)  # a skipped infinity counts for nothing
    return (y if down_bias is None else y + down_bias.to(wide)).to(x.dtype)


def _has_nan(logits: Tensor) -> Tensor:
    return logits.isnan().any(1, keepdim=True)


def _routed_logits(logits: Tensor) -> Tensor:
    """The logits in float32, zero in rows that have a NaN, and with +0 for −0 so that the two are a tie."""
    return logits.to(torch.float32).masked_fill(_has_nan(logits), 0.0) + 0.0


def _order(logits: Tensor) -> Tensor:
    z = _routed_logits(logits)
    if torch.onnx.is_in_onnx_export():
        return z.sort(dim=1, descending=True).indices  # ONNX breaks ties by index, and has no other sort
    return z.sort(dim=1, descending=True, stable=True).indices


def _check_limits(num_experts: int, min_experts: int, max_experts: int) -> None:
    if not 1 <= min_experts <= num_experts:
        raise RuntimeError(
            f"route: expected min_experts from 1 to the number of experts, {num_experts}, got {min_experts}."
        )
    if max_experts != 0 and not min_experts <= max_experts <= num_experts:
        raise RuntimeError(
            f"route: expected max_experts to be 0 (all) or from min_experts, {min_experts}, to the number of "
            f"experts, {num_experts}, got {max_experts}."
        )


def _threshold_column(threshold: float | Tensor, num_tokens: int, device: torch.device) -> Tensor:
    """The threshold as float32 [T, 1] or [1, 1]. Values are checked, except on a device where that would be a sync."""
    tau = threshold if isinstance(threshold, Tensor) else torch.tensor(threshold, dtype=torch.float32)
    if tau.dtype != torch.float32 or tau.shape not in ((), (num_tokens,)):
        raise RuntimeError(
            f"route: expected threshold float32 of shape [] or [T] = [{num_tokens}], got {tau.dtype} of shape "
            f"{list(tau.shape)}."
        )
    is_read = tau.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_read and not bool((tau.isfinite() & (tau > 0)).all()):
        raise RuntimeError(f"route: expected threshold to be finite and greater than 0 in float32, got {threshold}.")
    if tau is not threshold:  # a fill, where a copy to the device would wait for it
        return torch.full((1, 1), tau.item(), dtype=torch.float32, device=device)
    return tau.reshape(-1, 1)


def _active_mask(expert_ids: Tensor, counts: Tensor, num_experts: int) -> Tensor:
    """bool [T, E] from the selected experts [T, K] and their counts [T]."""
    num_tokens, columns = expert_ids.shape
    selected = torch.arange(columns, device=counts.device) < counts[:, None]
    ids = expert_ids.to(torch.int64).masked_fill(~selected, num_experts)
    mask = torch.zeros(num_tokens, num_experts + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter_(1, ids, True)[:, :num_experts]
