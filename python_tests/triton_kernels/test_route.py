"""The Triton `route` and `select`, run by Triton's interpreter, select what the reference selects, bit for bit."""

import math

import pytest
import torch

from prunepath.ops import reference

pytest.importorskip("triton", reason="needs the package triton")

INF, NAN = math.inf, math.nan


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


def assert_equal_to_reference(interpret, calls):
    """Of every call of `route`, and of the same call of `select`."""
    results = interpret([(name, *call) for call in calls for name in ("route", "select")])
    for (args, limits), routed, selected in zip(calls, results[::2], results[1::2], strict=True):
        expected = (*reference.route(*args, **limits), *reference.select(*args, **limits))
        names = ("expert_ids", "probs", "counts", "mask", "counts")
        for name, a, b in zip(names, (*routed, *selected), expected, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape, name
            assert torch.equal(a, b), (name, args, limits)
    return results[::2]


def test_equals_reference_on_every_pattern(interpret):
    thresholds = torch.tensor([1e-30, 0.5, 0.95, 1 - 2.0**-24, 1.0, 1.5])
    calls = []
    for num_experts in (1, 5, 16):
        logits = patterns(num_experts)
        calls.append(((logits, thresholds[torch.arange(len(logits)) % len(thresholds)]), {}))
    assert_equal_to_reference(interpret, calls)


def test_equals_reference_in_half_precision(interpret):
    calls = [((patterns(7).to(dtype)[::2], 0.8), {}) for dtype in (torch.bfloat16, torch.float16)]
    assert_equal_to_reference(interpret, calls)


def test_equals_reference_on_many_experts(interpret):
    calls = []
    for num_experts, num_tokens in ((64, 3), (100, 2), (4096, 1)):
        tau = torch.rand(num_tokens, generator=torch.Generator().manual_seed(num_experts))
        calls.append(((normal(num_tokens, num_experts), tau), {}))
    assert_equal_to_reference(interpret, calls)


def test_selects_among_65536_experts_with_ties(interpret):
    """More than a program holds in registers; the second row's cutoff is among equal logits."""
    logits = normal(2, 65536)
    logits[1] = logits[1].round()
    mask, counts = interpret([("select", (logits, 0.7), {})])[0]
    expected_mask, expected_counts = reference.select(logits, 0.7)
    assert torch.equal(mask, expected_mask) and torch.equal(counts, expected_counts)
    inactive = logits[1][~mask[1]].max()
    assert inactive == logits[1][mask[1]].min()


def test_limits_bound_the_counts(interpret):
    logits = normal(2, 12)
    logits[1, 4] = NAN
    limits = [{"min_experts": 4}, {"max_experts": 3}, {"min_experts": 5, "max_experts": 5}, {"max_experts": 1}]
    calls = [((logits, tau), limit) for limit in limits for tau in (1e-6, 0.9, 1.0)]
    calls.append(((torch.zeros(1, 12), 0.5), {"max_experts": 2}))
    results = assert_equal_to_reference(interpret, calls)
    assert results[0][2].tolist() == [4, 12]
    assert results[-1][0].tolist() == [[0, 1]]


def test_thresholds_at_cumulative_boundaries(interpret):
    """A threshold equal to the mass before an expert leaves it out; the next float up takes it in."""
    logits = normal(1, 9)
    q = reference.mass(logits)[0].sort(descending=True).values
    share = ((q.cumsum(0) - q).double() / q.sum().double()).to(torch.float32)[1:]
    ends = (torch.nextafter(share, torch.tensor(-INF)), share, torch.nextafter(share, torch.tensor(INF)))
    tau = torch.cat(ends)
    calls = [((logits.expand(len(tau), 9), tau), {})]
    # A float threshold is rounded to float32 first: 0.5 + 2^-30 is 0.5, which two of four experts reach.
    calls += [((torch.zeros(1, 4), value), {}) for value in (0.5, 0.5 + 2.0**-30, 0.5 + 2.0**-20, 1 - 2.0**-26)]
    results = assert_equal_to_reference(interpret, calls)
    assert [result[2].item() for result in results[1:]] == [2, 2, 3, 4]


def test_any_strides_and_no_tokens(interpret):
    base = normal(6, 12)
    views = [base.t(), base[::2, ::3], base[3:5, 1:], base[:1].expand(3, 12), base[:, :1].expand(6, 9), base[:0]]
    calls = [((view[:3], 0.6), {}) for view in views]
    calls.append(((base, torch.linspace(0.1, 2.0, 12)[::2]), {}))
    calls.append(((base, torch.tensor([0.6]).expand(6)), {}))
    calls.append(((base[:0], torch.empty(0)), {"max_experts": 5}))
    assert_equal_to_reference(interpret, calls)


BAD = [
    ((torch.zeros(2, 4), 0.0), {}, "threshold .* greater than 0 .* got 0"),
    ((torch.zeros(2, 4), NAN), {}, "threshold .* finite .* got nan"),
    ((torch.zeros(2, 4), 1e-50), {}, "threshold .* greater than 0 in float32"),
    ((torch.zeros(2, 4), torch.tensor([0.5, NAN])), {}, "threshold .* finite"),
    ((torch.zeros(2, 4), torch.ones(3)), {}, r"threshold .* \[T\] = \[2\], got \[3\]"),
    ((torch.zeros(2, 4), torch.ones(2).double()), {}, "threshold of dtype float32, got float64"),
    ((torch.zeros(4), 0.5), {}, r"logits of shape \[T, E\] .* got \[4\]"),
    ((torch.zeros(2, 0), 0.5), {}, r"E from 1 to 65536, got \[2, 0\]"),
    ((torch.zeros(1, 65537), 0.5), {}, r"E from 1 to 65536, got \[1, 65537\]"),
    ((torch.zeros(2, 4).double(), 0.5), {}, "logits .* got float64"),
    ((torch.zeros(2, 4), 0.5), {"min_experts": 0}, "min_experts from 1 .* 4, got 0"),
    ((torch.zeros(2, 4), 0.5), {"min_experts": 5}, "min_experts from 1 .* 4, got 5"),
    ((torch.zeros(2, 4), 0.5), {"min_experts": 3, "max_experts": 2}, "max_experts .* 3, .* 4, got 2"),
    ((torch.zeros(2, 4), 0.5), {"max_experts": 5}, "max_experts .* 4, got 5"),
]


@pytest.mark.parametrize(("args", "limits", "message"), BAD)
def test_a_bad_argument_is_one_sentence(args, limits, message):
    from prunepath.triton_kernels.route import route, select

    for function in (route, select):
        with pytest.raises(RuntimeError, match=message) as raised:
            function(*args, **limits)
        assert "\n" not in str(raised.value)
