"""The methods that the quality benchmark compares, on tiny models: budgets, training, and what their papers promise."""

import contextlib
import copy
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("needs the benchmarks folder of the source tree", allow_module_level=True)
sys.path.append(str(BENCHMARKS))  # where the benchmarks import each other from; prunepath itself is not there

from baselines import METHODS, Settings, routers  # noqa: E402
from baselines.copied import rounded  # noqa: E402
from baselines.d2dmoe import square_hoyer  # noqa: E402
from baselines.experts import ExpertMethod, TopK, batch_threshold, largest, mass_before, sample_values  # noqa: E402
from baselines.teal import shares_at  # noqa: E402

from prunepath.errors import PrunePathError  # noqa: E402
from prunepath.families import find_ffns  # noqa: E402
from prunepath.nn.observers import padding_masks  # noqa: E402

VOCABULARY = 97
BUDGETS = (0.3, 0.5)
SETTINGS = Settings(expert_width=8, router_rank=16, budgets=BUDGETS, seed=0)
ROUTED = ["prunepath", "teal", *(name for name, method in METHODS.items() if issubclass(method, ExpertMethod))]
COPIES = [name for name in METHODS if name.startswith("copy-")]
STATIC = [name for name in METHODS if name.startswith("static-")]


def make_model(family: str):
    torch.manual_seed(0)
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if family == "opt":
        config = OPTConfig(**shared, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, init_std=0.2)
        return OPTForCausalLM(config).eval()
    config = LlamaConfig(**shared, intermediate_size=64, num_key_value_heads=2, initializer_range=0.2)
    return LlamaForCausalLM(config).eval()


