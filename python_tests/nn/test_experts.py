import pytest
import torch

from prunepath.nn.experts import expert_contributions, router_target


@pytest.mark.parametrize("num_experts", [6, 24])
def test_contributions_are_the_norms_of_the_experts_outputs(num_experts):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 24, generator=generator, dtype=torch.float64)
    down_t = torch.randn(24, 10, generator=generator, dtype=torch.float64)
    parts = zip(hidden.chunk(num_experts, dim=1), down_t.chunk(num_experts), strict=True)
    expected = torch.stack([(h @ w).norm(dim=1) for h, w in parts], 1)
    torch.testing.assert_close(
        expert_contributions(hidden, down_t, num_experts), expected.float(), rtol=1e-4, atol=1e-5
    )


def test_the_error_of_a_selection_is_bounded_by_the_mass_it_leaves_out():
    """‖Σ over skipped experts‖ ≤ (1 − mass of the selection)·Σc, by the triangle inequality.

    The smallest experts' share of Σ√c, which the mass leaves out, is more than theirs of Σc.
    """
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(50, 32, generator=generator)
    down_t = torch.randn(32, 16, generator=generator)
    contributions = expert_contributions(hidden, down_t, 8)
    target = router_target(contributions)
    for active in (1, 3, 6):
        keep = torch.zeros_like(target).scatter_(1, target.topk(active).indices, 1.0)
        skipped = hidden * (1 - keep).repeat_interleave(4, dim=1)
        error = (skipped @ down_t).norm(dim=1)
        bound = (1 - (target * keep).sum(1)) * contributions.sum(1)
        assert (error <= bound * (1 + 1e-4) + 1e-4).all()


def test_a_token_without_any_contribution_has_a_uniform_target():
    target = router_target(torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 9.0, 0.0, 0.0]]))
    assert target.tolist() == [[0.25] * 4, [0.25, 0.75, 0.0, 0.0]]
