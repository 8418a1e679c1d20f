"""What cannot be offloaded to a GPU is refused before anything is moved."""

import pytest
import torch
from torch import nn

import prunepath
from prunepath.memory.offload import _run, offload_experts


def test_what_cannot_be_offloaded_is_refused(llama, make_sparse):
    with pytest.raises(prunepath.PrunePathError, match="got a dense LlamaForCausalLM"):
        offload_experts(llama, 1 << 20)
    model = make_sparse("llama")
    with pytest.raises(prunepath.PrunePathError, match=r"Expected a GPU .*, got the device cpu"):
        offload_experts(model, 1 << 20, "cpu")
    next(iter(prunepath.sparse_ffns(model).values())).projection("up_proj").register_forward_hook(lambda *_: None)
    with pytest.raises(prunepath.PrunePathError, match="merge adapters first"):
        offload_experts(model, 1 << 20)


@pytest.mark.parametrize("family", ["llama", "llama_mlp_bias", "opt"])
@pytest.mark.parametrize("tokens", [3, 64, 65, 100])
@torch.no_grad()
def test_its_executor_computes_what_the_ffn_computes_at_any_length(family, tokens, make_sparse):
    model = make_sparse(family, expert_width=4)
    prunepath.set_threshold(model, 0.5)
    for ffn in prunepath.sparse_ffns(model).values():
        x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0))
        hidden = ffn.hidden(x)
        expected = ffn.project(ffn.skip(hidden, ffn.active(x, hidden)))
        y, counts = _run(ffn, x)
        assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(counts, ffn.select(x)[1])


@torch.no_grad()
def test_moving_or_casting_ends_it_and_adapters_are_never_passed_over(make_sparse):
    model = make_sparse("llama")
    (ffn, *_) = prunepath.sparse_ffns(model).values()
    calls = []

    def execute(ffn, x):
        calls.append(len(x))
        return _run(ffn, x)

    x = torch.randn(100, 32)
    ffn.executor = execute
    expected = ffn(x)
    assert calls == [100]
    hook = ffn.projection("down_proj").register_forward_hook(lambda module, inputs, output: output + 1)
    assert torch.allclose(ffn(x), expected + 1, atol=1e-5)
    assert calls == [100]
    hook.remove()
    ffn(x)
    assert calls == [100, 100]
    for move in (nn.Module.double, nn.Module.float, lambda module: module.to("cpu")):
        ffn.executor = execute
        move(ffn)
        assert ffn.executor is None
