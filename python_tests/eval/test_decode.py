"""No speed is reported for a model that at threshold 1 is not its dense model."""

import pytest
import torch

import prunepath
from prunepath.errors import PrunePathError
from prunepath.eval import decode
from prunepath.eval.decode import DecodeLoop, check_equals_dense, decode_speed, greedy

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


def test_the_loop_decodes_what_generate_does_again_and_again(sparse):
    prunepath.set_threshold(sparse, 0.5)
    loop = DecodeLoop(sparse, 1, 20)
    for prompt in (PROMPT, PROMPT.flip(1)):
        expected = sparse.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert loop.generate(prompt, 12).tolist() == expected[:, 3:].tolist()


def test_a_compiled_loop_follows_every_sequences_budget(sparse):
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    prunepath.set_request_budgets(sparse, [0.25, 1.0])
    loop = DecodeLoop(sparse, 2, 20, compiled=True)
    with torch.compiler.set_stance("fail_on_recompile"):
        results = {}
        for budgets in ((0.25, 1.0), (1.0, 0.25)):
            prunepath.set_request_budgets(sparse, budgets)
            loop.start(prompts)
            loop.step(feed=torch.tensor([[11], [12]]))
            results[budgets] = loop.logits.clone()
    prunepath.set_request_budgets(sparse, None)
    for budgets, actual in results.items():
        for row, budget in enumerate(budgets):
            prunepath.set_budget(sparse, budget)
            alone = DecodeLoop(sparse, 1, 20)
            alone.start(prompts[row : row + 1])
            alone.step(feed=torch.tensor([[11 + row]]))
            assert (actual[row] - alone.logits[0]).norm() < 1e-4 * actual[row].norm()
    first, second = results.values()
    assert (first - second).norm(dim=1).min() > 1e-3 * first.norm(), "the budgets make a difference"


def test_the_loop_refuses_what_its_cache_cannot_hold(dense):
    loop = DecodeLoop(dense, 1, 5)
    for prompt in (torch.zeros(1, 5, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(PrunePathError, match=r"input_ids of shape \[1, 1 to 4\], got"):
            loop.start(prompt)
    loop.start(PROMPT)
    loop.step()
    with pytest.raises(PrunePathError, match="at most 5 tokens"):
        loop.step()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_cuda_graph_decodes_as_steps_do_and_follows_the_budgets(sparse, dtype, compiled):
    sparse = sparse.to("cuda", dtype)
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]], device="cuda")
    feed = torch.tensor([[11], [12]], device="cuda")
    prunepath.set_request_budgets(sparse, [1.0, 1.0])
    loop = DecodeLoop(sparse, 2, 20, compiled=compiled)
    assert loop._graph is not None
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    seen = []
    for budgets in ([1.0, 1.0], [0.25, 1.0], [0.5, 0.25]):
        prunepath.set_request_budgets(sparse, budgets)
        loop.start(prompts)
        loop.step(feed)
        seen.append(loop.logits.clone())
        with torch.inference_mode():
            expected = sparse(torch.cat([prompts, feed], 1), use_cache=False).logits[:, -1]
        assert (seen[-1] - expected).norm() < tolerance * expected.norm()
    assert (seen[0] - seen[1])[0].norm() > 1e-3 * seen[0][0].norm()
    prunepath.set_budget(sparse, 0.25)  # all sequences, still without a capture
    loop.start(prompts)
    loop.step(feed)
    assert not torch.equal(loop.logits[0], seen[0][0])
