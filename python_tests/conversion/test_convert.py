"""What a conversion makes of a dense model."""

import copy
import dataclasses

import pytest
import torch
from tqdm.auto import tqdm

import prunepath
from prunepath.conversion import convert as convert_module

GENERATE = {"max_new_tokens": 12, "do_sample": False}
# Experts of one neuron, which are the default, and of several, whose neurons are grouped.
WIDTHS = [1, 8]


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def converted(make_model, token_texts, small_config):
    return prunepath.convert(make_model("llama"), None, token_texts, small_config)


@torch.no_grad()
@pytest.mark.parametrize("width", WIDTHS)
def test_a_converted_model_is_dense_until_a_budget_is_set(dense, token_texts, small_config, ids, width):
    config = dataclasses.replace(small_config, expert_width=width)
    sparse = prunepath.convert(copy.deepcopy(dense), None, token_texts, config)
    mask = torch.ones_like(ids)
    long = torch.stack([text[:100] for text in token_texts[:2]])  # beyond what the kernels serve
    for batch in (ids, long):
        assert relative_error(sparse(batch).logits, dense(batch).logits) < 1e-6
    expected = dense.generate(ids, attention_mask=mask, **GENERATE)
    assert torch.equal(sparse.generate(ids, attention_mask=mask, **GENERATE), expected)
    prunepath.set_budget(sparse, 0.3)
    assert relative_error(sparse(ids).logits, dense(ids).logits) > 1e-3


def test_experts_of_one_neuron_leave_every_dense_weight_as_it_is(dense, token_texts, small_config):
    before = copy.deepcopy(dense.state_dict())
    after = prunepath.convert(dense, None, token_texts, small_config).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(".router." in name for name in after.keys() - before.keys())
    assert after.keys() > before.keys()


@torch.no_grad()
@pytest.mark.parametrize("width", WIDTHS)
def test_a_budget_sets_the_active_fraction(dense, token_texts, small_config, width):
    sparse = prunepath.convert(dense, None, token_texts, dataclasses.replace(small_config, expert_width=width))
    fractions = []
    for budget in (0.75, 0.5, 0.25):
        prunepath.set_budget(sparse, budget)
        with prunepath.record_counts(sparse) as record:
            sparse(torch.stack([text[:64] for text in token_texts]))
        fractions.append(record.active_fraction)
        assert abs(record.active_fraction - budget) < 0.05
    assert fractions == sorted(fractions, reverse=True)


@torch.no_grad()
@pytest.mark.parametrize("width", WIDTHS)
def test_conversion_is_repeatable(token_texts, small_config, llama, width):
    config = dataclasses.replace(small_config, expert_width=width, router_rank=8)
    first = prunepath.convert(copy.deepcopy(llama), None, token_texts, config)
    second = prunepath.convert(copy.deepcopy(llama), None, token_texts, config)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert first.config.quantization_config == second.config.quantization_config


@torch.no_grad()
@pytest.mark.parametrize("partition", ["coactivation", "weights", "contiguous", "random"])
def test_every_partition_is_exact_at_threshold_1(llama, token_texts, small_config, partition, ids):
    config = dataclasses.replace(small_config, num_experts=8, partition=partition, router_tokens=256)
    sparse = prunepath.convert(copy.deepcopy(llama), None, token_texts, config)
    assert relative_error(sparse(ids).logits, llama(ids).logits) < 1e-6


@pytest.mark.parametrize(
    ("options", "width", "rank"),
    [({}, 1, 0), ({"router_rank": 8}, 1, 8), ({"router_rank": 64}, 1, 0), ({"expert_width": 4}, 4, 0)],
)
def test_the_description_says_what_is_in_force(llama, token_texts, small_config, options, width, rank):
    config = dataclasses.replace(small_config, router_tokens=256, **options)
    sparse = prunepath.convert(llama, None, token_texts, config)
    said = sparse.config.quantization_config
    assert (said["config"]["expert_width"], said["config"]["router_rank"]) == (width, rank)
    assert said["ffns"] == ["layers.0.mlp", "layers.1.mlp"] and said["thresholds"] == [1.0, 1.0]
    assert len(said["calibration"]["routers"]) == 2 and said["calibration"]["static_loss"] > 0
    for ffn in prunepath.sparse_ffns(sparse).values():
        assert (ffn.expert_width, ffn.router.rank) == (width, rank)


@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 8])
def test_trained_routers_beat_untrained_ones(llama, token_texts, small_config, rank):
    """At equal active fractions, sparse output is closer to dense with a trained router than with a random one."""
    config = dataclasses.replace(small_config, router_tokens=3072, calibration_tokens=256, router_rank=rank)
    long = torch.stack([text[:100] for text in token_texts])
    expected = llama(long).logits
    sparse = prunepath.convert(llama, None, token_texts, config)
    errors = {}
    for router in ("trained", "untrained"):
        if router == "untrained":
            for ffn in prunepath.sparse_ffns(sparse).values():
                torch.manual_seed(0)
                ffn.router.unpack()
                for parameter in ffn.router.parameters():
                    parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
            prunepath.calibrate(prunepath.for_inference(sparse), None, token_texts)
        prunepath.set_budget(sparse, 0.5)
        with prunepath.record_counts(sparse) as record:
            errors[router] = relative_error(sparse(long).logits, expected)
        assert abs(record.active_fraction - 0.5) < 0.06
    assert errors["trained"] < 0.9 * errors["untrained"]


