"""What the dispatcher is told from Python, besides what opcheck covers operator by operator."""

import pytest
import torch

from prunepath import ops
from prunepath.ops import fakes, reference

NS = torch.ops.prunepath


def test_references_fill_the_outputs_of_the_out_overloads(make_ffn, make_selection):
    """On CUDA the `.out` overloads may be the references: they take the schemas' arguments and fill every output."""
    ffn = make_ffn()
    ids, selected = make_selection(3, 5)
    routed = (ffn.x, ffn.router_weight, None, torch.tensor(0.5), ffn.w_in, ffn.w_out, "silu")
    gate, up, down = ops.unpack_experts(ffn.w_in, ffn.w_out)
    cases = [
        (NS.route.out, (ffn.x[:, :8], 0.5), {"max_experts": 3}),
        (NS.pack_experts.out, (gate, up, down, 5), {}),
        (NS.unpack_experts.out, (ffn.w_in, ffn.w_out), {}),
        (NS.sparse_ffn.out, (ffn.x, ffn.w_in, ffn.w_out, ids, selected, "silu"), ffn.parameters),
        (NS.routed_ffn.out, routed, ffn.parameters | {"min_experts": 2}),
    ]
    for overload, arguments, options in cases:
        schema = overload._schema
        name = schema.name.split("::")[1]
        names = [a.name for a in schema.arguments if a.alias_info is not None and a.name != "workspace"]
        expected = getattr(reference, name)(*arguments, **options)
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        outputs = {key: torch.full_like(value, 99) for key, value in zip(names, expected, strict=True)}
        extra = {"workspace": torch.empty(0, dtype=torch.uint8)} if "ffn" in name else {}
        assert fakes._copying(getattr(reference, name))(*arguments, **options, **outputs, **extra) is None
        for output, value in zip(outputs.values(), expected, strict=True):
            assert torch.equal(output, value)


def test_unpack_without_a_gate():
    w_in, w_out = torch.randn(2, 3, 1, 4), torch.randn(2, 3, 4)
    outputs = {"gate": None, "up": torch.zeros(6, 4), "down": torch.zeros(4, 6)}
    fakes._copying(reference.unpack_experts)(w_in, w_out, **outputs)
    assert torch.equal(outputs["up"], w_in.reshape(6, 4))
    assert torch.equal(outputs["down"], w_out.reshape(6, 4).t())


def test_a_new_number_of_tokens_does_not_recompile(make_ffn):
    ffn = make_ffn(1)
    compiles = []

    def counting_backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=counting_backend)
    def f(x, threshold):
        return ops.routed_ffn(x, ffn.router_weight, None, threshold, ffn.w_in, ffn.w_out, "silu")

    for num_tokens in (11, 3, 70):  # not another size of the first call: those would share a symbol
        y, counts = f(torch.randn(num_tokens, 40), torch.tensor(0.5))
        assert y.shape == (num_tokens, 40) and counts.shape == (num_tokens,)
    assert len(compiles) == 1


@pytest.mark.parametrize("name", ["meta", "cpu"])
def test_shapes_are_the_same_on_meta_tensors(make_ffn, name):
    ffn = make_ffn(7)
    to = [t.to(name) for t in (ffn.x, ffn.router_weight, ffn.w_in, ffn.w_out)]
    x, router_weight, w_in, w_out = to
    threshold = torch.tensor(0.5, device=name)
    y, counts = ops.routed_ffn(x, router_weight, None, threshold, w_in, w_out, "silu")
    assert (y.shape, y.dtype, counts.shape, counts.dtype) == ((7, 40), x.dtype, (7,), torch.int32)
    ids, probs, counts = ops.route(x[:, :5], threshold, max_experts=3)
    assert ids.shape == probs.shape == (7, 3) and counts.shape == (7,)
    assert (ids.dtype, probs.dtype, counts.dtype) == (torch.int32, torch.float32, torch.int32)
    assert ops.sparse_ffn(x, w_in, w_out, ids, counts, "relu").shape == (7, 40)
    assert [w.shape for w in ops.unpack_experts(w_in, w_out)] == [(30, 40), (30, 40), (40, 30)]
