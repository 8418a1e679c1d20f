"""Budgets become thresholds, at which every FFN has the fraction asked for."""

import itertools
import warnings

import pytest
import torch
from torch import nn

import prunepath
from prunepath.calibration import fit as fit_module
from prunepath.calibration.fit import BUDGETS, Sample, fit_budgets
from prunepath.demo.corpus import stdlib_texts
from prunepath.demo.run import model_folder
from prunepath.nn import FFNLayout, SparseFFN
from prunepath.nn.observers import counting

HIDDEN, WIDTH, EXPERTS = 16, 64, 8


def make_ffn(seed=0, router_scale=1.0, experts=EXPERTS, **options):
    torch.manual_seed(seed)
    dense = nn.Module()
    dense.up = nn.Linear(HIDDEN, WIDTH)
    dense.down = nn.Linear(WIDTH, HIDDEN)
    ffn = SparseFFN(dense, FFNLayout(up="up", down="down", activation="relu"), experts, **options).eval()
    with torch.no_grad():
        ffn.router.w_out.normal_(std=router_scale)
    return ffn


class Chain:
    """FFNs in a row; the loss is a function of their active fractions, and of their outputs."""

    def __init__(self, ffns, loss):
        self.ffns = ffns
        self.tokens = torch.randn(512, HIDDEN, generator=torch.Generator().manual_seed(1))
        self.of_fractions = loss
        self.passes = {"encode": 0, "loss": 0}

    def run(self):
        self.passes["encode"] += 1
        return self._run()

    def _run(self):
        x = self.tokens
        for ffn in self.ffns:
            x = x + ffn(x)
        return x

    def fractions(self):
        with torch.no_grad(), counting(self.ffns) as record:
            self._run()
        return record.per_layer

    def loss(self):
        self.passes["loss"] += 1
        return None if self.of_fractions is None else self.of_fractions(self.fractions())

    def sample(self):
        return Sample(self.run, self.loss, (3, 5))

    def calibrate(self, progress=lambda cost: None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fit_budgets(self.ffns, self.sample(), progress)

    def at(self, result, budget):
        for ffn, threshold in zip(self.ffns, result.table[budget], strict=True):
            ffn.threshold = threshold
        return self.fractions()


def test_without_a_loss_every_layer_gets_the_budget():
    chain = Chain([make_ffn(0), make_ffn(1, router_scale=0.5)], None)
    result = chain.calibrate()
    assert list(result.table) == list(BUDGETS)
    assert result.dense_loss is None and result.routed_loss is None and result.static_loss is None
    for budget in (0.2, 0.4, 0.7):  # one expert of 8 always runs
        assert chain.at(result, budget) == pytest.approx([budget] * 2, abs=0.002)
    for budget in (0.3, 0.5, 0.9):  # fitted on the inputs of another budget
        assert chain.at(result, budget) == pytest.approx([budget] * 2, abs=0.02)


def test_it_takes_few_passes_and_reports_their_costs():
    for loss in (lambda f: 1.0, None):
        chain, costs = Chain([make_ffn(0), make_ffn(1)], loss), []
        chain.calibrate(costs.append)
        assert sum(costs) == chain.sample().cost
        if loss is not None:
            passes = chain.passes
            assert sum(costs) == 3 * passes["encode"] + 5 * passes["loss"]
            assert passes["encode"] <= 6 and passes["loss"] <= 3


def test_thresholds_never_fall_as_the_budget_grows(monkeypatch):
    """Not even with opposite splits at neighbouring budgets."""

    def zigzag(fitting, budget):
        return [1.5 * budget, 0.5 * budget] if round(20 * budget) % 2 else [0.5 * budget, min(1.0, 1.5 * budget)]

    monkeypatch.setattr(fit_module.Fitting, "fractions", zigzag)
    chain = Chain([make_ffn(0, experts=WIDTH), make_ffn(1, experts=WIDTH)], None)
    rows = list(chain.calibrate().table.values())
    assert all(a <= b for low, high in itertools.pairwise(rows) for a, b in zip(low, high, strict=True))


def test_limits_of_experts_are_kept_to():
    chain = Chain([make_ffn(0, min_experts=2, max_experts=4), make_ffn(1)], None)
    result = chain.calibrate()
    assert chain.at(result, 0.05)[0] == pytest.approx(0.25, abs=0.0005)
    first, second = chain.at(result, 0.7)
    assert first == pytest.approx(0.5, abs=0.002) and second == pytest.approx(0.9, abs=0.002)


@pytest.mark.parametrize("experts", [EXPERTS, WIDTH])
def test_static_pruning_keeps_the_neurons_of_most_output_and_is_undone(experts):
    """Its loss is measured with half of every FFN's neurons at zero, and shows in the outcome."""
    ffns = [make_ffn(seed, experts=experts) for seed in (0, 1)]
    chain = Chain(ffns, lambda f: 1.0)
    outputs = []
    chain.loss = lambda: (outputs.append(chain._run()), float(outputs[-1].square().mean()))[1]
    result = chain.calibrate()
    dense = pruned = chain.tokens
    with torch.no_grad():
        for ffn in ffns:
            importance = torch.relu(ffn.up(dense)).square().mean(0).sqrt() * ffn.down.weight.norm(dim=0)
            keep = importance >= importance.sort(descending=True).values[WIDTH // 2 - 1]
            dense = dense + ffn.down(torch.relu(ffn.up(dense)))
            pruned = pruned + ffn.down(torch.relu(ffn.up(pruned)) * keep)
    assert result.static_loss == pytest.approx(float(pruned.square().mean()), rel=1e-5)
    assert not any(ffn.down._forward_pre_hooks for ffn in ffns)


@pytest.mark.parametrize("is_worse", [False, True])
def test_a_model_that_static_pruning_beats_says_so(is_worse):
    chain = Chain([make_ffn(0), make_ffn(1)], None)
    # Static pruning alone computes all experts' neurons, half of which are zero: all fractions are 1.
    chain.of_fractions = lambda f: 2.0 if min(f) < 1.0 else (1.0 if is_worse else 3.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit_budgets(chain.ffns, chain.sample())
    said = [str(warning.message) for warning in caught if "static pruning of the same size" in str(warning.message)]
    assert len(said) == is_worse
    assert result.to_dict()["static_loss"] == result.static_loss
    assert result.routed_loss == 2.0


def test_the_embedded_model_obtains_its_budgets_on_text_it_has_never_seen():
    """Two of its layers, to be quick. Between the table's budgets too."""
    with model_folder() as folder:
        model, tokenizer = prunepath.load(folder, dtype="float32")
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    config = prunepath.PrunePathConfig(router_tokens=4096, calibration_tokens=2048)
    prunepath.convert(model, tokenizer, [text[:1500] for text in stdlib_texts("validation")], config)
    held_out = tokenizer("".join(text[:1500] for text in stdlib_texts("held_out")), return_tensors="pt").input_ids
    windows = held_out[:, :4096].view(-1, 256)
    for budget in (0.08, 0.12, 0.25, 0.35, 0.5, 0.75):
        prunepath.set_budget(model, budget)
        with torch.no_grad(), prunepath.record_counts(model) as record:
            model.base_model(windows)
        assert abs(record.active_fraction - budget) < 0.02
