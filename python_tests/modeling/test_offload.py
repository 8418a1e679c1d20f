"""Expert offloading on the CPU: the cache computes what the model computes, and does what its simulation says."""

import collections

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

import prunepath
from prunepath.memory.offload import Call, SlotTable, expert_bytes, offload_experts, simulate


@pytest.fixture(params=["llama", "llama_mlp_bias", "opt", "phi3"])
def sparse(request, make_model, token_texts, small_config):
    if request.param == "phi3":
        torch.manual_seed(0)
        config = Phi3Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        dense = Phi3ForCausalLM(config).eval()
    else:
        dense = make_model(request.param)
    model = prunepath.convert(dense, None, token_texts, small_config)
    prunepath.set_budget(model, 0.3)
    return model


def text(length, seed=4):
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(seed))


def decode(model, ids):
    """The logits of each token, decoded one by one with a KV cache."""
    cache, logits = None, []
    for token in ids[0]:
        output = model(token[None, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[0, -1])
    return torch.stack(logits)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_the_output_is_that_without_a_cache(sparse):
    ids = text(40)
    with prunepath.record_counts(sparse) as before:
        expected = decode(sparse, ids)
        prompt = sparse(text(100)).logits
    greedy = sparse.generate(ids[:, :8], max_new_tokens=16, do_sample=False)
    size = expert_bytes(next(iter(prunepath.sparse_ffns(sparse).values())))
    cache = offload_experts(sparse, 9 * size + size // 2, "cpu")
    assert cache.slots == 9
    with prunepath.record_counts(sparse) as after:
        assert relative_error(decode(sparse, ids), expected) < 1e-5
        assert relative_error(sparse(text(100)).logits, prompt) < 1e-5
    assert [a.tolist() for a in after.histogram] == [b.tolist() for b in before.histogram]
    assert torch.equal(sparse.generate(ids[:, :8], max_new_tokens=16, do_sample=False), greedy)
    assert cache.statistics.hits > 0 and cache.statistics.misses > 0
    assert cache.statistics.moved_bytes == size * (cache.statistics.misses + cache.statistics.prefetched)
    prunepath.set_threshold(sparse, 1.0)
    everything = sparse(ids).logits
    sparse.to(torch.float32)
    assert all(ffn.run is not None for ffn in prunepath.sparse_ffns(sparse).values())
    assert relative_error(sparse(ids).logits, everything) < 1e-5


@pytest.mark.parametrize("slots", [8, 10, 13, 16])
@pytest.mark.parametrize("prefetch", [True, False])
@torch.no_grad()
def test_the_simulation_of_a_trace_is_what_the_cache_did(slots, prefetch, llama, token_texts, small_config):
    model = prunepath.convert(llama, None, token_texts, small_config)
    prunepath.set_budget(model, 0.3)
    size = expert_bytes(next(iter(prunepath.sparse_ffns(model).values())))
    cache = offload_experts(model, slots * size, "cpu", prefetch=prefetch)
    cache.calls = []
    decode(model, text(60))
    assert simulate(cache.calls, cache.slots, size) == cache.statistics
    assert len(cache.calls) == 2 * 60
    needed = sum(len(call.needed) for call in cache.calls)
    assert cache.statistics.hits + cache.statistics.misses == needed
    assert (cache.statistics.prefetched > 0) == prefetch or slots == 16
    if slots == 16:
        everything = {(call.ffn, expert) for call in cache.calls for expert in call.needed}
        assert cache.statistics.misses + cache.statistics.prefetched_used == len(everything)


def least_recently_used(calls, slots):
    """Misses of the cache as its definition says, without prefetching."""
    last, misses = collections.OrderedDict(), 0
    for call in calls:
        for expert in call.needed:
            misses += (call.ffn, expert) not in last
        for expert in call.needed:
            last[call.ffn, expert] = True
            last.move_to_end((call.ffn, expert))
        while len(last) > slots:
            last.popitem(last=False)
    return misses


@torch.no_grad()
def test_a_real_trace_misses_as_the_definition_of_the_cache_says(llama, token_texts, small_config):
    model = prunepath.convert(llama, None, token_texts, small_config)
    prunepath.set_budget(model, 0.3)
    cache = offload_experts(model, 1 << 30, "cpu", prefetch=False)
    cache.calls = []
    decode(model, text(80))
    before = None
    for slots in (8, 9, 11, 14, 16):
        statistics = simulate(cache.calls, slots)
        assert statistics.misses == least_recently_used(cache.calls, slots)
        assert before is None or statistics.misses <= before, "a larger cache never misses more"
        before = statistics.misses


def test_a_perfect_guess_leaves_no_misses_but_the_first_ffn_s():
    calls = []
    for token in range(10):
        first, second = [(2 * token + i) % 8 for i in (0, 1)], [(6 * token + i) % 8 for i in (0, 1)]
        calls += [Call(0, first, second), Call(1, second)]
    statistics = simulate(calls, 4, expert_bytes=10)
    assert (statistics.hits, statistics.misses) == (20, 20)
    assert statistics.prefetched_used == statistics.prefetched == 20
    assert statistics.moved_bytes == 400


def test_prefetching_leaves_the_experts_of_the_running_call_alone():
    table = SlotTable(4, 1)
    used = dict(table.use(0, [0, 1, 2]))
    ahead = dict(table.prefetch(1, [5, 6, 7], keep=3))
    assert list(ahead) == [5], "as many as fit"
    assert set(used.values()) | set(ahead.values()) == {0, 1, 2, 3}
    assert table.use(0, [0, 1, 2]) == []
    assert dict(table.use(1, [5, 6])).keys() == {6}
    assert table.statistics.prefetched_used == 1


def test_what_cannot_be_offloaded_is_refused(llama, token_texts, small_config):
    with pytest.raises(prunepath.PrunePathError, match="got a dense LlamaForCausalLM"):
        offload_experts(llama, 1 << 20, "cpu")
    model = prunepath.convert(llama, None, token_texts, small_config)
    with pytest.raises(prunepath.PrunePathError, match=r"room for the 8 experts of an FFN, \d+ bytes, got .* 9"):
        offload_experts(model, 9, "cpu")
    offload_experts(model, 1 << 20, "cpu")
    with pytest.raises(prunepath.PrunePathError, match="without gradients"):
        model(text(4))


@torch.no_grad()
def test_an_offloaded_model_can_be_saved_and_goes_on(llama, token_texts, small_config, tmp_path):
    model = prunepath.convert(llama, None, token_texts, small_config)
    prunepath.set_budget(model, 0.3)
    expected = model(text(30)).logits
    offload_experts(model, 1 << 20, "cpu")
    prunepath.save(model, None, tmp_path / "saved")
    assert relative_error(model(text(30)).logits, expected) < 1e-5
    again = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(again(text(30)).logits, expected)
    assert all(ffn.run is None for ffn in prunepath.sparse_ffns(again).values())
