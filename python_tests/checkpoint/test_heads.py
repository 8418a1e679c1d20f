"""A sparse model saved with one head, or none, loads with any other, and saves and loads from there."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, T5Config

import prunepath
from prunepath.checkpoint.packing import pack

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97, "hidden_size": 32}
T5 = T5Config(
    vocab_size=97, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_decoder_layers=1, num_heads=4, pad_token_id=0
)


def hidden(model, ids):
    """The last hidden state, whatever comes after it."""
    backbone = model.base_model
    if isinstance(backbone, transformers.T5ForConditionalGeneration | transformers.T5Model):
        backbone = backbone.encoder
    return backbone(ids).last_hidden_state


def bert(name, **config):
    torch.manual_seed(0)
    config = BertConfig(**SIZES, intermediate_size=64, initializer_range=0.2, **config)
    return getattr(transformers, name)(config).eval()


BERTS = ["BertModel", "BertForSequenceClassification", "BertForMaskedLM"]


@pytest.mark.parametrize("first", BERTS)
@torch.no_grad()
def test_bert_goes_through_every_head(first, make_calibrated, ids, tmp_path):
    model = make_calibrated(bert(first), expert_width=4)
    expected, thresholds = hidden(model, ids), prunepath.get_thresholds(model)
    folder = tmp_path / first
    model.save_pretrained(folder)
    for step, second in enumerate([*BERTS, first]):
        model = getattr(transformers, second).from_pretrained(folder)
        assert prunepath.get_thresholds(model) == thresholds
        assert torch.equal(hidden(model, ids), expected)
        prunepath.set_budget(model, 0.4)
        folder = tmp_path / f"{step}"
        model.save_pretrained(folder)


@torch.no_grad()
def test_a_causal_model_and_its_base_model_are_exchanged(make_calibrated, ids, tmp_path):
    model = make_calibrated("llama")
    expected = hidden(model, ids)
    model.model.save_pretrained(tmp_path / "base of the model in memory")
    model.save_pretrained(tmp_path / "causal")
    AutoModel.from_pretrained(tmp_path / "causal").save_pretrained(tmp_path / "base")
    for name in ("base", "base of the model in memory"):
        base = AutoModel.from_pretrained(tmp_path / name)
        assert torch.equal(hidden(base, ids), expected)
        assert prunepath.get_thresholds(base) == prunepath.get_thresholds(model)
        causal = AutoModelForCausalLM.from_pretrained(tmp_path / name)  # with a new head
        assert torch.equal(hidden(causal, ids), expected)
        causal.save_pretrained(tmp_path / f"{name} again")
        assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path / f"{name} again"), ids), expected)


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
@torch.no_grad()
def test_the_encoder_of_a_t5_loads_alone(kind, make_calibrated, ids, tmp_path):
    torch.manual_seed(0)
    config = copy.deepcopy(T5)
    config.feed_forward_proj = kind
    config = T5Config(**config.to_dict())
    model = make_calibrated(transformers.T5ForConditionalGeneration(config).eval())
    prunepath.set_threshold(model, [0.25, 0.5, 0.75])
    model.save_pretrained(tmp_path / "whole")
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "whole")
    assert prunepath.get_thresholds(encoder) == [0.25, 0.5]
    assert torch.equal(hidden(encoder, ids), hidden(model, ids))
    prunepath.set_budget(encoder, 0.2)
    encoder.save_pretrained(tmp_path / "encoder")
    again = transformers.T5EncoderModel.from_pretrained(tmp_path / "encoder")
    assert prunepath.get_thresholds(again) == pytest.approx([0.3, 0.3])
    assert torch.equal(hidden(again, ids), hidden(encoder, ids))
    with pytest.raises(prunepath.CheckpointError, match=r"got T5ForConditionalGeneration with decoder\.block\.0"):
        transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "encoder")


@torch.no_grad()
def test_a_headless_checkpoint_is_packed(make_calibrated, ids, tmp_path):
    model = make_calibrated(bert("BertModel"))
    expected = hidden(model, ids)
    model.save_pretrained(tmp_path / "base")
    pack(tmp_path / "base", tmp_path / "packed")
    for name in BERTS:
        loaded = getattr(transformers, name).from_pretrained(tmp_path / "packed")
        assert torch.equal(hidden(loaded, ids), expected)
        loaded.save_pretrained(tmp_path / name)
        assert torch.equal(hidden(AutoModel.from_pretrained(tmp_path / name), ids), expected)
