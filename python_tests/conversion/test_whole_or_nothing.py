"""A conversion that fails or is interrupted, wherever, leaves the model as it was."""

import copy
import dataclasses
import signal

import pytest
import torch

import prunepath
from prunepath.conversion import convert as convert_module
from prunepath.conversion import experts
from prunepath.families import FFNSite
from prunepath.train.router import RouterTraining


def after(calls, function, error=KeyboardInterrupt):
    """`function`, which from its call number `calls` on does its work and then raises."""
    count = 0

    def failing(*args, **kwargs):
        nonlocal count
        result = function(*args, **kwargs)
        count += 1
        if count >= calls:
            raise error
        return result

    return failing


FAILURES = {
    "installing": lambda p: p.setattr(FFNSite, "install", after(2, FFNSite.install)),
    "grouping": lambda p: p.setattr(experts, "partition_neurons", after(2, experts.partition_neurons, MemoryError)),
    "reordering": lambda p: p.setattr(convert_module, "reorder_neurons", interrupt_inside(2)),
    "training": lambda p: p.setattr(RouterTraining, "observe", after(5, RouterTraining.observe)),
    "finishing": lambda p: p.setattr(RouterTraining, "finish", after(1, RouterTraining.finish)),
    "calibrating": lambda p: p.setattr(convert_module, "mean_loss", after(3, convert_module.mean_loss, OSError)),
    "describing": lambda p: p.setattr(convert_module, "describe", after(1, convert_module.describe)),
    "laying out": lambda p: p.setattr(convert_module, "for_inference", after(1, convert_module.for_inference)),
}


def interrupt_inside(calls):
    """`reorder_neurons` during which, at its call number `calls`, somebody presses Ctrl-C."""
    count = 0

    def reorder(ffn, order):
        nonlocal count
        count += 1
        if count == calls:
            signal.raise_signal(signal.SIGINT)
        return experts.reorder_neurons(ffn, order)

    return reorder


def structure(model):
    return [(name, type(module), module.training, set(vars(module))) for name, module in model.named_modules()]


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("failure", FAILURES)
def test_the_model_is_as_it_was_and_converts(
    make_model, token_texts, small_config, family, width, failure, monkeypatch
):
    if width == 1 and failure in ("grouping", "reordering"):
        pytest.skip("nothing is grouped")
    config = dataclasses.replace(small_config, expert_width=width, router_rank=8, router_tokens=512)
    model = make_model(family)
    expected = prunepath.convert(copy.deepcopy(model), None, token_texts, config).state_dict()
    model.train()
    weights = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
    before, settings = structure(model), copy.deepcopy(model.config.to_dict())
    with monkeypatch.context() as patch:
        FAILURES[failure](patch)
        with pytest.raises((KeyboardInterrupt, MemoryError, OSError)):
            prunepath.convert(model, None, token_texts, config)
    assert not prunepath.is_sparse(model) and structure(model) == before
    assert model.config.to_dict() == settings
    assert model.state_dict().keys() == weights.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name][0]) and tensor.stride() == weights[name][1], name
    again = prunepath.convert(model, None, token_texts, config).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_an_interrupt_is_held_back_while_neurons_move():
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with convert_module._uninterrupted():
            signal.raise_signal(signal.SIGINT)
            reached.append(True)
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler
