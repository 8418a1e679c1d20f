"""The Triton `route`, run by Triton's interpreter, selects what the reference selects, bit for bit."""

import math

import pytest
import torch

from prunepath.ops import reference

pytest.importorskip("triton", reason="needs the package triton")

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def patterns(num_experts):
    """Rows [R, E] of every pattern that routing has a rule for."""
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
    rows.append(mixed)
    return torch.stack(rows)


def normal(num_tokens, num_experts, scale=2.0):
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(num_experts)) * scale


def assert_equal_to_reference(interpret_route, calls):
    results = interpret_route(calls)
    assert len(results) == len(calls)
    for (args, limits), got in zip(calls, results, strict=True):
        expected = reference.route(*args, **limits)
        for name, a, b in zip(("expert_ids", "probs", "counts"), got, expected, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape, name
            assert torch.equal(a, b), (name, args, limits)
    return results


@pytest.mark.parametrize("num_experts", [1, 5, 16])
def test_equals_reference_on_every_pattern(interpret_route, num_experts):
    logits = patterns(num_experts)
    thresholds = torch.tensor([1e-30, 0.5, 0.95, 1 - 2.0**-24, 1.0, 1.5])
    tau = thresholds[torch.arange(len(logits)) % len(thresholds)]
    assert_equal_to_reference(interpret_route, [((logits, tau), {})])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference_in_every_dtype(interpret_route, dtype):
    assert_equal_to_reference(interpret_route, [((patterns(7).to(dtype), 0.8), {})])


@pytest.mark.parametrize(("num_experts", "num_tokens"), [(64, 3), (100, 2), (300, 1)])
def test_equals_reference_on_many_experts(interpret_route, num_experts, num_tokens):
    tau = torch.rand(num_tokens, generator=torch.Generator().manual_seed(num_experts))
    assert_equal_to_reference(interpret_route, [((normal(num_tokens, num_experts), tau), {})])


def test_limits_bound_the_counts(interpret_route):
    logits = normal(3, 12)
    logits[1, 4] = NAN
    limits = [
        {"min_experts": 4},
        {"max_experts": 3},
        {"min_experts": 5, "max_experts": 5},
        {"min_experts": 12},
        {"max_experts": 1},
    ]
    calls = [((logits, tau), limit) for limit in limits for tau in (1e-6, 0.9, 1.0)]
    results = assert_equal_to_reference(interpret_route, calls)
    assert results[0][2].tolist() == [4, 12, 4]


def test_thresholds_at_cumulative_boundaries(interpret_route):
    """A threshold equal to the mass before an expert leaves it out; the next float up takes it in."""
    logits = normal(1, 12)
    q = reference.mass(logits)[0].sort(descending=True).values
    share = ((q.cumsum(0) - q).double() / q.sum().double()).to(torch.float32)[1:]
    ends = (torch.nextafter(share, torch.tensor(-INF)), share, torch.nextafter(share, torch.tensor(INF)))
    tau = torch.cat(ends)
    calls = [((logits.expand(len(tau), 12), tau), {})]
    # A float threshold is rounded to float32 first: 0.5 + 2^-30 is 0.5, which two of four experts reach.
    calls += [((torch.zeros(1, 4), value), {}) for value in (0.5, 0.5 + 2.0**-30, 0.5 + 2.0**-20, 1 - 2.0**-26)]
    results = assert_equal_to_reference(interpret_route, calls)
    assert [result[2].item() for result in results[1:]] == [2, 2, 3, 4]


def test_any_strides_and_no_tokens(interpret_route):
    base = normal(6, 12)
    views = [base.t(), base[::2, ::3], base[3:5, 1:], base[:1].expand(3, 12), base[:, :1].expand(6, 9), base[:0]]
    calls = [((view, 0.6), {}) for view in views]
    calls.append(((base, torch.linspace(0.1, 2.0, 12)[::2]), {}))
    calls.append(((base, torch.tensor([0.6]).expand(6)), {}))
    calls.append(((base[:0], torch.empty(0)), {"max_experts": 5}))
    assert_equal_to_reference(interpret_route, calls)


BAD = [
    ((torch.zeros(2, 4), 0.0), {}, "threshold .* greater than 0 .* got 0"),
    ((torch.zeros(2, 4), NAN), {}, "threshold .* finite .* got nan"),
    ((torch.zeros(2, 4), 1e-50), {}, "threshold .* greater than 0 in float32"),
    ((torch.zeros(2, 4), torch.tensor([0.5, NAN])), {}, "threshold .* finite"),
    ((torch.zeros(2, 4), torch.ones(3)), {}, r"threshold .* \[T\] = \[2\], got .* \[3\]"),
    ((torch.zeros(2, 4), torch.ones(2).double()), {}, "threshold float32 .* got torch.float64"),
    ((torch.zeros(4), 0.5), {}, r"logits of shape \[T, E\] .* got \[4\]"),
    ((torch.zeros(2, 0), 0.5), {}, r"E from 1 to 4096 .* got \[2, 0\]"),
    ((torch.zeros(1, 4097), 0.5), {}, r"E from 1 to 4096 .* got \[1, 4097\]"),
    ((torch.zeros(2, 4).double(), 0.5), {}, "logits .* got torch.float64"),
    ((torch.zeros(2, 4), 0.5), {"min_experts": 0}, "min_experts from 1 .* 4, got 0"),
    ((torch.zeros(2, 4), 0.5), {"min_experts": 5}, "min_experts from 1 .* 4, got 5"),
    ((torch.zeros(2, 4), 0.5), {"min_experts": 3, "max_experts": 2}, "max_experts .* 3, .* 4, got 2"),
    ((torch.zeros(2, 4), 0.5), {"max_experts": 5}, "max_experts .* 4, got 5"),
]


@pytest.mark.parametrize(("args", "limits", "message"), BAD)
def test_a_bad_argument_is_one_sentence(args, limits, message):
    from prunepath.triton_kernels.route import route

    with pytest.raises(RuntimeError, match=message) as raised:
        route(*args, **limits)
    assert "\n" not in str(raised.value)
