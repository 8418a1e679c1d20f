"""The CUDA kernels of `sparse_ffn` and `routed_ffn`: the overloads that write to the caller's tensors, and errors."""

import math

import pytest
import torch

from prunepath import ops
from prunepath.ops import reference

pytestmark = pytest.mark.gpu

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


class Call:
    """Random arguments of both operators."""

    def __init__(self, T, E, n, H, dtype, gated=True):
        generator = torch.Generator().manual_seed(T + E + H)

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(dtype).cuda()

        self.x, self.router = draw(T, H), draw(E, H, scale=2 * H**-0.5)
        self.w_in, self.w_out = draw(E, n, 1 + gated, H, scale=H**-0.5), draw(E, n, H, scale=(E * n) ** -0.5)
        self.parameters = {"b_in": draw(E, n, 1 + gated), "b_out": draw(H), "center": draw(E, n)}
        self.threshold = torch.tensor(0.7, device="cuda")

    @property
    def routed(self):
        return (self.x, self.router, None, self.threshold, self.w_in, self.w_out, "silu")

    def selection(self):
        ids, _, counts = reference.route(self.x.double() @ self.router.double().t(), self.threshold)
        return ids, counts

    def expected(self, ids, counts):
        wide = {name: tensor.double() for name, tensor in self.parameters.items()}
        weights = (self.w_in.double(), self.w_out.double())
        return reference.sparse_ffn(self.x.double(), *weights, ids, counts, "silu", **wide)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("T", "H"), [(1, 64), (4, 64), (20, 64), (3, 37)])
def test_small_call_of_every_kernel(T, H, dtype):
    """Few and many tokens, 16-byte and single loads; what compute-sanitizer runs."""
    call = Call(T, 6, 5, H, dtype)
    ids, counts = call.selection()
    y, got = ops.routed_ffn(*call.routed, **call.parameters)
    again = ops.sparse_ffn(call.x, call.w_in, call.w_out, ids, counts, "silu", **call.parameters)
    expected = call.expected(ids, counts)
    assert torch.equal(got, counts)
    for output in (y, again):
        assert (output.double() - expected).norm() / expected.norm() <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("T", "E"), [(0, 12), (1, 12), (4, 12), (7, 12), (64, 12), (65, 12), (130, 12), (3, 1500)])
def test_out_writes_every_element_and_stays_within_its_workspace(T, E, dtype):
    call = Call(T, E, 3, 96, dtype)
    ids, counts = call.selection()
    for op, arguments in (
        ("routed_ffn", call.routed),
        ("sparse_ffn", (call.x, call.w_in, call.w_out, ids, counts, "silu")),
    ):
        size = ops.workspace_size(op, call.x, call.w_in)
        for start in (64, 65):  # an unaligned workspace does too
            buffer = torch.full((size + 130,), 171, dtype=torch.uint8, device="cuda")
            outputs = {"y": torch.full_like(call.x, math.nan), "workspace": buffer[start : start + size]}
            if op == "routed_ffn":
                outputs["counts"] = torch.full((T,), -7, dtype=torch.int32, device="cuda")
            getattr(torch.ops.prunepath, op).out(*arguments, **call.parameters, **outputs)
            assert (buffer[:start] == 171).all() and (buffer[start + size :] == 171).all()
            expected = getattr(ops, op)(*arguments, **call.parameters)
            expected = expected if isinstance(expected, tuple) else (expected,)
            assert torch.equal(outputs["y"], expected[0])
            assert op == "sparse_ffn" or torch.equal(outputs["counts"], expected[1])


def test_workspace_for_more_tokens_serves_fewer():
    w_in = Call(1, 12, 3, 96, torch.bfloat16).w_in
    calls = [Call(T, 12, 3, 96, torch.bfloat16) for T in range(0, 70, 3)]
    sizes = [ops.workspace_size("routed_ffn", call.x, w_in) for call in calls]
    assert sizes == sorted(sizes)


def test_a_small_workspace_is_refused():
    call = Call(2, 6, 5, 64, torch.bfloat16)
    size = ops.workspace_size("sparse_ffn", call.x, call.w_in)
    outputs = {"y": torch.empty_like(call.x), "workspace": torch.empty(size - 1, dtype=torch.uint8, device="cuda")}
    with pytest.raises(RuntimeError, match=rf"workspace .*at least {size} bytes, got \[{size - 1}\]"):
        torch.ops.prunepath.sparse_ffn.out(
            call.x, call.w_in, call.w_out, *call.selection(), "silu", **call.parameters, **outputs
        )


def test_bad_arguments_are_named():
    call = Call(2, 6, 5, 64, torch.bfloat16)
    with pytest.raises(RuntimeError, match="prunepath::routed_ffn: expected threshold on the device of x"):
        ops.routed_ffn(call.x, call.router, None, torch.tensor(0.5), call.w_in, call.w_out, "silu")
    with pytest.raises(RuntimeError, match=r"prunepath::sparse_ffn: expected activation relu, gelu.* got tanh"):
        ops.sparse_ffn(call.x, call.w_in, call.w_out, *call.selection(), "tanh")


@pytest.mark.parametrize("T", [1, 6])
def test_opcheck(T):
    call = Call(T, 6, 5, 64, torch.bfloat16)
    torch.library.opcheck(torch.ops.prunepath.routed_ffn.default, call.routed, call.parameters)
    arguments = (call.x, call.w_in, call.w_out, *call.selection(), "silu")
    torch.library.opcheck(torch.ops.prunepath.sparse_ffn.default, arguments, call.parameters)
