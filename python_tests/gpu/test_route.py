"""`route` and `select` on a GPU, in CUDA and in Triton, choose what the reference chooses on the CPU, bit for bit."""

import math
import threading

import pytest
import torch

from prunepath import errors, ops
from prunepath.ops import reference

pytestmark = pytest.mark.gpu

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    try:
        return ops.resolve_backend(torch.device("cuda"), request.param)
    except errors.BackendError as error:
        if request.param == "cuda":
            raise
        pytest.skip(str(error))


def on_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def poison():
    """Makes the allocator hand out memory whose floats are NaN and whose integers are -1."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    blocks = [
        torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in (1 << 25, 1 << 20, 1 << 20, 1 << 12)
    ]
    torch.cuda.synchronize()
    del blocks


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.cpu(), b.cpu())


def assert_equal_to_reference(backend, logits, threshold, **limits):
    expected = reference.route(logits, threshold, **limits)
    got = backend.route(on_gpu(logits), on_gpu(threshold), **limits)
    assert_same(got, expected)
    mask = reference._active_mask(expected[0], expected[2], logits.shape[1])
    assert_same(backend.select(on_gpu(logits), on_gpu(threshold), **limits), (mask, expected[2]))
    return got


def patterns(num_experts):
    E = num_experts
    normal = torch.randn(E, generator=torch.Generator().manual_seed(E))
    rows = [torch.full((E,), value) for value in (0.0, INF, -INF, NAN, 3.4e38, 1e-45)]
    rows += [normal.round(), normal * 1e-40, normal * 1e38, 1.0 * torch.arange(E), -1.0 * torch.arange(E)]
    rows.append(torch.where(torch.arange(E) % 2 == 0, -0.0, 0.0))
    for special in (INF, -INF, NAN, 1e30, 50.0, 20.79, 20.80):
        row = normal.clone()
        row[E // 2] = special
        rows.append(row)
    mixed = normal.clone()
    mixed[::3], mixed[1::3] = INF, -INF
    return torch.stack([*rows, mixed])


def normal(num_tokens, num_experts, scale=2.0):
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(num_experts)) * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [1, 2, 3, 31, 33, 64, 128, 512, 513, 1000, 1536, 4096])
def test_equals_reference(backend, num_experts, dtype):
    for scale in (0.01, 1.0, 8.0, 100.0):
        logits = normal(max(4, 16384 // num_experts), num_experts, scale).to(dtype)
        threshold = torch.rand(len(logits), generator=torch.Generator().manual_seed(1)).clamp_min(1e-7)
        assert_equal_to_reference(backend, logits, threshold)
    few = (num_experts + 2) // 3
    for threshold in (1e-30, 0.1, 0.8, 1 - 2.0**-24, 1.0, 1.5):
        assert_equal_to_reference(backend, patterns(num_experts).to(dtype), threshold)
        assert_equal_to_reference(backend, patterns(num_experts).to(dtype), threshold, min_experts=few, max_experts=few)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [4097, 14336, 65536])
def test_equals_reference_for_fine_experts(backend, num_experts, dtype):
    logits = torch.cat([patterns(num_experts), normal(8, num_experts, 1.0)]).to(dtype)
    for threshold in (0.3, torch.tensor(0.999)):
        assert_equal_to_reference(backend, logits, threshold)
    assert_equal_to_reference(backend, logits[-9:], 1.0)
    assert_equal_to_reference(backend, logits[-9:], 0.5, min_experts=5, max_experts=num_experts // 5)


def test_more_long_rows_than_blocks_that_sort_in_global_memory():
    logits = normal(600, 5000, 1.0)
    assert_equal_to_reference(ops.resolve_backend(torch.device("cuda"), "cuda"), logits, 0.99)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts"), [(0, 9), (1, 9), (2, 9), (64, 9), (65, 9), (70000, 9), (1024, 513), (1500, 3000)]
)
def test_every_batch_size(backend, num_tokens, num_experts):
    expert_ids, _, counts = assert_equal_to_reference(backend, normal(num_tokens, num_experts), 0.7, max_experts=6)
    assert expert_ids.shape == (num_tokens, 6) and counts.shape == (num_tokens,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(backend, dtype):
    base = normal(40, 60).to(dtype).cuda()
    for view in (base.t(), base[::2, ::3], base[3:7, 1:], base[:1].expand(5, 60), base[:, :1].expand(40, 9)):
        assert_same(backend.route(view, 0.6), reference.route(view.cpu(), 0.6))
        assert_same(backend.select(view, 0.6), reference.select(view.cpu(), 0.6))
    threshold = torch.linspace(0.1, 2.0, 80).cuda()[::2]
    assert_same(backend.route(base, threshold), reference.route(base.cpu(), threshold.cpu()))


@pytest.mark.parametrize("num_experts", [64, 1536])
def test_thresholds_at_cumulative_boundaries(backend, num_experts):
    logits = normal(1, num_experts)
    q = reference.mass(logits)[0].sort(descending=True).values
    share = ((q.cumsum(0) - q).double() / q.sum().double()).to(torch.float32)[1:400]
    ends = (torch.nextafter(share, torch.tensor(-INF)), share, torch.nextafter(share, torch.tensor(INF)))
    threshold = torch.cat(ends)
    assert_equal_to_reference(backend, logits.expand(len(threshold), num_experts), threshold)


def test_unchecked_thresholds_on_the_device(backend):
    threshold = torch.tensor([NAN, 0.0, -1.0, -INF, INF], device="cuda")
    assert backend.route(normal(5, 16).cuda(), threshold, min_experts=3)[2].tolist() == [16, 3, 3, 3, 16]
    assert backend.select(normal(5, 16).cuda(), threshold, min_experts=3)[1].tolist() == [16, 3, 3, 3, 16]


@pytest.mark.parametrize("num_experts", [31, 5000])
def test_every_element_is_written(backend, num_experts):
    logits = normal(9, num_experts)
    logits[2, 3] = NAN
    for limits in ({}, {"max_experts": 7}):
        poison()
        assert_equal_to_reference(backend, logits, 0.4, **limits)


@pytest.mark.parametrize("num_experts", [128, 5000])
def test_a_captured_graph_follows_logits_and_threshold(backend, num_experts):
    logits = normal(4, num_experts).cuda()
    threshold = torch.tensor(0.5, device="cuda")
    backend.route(logits, threshold)  # compiles before the capture
    backend.select(logits, threshold)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routed = backend.route(logits, threshold)
        selected = backend.select(logits, threshold)
    seen = set()
    for seed, tau in enumerate((0.1, 0.5, 0.9, 1.0, 0.2)):
        new = torch.randn(4, num_experts, generator=torch.Generator().manual_seed(seed))
        logits.copy_(new)
        threshold.fill_(tau)
        for output in (*routed, selected[1]):
            output.fill_(-99)
        selected[0].logical_not_()
        graph.replay()
        assert_same(routed, reference.route(new, torch.tensor(tau)))
        assert_same(selected, reference.select(new, torch.tensor(tau)))
        seen.add(tuple(routed[2].tolist()))
    assert len(seen) == 5


def test_runs_on_the_current_stream(backend):
    logits = torch.zeros(64, 512, device="cuda")
    backend.route(logits, 0.5)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        logits.copy_(normal(64, 512))
        outputs = backend.route(logits, 0.5)
    stream.synchronize()
    assert_same(outputs, reference.route(normal(64, 512), 0.5))


def test_two_threads_on_two_streams(backend):
    shapes = [(64, 300), (3, 9000)]
    expected = [reference.route(normal(*shape), 0.8) for shape in shapes]
    for shape in shapes:
        backend.route(normal(*shape).cuda(), 0.8)
    failures = []

    def work(shape, right):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                logits = normal(*shape).cuda()
                for _ in range(30):
                    assert_same(backend.route(logits, 0.8), right)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=arguments) for arguments in zip(shapes, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_repeats_bit_for_bit(backend):
    logits = normal(256, 1224).to(torch.bfloat16).cuda()
    first = [output.cpu() for output in backend.route(logits, 0.9)]
    for _ in range(30):
        assert_same(backend.route(logits, 0.9), first)


def test_opcheck():
    logits = normal(3, 17).cuda()
    tau = torch.tensor(0.5, device="cuda")
    for op in (torch.ops.prunepath.route, torch.ops.prunepath.select):
        torch.library.opcheck(op.default, (logits, 0.5), {"max_experts": 5})
        torch.library.opcheck(op.tensor, (logits, tau), {})


def test_compiles_without_a_graph_break():
    compiled = torch.compile(lambda logits, threshold: ops.route(logits * 2, threshold), fullgraph=True)
    logits = normal(3, 17)
    got = compiled(logits.cuda(), torch.tensor(0.5, device="cuda"))
    assert_same(got, reference.route(logits * 2, torch.tensor(0.5)))


@pytest.mark.parametrize("name", ["route", "select"])
def test_a_bad_argument_is_one_sentence(backend, name):
    logits = torch.zeros(2, 4, device="cuda")
    bad = [
        ((logits, 0.0), {}, "threshold .* greater than 0"),
        ((logits, torch.ones(2)), {}, "threshold on the device of logits .* cpu"),
        ((logits, torch.ones(3, device="cuda")), {}, r"threshold .* \[3\]"),
        ((logits.double(), 0.5), {}, "logits .*float64"),
        ((logits, 0.5), {"min_experts": 5}, "min_experts .* got 5"),
        ((torch.zeros(1, 65537, device="cuda"), 0.5), {}, "65536.*65537"),
    ]
    for args, limits, message in bad:
        with pytest.raises(RuntimeError, match=message):
            getattr(backend, name)(*args, **limits)
