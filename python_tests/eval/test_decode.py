"""No speed is reported for a model that at threshold 1 is not its dense model."""

import pytest
import torch

import prunepath
from prunepath.errors import PrunePathError
from prunepath.eval import decode
from prunepath.eval.decode import check_equals_dense, decode_speed, greedy

PROMPT = torch.tensor([[5, 6, 7]])


def test_greedy_is_what_generate_gives(dense):
    expected = dense.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens, logits, seconds = greedy(dense, PROMPT, 12)
    assert tokens.tolist() == expected[0, 3:].tolist()
    assert logits.shape == (12, 257)
    assert seconds > 0


def test_speed_of_an_equal_model_is_measured_and_its_thresholds_kept(dense, sparse):
    prunepath.set_threshold(sparse, [0.5, 0.25])
    speed = decode_speed(dense, sparse, PROMPT, new_tokens=4, repeats=2)
    assert speed.tokens_per_second > 0
    assert speed.dense_tokens_per_second > 0
    assert prunepath.get_thresholds(sparse) == [0.5, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_differs_at_threshold_1_gets_no_speed(dense, sparse, dtype, monkeypatch):
    dense, sparse = dense.to(dtype), sparse.to(dtype)
    check_equals_dense(dense, sparse, PROMPT, 8)
    calls = []
    monkeypatch.setattr(decode.time, "perf_counter", lambda: calls.append(1) or 0.0)
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.weight.mul_(3)
    prunepath.set_threshold(sparse, 0.5)
    with pytest.raises(PrunePathError, match="no speed is reported"):
        decode_speed(dense, sparse, PROMPT, new_tokens=8, repeats=1)
    assert prunepath.get_thresholds(sparse) == [0.5, 0.5]
    assert len(calls) == 4  # the two runs of the check, and no timed one


def test_numbers_that_leave_nothing_to_time_are_refused(dense, sparse):
    with pytest.raises(PrunePathError, match="new_tokens of at least 2"):
        decode_speed(dense, sparse, PROMPT, new_tokens=1)
