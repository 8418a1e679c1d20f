"""Values of knobs of every type that users hand over."""

import numpy as np
import pytest
import torch

import prunepath
from prunepath.checkpoint.description import describe, description_of

BAD = [
    "0.5",
    "half",
    b"1",
    None,
    float("nan"),
    float("inf"),
    0,
    -1,
    1.5,
    True,
    np.True_,
    torch.tensor(True),
    1 + 0j,
    {},
    torch.nn,
    torch.full((300, 2), 0.5),
    torch.empty((), device="meta"),
]
GOOD = [
    np.float64(0.5),
    np.float16(0.5),
    np.array(0.5),
    torch.tensor(0.5),
    torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True),
]


@pytest.fixture(scope="module")
def model(make_sparse):
    model = make_sparse("llama")
    description = description_of(model)
    description.budgets = {0.2: [0.3, 0.3], 0.8: [0.9, 0.9]}
    describe(model, description)
    return model


@pytest.fixture
def refuses(model):
    """Checks that a call is refused in one sentence that matches, and changes nothing."""

    def check(match, function, *args):
        prunepath.set_threshold(model, 0.7)
        with pytest.raises(prunepath.PrunePathError, match=match) as raised:
            function(*args)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 200 and str(raised.value).endswith(".")
        assert prunepath.get_thresholds(model) == [0.7, 0.7]
        assert model.config.quantization_config["thresholds"] == [0.7, 0.7]
        assert not prunepath.sparse_ffns(model)["model.layers.0.mlp"]._has_request_thresholds

    return check


@pytest.mark.parametrize("value", BAD, ids=lambda value: f"{type(value).__name__}-{str(value)[:12]}")
def test_what_is_no_fraction_is_one_sentence(model, refuses, value):
    ffn = prunepath.sparse_ffns(model)["model.layers.0.mlp"]
    refuses(r"budget must be a number in \(0, 1\], got", prunepath.set_budget, model, value)
    refuses("threshold", prunepath.set_threshold, model, value)
    refuses(r"threshold must be a number in \(0, 1\], got", prunepath.set_threshold, model, [0.5, value])
    refuses(r"threshold must be a number in \(0, 1\], got", setattr, ffn, "threshold", value)
    refuses(r"budget must be a number in \(0, 1\], got", prunepath.set_request_budgets, model, [0.5, value])
    refuses(r"threshold must be a number in \(0, 1\], got", ffn.set_request_thresholds, [0.5, value])
    if value is not None:
        refuses("budget", prunepath.set_request_budgets, model, value)
        refuses("threshold", ffn.set_request_thresholds, value)


@pytest.mark.parametrize("values", [0.5, "0.5", [], np.float64(0.5), torch.tensor(0.5), np.zeros((0,))])
def test_requests_need_a_list(model, refuses, values):
    ffn = prunepath.sparse_ffns(model)["model.layers.0.mlp"]
    refuses("Expected a budget for each sequence of a batch, got", prunepath.set_request_budgets, model, values)
    refuses("Expected a threshold for each sequence of a batch, got", ffn.set_request_thresholds, values)


@pytest.mark.parametrize("value", GOOD, ids=lambda value: f"{type(value).__name__}-{value.dtype}")
def test_scalars_of_numpy_and_torch_are_numbers(model, value):
    prunepath.set_threshold(model, value)
    assert prunepath.get_thresholds(model) == [0.5, 0.5]
    prunepath.set_budget(model, value)
    assert prunepath.get_thresholds(model) == pytest.approx([0.6, 0.6])
    assert all(type(threshold) is float for threshold in model.config.quantization_config["thresholds"])
    prunepath.set_request_budgets(model, [value, 1])


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, iter])
def test_lists_of_numpy_and_torch_are_lists(model, refuses, make):
    prunepath.set_threshold(model, make([0.5, 0.25]))
    assert prunepath.get_thresholds(model) == [0.5, 0.25]
    prunepath.set_request_budgets(model, make([0.5, 0.25]))
    refuses("one threshold for each of the 2 FFNs, got 3", prunepath.set_threshold, model, make([0.5] * 3))


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_a_batch_that_does_not_fit_the_requests_is_one_sentence(make_sparse, family, context):
    model = make_sparse(family)
    for ffn in prunepath.sparse_ffns(model).values():
        ffn.set_request_thresholds([0.3, 0.9])
    with context():
        # OPT calls its FFNs without saying how many sequences their tokens are.
        for batch, length in ((1, 1), (1, 3), (3, 1), (3, 3), (3, 4))[: 4 if family == "opt" else 5]:
            with pytest.raises(prunepath.PrunePathError, match=r"2 sequences.*, got \d"):
                model(input_ids=torch.full((batch, length), 7))
        assert model(input_ids=torch.full((2, 3), 7)).logits.isfinite().all()
        # Beams of one request are next to each other.
        assert model(input_ids=torch.full((6, 1), 7)).logits.isfinite().all()
