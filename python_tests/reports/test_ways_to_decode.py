"""Every way of decoding that transformers has without code from the hub: equal to the dense model at budget 1."""

import copy

import pytest
import torch

import prunepath

WAYS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams and static cache": {"num_beams": 2, "cache_implementation": "static"},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "guidance": {"guidance_scale": 1.5},
    "chunked prefill": {"prefill_chunk_size": 4},
}
ONE_SEQUENCE = ("prompt lookup", "assistant")


def generate(model, ids, way, **options):
    torch.manual_seed(0)
    rows = ids[:1] if way in ONE_SEQUENCE else ids
    fixed = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "disable_compile": True}
    mask = torch.ones_like(rows)
    return model.generate(rows, attention_mask=mask, **(fixed | WAYS.get(way, {}) | options))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_budget_1_is_the_dense_model_and_less_runs(make_model, make_sparse, family, way, ids):
    dense = make_model(family)
    sparse = make_sparse(copy.deepcopy(dense))
    expected = generate(dense, ids, way)
    assert torch.equal(generate(sparse, ids, way), expected)
    prunepath.set_threshold(sparse, 0.5)
    with prunepath.record_counts(sparse) as record:
        found = generate(sparse, ids, way)
    assert found.shape == expected.shape and not torch.equal(found, expected)
    assert 0 < record.active_fraction < 1


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_sparse_model_is_assistant_and_assisted(make_model, make_sparse, family, ids):
    dense = make_model(family)
    expected = generate(dense, ids, "assistant")
    sparse, draft = make_sparse(copy.deepcopy(dense)), make_sparse(copy.deepcopy(dense))
    prunepath.set_threshold(draft, 0.5)
    assert torch.equal(generate(dense, ids, "assistant", assistant_model=draft), expected)
    assert torch.equal(generate(sparse, ids, "assistant", assistant_model=draft), expected)
    prunepath.set_threshold(sparse, 0.5)
    expected = generate(sparse, ids, "assistant")
    assert torch.equal(generate(sparse, ids, "assistant", assistant_model=dense), expected)


def test_requests_keep_their_budgets_under_beams(make_sparse, ids):
    model = make_sparse("llama")
    alone = []
    for row, threshold in zip(ids.split(1), (0.4, 1.0), strict=True):
        prunepath.set_threshold(model, threshold)
        alone.append(generate(model, row, "beams"))
    for ffn in prunepath.sparse_ffns(model).values():
        ffn.set_request_thresholds([0.4, 1.0])
    assert torch.equal(generate(model, ids, "beams"), torch.cat(alone))


def test_left_padding_changes_nothing(make_sparse, ids):
    model = make_sparse("llama")
    prunepath.set_threshold(model, 0.5)
    short = ids[:1, 5:]
    batch = torch.cat([ids[:1], torch.cat([torch.full((1, 5), 1), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    together = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(together[1, 12:], model.generate(short, **options)[0, short.shape[1] :])
    assert torch.equal(together[0], model.generate(ids[:1], **options)[0])
