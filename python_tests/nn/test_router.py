"""Routers whose tables are of 4 bits: rounding, packing, training, and the states that they are saved in."""

import copy

import pytest
import torch
from torch import nn

from prunepath.nn import FFNLayout, SparseFFN, for_inference
from prunepath.nn.router import TABLES, Router, row_scales

ROUTERS = [(0, 16), (2, 16), (1, 0)]  # factors and rank


def random_router(factors=2, rank=16, bits=4, dtype=torch.float32):
    """H 32, E 24."""
    router = Router(32, 24, rank, factors=factors, bits=bits, dtype=dtype)
    router.unpack()
    generator = torch.Generator().manual_seed(1)
    for parameter in router.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    router.fit_scales()
    return router


def inputs(tokens=9):
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(2))


def test_grids_of_normal_rows_lose_one_part_in_seventy():
    table = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 40).unsqueeze(1)
    scale = row_scales(table).unsqueeze(1)
    error = ((table / scale).round().clamp(-7, 7) * scale - table).square().mean(1) / table.square().mean(1)
    assert error.mean() < 1 / 70
    assert row_scales(torch.zeros(1, 4)) > 0


@pytest.mark.parametrize(("factors", "rank"), ROUTERS)
def test_packing_changes_no_logit_and_unpacking_no_code(factors, rank):
    router, x = random_router(factors, rank), inputs()
    rounded = router(x)
    router.pack()
    assert router.is_packed and router.w_out.shape[1] == (rank or 32) // 2
    torch.testing.assert_close(router(x), rounded)
    codes = router.w_out.clone()
    router.unpack()
    torch.testing.assert_close(router(x), rounded)
    router.bfloat16().pack()
    assert torch.equal(router.w_out, codes)


def test_rounding_is_not_nothing():
    router, x = random_router(), inputs()
    rounded = router(x)
    router.w_in_scale = router.w_out_scale = None
    assert (router(x) - rounded).abs().mean() > 0.01


def test_gradients_pass_through_the_rounding():
    router = random_router().requires_grad_(True)
    router(inputs()).sum().backward()
    assert all(parameter.grad.count_nonzero() > 0 for parameter in (router.w_in, router.w_out))


def test_what_requires_gradients_is_not_packed():
    router = random_router()
    router.pack()
    assert not [name for name, _ in router.named_parameters() if name in TABLES]
    nn.Sequential(router).requires_grad_(True)  # numbers of 4 bits take none, and do not mind
    assert router.is_packed
    router.requires_grad_(True)
    assert router.w_in.requires_grad and router.w_out.requires_grad and not router.w_out_scale.requires_grad


@pytest.mark.parametrize("saved", [True, False], ids=["saved packed", "saved in training"])
@pytest.mark.parametrize("loaded", [True, False], ids=["into packed", "into training"])
def test_a_state_is_loaded_into_either_form(saved, loaded):
    router, other, x = random_router(), Router(32, 24, 16, factors=2, bits=4), inputs()
    if saved:
        router.pack()
    if not loaded:
        other.unpack()
    other.load_state_dict(copy.deepcopy(router.state_dict()))
    assert other.is_packed == saved
    torch.testing.assert_close(other(x), router(x))


@pytest.mark.parametrize("bits", [4, 16])
def test_bytes_are_those_of_its_tensors(bits):
    router = random_router(bits=bits, dtype=torch.bfloat16)
    while_training = router.bytes_read(2)
    router.pack()
    assert router.bytes_read(2) == while_training
    assert while_training == sum(t.numel() * t.element_size() for t in router.tensors().values())


def test_an_ffn_whose_router_trains_is_not_run_by_kernels_that_cannot_round():
    torch.manual_seed(0)
    dense = nn.Module()
    dense.up, dense.down = nn.Linear(32, 48), nn.Linear(48, 32)
    layout = FFNLayout(up="up", down="down", activation="relu")
    ffn = SparseFFN(dense, layout, 48, router_rank=16, router_form="factored", router_bits=4).eval()
    model = for_inference(nn.Sequential(ffn))
    with torch.no_grad():
        assert ffn.is_served_by_kernels(inputs())
        ffn.router.unpack()
        with pytest.warns(UserWarning, match=r"prunepath\.for_inference"):
            assert not ffn.is_served_by_kernels(inputs())
        assert for_inference(model)[0].is_served_by_kernels(inputs())
