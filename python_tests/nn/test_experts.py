import pytest
import torch

from prunepath.nn.experts import expert_contributions, router_target


@pytest.mark.parametrize("centered", [True, False])
def test_contributions_are_the_norms_of_the_experts_outputs(centered):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 24, generator=generator, dtype=torch.float64)
    down = torch.randn(10, 24, generator=generator, dtype=torch.float64)
    center = torch.randn(24, generator=generator, dtype=torch.float64) if centered else None
    shifted = hidden - center if centered else hidden
    expected = torch.stack(
        [(shifted[:, 4 * e : 4 * e + 4] @ down[:, 4 * e : 4 * e + 4].T).norm(dim=1) for e in range(6)], 1
    )
    torch.testing.assert_close(expert_contributions(hidden, down, 6, center), expected.float(), rtol=1e-4, atol=1e-5)


def test_the_error_of_a_selection_is_bounded_by_the_mass_it_leaves_out():
    """‖Σ over skipped experts‖ ≤ (1 − mass of the selection)·Σc, by the triangle inequality."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(50, 32, generator=generator)
    down = torch.randn(16, 32, generator=generator)
    contributions = expert_contributions(hidden, down, 8)
    target = router_target(contributions)
    for active in (1, 3, 6):
        keep = torch.zeros_like(target).scatter_(1, target.topk(active).indices, 1.0)
        skipped = hidden * (1 - keep).repeat_interleave(4, dim=1)
        error = (skipped @ down.T).norm(dim=1)
        bound = (1 - (target * keep).sum(1)) * contributions.sum(1)
        assert (error <= bound * (1 + 1e-4) + 1e-4).all()


def test_a_token_without_any_contribution_has_a_uniform_target():
    target = router_target(torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 3.0, 0.0, 0.0]]))
    assert target.tolist() == [[0.25] * 4, [0.25, 0.75, 0.0, 0.0]]
