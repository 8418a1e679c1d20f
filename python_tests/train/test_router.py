import torch
from torch import nn

from prunepath.config import PrunePathConfig
from prunepath.nn import FFNLayout, SparseFFN
from prunepath.nn.experts import expert_contributions, router_target
from prunepath.train.calibration import BUDGETS, fit_budgets, num_passes
from prunepath.train.router import RouterTraining


def make_ffn(num_experts=8, hidden=16, width=64):
    torch.manual_seed(0)
    dense = nn.Module()
    dense.up = nn.Linear(hidden, width)
    dense.down = nn.Linear(width, hidden)
    return SparseFFN(dense, FFNLayout(up="up", down="down", activation="relu"), num_experts, backend="reference").eval()


def target_of(ffn, x):
    with torch.no_grad():
        return router_target(expert_contributions(ffn.hidden(x), ffn.down.weight, ffn.num_experts))


def kl(logits, target):
    return nn.functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean")


def lowest_kl(inputs, target):
    """What a linear router can reach on these very tokens, by a full-batch second-order optimiser."""
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    linear = nn.Linear(inputs.shape[1], target.shape[1])
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = kl(linear(inputs), target)
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item()


def test_one_pass_comes_close_to_the_best_linear_router():
    """On inputs not trained on, whose features differ in scale and mean, which standardising must undo."""
    ffn = make_ffn()
    scale, shift = torch.logspace(-2, 1, 16), torch.linspace(-3, 3, 16)
    inputs = torch.randn(40_000, 16, generator=torch.Generator().manual_seed(1)) * scale + shift
    seen, unseen = inputs[:36_000], inputs[36_000:]
    target = target_of(ffn, unseen)
    training = RouterTraining(ffn, seen.mean(0), seen.std(0), PrunePathConfig(num_experts=8))
    for step, batch in enumerate(seen.split(1000)):
        training.schedule(step / 36)
        training.observe(ffn, batch)
    training.finish()
    with torch.no_grad():
        reached = kl(ffn.router(unseen), target).item()
    uniform = kl(torch.zeros_like(target), target).item()
    best = lowest_kl(unseen, target)
    assert best < 0.5 * uniform
    assert reached < 1.2 * best
    assert abs(training.kl - reached) < 0.02


def test_fitted_thresholds_give_the_fraction_asked_for():
    ffn = make_ffn()
    torch.manual_seed(2)
    with torch.no_grad():
        ffn.router.weight.normal_()
    x = torch.randn(4000, 16)
    passes = []
    result = fit_budgets([ffn], lambda: ffn(x), lambda: None, lambda: passes.append(1))
    assert list(result.table) == list(BUDGETS) and result.shape == "per_layer" and result.losses == {}
    for budget in (0.15, 0.5, 0.9):
        ffn.threshold = result.table[budget][0]
        with torch.no_grad():
            assert abs(ffn.active_mask(x).float().mean().item() - budget) < 1 / 8 / 10
    assert len(passes) <= num_passes()


def test_the_shape_with_the_lower_loss_is_chosen():
    """Two FFNs, where an equal share for both is worse than one threshold for both, or better."""
    first, second = make_ffn(), make_ffn()
    x = torch.randn(500, 16)
    with torch.no_grad():
        first.router.weight.normal_()
        second.router.weight.normal_(std=5.0)

    def encode():
        first(x)
        second(x)

    def equal_thresholds_lose():
        encode()
        return 1.0 + (first.threshold == second.threshold)

    def equal_thresholds_win():
        encode()
        return 2.0 - (first.threshold == second.threshold)

    assert fit_budgets([first, second], encode, equal_thresholds_lose).shape == "per_layer"
    shared = fit_budgets([first, second], encode, equal_thresholds_win)
    assert shared.shape == "shared"
    assert all(a == b for a, b in shared.table.values())
