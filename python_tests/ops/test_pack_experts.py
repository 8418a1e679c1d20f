"""`pack_experts` lays weights out bit for bit, from any strides, and `unpack_experts` is its inverse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunepath import ops
from prunepath.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NS = torch.ops.prunepath


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
    num_experts=st.integers(1, 6),
    width=st.integers(0, 70),
    hidden_size=st.integers(0, 70),
    gated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_reference_and_inverts(num_experts, width, hidden_size, gated, dtype):
    weights = make_weights(num_experts * width, hidden_size, gated, dtype)
    packed = ops.pack_experts(*weights, num_experts)
    assert_same_bits(packed, reference.pack_experts(*weights, num_experts))
    unpacked = ops.unpack_experts(*packed)
    assert_same_bits(unpacked, [w for w in weights if w is not None])
    assert_same_bits(reference.unpack_experts(*packed), unpacked)


def test_layout():
    gate, up, down = make_weights(12, 5)
    w_in, w_out = ops.pack_experts(gate, up, down, 3)
    assert w_in.shape == (3, 4, 2, 5) and w_out.shape == (3, 4, 5)
    for neuron in range(12):
        e, j = divmod(neuron, 4)
        assert torch.equal(w_in[e, j, 0], gate[neuron])
        assert torch.equal(w_in[e, j, 1], up[neuron])
        assert torch.equal(w_out[e, j], down[:, neuron])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    """Transposed weights (GPT-2's Conv1D) and slices of one matrix (Phi-3's gate_up_proj)."""
    gate, up, down = make_weights(24, 10, dtype=dtype)
    expected = ops.pack_experts(gate, up, down, 4)
    merged = torch.cat([gate, up])
    views = (merged[:24], merged[24:], down.t().contiguous().t())
    assert_same_bits(ops.pack_experts(*views, 4), expected)
    views = tuple(w.t().contiguous().t() for w in (gate, up, down))
    assert_same_bits(ops.pack_experts(*views, 4), expected)
    views = (torch.stack([gate, gate], 2)[..., 0], up, down)
    assert_same_bits(ops.pack_experts(*views, 4), expected)


def test_nan_payloads_survive():
    _, up, down = make_weights(4, 4, gated=False)
    up.view(torch.int32)[0, 0] = 0x7F800001  # a signalling NaN
    packed = ops.pack_experts(None, up, down, 2)
    assert packed[0].view(torch.int32)[0, 0, 0, 0] == 0x7F800001
    assert_same_bits(ops.unpack_experts(*packed), [up, down])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_overloads_write_every_element(gated, dtype):
    gate, up, down = make_weights(20, 7, gated, dtype)
    expected = ops.pack_experts(gate, up, down, 4)
    outputs = {
        name: torch.full_like(tensor, math.nan) for name, tensor in zip(("w_in", "w_out"), expected, strict=True)
    }
    assert NS.pack_experts.out(gate, up, down, 4, **outputs) is None
    assert_same_bits(list(outputs.values()), expected)
    names = ("gate", "up", "down") if gated else ("up", "down")
    weights = [w for w in (gate, up, down) if w is not None]
    outputs = {name: torch.full_like(w, math.nan) for name, w in zip(names, weights, strict=True)}
    NS.unpack_experts.out(*expected, **({"gate": None} | outputs))
    assert_same_bits(list(outputs.values()), weights)


GATE, UP, DOWN = make_weights(12, 5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None, UP, DOWN, 5), "num_experts .* divide the 12 neurons of up, got 5"),
        ((None, UP, DOWN, 0), "num_experts .* got 0"),
        ((None, UP[0], DOWN, 3), r"up of shape \[D, H\], got \[5\]"),
        ((None, UP, UP, 3), r"down of shape \[H, D\] = \[5, 12\], got \[12, 5\]"),
        ((DOWN, UP, DOWN, 3), r"gate of shape \[D, H\] = \[12, 5\], got \[5, 12\]"),
        ((GATE.half(), UP, DOWN, 3), "gate of dtype float32, got float16"),
        ((None, UP, DOWN.double(), 3), "down of dtype float32, got float64"),
        ((None, UP.int(), DOWN.int(), 3), "up of dtype .* got int32"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(RuntimeError, match=f"prunepath::pack_experts: expected {message}"):
        ops.pack_experts(*arguments)


def test_bad_packed_weights_are_named():
    w_in, w_out = ops.pack_experts(GATE, UP, DOWN, 3)
    prefix = "prunepath::unpack_experts: expected"
    with pytest.raises(RuntimeError, match=rf"{prefix} w_out of shape .* got \[2, 4, 5\]"):
        ops.unpack_experts(w_in, w_out[:2])
    with pytest.raises(RuntimeError, match=f"{prefix} w_in to be contiguous"):
        ops.unpack_experts(w_in.flip(0).transpose(0, 1).contiguous().transpose(0, 1), w_out)
    with pytest.raises(RuntimeError, match=f"{prefix} gate to be given .* got None"):
        NS.unpack_experts.out(w_in, w_out, gate=None, up=UP.clone(), down=DOWN.clone())


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated):
    weights = make_weights(12, 5, gated)
    packed = ops.pack_experts(*weights, 3)
    torch.library.opcheck(NS.pack_experts.default, (*weights, 3))
    torch.library.opcheck(
        NS.pack_experts.out,
        (*weights, 3),
        {"w_in": torch.zeros_like(packed[0]), "w_out": torch.zeros_like(packed[1])},
    )
    torch.library.opcheck(NS.unpack_experts.default, packed)
    gate, up, down = (None if w is None else torch.zeros_like(w) for w in weights)
    torch.library.opcheck(NS.unpack_experts.out, packed, {"gate": gate, "up": up, "down": down})


def test_compiles_whole():
    @torch.compile(fullgraph=True)
    def f(gate, up, down):
        w_in, w_out = ops.pack_experts(gate * 2, up, down, 3)
        return ops.unpack_experts(w_in, w_out)

    assert_same_bits(f(GATE, UP, DOWN), [GATE * 2, UP, DOWN])