def make_batches(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(2, VOCABULARY, (8, 32), generator=generator)
        attention = (torch.arange(32) < torch.randint(8, 33, (8, 1), generator=generator)).long()
        batches.append({"input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(attention == 0, -100)})
    return batches


TRAINING = make_batches(16, seed=1)
CALIBRATION = make_batches(6, seed=2)


@pytest.fixture(scope="module", params=["llama", "opt"])
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def _short_router_training(monkeypatch):
    monkeypatch.setattr(routers, "_MIN_STEPS", 128)


_PADDING = contextlib.ExitStack()


class RandomExperts(TopK):
    """k experts at random: what every router has to beat."""

    name = "random"
    expert_width = 8

    def install_routers(self, inputs):
        self._random = torch.Generator().manual_seed(0)

    def scores(self, ffn, x, hidden):
        return torch.rand(len(x), ffn.num_experts, generator=self._random)


def make_method(name: str, family: str, budget: float = 0.5, **attributes):
    """An installed method, inside `padding_masks` as the harness has it; of wide experts there would be two here."""
    base = {**METHODS, "random": RandomExperts}[name]
    if getattr(base, "expert_width", None) == 32:
        attributes.setdefault("expert_width", 8)
    method_class = type(base.__name__, (base,), attributes)
    method = method_class(make_model(family), SETTINGS, None if method_class.one_checkpoint else budget)
    method.install(TRAINING)
    _PADDING.enter_context(padding_masks(method.model))
    return method


def train(method, progress_of_steps, learning_rate=1e-3):
    """A few steps; the auxiliary losses."""
    optimizer = torch.optim.AdamW(method.trainable_parameters(), lr=learning_rate, weight_decay=0.0)
    method.model.train()
    auxiliary = []
    for i, progress in enumerate(progress_of_steps):
        method.before_step(progress)
        loss = method.model(**TRAINING[i % len(TRAINING)]).loss
        extra = method.auxiliary_loss()
        optimizer.zero_grad()
        (loss + extra).backward()
        optimizer.step()
        auxiliary.append(float(torch.as_tensor(extra).detach()))
    method.model.eval()
    return auxiliary


@torch.no_grad()
def logits_of(model, batches=CALIBRATION):
    """Logits of valid tokens [N, V]."""
    with padding_masks(model):
        return torch.cat([model(**batch).logits[batch["attention_mask"].bool()] for batch in batches])


def error_of(method, reference):
    return (logits_of(method.model) - reference).square().mean().item()


def down_projections(model):
    return [p for name, p in model.named_parameters() if name.endswith(("down_proj.weight", "fc2.weight"))]


@pytest.mark.parametrize("name", METHODS)
def test_training_moves_the_backbone_and_budgets_are_reached(name, family):
    method = make_method(name, family)
    before = [p.detach().clone() for p in down_projections(method.model)]
    losses = train(method, [0.0, 0.2, 0.4, 0.6, 0.8])
    assert all(torch.isfinite(torch.tensor(losses)))
    after = down_projections(method.model)
    assert after and all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))

    method.calibrate(CALIBRATION)
    for budget in BUDGETS if METHODS[name].one_checkpoint else (0.5,):
        method.set_budget(budget)
        logits_of(method.model)
        if name == "dense":
            assert method.active_fraction() == 1.0
        else:
            # PrunePath fits thresholds on a part of the tokens, and compares losses on the others. What is zero after
            # ReLU is not read, even where the budget would allow it.
            loose = name == "prunepath" or (family == "opt" and name in ("cats", "teal"))
            assert method.active_fraction() == pytest.approx(budget, abs=0.02 if loose else 0.005)
            assert sum(method.per_layer()) / 2 == pytest.approx(method.active_fraction())


@pytest.mark.parametrize("name", ROUTED)
def test_budget_one_is_the_dense_model(name, family):
    method = make_method(name, family)
    dense = logits_of(make_model(family))
    method.calibrate(CALIBRATION)
    method.set_budget(0.5)
    assert error_of(method, dense) > 1e-4
    method.set_budget(1.0)
    torch.testing.assert_close(logits_of(method.model), dense, atol=1e-4, rtol=1e-4)
    assert method.active_fraction() == 1.0


@pytest.mark.parametrize("name", ROUTED)
def test_padding_changes_neither_routers_nor_counts(name):
    def padded_with(token):
        batches = []
        for batch in [*TRAINING, *CALIBRATION]:
            ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, token)
            batches.append({**batch, "input_ids": ids})
        return batches[: len(TRAINING)], batches[len(TRAINING) :]

    results = []
    for token in (5, 70):
        training, calibration = padded_with(token)
        method = METHODS[name](make_model("llama"), SETTINGS, None if METHODS[name].one_checkpoint else 0.5)
        method.install(training)
        _PADDING.enter_context(padding_masks(method.model))
        method.calibrate(calibration)
        method.before_step(0.0)
        method.model.train()(**training[0])
        auxiliary = float(torch.as_tensor(method.auxiliary_loss()).detach())
        method.model.eval()
        method.set_budget(0.5)
        logits = logits_of(method.model, calibration)
        results.append((logits, method.active_fraction(), auxiliary))
    (logits, fraction, auxiliary), other = results
    torch.testing.assert_close(logits, other[0])
    assert (fraction, auxiliary) == pytest.approx(other[1:], rel=1e-4)


def test_routers_are_between_the_oracle_and_chance(family):
    dense = logits_of(make_model(family))
    errors = {}
    for name in ("oracle-topk", "topk", "random"):
        method = make_method(name, family)
        method.set_budget(0.5)
        errors[name] = error_of(method, dense)
    assert errors["oracle-topk"] < errors["topk"] < errors["random"]


@pytest.mark.parametrize("name", ["moefication", "d2dmoe-relative", "d2dmoe-absolute", "lte"])
def test_fitted_routers_beat_chance_on_the_same_experts(name):
    dense = logits_of(make_model("llama"))
    method = make_method(name, "llama")
    chance = make_method("random", "llama", partition=METHODS[name].partition)
    method.calibrate(CALIBRATION)
    for each in (method, chance):
        each.set_budget(0.5)
    assert error_of(method, dense) < error_of(chance, dense)


