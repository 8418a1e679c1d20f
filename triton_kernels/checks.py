"""Checks of the operators' arguments. A failed one raises RuntimeError with one sentence: operator, argument, what was
expected, what came; the sentences are those of the C++ operators."""

from __future__ import annotations

import ctypes
import math
from typing import NoReturn

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "relu2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fail(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"prunepath::{op}: {message}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    like_name: str,
    like: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    symbols: str,
    *,
    contiguous: bool = True,
) -> None:
    if tensor.device != like.device:
        fail(op, f"expected {name} on the device of {like_name} ({like.device}), got {tensor.device}")
    if tensor.dtype not in dtypes:
        fail(op, f"expected {name} of dtype {' or '.join(map(_name, dtypes))}, got {_name(tensor.dtype)}")
    if tensor.shape != shape:
        fail(op, f"expected {name} of shape {symbols} = {list(shape)}, got {list(tensor.shape)}")
    if contiguous and not tensor.is_contiguous():
        fail(
            op,
            f"expected {name} to be contiguous, got shape {list(tensor.shape)} with strides {list(tensor.stride())}",
        )


def check_bias(op: str, name: str, bias: Tensor | None, x: Tensor, size: int, symbols: str) -> None:
    if bias is not None:
        dtypes = tuple(dict.fromkeys((torch.float32, x.dtype)))
        check_tensor(op, name, bias, "x", x, dtypes, (size,), symbols)


def check_limits(op: str, num_experts: int, min_experts: int, max_experts: int) -> None:
    if not 1 <= min_experts <= num_experts:
        fail(op, f"expected min_experts from 1 to the number of experts, {num_experts}, got {min_experts}")
    if max_experts != 0 and not min_experts <= max_experts <= num_experts:
        fail(
            op,
            f"expected max_experts to be 0 (all) or from min_experts, {min_experts}, to the number of experts, "
            f"{num_experts}, got {max_experts}",
        )


def check_threshold(op: str, threshold: float | Tensor, like_name: str, like: Tensor) -> None:
    """`like` is the tensor [T, …] whose tokens the threshold is for. Values on a GPU are not checked."""
    values = [] if isinstance(threshold, Tensor) else [ctypes.c_float(threshold).value]
    if isinstance(threshold, Tensor):
        shape, symbols = ((), "[]") if threshold.dim() == 0 else ((like.shape[0],), "[] or [T]")
        check_tensor(op, "threshold", threshold, like_name, like, (torch.float32,), shape, symbols, contiguous=False)
        if threshold.device.type == "cpu":
            values = threshold.reshape(-1).tolist()
    for value in values:
        if not (math.isfinite(value) and value > 0.0):
            fail(op, f"expected threshold to be finite and greater than 0 in float32, got {value:g}")


def check_logits(op: str, logits: Tensor) -> None:
    if logits.dtype not in DTYPES:
        fail(op, f"expected logits of dtype float32, bfloat16 or float16, got {_name(logits.dtype)}")
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= 65536:
        fail(op, f"expected logits of shape [T, E] with E from 1 to 65536, got {list(logits.shape)}")


