"""Every token of a text is predicted once, whatever the windows, and bytes are those of the same tokens."""

import math

import pytest
import torch
from torch.nn import functional as F

import prunepath
from prunepath.errors import PrunePathError
from prunepath.eval.perplexity import evaluate


@pytest.fixture
def uniform(dense):
    """A model that gives all 257 tokens the same probability."""
    torch.nn.init.zeros_(dense.lm_head.weight)
    return dense


@pytest.mark.parametrize("sequence_length", [1, 3, 64])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_uniform_model_pays_log2_of_the_vocabulary_for_each_byte(uniform, tokenizer, sequence_length, batch_size):
    texts = ["abc", "dé\n", "", "x" * 30]
    result = evaluate(uniform, tokenizer, texts, sequence_length=sequence_length, batch_size=batch_size)
    assert result.tokens == result.bytes == 3 + 4 + 30
    assert result.perplexity == pytest.approx(257, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(257), rel=1e-5)
    assert result.active_fraction == 1.0


def test_one_window_gives_the_loss_of_the_joined_text(dense, tokenizer):
    texts = ["first text", "second"]
    ids = torch.tensor([[0, *tokenizer(texts[0])["input_ids"], 0, *tokenizer(texts[1])["input_ids"]]])
    with torch.no_grad():
        losses = F.cross_entropy(dense(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    expected = losses.sum() - losses[len(texts[0])]  # the second beginning is not predicted
    result = evaluate(dense, tokenizer, texts, sequence_length=100)
    assert result.tokens == 16
    assert result.nll == pytest.approx(expected.item(), rel=1e-5)


def test_windows_take_their_context_from_inside_alone(dense, tokenizer):
    ids = torch.tensor([0, *tokenizer("abcdefg")["input_ids"]])
    expected = 0.0
    with torch.no_grad():
        for start in (0, 3, 6):
            window = ids[start : start + 4]
            expected += F.cross_entropy(dense(window[None]).logits[0, :-1], window[1:], reduction="sum").item()
    result = evaluate(dense, tokenizer, ["abcdefg"], sequence_length=3)
    assert result.tokens == 7
    assert result.nll == pytest.approx(expected, rel=1e-5)


def test_max_tokens_stops_in_the_middle_of_a_text(uniform, tokenizer):
    result = evaluate(uniform, tokenizer, iter(["abcde", "fghij", "klm"]), sequence_length=4, max_tokens=8)
    assert (result.tokens, result.bytes) == (8, 8)


def test_without_a_beginning_token_the_first_token_is_context(uniform, tokenizer_without_start):
    result = evaluate(uniform, tokenizer_without_start, ["abcde", "fgh"], sequence_length=4)
    assert (result.tokens, result.bytes) == (6, 6)


def test_token_ids_need_no_tokenizer_and_have_no_bytes(uniform):
    ids = [torch.tensor([1, 2, 3, 4]), torch.tensor([[5, 6]])]
    result = evaluate(uniform, None, ids, sequence_length=4)
    assert result.tokens == 4
    assert result.bytes is None
    assert result.bits_per_byte is None
    assert result.perplexity == pytest.approx(257, rel=1e-5)


def test_a_sparse_model_reports_its_active_fraction_and_a_dense_budget_the_dense_loss(dense, sparse, tokenizer, texts):
    expected = evaluate(dense, tokenizer, texts[:3], sequence_length=64)
    prunepath.set_budget(sparse, 1.0)
    result = evaluate(sparse, tokenizer, texts[:3], sequence_length=64)
    assert result.active_fraction == 1.0
    assert result.nll == pytest.approx(expected.nll, rel=1e-5)
    prunepath.set_threshold(sparse, 1e-6)
    result = evaluate(sparse, tokenizer, texts[:3], sequence_length=64)
    assert result.active_fraction == pytest.approx(1 / 8)
    assert result.nll != pytest.approx(expected.nll, rel=1e-3)


@pytest.mark.parametrize("texts", [[], [""]])
def test_nothing_to_predict_is_refused(dense, tokenizer, texts):
    with pytest.raises(PrunePathError, match="nothing to predict"):
        evaluate(dense, tokenizer, texts, sequence_length=4)


@pytest.mark.parametrize("name", ["sequence_length", "max_tokens", "batch_size"])
def test_numbers_below_one_are_refused(dense, tokenizer, name):
    with pytest.raises(PrunePathError, match=f"{name} must be at least 1, got 0"):
        evaluate(dense, tokenizer, ["a"], **({"sequence_length": 4} | {name: 0}))
