import pytest
import torch

from prunepath.conversion.tokens import sample_windows, token_windows
from prunepath.errors import PrunePathError


class Letters:
    """A tokenizer of one token a character."""

    eos_token_id = 0

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}


def test_windows_hold_the_documents_in_order_with_an_end_between():
    windows = list(token_windows(["abc", "", "defg"], Letters(), 4))
    assert [w.tolist() for w in windows] == [[[97, 98, 99, 0]], [[100, 101, 102, 103]]]


def test_token_tensors_need_no_tokenizer():
    windows = list(token_windows([torch.tensor([[1, 2], [3, 4]]), torch.tensor([5, 6])], None, 4))
    assert [w.tolist() for w in windows] == [[[1, 2, 3, 4]], [[5, 6]]]


def test_a_sample_reads_only_as_far_as_it_must():
    def endless():
        value = 0
        while True:
            yield torch.arange(value, value + 10)
            value += 10

    sample = sample_windows(endless(), None, 5, 100, seed=3)
    assert sample.shape == (20, 5)
    assert len({tuple(row) for row in sample.tolist()}) == 20
    assert all(row == list(range(row[0], row[0] + 5)) and row[0] % 5 == 0 for row in sample.tolist())
    assert torch.equal(sample, sample_windows(endless(), None, 5, 100, seed=3))
    assert not torch.equal(sample, sample_windows(endless(), None, 5, 100, seed=4))


def test_short_data_is_cut_into_shorter_windows():
    assert sample_windows([torch.arange(100)], None, 256, 10_000, seed=0).shape == (8, 12)


@pytest.mark.parametrize(
    ("texts", "tokenizer", "message"),
    [
        ([], None, "at least 64 tokens, got 0"),
        ([torch.arange(63)], None, "got 63"),
        ("one string", Letters(), "got one string"),
        (["text"], None, "token ids, got str"),
        ([torch.rand(100)], None, "token ids, got torch.float32"),
        ([torch.arange(100)], Letters(), "must be strings, got Tensor"),
    ],
)
def test_bad_data_is_named(texts, tokenizer, message):
    with pytest.raises(PrunePathError, match=message):
        sample_windows(texts, tokenizer, 16, 1000, seed=0)
