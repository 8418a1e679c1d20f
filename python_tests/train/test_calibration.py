"""Budgets become thresholds: the fraction asked for, spread over the layers as the loss likes it best."""

import itertools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import prunepath
from prunepath.demo.corpus import stdlib_texts
from prunepath.demo.run import model_folder
from prunepath.nn import FFNLayout, SparseFFN
from prunepath.nn.observers import counting
from prunepath.train import calibration
from prunepath.calibration.fit import BUDGETS, Sample, fit_budgets

HIDDEN, WIDTH, EXPERTS = 16, 64, 8


def make_ffn(seed=0, router_scale=1.0, output_scale=1.0, **options):
    torch.manual_seed(seed)
    dense = nn.Module()
    dense.up = nn.Linear(HIDDEN, WIDTH)
    dense.down = nn.Linear(WIDTH, HIDDEN)
    layout = FFNLayout(up="up", down="down", activation="relu")
    ffn = SparseFFN(dense, layout, EXPERTS, backend="reference", **options).eval()
    with torch.no_grad():
        ffn.router.weight.normal_(std=router_scale)
        ffn.down.weight.mul_(output_scale)
    return ffn


class Chain:
    """FFNs in a row; the loss is a function of their active fractions."""

    def __init__(self, ffns, loss):
        self.ffns = ffns
        self.tokens = torch.randn(2000, HIDDEN, generator=torch.Generator().manual_seed(1))
        self.of_fractions = loss

    def run(self):
        x = self.tokens
        for ffn in self.ffns:
            x = x + ffn(x)

    def fractions(self):
        with torch.no_grad(), counting(self.ffns) as record:
            self.run()
        return record.per_layer

    def loss(self):
        return None if self.of_fractions is None else self.of_fractions(self.fractions())

    def calibrate(self, progress=None):
        sample = Sample(self.run, self.loss)
        return fit_budgets(self.ffns, sample, sample, sample, progress)

    def at(self, result, budget):
        for ffn, threshold in zip(self.ffns, result.table[budget], strict=True):
            ffn.threshold = threshold
        return self.fractions()


def test_without_a_loss_every_layer_gets_the_budget():
    chain = Chain([make_ffn(0), make_ffn(1, router_scale=0.5)], None)
    result = chain.calibrate()
    assert list(result.table) == list(BUDGETS) and set(result.shapes.values()) == {"per_layer"} and result.losses == {}
    for budget in (0.15, 0.5, 0.9):  # one expert of 8 always runs
        assert chain.at(result, budget) == pytest.approx([budget] * 2, abs=0.002)


@pytest.mark.parametrize(
    ("shape", "loss"),
    [
        ("per_layer", lambda f: abs(f[0] - f[1])),
        # The second FFN adds ten times as much, so equal contributions are mostly the second's.
        ("energy", lambda f: f[0] - f[1] if f[1] < 0.97 else 0.0),
    ],
)
def test_the_shape_with_the_lowest_loss_is_chosen(shape, loss, monkeypatch):
    monkeypatch.setattr(calibration, "DESCENT_EVALUATIONS", 1)
    chain = Chain([make_ffn(0), make_ffn(1, output_scale=10.0)], loss)
    result = chain.calibrate()
    assert result.shapes[0.4] == shape
    assert result.losses[shape][BUDGETS.index(0.4)] == min(v[BUDGETS.index(0.4)] for v in result.losses.values())
    first, second = chain.at(result, 0.4)
    assert (first + second) / 2 == pytest.approx(0.4, abs=0.002)
    assert second > first + 0.2 if shape == "energy" else abs(second - first) < 0.002


