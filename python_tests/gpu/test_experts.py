"""Expert layout and the FFN operators on a GPU agree with the CPU."""

import pytest
import torch

from prunepath import ops
from prunepath.ops import reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_bits(shape, dtype, seed):
    """Any bit pattern, NaN payloads included: layout moves bits."""
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(bits)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(info.min, info.max, shape, dtype=bits, generator=generator).view(dtype)


def same_bits(a, b):
    bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu().view(bits), b.cpu().view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("E", "n", "H"), [(1, 1, 1), (3, 5, 7), (4, 32, 64), (7, 33, 65), (128, 8, 1000), (2, 3, 0)])
def test_pack_and_unpack_move_the_bits_the_cpu_moves(E, n, H, gated, dtype):
    gate, up = (random_bits((E * n, H), dtype, seed) for seed in (0, 1))
    down = random_bits((H, E * n), dtype, 2)
    weights = (gate if gated else None, up, down)
    expected = ops.pack_experts(*weights, E)
    on_gpu = [None if weight is None else weight.cuda() for weight in weights]
    packed = ops.pack_experts(*on_gpu, E)
    assert all(same_bits(a, b) for a, b in zip(packed, expected, strict=True))
    back = ops.unpack_experts(*packed)
    given = [weight for weight in weights if weight is not None]
    assert len(back) == len(given) and all(same_bits(a, b) for a, b in zip(back, given, strict=True))

    w_in, w_out = torch.full_like(packed[0], -7), torch.full_like(packed[1], -7)
    torch.ops.prunepath.pack_experts.out(*on_gpu, E, w_in=w_in, w_out=w_out)
    assert same_bits(w_in, expected[0]) and same_bits(w_out, expected[1])
    outputs = [torch.full_like(weight, -7) for weight in on_gpu if weight is not None]
    named = {"gate": outputs[0] if gated else None, "up": outputs[-2], "down": outputs[-1]}
    torch.ops.prunepath.unpack_experts.out(w_in, w_out, **named)
    assert all(same_bits(a, b) for a, b in zip(outputs, given, strict=True))


def test_pack_takes_any_strides():
    up, down = torch.randn(48, 80), torch.randn(160, 48)
    gate = torch.randn(40, 96).t()[::2, :]
    expected = ops.pack_experts(gate, up[:, ::2], down[::4], 6)
    transposed = torch.empty(40, 96, device="cuda").t()[::2].copy_(gate)
    got = ops.pack_experts(transposed, up.cuda()[:, ::2], down.cuda()[::4], 6)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_pack_refuses_what_does_not_divide():
    with pytest.raises(RuntimeError, match=r"num_experts .* divide the 10 neurons of up, got 3"):
        ops.pack_experts(None, torch.zeros(10, 4, device="cuda"), torch.zeros(4, 10, device="cuda"), 3)


def test_opcheck_of_layout():
    gate, up, down = torch.randn(6, 4).cuda(), torch.randn(6, 4).cuda(), torch.randn(4, 6).cuda()
    torch.library.opcheck(torch.ops.prunepath.pack_experts.default, (gate, up, down, 3))
    torch.library.opcheck(torch.ops.prunepath.unpack_experts.default, ops.pack_experts(gate, up, down, 3))


def ffn(dtype, T=5, E=6, n=8, H=32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * 0.3).to(dtype)

    tensors = {"x": draw(T, H), "router_weight": draw(E, H), "router_bias": draw(E), "w_in": draw(E, n, 2, H)}
    tensors |= {"w_out": draw(E, n, H), "b_in": draw(E, n, 2), "b_out": draw(H), "center": draw(E, n)}
    return tensors


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
def test_ffns_agree_with_float64_given_the_selection(dtype, bound):
    cpu = ffn(dtype)
    gpu = {name: tensor.cuda() for name, tensor in cpu.items()}
    threshold = torch.tensor(0.6)
    extras = ("b_in", "b_out", "center")

    logits = cpu["x"].float() @ cpu["router_weight"].float().t() + cpu["router_bias"].float()
    expert_ids, _, counts = ops.route(logits, threshold)
    assert 1 <= counts.min() and counts.min() < 6
    wide = {name: tensor.double() for name, tensor in cpu.items()}
    expected = reference.sparse_ffn(
        wide["x"], wide["w_in"], wide["w_out"], expert_ids, counts, "silu", **{name: wide[name] for name in extras}
    )
    weights = (gpu["w_in"], gpu["w_out"])
    options = {name: gpu[name] for name in extras}
    y = ops.sparse_ffn(gpu["x"], *weights, expert_ids.cuda(), counts.cuda(), "silu", **options)
    assert y.is_cuda and y.dtype == dtype
    assert (y.cpu().double() - expected).norm() / expected.norm() <= bound

    router = (gpu["router_weight"], gpu["router_bias"], threshold.cuda())
    routed, routed_counts = ops.routed_ffn(gpu["x"], *router, *weights, "silu", **options)
    assert torch.equal(routed_counts.cpu(), counts)
    assert (routed.cpu().double() - expected).norm() / expected.norm() <= bound
