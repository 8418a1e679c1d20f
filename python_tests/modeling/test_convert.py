import copy
import dataclasses

import pytest
import torch

import prunepath

GENERATE = {"max_new_tokens": 12, "do_sample": False}


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_a_converted_model_is_dense_until_a_budget_is_set(dense, token_texts, small_config, ids):
    sparse = prunepath.convert(copy.deepcopy(dense), None, token_texts, small_config)
    mask = torch.ones_like(ids)
    assert relative_error(sparse(ids).logits, dense(ids).logits) < 1e-6
    assert torch.equal(
        sparse.generate(ids, attention_mask=mask, **GENERATE), dense.generate(ids, attention_mask=mask, **GENERATE)
    )


@torch.no_grad()
def test_the_prefill_path_is_dense_at_threshold_1(dense, token_texts, small_config):
    sparse = prunepath.convert(copy.deepcopy(dense), None, token_texts, small_config)
    long = torch.stack([text[:100] for text in token_texts[:2]])
    assert relative_error(sparse(long).logits, dense(long).logits) < 1e-6


@torch.no_grad()
def test_a_centred_model_may_be_packed_under_autocast(llama, token_texts, small_config, ids):
    sparse = prunepath.convert(llama, None, token_texts, dataclasses.replace(small_config, center=True))
    expected = sparse(ids).logits
    sparse.load_state_dict(sparse.state_dict())  # lays the weights out as they were before they were packed
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(sparse(ids).logits.float(), expected) < 5e-2


@pytest.mark.parametrize(("budget", "grouped"), [(0.25, True), (0.9, False)])
def test_prefill_reads_active_experts_where_they_are_few(llama, token_texts, small_config, budget, grouped):
    sparse = prunepath.convert(llama, None, token_texts, small_config)
    prunepath.set_budget(sparse, budget)
    long = torch.stack([text[:100] for text in token_texts[:2]])
    masked = sparse(long).logits  # with gradients
    with torch.no_grad():
        assert relative_error(sparse(long).logits, masked) < 1e-5
        ffns = list(prunepath.sparse_ffns(sparse).values())
        x = torch.randn(200, ffns[0].hidden_size)
        chosen = {ffn.reads_active_experts(x) for ffn in ffns}
    assert grouped in chosen


@torch.no_grad()
def test_a_budget_sets_the_active_fraction(dense, token_texts, small_config):
    sparse = prunepath.convert(dense, None, token_texts, small_config)
    fractions = []
    for budget in (0.75, 0.5, 0.25):
        prunepath.set_budget(sparse, budget)
        with prunepath.record_counts(sparse) as record:
            sparse(torch.stack([text[:64] for text in token_texts]))
        fractions.append(record.active_fraction)
        assert abs(record.active_fraction - budget) < 0.05
        assert sum(counts.sum().item() for counts in record.histogram) == 2 * 64 * len(token_texts)
    assert fractions == sorted(fractions, reverse=True)


def test_kernels_and_autograd_compute_the_same_sparse_model(dense, token_texts, small_config, ids):
    sparse = prunepath.convert(dense, None, token_texts, small_config)
    prunepath.set_budget(sparse, 0.3)
    with torch.no_grad():
        kernels = sparse(ids).logits
    autograd = sparse(ids).logits
    assert autograd.requires_grad
    assert relative_error(autograd, kernels) < 1e-5
    prunepath.set_budget(sparse, 1.0)
    assert relative_error(sparse(ids).logits, kernels) > 1e-3, "a budget of 0.3 must change this model's output"


@pytest.mark.parametrize("generation", ["greedy", "sample", "beams", "static_cache"])
def test_sparse_generation_equals_a_forward_pass_over_its_text(llama, token_texts, small_config, generation, ids):
    options = {
        "greedy": {"do_sample": False},
        "sample": {"do_sample": True, "temperature": 0.8},
        "beams": {"do_sample": False, "num_beams": 3},
        "static_cache": {"do_sample": False, "cache_implementation": "static"},
    }[generation]
    sparse = prunepath.convert(llama, None, token_texts, small_config)
    prunepath.set_budget(sparse, 0.3)
    torch.manual_seed(0)
    text = sparse.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, **options)
    assert text.shape == (2, 20) and torch.equal(text[:, :12], ids)
    if generation in ("greedy", "static_cache"):
        with torch.no_grad():
            expected = sparse(text).logits[:, 11:-1].argmax(-1)
        expected[expected == 1] = text[:, 12:][expected == 1]  # min_new_tokens forbids the end-of-text token
        assert torch.equal(text[:, 12:], expected)