def test_descent_moves_the_active_fraction_where_the_loss_falls():
    """The best split of this loss is 1 to 4, which no other shape knows of."""

    def loss(fractions):
        return 1.0 / fractions[1] ** 2 + 1.0 / 64 / fractions[0] ** 2

    chain = Chain([make_ffn(0), make_ffn(1)], loss)
    passes = []
    result = chain.calibrate(lambda: passes.append(1))
    assert result.shapes[0.5] == "descent"
    assert chain.at(result, 0.5)[1] > 0.65 and sum(chain.at(result, 0.5)) / 2 == pytest.approx(0.5, abs=0.002)
    at = BUDGETS.index(0.5)
    assert result.losses["descent"][at] < 0.8 * min(v[at] for k, v in result.losses.items() if k != "descent")
    assert calibration.num_passes() - 20 <= len(passes) <= calibration.num_passes()


def test_thresholds_never_fall_as_the_budget_grows():
    """Not even if the loss asks for opposite splits at neighbouring budgets; the budget is obtained all the same."""

    def loss(fractions):
        sign = 1 if round(10 * sum(fractions) / 2) % 2 else -1
        return 2.0 + sign * (fractions[0] - fractions[1])

    chain = Chain([make_ffn(0, router_scale=0.3), make_ffn(1, output_scale=5.0)], loss)
    result = chain.calibrate()
    assert len(set(result.shapes.values())) > 1
    rows = list(result.table.values())
    assert all(a <= b for low, high in itertools.pairwise(rows) for a, b in zip(low, high, strict=True))
    for budget in (b for b in BUDGETS if b > 1 / EXPERTS):
        assert sum(chain.at(result, budget)) / 2 == pytest.approx(budget, abs=0.01)


def test_limits_of_experts_are_kept_to():
    chain = Chain([make_ffn(0, min_experts=2, max_experts=4), make_ffn(1)], None)
    result = chain.calibrate()
    assert chain.at(result, 0.05)[0] == pytest.approx(0.25)
    first, second = chain.at(result, 0.6)
    assert first == pytest.approx(0.5, abs=0.002) and second == pytest.approx(0.7, abs=0.002)


def test_the_embedded_model_obtains_its_budgets_on_text_it_has_never_seen(monkeypatch):
    """Two of its layers, to be quick. Between the table's budgets too."""
    monkeypatch.setattr(calibration, "DESCENT_EVALUATIONS", 1)
    with model_folder() as folder:
        model, tokenizer = prunepath.load(folder, dtype="float32")
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    config = prunepath.PrunePathConfig(
        num_experts=32, partition="contiguous", partition_tokens=512, router_tokens=4096, calibration_tokens=512
    )
    prunepath.convert(model, tokenizer, [text[:1500] for text in stdlib_texts("validation")], config)
    held_out = tokenizer("".join(text[:1500] for text in stdlib_texts("held_out")), return_tensors="pt").input_ids
    windows = held_out[:, :4096].view(-1, 256)
    for budget in (0.08, 0.12, 0.25, 0.35, 0.5, 0.75):
        prunepath.set_budget(model, budget)
        with torch.no_grad(), prunepath.record_counts(model) as record:
            model.base_model(windows)
        assert abs(record.active_fraction - budget) < 0.02


def test_calibrating_anew_follows_the_weights():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    texts = [torch.randint(2, 97, (150,)) for _ in range(12)]
    shared = {"num_experts": 8, "sequence_length": 32, "partition_tokens": 256, "router_tokens": 512}
    model = prunepath.convert(
        LlamaForCausalLM(config), None, texts, prunepath.PrunePathConfig(**shared, calibration_tokens=512)
    )
    windows = torch.stack(texts)

    def fraction():
        prunepath.set_budget(model, 0.4)
        with torch.no_grad(), prunepath.record_counts(model) as record:
            model(windows)
        return record.active_fraction

    with torch.no_grad():
        for ffn in prunepath.sparse_ffns(model).values():
            ffn.router.weight.normal_(std=1.0)
    assert abs(fraction() - 0.4) > 0.05
    prunepath.calibrate(model, None, texts)
    assert prunepath.get_thresholds(model) == [1.0, 1.0]
    assert abs(fraction() - 0.4) < 0.02
    prunepath.set_budget(model, 1.0)
    with pytest.raises(prunepath.PrunePathError, match="dense LlamaForCausalLM"):
        prunepath.calibrate(LlamaForCausalLM(config), None, texts)