@pytest.mark.parametrize("name", STATIC)
def test_static_pruning_slices_the_projections(name, family):
    method = make_method(name, family, budget=0.25)
    kept = []
    for site in find_ffns(method.model):
        owner = site.parent._modules[site.name]
        shapes = [tuple(getattr(owner, projection).weight.shape) for projection in site.layout.projections]
        kept.append(shapes[-1][1])
        assert shapes == [(kept[-1], 32)] * (len(shapes) - 1) + [(32, kept[-1])]
    assert sum(kept) == 32
    assert method.active_fraction() == 0.25
    assert method.per_layer() == [k / 64 for k in kept]
    if not METHODS[name].across_layers:
        assert kept == [16, 16]
    with pytest.raises(PrunePathError, match=r"Expected budget 0\.25"):
        method.set_budget(0.5)


@pytest.mark.parametrize("name", ["static-mean", "static-wanda"])
def test_static_pruning_cuts_dead_neurons_first(name, family):
    """With half of the neurons dead, half of them can go without a change."""
    model = make_model(family)
    with torch.no_grad():
        for weight in down_projections(model):
            weight[:, ::2] = 0
    method = METHODS[name](copy.deepcopy(model), SETTINGS, 0.5)
    method.install(TRAINING)
    torch.testing.assert_close(logits_of(method.model), logits_of(model), atol=1e-4, rtol=1e-4)


def test_flap_compensates_constant_neurons_exactly():
    """A neuron that never varies is first to go, and its output stays, in the bias."""
    model = make_model("opt")
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.weight[::2] = 0
            layer.fc1.bias[::2] = 1.0
    method = METHODS["static-flap"](copy.deepcopy(model), SETTINGS, 0.5)
    method.install(TRAINING)
    assert method.per_layer() == [0.5, 0.5]
    torch.testing.assert_close(logits_of(method.model), logits_of(model), atol=1e-4, rtol=1e-4)


def test_flap_compensation_lowers_the_error():
    dense = logits_of(make_model("opt"))
    with_bias, without = (make_method("static-flap", "opt", compensate=value) for value in (True, False))
    assert error_of(with_bias, dense) < error_of(without, dense)


def test_d2dmoe_enforcement_makes_activations_sparser():
    def hoyer_after(steps):
        method = make_method("d2dmoe-relative", "opt")
        train(method, [0.0] * steps)
        method.set_budget(1.0)
        values = []
        for ffn in method.ffns:
            ffn.register_input_hook(lambda ffn, x: values.append(square_hoyer(ffn.hidden(x)).mean().item()))
        logits_of(method.model)
        return sum(values) / len(values)

    assert hoyer_after(30) < 0.95 * hoyer_after(0)