@torch.no_grad()
def test_conversion_is_repeatable(token_texts, small_config, llama):
    first = prunepath.convert(copy.deepcopy(llama), None, token_texts, small_config)
    second = prunepath.convert(copy.deepcopy(llama), None, token_texts, small_config)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert first.config.quantization_config == second.config.quantization_config


@torch.no_grad()
@pytest.mark.parametrize("partition", ["coactivation", "weights", "contiguous", "random"])
@pytest.mark.parametrize("center", [True, False])
def test_every_partition_and_centring_is_exact_at_threshold_1(llama, token_texts, small_config, partition, center, ids):
    config = dataclasses.replace(small_config, partition=partition, center=center, router_tokens=256)
    sparse = prunepath.convert(copy.deepcopy(llama), None, token_texts, config)
    assert all((ffn.center is not None) == center for ffn in prunepath.sparse_ffns(sparse).values())
    assert relative_error(sparse(ids).logits, llama(ids).logits) < 1e-6


@torch.no_grad()
def test_trained_routers_beat_untrained_ones(llama, token_texts, small_config):
    """At equal active fractions, sparse output is closer to dense with a trained router than with a random one."""
    config = dataclasses.replace(small_config, router_tokens=3072, calibration_tokens=256)
    long = torch.stack([text[:100] for text in token_texts])
    expected = llama(long).logits
    sparse = prunepath.convert(llama, None, token_texts, config)
    errors = {}
    for router in ("trained", "untrained"):
        if router == "trained":
            prunepath.set_budget(sparse, 0.5)
        else:
            for ffn in prunepath.sparse_ffns(sparse).values():
                ffn.router.weight.normal_(std=0.02)
                ffn.router.bias.zero_()
            prunepath.set_threshold(sparse, 0.5)
        with prunepath.record_counts(sparse) as record:
            errors[router] = relative_error(sparse(long).logits, expected)
        assert abs(record.active_fraction - 0.5) < 0.06
    assert errors["trained"] < 0.95 * errors["untrained"]


def test_a_training_step_reaches_the_packed_weights(llama, token_texts, small_config, ids):
    sparse = prunepath.convert(llama, None, token_texts, small_config)
    prunepath.set_budget(sparse, 0.5)
    with torch.no_grad():
        before = sparse(ids).logits
    sparse.train()
    loss = sparse(ids, labels=ids).loss
    loss.backward()
    ffn = prunepath.sparse_ffns(sparse)["model.layers.0.mlp"]
    assert ffn.up_proj.weight.grad.abs().sum() > 0 and ffn.down_proj.weight.grad.abs().sum() > 0
    assert ffn.router.weight.grad is None, "the selection passes no gradient"
    torch.optim.SGD(sparse.parameters(), lr=0.1).step()
    sparse.eval()
    with torch.no_grad():
        after = sparse(ids).logits
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, sparse(ids).logits) < 1e-5


def test_compiled_decoding_follows_the_threshold_without_recompiling(llama, token_texts, small_config, ids):
    sparse = prunepath.convert(llama, None, token_texts, small_config)
    compiled = torch.compile(sparse, fullgraph=True)
    with torch.no_grad():
        for budget in (0.5, 0.25, 1.0):
            prunepath.set_budget(sparse, budget)
            with torch.compiler.set_stance("default" if budget == 0.5 else "fail_on_recompile"):
                actual = compiled(ids, use_cache=False).logits
            assert relative_error(actual, sparse(ids, use_cache=False).logits) < 1e-5


@pytest.mark.parametrize(
    ("budget", "message"), [(0, "budget must be"), (1.5, "1.5"), (float("nan"), "nan"), ("x", "'x'")]
)
def test_a_budget_out_of_range_is_refused(llama, token_texts, small_config, budget, message):
    sparse = prunepath.convert(llama, None, token_texts, small_config)
    for setter in (prunepath.set_budget, prunepath.set_threshold):
        with pytest.raises(prunepath.PrunePathError, match=message.replace("budget", "(budget|threshold)")):
            setter(sparse, budget)
    assert prunepath.get_thresholds(sparse) == [1.0, 1.0]


def test_thresholds_are_set_together_or_one_by_one(llama, token_texts, small_config):
    sparse = prunepath.convert(llama, None, token_texts, small_config)
    prunepath.set_threshold(sparse, 0.8)
    assert prunepath.get_thresholds(sparse) == [0.8, 0.8]
    prunepath.set_threshold(sparse, [0.5, 0.75])
    assert prunepath.get_thresholds(sparse) == [0.5, 0.75]
    with pytest.raises(prunepath.PrunePathError, match="one threshold for each of the 2 FFNs, got 3"):
        prunepath.set_threshold(sparse, [0.5, 0.5, 0.5])


