"""`sparse_ffn` on the CPU against a float64 reference of the same selection."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunepath import ops
from prunepath.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OP = torch.ops.prunepath.sparse_ffn


def run_reference(ffn, ids, counts, activation):
    wide = ffn.wide()
    return reference.sparse_ffn(wide.x, wide.w_in, wide.w_out, ids, counts, activation, **wide.parameters)


def naive(ffn, ids, counts, activation):
    """One token, expert and neuron at a time."""
    wide = ffn.wide()
    act = reference.ACTIVATIONS[activation]
    parameters = wide.parameters
    y = torch.zeros_like(wide.x)
    for t, x in enumerate(wide.x):
        if "b_out" in parameters:
            y[t] += parameters["b_out"]
        for e in ids[t, : counts[t]].tolist():
            for j in range(wide.w_in.shape[1]):
                pre = wide.w_in[e, j] @ x
                if "b_in" in parameters:
                    pre = pre + parameters["b_in"][e, j]
                h = act(pre[0]) * (pre[1] if len(pre) == 2 else 1.0)
                if "center" in parameters:
                    h = h - parameters["center"][e, j]
                y[t] += h * wide.w_out[e, j]
    return y


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_reference_is_the_formula(make_ffn, make_selection, activation, gated, parameters):
    ffn = make_ffn(3, 4, 3, 5, gated=gated, parameters=parameters)
    ids, counts = make_selection(3, 4)
    torch.testing.assert_close(run_reference(ffn, ids, counts, activation), naive(ffn, ids, counts, activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_every_activation(make_ffn, make_selection, assert_close_to, dtype, gated, activation):
    ffn = make_ffn(9, 7, 5, 37, gated=gated, dtype=dtype, parameter_dtype=dtype)
    ids, counts = make_selection(9, 7)
    y = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, activation, **ffn.parameters)
    assert y.dtype == dtype
    assert_close_to(y, run_reference(ffn, ids, counts, activation))


@pytest.mark.parametrize("num_tokens", [*range(10), 31, 32, 33, 63, 64, 65, 128, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_batch_size(make_ffn, make_selection, assert_close_to, num_tokens, dtype):
    ffn = make_ffn(num_tokens, 6, 11, 24, dtype=dtype, seed=num_tokens)
    ids, counts = make_selection(num_tokens, 6, 4, seed=num_tokens)
    y = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "silu", **ffn.parameters)
    assert_close_to(y, run_reference(ffn, ids, counts, "silu"))


@pytest.mark.parametrize("num_tokens", [1, 3, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_enough_for_several_threads(make_ffn, make_selection, assert_close_to, num_tokens, dtype):
    ffn = make_ffn(num_tokens, 16, 72, 260, dtype=dtype)
    ids, counts = make_selection(num_tokens, 16)
    counts.fill_(16)
    ids = torch.stack([torch.randperm(16) for _ in range(num_tokens)]).int()
    y = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "gelu", **ffn.parameters)
    assert_close_to(y, run_reference(ffn, ids, counts, "gelu"))


def test_many_neurons_stay_within_float32_rounding(make_ffn, assert_close_to):
    """The order of summation keeps the error of a wide FFN from growing with its width."""
    ffn = make_ffn(1, 32, 512, 16, gated=False)
    ids, counts = torch.arange(32, dtype=torch.int32)[None], torch.tensor([32], dtype=torch.int32)
    y = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "relu", **ffn.parameters)
    assert_close_to(y, run_reference(ffn, ids, counts, "relu"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_tokens=st.integers(0, 6),
    num_experts=st.integers(1, 9),
    width=st.integers(1, 9),
    hidden_size=st.integers(1, 70),
    gated=st.booleans(),
    parameters=st.booleans(),
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
    parameters,
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
        parameters=parameters,
        seed=seed,
    )
    ids, counts = make_selection(num_tokens, num_experts, seed=seed)
    y = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "gelu_tanh", **ffn.parameters)
    expected = run_reference(ffn, ids, counts, "gelu_tanh")
    # A sum that cancels, as one output may, has no relative accuracy; measure against the terms then.
    scale = expected.norm() + ffn.w_out.double().norm() * 1e-2
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    assert (y.double() - expected).norm() <= tolerance * scale


def test_no_active_expert_gives_the_bias(make_ffn):
    ffn = make_ffn(2)
    ids, counts = torch.full((2, 3), -1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    y = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "relu", **ffn.parameters)
    assert torch.equal(y, ffn.parameters["b_out"].expand(2, -1))
    y = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids[:, :0], counts, "relu")
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("dtype", DTYPES)
def test_skipped_experts_are_never_read(make_ffn, dtype):
    ffn = make_ffn(4, 6, dtype=dtype)
    ids, counts = torch.tensor([[4, 1]] * 4, dtype=torch.int32), torch.full((4,), 2, dtype=torch.int32)
    clean = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "silu", **ffn.parameters)
    for tensor in (ffn.w_in, ffn.w_out, ffn.parameters["b_in"], ffn.parameters["center"]):
        tensor[[0, 2, 3, 5]] = math.nan
    y = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "silu", **ffn.parameters)
    assert torch.equal(y, clean)


def test_a_token_does_not_see_the_other_tokens_experts(make_ffn):
    """Batched tokens share the reading of weights, and nothing else."""
    ffn = make_ffn(3, 4)
    ids = torch.tensor([[0, 1], [2, -1], [3, 0]], dtype=torch.int32)
    counts = torch.tensor([2, 1, 2], dtype=torch.int32)
    clean = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "silu", **ffn.parameters)
    ffn.w_in[2] = math.nan
    y = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "silu", **ffn.parameters)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_pass_through(make_ffn, dtype):
    ffn = make_ffn(4, 2, dtype=dtype, parameters=False)
    ffn.x[1, 3] = math.nan
    ffn.w_out[0, 0, 5] = math.inf
    ids, counts = torch.tensor([[0, 1]] * 4, dtype=torch.int32), torch.full((4,), 2, dtype=torch.int32)
    y = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "relu2")
    assert y[1].isnan().all()
    assert not y[[0, 2, 3], 5].isfinite().any()
    rest = torch.arange(40) != 5
    assert y[[0, 2, 3]][:, rest].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_x(make_ffn, make_selection, dtype):
    ffn = make_ffn(6, dtype=dtype)
    ids, counts = make_selection(6, 5)
    y = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "silu", **ffn.parameters)
    transposed = ffn.x.t().contiguous().t()
    wider = torch.cat([ffn.x, ffn.x], 1)[:, :40]
    for x in (transposed, wider):
        assert not x.is_contiguous()
        again = ops.sparse_ffn(x, ffn.w_in, ffn.w_out, ids, counts, "silu", **ffn.parameters)
        assert torch.equal(again, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "width"), [(5, 6), (1, 7), (7, 1)])
def test_w_in_may_be_a_view_of_other_storage(make_ffn, make_selection, dtype, num_experts, width):
    ffn = make_ffn(6, num_experts, width, dtype=dtype)
    ids, counts = make_selection(6, num_experts)
    y = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "silu", **ffn.parameters)
    gates_then_ups = ffn.w_in.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    wider = torch.cat([ffn.w_in, torch.full_like(ffn.w_in, math.nan)], 3)[..., :40]
    for w_in in (gates_then_ups, wider):
        assert not w_in.is_contiguous()
        again = ops.sparse_ffn(ffn.x, w_in, ffn.w_out, ids, counts, "silu", **ffn.parameters)
        assert torch.equal(again, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 70])
def test_out_writes_every_element_and_repeats(make_ffn, make_selection, dtype, num_tokens):
    ffn = make_ffn(num_tokens, 16, 72, 130, dtype=dtype)
    ids, counts = make_selection(num_tokens, 16)
    arguments = (ffn.x, ffn.w_in, ffn.w_out, ids, counts, "silu")
    expected = ops.sparse_ffn(*arguments, **ffn.parameters)
    size = ops.workspace_size("sparse_ffn", ffn.x, ffn.w_in)
    for start in (0, 1):  # an unaligned workspace does too
        workspace = torch.full((size + 1,), 255, dtype=torch.uint8)[start : start + size]
        y = torch.full((num_tokens, 130), math.nan, dtype=dtype)
        assert OP.out(*arguments, **ffn.parameters, y=y, workspace=workspace) is None
        assert torch.equal(y, expected)
    for _ in range(5):
        assert torch.equal(ops.sparse_ffn(*arguments, **ffn.parameters), expected)


def test_workspace_stays_within_its_size(make_ffn, make_selection):
    ffn = make_ffn(5)
    ids, counts = make_selection(5, 5)
    size = ops.workspace_size("sparse_ffn", ffn.x, ffn.w_in)
    buffer = torch.full((size + 128,), 171, dtype=torch.uint8)
    y = torch.empty_like(ffn.x)
    OP.out(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "silu", y=y, workspace=buffer[64 : 64 + size])
    assert (buffer[:64] == 171).all() and (buffer[64 + size :] == 171).all()


def test_workspace_for_more_tokens_serves_fewer(make_ffn):
    sizes = [ops.workspace_size("sparse_ffn", make_ffn(t).x, make_ffn(t).w_in) for t in range(70)]
    assert sizes == sorted(sizes)


def bad_cases():
    def case(name, change, message):
        return pytest.param(change, message, id=name)

    i32 = torch.int32
    return [
        case("w_in dims", {"w_in": torch.zeros(5, 6, 40)}, r"w_in of shape \[E, n, G, H\].*\[5, 6, 40\]"),
        case("w_in G", {"w_in": torch.zeros(5, 6, 3, 40)}, r"w_in of shape .*\[5, 6, 3, 40\]"),
        case("w_in stride", {"w_in": torch.zeros(5, 6, 40, 2).mT}, "w_in with contiguous rows.*strides"),
        case("w_in distance", {"w_in": torch.zeros(5, 7, 2, 40)[:, :6]}, "w_in .*neurons at one distance"),
        case("w_in dtype", {"w_in": torch.zeros(5, 6, 2, 40).double()}, "w_in of dtype .*got float64"),
        case("w_out", {"w_out": torch.zeros(5, 6, 41)}, r"w_out of shape .*= \[5, 6, 40\], got \[5, 6, 41\]"),
        case("w_out stride", {"w_out": torch.zeros(5, 40, 6).mT}, "w_out to be contiguous"),
        case("w_out dtype", {"w_out": torch.zeros(5, 6, 40).half()}, "w_out of dtype float32, got float16"),
        case("x", {"x": torch.zeros(3, 39)}, r"x of shape \[T, H\] = \[T, 40\], got \[3, 39\]"),
        case("x dtype", {"x": torch.zeros(3, 40).bfloat16()}, "x of dtype float32, got bfloat16"),
        case("x dims", {"x": torch.zeros(40)}, r"x of shape .*got \[40\]"),
        case("ids dtype", {"expert_ids": torch.zeros(3, 2).long()}, "expert_ids of dtype int32, got int64"),
        case("ids shape", {"expert_ids": torch.zeros(4, 2, dtype=i32)}, r"expert_ids of shape .*got \[4, 2\]"),
        case("ids big", {"expert_ids": torch.full((3, 1), 5, dtype=i32)}, "expert_ids from 0 to 4, got 5"),
        case("ids small", {"expert_ids": torch.full((3, 1), -1, dtype=i32)}, "expert_ids .*got -1"),
        case(
            "ids twice",
            {"expert_ids": torch.ones(3, 2, dtype=i32), "counts": torch.full((3,), 2, dtype=i32)},
            "expert_ids without repetition, got expert 1 twice for token 0",
        ),
        case("counts shape", {"counts": torch.ones(2, dtype=i32)}, r"counts of shape \[T\] = \[3\], got \[2\]"),
        case("counts big", {"counts": torch.full((3,), 9, dtype=i32)}, "counts from 0 to 5.* got 9 for token 0"),
        case("counts small", {"counts": torch.full((3,), -1, dtype=i32)}, "counts from 0 .*got -1"),
        case("activation", {"activation": "tanh"}, "activation relu, gelu.* got tanh"),
        case("b_in", {"b_in": torch.zeros(5, 6)}, r"b_in of shape \[E, n, G\] = \[5, 6, 2\], got \[5, 6\]"),
        case("b_out", {"b_out": torch.zeros(39)}, r"b_out of shape \[H\] = \[40\], got \[39\]"),
        case("center", {"center": torch.zeros(6, 5)}, r"center of shape \[E, n\] = \[5, 6\], got \[6, 5\]"),
        case("center dtype", {"center": torch.zeros(5, 6).half()}, "center of dtype float32 or float32, got"),
        case("center stride", {"center": torch.zeros(6, 5).t()}, "center to be contiguous"),
    ]


@pytest.mark.parametrize("change, message", bad_cases())
def test_bad_arguments_are_named(make_ffn, change, message):
    ffn = make_ffn()
    arguments = {
        "x": ffn.x,
        "w_in": ffn.w_in,
        "w_out": ffn.w_out,
        "expert_ids": torch.arange(5, dtype=torch.int32).repeat(3, 1),
        "counts": torch.ones(3, dtype=torch.int32),
        "activation": "silu",
    } | ffn.parameters
    ops.sparse_ffn(**arguments)
    with pytest.raises(RuntimeError, match=f"prunepath::sparse_ffn: expected {message}"):
        ops.sparse_ffn(**(arguments | change))


def test_small_workspace_names_the_size(make_ffn, make_selection):
    ffn = make_ffn()
    size = ops.workspace_size("sparse_ffn", ffn.x, ffn.w_in)
    arguments = (ffn.x, ffn.w_in, ffn.w_out, *make_selection(3, 5), "silu")
    workspace = torch.empty(size - 1, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=rf"workspace .*at least {size} bytes, got \[{size - 1}\]"):
        OP.out(*arguments, y=torch.empty_like(ffn.x), workspace=workspace)
    workspace = torch.empty(size, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"y of shape \[T, H\] = \[3, 40\], got \[2, 40\]"):
        OP.out(*arguments, y=torch.empty(2, 40), workspace=workspace)


@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(make_ffn, make_selection, num_tokens, dtype):
    ffn = make_ffn(num_tokens, dtype=dtype)
    arguments = (ffn.x, ffn.w_in, ffn.w_out, *make_selection(num_tokens, 5), "silu")
    torch.library.opcheck(OP.default, arguments, ffn.parameters)
    torch.library.opcheck(OP.default, (ffn.x.clone().requires_grad_(), *arguments[1:]))
    outputs = {
        "y": torch.full_like(ffn.x, math.nan),
        "workspace": torch.zeros(ops.workspace_size("sparse_ffn", ffn.x, ffn.w_in), dtype=torch.uint8),
    }
    # The workspace's contents are nobody's result, and y is the default overload's: fake and real agree on shapes.
    torch.library.opcheck(OP.out, arguments, ffn.parameters | outputs)


def test_outputs_carry_no_gradient(make_ffn, make_selection):
    ffn = make_ffn()
    y = ops.sparse_ffn(ffn.x.requires_grad_(), ffn.w_in, ffn.w_out, *make_selection(3, 5), "silu")
    assert not y.requires_grad


def test_compiles_whole(make_ffn):
    ffn = make_ffn()

    @torch.compile(fullgraph=True)
    def f(x, logits, threshold):
        ids, _, counts = ops.route(logits, threshold)
        return ops.sparse_ffn(x * 2, ffn.w_in, ffn.w_out, ids, counts, "silu") + 1

    logits = torch.randn(3, 5)
    ids, _, counts = ops.route(logits, 0.7)
    expected = ops.sparse_ffn(ffn.x * 2, ffn.w_in, ffn.w_out, ids, counts, "silu") + 1
    assert torch.equal(f(ffn.x, logits, torch.tensor(0.7)), expected)
