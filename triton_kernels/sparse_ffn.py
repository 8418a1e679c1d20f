"""`sparse_ffn` in Triton: the FFN of given experts."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .checks import check_ffn, check_output, check_selection, check_workspace
from .route import MAX_NUM_EXPERTS

_OP = "sparse_ffn"


@torch.no_grad()
def sparse_ffn(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    expert_ids: Tensor,
    counts: Tensor,
    activation: str,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    center: Tensor | None = None,
    y: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """y = b_out + Σ over active experts e of w_out[e]ᵀ·(h_e − center[e]); see `prunepath.ops.sparse_ffn`.

    Equal bits for equal inputs on one device. Nothing waits for the GPU, and with `y` and `workspace` nothing is
    allocated.

    Args:
        x, w_in, w_out, expert_ids, counts, activation, b_in, b_out, center: as in `prunepath.ops.sparse_ffn`; at most
            4096 experts. The values of expert_ids and counts are not checked.
        y: [T, H] of x's dtype, contiguous, to be written and returned; None for a new tensor.
        workspace: uint8 [bytes], at least `workspace_size`; its contents do not matter. None for a new tensor.

    Raises:
        RuntimeError: an argument is not as above; the message says which.
    """
    check_ffn(_OP, x, w_in, w_out, activation, b_in, b_out, center, MAX_NUM_EXPERTS)
    check_selection(_OP, x, expert_ids, counts)
    if y is None:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    else:
        check_output(_OP, "y", y, x.dtype, tuple(x.shape), "[T, H]", x)
    if workspace is not None:
        check_workspace(_OP, workspace, workspace_size(x, w_in), x)
    launch.run(x, w_in, w_out, activation, b_in, b_out, center, None, expert_ids, counts, y, workspace)
    return y


def workspace_size(x: Tensor, w_in: Tensor) -> int:
    """Bytes of workspace of `sparse_ffn` and `routed_ffn` for x [T, H] or fewer tokens, and w_in [E, n, G, H]."""
    return launch.workspace_size(x.shape[0], w_in)
