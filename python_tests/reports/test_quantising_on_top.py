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
    """The quantised model's experts are still selected: little is lost that is not lost at threshold 1 too."""
    dense, noise = sparse(ids).logits, relative_error(quantised(ids).logits, sparse(ids).logits)
    errors, skipped = {}, {}
    for threshold in (0.8, 0.1):
        for model in (sparse, quantised):
            prunepath.set_threshold(model, threshold)
        exact = sparse(ids).logits
        errors[threshold], skipped[threshold] = (
            relative_error(quantised(ids).logits, exact),
            relative_error(dense, exact),
        )
    assert 0 < noise < 0.1
    assert errors[0.8] < 2 * noise
    assert 2 * errors[0.1] < skipped[0.1]


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
