"""The operators `torch.ops.prunepath.*`, documented.

Words: T tokens, H hidden size, E experts of n neurons each, K = max_experts or E. The operators are for inference:
their outputs carry no gradient, whatever the inputs require. Each also has a `.out` overload under
`torch.ops.prunepath` (for example `torch.ops.prunepath.routed_ffn.out`) that writes to the caller's tensors.

Method: arXiv 2605.28283; experts of a dense FFN: arXiv 2110.01786.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunepath import native

native.load()
if native.error() is None:
    from prunepath.ops import fakes as _fakes

    _fakes.register()

from prunepath.ops import reference  # noqa: E402
from prunepath.ops.backend import Backend, backends, cpu_kernel, resolve_backend  # noqa: E402

__all__ = [
    "Backend",
    "backends",
    "cpu_kernel",
    "pack_experts",
    "reference",
    "resolve_backend",
    "route",
    "routed_ffn",
    "sparse_ffn",
    "unpack_experts",
    "workspace_size",
]


def route(
    logits: Tensor, threshold: float | Tensor, *, min_experts: int = 1, max_experts: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Selects, for every token, the fewest experts whose softmax mass reaches the threshold.

    With the experts in order of descending logit, ties by index, an expert is active iff the mass of those before it
    is less than threshold·(total mass). Mass is computed in integers, so every backend selects the same experts for
    the same logits. A threshold of 1 or more selects every expert. −inf has no mass (a row of nothing else has equal
    mass everywhere), several +inf share the mass equally, and a row with a NaN is taken as equal logits at threshold
    1: every expert, in index order, as far as `max_experts` allows.

    Args:
        logits: [T, E] float32, bfloat16 or float16, any strides.
        threshold: mass to cover, finite and greater than 0: a float, rounded to float32, or a float32 tensor [] or
            [T]. On a GPU a tensor's values are not checked: NaN selects every expert, 0 or less `min_experts`.
        min_experts: experts that are active at least, from 1 to E.
        max_experts: experts that are active at most; 0 means E.

    Returns:
        expert_ids int32 [T, K], most mass first, −1 after the count; probs float32 [T, K], their softmax
        probabilities, 0 after the count; counts int32 [T].

    Raises:
        RuntimeError: an argument is not as above; the message says which.
    """
    # torch.ops.prunepath.route itself would take a 0-dim tensor for a float, which waits for a GPU.
    op = torch.ops.prunepath.route.tensor if isinstance(threshold, Tensor) else torch.ops.prunepath.route.default
    return op(logits, threshold, min_experts=min_experts, max_experts=max_experts)


def pack_experts(gate: Tensor | None, up: Tensor, down: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Lays an FFN's weights out so that an expert is one span of input weights and one of output weights.

    Expert e is neurons e·n to (e + 1)·n − 1 of the given order, n = D / E.

    Args:
        gate: [D, H], or None for an FFN without a gate.
        up: [D, H] float32, bfloat16 or float16. All three may have any strides (transposed, a slice).
        down: [H, D].
        num_experts: E; must divide D.

    Returns:
        w_in [E, n, G, H] with G = 2 (gate, up) or 1; w_out [E, n, H], the down projection transposed.
    """
    return torch.ops.prunepath.pack_experts.default(gate, up, down, num_experts)


def unpack_experts(w_in: Tensor, w_out: Tensor) -> list[Tensor]:
    """The exact inverse of `pack_experts`: [gate, up, down] or [up, down], as new tensors."""
    return torch.ops.prunepath.unpack_experts.default(w_in, w_out)


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
) -> Tensor:
    """y = b_out + Σ over active experts e of w_out[e]ᵀ·(h_e − center[e]).

    h_e = act(w_in[e]·x + b_in[e]), or act(gate·x + b_gate) ⊙ (up·x + b_up) for a gated FFN. Sums are float32.
    `b_out` is added as given: with `center` m it has to be b_down + W_down·m for the result to be the dense FFN's when
    every expert is active.

    Args:
        x: [T, H] float32, bfloat16 or float16, any strides.
        w_in: [E, n, G, H] of x's dtype; see `pack_experts`. Contiguous, or a view whose rows are contiguous and whose
            neurons are at one distance, as of one matrix [2·D, H] with the gate's rows before those of up.
        w_out: [E, n, H] of x's dtype, contiguous.
        expert_ids: int32 [T, K], as `route` gives them; no expert twice for a token.
        counts: int32 [T]: how many of a token's expert_ids are active, from 0 to K.
        activation: relu, gelu, gelu_tanh, silu or relu2.
        b_in: [E, n, G] float32 or x's dtype.
        b_out: [H] float32 or x's dtype.
        center: [E, n] float32 or x's dtype: the neurons' mean activations.

    Returns:
        y [T, H] of x's dtype. Equal bits for equal inputs; on the CPU, with an equal number of threads.

    Raises:
        RuntimeError: an argument is not as above; the message says which. On a GPU the values of expert_ids and
            counts are not checked.
    """
    return torch.ops.prunepath.sparse_ffn.default(
        x, w_in, w_out, expert_ids, counts, activation, b_in=b_in, b_out=b_out, center=center
    )


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
) -> tuple[Tensor, Tensor]:
    """Router, `route` and `sparse_ffn` in one call.

    The logits x·router_weightᵀ + router_bias are float32 sums that are never rounded to x's dtype.

    Args:
        x: [T, H] float32, bfloat16 or float16, any strides.
        router_weight: [E, H] of x's dtype, contiguous.
        router_bias: [E] float32 or x's dtype, or None.
        threshold: float32 [] or [T]; see `route`.
        w_in, w_out, activation, b_in, b_out, center: see `sparse_ffn`.
        min_experts, max_experts: see `route`.

    Returns:
        y [T, H] of x's dtype; counts int32 [T], the number of active experts of each token.

    Raises:
        RuntimeError: an argument is not as above; the message says which.
    """
    return torch.ops.prunepath.routed_ffn.default(
        x,
        router_weight,
        router_bias,
        threshold,
        w_in,
        w_out,
        activation,
        b_in=b_in,
        b_out=b_out,
        center=center,
        min_experts=min_experts,
        max_experts=max_experts,
    )


def workspace_size(op: str, x: Tensor, w_in: Tensor) -> int:
    """Bytes of `workspace` (uint8 [bytes]) that the `.out` overload of an FFN needs.

    Args:
        op: `sparse_ffn` or `routed_ffn`.
        x: [T, H]. A workspace for T tokens serves fewer tokens too.
        w_in: [E, n, G, H].

    On the CPU the size depends on torch's number of threads at the call.
    """
    return torch.ops.prunepath.ffn_workspace_size(op, x, w_in)
