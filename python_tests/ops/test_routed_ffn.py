"""`routed_ffn` on the CPU: the router's logits, the selection, and the FFN given that selection."""

import math

import pytest
import torch

from prunepath import ops
from prunepath.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OP = torch.ops.prunepath.routed_ffn


def arguments_of(ffn, threshold, activation="silu", bias=True):
    router_bias = ffn.router_bias if bias else None
    return ffn.x, ffn.router_weight, router_bias, threshold, ffn.w_in, ffn.w_out, activation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 64, 65, 130])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_float64_reference(make_ffn, assert_close_to, dtype, num_tokens, bias):
    ffn = make_ffn(num_tokens, 12, 5, 50, dtype=dtype, seed=num_tokens)
    threshold = torch.tensor(0.6)
    y, counts = ops.routed_ffn(*arguments_of(ffn, threshold, bias=bias), **ffn.parameters)
    wide = ffn.wide()
    # Routing rounds the logits to float32; these have no near-ties that the rounding could turn.
    expected, expected_counts = reference.routed_ffn(*arguments_of(wide, threshold, bias=bias), **wide.parameters)
    assert y.dtype == dtype and counts.dtype == torch.int32
    assert torch.equal(counts, expected_counts)
    assert_close_to(y, expected)


def test_large_enough_for_several_threads(make_ffn, assert_close_to):
    ffn = make_ffn(5, 130, 9, 600)
    threshold = torch.tensor([0.01, 0.3, 0.6, 0.9, 1.0])
    y, counts = ops.routed_ffn(*arguments_of(ffn, threshold), **ffn.parameters)
    wide = ffn.wide()
    expected, expected_counts = reference.routed_ffn(*arguments_of(wide, threshold), **wide.parameters)
    assert torch.equal(counts, expected_counts)
    assert counts[0] < counts[1] < counts[2] < counts[3] < counts[4] == 130
    assert_close_to(y, expected)


def test_is_route_then_sparse_ffn(make_ffn):
    """With exact logits (one nonzero weight a row), the selection and the output are bitwise the two operators'."""
    ffn = make_ffn(8, 6)
    ffn.router_weight.zero_()
    ffn.router_weight[torch.arange(6), torch.arange(6)] = 2.0
    logits = ffn.x[:, :6] * 2.0
    for options in ({}, {"min_experts": 3}, {"max_experts": 2}, {"min_experts": 2, "max_experts": 2}):
        for tau in (1e-6, 0.5, 0.8, 1.0):
            threshold = torch.tensor(tau)
            ids, _, counts = ops.route(logits, threshold, **options)
            expected = ops.sparse_ffn(ffn.x, ffn.w_in, ffn.w_out, ids, counts, "silu", **ffn.parameters)
            y, got = ops.routed_ffn(*arguments_of(ffn, threshold, bias=False), **ffn.parameters, **options)
            assert torch.equal(got, counts)
            assert torch.equal(y, expected)


def test_logits_are_not_rounded_to_bfloat16(make_ffn):
    ffn = make_ffn(1, 2, dtype=torch.bfloat16)
    ffn.x.zero_()
    ffn.x[0, :2] = 1.0
    ffn.router_weight.zero_()
    ffn.router_weight[:, 0] = 256.0
    ffn.router_weight[1, 1] = 2.0**-3  # lost if the logit 256.125 were bfloat16
    _, counts = ops.routed_ffn(*arguments_of(ffn, torch.tensor(0.52), bias=False))
    assert counts.tolist() == [1]
    assert ops.route(torch.tensor([[256.0, 256.125]]), 0.52)[2].tolist() == [1]
    assert ops.route(torch.tensor([[256.0, 256.125]]).bfloat16(), 0.52)[2].tolist() == [2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_threshold_one_is_the_dense_ffn(make_ffn, assert_close_to, dtype, gated):
    ffn = make_ffn(4, gated=gated, dtype=dtype, parameters=False)
    y, counts = ops.routed_ffn(*arguments_of(ffn, torch.tensor(1.0)))
    assert counts.tolist() == [5] * 4
    weights = [w.double() for w in ops.unpack_experts(ffn.w_in, ffn.w_out)]
    x = ffn.x.double()
    h = torch.nn.functional.silu(x @ weights[0].t())
    if gated:
        h = h * (x @ weights[1].t())
    assert_close_to(y, h @ weights[-1].t())


def test_nan_in_a_token_makes_it_dense_and_leaves_the_others_alone(make_ffn):
    ffn = make_ffn(3)
    threshold = torch.tensor(0.3)
    clean, clean_counts = ops.routed_ffn(*arguments_of(ffn, threshold), **ffn.parameters)
    ffn.x[1, 0] = math.nan
    y, counts = ops.routed_ffn(*arguments_of(ffn, threshold), **ffn.parameters)
    assert counts[1] == 5 and y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]]) and torch.equal(counts[[0, 2]], clean_counts[[0, 2]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 70])
def test_out_writes_every_element_and_repeats(make_ffn, dtype, num_tokens):
    ffn = make_ffn(num_tokens, 16, 72, 130, dtype=dtype)
    arguments = arguments_of(ffn, torch.tensor(0.8))
    expected, expected_counts = ops.routed_ffn(*arguments, **ffn.parameters)
    size = ops.workspace_size("routed_ffn", ffn.x, ffn.w_in)
    for _ in range(3):
        y = torch.full((num_tokens, 130), math.nan, dtype=dtype)
        counts = torch.full((num_tokens,), -77, dtype=torch.int32)
        workspace = torch.full((size,), 255, dtype=torch.uint8)
        result = OP.out(*arguments, **ffn.parameters, y=y, counts=counts, workspace=workspace)
        assert result is None
        assert torch.equal(y, expected) and torch.equal(counts, expected_counts)
        again = ops.routed_ffn(*arguments, **ffn.parameters)
        assert torch.equal(again[0], expected) and torch.equal(again[1], expected_counts)


