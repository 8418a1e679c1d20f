"""Inputs and settings that gave a bare error, or a wrong impression."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM
from transformers.tokenization_utils_base import BatchEncoding

import prunepath
from prunepath.conversion.streaming import convert_streaming

IDS = torch.randint(2, 97, (4, 40), generator=torch.Generator().manual_seed(3))


def tokenizer(text, **options):
    return {"input_ids": [ord(letter) % 97 for letter in text]}


@pytest.mark.parametrize(
    ("texts", "with_tokenizer", "message"),
    [
        (None, None, "Expected texts, or batches, to convert or calibrate with, got NoneType"),
        (7, tokenizer, "Expected texts, or batches, to convert or calibrate with, got int"),
        ([{"text": "a b"}] * 4, tokenizer, r"rows with the text under 'text': give \(row\['text'\] for row in rows\)"),
        ([{"text": "a b"}] * 4, None, "rows with the text under 'text'"),
        (["a b"] * 90, "gpt2", "Expected a tokenizer of transformers, or None .*, got str"),
        (["a b"] * 90, ["a", "b"], "Expected a tokenizer of transformers, or None .*, got list"),
        ([{"input_ids": IDS[0]}] * 8, None, r"shape \[B, S\] as input_ids, got torch.int64 of shape \[40\]"),
        ([{"input_ids": IDS.float()}] * 8, None, "whole numbers .* as input_ids, got torch.float32"),
        ([{"input_ids": IDS.tolist()}] * 8, None, "as a data collator makes them, got list as input_ids"),
        ([{"input_ids": IDS, "text": ["a"] * 4}] * 8, None, "got list as text"),
        ([{"ids": IDS}] * 8, None, "got none as input_ids"),
        ([{"input_ids": IDS}, IDS], None, "dicts like the first, got Tensor"),
    ],
)
def test_data_of_another_kind_is_one_sentence(llama, make_sparse, small_config, texts, with_tokenizer, message):
    for call in (
        lambda: prunepath.convert(llama, with_tokenizer, texts, small_config),
        lambda: prunepath.calibrate(make_sparse("llama"), with_tokenizer, texts),
    ):
        with pytest.raises(prunepath.PrunePathError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
    assert not prunepath.is_sparse(llama)


def test_batches_may_be_what_tokenizers_pad_into(llama, small_config):
    batches = [BatchEncoding({"input_ids": IDS, "labels": IDS}) for _ in range(8)]
    assert prunepath.is_sparse(prunepath.convert(llama, None, batches, small_config))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ffn_weights_that_are_not_finite_are_named(make_model, token_texts, small_config, value, dtype, tmp_path):
    for family, name in (("llama", "layers.1.mlp.down_proj.weight"), ("opt", "layers.0.fc1.bias")):
        model = make_model(family).to(dtype)
        parameter = next(p for full, p in model.named_parameters() if full.endswith(name))
        parameter.data.view(-1)[5] = value
        with pytest.raises(prunepath.PrunePathError, match=f"finite numbers, but .*{name} has NaN or infinite ones"):
            prunepath.convert(model, None, token_texts, small_config)
        assert not prunepath.is_sparse(model)
    llama = make_model("llama")
    llama.model.layers[1].mlp.up_proj.weight.data[3, 3] = value
    llama.save_pretrained(tmp_path / "dense")
    with pytest.raises(prunepath.PrunePathError, match=r"but model\.layers\.1\.mlp\.up_proj\.weight has NaN"):
        convert_streaming(tmp_path / "dense", tmp_path / "out", None, token_texts, small_config)


@pytest.mark.parametrize(
    "make",
    [
        lambda model, folder: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)),
        lambda model, folder: AutoModel.from_config(AutoConfig.from_pretrained(folder)),
        lambda model, folder: AutoModelForCausalLM.from_config(copy.deepcopy(model.config)),
        lambda model, folder: LlamaForCausalLM(model.config),
    ],
)
def test_a_dense_model_of_a_sparse_ones_configuration_saves_a_dense_checkpoint(make_sparse, make, ids, tmp_path):
    sparse = make_sparse("llama")
    sparse.save_pretrained(tmp_path / "sparse")
    dense = make(sparse, tmp_path / "sparse")
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    loaded = type(dense).from_pretrained(tmp_path / "dense")
    assert not prunepath.is_sparse(loaded)
    for a, b in zip(dense.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    sparse.save_pretrained(tmp_path / "again")
    assert prunepath.is_sparse(AutoModelForCausalLM.from_pretrained(tmp_path / "again"))


def test_info_shows_ranges_of_long_lists(llama, token_texts, small_config, tmp_path):
    from typer.testing import CliRunner

    from prunepath.cli.app import app

    prunepath.convert(llama, None, token_texts, small_config)
    prunepath.set_budget(llama, 0.5)
    llama.save_pretrained(tmp_path)
    lines = CliRunner().invoke(app, ["info", str(tmp_path)]).stdout.splitlines()
    assert max(map(len, lines)) < 200 and not any("[" in line or "{" in line for line in lines)
    assert any(line.startswith("thresholds: ") and line.endswith(" in 2 FFNs") for line in lines)
    routers = next(line for line in lines if line.startswith("  routers: "))
    assert "recall" in routers and routers.endswith("in 2 FFNs")
    whole = json.loads(CliRunner().invoke(app, ["info", str(tmp_path), "--json"]).stdout)
    assert whole["thresholds"] == prunepath.get_thresholds(llama) and len(whole["calibration"]["routers"]) == 2


def test_a_threshold_set_on_an_ffn_is_not_saved_as_it_says(make_sparse, tmp_path):
    model = make_sparse("llama")
    prunepath.set_threshold(model, 0.6)
    for ffn in prunepath.sparse_ffns(model).values():
        ffn.threshold = 0.3
    model.save_pretrained(tmp_path)
    assert prunepath.get_thresholds(AutoModelForCausalLM.from_pretrained(tmp_path)) == [0.6, 0.6]
    assert "save_pretrained" in prunepath.SparseFFN.threshold.__doc__
