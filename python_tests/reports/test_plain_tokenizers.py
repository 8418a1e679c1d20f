"""Tokenizers without special tokens, and those that give no attention mask unless asked."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

import prunepath
from prunepath.cli.app import app
from prunepath.eval.perplexity import evaluate


def characters(**options):
    """One token a letter, and no special ones."""
    vocabulary = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ?")}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


@pytest.fixture
def model(llama, small_config):
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(llama.config, name, None)
    llama.generation_config = GenerationConfig()
    return llama


@pytest.mark.parametrize("arguments", [["--temperature", "1"], []])
@pytest.mark.parametrize("names", [None, ["input_ids"]])
def test_generate_works_without_special_tokens_and_masks(make_sparse, model, names, arguments, tmp_path):
    make_sparse(model).save_pretrained(tmp_path)
    options = {} if names is None else {"model_input_names": names}
    characters(**options).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id is None and tokenizer.pad_token_id is None and tokenizer.bos_token_id is None
    assert names is None or "attention_mask" not in tokenizer("a b")
    command = ["generate", str(tmp_path), "a word", "--max-new-tokens", "4", "--threshold", "0.6", *arguments]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["new_tokens"] == 4
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and shown.stdout.startswith("a word"), shown.output
    empty = CliRunner().invoke(app, ["generate", str(tmp_path), ""])
    assert empty.exit_code == 2 and "at least one token, got an empty one" in empty.stderr


def test_convert_and_evaluate_work_without_special_tokens(model, small_config):
    texts = ["the quick brown fox jumps over the lazy dog"] * 40
    tokenizer = characters(model_input_names=["input_ids"])
    prunepath.convert(model, tokenizer, texts, small_config)
    prunepath.set_budget(model, 0.5)
    measured = evaluate(model, tokenizer, texts, sequence_length=32, max_tokens=50)
    assert measured.tokens == 50 and measured.bytes > 0
    assert torch.isfinite(torch.tensor(measured.nll))
