"""The Triton `sparse_ffn` and `routed_ffn`, run by Triton's interpreter: the float64 reference's results."""

import math

import pytest
import torch

from prunepath.ops import reference

pytest.importorskip("triton", reason="needs the package triton")

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
DTYPES = list(BOUNDS)
ACTIVATIONS = list(reference.ACTIVATIONS)


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class Call:
    """Random inputs of the FFN operators, and the selection that the reference makes of them."""

    def __init__(
        self,
        T,
        E=5,
        n=3,
        H=20,
        rank=4,
        *,
        dtype=torch.float32,
        gated=True,
        activation="silu",
        biases=True,
        bias_dtype=torch.float32,
        factored=False,
        packed=(),  # names of the router's tables that are in 4 bits
        **limits,
    ):
        generator = torch.Generator().manual_seed(1000 * T + E)

        def normal(*shape, scale=1.0, dtype=dtype):
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        D, scale = E * n, max(H, 1) ** -0.5
        rows = 2 * E if factored and gated else E
        self.num_experts = E
        self.x = normal(T, H)
        self.router_in = normal(rank, H, scale=scale) if rank else None
        self.router_out = normal(rows, rank or H, scale=2 * (rank or max(H, 1)) ** -0.5)
        self.router_bias = normal(rows, dtype=bias_dtype)
        self.factors = {}
        if factored:
            floor = normal(rows, dtype=bias_dtype).abs() * 0.1
            self.factors = {"router_floor": floor, "router_log_scale": normal(E, dtype=bias_dtype)}
        self.scales = {}
        for name in packed:
            table = getattr(self, name)
            self.scales[f"{name}_scale"] = (table.float().abs().amax(1) / 7).to(bias_dtype)
            setattr(self, name, reference.pack_rows(torch.randint(-8, 8, table.shape, generator=generator)))
        self.threshold = torch.rand(T, generator=generator).clamp_min(0.05)
        self.gate = normal(D, H, scale=scale) if gated else None
        self.up = normal(D, H, scale=scale)
        self.down_t = normal(D, H)
        self.activation = activation
        self.limits = limits
        self.biases = {}
        if biases:
            self.biases = {"up_bias": normal(D, scale=0.5, dtype=bias_dtype), "down_bias": normal(H, dtype=bias_dtype)}
            if gated:
                self.biases["gate_bias"] = normal(D, scale=0.5, dtype=bias_dtype)

    @property
    def tables(self):
        return self.gate, self.up, self.down_t

    @property
    def selection(self):
        router = (self.x, self.router_in, self.router_out, self.router_bias, *self.factors.values())
        scales = {name: wide(scale) for name, scale in self.scales.items()}
        logits = reference.router_logits(*map(wide, router), activation=self.activation, **scales)
        expert_ids, _, counts = reference.route(logits, self.threshold, **self.limits)
        return expert_ids, counts

    @property
    def expected(self):
        biases = {name: wide(value) for name, value in self.biases.items()}
        args = (*map(wide, (self.x, *self.tables)), *self.selection, self.activation)
        return reference.sparse_ffn(*args, num_experts=self.num_experts, **biases)

    @property
    def routed(self):
        router = (self.router_in, self.router_out, self.router_bias, self.threshold)
        options = {**self.scales, **self.factors, **self.biases, **self.limits}
        return ("routed_ffn", (self.x, *router, *self.tables, self.activation), options)

    @property
    def sparse(self):
        args = (self.x, *self.tables, *self.selection, self.activation)
        return ("sparse_ffn", args, {"num_experts": self.num_experts, **self.biases})


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
    assert_results(interpret, [Call(num_tokens) for num_tokens in (0, 1, 2, 3, 5, 65)])


def test_equals_reference_in_half_precision(interpret):
    calls = []
    for dtype in (torch.bfloat16, torch.float16):
        calls += [Call(T, dtype=dtype, gated=T != 2, bias_dtype=dtype) for T in (1, 2, 5)]
        calls.append(Call(3, dtype=dtype, rank=0, biases=False))
    assert_results(interpret, calls)


