"""Shrunk checkpoints: fewer experts, as measured before, that load, pack and train like any other."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import prunepath
from prunepath.convert.batches import mean_loss
from prunepath.modeling import converting
from prunepath.nn.observers import observing_inputs
from prunepath.offload import expert_bytes, offload_experts, simulate
from prunepath.packing import pack
from prunepath.shrinking import Plan


def converted(make_model, family, texts, config, center=None):
    if family == "gpt2":
        torch.manual_seed(0)
        sizes = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
        dense = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).eval()
    else:
        dense = make_model(family)
    config = prunepath.PrunePathConfig(**{**vars(config), "center": center})
    return prunepath.convert(dense, None, texts, config)


def at_share(plan, share):
    return min(plan.candidates, key=lambda candidate: abs(candidate.share - share))


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(params=[("llama", False), ("llama", True), ("opt", True), ("gpt2", False)], ids=str)
def plan(request, make_model, token_texts, small_config):
    model = converted(make_model, request.param[0], token_texts, small_config, request.param[1])
    return Plan(model, None, token_texts, 0.4)


@torch.no_grad()
def test_planning_leaves_the_model_as_it_is(make_model, token_texts, small_config, ids):
    model = converted(make_model, "llama", token_texts, small_config, True)
    prunepath.set_budget(model, 0.5)
    expected = model(ids).logits
    plan = Plan(model, None, token_texts, 0.4)
    assert torch.equal(model(ids).logits, expected)
    shares = [candidate.share for candidate in plan.candidates]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1.0 and shares[-1] < 0.5
    for larger, smaller in zip(plan.candidates, plan.candidates[1:], strict=False):
        assert all(set(b) <= set(a) for a, b in zip(larger.kept, smaller.kept, strict=True)), "nested"


@torch.no_grad()
def test_what_was_measured_is_what_the_smaller_model_does(plan):
    candidate = at_share(plan, 0.6)
    plan.apply(candidate)
    ffns = prunepath.sparse_ffns(plan.model).values()
    assert [ffn.num_experts for ffn in ffns] == [len(kept) for kept in candidate.kept]
    # At the candidate's own thresholds, which calibration then replaced, the losses were equal.
    from prunepath.modeling import calibration_sample
    from prunepath.train.calibration import Search

    search = Search(list(ffns), lambda: None)
    search.fit(calibration_sample(plan.model, plan._fit), search.scaled(plan.fractions, plan.budget))
    assert mean_loss(plan.model, plan._choose) == pytest.approx(candidate.loss, rel=1e-4)


@torch.no_grad()
def test_a_shrunk_checkpoint_loads_packs_and_offloads(plan, ids, tmp_path):
    plan.apply(at_share(plan, 0.6))
    model = plan.model
    prunepath.set_budget(model, 0.4)
    with prunepath.record_counts(model) as counts:
        expected = model(ids).logits
    assert counts.active_fraction == pytest.approx(0.4, abs=0.08), "of the dense model's neurons"
    prunepath.save(model, None, tmp_path / "small")
    sizes = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert sizes["format_version"] == 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(again(ids).logits, expected)
    assert prunepath.get_thresholds(again) == prunepath.get_thresholds(model)
    pack(tmp_path / "small", tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert relative_error(packed(ids).logits, expected) < 1e-5
    offload_experts(again, 1 << 20, "cpu")
    assert relative_error(again(ids).logits, expected) < 1e-5
    model.train()
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()


@torch.no_grad()
def test_the_masked_and_the_sparse_computation_agree(plan, ids):
    plan.apply(at_share(plan, 0.6))
    prunepath.set_budget(plan.model, 0.4)
    expected = plan.model(ids).logits
    with torch.enable_grad():
        assert relative_error(plan.model(ids).logits.detach(), expected) < 1e-5


PLAIN = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
assert "prunepath" not in sys.modules
"""


def run_plain(folder, ids, tmp_path):
    torch.save(ids, tmp_path / "ids")
    command = [sys.executable, "-c", PLAIN, folder, tmp_path / "ids", tmp_path / "logits"]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@torch.no_grad()
def test_padded_it_loads_without_prunepath_as_the_same_dense_model(
    family, make_model, token_texts, small_config, ids, tmp_path
):
    plan = Plan(converted(make_model, family, token_texts, small_config, False), None, token_texts, 0.4, by="rate")
    plan.apply(at_share(plan, 0.5), pad=True)
    prunepath.save(plan.model, None, tmp_path / "padded")
    result = run_plain(tmp_path / "padded", ids, tmp_path)
    assert result.returncode == 0, result.stderr
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    prunepath.set_threshold(again, 1.0)
    assert relative_error(again(ids).logits, torch.load(tmp_path / "logits")) < 1e-5
    prunepath.set_budget(again, 0.4)
    used = prunepath.sparse_ffns(again).values()
    left = again.config.quantization_config["shrinking"]["experts"]
    for ffn, count in zip(used, left, strict=True):
        expert_ids, _, _ = ffn.route(torch.randn(50, ffn.hidden_size))
        assert expert_ids.max() < count, "no token runs padding"


