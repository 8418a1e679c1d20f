"""Other tools' quantisation of a sparse model's linears: the FFN calls them and masks."""

import copy
import warnings

import pytest
import torch

import prunepath


@pytest.fixture(params=["llama", "opt"])
def sparse(request, make_model, token_texts, small_config):
    model = make_model(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # little data: the model may be worse than static pruning
        prunepath.convert(model, None, token_texts, small_config)
    return model


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def assert_skips_as(quantised, sparse, ids):
    """The quantised model's experts are still selected: it is nearer to the model at its threshold than at others."""
    dense = sparse(ids).logits
    assert 0 < relative_error(quantised(ids).logits, dense) < 0.1
    for model in (sparse, quantised):
        prunepath.set_threshold(model, 0.3)
    skipped, exact = quantised(ids).logits, sparse(ids).logits
    assert 2 * relative_error(skipped, exact) < relative_error(dense, exact)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_dynamic_quantisation(sparse, ids):
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(sparse), {torch.nn.Linear}, dtype=torch.qint8)
    assert_skips_as(quantised, sparse, ids)


@torch.no_grad()
def test_torchao(sparse, ids):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
    quantised = copy.deepcopy(sparse)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    assert_skips_as(quantised, sparse, ids)
