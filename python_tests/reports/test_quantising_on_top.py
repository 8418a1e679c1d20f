"""Other tools' quantisation of a sparse model's linears: the FFN calls them and masks."""

import copy
import warnings

import pytest
import torch

import prunepath


@pytest.fixture(params=["llama", "opt"])
def sparse(request, make_sparse):
    model = make_sparse(request.param)
    prunepath.set_threshold(model, 0.8)
    return model


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def assert_skips_as(quantised, sparse, ids):
    """The quantised model's experts are still selected: it is nearer to the model at its threshold than at others."""
    before = sparse(ids).logits
    for model in (sparse, quantised):
        prunepath.set_threshold(model, 0.1)
    skipped, exact = quantised(ids).logits, sparse(ids).logits
    assert 2 * relative_error(skipped, exact) < relative_error(before, exact)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_dynamic_quantisation(sparse, ids):
    expected = sparse(ids).logits
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(sparse), {torch.nn.Linear}, dtype=torch.qint8)
    assert 0 < relative_error(quantised(ids).logits, expected) < 0.1
    assert_skips_as(quantised, sparse, ids)


@torch.no_grad()
def test_torchao(sparse, ids):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
    expected = sparse(ids).logits
    quantised = copy.deepcopy(sparse)
    quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
    assert 0 < relative_error(quantised(ids).logits, expected) < 0.1
    assert_skips_as(quantised, sparse, ids)