def check_ffn(
    op: str,
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    activation: str,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    if x.dtype not in DTYPES:
        fail(op, f"expected x of dtype float32, bfloat16 or float16, got {_name(x.dtype)}")
    if x.dim() != 2:
        fail(op, f"expected x of shape [T, H], got {list(x.shape)}")
    if up.dim() != 2 or up.shape[1] != x.shape[1]:
        fail(op, f"expected up of shape [D, H] = [D, {x.shape[1]}], got {list(up.shape)}")
    if gate is None and gate_bias is not None:
        fail(op, "expected gate_bias to be None for an FFN without a gate, got a tensor")
    for name, table in (("gate", gate), ("up", up), ("down_t", down_t)):
        if table is not None:
            check_tensor(op, name, table, "x", x, (x.dtype,), tuple(up.shape), "[D, H]", contiguous=False)
            if table.shape[1] > 1 and table.stride(1) != 1:
                fail(op, f"expected {name} with unit stride along H, got strides {list(table.stride())}")
    D, H = up.shape
    check_bias(op, "gate_bias", gate_bias, x, D, "[D]")
    check_bias(op, "up_bias", up_bias, x, D, "[D]")
    check_bias(op, "down_bias", down_bias, x, H, "[H]")
    if activation not in ACTIVATIONS:
        fail(op, f"expected activation relu, gelu, gelu_tanh, silu or relu2, got {activation}")


def check_num_experts(op: str, up: Tensor, num_experts: int) -> None:
    D = up.shape[0]
    if not 1 <= num_experts <= 65536 or D % num_experts != 0:
        fail(op, f"expected a number of experts from 1 to 65536 that divides the {D} neurons of up, got {num_experts}")


def check_selection(op: str, x: Tensor, expert_ids: Tensor, counts: Tensor) -> None:
    if expert_ids.dim() != 2:
        fail(op, f"expected expert_ids of shape [T, K], got {list(expert_ids.shape)}")
    shape = (x.shape[0], expert_ids.shape[1])
    check_tensor(op, "expert_ids", expert_ids, "x", x, (torch.int32,), shape, "[T, K]")
    check_tensor(op, "counts", counts, "x", x, (torch.int32,), shape[:1], "[T]")


def check_router_table(
    op: str, name: str, table: Tensor, scale: Tensor | None, x: Tensor, shape: tuple[int, int], rows: str, symbol: str
) -> None:
    """A table of x's dtype or, with a scale for every row, of 4 bits an element. The shape is that of its elements."""
    expected = x.dtype if scale is None else torch.uint8
    if table.dtype != expected:
        given = "without" if scale is None else "with"
        fail(op, f"expected {name} of dtype {_name(expected)} {given} {name}_scale, got {_name(table.dtype)}")
    if scale is not None:
        if shape[1] % 2 != 0:
            fail(op, f"expected an even {symbol} for {name} in 4 bits, got {shape[1]}")
        shape, symbol = (shape[0], shape[1] // 2), f"{symbol} / 2"
    check_tensor(op, name, table, "x", x, (expected,), shape, f"[{rows}, {symbol}]")
    check_bias(op, f"{name}_scale", scale, x, shape[0], f"[{rows}]")


def check_router(
    op: str,
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    router_in: Tensor | None,
    router_out: Tensor,
    router_bias: Tensor | None,
    router_in_scale: Tensor | None,
    router_out_scale: Tensor | None,
    router_floor: Tensor | None,
    router_log_scale: Tensor | None,
) -> tuple[int, int]:
    """Returns the number of experts and of factors, 0 for a linear router."""
    for name, weight in (("router_in", router_in), ("router_out", router_out)):
        if weight is not None and weight.dim() != 2:
            fail(op, f"expected {name} of two dimensions, got shape {list(weight.shape)}")
    if (router_floor is None) != (router_log_scale is None):
        fail(op, "expected router_floor and router_log_scale, or neither, got one of them")
    if router_log_scale is not None and router_log_scale.dim() != 1:
        fail(op, f"expected router_log_scale of shape [E], got {list(router_log_scale.shape)}")
    inner, symbol = x.shape[1], "H"
    if router_in is not None:
        check_router_table(op, "router_in", router_in, router_in_scale, x, (router_in.shape[0], inner), "r", symbol)
        inner, symbol = router_in.shape[0], "r"
    elif router_in_scale is not None:
        fail(op, "expected router_in_scale to be None without router_in, got a tensor")
    num_experts, factors, rows = router_out.shape[0], 0, "E"
    if router_log_scale is not None:
        num_experts, factors = router_log_scale.shape[0], 1 if gate is None else 2
        rows = "E" if gate is None else "2 * E"
    check_num_experts(op, up, num_experts)
    num_rows = max(factors, 1) * num_experts
    check_router_table(op, "router_out", router_out, router_out_scale, x, (num_rows, inner), rows, symbol)
    check_bias(op, "router_bias", router_bias, x, num_rows, f"[{rows}]")
    check_bias(op, "router_floor", router_floor, x, num_rows, f"[{rows}]")
    check_bias(op, "router_log_scale", router_log_scale, x, num_experts, "[E]")
    return num_experts, factors
