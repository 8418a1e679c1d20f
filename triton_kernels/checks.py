"""Checks of the FFN operators' arguments. A failed one raises RuntimeError with one sentence: operator, argument, what
was expected, what came; the sentences are those of the C++ operators."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "relu2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fail(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"prunepath::{op}: {message}.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        fail(op, f"expected {name} of dtype {_name(dtype)}, got {_name(tensor.dtype)}")


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], symbols: str) -> None:
    if tensor.shape != shape:
        fail(op, f"expected {name} of shape {symbols} = {list(shape)}, got {list(tensor.shape)}")


def check_device(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        fail(op, f"expected {name} on the device of {like_name} ({like.device}), got {tensor.device}")


def check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        fail(
            op,
            f"expected {name} to be contiguous, got shape {list(tensor.shape)} with strides {list(tensor.stride())}",
        )


def check_parameter(
    op: str, name: str, tensor: Tensor | None, w_in: Tensor, shape: tuple[int, ...], symbols: str
) -> None:
    """A bias or centre that may be missing: contiguous, float32 or the weights' dtype."""
    if tensor is None:
        return
    check_device(op, name, tensor, "w_in", w_in)
    if tensor.dtype not in (torch.float32, w_in.dtype):
        fail(op, f"expected {name} of dtype float32 or {_name(w_in.dtype)}, got {_name(tensor.dtype)}")
    check_shape(op, name, tensor, shape, symbols)
    check_contiguous(op, name, tensor)


def check_output(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], symbols: str, x: Tensor
) -> None:
    """A tensor of the caller's that is written to: exact shape and dtype, contiguous."""
    check_device(op, name, tensor, "x", x)
    check_dtype(op, name, tensor, dtype)
    check_shape(op, name, tensor, shape, symbols)
    check_contiguous(op, name, tensor)


def check_workspace(op: str, workspace: Tensor, size: int, x: Tensor) -> None:
    check_device(op, "workspace", workspace, "x", x)
    check_dtype(op, "workspace", workspace, torch.uint8)
    check_contiguous(op, "workspace", workspace)
    if workspace.dim() != 1 or workspace.shape[0] < size:
        fail(
            op,
            f"expected workspace of shape [bytes] with at least {size} bytes, got {list(workspace.shape)}",
        )


def check_ffn(
    op: str,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    b_in: Tensor | None,
    b_out: Tensor | None,
    center: Tensor | None,
    max_num_experts: int,
) -> None:
    if w_in.dtype not in DTYPES:
        fail(op, f"expected w_in of dtype float32, bfloat16 or float16, got {_name(w_in.dtype)}")
    if w_in.dim() != 4 or w_in.shape[2] not in (1, 2) or w_in.shape[0] < 1:
        fail(
            op,
            f"expected w_in of shape [E, n, G, H] with E of at least 1 and G of 1 or 2, got {list(w_in.shape)}",
        )
    num_experts, width, inner, hidden_size = w_in.shape
    if num_experts > max_num_experts:
        fail(
            op,
            f"expected w_in of at most {max_num_experts} experts in Triton (the other backends take any number), "
            f"got {num_experts}",
        )
    check_device(op, "w_out", w_out, "w_in", w_in)
    check_dtype(op, "w_out", w_out, w_in.dtype)
    check_shape(op, "w_out", w_out, (num_experts, width, hidden_size), "[E, n, H]")
    spaced = num_experts == 1 or w_in.stride(0) == width * _neuron_stride(w_in)
    if not w_in.is_contiguous() and not (spaced and (hidden_size == 1 or w_in.stride(3) == 1)):
        fail(
            op,
            f"expected w_in with contiguous rows and neurons at one distance, got shape {list(w_in.shape)} with "
            f"strides {list(w_in.stride())}",
        )
    check_contiguous(op, "w_out", w_out)
    check_device(op, "x", x, "w_in", w_in)
    check_dtype(op, "x", x, w_in.dtype)
    if x.dim() != 2 or x.shape[1] != hidden_size:
        fail(op, f"expected x of shape [T, H] = [T, {hidden_size}], got {list(x.shape)}")
    check_parameter(op, "b_in", b_in, w_in, (num_experts, width, inner), "[E, n, G]")
    check_parameter(op, "b_out", b_out, w_in, (hidden_size,), "[H]")
    check_parameter(op, "center", center, w_in, (num_experts, width), "[E, n]")
    if activation not in ACTIVATIONS:
        fail(op, f"expected activation relu, gelu, gelu_tanh, silu or relu2, got {activation}")


def _neuron_stride(w_in: Tensor) -> int:
    return w_in.stride(0) if w_in.shape[1] == 1 else w_in.stride(1)


def in_strides(w_in: Tensor) -> tuple[int, int]:
    """Elements of w_in [E, n, G, H] from a neuron to the next one, over all experts, and from its gate to its up."""
    return _neuron_stride(w_in), w_in.stride(2)


def check_selection(op: str, x: Tensor, expert_ids: Tensor, counts: Tensor) -> None:
    for name, tensor in (("expert_ids", expert_ids), ("counts", counts)):
        check_device(op, name, tensor, "x", x)
        check_dtype(op, name, tensor, torch.int32)
    if expert_ids.dim() != 2 or expert_ids.shape[0] != x.shape[0]:
        fail(op, f"expected expert_ids of shape [T, K] = [{x.shape[0]}, K], got {list(expert_ids.shape)}")
    check_shape(op, "counts", counts, (x.shape[0],), "[T]")
    check_contiguous(op, "expert_ids", expert_ids)
    check_contiguous(op, "counts", counts)


def check_router(
    op: str,
    x: Tensor,
    w_in: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    min_experts: int,
    max_experts: int,
) -> None:
    num_tokens, num_experts = x.shape[0], w_in.shape[0]
    check_device(op, "router_weight", weight, "w_in", w_in)
    check_dtype(op, "router_weight", weight, w_in.dtype)
    check_shape(op, "router_weight", weight, (num_experts, w_in.shape[3]), "[E, H]")
    check_contiguous(op, "router_weight", weight)
    check_parameter(op, "router_bias", bias, w_in, (num_experts,), "[E]")
    check_device(op, "threshold", threshold, "x", x)
    check_dtype(op, "threshold", threshold, torch.float32)
    if threshold.shape not in ((), (num_tokens,)):
        fail(op, f"expected threshold of shape [] or [T] = [{num_tokens}], got {list(threshold.shape)}")
    if threshold.device.type == "cpu":
        for value in threshold.reshape(-1).tolist():
            if not 0.0 < value < float("inf"):
                fail(op, f"expected threshold to be finite and greater than 0 in float32, got {value:g}")
    if not 1 <= min_experts <= num_experts:
        fail(op, f"expected min_experts from 1 to the number of experts, {num_experts}, got {min_experts}")
    if max_experts != 0 and not min_experts <= max_experts <= num_experts:
        fail(
            op,
            f"expected max_experts to be 0 (all) or from min_experts, {min_experts}, to the number of experts, "
            f"{num_experts}, got {max_experts}",
        )
