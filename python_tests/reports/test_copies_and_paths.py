"""Copies of models and configurations, and checkpoints in folders of every name."""

import copy
import io
import os
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunepath


@pytest.fixture(params=["llama", "opt"])
def model(request, make_sparse):
    model = make_sparse(request.param)
    prunepath.set_threshold(model, 0.6)
    return model


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def inside_inference_mode(model):
    with torch.inference_mode():
        return copy.deepcopy(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch, inside_inference_mode])
@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(model, ids, duplicate):
    expected = model(input_ids=ids).logits
    other = duplicate(model)
    assert torch.equal(other(input_ids=ids).logits, expected)
    assert prunepath.get_thresholds(other) == [0.6, 0.6]
    for ffn in prunepath.sparse_ffns(other).values():
        assert ffn.is_plain() and ffn.has_row_tables()
    prunepath.set_threshold(other, 1.0)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert prunepath.get_thresholds(model) == [0.6, 0.6]
    assert model.config.quantization_config["thresholds"] == [0.6, 0.6]
    assert other.config.quantization_config["thresholds"] == [1.0, 1.0]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, by_pickle])
def test_a_copied_configuration_stays_as_it_was(model, duplicate):
    config = duplicate(model.config)
    prunepath.set_threshold(model, 0.3)
    assert config.quantization_config["thresholds"] == [0.6, 0.6]
    config.quantization_config = None
    assert prunepath.get_thresholds(model) == [0.3, 0.3]
    assert model.config.quantization_config["thresholds"] == [0.3, 0.3]


@pytest.mark.parametrize(
    "name",
    ["with space", "täst-模型-🌲", "slash/", "./relative", "a/b/../c", "dots.in.name", "per%cent", "link", "'q\"uote"],
)
@torch.no_grad()
def test_any_folder_holds_a_checkpoint(make_sparse, name, ids, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("a/b")
    if name == "link":
        os.mkdir("target")
        os.symlink("target", "link")
    model = make_sparse("llama")
    prunepath.set_threshold(model, 0.6)
    expected = model(input_ids=ids).logits
    prunepath.save(model, None, name)
    for path in (name, os.path.abspath(name), tmp_path / name):
        loaded = AutoModelForCausalLM.from_pretrained(path)
        assert torch.equal(loaded(input_ids=ids).logits, expected)
    with pytest.raises(prunepath.PrunePathError, match="tokenizer that transformers loads"):
        prunepath.load(name)  # it has none
    loaded.save_pretrained(f"again {name}".replace("/", " "))