def test_routers_require_no_gradient_and_weights_keep_theirs(converted, make_model):
    required = {name: parameter.requires_grad for name, parameter in make_model("llama").named_parameters()}
    for name, parameter in converted.named_parameters():
        assert parameter.requires_grad == required.get(name, False), name


def test_few_tokens_are_enough_and_the_configuration_is_left_as_it_was(llama):
    before = llama.config.to_dict()
    config = prunepath.PrunePathConfig(sequence_length=64, router_tokens=1, calibration_tokens=100_000)
    prunepath.convert(llama, None, [torch.randint(2, 97, (64,))], config)
    after = llama.config.to_dict()
    assert after.pop("quantization_config")["thresholds"] == [1.0, 1.0]
    before.pop("quantization_config", None)
    assert after == before


def test_modules_stay_in_the_mode_they_were_in(llama, token_texts, small_config):
    llama.train()
    llama.model.layers[1].eval()
    modes = {name: module.training for name, module in llama.named_modules()}
    prunepath.convert(llama, None, token_texts, small_config)
    for name, module in llama.named_modules():
        assert module.training == modes.get(name, modes[name.partition(".mlp")[0]]), name
    prunepath.calibrate(llama, None, token_texts)
    assert not llama.model.layers[1].training and llama.model.layers[0].mlp.training


@pytest.mark.parametrize("width", WIDTHS)
def test_progress_is_one_bar_that_ends_full(dense, token_texts, small_config, monkeypatch, width):
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "file": open("/dev/null", "w")})
            self.steps = []
            bars.append(self)

        def update(self, n=1):
            self.steps.append(n)
            super().update(n)

    monkeypatch.setattr(convert_module, "tqdm", Bar)
    config = dataclasses.replace(small_config, expert_width=width)
    sparse = prunepath.convert(dense, None, token_texts, config, progress=True)
    prunepath.calibrate(sparse, None, token_texts, progress=True)
    assert len(bars) == 2
    for bar in bars:
        assert sum(bar.steps) == pytest.approx(bar.total, rel=0.001) and min(bar.steps) >= 0
        assert max(bar.steps) < 0.2 * bar.total


@pytest.mark.parametrize("inside", ["conversion", "calibration"])
def test_inference_mode_makes_no_inference_tensors(llama, token_texts, small_config, ids, inside):
    with torch.inference_mode(inside == "conversion"):
        prunepath.convert(llama, None, token_texts, dataclasses.replace(small_config, router_rank=8))
    with torch.inference_mode(inside == "calibration"):
        prunepath.calibrate(llama, None, token_texts)
    assert not any(parameter.is_inference() for parameter in llama.parameters())
    prunepath.set_budget(llama, 0.5)
    llama(ids, labels=ids).loss.backward()
    assert llama.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


def test_another_default_dtype_changes_nothing(make_model, converted, token_texts, small_config):
    torch.set_default_dtype(torch.float64)
    try:
        other = prunepath.convert(make_model("llama").float(), None, token_texts, small_config)
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, a), b in zip(converted.state_dict().items(), other.state_dict().values(), strict=True):
        assert a.dtype == b.dtype and a.dtype in (torch.float32, torch.uint8) and a.shape == b.shape, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_convert(make_model, token_texts, small_config, dtype):
    sparse = prunepath.convert(make_model("llama").to(dtype), None, token_texts, small_config)
    prunepath.set_budget(sparse, 0.5)
    with torch.no_grad(), prunepath.record_counts(sparse) as record:
        sparse(torch.stack([text[:64] for text in token_texts]))
    assert abs(record.active_fraction - 0.5) < 0.05


def test_adapters_beside_the_ffns_stay_and_count(llama, token_texts, small_config, ids):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(llama, lora).eval()
    with torch.no_grad():
        expected = adapted(ids).logits
        assert prunepath.convert(adapted, None, token_texts, small_config) is adapted
        assert relative_error(adapted(ids).logits, expected) < 1e-6
        prunepath.set_budget(adapted, 0.5)
        assert relative_error(adapted(ids).logits, expected) > 1e-3
    assert adapted.config.quantization_config["ffns"] == ["layers.0.mlp", "layers.1.mlp"]


def test_calibrating_anew_follows_the_weights(llama, token_texts, small_config):
    config = dataclasses.replace(small_config, calibration_tokens=2048)
    model = prunepath.convert(llama, None, token_texts, config)
    windows = torch.stack([text[:100] for text in token_texts])

    def fraction():
        prunepath.set_budget(model, 0.4)
        with torch.no_grad(), prunepath.record_counts(model) as record:
            model(windows)
        return record.active_fraction

    with torch.no_grad():
        for ffn in prunepath.sparse_ffns(model).values():
            ffn.router.bias.normal_(std=3.0)
    assert abs(fraction() - 0.4) > 0.05
    prunepath.calibrate(model, None, token_texts)
    assert prunepath.get_thresholds(model) == [1.0, 1.0]
    assert abs(fraction() - 0.4) < 0.02


def test_a_calibration_that_fails_keeps_thresholds_and_table(converted, token_texts, monkeypatch):
    prunepath.set_budget(converted, 0.4)
    before, said = prunepath.get_thresholds(converted), copy.deepcopy(converted.config.quantization_config)

    def fail(model, batches):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "mean_loss", fail)
    with pytest.raises(KeyboardInterrupt):
        prunepath.calibrate(converted, None, token_texts)
    assert prunepath.get_thresholds(converted) == before
    assert converted.config.quantization_config == said
