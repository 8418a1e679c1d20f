"""Projections whose weights torch.nn.utils computes: parametrisations and weight norms."""

import copy
import dataclasses

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize

import prunepath

NAMES = {"llama": ["gate_proj", "up_proj", "down_proj"], "opt": ["fc1", "fc2"]}


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2.0 * weight


KINDS = {
    "parametrize": lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "bias": lambda module: module.bias is not None and parametrize.register_parametrization(module, "bias", Doubled()),
}


def projections(model, family, which):
    names = NAMES[family] if which == "all" else [NAMES[family][which]]
    return [module for path, module in model.named_modules() if path.rpartition(".")[2] in names]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["all", 0, 1, -1])
@pytest.mark.parametrize("family", ["llama", "llama_mlp_bias", "opt"])
def test_a_sparse_model_computes_with_what_they_give(make_model, make_sparse, family, which, kind, ids):
    names = family.removesuffix("_mlp_bias")
    dense = make_model(family)
    sparse = make_sparse(copy.deepcopy(dense))
    for model in (dense, sparse):
        for module in projections(model, names, which):
            KINDS[kind](module)
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
        torch.testing.assert_close(sparse(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        prunepath.set_threshold(sparse, 0.5)
        served = sparse(input_ids=ids).logits
    assert not torch.allclose(served, expected, atol=1e-2)
    masked = sparse(input_ids=ids)
    torch.testing.assert_close(masked.logits.detach(), served, rtol=1e-4, atol=1e-4)
    masked.logits.square().mean().backward()
    for module in projections(sparse, names, which):
        assert all(parameter.grad is not None for parameter in module.parameters())
    prunepath.for_inference(prunepath.for_training(sparse))
    with torch.no_grad():
        torch.testing.assert_close(sparse(input_ids=ids).logits, served, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", ["parametrize", "weight_norm", "old weight_norm"])
@pytest.mark.parametrize("width", [1, 8])
def test_converting_them_into_experts_of_several_neurons_is_refused(llama, token_texts, small_config, kind, width, ids):
    for module in projections(llama, "llama", 1):
        KINDS[kind](module)
    with torch.no_grad():
        expected = llama(input_ids=ids).logits
    config = dataclasses.replace(small_config, expert_width=width)
    if width == 1:
        prunepath.convert(llama, None, token_texts, config)
    else:
        with pytest.raises(
            prunepath.PrunePathError, match=r"mlp\.up_proj\.weight is computed by a parametrization: remove"
        ):
            prunepath.convert(llama, None, token_texts, config)
    with torch.no_grad():
        torch.testing.assert_close(llama(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
