"""`sparse_ffn` and `routed_ffn` on a GPU, of every backend: float64's results given the selection, in graphs too."""

import math

import pytest
import torch

from prunepath import errors, ops
from prunepath.ops import reference

pytestmark = pytest.mark.gpu

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
DTYPES = list(BOUNDS)
ACTIVATIONS = list(reference.ACTIVATIONS)


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    try:
        return ops.resolve_backend(request.param, torch.device("cuda"))
    except errors.BackendError as error:
        if request.param == "cuda":
            raise
        pytest.skip(str(error))


class Problem:
    """Random inputs on the GPU, thresholds that differ from token to token, and what the reference makes of them."""

    def __init__(
        self, T, E, n, H, *, dtype=torch.bfloat16, gated=True, parameters=True, parameter_dtype=torch.float32, seed=0
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return torch.randn(*shape, generator=generator) * scale

        def on_gpu(tensor, dtype=dtype):
            return tensor.to(dtype).cuda()

        inner = 2 if gated else 1
        self.x = on_gpu(normal(T, H))
        self.w_in = on_gpu(normal(E, n, inner, H, scale=H**-0.5))
        self.w_out = on_gpu(normal(E, n, H, scale=(E * n) ** -0.5))
        self.router_weight = on_gpu(normal(E, H, scale=2 * H**-0.5))
        self.router_bias = on_gpu(normal(E), parameter_dtype)
        self.parameters = {}
        if parameters:
            self.parameters = {
                "b_in": on_gpu(normal(E, n, inner, scale=0.5), parameter_dtype),
                "b_out": on_gpu(normal(H), parameter_dtype),
                "center": on_gpu(normal(E, n, scale=0.3), parameter_dtype),
            }
        self.threshold = torch.rand(T, generator=generator).clamp_min(0.02).cuda()

    def logits(self):
        return self.x.double() @ self.router_weight.double().t() + self.router_bias.double()

    def separate(self, **limits):
        """Moves the thresholds to the middle between two experts, where no order of summation changes the choice."""
        before = reference.mass_before(self.logits()).sort(1).values
        before = torch.cat([before, torch.ones_like(before[:, :1])], 1)
        index = (before < self.threshold[:, None].double()).sum(1).clamp(1, before.shape[1] - 1)[:, None]
        self.threshold = (before.gather(1, index - 1) + before.gather(1, index))[:, 0].div(2).float()
        return self

    def selection(self, **limits):
        expert_ids, _, counts = reference.route(self.logits(), self.threshold, **limits)
        return expert_ids, counts

    def expected(self, expert_ids, counts, activation):
        parameters = {name: value.double() for name, value in self.parameters.items()}
        weights = (self.w_in.double(), self.w_out.double())
        return reference.sparse_ffn(self.x.double(), *weights, expert_ids, counts, activation, **parameters)

    def sparse(self, backend, expert_ids, counts, activation="silu"):
        return backend.sparse_ffn(self.x, self.w_in, self.w_out, expert_ids, counts, activation, **self.parameters)

    def routed(self, backend, activation="silu", **limits):
        router = (self.router_weight, self.router_bias, self.threshold)
        return backend.routed_ffn(self.x, *router, self.w_in, self.w_out, activation, **self.parameters, **limits)


def assert_close(y, expected):
    assert y.is_cuda and y.shape == expected.shape
    if expected.numel() > 0:
        error = ((y.double() - expected).norm() / expected.norm()).item()
        assert error <= BOUNDS[y.dtype], f"relative error {error:.3g}"


def assert_both_close(backend, problem, activation="silu", **limits):
    problem.separate()
    expert_ids, counts = problem.selection(**limits)
    expected = problem.expected(expert_ids, counts, activation)
    assert_close(problem.sparse(backend, expert_ids, counts, activation), expected)
    y, got = problem.routed(backend, activation, **limits)
    assert got.dtype == torch.int32 and torch.equal(got, counts)
    assert_close(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 63, 64, 65, 130, 700])
def test_every_number_of_tokens(backend, num_tokens, dtype):
    assert_both_close(backend, Problem(num_tokens, 16, 24, 160, dtype=dtype, seed=num_tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 64, 65])
def test_auto_is_right_whichever_kernels_it_takes(monkeypatch, num_tokens, dtype):
    monkeypatch.setattr("prunepath.ops.backend._TRITON_NUMEL", 0)
    backend = ops.resolve_backend("auto", torch.device("cuda"))
    assert_both_close(backend, Problem(num_tokens, 16, 24, 160, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 4, 6, 80])
@pytest.mark.parametrize(
    ("E", "n", "H"), [(1, 1, 1), (1, 7, 5), (3, 1, 33), (5, 70, 257), (33, 5, 96), (257, 3, 64), (1000, 2, 48)]
)
def test_odd_shapes(backend, E, n, H, num_tokens, dtype):
    gated = (E + n) % 2 == 0
    assert_both_close(backend, Problem(num_tokens, E, n, H, dtype=dtype, gated=gated, seed=E))


