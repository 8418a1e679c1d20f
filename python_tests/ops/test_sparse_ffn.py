"""`sparse_ffn` on the CPU against a float64 reference of the same selection."""

import math
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunepath import ops
from prunepath.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OP = torch.ops.prunepath.sparse_ffn.default


def run_reference(ffn, ids, counts, activation):
    return ffn.wide().sparse(reference.sparse_ffn, ids, counts, activation)


def magnitudes(ffn):
    """What the terms of all experts' outputs add up to without their signs, pre-activations in activations' place."""
    wide = ffn.wide()

    def product(weight, name):
        return wide.x.abs() @ weight.abs().t() + wide.biases.get(name, weight.new_zeros(())).abs()

    hidden = product(wide.up, "up_bias")
    if wide.gate is not None:
        hidden = hidden * product(wide.gate, "gate_bias")
    return hidden @ wide.down_t.abs() + wide.biases.get("down_bias", hidden.new_zeros(())).abs()


def naive(ffn, ids, counts, activation):
    """One token, expert and neuron at a time."""
    wide = ffn.wide()
    act = reference.ACTIVATIONS[activation]
    width = len(wide.up) // wide.num_experts
    y = torch.zeros_like(wide.x)

    def bias(name, neuron):
        return wide.biases[name][neuron] if name in wide.biases else 0.0

    for t, x in enumerate(wide.x):
        y[t] += wide.biases.get("down_bias", 0.0)
        for e in ids[t, : counts[t]].tolist():
            for j in range(e * width, (e + 1) * width):
                up = wide.up[j] @ x + bias("up_bias", j)
                h = act(up) if wide.gate is None else act(wide.gate[j] @ x + bias("gate_bias", j)) * up
                y[t] += h * wide.down_t[j]
    return y


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_reference_is_the_formula(make_ffn, make_selection, activation, gated, biases):
    ffn = make_ffn(3, 4, 3, 5, gated=gated, biases=biases)
    ids, counts = make_selection(3, 4)
    torch.testing.assert_close(run_reference(ffn, ids, counts, activation), naive(ffn, ids, counts, activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_every_activation(make_ffn, make_selection, assert_close_to, dtype, gated, activation):
    ffn = make_ffn(9, 7, 5, 37, gated=gated, dtype=dtype, bias_dtype=dtype)
    ids, counts = make_selection(9, 7)
    y = ffn.sparse(ops.sparse_ffn, ids, counts, activation)
    assert y.dtype == dtype
    assert_close_to(y, run_reference(ffn, ids, counts, activation))


@pytest.mark.parametrize("num_tokens", [*range(10), 31, 32, 33, 63, 64, 65, 128, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_batch_size(make_ffn, make_selection, assert_close_to, num_tokens, dtype):
    ffn = make_ffn(num_tokens, 6, 11, 24, dtype=dtype, seed=num_tokens)
    ids, counts = make_selection(num_tokens, 6, 4, seed=num_tokens)
    y = ffn.sparse(ops.sparse_ffn, ids, counts)
    assert_close_to(y, run_reference(ffn, ids, counts, "silu"))


@pytest.mark.parametrize("num_tokens", [1, 3, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_enough_for_several_threads(make_ffn, make_selection, assert_close_to, num_tokens, dtype):
    ffn = make_ffn(num_tokens, 16, 72, 260, dtype=dtype)
    ids, counts = make_selection(num_tokens, 16)
    counts.fill_(16)
    ids = torch.stack([torch.randperm(16) for _ in range(num_tokens)]).int()
    y = ffn.sparse(ops.sparse_ffn, ids, counts, "gelu")
    assert_close_to(y, run_reference(ffn, ids, counts, "gelu"))


def test_many_neurons_stay_within_float32_rounding(make_ffn, assert_close_to):
    """The order of summation keeps the error of a wide FFN from growing with its width."""
    ffn = make_ffn(1, 32, 512, 16, gated=False)
    ids, counts = torch.arange(32, dtype=torch.int32)[None], torch.tensor([32], dtype=torch.int32)
    y = ffn.sparse(ops.sparse_ffn, ids, counts, "relu")
    assert_close_to(y, run_reference(ffn, ids, counts, "relu"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_tokens=st.integers(0, 6),
    num_experts=st.integers(1, 9),
    width=st.integers(1, 9),
    hidden_size=st.integers(1, 70),
    gated=st.booleans(),
    biases=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    make_ffn,
    make_selection,
    assert_close_to,
    num_tokens,
    num_experts,
    width,
    hidden_size,
    gated,
    biases,
    dtype,
    seed,
):
    ffn = make_ffn(
        num_tokens,
        num_experts,
        width,
        hidden_size,
        gated=gated,
        dtype=dtype,
        biases=biases,
        seed=seed,
    )
    ids, counts = make_selection(num_tokens, num_experts, seed=seed)
    y = ffn.sparse(ops.sparse_ffn, ids, counts, "gelu_tanh")
    expected = run_reference(ffn, ids, counts, "gelu_tanh")
    # What cancels, in the sum or in an activation's tail, has no relative accuracy; measure against the terms then.
    scale = expected.norm() + 1e-2 * magnitudes(ffn).norm()
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    assert (y.double() - expected).norm() <= tolerance * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 16, 112])
@pytest.mark.parametrize("gated", [False, True])
def test_every_width(make_ffn, make_selection, assert_close_to, dtype, width, gated):
    for num_tokens, hidden_size in ((1, 576), (1, 333), (5, 200), (40, 64)):
        num_experts = 600 // width
        ffn = make_ffn(num_tokens, num_experts, width, hidden_size, gated=gated, dtype=dtype, seed=width)
        ids, counts = make_selection(num_tokens, num_experts, seed=num_tokens)
        counts.clamp_(min=1)
        ids[:, 0].clamp_(min=0)
        assert_close_to(ffn.sparse(ops.sparse_ffn, ids, counts), run_reference(ffn, ids, counts, "silu"))


def test_no_active_expert_gives_the_bias(make_ffn):
    ffn = make_ffn(2)
    ids, counts = torch.full((2, 3), -1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    y = ffn.sparse(ops.sparse_ffn, ids, counts)
    assert torch.equal(y, ffn.biases["down_bias"].expand(2, -1))
    ffn.biases.clear()
    assert torch.equal(ffn.sparse(ops.sparse_ffn, ids[:, :0], counts), torch.zeros_like(y))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_skipped_experts_are_never_read(make_ffn, dtype, num_tokens):
    ffn = make_ffn(num_tokens, 6, dtype=dtype)
    ids = torch.tensor([[4, 1]] * num_tokens, dtype=torch.int32)
    counts = torch.full((num_tokens,), 2, dtype=torch.int32)
    clean = ffn.sparse(ops.sparse_ffn, ids, counts)
    for tensor in (*ffn.tables, ffn.biases["gate_bias"], ffn.biases["up_bias"]):
        tensor.view(6, 6, -1)[[0, 2, 3, 5]] = math.nan
    assert torch.equal(ffn.sparse(ops.sparse_ffn, ids, counts), clean)


def test_a_token_does_not_see_the_other_tokens_experts(make_ffn):
    """Batched tokens share the reading of weights, and nothing else."""
    ffn = make_ffn(3, 4)
    ids = torch.tensor([[0, 1], [2, -1], [3, 0]], dtype=torch.int32)
    counts = torch.tensor([2, 1, 2], dtype=torch.int32)
    clean = ffn.sparse(ops.sparse_ffn, ids, counts)
    for table in ffn.tables:
        table.view(4, 6, -1)[2] = math.nan
    y = ffn.sparse(ops.sparse_ffn, ids, counts)
    assert y[1].isnan().all() and torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_pass_through(make_ffn, dtype):
    ffn = make_ffn(4, 2, dtype=dtype, biases=False)
    ffn.x[1, 3] = math.nan
    ffn.down_t[0, 5] = math.inf
    ids, counts = torch.tensor([[0, 1]] * 4, dtype=torch.int32), torch.full((4,), 2, dtype=torch.int32)
    y = ffn.sparse(ops.sparse_ffn, ids, counts, "relu2")
    assert y[1].isnan().all()
    assert not y[[0, 2, 3], 5].isfinite().any()
    rest = torch.arange(40) != 5
    assert y[[0, 2, 3]][:, rest].isfinite().all()


def test_the_order_of_the_experts_does_not_matter(make_ffn):
    ffn = make_ffn(2, 6)
    ids, counts = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32), torch.tensor([3, 3], dtype=torch.int32)
    assert torch.equal(ffn.sparse(ops.sparse_ffn, ids, counts), ffn.sparse(ops.sparse_ffn, ids.flip(1), counts))


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_non_contiguous_x(make_ffn, make_selection, num_tokens):
    ffn = make_ffn(num_tokens)
    ids, counts = make_selection(num_tokens, 5)
    y = ffn.sparse(ops.sparse_ffn, ids, counts)
    every_second = torch.stack([ffn.x, ffn.x], 2).flatten(1)[:, ::2]
    for x in (ffn.x.t().contiguous().t(), torch.cat([ffn.x, ffn.x], 1)[:, :40], every_second):
        assert torch.equal(ffn.sparse(ops.sparse_ffn, ids, counts, x=x), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "width"), [(5, 6), (1, 7), (7, 1)])
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_tables_may_be_views_with_any_distance_between_rows(
    make_ffn, make_selection, dtype, num_experts, width, num_tokens
):
    ffn = make_ffn(num_tokens, num_experts, width, dtype=dtype)
    ids, counts = make_selection(num_tokens, num_experts)
    y = ffn.sparse(ops.sparse_ffn, ids, counts)
    halves = torch.cat([ffn.gate, ffn.up]).chunk(2)
    interleaved = torch.stack([ffn.gate, ffn.up], 1).unbind(1)
    poisoned = torch.cat([ffn.down_t, torch.full_like(ffn.down_t, math.nan)], 1)[:, :40]
    for (gate, up), down_t in ((halves, ffn.down_t), (interleaved, poisoned)):
        assert torch.equal(ffn.sparse(ops.sparse_ffn, ids, counts, gate=gate, up=up, down_t=down_t), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 70])
def test_writes_every_element_and_repeats(make_ffn, make_selection, poison, dtype, num_tokens):
    ffn = make_ffn(num_tokens, 16, 72, 130, dtype=dtype)
    ids, counts = make_selection(num_tokens, 16)
    expected = ffn.sparse(ops.sparse_ffn, ids, counts)
    assert expected.isfinite().all()
    for _ in range(5):
        poison(((num_tokens, 130), dtype))
        assert torch.equal(ffn.sparse(ops.sparse_ffn, ids, counts), expected)


def test_two_threads_at_once(make_ffn, make_selection):
    cases = []
    for num_tokens in (1, 9):
        ffn, selection = make_ffn(num_tokens, 100, 3, 130), make_selection(num_tokens, 100)
        cases.append((ffn, selection, ffn.sparse(ops.sparse_ffn, *selection)))
    wrong = []

    def run(ffn, selection, expected):
        torch.set_num_threads(2)
        for _ in range(100):
            if not torch.equal(ffn.sparse(ops.sparse_ffn, *selection), expected):
                wrong.append(selection)

    threads = [threading.Thread(target=run, args=case) for case in cases * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def bad_cases():
    def case(name, change, message):
        return pytest.param(change, message, id=name)

    i32 = torch.int32
    twice = {"expert_ids": torch.ones(3, 2, dtype=i32), "counts": torch.full((3,), 2, dtype=i32)}
    return [
        case("up dims", {"up": torch.zeros(5, 6, 40)}, r"up of shape \[D, H\].*\[5, 6, 40\]"),
        case("up empty", {"up": torch.zeros(0, 40)}, r"up of shape \[D, H\], each of at least 1, got \[0, 40\]"),
        case("up stride", {"up": torch.zeros(40, 30).t()}, "up with contiguous rows, got .* with strides"),
        case("up dtype", {"up": torch.zeros(30, 40).double()}, "up of dtype float32, got float64"),
        case("gate", {"gate": torch.zeros(29, 40)}, r"gate of shape \[D, H\] = \[30, 40\], got \[29, 40\]"),
        case("gate stride", {"gate": torch.zeros(30, 80)[:, ::2]}, "gate with contiguous rows"),
        case("down_t", {"down_t": torch.zeros(40, 30)}, r"down_t of shape .*= \[30, 40\], got \[40, 30\]"),
        case("down_t dims", {"down_t": torch.zeros(())}, r"down_t of shape .*got \[\]"),
        case("down_t stride", {"down_t": torch.zeros(40, 30).t()}, "down_t with contiguous rows"),
        case("down_t dtype", {"down_t": torch.zeros(30, 40).half()}, "down_t of dtype float32, got float16"),
        case("experts", {"num_experts": 7}, "the number of experts to divide the 30 neurons of up, got 7 experts"),
        case("no experts", {"num_experts": 0}, "from 1 to 65536 experts, got 0"),
        case("x", {"x": torch.zeros(3, 39)}, r"x of shape \[T, H\] = \[T, 40\], got \[3, 39\]"),
        case("x dtype", {"x": torch.zeros(3, 40).double()}, "x of dtype float32, bfloat16 or float16, got float64"),
        case("x dims", {"x": torch.zeros(40)}, r"x of shape .*got \[40\]"),
        case("ids dtype", {"expert_ids": torch.zeros(3, 2).long()}, "expert_ids of dtype int32, got int64"),
        case("ids shape", {"expert_ids": torch.zeros(4, 2, dtype=i32)}, r"expert_ids of shape .*got \[4, 2\]"),
        case("ids big", {"expert_ids": torch.full((3, 1), 5, dtype=i32)}, "expert_ids from 0 to 4, got 5"),
        case("ids small", {"expert_ids": torch.full((3, 1), -1, dtype=i32)}, "expert_ids .*got -1"),
        case("ids twice", twice, "expert_ids without repetition, got expert 1 twice for token 0"),
        case("counts shape", {"counts": torch.ones(2, dtype=i32)}, r"counts of shape \[T\] = \[3\], got \[2\]"),
        case("counts big", {"counts": torch.full((3,), 9, dtype=i32)}, "counts from 0 to 5.* got 9 for token 0"),
        case("counts small", {"counts": torch.full((3,), -1, dtype=i32)}, "counts from 0 .*got -1"),
        case("activation", {"activation": "tanh"}, "activation relu, gelu.* got tanh"),
        case("no gate", {"gate": None}, "gate_bias to be None for an FFN without a gate, got a tensor"),
        case("gate_bias", {"gate_bias": torch.zeros(5, 6)}, r"gate_bias of shape \[D\] = \[30\], got \[5, 6\]"),
        case("up_bias", {"up_bias": torch.zeros(29)}, r"up_bias of shape \[D\] = \[30\], got \[29\]"),
        case("up_bias dtype", {"up_bias": torch.zeros(30).half()}, "up_bias of dtype float32 or float32, got float16"),
        case("up_bias stride", {"up_bias": torch.zeros(60)[::2]}, "up_bias to be contiguous"),
        case("down_bias", {"down_bias": torch.zeros(39)}, r"down_bias of shape \[H\] = \[40\], got \[39\]"),
    ]


@pytest.mark.parametrize("change, message", bad_cases())
def test_bad_arguments_are_named(make_ffn, change, message):
    ffn = make_ffn()
    arguments = {
        "x": ffn.x,
        "gate": ffn.gate,
        "up": ffn.up,
        "down_t": ffn.down_t,
        "expert_ids": torch.arange(5, dtype=torch.int32).repeat(3, 1),
        "counts": torch.ones(3, dtype=torch.int32),
        "activation": "silu",
        "num_experts": 5,
    } | ffn.biases
    ops.sparse_ffn(**arguments)
    with pytest.raises(RuntimeError, match=f"prunepath::sparse_ffn: expected {message}"):
        ops.sparse_ffn(**(arguments | change))


@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(make_ffn, make_selection, num_tokens, dtype):
    ffn = make_ffn(num_tokens, dtype=dtype)
    arguments = (ffn.x, *ffn.tables, *make_selection(num_tokens, 5), "silu")
    torch.library.opcheck(OP, arguments, ffn.biases | {"num_experts": 5})
    torch.library.opcheck(OP, (ffn.x.clone().requires_grad_(), *arguments[1:]), {"num_experts": 5})


def test_outputs_carry_no_gradient(make_ffn, make_selection):
    ffn = make_ffn()
    ffn.x.requires_grad_()
    assert not ffn.sparse(ops.sparse_ffn, *make_selection(3, 5)).requires_grad


def test_compiles_whole(make_ffn):
    ffn = make_ffn()

    def f(x, logits, threshold):
        ids, _, counts = ops.route(logits, threshold)
        return ops.sparse_ffn(x * 2, *ffn.tables, ids, counts, "silu", num_experts=5) + 1

    arguments = (ffn.x, torch.randn(3, 5), torch.tensor(0.7))
    assert torch.equal(torch.compile(f, fullgraph=True)(*arguments), f(*arguments))