def test_equals_reference_for_every_activation(interpret):
    calls = [Call(T, activation=activation, gated=T != 1) for activation in ACTIVATIONS for T in (1, 2)]
    assert_results(interpret, calls)


def test_equals_reference_for_odd_shapes(interpret):
    shapes = [(1, 1, 1, 1), (3, 1, 33, 0), (2, 7, 130, 3), (257, 1, 20, 5), (3, 0, 20, 2), (3, 4, 0, 0)]
    calls = [Call(2, *shape) for shape in shapes] + [Call(5, 3, 11, 37, 3, gated=False)]
    assert_results(interpret, calls)


def test_factored_routers(interpret):
    calls = [Call(T, factored=True, gated=T != 5) for T in (0, 1, 2, 5, 65)]
    calls += [Call(2, factored=True, activation=name, gated=name != "relu") for name in ACTIVATIONS]
    calls += [Call(T, factored=True, activation="relu", gated=False) for T in (1, 5)]
    for dtype in (torch.bfloat16, torch.float16):
        calls += [Call(T, factored=True, dtype=dtype, bias_dtype=dtype, rank=4 * (T != 2)) for T in (1, 2, 5)]
    calls.append(Call(3, 257, 1, 20, 5, factored=True))
    calls.append(Call(3, factored=True))
    calls[-1].router_bias = None
    assert_results(interpret, calls)


def test_routers_in_4_bits(interpret):
    both = ("router_in", "router_out")
    calls = [Call(T, rank=6, packed=both) for T in (0, 65)]
    for T in (1, 3, 5):
        for packed, H, rank in (("router_in",), 20, 5), (("router_out",), 33, 6), (("router_out",), 70, 0):
            calls.append(Call(T, H=H, rank=rank, packed=packed))
        for dtype in DTYPES:
            options = {"dtype": dtype, "bias_dtype": dtype, "factored": True, "gated": T != 5}
            calls.append(Call(T, H=150, rank=34, packed=both, **options))
    assert_results(interpret, calls)


def test_factors_far_below_zero_keep_their_digits(interpret):
    """softplus(-a) is about exp(-a): a log-scale of a - 1 makes all logits -1, but for a small difference that decides
    which expert comes first."""
    calls = []
    for T in (1, 5):
        call = Call(T, 10, 2, 20, rank=0, activation="relu", gated=False, factored=True, max_experts=1)
        depth = 7.0 + 2.0 * torch.arange(10)
        call.x = torch.zeros_like(call.x)
        call.router_bias = -depth
        call.factors = {"router_floor": torch.zeros(10), "router_log_scale": depth + 0.002 * torch.arange(10)}
        assert call.selection[0].tolist() == [[9]] * T
        calls.append(call)
    assert_results(interpret, calls)


def test_limits_and_dense_thresholds(interpret):
    limits = [{"min_experts": 4}, {"max_experts": 3}, {"min_experts": 2, "max_experts": 2}]
    calls = [Call(2, 9, 2, **limit) for limit in limits]
    calls.append(Call(2, 9, 2))
    calls[-1].threshold = torch.tensor(1.0)
    assert calls[-1].selection[1].tolist() == [9, 9]
    assert_results(interpret, calls)


def test_any_strides(interpret):
    calls = []
    for T in (2, 5):
        call = Call(T, 4, 3, 24)
        call.gate, call.up = torch.cat([call.gate, call.up]).chunk(2)  # one matrix, the gate's rows first
        call.down_t = torch.cat([call.down_t, call.down_t], 1)[:, :24]
        call.x = call.x.t().contiguous().t()
        call.threshold = call.threshold.repeat_interleave(2)[::2]
        assert call.down_t.stride(0) == 48 and not call.x.is_contiguous()
        calls.append(call)
    assert_results(interpret, calls)


