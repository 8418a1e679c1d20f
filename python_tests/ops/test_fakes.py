"""What the dispatcher is told from Python, besides what opcheck covers operator by operator."""

import pytest
import torch

from prunepath import ops


def test_a_new_number_of_tokens_does_not_recompile(make_ffn):
    ffn = make_ffn(1)
    compiles = []

    def counting_backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=counting_backend)
    def f(x, threshold):
        return ops.routed_ffn(x, *ffn.router, threshold, *ffn.tables, "silu")

    for num_tokens in (11, 3, 70):  # not another size of the first call: those would share a symbol
        y, counts = f(torch.randn(num_tokens, 40), torch.tensor(0.5))
        assert y.shape == (num_tokens, 40) and counts.shape == (num_tokens,)
    assert len(compiles) == 1


@pytest.mark.parametrize("name", ["meta", "cpu"])
def test_shapes_are_the_same_on_meta_tensors(make_ffn, name):
    ffn = make_ffn(7)
    x, router_in, router_out, *tables = (t.to(name) for t in (ffn.x, ffn.router_in, ffn.router_out, *ffn.tables))
    threshold = torch.tensor(0.5, device=name)
    y, counts = ops.routed_ffn(x, router_in, router_out, None, threshold, *tables, "silu")
    assert (y.shape, y.dtype, counts.shape, counts.dtype) == ((7, 40), x.dtype, (7,), torch.int32)
    factors = {"router_floor": x.new_ones(10), "router_log_scale": x.new_ones(5)}
    y, counts = ops.routed_ffn(x, router_in, router_out.repeat(2, 1), None, threshold, *tables, "silu", **factors)
    assert (y.shape, y.dtype, counts.shape, counts.dtype) == ((7, 40), x.dtype, (7,), torch.int32)
    router_in, scale = router_in[:, ::2].contiguous().to(torch.uint8), x.new_ones(8)
    y, counts = ops.routed_ffn(x, router_in, router_out, None, threshold, *tables, "silu", router_in_scale=scale)
    assert (y.shape, y.dtype, counts.shape, counts.dtype) == ((7, 40), x.dtype, (7,), torch.int32)
    ids, probs, counts = ops.route(x[:, :5], threshold, max_experts=3)
    assert ids.shape == probs.shape == (7, 3) and counts.shape == (7,)
    assert (ids.dtype, probs.dtype, counts.dtype) == (torch.int32, torch.float32, torch.int32)
    mask, counts = ops.select(x[:, :5], threshold, max_experts=3)
    assert (mask.shape, mask.dtype, counts.shape, counts.dtype) == ((7, 5), torch.bool, (7,), torch.int32)
    assert ops.sparse_ffn(x, *tables, ids, counts, "relu", num_experts=5).shape == (7, 40)
    assert [w.shape for w in ops.pack_experts(*tables[:2], tables[2].t())] == [(30, 40)] * 3
