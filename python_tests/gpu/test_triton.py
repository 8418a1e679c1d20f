"""The Triton operators on a GPU: the reference's experts, bit for bit, and float64's results given the selection."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from prunepath.triton_kernels.route import route, select
from prunepath.triton_kernels.routed_ffn import routed_ffn
from prunepath.triton_kernels.sparse_ffn import sparse_ffn

from prunepath.ops import reference

pytestmark = pytest.mark.gpu

INF, NAN = math.inf, math.nan
BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def patterns(num_experts):
    E = num_experts
    z = normal(E, seed=E)
    rows = [torch.full((E,), value) for value in (0.0, INF, -INF, NAN, 3.4e38, 1e-45)]
    rows += [z.round(), z * 1e-40, z * 1e38, 1.0 * torch.arange(E), -1.0 * torch.arange(E)]
    rows.append(torch.where(torch.arange(E) % 2 == 0, -0.0, 0.0))
    for special in (INF, -INF, NAN, 1e30, 50.0, 20.79, 20.80):
        row = z.clone()
        row[E // 2] = special
        rows.append(row)
    mixed = z.clone()
    mixed[::3], mixed[1::3] = INF, -INF
    return torch.stack([*rows, mixed])


def assert_equal_to_reference(logits, threshold, **limits):
    tau = threshold.cuda() if isinstance(threshold, torch.Tensor) else threshold
    got = (*route(logits.cuda(), tau, **limits), *select(logits.cuda(), tau, **limits))
    expected = (*reference.route(logits, threshold, **limits), *reference.select(logits, threshold, **limits))
    for name, a, b in zip(("expert_ids", "probs", "counts", "mask", "counts"), got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert torch.equal(a.cpu(), b), (name, limits)


@pytest.mark.parametrize("num_experts", [1, 3, 64, 1000, 4096, 14336, 65536])
def test_routing_is_the_references_bit_for_bit(num_experts):
    E, few = num_experts, (num_experts + 2) // 3
    logits = torch.cat([patterns(E), *(normal(8, E, seed=E, scale=scale) for scale in (0.01, 1.0, 8.0))])
    tau = torch.rand(len(logits), generator=torch.Generator().manual_seed(1)).clamp_min(1e-7)
    assert_equal_to_reference(logits, tau)
    assert_equal_to_reference(logits, tau, min_experts=few, max_experts=few)
    assert_equal_to_reference(logits, 0.8, max_experts=few)
    assert_equal_to_reference(logits, 1.0)
    assert_equal_to_reference(logits, 1 - 2.0**-24)
    if E in (3, 1000, 65536):
        for dtype in (torch.bfloat16, torch.float16):
            assert_equal_to_reference(logits.to(dtype), tau)


def test_routing_takes_any_strides_and_batch():
    base = normal(40, 60)
    for view in (base.t(), base[::2, ::3], base[:1].expand(5, 60), base[:, :1].expand(40, 9), base[:0]):
        assert_equal_to_reference(view, 0.6)
    assert_equal_to_reference(base, torch.linspace(0.1, 2.0, 80)[::2])
    assert_equal_to_reference(normal(70000, 9), 0.7, max_experts=6)


def test_thresholds_on_the_device_are_not_checked():
    tau = torch.tensor([NAN, 0.0, -1.0, -INF, INF], device="cuda")
    logits = normal(5, 16).cuda()
    assert route(logits, tau, min_experts=3)[2].tolist() == [16, 3, 3, 3, 16]
    assert select(logits, tau, min_experts=3)[0].sum(1).tolist() == [16, 3, 3, 3, 16]


class Problem:
    """Random inputs on the GPU. Thresholds, one a token, are in the middle between two experts, where no order of the
    router's summation changes the choice; `widest` are the first T of the most tokens, so that cases share weights."""

    def __init__(self, T, E, n, H, rank, *, dtype=torch.bfloat16, gated=True, biases=False, factored=False, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape, scale=1.0, dtype=dtype):
            return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

        D, rows = E * n, 2 * E if factored and gated else E
        self.num_experts = E
        self.x = normal(T, H)
        self.router_in = normal(rank, H, scale=H**-0.5) if rank else None
        self.router_out = normal(rows, rank or H, scale=2 * (rank or H) ** -0.5)
        self.router_bias = normal(rows, dtype=torch.float32)
        self.factors = {}
        if factored:
            floor = normal(rows).abs() * 0.1 + 0.1
            self.factors = {"router_floor": floor, "router_log_scale": normal(E, dtype=torch.float32)}
        self.gate = normal(D, H, scale=H**-0.5) if gated else None
        self.up = normal(D, H, scale=H**-0.5)
        self.down_t = normal(D, H, scale=D**-0.5)
        self.biases = {}
        if biases:
            self.biases = {"up_bias": normal(D, scale=0.5), "down_bias": normal(H, dtype=torch.float32)}
            if gated:
                self.biases["gate_bias"] = normal(D, dtype=torch.float32)
        tau = torch.rand(T, generator=generator, device="cuda").clamp_min(0.02)
        before = reference.mass_before(self.logits()).sort(1).values
        before = torch.cat([before, torch.ones_like(before[:, :1])], 1)
        index = (before < tau[:, None]).sum(1).clamp(1, before.shape[1] - 1)[:, None]
        self.threshold = (before.gather(1, index - 1) + before.gather(1, index))[:, 0].div(2).float()

    def first(self, num_tokens):
        """The same problem of the first tokens."""
        other = object.__new__(Problem)
        other.__dict__ = {**self.__dict__, "x": self.x[:num_tokens], "threshold": self.threshold[:num_tokens]}
        return other

    def logits(self):
        router = (self.x, self.router_in, self.router_out, self.router_bias, *self.factors.values())
        return reference.router_logits(*[None if t is None else t.double() for t in router])

    def selection(self, **limits):
        expert_ids, _, counts = reference.route(self.logits(), self.threshold, **limits)
        return expert_ids, counts

    def expected(self, expert_ids, counts, activation="silu"):
        wide = [None if t is None else t.double() for t in (self.x, self.gate, self.up, self.down_t)]
        biases = {name: bias.double() for name, bias in self.biases.items()}
        return reference.sparse_ffn(*wide, expert_ids, counts, activation, num_experts=self.num_experts, **biases)

    def sparse(self, expert_ids, counts, activation="silu"):
        args = (self.x, self.gate, self.up, self.down_t, expert_ids, counts, activation)
        return sparse_ffn(*args, num_experts=self.num_experts, **self.biases)

    def routed(self, activation="silu", **limits):
        router = (self.router_in, self.router_out, self.router_bias, self.threshold)
        options = {**self.factors, **self.biases, **limits}
        return routed_ffn(self.x, *router, self.gate, self.up, self.down_t, activation, **options)


