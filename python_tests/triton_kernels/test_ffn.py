"""The Triton `sparse_ffn` and `routed_ffn`, run by Triton's interpreter: the float64 reference's results."""

import math

import pytest
import torch

from prunepath.ops import reference

pytest.importorskip("triton", reason="needs the package triton")

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
DTYPES = list(BOUNDS)
ACTIVATIONS = list(reference.ACTIVATIONS)


class Call:
    """Random inputs of the FFN operators, and the selection that the reference makes of them."""

    def __init__(
        self,
        T,
        E=5,
        n=6,
        H=40,
        *,
        dtype=torch.float32,
        gated=True,
        activation="silu",
        parameters=True,
        parameter_dtype=torch.float32,
        **limits,
    ):
        generator = torch.Generator().manual_seed(1000 * T + E)

        def normal(*shape, scale=1.0):
            return torch.randn(*shape, generator=generator) * scale

        inner = 2 if gated else 1
        self.x = normal(T, H).to(dtype)
        self.w_in = normal(E, n, inner, H, scale=max(H, 1) ** -0.5).to(dtype)
        self.w_out = normal(E, n, H).to(dtype)
        self.router_weight = normal(E, H, scale=2 * max(H, 1) ** -0.5).to(dtype)
        self.router_bias = normal(E).to(parameter_dtype)
        self.threshold = torch.rand(T, generator=generator).clamp_min(0.05)
        self.activation = activation
        self.limits = limits
        self.parameters = {}
        if parameters:
            self.parameters = {
                "b_in": normal(E, n, inner, scale=0.5).to(parameter_dtype),
                "b_out": normal(H).to(parameter_dtype),
                "center": normal(E, n, scale=0.3).to(parameter_dtype),
            }

    @property
    def selection(self):
        logits = self.x.double() @ self.router_weight.double().t() + self.router_bias.double()
        expert_ids, _, counts = reference.route(logits, self.threshold, **self.limits)
        return expert_ids, counts

    @property
    def expected(self):
        parameters = {name: value.double() for name, value in self.parameters.items()}
        weights = (self.w_in.double(), self.w_out.double())
        return reference.sparse_ffn(self.x.double(), *weights, *self.selection, self.activation, **parameters)

    @property
    def routed(self):
        router = (self.router_weight, self.router_bias, self.threshold)
        args = (self.x, *router, self.w_in, self.w_out, self.activation)
        return ("routed_ffn", args, {**self.parameters, **self.limits})

    @property
    def sparse(self):
        args = (self.x, self.w_in, self.w_out, *self.selection, self.activation)
        return ("sparse_ffn", args, self.parameters)


def assert_close(y, expected):
    assert y.shape == expected.shape
    if expected.numel() > 0:
        error = ((y.double() - expected).norm() / expected.norm()).item()
        assert error <= BOUNDS[y.dtype], f"relative error {error:.3g}"


def assert_results(interpret, calls):
    results = interpret([operator for call in calls for operator in (call.routed, call.sparse)])
    for call, (routed, counts), sparse in zip(calls, results[::2], results[1::2], strict=True):
        assert counts.dtype == torch.int32 and torch.equal(counts, call.selection[1])
        for y in (routed, sparse):
            assert y.dtype == call.x.dtype
            assert_close(y, call.expected)


