"""Arithmetic on an FFN seen as a sum of experts."""

from __future__ import annotations

import torch


def expert_contributions(hidden: torch.Tensor, down_t: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How much each expert adds to the output: c_i = ‖W_down[:, S_i]·h_{S_i}‖₂.

    With one neuron an expert that is |h_i|·‖w_i‖; else c_i² = hᵀ·(W_iᵀ·W_i)·h with the experts' n × n Gram matrices, so
    that no [T, E, H] tensor exists.

    Args:
        hidden: neuron activations h [T, D], experts contiguous.
        down_t: W_down transposed, [D, H].

    Returns:
        float32 [T, E].
    """
    if num_experts == len(down_t):
        return hidden.float().abs() * down_t.float().norm(dim=1)
    h = hidden.float().unflatten(-1, (num_experts, -1)).transpose(0, 1)  # [E, T, n]
    w = down_t.float().unflatten(0, (num_experts, -1))  # [E, n, H]
    gram = w @ w.transpose(1, 2)
    return ((h @ gram) * h).sum(-1).clamp_(min=0).sqrt_().t()


def router_target(contributions: torch.Tensor) -> torch.Tensor:
    """What routers learn, each expert's share √c / Σ√c of a token's contributions: float32 [T, E].

    The root, because shares of c themselves let a token whose few largest experts hold most of it skip too many others:
    at equal bytes that is worse than as many experts for each token. All-zero rows are uniform.
    """
    roots = contributions.sqrt()
    total = roots.sum(-1, keepdim=True)
    uniform = torch.full_like(roots, 1.0 / roots.shape[-1])
    return torch.where(total > 0, roots / total, uniform)