def test_square_hoyer_is_one_for_equal_and_smallest_for_single_neurons():
    hidden = torch.tensor([[2.0, -2.0, 2.0, 2.0], [0.0, 0.0, -3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert square_hoyer(hidden).tolist() == [1.0, 0.25, 0.0]


def test_d2dmoe_trains_dense_first_and_at_drawn_budgets_later():
    method = make_method("d2dmoe-relative", "llama")
    drawn = []
    for progress in (0.0, 0.3, 0.4, 0.6, 0.8, 0.9):
        method.before_step(progress)
        drawn.append(method.step_budget)
    assert drawn[:2] == [1.0, 1.0]
    assert min(drawn[2:]) < 1.0


def test_lte_gates_polarise_and_routers_freeze_in_the_second_stage():
    method = make_method("lte", "llama")
    distance = []

    def observe(ffn, x):
        if not method.training:
            distance.append((ffn.predictor(x).sigmoid() - 0.5).abs().mean().item())

    for ffn in method.ffns:
        ffn.register_input_hook(observe)
    method.set_budget(1.0)
    logits_of(method.model)
    train(method, [0.0] * 30, learning_rate=3e-3)
    untrained = sum(distance) / len(distance)
    distance.clear()
    method.set_budget(1.0)
    logits_of(method.model)
    assert sum(distance) / len(distance) > untrained + 0.02

    routers_before = [p.detach().clone() for ffn in method.ffns for p in ffn.predictor.parameters()]
    assert train(method, [0.6] * 3) == [0.0] * 3
    routers_after = [p for ffn in method.ffns for p in ffn.predictor.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(routers_after, routers_before, strict=True))


def test_lte_weighs_efficiency_until_the_budget_is_met():
    method = make_method("lte", "llama", budget=0.25)
    for share, grows in ((0.75, True), (0.1, False)):
        before = method._log_weight.clone()
        method._shares = [torch.tensor(share)]
        method.before_step(0.1)
        assert (method._log_weight > before).item() is grows


def test_methods_for_one_budget_ask_for_it():
    for name in (*STATIC, "lte", "cmoe"):
        assert not METHODS[name].one_checkpoint
        with pytest.raises(PrunePathError, match=f"Expected a budget for {name}"):
            METHODS[name](make_model("llama"), SETTINGS).install(TRAINING)


@pytest.mark.parametrize("name", ["d2dmoe-absolute", "teal"])
def test_uncalibrated_budgets_are_refused(name):
    method = make_method(name, "llama")
    method.calibrate(CALIBRATION)
    with pytest.raises(PrunePathError, match=r"calibrated budgets \[0\.3, 0\.5\]"):
        method.set_budget(0.4)


def test_same_seed_same_method(family):
    first, second = (make_method("d2dmoe-relative", family) for _ in range(2))
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    budgets = []
    for method in (first, second):
        for _ in range(5):
            method.before_step(0.5)
            budgets.append(method.step_budget)
    assert budgets[:5] == budgets[5:]


def test_largest_mixes_whole_counts_to_the_budget():
    generator = torch.Generator().manual_seed(0)
    x, scores = torch.randn(4000, 16, generator=generator), torch.randn(4000, 8, generator=generator)
    mask = largest(scores, x, 0.3)
    counts = mask.sum(-1)
    assert set(counts.tolist()) == {2, 3}
    assert counts.float().mean() / 8 == pytest.approx(0.3, abs=0.005)
    assert (scores.masked_fill(~mask, 9.0).amin(-1) > scores.masked_fill(mask, -9.0).amax(-1)).all()
    torch.testing.assert_close(largest(scores[:7], x[:7], 0.3), mask[:7])  # whatever the batch
    assert largest(scores, x, 0.01).sum(-1).unique().tolist() == [1]
    assert largest(scores, x, 1.0).all()


def test_batch_threshold_is_the_quantile_over_valid_tokens():
    priority = torch.tensor([[0.1, 0.2], [0.3, 0.4], [-9.0, -9.0]])
    valid = torch.tensor([True, True, False])
    for budget, active in ((0.25, 1), (0.5, 2), (1.0, 4)):
        threshold = batch_threshold(priority, valid, budget)
        assert (priority[:2] < threshold).sum() == active
    assert (priority < batch_threshold(priority, None, 0.5)).sum() == 3


def test_mass_before_sums_larger_shares():
    shares = torch.tensor([[0.2, 0.5, 0.3]])
    torch.testing.assert_close(mass_before(shares), torch.tensor([[0.8, 0.0, 0.5]]))


def test_many_values_are_sampled_from_valid_tokens():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(4000, 300, generator=generator)
    valid = torch.rand(4000, generator=generator) < 0.5
    values[~valid] += 5.0
    threshold = batch_threshold(values, valid, 0.3)  # 1.2 million
    assert (values[valid] < threshold).float().mean() == pytest.approx(0.3, abs=0.002)
    assert sample_values(values, valid).max() < 1.0
    assert (values < batch_threshold(values, None, 0.3)).float().mean() == pytest.approx(0.3, abs=0.002)


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_a_method_are_independent(name):
    method = make_method(name, "llama")
    method.calibrate(CALIBRATION)
    twin = copy.deepcopy(method)
    _PADDING.enter_context(padding_masks(twin.model))
    method.set_budget(0.5)
    twin.set_budget(0.5)
    expected = logits_of(method.model)
    fraction = method.active_fraction()
    torch.testing.assert_close(logits_of(twin.model), expected)
    assert (twin.active_fraction(), twin.bytes_read()) == (fraction, method.bytes_read())
    with torch.no_grad():
        for weight in down_projections(twin.model):
            weight.zero_()
    torch.testing.assert_close(logits_of(method.model), expected)
    assert error_of(twin, expected) > 1e-4


# H = 32 and D = 64, so that a gated FFN has 3·32·64 = 6144 weights, and an ungated one 4096.
ROUTER_BYTES = {
    "dense": (0, 0),
    "oracle-topk": (0, 0),
    "oracle-topmass": (0, 0),
    "oracle-experts": (0, 0),
    "teal": (0, 0),
    "moefication": (32 * 8 + 8 + 8 * 8 + 8, 32 * 8 + 8 + 8 * 8 + 8),
    "lte": (32 * 8 + 8, 32 * 8 + 8),
    "d2dmoe-relative": (32 * 128 + 128 + 128 * 8 + 8, 32 * 128 + 128 + 128 * 8 + 8),
    "topk": (32 * 16 + 16 * 8 + 8, 32 * 16 + 16 * 8 + 8),
    "prunepath": (32 * 16 + 16 * 8 + 8, 32 * 16 + 16 * 8 + 8),
    "cmoe": (12 * 2 * 32, 12 * 32),
    # 2, 3 or 4 bits for each weight of gate and up, and 16 for the scale of each row of 32.
    "copy-2bit": (2 * 64 * (32 * 2 + 16) / 16, 64 * (32 * 2 + 16) / 16),
    "copy-3bit": (2 * 64 * (32 * 3 + 16) / 16, 64 * (32 * 3 + 16) / 16),
    "copy-4bit": (2 * 64 * (32 * 4 + 16) / 16, 64 * (32 * 4 + 16) / 16),
}


@pytest.mark.parametrize("name", ROUTER_BYTES)
def test_bytes_are_those_of_active_neurons_and_the_router(name, family):
    method = make_method(name, family)
    method.calibrate(CALIBRATION)
    method.set_budget(0.5)
    logits_of(method.model)
    router = ROUTER_BYTES[name][family == "opt"] / (4096 if family == "opt" else 6144)
    assert method.bytes_read() == pytest.approx(method.active_fraction() + router)


def test_bytes_of_static_pruning_are_what_it_keeps():
    assert make_method("static-wanda", "llama", budget=0.25).bytes_read() == 0.25


def test_cats_reads_the_gate_whole(family):
    method = make_method("cats", family)
    method.calibrate(CALIBRATION)
    method.set_budget(0.3)
    logits_of(method.model)
    whole = 1 / 2 if family == "opt" else 1 / 3
    assert method.bytes_read() == pytest.approx(whole + (1 - whole) * method.active_fraction())
    assert method.per_layer() == pytest.approx([0.3, 0.3], abs=0.005)


def test_cats_keeps_the_largest_gates():
    method = make_method("cats", "llama")
    ffn = method.ffns[0]
    x = torch.randn(50, 32)
    priority = method.priority(ffn, x, ffn.hidden(x))
    gates = torch.nn.functional.silu(ffn.projection("gate_proj")(x)).abs()
    torch.testing.assert_close(priority, -gates)


@pytest.mark.parametrize("name", COPIES)
def test_copied_routers_are_between_the_oracle_and_chance(name, family):
    dense = logits_of(make_model(family))
    errors = {}
    for each in ("oracle-topmass", name, "random"):
        method = make_method(each, family)
        method.calibrate(CALIBRATION)
        method.set_budget(0.5)
        errors[each] = error_of(method, dense)
    # The oracle minimises errors of FFNs, which is not quite those of the logits.
    assert errors["oracle-topmass"] < 1.1 * errors[name] < errors["random"]


def test_copied_routers_follow_the_weights():
    method = make_method("copy-4bit", "llama")
    before = method.ffns[0].copied.clone()
    with torch.no_grad():
        method.ffns[0].projection("gate_proj").weight.mul_(2)
    method.before_step(0.5)
    torch.testing.assert_close(method.ffns[0].copied[0], 2 * before[0])
    torch.testing.assert_close(method.ffns[0].copied[1], before[1])


def test_rounding_keeps_to_its_grid_and_gets_finer():
    weights = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits, group in ((2, 128), (3, 64), (4, 64)):
        copied = rounded(weights, bits, group)
        for part in copied.unflatten(1, (-1, group)).flatten(0, 1):
            assert len(part.unique()) <= 2**bits
        errors.append(((copied - weights).square().mean() / weights.square().mean()).item())
    # The best uniform grids for a normal distribution have errors of 0.119, 0.037 and 0.0115 (Max, 1960).
    assert 0.10 < errors[0] < 0.125 and errors[1] < 0.05 and errors[2] < 0.015
    assert rounded(torch.zeros(2, 64), 3, 64).abs().max() == 0


def test_cmoe_shares_the_neurons_that_are_active_most():
    """Neurons that are large for every token are always on, and half of a token's experts are shared."""
    model = make_model("opt")
    loud = torch.tensor([5, 11, 30, 63])  # one expert of sixteen
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.fc1.weight[loud] = 0
            layer.fc1.bias[loud] = 100.0
    method = METHODS["cmoe"](model, SETTINGS, 0.125)
    method.install(TRAINING)
    assert method.num_shared == 1
    for ffn in method.ffns:
        assert (ffn.biases()[0][:4] == 100.0).all()
    assert make_method("cmoe", "llama", budget=0.5).num_shared == 4


def test_cmoe_scores_are_those_of_representatives():
    method = make_method("cmoe", "llama")
    for ffn in method.ffns:
        assert (ffn.representatives // 4).tolist() == list(range(4, 16))
    ffn = method.ffns[0]
    x = torch.randn(40, 32)
    hidden = ffn.hidden(x)
    method.set_budget(0.5)
    mask = method.choose(ffn, x, hidden)
    assert mask[:, :4].all() and mask[:, 4:].sum(-1).unique().tolist() == [4]
    values = hidden[:, ffn.representatives].abs()
    best = torch.zeros_like(values).scatter_(1, values.topk(4).indices, 1.0).bool()
    assert torch.equal(mask[:, 4:], best)


def test_teal_keeps_the_largest_entries():
    method = make_method("teal", "llama")
    method.calibrate(CALIBRATION)
    method.set_budget(0.5)
    seen = []
    ffn = method.ffns[0]
    ffn.projection("gate_proj").register_forward_hook(lambda module, args, output: seen.append(args[0].flatten(0, -2)))
    inputs = []
    ffn.register_input_hook(lambda ffn, x: inputs.append(x))
    logits_of(method.model)
    for x, read in zip(inputs, seen, strict=True):
        kept = read != 0
        assert torch.equal(read[kept], x[kept])
        assert x[kept].abs().min() > x[~kept].abs().max()


def test_teal_thins_first_what_costs_nothing():
    """Half of the activations are zero after ReLU: the search takes those before anything else."""
    method = make_method("teal", "opt")
    method.calibrate(CALIBRATION)
    for path in method._paths:
        up, down = shares_at(path, 0.8)
        assert up == 1.0 and down == pytest.approx(0.6)
        assert sum(shares_at(path, 0.3)) / 2 == pytest.approx(0.3)
    errors = {}
    dense = logits_of(make_model("opt"))
    for searched in (True, False):
        if not searched:
            method._paths = [[(1.0, (1.0, 1.0)), (0.0, (0.0, 0.0))]] * 2
        method._set(0.6, "batch")
        errors[searched] = error_of(method, dense)
    assert errors[True] < errors[False]


def test_partitions_are_kept_by_width(tmp_path):
    for name, width in (("moefication", 8), ("moefication", 16), ("cmoe", None)):
        base = METHODS[name]
        method_class = type(base.__name__, (base,), {"expert_width": width})
        settings = Settings(expert_width=4, router_rank=16, budgets=BUDGETS, seed=0, partitions=tmp_path)
        first, again = (method_class(make_model("llama"), settings, 0.5) for _ in range(2))
        for method in (first, again):
            method.install(TRAINING)
        assert first.ffns[0].expert_width == (width or 4)
        for a, b in zip(down_projections(first.model), down_projections(again.model), strict=True):
            assert torch.equal(a, b)
    assert len(list(tmp_path.iterdir())) == 6
