"""`routed_ffn` in Triton: router, selection and FFN."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .checks import check_ffn, check_output, check_router, check_workspace
from .route import MAX_NUM_EXPERTS
from .sparse_ffn import workspace_size

_OP = "routed_ffn"


@torch.no_grad()
def routed_ffn(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    threshold: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    center: Tensor | None = None,
    min_experts: int = 1,
    max_experts: int = 0,
    y: Tensor | None = None,
    counts: Tensor | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Router, `route` and `sparse_ffn` in one call: three kernels for up to 64 tokens, and two for one token
    or, in float32, up to 4.

    Equal bits for equal inputs on one device. Nothing waits for the GPU, and with `y`, `counts` and `workspace` nothing
    is allocated. Under a CUDA graph the experts follow x, the threshold and the weights of each replay.

    Args:
        x, router_weight, router_bias, threshold, w_in, w_out, activation, b_in, b_out, center, min_experts,
            max_experts: as in `prunepath.ops.routed_ffn`; at most 4096 experts. The values of a threshold on a GPU are
            not checked: there NaN selects every expert, 0 or less `min_experts`.
        y: [T, H] of x's dtype, contiguous, to be written and returned; None for a new tensor.
        counts: int32 [T], contiguous, likewise.
        workspace: uint8 [bytes], at least `workspace_size`; its contents do not matter. None for a new tensor.

    Raises:
        RuntimeError: an argument is not as above; the message says which.
    """
    check_ffn(_OP, x, w_in, w_out, activation, b_in, b_out, center, MAX_NUM_EXPERTS)
    check_router(_OP, x, w_in, router_weight, router_bias, threshold, min_experts, max_experts)
    if y is None:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    else:
        check_output(_OP, "y", y, x.dtype, tuple(x.shape), "[T, H]", x)
    if counts is None:
        counts = torch.empty(x.shape[0], dtype=torch.int32, device=x.device)
    else:
        check_output(_OP, "counts", counts, torch.int32, (x.shape[0],), "[T]", x)
    if workspace is not None:
        check_workspace(_OP, workspace, workspace_size(x, w_in), x)
    router = launch.Router(router_weight, router_bias, threshold, min_experts, max_experts)
    launch.run(x, w_in, w_out, activation, b_in, b_out, center, router, None, counts, y, workspace)
    return y, counts
