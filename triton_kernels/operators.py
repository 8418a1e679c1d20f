"""`route`, `sparse_ffn` and `routed_ffn`, which are operators of torch where `torch.compile` traces a call of them.

It would else trace what launches the kernels. Elsewhere they are the functions themselves, whose calls cost less.
"""

import torch
from torch import Tensor

from . import route as _route
from . import routed_ffn as _routed_ffn
from . import sparse_ffn as _sparse_ffn


@torch.library.custom_op("prunepath_triton::route", mutates_args=())
def _route_operator(
    logits: Tensor, threshold: Tensor, min_experts: int = 1, max_experts: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    return _route.route(logits, threshold, min_experts=min_experts, max_experts=max_experts)


@_route_operator.register_fake
def _(logits, threshold, min_experts=1, max_experts=0):
    num_tokens, num_experts = logits.shape
    shape = (num_tokens, max_experts or num_experts)
    expert_ids, probs = (logits.new_empty(shape, dtype=dtype) for dtype in (torch.int32, torch.float32))
    return expert_ids, probs, logits.new_empty(num_tokens, dtype=torch.int32)


@torch.library.custom_op("prunepath_triton::sparse_ffn", mutates_args=())
def _sparse_ffn_operator(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    expert_ids: Tensor,
    counts: Tensor,
    activation: str,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    center: Tensor | None = None,
) -> Tensor:
    return _sparse_ffn.sparse_ffn(x, w_in, w_out, expert_ids, counts, activation, b_in=b_in, b_out=b_out, center=center)


@_sparse_ffn_operator.register_fake
def _(x, *args, **kwargs):
    return x.new_empty(x.shape)


@torch.library.custom_op("prunepath_triton::routed_ffn", mutates_args=())
def _routed_ffn_operator(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    threshold: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: str,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    center: Tensor | None = None,
    min_experts: int = 1,
    max_experts: int = 0,
) -> tuple[Tensor, Tensor]:
    return _routed_ffn.routed_ffn(
        *(x, router_weight, router_bias, threshold, w_in, w_out, activation),
        b_in=b_in,
        b_out=b_out,
        center=center,
        min_experts=min_experts,
        max_experts=max_experts,
    )


@_routed_ffn_operator.register_fake
def _(x, *args, **kwargs):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.int32)


def route(logits: Tensor, threshold: float | Tensor, **limits: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `route.route`."""
    if not torch.compiler.is_compiling():
        return _route.route(logits, threshold, **limits)
    if not isinstance(threshold, Tensor):
        threshold = torch.full((), threshold, dtype=torch.float32, device=logits.device)
    return _route_operator(logits, threshold, **limits)


def sparse_ffn(*args, **kwargs) -> Tensor:
    """See `sparse_ffn.sparse_ffn`; under `torch.compile` without `y` and `workspace`."""
    return (_sparse_ffn_operator if torch.compiler.is_compiling() else _sparse_ffn.sparse_ffn)(*args, **kwargs)


def routed_ffn(*args, **kwargs) -> tuple[Tensor, Tensor]:
    """See `routed_ffn.routed_ffn`; under `torch.compile` without `y`, `counts` and `workspace`."""
    return (_routed_ffn_operator if torch.compiler.is_compiling() else _routed_ffn.routed_ffn)(*args, **kwargs)