def assert_close(y, expected):
    assert y.is_cuda and y.shape == expected.shape
    if expected.numel() > 0:
        error = ((y.double() - expected).norm() / expected.norm()).item()
        assert error <= BOUNDS[y.dtype], f"relative error {error:.3g}"


def assert_both_close(problem, activation="silu", **limits):
    expert_ids, counts = problem.selection(**limits)
    expected = problem.expected(expert_ids, counts, activation)
    assert_close(problem.sparse(expert_ids, counts, activation), expected)
    y, got = problem.routed(activation, **limits)
    assert got.dtype == torch.int32 and torch.equal(got, counts)
    assert_close(y, expected)


# Every width of experts, every hidden size, every dtype; ranks and biases go along.
SHAPES = [
    (1536, 1, 576, 64, torch.bfloat16, True, False),
    (300, 4, 40, 7, torch.float32, True, True),
    (75, 4, 1000, 0, torch.float16, False, True),
    (64, 32, 4096, 0, torch.bfloat16, False, False),
    (96, 32, 576, 16, torch.float32, True, False),
    (2048, 1, 4096, 256, torch.bfloat16, True, False),
    (500, 1, 40, 16, torch.float16, True, True),
    (64, 4, 4096, 16, torch.float32, False, False),
]


@pytest.mark.parametrize(("E", "n", "H", "rank", "dtype", "gated", "biases"), SHAPES)
def test_ffns_are_float64s_given_the_selection(E, n, H, rank, dtype, gated, biases):
    problem = Problem(65, E, n, H, rank, dtype=dtype, gated=gated, biases=biases)
    for num_tokens in (0, 1, 2, 5, 8, 33, 64, 65):
        assert_both_close(problem.first(num_tokens))


@pytest.mark.parametrize(("E", "n", "H", "rank", "dtype", "gated", "biases"), SHAPES[1:5])
def test_ffns_of_factored_routers(E, n, H, rank, dtype, gated, biases):
    problem = Problem(65, E, n, H, rank, dtype=dtype, gated=gated, biases=biases, factored=True)
    for num_tokens in (0, 1, 2, 8, 33, 64, 65):
        assert_both_close(problem.first(num_tokens))