def exact_logits(T, E, seed):
    """Logits with many ties, from a router of one weight a row, and thresholds at boundaries of cumulative mass."""
    call = Call(T, E, 2, E, rank=0, biases=False)
    call.x = (torch.randn(T, E, generator=torch.Generator().manual_seed(seed)) * 2).round() / 2
    call.router_out = torch.eye(E) * 2
    call.router_bias = torch.zeros(E)
    q = reference.mass(call.x * 2).sort(1, descending=True).values
    share = ((q.cumsum(1) - q).double() / q.sum(1, keepdim=True).double()).float()
    column = torch.arange(T) % (E - 1) + 1
    target = torch.where(torch.arange(T) % 2 == 0, 0.0, 2.0)
    call.threshold = torch.nextafter(share[torch.arange(T), column], target).clamp_min(1e-9)
    return call


def test_routing_is_bit_for_bit_given_the_logits(interpret):
    assert_results(interpret, [exact_logits(T, E, T) for T, E in ((4, 16), (6, 12))])


def test_the_router_rounds_nothing_to_the_dtype_of_x(interpret):
    """In bfloat16, u = 1 + 2^-9 would be 1, and the two experts would tie instead of the second coming first."""
    calls = []
    for T in (1, 5):
        call = Call(T, 2, 2, 20, rank=2, dtype=torch.bfloat16, max_experts=1)
        call.x = torch.zeros_like(call.x)
        call.x[:, 0], call.x[:, 1] = 1.0, 2.0**-9
        call.router_in = torch.zeros_like(call.router_in)
        call.router_in[0, 0] = call.router_in[1, 0] = call.router_in[1, 1] = 1.0
        call.router_out = torch.eye(2).to(torch.bfloat16)
        call.router_bias = torch.zeros(2)
        assert call.selection[0].tolist() == [[1]] * T
        calls.append(call)
    assert_results(interpret, calls)


def test_a_nan_makes_its_token_dense_and_leaves_the_others_alone(interpret):
    sizes, calls = (3, 5), []
    for T in sizes:
        call = Call(T)
        calls.append(call.routed)
        call.x = call.x.clone()
        call.x[1, 0] = math.nan
        calls.append(call.routed)
    results = interpret(calls)
    for T, (clean_y, clean_counts), (y, counts) in zip(sizes, results[::2], results[1::2], strict=True):
        others = [t for t in range(T) if t != 1]
        assert counts[1] == 5 and y[1].isnan().all()
        assert torch.equal(counts[others], clean_counts[others])
        torch.testing.assert_close(y[others], clean_y[others])


def test_an_infinity_of_another_tokens_expert_counts_for_nothing(interpret):
    calls = []
    for T in (2, 5):
        call = Call(T, activation="relu", gated=False)
        call.up[0] = math.inf
        call.x = call.x.abs()
        ids = torch.zeros(T, 1, dtype=torch.int32)
        ids[1:] = 2
        args = (call.x, *call.tables, ids, torch.ones(T, dtype=torch.int32), "relu")
        calls.append(("sparse_ffn", args, {"num_experts": 5, **call.biases}))
    for y in interpret(calls):
        assert not y[0].isfinite().any() and y[1:].isfinite().all()


def test_no_expert_is_the_bias_alone(interpret):
    calls = []
    for T in (1, 6):
        name, args, options = Call(T).sparse
        calls.append((name, (*args[:5], torch.zeros(T, dtype=torch.int32), "silu"), options))
    for (_, _, options), y in zip(calls, interpret(calls), strict=True):
        assert torch.equal(y, options["down_bias"].expand_as(y))


def test_large_float16_activations_do_not_overflow(interpret):
    calls = []
    for T in (1, 6):
        call = Call(T, dtype=torch.float16, gated=False, activation="relu2", biases=False)
        call.x *= 300
        call.down_t *= 1e-4
        calls.append(call)
    assert_results(interpret, calls)


def factors(floor_shape, log_scale_shape):
    return {"router_floor": torch.ones(floor_shape), "router_log_scale": torch.zeros(log_scale_shape)}


def in_4_bits(name, *shape, scale_shape):
    return {name: torch.zeros(shape, dtype=torch.uint8), "scales": {f"{name}_scale": torch.ones(scale_shape)}}