def test_equals_reference_for_every_number_of_tokens(interpret):
    assert_results(interpret, [Call(num_tokens, 5, 3, 20) for num_tokens in (0, 1, 2, 3, 4, 5, 17, 64, 65)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference_in_every_dtype(interpret, dtype):
    calls = [Call(T, dtype=dtype, gated=T != 2, parameter_dtype=dtype) for T in (1, 4, 7)]
    calls += [Call(T, dtype=dtype, parameters=False) for T in (3, 65)]
    assert_results(interpret, calls)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_reference_for_every_activation(interpret, activation):
    assert_results(interpret, [Call(T, activation=activation, gated=T != 1) for T in (1, 2, 6)])


def test_equals_reference_for_odd_shapes(interpret):
    shapes = [(1, 1, 1), (3, 1, 33), (2, 7, 130), (33, 2, 5), (3, 0, 20), (3, 4, 0)]
    assert_results(interpret, [Call(T, E, n, H) for E, n, H in shapes for T in (2, 5)])


def test_equals_reference_for_experts_that_are_sorted(interpret):
    assert_results(interpret, [Call(1, 257, 1, 20)])


def test_limits_and_dense_thresholds(interpret):
    limits = [{"min_experts": 4}, {"max_experts": 3}, {"min_experts": 2, "max_experts": 2}, {"max_experts": 1}]
    calls = [Call(T, 9, 2, 20, **limit) for limit in limits for T in (2, 5)]
    for T in (2, 5):
        calls.append(Call(T, 9, 2, 20))
        calls[-1].threshold = torch.tensor(1.0)
        assert calls[-1].selection[1].tolist() == [9] * T
    assert_results(interpret, calls)


def test_any_strides(interpret):
    calls = []
    for T in (2, 6, 65):
        call = Call(T, 4, 3, 24)
        fused = call.w_in.permute(2, 0, 1, 3).contiguous()  # the gate's rows before those of up
        call.w_in = fused.permute(1, 2, 0, 3)
        call.x = call.x.t().contiguous().t()
        call.threshold = call.threshold.repeat_interleave(2)[::2]
        assert not call.w_in.is_contiguous() and not call.x.is_contiguous()
        calls.append(call)
    assert_results(interpret, calls)


def exact_logits(T, E, seed):
    """Logits with many ties, from a router of one weight a row, and thresholds at boundaries of cumulative mass."""
    call = Call(T, E, 2, E, parameters=False)
    call.x = (torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) * 2).round() / 2
    call.router_weight = torch.eye(E) * 2
    call.router_bias = torch.zeros(E)
    q = reference.mass(call.x * 2).sort(1, descending=True).values
    share = ((q.cumsum(1) - q).double() / q.sum(1, keepdim=True).double()).float()
    column = torch.arange(T) % (E - 1) + 1
    target = torch.where(torch.arange(T) % 2 == 0, 0.0, 2.0)
    call.threshold = torch.nextafter(share[torch.arange(T), column], target).clamp_min(1e-9)
    return call


def test_routing_is_bit_for_bit_given_the_logits(interpret):
    assert_results(interpret, [exact_logits(T, E, T) for T, E in ((4, 16), (3, 31), (16, 12))])


def test_a_nan_makes_its_token_dense_and_leaves_the_others_alone(interpret):
    for T in (3, 6):
        call = Call(T)
        clean = call.routed
        dirty = call.x.clone()
        dirty[1, 0] = math.nan
        call.x = dirty
        (y, counts), (clean_y, clean_counts) = interpret([call.routed, clean])
        others = [t for t in range(T) if t != 1]
        assert counts[1] == 5 and y[1].isnan().all()
        assert torch.equal(counts[others], clean_counts[others])
        torch.testing.assert_close(y[others], clean_y[others])


def test_no_expert_is_the_bias_alone(interpret):
    calls = []
    for T in (1, 6):
        name, args, options = Call(T).sparse
        calls.append((name, (*args[:4], torch.zeros(T, dtype=torch.int32), "silu"), options))
    for (_, _, options), y in zip(calls, interpret(calls), strict=True):
        assert torch.equal(y, options["b_out"].expand_as(y))


def test_large_float16_activations_do_not_overflow(interpret):
    calls = []
    for T in (1, 6):
        call = Call(T, dtype=torch.float16, gated=False, activation="relu2", parameters=False)
        call.x *= 300
        call.w_out *= 1e-4
        calls.append(call)
    assert_results(interpret, calls)


def test_writes_what_the_caller_owns(interpret):
    """A poisoned workspace, y and counts; the workspace of many tokens serves few."""
    from prunepath.triton_kernels.sparse_ffn import workspace_size

    most = Call(66)
    size = workspace_size(most.x, most.w_in)
    calls, expected = [], []
    for T in (66, 64, 5, 4, 1):
        call = Call(T)
        # The size depends on the device's multiprocessors, of which the interpreter has few.
        owned = {"y": torch.full_like(call.x, math.nan), "workspace": torch.full((size,), 255, dtype=torch.uint8)}
        name, args, options = call.routed
        calls.append((name, args, {**options, **owned, "counts": torch.full((T,), -77, dtype=torch.int32)}))
        name, args, options = call.sparse
        calls.append((name, args, {**options, **owned}))
        expected.append(call)
    results = interpret(calls)
    for call, (routed, counts), sparse in zip(expected, results[::2], results[1::2], strict=True):
        assert torch.equal(counts, call.selection[1])
        assert_close(routed, call.expected)
        assert_close(sparse, call.expected)