@pytest.mark.parametrize("num_tokens", [1, 3, 8, 100])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(backend, activation, gated, num_tokens):
    for dtype in DTYPES:
        problem = Problem(num_tokens, 12, 20, 128, dtype=dtype, gated=gated, parameter_dtype=dtype)
        assert_both_close(backend, problem, activation)


@pytest.mark.parametrize("num_tokens", [1, 4, 8, 32])
@pytest.mark.parametrize(
    ("H", "D", "gated", "activation"),
    [
        (4096, 14336, True, "silu"),
        (4096, 16384, False, "relu"),
        (1536, 8960, True, "silu"),
        (1024, 4096, False, "relu"),
    ],
)
def test_shapes_of_real_models(backend, H, D, gated, activation, num_tokens):
    assert_both_close(backend, Problem(num_tokens, 128, D // 128, H, gated=gated, parameters=False), activation)


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 64, 90])
@pytest.mark.parametrize("hidden_size", [8192, 12288, 20000])
def test_wide_models(backend, hidden_size, num_tokens):
    assert_both_close(backend, Problem(num_tokens, 8, 6, hidden_size))


@pytest.mark.parametrize("num_tokens", [1, 3, 9, 70])
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


@pytest.mark.parametrize("num_experts", [16, 128, 300])
@pytest.mark.parametrize("num_tokens", [1, 4, 7, 64, 70])
def test_routing_is_bit_for_bit_given_the_logits(backend, num_experts, num_tokens):
    """With one nonzero weight in a router's row the logits are exact: ties and boundaries have to be the rule's."""
    problem = Problem(num_tokens, num_experts, 2, max(64, num_experts), dtype=torch.float32, parameters=False)
    problem.x.copy_((problem.x * 2).round() / 2)  # many ties
    problem.router_weight.zero_().fill_diagonal_(2.0)
    problem.router_bias = None
    logits = problem.x[:, :num_experts] * 2.0
    q = reference.mass(logits).sort(1, descending=True).values
    share = ((q.cumsum(1) - q).double() / q.sum(1, keepdim=True).double()).float()
    for column in {0, 1, num_experts // 3, num_experts - 1}:
        for target in (0.0, 2.0):
            problem.threshold = torch.nextafter(share[:, column], torch.full((), target, device="cuda")).clamp_min(1e-9)
            expert_ids, _, counts = ops.reference.route(logits, problem.threshold)
            y, got = problem.routed(backend)
            assert torch.equal(got, counts)
            assert_close(y, problem.expected(expert_ids, counts, "silu"))


def test_non_finite_logits(backend):
    for num_tokens in (2, 6, 66):
        problem = Problem(num_tokens, 9, 4, 64, dtype=torch.float32)
        clean, clean_counts = problem.routed(backend)
        problem.x[1, 0] = math.nan
        y, counts = problem.routed(backend)
        assert counts[1] == 9 and y[1].isnan().all()
        others = [t for t in range(num_tokens) if t != 1]
        assert torch.equal(counts[others], clean_counts[others])
        torch.testing.assert_close(y[others], clean[others])
        problem = Problem(num_tokens, 9, 4, 64, dtype=torch.float32)
        problem.router_bias[2] = math.inf
        assert problem.routed(backend)[1].tolist() == [1] * num_tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 4, 7, 64, 100])
def test_any_strides(backend, num_tokens, dtype):
    problem = Problem(num_tokens, 6, 10, 96, dtype=dtype)
    fused = torch.empty(2 * 60, 96, dtype=dtype, device="cuda")  # the gate's rows before those of up
    view = fused.view(2, 6, 10, 96).permute(1, 2, 0, 3)
    view.copy_(problem.w_in)
    problem.w_in = view
    assert_both_close(backend, problem)
    wide = torch.full((num_tokens, 300), math.nan, dtype=dtype, device="cuda")
    for x in (wide[:, 4:100], wide[:, 1:289:3], torch.empty(96, num_tokens, dtype=dtype, device="cuda").t()):
        problem.x = x.copy_(problem.x)
        assert_both_close(backend, problem)
    problem.threshold = problem.threshold.repeat_interleave(3)[::3]
    assert problem.threshold.stride(0) == 3 or num_tokens == 1
    assert torch.equal(problem.routed(backend)[1], problem.selection()[1])


@pytest.mark.parametrize("num_tokens", [1, 4, 8, 65])
def test_no_expert_is_the_bias_alone(backend, num_tokens):
    problem = Problem(num_tokens, 6, 10, 96, dtype=torch.float32)
    expert_ids = torch.full((num_tokens, 6), -1, dtype=torch.int32, device="cuda")
    y = problem.sparse(backend, expert_ids, torch.zeros(num_tokens, dtype=torch.int32, device="cuda"))
    assert torch.equal(y, problem.parameters["b_out"].expand(num_tokens, 96))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 8, 33, 64, 150])
