"""Budgets become thresholds: the fraction asked for, spread over the layers as the loss likes it best."""

import itertools
import warnings

import pytest
import torch
from torch import nn

import prunepath
from prunepath.calibration import fit as fit_module
from prunepath.calibration.fit import BUDGETS, COMPARED_BUDGETS, STATIC_BUDGET, Sample, fit_budgets
from prunepath.demo.corpus import stdlib_texts
from prunepath.demo.run import model_folder
from prunepath.nn import FFNLayout, SparseFFN
from prunepath.nn.observers import counting

HIDDEN, WIDTH, EXPERTS = 16, 64, 8
AT_HALF = COMPARED_BUDGETS.index(STATIC_BUDGET)


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

    def __init__(self, ffns, loss, strengths=None):
        self.ffns = ffns
        self.strengths = strengths or [1.0] * len(ffns)
        self.tokens = torch.randn(512, HIDDEN, generator=torch.Generator().manual_seed(1))
        self.of_fractions = loss
        self.passes = {"encode": 0, "loss": 0, "backward": 0}

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

    def backward(self, step):
        """The gradient of a loss that is each FFN's output along a direction, of a strength of its own."""
        self.passes["backward"] += 1
        x = self.tokens
        total = 0.0
        for ffn, strength in zip(self.ffns, self.strengths, strict=True):
            y = ffn(x)
            total = total - strength * (y * y.detach()).sum()
            x = x + y.detach()
        total.backward()

    def sample(self):
        return Sample(self.run, self.loss, self.backward, (3, 5, 7))

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
    assert list(result.table) == list(BUDGETS) and result.fractions == {} and result.losses == {}
    assert result.dense_loss is None and result.static_loss is None and chain.passes["backward"] == 0
    for budget in (0.2, 0.4, 0.7):  # one expert of 8 always runs
        assert chain.at(result, budget) == pytest.approx([budget] * 2, abs=0.002)
    for budget in (0.3, 0.5, 0.9):  # fitted on the inputs of another budget
        assert chain.at(result, budget) == pytest.approx([budget] * 2, abs=0.02)


@pytest.mark.parametrize("strengths", [[10.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 10.0]])
def test_steps_along_the_losss_slope_move_experts_to_where_they_count(strengths):
    """And are kept where the loss on other text falls with them, at each budget on its own."""
    strong = strengths.index(10.0)

    def loss(fractions):
        budget = sum(fractions) / 4
        return -fractions[strong] if budget > 0.35 else fractions[strong]

    chain = Chain([make_ffn(seed, experts=WIDTH) for seed in range(4)], loss, strengths)
    result = chain.calibrate()
    assert result.fractions.keys() == {0.5}
    moved = result.fractions[0.5]
    assert moved[strong] > 0.6 and moved[strong] == max(moved) and sum(moved) / 4 == pytest.approx(0.5)
    assert result.losses["slopes"][AT_HALF] < result.losses["equal"][AT_HALF]
    assert result.losses["slopes"][0] > result.losses["equal"][0]
    assert chain.at(result, 0.5) == pytest.approx(moved, abs=0.03)
    # Where equal fractions won, those of the next budget above count.
    assert chain.at(result, 0.2)[strong] == pytest.approx(0.2 * moved[strong] / 0.5, abs=0.03)


def test_a_slope_is_the_change_of_the_loss():
    """Against the loss itself, with a little more and a little less of one FFN."""
    chain = Chain([make_ffn(seed, experts=WIDTH) for seed in range(3)], lambda f: 0.0, [1.0, 3.0, 0.5])
    search = fit_module.Search(chain.ffns, chain.sample(), lambda cost: None)
    fractions = [0.5, 0.4, 0.6]

    def linearised(ffn, low, high):
        """Output along itself that the experts between two active fractions add."""
        outputs = {}
        with torch.no_grad():
            for fraction in (low, 1.0, high):
                row = [fraction if f is ffn else known for f, known in zip(chain.ffns, fractions, strict=True)]
                hooks = search._fits([{0.0: value} for value in row], 0.0)
                with fit_module.observing_inputs(hooks):
                    x = chain.tokens
                    for f in chain.ffns:
                        y = f(x)
                        outputs[f, fraction] = y
                        if f is ffn:
                            break
                        x = x + y
        return outputs[ffn, low], outputs[ffn, high]

    gains = search._gains(0, fractions)
    for i, (ffn, strength) in enumerate(zip(chain.ffns, chain.strengths, strict=True)):
        low, high = linearised(ffn, 0.8 * fractions[i], 1.25 * fractions[i])
        with torch.no_grad():
            middle = linearised(ffn, fractions[i], fractions[i])[0]
        slope = strength * ((high - low) * middle).sum() / (0.45 * fractions[i])
        assert gains[i].item() == pytest.approx(slope.item(), rel=0.02)


def test_it_takes_few_passes_and_reports_their_costs():
    for loss in (lambda f: 1.0, None):
        chain, costs = Chain([make_ffn(0), make_ffn(1)], loss), []
        chain.calibrate(costs.append)
        assert sum(costs) == chain.sample().cost
        if loss is not None:
            passes = chain.passes
            assert sum(costs) == 3 * passes["encode"] + 5 * passes["loss"] + 7 * passes["backward"]
            assert passes["encode"] <= 6 and passes["loss"] <= 6 and passes["backward"] <= 4


def test_thresholds_never_fall_as_the_budget_grows(monkeypatch):
    """Not even with opposite splits at neighbouring budgets."""

    def zigzag(search, known, budget):
        return search.scaled([1.5, 0.5] if round(20 * budget) % 2 else [0.5, 1.5], budget)

    monkeypatch.setattr(fit_module.Search, "between", zigzag)
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
    assert result.losses["equal"][AT_HALF] == 2.0


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
