"""What a model may be converted with: texts and batches, for decoders, encoders and encoder-decoders."""

import dataclasses

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import prunepath
from prunepath.checkpoint.description import description_of

VOCABULARY = 97
CONFIG = prunepath.PrunePathConfig(sequence_length=32, partition_tokens=256, router_tokens=512, calibration_tokens=256)


def make_model(kind):
    torch.manual_seed(0)
    if kind == "t5":
        shared = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
        return T5ForConditionalGeneration(T5Config(**shared, pad_token_id=0, decoder_start_token_id=0)).eval()
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shared, initializer_range=0.2)).eval()
    return {"bert": BertModel, "masked_bert": BertForMaskedLM}[kind](BertConfig(**shared)).eval()


def tokens(rows=24, length=60):
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def batches(kind, pad=0, size=4):
    """Ready batches; with `pad` tokens of value 1 and no meaning behind each row."""
    made = []
    for ids in tokens().split(size):
        padding = torch.ones(len(ids), pad, dtype=torch.long)
        batch = {"input_ids": torch.cat([ids, padding], 1)}
        batch["attention_mask"] = torch.cat([torch.ones_like(ids), torch.zeros_like(padding)], 1)
        if kind != "bert":
            batch["labels"] = torch.cat([ids, torch.full_like(padding, -100)], 1)
        made.append(batch)
    return made


def fraction(model, kind, budget):
    prunepath.set_budget(model, budget)
    with torch.no_grad(), prunepath.record_counts(model) as record:
        for batch in batches(kind):
            model(**batch)
    return record.active_fraction


@pytest.mark.parametrize("kind", ["llama", "bert", "masked_bert", "t5"])
@pytest.mark.parametrize(("ready", "width"), [(False, 1), (True, 1), (True, 8)])
def test_every_kind_of_model_obtains_its_budget(kind, ready, width):
    model = make_model(kind)
    config = dataclasses.replace(CONFIG, expert_width=width)
    prunepath.convert(model, None, batches(kind) if ready else list(tokens()), config)
    assert abs(fraction(model, kind, 0.4) - 0.4) < 0.06
    calibration = description_of(model).calibration
    assert len(calibration["routers"]) == 2
    assert all(row["kl"] > 0 and 0.25 < row["recall"] <= 1 for row in calibration["routers"])
    if kind == "bert":
        assert all(calibration[name] is None for name in ("dense_loss", "routed_loss", "static_loss"))
    else:
        assert all(calibration[name] > 0 for name in ("dense_loss", "routed_loss", "static_loss"))


@pytest.mark.parametrize(("kind", "width"), [("llama", 1), ("llama", 8), ("t5", 1)])
def test_padding_changes_nothing(kind, width):
    """Neither partition, routers and thresholds, nor what is counted.

    Tables stay numbers: one of thousands may be near the middle of two codes of 4 bits, and become either.
    """
    config = dataclasses.replace(CONFIG, expert_width=width, router_bits=16)
    plain, padded = make_model(kind), make_model(kind)
    prunepath.convert(plain, None, batches(kind), config)
    prunepath.convert(padded, None, batches(kind, pad=9), config)
    for (path, a), b in zip(plain.state_dict().items(), padded.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=2e-3), path
    records = []
    for model, pad in ((plain, 0), (plain, 9)):
        prunepath.set_budget(model, 0.4)
        with torch.no_grad(), prunepath.record_counts(model) as record:
            for batch in batches(kind, pad=pad):
                model(**batch)
        records.append(record)
    assert [h.sum() for h in records[0].histogram] == [h.sum() for h in records[1].histogram]
    assert abs(records[0].active_fraction - records[1].active_fraction) < 1e-3


def test_routers_train_alike_under_autocast():
    exact, mixed = make_model("llama"), make_model("llama")
    config = dataclasses.replace(CONFIG, router_tokens=1024)
    prunepath.convert(exact, None, batches("llama"), config)
    prunepath.convert(mixed, None, batches("llama"), dataclasses.replace(config, autocast="bfloat16"))
    a, b = (prunepath.sparse_ffns(m)["model.layers.0.mlp"].router.floor for m in (exact, mixed))
    assert not torch.equal(a, b) and b.dtype == torch.float32
    assert ((a - b).norm() / a.norm()).item() < 0.1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"input_ids": torch.ones(2, 40, dtype=torch.long)}], "2 or more batches, got 80 in 1"),
        ([{"ids": torch.ones(2, 40)}], "a tensor input_ids"),
    ],
)
def test_bad_batches_are_named(data, message):
    model = make_model("llama")
    with pytest.raises(prunepath.PrunePathError, match=message):
        prunepath.convert(model, None, data, CONFIG)
    assert not prunepath.is_sparse(model)