def test_non_contiguous_x(make_ffn):
    ffn = make_ffn(6)
    arguments = arguments_of(ffn, torch.tensor(0.5))
    expected = ops.routed_ffn(*arguments)
    got = ops.routed_ffn(ffn.x.t().contiguous().t(), *arguments[1:])
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"router_weight": torch.zeros(4, 40)}, r"router_weight of shape \[E, H\] = \[5, 40\], got \[4, 40\]"),
        ({"router_weight": torch.zeros(5, 40).half()}, "router_weight of dtype float32, got float16"),
        ({"router_weight": torch.zeros(40, 5).t()}, "router_weight to be contiguous"),
        ({"router_bias": torch.zeros(4)}, r"router_bias of shape \[E\] = \[5\], got \[4\]"),
        ({"threshold": torch.tensor(0.0)}, "threshold to be finite and greater than 0 in float32, got 0"),
        ({"threshold": torch.tensor([0.5, 0.5])}, r"threshold of shape \[\] or \[T\] = \[3\], got \[2\]"),
        ({"threshold": torch.tensor(0.5).double()}, "threshold of dtype float32, got float64"),
        ({"min_experts": 6}, "min_experts from 1 to the number of experts, 5, got 6"),
        ({"max_experts": 6}, "max_experts to be 0 .*got 6"),
        ({"activation": "swish"}, "activation .*got swish"),
        ({"x": torch.zeros(3, 41)}, r"x of shape .*got \[3, 41\]"),
    ],
)
def test_bad_arguments_are_named(make_ffn, change, message):
    ffn = make_ffn()
    names = ("x", "router_weight", "router_bias", "threshold", "w_in", "w_out", "activation")
    arguments = dict(zip(names, arguments_of(ffn, torch.tensor(0.5)), strict=True))
    ops.routed_ffn(**arguments)
    with pytest.raises(RuntimeError, match=f"prunepath::routed_ffn: expected {message}"):
        ops.routed_ffn(**(arguments | change))


def test_small_workspace_names_the_size(make_ffn):
    ffn = make_ffn()
    size = ops.workspace_size("routed_ffn", ffn.x, ffn.w_in)
    outputs = {"y": torch.empty_like(ffn.x), "counts": torch.empty(3, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=f"workspace .*at least {size} bytes"):
        OP.out(*arguments_of(ffn, torch.tensor(0.5)), **outputs, workspace=torch.empty(0, dtype=torch.uint8))


def test_workspace_size_names_an_unknown_operator(make_ffn):
    ffn = make_ffn()
    with pytest.raises(RuntimeError, match="expected op sparse_ffn or routed_ffn, got route"):
        ops.workspace_size("route", ffn.x, ffn.w_in)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_opcheck(make_ffn, num_tokens):
    ffn = make_ffn(num_tokens)
    size = ops.workspace_size("routed_ffn", ffn.x, ffn.w_in)
    for threshold in (torch.tensor(0.5), torch.full((num_tokens,), 0.5)):
        arguments = arguments_of(ffn, threshold)
        torch.library.opcheck(OP.default, arguments, ffn.parameters)
        outputs = {
            "y": torch.full_like(ffn.x, math.nan),
            "counts": torch.zeros(num_tokens, dtype=torch.int32),
            "workspace": torch.zeros(size, dtype=torch.uint8),
        }
        torch.library.opcheck(OP.out, arguments, ffn.parameters | outputs)
    torch.library.opcheck(OP.default, (ffn.x.clone().requires_grad_(), *arguments[1:]))


def test_outputs_carry_no_gradient(make_ffn):
    ffn = make_ffn()
    for tensor in (ffn.x, ffn.w_in, ffn.router_weight):
        tensor.requires_grad_()
    y, _ = ops.routed_ffn(*arguments_of(ffn, torch.tensor(0.5)))
    assert not y.requires_grad


def test_compiles_whole_and_a_new_threshold_does_not_recompile(make_ffn):
    ffn = make_ffn()
    compiles = []

    def counting_backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    def f(x, threshold):
        y, counts = ops.routed_ffn(x * 2, *arguments_of(ffn, threshold)[1:])
        return y + 1, counts

    compiled = torch.compile(f, fullgraph=True, backend=counting_backend)
    for tau in (0.2, 0.9, 1.0):
        for a, b in zip(compiled(ffn.x, torch.tensor(tau)), f(ffn.x, torch.tensor(tau)), strict=True):
            assert torch.equal(a, b)
    assert len(compiles) == 1


def test_out_compiles_with_inductor(make_ffn):
    ffn = make_ffn()
    workspace = torch.empty(ops.workspace_size("routed_ffn", ffn.x, ffn.w_in), dtype=torch.uint8)

    @torch.compile(fullgraph=True)
    def f(x, threshold):
        y, counts = torch.empty_like(x), torch.empty(x.shape[0], dtype=torch.int32)
        OP.out(*arguments_of(ffn, threshold), y=y, counts=counts, workspace=workspace)
        return y * 2, counts

    y, counts = f(ffn.x, torch.tensor(0.5))
    expected, expected_counts = ops.routed_ffn(*arguments_of(ffn, torch.tensor(0.5)))
    assert torch.equal(y, expected * 2) and torch.equal(counts, expected_counts)