@torch.no_grad()
def test_every_sequence_of_a_batch_has_its_own_budget(llama, token_texts, small_config, ids):
    sparse = prunepath.convert(llama, None, token_texts, small_config)
    long = torch.stack([text[:100] for text in token_texts[:2]])  # beyond what the kernels serve
    for batch in (ids, long):
        alone = []
        for budget in (0.25, 1.0):
            prunepath.set_budget(sparse, budget)
            alone.append(sparse(batch).logits)
        prunepath.set_request_budgets(sparse, [0.25, 1.0])
        together = sparse(batch).logits
        for row in range(2):
            assert relative_error(together[row], alone[row][row]) < 1e-5
        assert relative_error(alone[0][1], alone[1][1]) > 1e-3
        prunepath.set_request_budgets(sparse, None)
        assert torch.equal(sparse(batch).logits, alone[1])
        assert prunepath.get_thresholds(sparse) == [1.0, 1.0]
    for budgets in ([], [0.5, 2.0]):
        with pytest.raises(prunepath.PrunePathError, match=r"Expected a budget|budget must be"):
            prunepath.set_request_budgets(sparse, budgets)


def test_num_experts_must_divide_the_width(llama, token_texts, small_config):
    before = copy.deepcopy(llama.state_dict())
    with pytest.raises(prunepath.PrunePathError, match=r"64.*got 7|7.*64"):
        prunepath.convert(llama, None, token_texts, dataclasses.replace(small_config, num_experts=7))
    assert not prunepath.is_sparse(llama)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), llama.state_dict().values(), strict=True))


def test_a_model_without_supported_ffns_is_named(token_texts, small_config):
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=1, vocab_size=97))
    with pytest.raises(prunepath.PrunePathError, match=r"LlamaMLP.*OPTDecoderLayer.*BloomForCausalLM"):
        prunepath.convert(model, None, token_texts, small_config)


def test_a_dense_model_has_no_budget_and_a_sparse_one_is_not_converted_again(llama, token_texts, small_config):
    with pytest.raises(prunepath.PrunePathError, match="converted by prunepath, got a dense LlamaForCausalLM"):
        prunepath.set_budget(llama, 0.5)
    prunepath.convert(llama, None, token_texts, small_config)
    with pytest.raises(prunepath.PrunePathError, match="Expected a dense model"):
        prunepath.convert(llama, None, token_texts, small_config)


@torch.no_grad()
def test_lora_on_a_projection_is_not_ignored(llama, token_texts, small_config, ids):
    """A wrapped projection is computed through its wrapper, not from the packed weights under it."""

    class Shifted(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        @property
        def weight(self):
            return self.base.weight

        def forward(self, x):
            return self.base(x) + 1.0

    sparse = prunepath.convert(llama, None, token_texts, small_config)
    before = sparse(ids).logits
    ffn = prunepath.sparse_ffns(sparse)["model.layers.1.mlp"]
    ffn.up_proj = Shifted(ffn.up_proj)
    assert relative_error(sparse(ids).logits, before) > 1e-3


def test_few_tokens_are_enough_and_the_configuration_is_left_as_it_was(llama):
    before = llama.config.to_dict()
    config = prunepath.PrunePathConfig(num_experts=8, sequence_length=64, router_tokens=1, calibration_tokens=100_000)
    prunepath.convert(llama, None, [torch.randint(2, 97, (64,))], config)
    after = llama.config.to_dict()
    assert after.pop("quantization_config")["thresholds"] == [1.0, 1.0]
    before.pop("quantization_config", None)
    assert after == before


def test_grouping_reports_progress_within_an_ffn(dense, token_texts, small_config, monkeypatch):
    """In hundredths, which add up to the number of FFNs whatever the partition."""
    import prunepath.modeling

    steps = []
    grouping = prunepath.modeling.ExpertGrouping

    def observed(config, advance):
        return grouping(config, lambda hundredths: (steps.append(hundredths), advance(hundredths)))

    monkeypatch.setattr(prunepath.modeling, "ExpertGrouping", observed)
    for partition in ("coactivation", "random"):
        steps.clear()
        prunepath.convert(
            copy.deepcopy(dense), None, token_texts, dataclasses.replace(small_config, partition=partition)
        )
        assert sum(steps) == 200 and min(steps) >= 0
        assert len(steps) > 4 or partition == "random"
