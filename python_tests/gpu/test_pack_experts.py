"""`pack_experts` on a GPU moves the bits that the reference moves."""

import pytest
import torch

from prunepath import ops
from prunepath.ops import reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits_dtype(dtype):
    return torch.int32 if dtype == torch.float32 else torch.int16


def random_bits(shape, dtype, seed):
    """Any bit pattern, NaN payloads included: packing moves bits."""
    info = torch.iinfo(bits_dtype(dtype))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(info.min, info.max, shape, dtype=bits_dtype(dtype), generator=generator).view(dtype)


def assert_same_bits(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.is_contiguous()
        assert torch.equal(a.cpu().view(bits_dtype(b.dtype)), b.view(bits_dtype(b.dtype)))


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "H"), [(1, 1), (15, 7), (128, 64), (231, 65), (1024, 1000)])
def test_tables_are_the_references(D, H, dtype, gated, ordered):
    gate, up = (random_bits((D, H), dtype, seed) for seed in (0, 1))
    down = random_bits((H, D), dtype, 2)
    gate = gate if gated else None
    order = torch.randperm(D, generator=torch.Generator().manual_seed(3)) if ordered else None
    on_gpu = [None if tensor is None else tensor.cuda() for tensor in (gate, up, down, order)]
    assert_same_bits(ops.pack_experts(*on_gpu), reference.pack_experts(gate, up, down, order))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    base = random_bits((90, 150), dtype, 0)
    up, gate, down = base[::2, 1::3], base.t()[:45, :50], base[:50, ::3][:, :45]
    order = torch.randperm(45, generator=torch.Generator().manual_seed(3))
    views = [base.cuda()[::2, 1::3], base.cuda().t()[:45, :50], base.cuda()[:50, ::3][:, :45]]
    got = ops.pack_experts(views[1], views[0], views[2], order.cuda())
    assert_same_bits(got, reference.pack_experts(gate, up, down, order))


def test_a_bad_argument_is_one_sentence():
    up, down = torch.zeros(4, 3, device="cuda"), torch.zeros(3, 4, device="cuda")
    with pytest.raises(RuntimeError, match=r"prunepath::pack_experts: expected down of shape \[H, D\]"):
        ops.pack_experts(None, up, up)
    with pytest.raises(RuntimeError, match="expected order on the device of up"):
        ops.pack_experts(None, up, down, torch.arange(4))