def test_repeats_bit_for_bit(backend, num_tokens, dtype):
    problem = Problem(num_tokens, 64, 28, 512, dtype=dtype)
    expert_ids, counts = problem.selection()
    first = problem.routed(backend)
    sparse = problem.sparse(backend, expert_ids, counts)
    for _ in range(30):
        for a, b in zip(problem.routed(backend), first, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(problem.sparse(backend, expert_ids, counts), sparse)


@pytest.mark.parametrize("num_experts", [24, 300])
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 5, 32, 64, 90])
def test_a_captured_graph_follows_inputs_and_thresholds(backend, num_tokens, num_experts):
    problem = Problem(num_tokens, num_experts, 12, 128, dtype=torch.float32)
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
        problem.x.copy_(Problem(num_tokens, num_experts, 12, 128, dtype=torch.float32, seed=seed).x)
        captured = problem.threshold
        problem.threshold = torch.full_like(captured, level)
        captured.copy_(problem.threshold if level == 1.0 else problem.separate().threshold)
        problem.threshold = captured
        new_ids, new_counts = problem.selection()
        expert_ids.copy_(new_ids)
        counts.copy_(new_counts)
        for output in (*routed, sparse):
            output.fill_(-99)
        graph.replay()
        assert torch.equal(routed[1], new_counts)
        expected = problem.expected(new_ids, new_counts, "silu")
        assert_close(routed[0], expected)
        assert_close(sparse, expected)
        seen.add(tuple(new_counts.tolist()))
    assert len(seen) == 5


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


def test_nothing_waits_for_the_device(backend):
    problems = [Problem(T, 16, 24, 160) for T in (1, 8, 70)]
    for problem in problems:
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


@pytest.mark.parametrize("num_tokens", [1, 8, 70])
def test_addresses_beyond_32_bits(backend, num_tokens):
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("needs 30 GB of GPU memory")
    E, n, H = 16, 20480, 4096  # w_in has 2.7e9 elements
    w_in = torch.empty(E, n, 2, H, dtype=torch.bfloat16, device="cuda").normal_(0, H**-0.5)
    w_out = torch.empty(E, n, H, dtype=torch.bfloat16, device="cuda").normal_(0, n**-0.5)
    x = torch.randn(num_tokens, H, device="cuda").bfloat16()
    ids = torch.full((num_tokens, 1), E - 1, dtype=torch.int32, device="cuda")
    counts = torch.ones(num_tokens, dtype=torch.int32, device="cuda")
    y = backend.sparse_ffn(x, w_in, w_out, ids, counts, "silu")
    last = torch.zeros_like(ids)
    expected = reference.sparse_ffn(x.float(), w_in[-1:].float(), w_out[-1:].float(), last, counts, "silu")
    assert_close(y, expected.double())


@pytest.mark.parametrize("num_tokens", [1, 4, 8, 64, 70])
def test_triton_writes_what_the_caller_owns(num_tokens):
    pytest.importorskip("triton", reason="needs the package triton")
    from prunepath.triton_kernels.routed_ffn import routed_ffn
    from prunepath.triton_kernels.sparse_ffn import sparse_ffn, workspace_size

    problem = Problem(num_tokens, 16, 24, 160)
    arguments = (problem.x, problem.router_weight, problem.router_bias, problem.threshold)
    arguments += (problem.w_in, problem.w_out, "silu")
    expected = routed_ffn(*arguments, **problem.parameters)
    size = workspace_size(problem.x, problem.w_in)
    for _ in range(3):
        y = torch.full_like(problem.x, math.nan)
        counts = torch.full((num_tokens,), -77, dtype=torch.int32, device="cuda")
        workspace = torch.full((size + 64,), 255, dtype=torch.uint8, device="cuda")
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        routed_ffn(*arguments, **problem.parameters, y=y, counts=counts, workspace=workspace[:size])
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        assert torch.equal(y, expected[0]) and torch.equal(counts, expected[1])
        assert (workspace[size:] == 255).all()
        selection = problem.selection()
        expected_sparse = problem.sparse(ops.resolve_backend("triton", y.device), *selection)
        y.fill_(math.nan)
        workspace.fill_(255)
        weights = (problem.w_in, problem.w_out)
        sparse_ffn(problem.x, *weights, *selection, "silu", **problem.parameters, y=y, workspace=workspace[:size])
        assert torch.equal(y, expected_sparse) and (workspace[size:] == 255).all()


@pytest.mark.parametrize("num_tokens", [1, 4, 8, 64])
def test_triton_launches_few_kernels(num_tokens):
    """Into the caller's tensors: the test suite fills new ones by kernels."""
    pytest.importorskip("triton", reason="needs the package triton")
    from prunepath.triton_kernels.routed_ffn import routed_ffn
    from prunepath.triton_kernels.sparse_ffn import workspace_size

    problem = Problem(num_tokens, 16, 24, 160)
    arguments = (problem.x, problem.router_weight, problem.router_bias, problem.threshold)
    arguments += (problem.w_in, problem.w_out, "silu")
    outputs = {"y": torch.empty_like(problem.x), "counts": torch.empty(num_tokens, dtype=torch.int32, device="cuda")}
    size = workspace_size(problem.x, problem.w_in)
    outputs["workspace"] = torch.empty(size, dtype=torch.uint8, device="cuda")
    routed_ffn(*arguments, **problem.parameters, **outputs)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        routed_ffn(*arguments, **problem.parameters, **outputs)
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(launched) <= (2 if num_tokens == 1 else 3), launched
