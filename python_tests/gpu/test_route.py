"""`route` on a GPU, in CUDA and in Triton, selects what the reference selects on the CPU, bit for bit."""

import math

import pytest
import torch

from prunepath import native, ops
from prunepath.ops import reference

pytestmark = pytest.mark.gpu

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("expert_ids", "probs", "counts")


@pytest.fixture(params=["cuda", "triton"])
def route(request):
    if request.param == "cuda":
        assert native.cuda_error() is None, native.cuda_error()
        return ops.route
    pytest.importorskip("triton", reason="needs the package triton")
    from prunepath.triton_kernels.route import route

    return route


def on_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def assert_same(got, expected):
    for name, a, b in zip(NAMES, got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert torch.equal(a.cpu(), b), name


def assert_equal_to_reference(route, logits, threshold, **limits):
    got = route(on_gpu(logits), on_gpu(threshold), **limits)
    assert_same(got, reference.route(logits, threshold, **limits))
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
@pytest.mark.parametrize("num_experts", [1, 2, 3, 31, 33, 64, 128, 224, 1000, 1024, 1025, 4096])
def test_equals_reference(route, num_experts, dtype):
    for scale in (0.01, 1.0, 8.0, 100.0):
        logits = normal(max(8, 65536 // num_experts), num_experts, scale).to(dtype)
        threshold = torch.rand(len(logits), generator=torch.Generator().manual_seed(1)).clamp_min(1e-7)
        assert_equal_to_reference(route, logits, threshold)
    few = (num_experts + 2) // 3
    for threshold in (1e-30, 0.1, 0.8, 1 - 2.0**-24, 1.0, 1.5):
        assert_equal_to_reference(route, patterns(num_experts).to(dtype), threshold)
        assert_equal_to_reference(route, patterns(num_experts).to(dtype), threshold, min_experts=few, max_experts=few)


@pytest.mark.parametrize("num_experts", [4097, 10000, 65536])
def test_cuda_takes_any_number_of_experts(num_experts):
    logits = torch.cat([patterns(num_experts), normal(300, num_experts, 1.0)])
    for threshold in (0.3, 0.999, 1.0):
        assert_equal_to_reference(ops.route, logits, threshold)


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 64, 65, 70000])
def test_every_batch_size(route, num_tokens):
    expert_ids, _, counts = assert_equal_to_reference(route, normal(num_tokens, 9), 0.7, max_experts=6)
    assert expert_ids.shape == (num_tokens, 6) and counts.shape == (num_tokens,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(route, dtype):
    base = normal(40, 60).to(dtype).cuda()
    for view in (base.t(), base[::2, ::3], base[3:7, 1:], base[:1].expand(5, 60), base[:, :1].expand(40, 9)):
        assert_same(route(view, 0.6), reference.route(view.cpu(), 0.6))
    threshold = torch.linspace(0.1, 2.0, 80).cuda()[::2]
    assert_same(route(base, threshold), reference.route(base.cpu(), threshold.cpu()))


def test_thresholds_at_cumulative_boundaries(route):
    logits = normal(1, 64)
    q = reference.mass(logits)[0].sort(descending=True).values
    share = ((q.cumsum(0) - q).double() / q.sum().double()).to(torch.float32)[1:]
    ends = (torch.nextafter(share, torch.tensor(-INF)), share, torch.nextafter(share, torch.tensor(INF)))
    threshold = torch.cat(ends)
    assert_equal_to_reference(route, logits.expand(len(threshold), 64), threshold)


def test_unchecked_thresholds_on_the_device(route):
    threshold = torch.tensor([NAN, 0.0, -1.0, -INF, INF], device="cuda")
    counts = route(normal(5, 16).cuda(), threshold, min_experts=3)[2]
    assert counts.tolist() == [16, 3, 3, 3, 16]


def test_out_overloads_write_every_element():
    logits = normal(9, 31).cuda()
    logits[2, 3] = NAN
    for limits in ({}, {"max_experts": 7}):
        expected = reference.route(logits.cpu(), 0.4, **limits)
        columns = limits.get("max_experts", 31)
        for overload, threshold in (("out", 0.4), ("tensor_out", torch.tensor(0.4, device="cuda"))):
            outputs = {
                "expert_ids": torch.full((9, columns), -77, dtype=torch.int32, device="cuda"),
                "probs": torch.full((9, columns), NAN, device="cuda"),
                "counts": torch.full((9,), -77, dtype=torch.int32, device="cuda"),
            }
            getattr(torch.ops.prunepath.route, overload)(logits, threshold, **limits, **outputs)
            assert_same(outputs.values(), expected)


@pytest.mark.parametrize("num_experts", [128, 5000])
def test_a_captured_graph_follows_logits_and_threshold(route, num_experts):
    if num_experts > 4096 and route is not ops.route:
        pytest.skip("Triton takes at most 4096 experts")
    logits = normal(4, num_experts).cuda()
    threshold = torch.tensor(0.5, device="cuda")
    route(logits, threshold)  # compiles before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = route(logits, threshold)
    seen = set()
    for seed, tau in enumerate((0.1, 0.5, 0.9, 1.0, 0.2)):
        new = torch.randn(4, num_experts, generator=torch.Generator().manual_seed(seed))
        logits.copy_(new)
        threshold.fill_(tau)
        for output in outputs:
            output.fill_(-99)
        graph.replay()
        assert_same(outputs, reference.route(new, torch.tensor(tau)))
        seen.add(tuple(outputs[2].tolist()))
    assert len(seen) == 5


def test_runs_on_the_current_stream(route):
    logits = torch.zeros(64, 512, device="cuda")
    route(logits, 0.5)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        logits.copy_(normal(64, 512))
        outputs = route(logits, 0.5)
    stream.synchronize()
    assert_same(outputs, reference.route(normal(64, 512), 0.5))


def test_repeats_bit_for_bit(route):
    logits = normal(256, 224).to(torch.bfloat16).cuda()
    first = [output.cpu() for output in route(logits, 0.9)]
    for _ in range(50):
        assert_same(route(logits, 0.9), first)


def test_opcheck():
    logits = normal(3, 17).cuda()
    torch.library.opcheck(torch.ops.prunepath.route.default, (logits, 0.5), {"max_experts": 5})
    torch.library.opcheck(torch.ops.prunepath.route.tensor, (logits, torch.tensor(0.5, device="cuda")), {})


def test_compiles_without_a_graph_break():
    compiled = torch.compile(lambda logits, threshold: ops.route(logits * 2, threshold), fullgraph=True)
    logits = normal(3, 17)
    got = compiled(logits.cuda(), torch.tensor(0.5, device="cuda"))
    assert_same(got, reference.route(logits * 2, torch.tensor(0.5)))


def test_a_bad_argument_is_one_sentence(route):
    logits = torch.zeros(2, 4, device="cuda")
    bad = [
        ((logits, 0.0), {}, "threshold .* greater than 0"),
        ((logits, torch.ones(2)), {}, "threshold on the device of logits .* cpu"),
        ((logits, torch.ones(3, device="cuda")), {}, r"threshold .* \[3\]"),
        ((logits.double(), 0.5), {}, "logits .*float64"),
        ((logits, 0.5), {"min_experts": 5}, "min_experts .* got 5"),
    ]
    for args, limits, message in bad:
        with pytest.raises(RuntimeError, match=message):
            route(*args, **limits)
