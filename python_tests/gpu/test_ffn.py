"""`sparse_ffn` and `routed_ffn` on a GPU, of every backend: float64's results given the selection, in graphs too."""

import math
import threading

import pytest
import torch

from prunepath import errors, ops
from prunepath.ops import reference

pytestmark = pytest.mark.gpu

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
DTYPES = list(BOUNDS)
ACTIVATIONS = list(reference.ACTIVATIONS)
IN, OUT = ("router_in",), ("router_out",)


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    return resolve(request.param)


@pytest.fixture
def cuda():
    return resolve("cuda")


def resolve(name):
    try:
        return ops.resolve_backend(torch.device("cuda"), name)
    except errors.BackendError as error:
        if name == "cuda":
            raise
        pytest.skip(str(error))


def poison():
    """Makes the allocator hand out memory whose floats are NaN and whose integers are -1."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    blocks = [
        torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in (1 << 25, 1 << 20, 1 << 20, 1 << 12)
    ]
    torch.cuda.synchronize()
    del blocks


class Problem:
    """Random inputs on the GPU and thresholds that differ from token to token.

    x, the router's weights and its bias are small integers times powers of two: logits are exact in float32 whatever
    the order of summation, so that what is to be selected is known, ties included.
    """

    def __init__(
        self,
        T,
        E,
        n,
        H,
        *,
        rank=16,
        dtype=torch.bfloat16,
        gated=True,
        biases=True,
        bias_dtype=torch.float32,
        router_rows=None,
        packed=(),  # names of the router's tables that are in 4 bits
        seed=0,
    ):
        generator = torch.Generator("cuda").manual_seed(seed)
        D, rows = E * n, router_rows or E

        def normal(*shape, scale=1.0, to=dtype):
            return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(to)

        def integers(most, *shape):
            return torch.randint(-most, most + 1, shape, generator=generator, device="cuda").float()

        def power_of_two(value):
            return 2.0 ** round(math.log2(value))

        def table(name, rows, width, scale):
            if name not in packed:
                return (integers(1, rows, width) * scale).to(dtype)
            scales = scale / 4 / (1 + torch.arange(rows, device="cuda") % 2)
            self.scales[f"{name}_scale"] = scales.to(bias_dtype)
            return reference.pack_rows(torch.randint(-8, 8, (rows, width), generator=generator, device="cuda"))

        self.num_experts = E
        self.scales = {}
        self.x = integers(2, T, H).to(dtype)
        width = H if rank is None else rank
        scale = power_of_two(2 / (1.15 * (H if rank is None else H * rank / 1.5) ** 0.5))
        self.router_in = None if rank is None else table("router_in", rank, H, 1.0)
        self.router_out = table("router_out", rows, width, scale)
        self.router_bias = (integers(4, rows) * scale).to(bias_dtype)
        self.factors = {}
        self.gate = normal(D, H, scale=H**-0.5) if gated else None
        self.up = normal(D, H, scale=H**-0.5)
        self.down_t = normal(D, H, scale=D**-0.5)
        self.biases = {}
        if biases:
            self.biases = {
                "up_bias": normal(D, scale=0.5, to=bias_dtype),
                "down_bias": normal(H, to=bias_dtype),
            }
            if gated:
                self.biases["gate_bias"] = normal(D, scale=0.5, to=bias_dtype)
        self.threshold = torch.rand(T, generator=generator, device="cuda").clamp_min(0.02)

    def logits(self, **activation):
        router = {"router_in": self.router_in, "router_out": self.router_out, "router_bias": self.router_bias}
        router |= self.scales | self.factors
        double = {name: t if t is None or t.dtype == torch.uint8 else t.double() for name, t in router.items()}
        return reference.router_logits(self.x.double(), **double, **activation).float()

    def selection(self, **limits):
        expert_ids, _, counts = reference.route(self.logits(), self.threshold, **limits)
        return expert_ids, counts

    def expected(self, expert_ids, counts, activation="silu"):
        tables = [None if table is None else table.double() for table in (self.gate, self.up, self.down_t)]
        biases = {name: value.double() for name, value in self.biases.items()}
        return reference.sparse_ffn(
            self.x.double(), *tables, expert_ids, counts, activation, num_experts=self.num_experts, **biases
        )

    def sparse(self, backend, expert_ids, counts, activation="silu"):
        tables = (self.gate, self.up, self.down_t)
        return backend.sparse_ffn(
            self.x, *tables, expert_ids, counts, activation, num_experts=self.num_experts, **self.biases
        )

    def routed_arguments(self, activation="silu"):
        router = (self.router_in, self.router_out, self.router_bias, self.threshold)
        return (self.x, *router, self.gate, self.up, self.down_t, activation)

    def routed_options(self):
        return {**self.scales, **self.factors, **self.biases}

    def routed(self, backend, activation="silu", **limits):
        return backend.routed_ffn(*self.routed_arguments(activation), **self.routed_options(), **limits)


class FactoredProblem(Problem):
    """The same with a factored router, whose logits are rounded: so many experts are to be selected that the last of
    them is clearly before the next, and thresholds are in the middle of the two."""

    def __init__(self, T, E, n, H, *, activation="silu", gated=True, bias_dtype=torch.float32, seed=0, **options):
        rows = 2 * E if gated else E
        super().__init__(T, E, n, H, gated=gated, bias_dtype=bias_dtype, seed=seed, router_rows=rows, **options)
        self.activation = activation
        generator = torch.Generator("cuda").manual_seed(seed + 1000)
        floor = torch.rand(rows, generator=generator, device="cuda").mul(0.2).add(0.05)
        log_scale = torch.randn(E, generator=generator, device="cuda")
        self.factors = {"router_floor": floor.to(bias_dtype), "router_log_scale": log_scale.to(bias_dtype)}
        self.threshold = self.clear_threshold(self.threshold)

    def logits(self):
        return super().logits(activation=self.activation)

    def clear_threshold(self, near):
        """float32 [T] near those given."""
        logits = self.logits()
        z = logits.sort(1, descending=True).values
        before = torch.nn.functional.pad(reference.mass_before(logits).sort(1).values, (0, 1), value=1.0)
        gaps = torch.nn.functional.pad(z[:, :-1] - z[:, 1:], (1, 1), value=math.inf)
        gaps[:, 0] = -math.inf
        target = (before < near[:, None]).sum(1, keepdim=True).clamp_max(self.num_experts)
        count = torch.arange(self.num_experts + 1, device="cuda")
        gaps = gaps.masked_fill((count - target).abs() > 5, -math.inf)
        chosen = gaps.argmax(1, keepdim=True)
        return (before.gather(1, chosen - 1) + before.gather(1, chosen))[:, 0].div(2).float()


def assert_close(y, expected):
    assert y.is_cuda and y.shape == expected.shape
    if expected.numel() > 0:
        error = ((y.double() - expected).norm() / expected.norm()).item()
        assert error <= BOUNDS[y.dtype], f"relative error {error:.3g}"


def assert_both_close(backend, problem, activation="silu", **limits):
    expert_ids, counts = problem.selection(**limits)
    expected = problem.expected(expert_ids, counts, activation)
    assert_close(problem.sparse(backend, expert_ids, counts, activation), expected)
    y, got = problem.routed(backend, activation, **limits)
    assert got.dtype == torch.int32 and torch.equal(got, counts)
    assert_close(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 5, 8, 9, 16, 17, 32, 33, 63, 64, 65, 130])
def test_every_number_of_tokens(backend, num_tokens, dtype):
    assert_both_close(backend, Problem(num_tokens, 48, 7, 160, dtype=dtype, seed=num_tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 6, 70])
@pytest.mark.parametrize(
    ("E", "n"),
    [(1, 1), (3, 1), (31, 1), (1001, 1), (14336, 1), (65536, 1), (513, 2), (777, 4), (129, 32), (7, 112)],
)
def test_every_expert_width(cuda, E, n, num_tokens, dtype):
    assert_both_close(cuda, Problem(num_tokens, E, n, 64, dtype=dtype, gated=n % 2 == 1, seed=E))


@pytest.mark.parametrize(("E", "n"), [(1, 1), (1001, 1), (37, 4), (9, 32)])
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_fine_and_coarse_experts(backend, E, n, num_tokens):
    assert_both_close(backend, Problem(num_tokens, E, n, 96, seed=E))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5, 33])
@pytest.mark.parametrize("hidden_size", [1, 5, 8, 33, 40, 576, 1000, 1001, 1536, 4096, 8192, 20000])
def test_every_hidden_size(cuda, hidden_size, num_tokens, dtype):
    gated = hidden_size % 3 != 0
    num_tokens *= 16 if hidden_size == 1 else 1  # a single number may be a small difference of large ones
    assert_both_close(cuda, Problem(num_tokens, 301, 1, hidden_size, dtype=dtype, gated=gated))


@pytest.mark.parametrize("hidden_size", [40, 257, 8192])
def test_hidden_sizes_of_every_backend(backend, hidden_size):
    for num_tokens in (1, 5):
        assert_both_close(backend, Problem(num_tokens, 65, 2, hidden_size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("rank", [None, 1, 3, 8, 64, 100, 256])
def test_every_rank_of_router(cuda, rank, num_tokens, dtype):
    for hidden_size in (136, 1024):
        assert_both_close(cuda, Problem(num_tokens, 201, 1, hidden_size, rank=rank, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 6, 70])
@pytest.mark.parametrize(
    ("packed", "hidden_size", "rank"),
    [
        (IN, 160, 5),
        (OUT, 33, 6),
        (OUT, 70, None),
        (OUT, 1024, None),
        (IN + OUT, 134, 22),
        (IN + OUT, 160, 16),
        (IN + OUT, 1024, 256),
    ],
)
def test_router_tables_in_4_bits(backend, packed, hidden_size, rank, num_tokens, dtype):
    """Products by single bytes and by four, of few lanes, a warp and a block."""
    options = {
        "rank": rank,
        "packed": packed,
        "dtype": dtype,
        "bias_dtype": dtype if num_tokens == 6 else torch.float32,
    }
    for problem in (
        Problem(num_tokens, 201, 2, hidden_size, **options),
        FactoredProblem(num_tokens, 201, 1, hidden_size, **options),
        FactoredProblem(num_tokens, 33, 3, hidden_size, gated=False, activation="relu", **options),
    ):
        activation = getattr(problem, "activation", "silu")
        assert_both_close(backend, problem, activation)
        for name in packed:  # at an address that only bytes can be read from
            table = getattr(problem, name)
            shifted = torch.zeros(table.numel() + 1, dtype=torch.uint8, device="cuda")[1:].view_as(table)
            setattr(problem, name, shifted.copy_(table))
        assert_both_close(backend, problem, activation)


@pytest.mark.parametrize("rank", [None, 24])
def test_a_router_without_bias(backend, rank):
    problem = Problem(3, 65, 2, 96, rank=rank)
    problem.router_bias = None
    assert_both_close(backend, problem)


@pytest.mark.parametrize("num_tokens", [1, 3, 20])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(backend, activation, gated, num_tokens):
    for dtype in DTYPES:
        problem = Problem(num_tokens, 60, 4, 128, dtype=dtype, gated=gated, bias_dtype=dtype)
        assert_both_close(backend, problem, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 8, 33, 64, 66])
def test_factored_routers_of_every_number_of_tokens(backend, num_tokens, gated, dtype):
    problem = FactoredProblem(num_tokens, 301, 2, 160, gated=gated, dtype=dtype, seed=num_tokens)
    assert_both_close(backend, problem)
    assert_both_close(backend, problem, max_experts=301)


@pytest.mark.parametrize("num_tokens", [1, 6, 20])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_factored_routers_of_every_activation(backend, activation, gated, num_tokens):
    for dtype in DTYPES:
        problem = FactoredProblem(
            num_tokens, 120, 3, 128, activation=activation, gated=gated, dtype=dtype, bias_dtype=dtype
        )
        assert_both_close(backend, problem, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("rank", [None, 3, 8, 64, 100, 1024])
def test_factored_routers_of_every_rank(cuda, rank, num_tokens, dtype):
    """Products by single elements and by vectors, of few lanes, a warp and a block."""
    for hidden_size in (37, 136, 1024):
        assert_both_close(cuda, FactoredProblem(num_tokens, 201, 1, hidden_size, rank=rank, dtype=dtype))


@pytest.mark.parametrize("rank", [None, 24])
def test_factored_routers_of_fine_experts_and_without_bias(backend, rank):
    for num_tokens in (1, 5):
        problem = FactoredProblem(num_tokens, 3000, 1, 256, rank=rank)
        assert_both_close(backend, problem)
        problem.router_bias = None
        problem.threshold = problem.clear_threshold(problem.threshold)
        assert_both_close(backend, problem)


def test_factors_far_below_zero_keep_their_digits(backend):
    """softplus(-a) is about exp(-a): a log-scale of a makes all logits 0, but for a small difference that decides
    which expert comes first."""
    for num_tokens in (1, 6):
        problem = FactoredProblem(num_tokens, 10, 2, 64, activation="relu", gated=False)
        depth = 7.0 + 2.0 * torch.arange(10, device="cuda")
        problem.router_out.zero_()
        problem.router_bias = -depth
        problem.factors["router_floor"].zero_()
        problem.factors["router_log_scale"] = depth + 0.002 * torch.arange(10, device="cuda")
        assert problem.selection(max_experts=1)[0].tolist() == [[9]] * num_tokens
        assert_both_close(backend, problem, "relu", max_experts=1)


@pytest.mark.parametrize("biases", [("gate_bias",), ("up_bias",), ("down_bias",), ()])
def test_any_bias_may_be_missing(backend, biases):
    for num_tokens in (1, 6):
        problem = Problem(num_tokens, 60, 4, 128)
        problem.biases = {name: problem.biases[name] for name in biases}
        assert_both_close(backend, problem)


@pytest.mark.parametrize("num_tokens", [1, 4, 32, 64])
@pytest.mark.parametrize(
    ("H", "D", "n", "gated", "activation"),
    [
        (4096, 14336, 1, True, "silu"),
        (4096, 14336, 112, True, "silu"),
        (4096, 16384, 4, False, "relu"),
        (1536, 8960, 1, True, "silu"),
        (1024, 4096, 32, False, "relu"),
        (576, 1536, 1, True, "silu"),
    ],
)
def test_shapes_of_real_models(cuda, H, D, n, gated, activation, num_tokens):
    assert_both_close(cuda, Problem(num_tokens, D // n, n, H, rank=128, gated=gated, biases=False), activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 6, 66])
def test_rows_at_any_distance(backend, num_tokens, dtype):
    for hidden_size, beyond in ((64, 8), (64, 1), (37, 3)):
        problem = Problem(num_tokens, 50, 3, hidden_size, dtype=dtype)
        D = problem.up.shape[0]
        both = torch.cat([problem.gate, problem.up])
        problem.gate, problem.up = both[:D], both[D:]
        assert_both_close(backend, problem)
        wide = torch.full((D, 2 * hidden_size + beyond), math.nan, dtype=dtype, device="cuda")
        wide[:, :hidden_size], wide[:, -hidden_size:] = problem.gate, problem.down_t
        problem.gate, problem.down_t = wide[:, :hidden_size], wide[:, -hidden_size:]
        assert_both_close(backend, problem)


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_a_down_projection_stored_by_columns_is_read_as_it_is(backend, num_tokens):
    problem = Problem(num_tokens, 50, 3, 64)
    down = torch.empty_strided((64, 150), (1, 64), dtype=torch.bfloat16, device="cuda").copy_(problem.down_t.t())
    problem.down_t = down.t()
    assert_both_close(backend, problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_any_strides_of_x(backend, num_tokens, dtype):
    problem = Problem(num_tokens, 50, 3, 64, dtype=dtype)
    x = problem.x
    shifted = torch.zeros(num_tokens * 64 + 1, dtype=dtype, device="cuda")[1:].view(num_tokens, 64).copy_(x)
    for view in (x.t().contiguous().t(), torch.stack([x, x], 2)[:, :, 1], torch.cat([x, x], 1)[:, :64], shifted):
        problem.x = view
        assert_both_close(backend, problem)


def test_a_threshold_for_every_token_with_any_stride(backend):
    problem = Problem(5, 50, 3, 64)
    problem.threshold = problem.threshold.repeat_interleave(3)[::3]
    assert_both_close(backend, problem)


@pytest.mark.parametrize("num_tokens", [1, 3, 70])
def test_limits_and_extreme_thresholds(backend, num_tokens):
    problem = Problem(num_tokens, 40, 4, 64, dtype=torch.float32)
    limits = [{"min_experts": 7}, {"max_experts": 3}, {"min_experts": 5, "max_experts": 5}, {"min_experts": 40}]
    for limit in limits:
        assert_both_close(backend, problem, **limit)
    for value, count in ((1.0, 40), (1.5, 40), (math.nan, 40), (1e-30, 1), (0.0, 1), (-1.0, 1)):
        problem.threshold = torch.full((num_tokens,), value, device="cuda")
        y, counts = problem.routed(backend)
        assert counts.tolist() == [count] * num_tokens
        assert not y.isnan().any()
        problem.threshold = torch.tensor(value, device="cuda")
        for a, b in zip(problem.routed(backend), (y, counts), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("num_experts", [16, 300, 3000])
@pytest.mark.parametrize("num_tokens", [1, 7, 70])
def test_thresholds_at_cumulative_boundaries(backend, num_experts, num_tokens):
    problem = Problem(num_tokens, num_experts, 2, 64, dtype=torch.float32)
    q = reference.mass(problem.logits()).sort(1, descending=True).values
    share = ((q.cumsum(1) - q).double() / q.sum(1, keepdim=True).double()).float()
    for column in {0, 1, num_experts // 3, num_experts - 1}:
        for target in (0.0, 2.0):
            problem.threshold = torch.nextafter(share[:, column], torch.full((), target, device="cuda")).clamp_min(1e-9)
            assert_both_close(backend, problem)


def test_non_finite_logits(backend):
    for num_tokens in (2, 6, 66):
        for dtype in (torch.float32, torch.bfloat16):
            problem = Problem(num_tokens, 9, 4, 64, dtype=dtype)
            clean, clean_counts = problem.routed(backend)
            problem.x[1, 0] = math.nan
            y, counts = problem.routed(backend)
            assert counts[1] == 9 and y[1].isnan().all()
            others = [t for t in range(num_tokens) if t != 1]
            assert torch.equal(counts[others], clean_counts[others])
            torch.testing.assert_close(y[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [2, 9])
def test_a_skipped_infinity_counts_for_nothing(backend, num_tokens, dtype):
    """An expert that is infinite for the tokens that skip it, and runs for the last token alone."""
    problem = Problem(num_tokens, 8, 2, 64, dtype=dtype, gated=False)
    problem.biases["up_bias"][:2] = 0
    problem.up[:2] = 0
    problem.up[:2, 0] = torch.finfo(dtype).max
    problem.x[:, 0] = 2.0
    problem.x[-1, 0] = 0.0
    ids = torch.tensor([[3, -1]] * (num_tokens - 1) + [[0, 3]], dtype=torch.int32, device="cuda")
    counts = torch.tensor([1] * (num_tokens - 1) + [2], dtype=torch.int32, device="cuda")
    y = problem.sparse(backend, ids, counts, "relu2")
    assert y.isfinite().all()
    assert_close(y, problem.expected(ids, counts, "relu2"))


@pytest.mark.parametrize("num_tokens", [1, 4, 70])
def test_given_experts_in_any_order(backend, num_tokens):
    problem = Problem(num_tokens, 100, 3, 64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(100, generator=generator) for _ in range(num_tokens)])[:, :60].int().cuda()
    counts = torch.randint(0, 61, (num_tokens,), generator=generator).int().cuda()
    counts[0] = 0  # no expert at all
    y = problem.sparse(backend, ids, counts)
    assert_close(y, problem.expected(ids, counts))
    assert torch.equal(y[0], problem.biases["down_bias"].bfloat16())
    none = ids[:, :0].contiguous(), torch.zeros_like(counts)
    assert_close(problem.sparse(backend, *none), problem.expected(*none))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "H"), [(1, 64), (5, 64), (20, 64), (70, 64), (3, 37)])
def test_small_call_of_every_kernel(T, H, dtype):
    """Few and many tokens, 16-byte and single loads; what compute-sanitizer runs."""
    for E in (7, 600):
        assert_both_close(resolve("cuda"), Problem(T, E, 3, H, dtype=dtype))


@pytest.mark.parametrize("num_tokens", [1, 3, 8, 64, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_and_workspaces_are_written_before_they_are_read(backend, num_tokens, dtype):
    for hidden_size in (128, 37):
        problem = Problem(num_tokens, 600, 3, hidden_size, dtype=dtype)
        expert_ids, counts = problem.selection()
        expected = problem.expected(expert_ids, counts)
        poison()
        y, got = problem.routed(backend)
        assert torch.equal(got, counts)
        assert_close(y, expected)
        poison()
        assert_close(problem.sparse(backend, expert_ids, counts), expected)


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 70])
def test_repeats_bit_for_bit(backend, num_tokens):
    problem = Problem(num_tokens, 1200, 2, 512)
    expert_ids, counts = problem.selection()
    first = [output.clone() for output in problem.routed(backend)]
    sparse = problem.sparse(backend, expert_ids, counts)
    for _ in range(20):
        for a, b in zip(problem.routed(backend), first, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(problem.sparse(backend, expert_ids, counts), sparse)


@pytest.mark.parametrize(("num_experts", "n"), [(24, 12), (3000, 1)])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 64, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_follows_inputs_and_thresholds(backend, num_tokens, num_experts, n, dtype):
    problem = Problem(num_tokens, num_experts, n, 128, dtype=dtype)
    problem.routed(backend)  # compiles before the capture
    problem.sparse(backend, *problem.selection())
    expert_ids, counts = problem.selection()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routed = problem.routed(backend)
        sparse = problem.sparse(backend, expert_ids, counts)
    seen = set()
    for seed, level in enumerate((0.1, 0.9, 0.5, 1.0, 0.7)):
        problem.x.copy_(Problem(num_tokens, num_experts, n, 128, dtype=dtype, seed=seed).x)
        problem.threshold.fill_(level)
        new_ids, new_counts = problem.selection()
        expert_ids.copy_(new_ids)
        counts.copy_(new_counts)
        for output in (*routed, sparse):
            output.fill_(-99)
        graph.replay()
        assert torch.equal(routed[1], new_counts)
        expected = problem.expected(new_ids, new_counts)
        assert_close(routed[0], expected)
        assert_close(sparse, expected)
        seen.add(tuple(new_counts.tolist()))
    assert len(seen) >= 3


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 8, 64])
def test_a_captured_graph_of_a_factored_router_repeats_bit_for_bit(backend, num_tokens, gated):
    def make(seed):
        return FactoredProblem(num_tokens, 600, 2, 128, gated=gated, seed=seed)

    problem = make(0)
    problem.routed(backend)  # compiles before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, counts = problem.routed(backend)
    for seed in range(4):
        problem.x.copy_(make(seed).x)
        problem.threshold.copy_(problem.clear_threshold(problem.threshold))
        y.fill_(-99)
        counts.fill_(-99)
        graph.replay()
        expert_ids, expected = problem.selection()
        assert torch.equal(counts, expected)
        assert_close(y, problem.expected(expert_ids, expected))
        for got, eager in zip((y, counts), problem.routed(backend), strict=True):
            assert torch.equal(got, eager)


def test_runs_on_the_current_stream(backend):
    problem = Problem(2, 16, 24, 160)
    expected = problem.routed(backend)
    values = problem.x.clone()
    problem.x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        problem.x.copy_(values)
        got = problem.routed(backend)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_two_threads_on_two_streams(backend):
    problems = [Problem(1, 4000, 1, 1024), Problem(40, 16, 24, 8192), Problem(5, 600, 1, 512, dtype=torch.float32)]
    expected = [[output.clone() for output in problem.routed(backend)] for problem in problems]
    torch.cuda.synchronize()
    failures = []

    def work(problem, right):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(40):
                    for a, b in zip(problem.routed(backend), right, strict=True):
                        assert torch.equal(a, b)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=arguments) for arguments in zip(problems, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_nothing_waits_for_the_device(backend):
    for problem in [Problem(T, 16, 24, 160) for T in (1, 8, 70)]:
        problem.routed(backend)
        selection = problem.selection()
        problem.sparse(backend, *selection)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.set_sync_debug_mode("error")
            try:
                problem.routed(backend)
                problem.sparse(backend, *selection)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("num_tokens", [1, 8])
def test_addresses_beyond_32_bits(backend, num_tokens):
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    D, H = 655360, 4096  # a table has 2.7e9 elements
    gate = torch.empty(D, H, dtype=torch.bfloat16, device="cuda").normal_(0, H**-0.5)
    down_t = torch.empty(D, H, dtype=torch.bfloat16, device="cuda").normal_(0, 0.1)
    x = torch.randn(num_tokens, H, device="cuda").bfloat16()
    ids = torch.full((num_tokens, 1), 65535, dtype=torch.int32, device="cuda")
    counts = torch.ones(num_tokens, dtype=torch.int32, device="cuda")
    y = backend.sparse_ffn(x, gate, gate, down_t, ids, counts, "silu", num_experts=65536)
    tables = [table[-10:].double() for table in (gate, gate, down_t)]
    assert_close(y, reference.sparse_ffn(x.double(), *tables, ids * 0, counts, "silu", num_experts=1))


def test_bad_arguments_are_named(cuda):
    problem = Problem(2, 6, 5, 64)
    selection = problem.selection()
    problem.threshold = problem.threshold.cpu()
    with pytest.raises(RuntimeError, match="prunepath::routed_ffn: expected threshold on the device of x"):
        problem.routed(cuda)
    with pytest.raises(RuntimeError, match=r"prunepath::sparse_ffn: expected activation relu, gelu.* got tanh"):
        problem.sparse(cuda, *selection, "tanh")


@pytest.mark.parametrize("T", [1, 6])
def test_opcheck(T):
    problem = Problem(T, 6, 5, 64)
    torch.library.opcheck(torch.ops.prunepath.routed_ffn.default, problem.routed_arguments(), problem.biases)
    for gated in (True, False):
        factored = FactoredProblem(T, 6, 5, 64, gated=gated, packed=IN + OUT if gated else ())
        arguments, options = factored.routed_arguments(), factored.routed_options()
        torch.library.opcheck(torch.ops.prunepath.routed_ffn.default, arguments, options)
    arguments = (problem.x, problem.gate, problem.up, problem.down_t, *problem.selection(), "silu")
    torch.library.opcheck(torch.ops.prunepath.sparse_ffn.default, arguments, {"num_experts": 6, **problem.biases})


def test_the_library_says_what_it_was_compiled_for():
    architectures = [int(name) for name in torch.ops.prunepath.cuda_architectures().split(",")]
    assert architectures == sorted(architectures) and architectures[0] >= 80