def test_with_unequal_widths_transformers_without_prunepath_refuses_it(
    make_model, token_texts, small_config, ids, tmp_path
):
    plan = Plan(converted(make_model, "llama", token_texts, small_config), None, token_texts, 0.4)
    plan.apply(at_share(plan, 0.6))
    prunepath.save(plan.model, None, tmp_path / "small")
    result = run_plain(tmp_path / "small", ids, tmp_path)
    assert result.returncode != 0 and "mismatch" in result.stderr
    assert not (tmp_path / "logits").exists()


def test_choosing_by_rise_and_by_rate(make_model, token_texts, small_config):
    plan = Plan(converted(make_model, "llama", token_texts, small_config), None, token_texts, 0.4, by="rate")
    first, *others = plan.candidates
    assert plan.choose(rate=0.0) is first
    assert plan.choose(rate=1.0).share == others[-1].share
    assert plan.choose(max_rise=1e9).share == others[-1].share
    chosen = plan.choose(max_rise=0.0)
    assert chosen.rise <= 0 and all(c.share >= chosen.share or c.rise > 0 for c in plan.candidates)


def test_what_cannot_be_shrunk_is_refused(make_model, token_texts, small_config):
    with pytest.raises(prunepath.PrunePathError, match="dense"):
        Plan(make_model("llama"), None, token_texts, 0.4)
    model = converted(make_model, "llama", token_texts, small_config, True)
    with pytest.raises(prunepath.PrunePathError, match="by must be one of loss, rate, got 'luck'"):
        Plan(model, None, token_texts, 0.4, by="luck")
    plan = Plan(model, None, token_texts, 0.4)
    with pytest.raises(prunepath.PrunePathError, match="no folding with padding"):
        plan.apply(plan.candidates[4], pad=True)
    plan.apply(plan.candidates[4])
    with pytest.raises(prunepath.PrunePathError, match="shrunk already"):
        Plan(model, None, token_texts, 0.4)


def missing(ffn, kept, batches, model):
    """The error of the first FFN's selected experts against all of them, for its inputs in these batches."""
    errors = []

    def observe(ffn, x):
        hidden = ffn.hidden(x)
        selected = ffn.skip(hidden, ffn.active_mask(x)) @ ffn.down_weight().t()
        if ffn.removed_output is not None:
            selected = selected + ffn.removed_output
        errors.append((hidden @ ffn.true_down.t() - selected).square().sum())

    with observing_inputs({ffn: observe}):
        for batch in batches:
            model(batch["input_ids"])
    return sum(errors).item()


@pytest.mark.parametrize("center", [False, True])
@torch.no_grad()
def test_experts_that_stay_take_over_what_they_can_of_those_that_went(center, make_model, token_texts, small_config):
    model = converted(make_model, "llama", token_texts, small_config, center)
    ffn = next(iter(prunepath.sparse_ffns(model).values()))
    downs = {}
    for tokens in (0, 1024):
        plan = Plan(model, None, token_texts, 0.4, fold=False, refit_tokens=tokens)
        before = ffn.down_weight().clone()
        kept = [[0, 2, 3, 5, 7], [1, 2, 3, 4, 6]]
        with converting(model, small_config):
            plan._imitate(kept)
            ffn.true_down = before
            downs[tokens] = ffn.down_weight().clone(), missing(ffn, kept[0], plan._fit, model)
        plan._restore()
        assert torch.equal(ffn.down_weight(), before)
    assert torch.equal(downs[0][0], before)
    gone = torch.ones(8, dtype=torch.bool)
    gone[kept[0]] = False
    columns = gone.repeat_interleave(ffn.expert_width)
    assert torch.equal(downs[1024][0][:, columns], before[:, columns])
    assert downs[1024][1] < 0.98 * downs[0][1]


@torch.no_grad()
def test_shrunk_models_with_unequal_layers_are_offloaded_to_the_same_output(plan, ids):
    first, second = prunepath.sparse_ffns(plan.model).values()
    candidate = dataclasses.replace(plan.candidates[1], kept=[[0, 2, 3, 5, 7], [1, 4, 6]])
    plan.apply(candidate)
    assert (first.num_experts, second.num_experts) == (5, 3)
    prunepath.set_budget(plan.model, 0.3)
    expected = plan.model(ids).logits
    with pytest.raises(prunepath.PrunePathError, match="room for the 5 experts"):
        offload_experts(plan.model, 4 * expert_bytes(first), "cpu")
    cache = offload_experts(plan.model, 5 * expert_bytes(first), "cpu")
    cache.calls = []
    for _ in range(3):
        assert relative_error(plan.model(ids).logits, expected) < 1e-5
    assert simulate(cache.calls, 5, expert_bytes(first)) == cache.statistics
    assert cache.statistics.hits > 0 and cache.statistics.misses > 5