def test_every_activation():
    problem = Problem(6, 48, 4, 128, 16, biases=True)
    for activation in reference.ACTIVATIONS:
        for num_tokens in (1, 6):
            assert_both_close(problem.first(num_tokens), activation)


def test_limits_and_more_experts_than_a_program_holds():
    for limits in ({"min_experts": 40}, {"max_experts": 9}):
        assert_both_close(Problem(3, 64, 4, 128, 16), **limits)
    assert_both_close(Problem(2, 65536, 1, 64, 16))


def test_tables_of_any_row_stride():
    problem = Problem(5, 64, 4, 128, 16)
    problem.gate, problem.up = torch.cat([problem.gate, problem.up]).chunk(2)
    problem.down_t = torch.cat([problem.down_t, problem.down_t], 1)[:, :128]
    problem.x = problem.x.t().contiguous().t()
    for num_tokens in (1, 5):
        assert_both_close(problem.first(num_tokens))


def test_poisoned_memory_shows_nowhere():
    """Allocations, which the fixture of every test fills with NaN, and tokens and experts that are not active."""
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.are_deterministic_algorithms_enabled()
    problem = Problem(5, 64, 4, 100, 16, gated=False)
    expert_ids, counts = problem.selection()
    counts[2] = 0
    assert_close(problem.sparse(expert_ids, counts), problem.expected(expert_ids, counts))
    never = torch.ones(64, dtype=torch.bool, device="cuda")
    never[expert_ids[1, : counts[1]].long()] = False
    problem.up[never.repeat_interleave(4)] = NAN
    problem.down_t[never.repeat_interleave(4)] = NAN
    assert problem.sparse(expert_ids[1:2].expand(5, -1).contiguous(), counts[1].expand(5).contiguous()).isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 8])
def test_a_captured_graph_follows_inputs_and_thresholds(num_tokens):
    problem = Problem(num_tokens, 1000, 4, 256, 32)
    logits = normal(num_tokens, 1000).cuda()
    tau = torch.tensor(0.5, device="cuda")
    problem.threshold = tau

    def run():
        return (*problem.routed(), *route(logits, tau), *select(logits, tau))

    run()  # compiles before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    seen = set()
    for seed, value in enumerate((0.1, 0.5, 0.9, 1.0, 0.2)):
        new = normal(num_tokens, 1000, seed=seed)
        logits.copy_(new)
        problem.x.copy_(normal(num_tokens, 256, seed=seed))
        tau.fill_(value)
        for output in outputs:
            output.fill_(0 if output.dtype == torch.bool else -99)
        graph.replay()
        for got, eager in zip(outputs, run(), strict=True):
            assert torch.equal(got, eager)
        expected = (*reference.route(new, torch.tensor(value)), reference.select(new, torch.tensor(value))[0])
        for got, want in zip(outputs[2:6], expected, strict=True):
            assert torch.equal(got.cpu(), want)
        assert_close(outputs[0], problem.expected(*as_selection(outputs[1], problem)))
        seen.add(tuple(outputs[1].tolist()))
    assert len(seen) == 5


def as_selection(counts, problem):
    """As many of the most massive experts as the counts say: a logit's rounding may decide over one of them."""
    expert_ids = reference.route(problem.logits(), 1.0)[0]
    return expert_ids, counts


def test_repeats_bit_for_bit():
    problem = Problem(33, 500, 4, 1000, 16)
    for num_tokens in (1, 33):
        few = problem.first(num_tokens)
        y, counts = few.routed()
        for _ in range(20):
            again = few.routed()
            assert torch.equal(again[0], y) and torch.equal(again[1], counts)


def test_runs_on_the_current_stream():
    problem = Problem(2, 64, 4, 128, 16)
    expected = problem.routed()[0]
    given, problem.x = problem.x, torch.zeros_like(problem.x)
    problem.routed()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        problem.x.copy_(given)
        y = problem.routed()[0]
    stream.synchronize()
    assert torch.equal(y, expected)


def test_a_bad_argument_is_one_sentence():
    logits = torch.zeros(2, 4, device="cuda")
    bad = [
        ((logits, 0.0), {}, "threshold .* greater than 0"),
        ((logits, torch.ones(2)), {}, "threshold on the device of logits .* cpu"),
        ((logits, torch.ones(3, device="cuda")), {}, r"threshold .* \[3\]"),
        ((logits.double(), 0.5), {}, "logits .*float64"),
        ((logits, 0.5), {"min_experts": 5}, "min_experts .* got 5"),
    ]
    for args, limits, message in bad:
        for function in (route, select):
            with pytest.raises(RuntimeError, match=message):
                function(*args, **limits)