BAD = [
    ({"x": torch.zeros(2, 4)}, r"up of shape \[D, H\] = \[D, 4\], got \[15, 20\]"),
    ({"x": torch.zeros(2, 20).double()}, "x of dtype .* got float64"),
    ({"gate": torch.zeros(15, 20).half()}, "gate of dtype float32, got float16"),
    ({"down_t": torch.zeros(20, 15)}, r"down_t of shape \[D, H\] = \[15, 20\], got \[20, 15\]"),
    ({"down_t": torch.zeros(20, 15).t()}, "down_t with unit stride along H"),
    ({"router_in": torch.zeros(4, 19)}, r"router_in of shape \[r, H\] = \[4, 20\], got \[4, 19\]"),
    ({"router_out": torch.zeros(5, 3)}, r"router_out of shape \[E, r\] = \[5, 4\], got \[5, 3\]"),
    ({"router_out": torch.zeros(4, 4)}, "divides the 15 neurons of up, got 4"),
    ({"factors": {"router_floor": torch.ones(10)}}, "router_floor and router_log_scale, or neither, got one"),
    ({"factors": factors(10, (5, 1))}, r"router_log_scale of shape \[E\], got \[5, 1\]"),
    ({"factors": factors(10, 5)}, r"router_out of shape \[2 \* E, r\] = \[10, 4\], got \[5, 4\]"),
    ({"factors": factors(10, 4)}, "divides the 15 neurons of up, got 4"),
    (
        {"factors": factors(5, 5), "router_out": torch.zeros(10, 4), "router_bias": None},
        r"router_floor of shape \[2 \* E\] = \[10\], got \[5\]",
    ),
    (
        {"factors": factors(5, 5), "router_bias": torch.zeros(6), "gate": None, "biases": {}},
        r"router_bias of shape \[E\] = \[5\], got \[6\]",
    ),
    (
        {"router_in": torch.zeros(4, 10, dtype=torch.uint8)},
        "router_in of dtype float32 without router_in_scale, got uint8",
    ),
    ({"scales": {"router_out_scale": torch.ones(5)}}, "router_out of dtype uint8 with router_out_scale, got float32"),
    (in_4_bits("router_in", 4, 20, scale_shape=4), r"router_in of shape \[r, H / 2\] = \[4, 10\], got \[4, 20\]"),
    (in_4_bits("router_out", 5, 4, scale_shape=5), r"router_out of shape \[E, r / 2\] = \[5, 2\], got \[5, 4\]"),
    (in_4_bits("router_out", 5, 2, scale_shape=4), r"router_out_scale of shape \[E\] = \[5\], got \[4\]"),
    (
        {**in_4_bits("router_out", 5, 1, scale_shape=5), "router_in": torch.zeros(3, 20)},
        "an even r for router_out in 4 bits, got 3",
    ),
    (
        {"router_in": None, "router_out": torch.zeros(5, 20), "scales": {"router_in_scale": torch.ones(4)}},
        "router_in_scale to be None without router_in, got a tensor",
    ),
    ({"threshold": torch.ones(3)}, r"threshold of shape \[\] or \[T\] = \[2\], got \[3\]"),
    ({"threshold": torch.tensor(0.0)}, "threshold .* greater than 0 .* got 0"),
    ({"activation": "tanh"}, "activation relu, .* got tanh"),
    ({"biases": {"down_bias": torch.zeros(15)}}, r"down_bias of shape \[H\] = \[20\], got \[15\]"),
    ({"gate": None}, "gate_bias to be None for an FFN without a gate"),
    ({"limits": {"min_experts": 6}}, "min_experts from 1 .* 5, got 6"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_argument_is_one_sentence(change, message):
    from prunepath.triton_kernels.routed_ffn import routed_ffn

    call = Call(2)
    for name, value in change.items():
        setattr(call, name, value)
    _, args, options = call.routed
    with pytest.raises(RuntimeError, match=message) as raised:
        routed_ffn(*args, **options)
    assert "\n" not in str(raised.value)
