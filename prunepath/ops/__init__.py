"""The operators `torch.ops.prunepath.*`, documented.

Words: T tokens, H hidden size, D intermediate size, E experts of n = D / E neurons each, r the router's rank, K =
max_experts or E. The operators are for inference: their outputs carry no gradient, whatever the inputs require.

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
from prunepath.ops.backend import Backend, backends, cpu_kernel, resolve_backend, use_backend  # noqa: E402

__all__ = [
    "Backend",
    "backends",
    "cpu_kernel",
    "pack_experts",
    "reference",
    "resolve_backend",
    "route",
    "routed_ffn",
    "select",
    "sparse_ffn",
    "use_backend",
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


def select(
    logits: Tensor, threshold: float | Tensor, *, min_experts: int = 1, max_experts: int = 0
) -> tuple[Tensor, Tensor]:
    """Which experts `route` selects, without their order: what computing all neurons and masking them needs.

    Args:
        logits, threshold, min_experts, max_experts: see `route`; E up to 65,536.

    Returns:
        mask bool [T, E]; counts int32 [T], how many experts of each token are active.

    Raises:
        RuntimeError: an argument is not as above; the message says which.
    """
    op = torch.ops.prunepath.select.tensor if isinstance(threshold, Tensor) else torch.ops.prunepath.select.default
    return op(logits, threshold, min_experts=min_experts, max_experts=max_experts)


def pack_experts(gate: Tensor | None, up: Tensor, down: Tensor, order: Tensor | None = None) -> list[Tensor]:
    """Lays an FFN's weights out as tables with one row for each neuron, copying them once.

    Args:
        gate: [D, H], or None for an FFN without a gate.
        up: [D, H] float32, bfloat16 or float16. All three may have any strides (transposed, a slice).
        down: [H, D].
        order: int64 [D], a permutation: row j of each table is neuron order[j]. None keeps the order.

    Returns:
        [gate, up, down_t] or [up, down_t], new contiguous tensors [D, H]; down_t is the down projection transposed.

    Raises:
        RuntimeError: an argument is not as above; the message says which. On a GPU the values of order are not checked.
    """
    return torch.ops.prunepath.pack_experts.default(gate, up, down, order)


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
    """y = b_down + Σ over the neurons j of active experts of h_j·down_t[j].

    h_j = act(up_j·x + b_up) or, for a gated FFN, act(gate_j·x + b_gate)·(up_j·x + b_up). Expert e is neurons e·n to
    (e + 1)·n − 1. Sums are float32.

    Args:
        x: [T, H] float32, bfloat16 or float16, any strides.
        gate, up, down_t: [D, H] of x's dtype, with unit stride along H and any stride between rows; gate is None for an
            FFN without a gate. down_t is the down projection transposed.
        expert_ids: int32 [T, K], in any order; no expert twice for a token.
        counts: int32 [T]: how many of a token's expert_ids are active, from 0 to K.
        activation: relu, gelu, gelu_tanh, silu or relu2.
        num_experts: E; must divide D.
        gate_bias, up_bias: [D] float32 or x's dtype, or None.
        down_bias: [H] float32 or x's dtype, or None.

    Returns:
        y [T, H] of x's dtype. Equal bits for equal inputs; on the CPU, with an equal number of threads.

    Raises:
        RuntimeError: an argument is not as above; the message says which. On a GPU the values of expert_ids and
            counts are not checked.
    """
    return torch.ops.prunepath.sparse_ffn.default(
        x,
        gate,
        up,
        down_t,
        expert_ids,
        counts,
        activation,
        num_experts=num_experts,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
    )


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
    """Router, `select` and `sparse_ffn` in one call.

    v = router_out·(router_in·x) + router_bias, or router_out·x + router_bias without router_in. A linear router's
    logits are z = v. A factored router, which has a floor ε and a log-scale s, estimates the F factors of every
    expert's activation, 2 for a gated FFN and else 1: v is F rows of E,

        z_e = s_e + Σ_f ¼·log(φ_f(v_fe)² + ε_fe²),

    where φ_1 stands in for the activation, x·σ(x) for silu, x·σ(1.702·x) for gelu and gelu_tanh, softplus for relu and
    its square for relu2, and φ_2(v) = v. All is float32; neither logits nor router_in·x are ever rounded to x's dtype.

    Either of the router's tables may be in 4 bits, with a scale for every row: see `reference.pack_rows`, which makes
    such a table, and `reference.unpack_rows`, which says what it stands for.

    Args:
        x: [T, H] float32, bfloat16 or float16, any strides.
        router_in: [r, H] of x's dtype, contiguous; None for a router of full rank. With a router_in_scale, uint8
            [r, H / 2], where H is even.
        router_out: [E, r], or [E, H] without router_in, of x's dtype, contiguous; F·E rows if the router is factored.
            E must divide D. With a router_out_scale, uint8 of half as many columns, whose number is even.
        router_bias: [E], or [F·E], float32 or x's dtype, or None.
        threshold: float32 [] or [T]; see `route`.
        gate, up, down_t, activation, gate_bias, up_bias, down_bias: see `sparse_ffn`.
        router_in_scale: [r] float32 or x's dtype, of a router_in in 4 bits.
        router_out_scale: [E], or [F·E], float32 or x's dtype, of a router_out in 4 bits.
        router_floor: [F·E] float32 or x's dtype, of a factored router; None for a linear one.
        router_log_scale: [E] float32 or x's dtype, exactly where there is a router_floor.
        min_experts, max_experts: see `route`.

    Returns:
        y [T, H] of x's dtype; counts int32 [T], the number of active experts of each token.

    Raises:
        RuntimeError: an argument is not as above; the message says which.
    """
    return torch.ops.prunepath.routed_ffn.default(
        x,
        router_in,
        router_out,
        router_bias,
        threshold,
        gate,
        up,
        down_t,
        activation,
        router_in_scale=router_in_scale,
        router_out_scale=router_out_scale,
        router_floor=router_floor,
        router_log_scale=router_log_scale,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        min_experts=min_experts,
        max_experts=max_experts,
    )
