"""`pack_experts` lays weights out bit for bit, from any strides, in any order of the neurons."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunepath import ops
from prunepath.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OP = torch.ops.prunepath.pack_experts.default


def make_weights(intermediate_size, hidden_size, gated=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(intermediate_size, hidden_size)] * 2 + [(hidden_size, intermediate_size)]
    gate, up, down = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return gate if gated else None, up, down


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def assert_same_bits(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.is_contiguous()
        assert torch.equal(bits(a), bits(b))


@settings(max_examples=60, deadline=None)
@given(
    intermediate_size=st.integers(0, 200),
    hidden_size=st.integers(0, 140),
    gated=st.booleans(),
    ordered=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_reference(intermediate_size, hidden_size, gated, ordered, dtype):
    weights = make_weights(intermediate_size, hidden_size, gated, dtype)
    order = torch.randperm(intermediate_size, generator=torch.Generator().manual_seed(1)) if ordered else None
    assert_same_bits(ops.pack_experts(*weights, order), reference.pack_experts(*weights, order))


def test_layout():
    gate, up, down = make_weights(12, 5)
    order = torch.arange(12).flip(0)
    packed = ops.pack_experts(gate, up, down, order)
    for j in range(12):
        assert torch.equal(packed[0][j], gate[11 - j])
        assert torch.equal(packed[1][j], up[11 - j])
        assert torch.equal(packed[2][j], down[:, 11 - j])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    """Transposed weights (GPT-2's Conv1D) and slices of one matrix (Phi-3's gate_up_proj)."""
    gate, up, down = make_weights(72, 70, dtype=dtype)
    order = torch.randperm(72, generator=torch.Generator().manual_seed(2))
    expected = reference.pack_experts(gate, up, down, order)
    merged = torch.cat([gate, up])
    for views in (
        (merged[:72], merged[72:], down.t().contiguous().t()),
        tuple(w.t().contiguous().t() for w in (gate, up, down)),
        (torch.stack([gate, gate], 2)[..., 0], up, down),
    ):
        assert_same_bits(ops.pack_experts(*views, order), expected)


def test_copies_what_is_laid_out_already():
    _, up, down = make_weights(6, 4, gated=False)
    packed = ops.pack_experts(None, up, down.t().contiguous().t())
    packed[0].zero_()
    assert up.count_nonzero() == up.numel()


def test_nan_payloads_survive():
    _, up, down = make_weights(4, 4, gated=False)
    up.view(torch.int32)[0, 0] = 0x7F800001  # a signalling NaN
    assert ops.pack_experts(None, up, down)[0].view(torch.int32)[0, 0] == 0x7F800001


GATE, UP, DOWN = make_weights(12, 5)
ORDER = torch.arange(12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None, UP[0], DOWN), r"up of shape \[D, H\], got \[5\]"),
        ((None, UP, UP), r"down of shape \[H, D\] = \[5, 12\], got \[12, 5\]"),
        ((DOWN, UP, DOWN), r"gate of shape \[D, H\] = \[12, 5\], got \[5, 12\]"),
        ((GATE.half(), UP, DOWN), "gate of dtype float32, got float16"),
        ((None, UP, DOWN.double()), "down of dtype float32, got float64"),
        ((None, UP.int(), DOWN.int()), "up of dtype .* got int32"),
        ((None, UP, DOWN, ORDER.int()), "order of dtype int64, got int32"),
        ((None, UP, DOWN, ORDER[:11]), r"order of shape \[D\] = \[12\], got \[11\]"),
        ((None, UP, DOWN, ORDER + 1), "order to hold numbers from 0 to 11, got 12"),
        ((None, UP, DOWN, ORDER - 1), "order to hold numbers from 0 to 11, got -1"),
        ((None, UP, DOWN, ORDER // 2), "order to be a permutation, got 0 twice"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(RuntimeError, match=f"prunepath::pack_experts: expected {message}"):
        ops.pack_experts(*arguments)


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated):
    torch.library.opcheck(OP, make_weights(12, 5, gated))
    torch.library.opcheck(OP, (*make_weights(12, 5, gated), torch.randperm(12)))


def test_compiles_whole():
    @torch.compile(fullgraph=True)
    def f(gate, up, down):
        return ops.pack_experts(gate * 2, up, down)

    assert_same_bits(f(GATE, UP, DOWN), [GATE * 2, UP, DOWN.t().contiguous()])
