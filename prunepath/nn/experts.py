"""Arithmetic on an FFN seen as a sum of experts."""

from __future__ import annotations

import torch


def expert_contributions(
    hidden: torch.Tensor, down_weight: torch.Tensor, num_experts: int, center: torch.Tensor | None = None
) -> torch.Tensor:
    """How much each expert adds to the output: c_i = ‖W_down[:, S_i]·(h_{S_i} − m_{S_i})‖₂.

    Computed as c_i² = hᵀ·(W_iᵀ·W_i)·h with the experts' n × n Gram matrices, so that no [T, E, H] tensor exists.

    Args:
        hidden: neuron activations h [T, D], experts contiguous.
        down_weight: W_down [H, D].
        center: mean activations m [D]; None means zero.

    Returns:
        float32 [T, E].
    """
    h = hidden.float() if center is None else hidden.float() - center.float()
    h = h.unflatten(-1, (num_experts, -1)).transpose(0, 1)  # [E, T, n]
    w = down_weight.float().t().unflatten(0, (num_experts, -1))  # [E, n, H]
    gram = w @ w.transpose(1, 2)
    return ((h @ gram) * h).sum(-1).clamp_(min=0).sqrt_().t()


def router_target(contributions: torch.Tensor) -> torch.Tensor:
    """Each expert's share of a token's total contribution, c / Σc: float32 [T, E]. All-zero rows are uniform."""
    total = contributions.sum(-1, keepdim=True)
    uniform = torch.full_like(contributions, 1.0 / contributions.shape[-1])
    return torch.where(total > 0, contributions / total, uniform)
