"""`route` and `select` choose exactly what the reference does, bit for bit, and the reference is the paper's rule."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunepath import ops
from prunepath.ops import reference

INF, NAN = math.inf, math.nan
EXPERTS = [1, 2, 3, 31, 32, 33, 64, 127, 128, 1000, 1025, 1536, 4096, 14336, 65536]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
THRESHOLDS = [1e-30, 0.1, 0.5, 0.8, 0.95, 1 - 2.0**-24, 1.0, 1.5]


def assert_same_route(logits, threshold, **limits):
    expected = reference.route(logits, threshold, **limits)
    got = ops.route(logits, threshold, **limits)
    for name, a, b in zip(("expert_ids", "probs", "counts"), got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert torch.equal(a, b), name
    mask, counts = ops.select(logits, threshold, **limits)
    assert mask.dtype == torch.bool and counts.dtype == torch.int32
    assert torch.equal(counts, expected[2])
    assert torch.equal(mask, reference._active_mask(expected[0], expected[2], logits.shape[1]))
    return got


def adversarial(num_experts):
    """Rows [R, E] of every pattern that routing has a rule for."""
    E = num_experts
    generator = torch.Generator().manual_seed(E)
    normal = torch.randn(E, generator=generator)
    rows = [
        torch.zeros(E),
        torch.full((E,), -3.0),
        torch.full((E,), INF),
        torch.full((E,), -INF),
        torch.full((E,), NAN),
        torch.full((E,), 3.4e38),
        torch.full((E,), 1e-45),
        normal.round(),  # many ties
        normal * 1e-40,  # subnormal
        normal * 1e38,
        torch.arange(E) * 1.0,
        -torch.arange(E) * 1.0,
        torch.where(torch.arange(E) % 2 == 0, 0.0, -0.0),
    ]
    for special in (INF, -INF, NAN, 1e30, -1e30, 50.0, 20.79, 20.80):
        row = normal.clone()
        row[E // 2] = special
        rows.append(row)
        row = torch.zeros(E)
        row[-1] = special
        rows.append(row)
    mixed = normal.clone()
    mixed[::3], mixed[1::3] = INF, -INF
    rows.append(mixed)
    signs = torch.full((E,), -3.4e38)
    signs[E // 3] = 3.4e38
    rows.append(signs)
    return torch.stack(rows)


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference_on_random_logits(num_experts, dtype):
    generator = torch.Generator().manual_seed(num_experts)
    rows = max(4, 65536 // num_experts)
    for scale in (0.01, 1.0, 8.0, 100.0):
        logits = (torch.randn(rows, num_experts, generator=generator) * scale).to(dtype)
        thresholds = torch.rand(rows, generator=generator).clamp_min(1e-7)
        assert_same_route(logits, thresholds)


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_reference_on_adversarial_logits(num_experts, dtype):
    logits = adversarial(num_experts).to(dtype)
    for threshold in THRESHOLDS if num_experts < 10_000 else (1e-30, 0.8, 1 - 2.0**-24):
        assert_same_route(logits, threshold)
    few = (num_experts + 2) // 3
    assert_same_route(logits, 0.9, min_experts=few, max_experts=few)
    assert_same_route(logits, 1.0, min_experts=1, max_experts=few)
    assert_same_route(logits, 1e-9, min_experts=few)


@pytest.mark.parametrize("num_tokens", range(66))
def test_equals_reference_for_every_batch_size(num_tokens):
    logits = torch.randn(num_tokens, 33, generator=torch.Generator().manual_seed(num_tokens))
    expert_ids, probs, counts = assert_same_route(logits, 0.7)
    assert expert_ids.shape == probs.shape == (num_tokens, 33) and counts.shape == (num_tokens,)


@pytest.mark.parametrize("num_experts", [2, 3, 64, 1025])
def test_thresholds_at_cumulative_boundaries(num_experts):
    """A threshold equal to the mass before an expert leaves it out; the next float up takes it in."""
    generator = torch.Generator().manual_seed(num_experts)
    logits = torch.randn(1, num_experts, generator=generator) * 2
    q = reference.mass(logits)[0].sort(descending=True).values
    share = ((q.cumsum(0) - q).double() / q.sum().double()).to(torch.float32)
    for boundary in share[1:64]:
        for towards in (-INF, None, INF):
            tau = boundary if towards is None else torch.nextafter(boundary, torch.tensor(towards))
            _, _, counts = assert_same_route(logits, tau)
            as_float = assert_same_route(logits, tau.item())
            assert torch.equal(counts, as_float[2])


def test_exact_boundary_excludes_the_expert():
    expert_ids, probs, counts = ops.route(torch.zeros(1, 4), 0.5)
    assert expert_ids.tolist() == [[0, 1, -1, -1]]
    assert probs.tolist() == [[0.25, 0.25, 0.0, 0.0]]
    assert counts.tolist() == [2]
    above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    assert ops.route(torch.zeros(1, 4), above)[2].tolist() == [3]


def test_is_the_smallest_set_that_covers_the_threshold():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, 64, generator=generator, dtype=torch.float64) * 3
    expert_ids, probs, counts = ops.route(logits.float(), 0.8)
    softmax = logits.float().double().softmax(1)
    for t in range(512):
        count = counts[t]
        ids = expert_ids[t, :count].long()
        covered = softmax[t, ids].cumsum(0)
        assert covered[-1] >= 0.8 - 1e-6
        assert count == 1 or covered[-2] < 0.8 + 1e-6
        assert torch.allclose(probs[t, :count].double(), softmax[t, ids], rtol=0, atol=2e-7)
        assert (expert_ids[t, count:] == -1).all() and (probs[t, count:] == 0).all()


def test_mass_is_softmax():
    logits = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 4
    q = reference.mass(logits).double()
    probabilities = q / q.sum(1, keepdim=True)
    assert (probabilities - logits.double().softmax(1)).abs().max() < 2e-7


def test_mass_before_agrees_with_route():
    logits = torch.randn(256, 48, generator=torch.Generator().manual_seed(2)) * 2
    before = reference.mass_before(logits)
    for tau in (0.1, 0.5, 0.9):
        expert_ids, _, counts = ops.route(logits, tau)
        active = torch.zeros(256, 49, dtype=torch.bool)
        active.scatter_(1, expert_ids.long().masked_fill(expert_ids < 0, 48), True)
        tau32 = torch.tensor(tau, dtype=torch.float32).double()
        assert torch.equal(before < tau32, active[:, :48])
        assert torch.equal((before < tau32).sum(1).int(), counts)


@pytest.mark.parametrize("position", [0, 2, 4])
def test_nan_row_fails_open_to_every_expert(position):
    logits = torch.randn(3, 5)
    logits[1, position] = NAN
    expert_ids, probs, counts = assert_same_route(logits, 0.01)
    assert counts[1] == 5 and expert_ids[1].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(probs[1], torch.full((5,), 0.2))
    assert counts[0] == counts[2] == 1
    expert_ids, probs, counts = assert_same_route(logits, 0.01, max_experts=3)
    assert counts[1] == 3 and expert_ids[1].tolist() == [0, 1, 2]
    assert torch.equal(probs[1], torch.full((3,), 0.2))


def test_infinities():
    expert_ids, probs, _ = ops.route(torch.tensor([[1.0, INF, -INF, INF]]), 0.75)
    assert expert_ids.tolist() == [[1, 3, -1, -1]] and probs.tolist() == [[0.5, 0.5, 0, 0]]
    expert_ids, probs, _ = ops.route(torch.full((1, 4), -INF), 0.75)
    assert expert_ids.tolist() == [[0, 1, 2, -1]] and probs.tolist() == [[0.25, 0.25, 0.25, 0]]
    expert_ids, probs, _ = ops.route(torch.tensor([[-INF, 0.0]]), 1.0)
    assert expert_ids.tolist() == [[1, 0]] and probs.tolist() == [[1, 0]]


def test_threshold_of_one_or_more_takes_experts_without_mass():
    logits = torch.tensor([[100.0, 0.0, -INF]])
    assert ops.route(logits, 1.0)[2].tolist() == [3]
    assert ops.route(logits, torch.tensor(7.0))[2].tolist() == [3]
    assert ops.route(logits, 1 - 2.0**-24)[2].tolist() == [1]
    # Rounds to 1 in float32, so it is 1.
    assert ops.route(logits, 1 - 2.0**-26)[2].tolist() == [3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_logits(dtype):
    base = torch.randn(40, 60, generator=torch.Generator().manual_seed(3)).to(dtype)
    for view in (base.t(), base[::2, ::3], base[3:7, 1:], base[:1].expand(5, 60), base[:, :1].expand(40, 9)):
        got = assert_same_route(view, 0.6)
        for a, b in zip(got, ops.route(view.contiguous(), 0.6), strict=True):
            assert torch.equal(a, b)
    thresholds = torch.rand(80)[::2].clamp_min(0.01)
    assert_same_route(base, thresholds)
    assert_same_route(base, torch.tensor([0.6]).expand(40))


@pytest.mark.parametrize("max_experts", [0, 7])
def test_every_element_of_the_outputs_is_written(poison, max_experts):
    logits = torch.randn(9, 31, generator=torch.Generator().manual_seed(4))
    logits[2, 3] = NAN
    columns = max_experts or 31
    for threshold in (0.4, torch.tensor(0.4)):
        outputs = [
            ((9, columns), torch.int32),
            ((9, columns), torch.float32),
            ((9,), torch.int32),
            ((9, 31), torch.int8),
        ]
        poison(*outputs)
        assert_same_route(logits, threshold, max_experts=max_experts)


@pytest.mark.parametrize("num_experts", [40, 5000, 65536])
def test_equal_logits_are_taken_by_index(num_experts):
    """However many tie at the cutoff, and wherever they are."""
    logits = torch.zeros(3, num_experts)
    logits[1, 1::2] = 1e-30
    logits[2, num_experts // 2 :] = -0.0
    for threshold in (1 / num_experts, 0.37, 0.5, 0.999):
        assert_same_route(logits, threshold)
    mask, counts = ops.select(logits[:1], 0.25)
    assert counts.tolist() == [num_experts // 4] and mask[0, : num_experts // 4].all()


def test_logits_that_differ_in_their_last_bits_are_told_apart():
    base = torch.full((4096,), 3.0).view(torch.int32)
    order = torch.randperm(4096, generator=torch.Generator().manual_seed(6)).int()
    assert_same_route(torch.stack([base + order, base + order // 7, base - order]).view(torch.float32), 0.4)


def test_repeats_bit_for_bit():
    logits = torch.randn(64, 224, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    first = ops.route(logits, 0.9)
    for _ in range(20):
        for a, b in zip(ops.route(logits, 0.9), first, strict=True):
            assert torch.equal(a, b)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(0, 5),
    num_experts=st.integers(1, 40),
    tau=st.floats(2.0**-100, 2.0, width=32),
)
def test_equals_reference_on_any_floats(data, rows, num_experts, tau):
    values = st.one_of(
        st.floats(width=32),
        st.sampled_from([0.0, -0.0, 1.0, 1.5, INF, -INF, NAN]),
        st.floats(-4, 4, width=32),
    )
    flat = data.draw(st.lists(values, min_size=rows * num_experts, max_size=rows * num_experts))
    logits = torch.tensor(flat, dtype=torch.float32).reshape(rows, num_experts)
    low = data.draw(st.integers(1, num_experts))
    high = data.draw(st.one_of(st.just(0), st.integers(low, num_experts)))
    assert_same_route(logits, tau, min_experts=low, max_experts=high)


LOGITS = torch.zeros(2, 4)
BAD = [
    ((LOGITS, 0.0), {}, "threshold .* greater than 0.* got 0"),
    ((LOGITS, -1.0), {}, "threshold .* got -1"),
    ((LOGITS, NAN), {}, "threshold .* got nan"),
    ((LOGITS, INF), {}, "threshold .* got inf"),
    ((LOGITS, 1e-60), {}, "threshold .* in float32, got 0"),
    ((LOGITS, torch.tensor(NAN)), {}, "threshold .* got nan"),
    ((LOGITS, torch.tensor([0.5, 0.0])), {}, "threshold .* got 0"),
    ((LOGITS, torch.tensor([0.5] * 3)), {}, r"threshold of shape \[\] or \[T\] = \[2\], got \[3\]"),
    ((LOGITS, torch.tensor(0.5).double()), {}, "threshold of dtype float32, got float64"),
    ((LOGITS, 0.5), {"min_experts": 0}, "min_experts from 1 .* got 0"),
    ((LOGITS, 0.5), {"min_experts": 5}, "min_experts from 1 .* 4, got 5"),
    ((LOGITS, 0.5), {"max_experts": 5}, "max_experts .* got 5"),
    ((LOGITS, 0.5), {"max_experts": -1}, "max_experts .* got -1"),
    ((LOGITS, 0.5), {"min_experts": 3, "max_experts": 2}, "max_experts .* 3, .* got 2"),
    ((LOGITS[0], 0.5), {}, r"logits of shape \[T, E\].* got \[4\]"),
    ((LOGITS[:, :0], 0.5), {}, "from 1 to 65536 experts, got 0"),
    ((LOGITS[:, :1].expand(2, 65537), 0.5), {}, "from 1 to 65536 experts, got 65537"),
    ((LOGITS.double(), 0.5), {}, "logits of dtype .* got float64"),
]


@pytest.mark.parametrize("op", ["route", "select"])
@pytest.mark.parametrize("args, options, message", BAD)
def test_bad_arguments_are_named(op, args, options, message):
    with pytest.raises(RuntimeError, match=f"prunepath::{op}: expected {message}"):
        getattr(ops, op)(*args, **options)


@pytest.mark.parametrize("op", ["route", "select"])
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_opcheck(op, num_tokens):
    logits = torch.randn(num_tokens, 12)
    packet = getattr(torch.ops.prunepath, op)
    for threshold in (torch.tensor(0.5), torch.full((num_tokens,), 0.5)):
        torch.library.opcheck(packet.tensor, (logits, threshold), {"max_experts": 5})
    torch.library.opcheck(packet.default, (logits, 0.5), {"min_experts": 2})
    torch.library.opcheck(packet.default, (logits.clone().requires_grad_(), 0.5))


def test_outputs_carry_no_gradient():
    _, probs, _ = ops.route(torch.randn(2, 4, requires_grad=True), 0.5)
    assert not probs.requires_grad


def test_compiles_whole_and_a_new_threshold_does_not_recompile():
    compiles = []

    def counting_backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=counting_backend)
    def f(logits, threshold):
        expert_ids, probs, counts = ops.route(logits * 2, threshold)
        return expert_ids + 1, probs.sum(1), counts

    logits = torch.randn(4, 16)
    for tau in (0.2, 0.9, 1.0):
        got = f(logits, torch.tensor(tau))
        expected = reference.route(logits * 2, tau)
        assert torch.equal(got[0], expected[0] + 1) and torch.equal(got[2], expected[2])
    assert len(compiles) == 1


def test_compiles_with_inductor():
    @torch.compile(fullgraph=True)
    def f(logits, threshold):
        return ops.route(logits + 1, threshold)

    logits = torch.randn(3, 8)
    for a, b in zip(f(logits, torch.tensor(0.5)), ops.route(logits + 1, 0.5), strict=True):
        assert torch.equal(a, b)
