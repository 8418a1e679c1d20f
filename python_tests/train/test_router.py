import pytest
import torch
from torch import nn

from prunepath.nn import FFNLayout, SparseFFN
from prunepath.nn.experts import expert_contributions, router_target
from prunepath.train.router import RouterQuality, RouterTraining


def make_ffn(num_experts=8, hidden=16, width=64, rank=0):
    torch.manual_seed(0)
    dense = nn.Module()
    dense.up = nn.Linear(hidden, width)
    dense.down = nn.Linear(width, hidden)
    layout = FFNLayout(up="up", down="down", activation="relu")
    return SparseFFN(dense, layout, num_experts, router_rank=rank).eval()


def target_of(ffn, x):
    with torch.no_grad():
        return router_target(expert_contributions(ffn.hidden(x), ffn.down.weight.t(), ffn.num_experts))


def kl(logits, target):
    return nn.functional.kl_div(logits.log_softmax(-1), target, reduction="batchmean")


def lowest_kl(inputs, target, rank):
    """What a router of this rank can reach on these very tokens, by a full-batch second-order optimiser."""
    torch.manual_seed(0)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    linear = nn.Linear(rank or inputs.shape[1], target.shape[1])
    linear = nn.Sequential(nn.Linear(inputs.shape[1], rank, bias=False), linear) if rank else linear
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = kl(linear(inputs), target)
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item()


@pytest.mark.parametrize(("experts", "rank"), [(8, 0), (64, 4)])
def test_one_pass_comes_close_to_the_best_router_of_its_rank(experts, rank):
    """On inputs not trained on, whose features differ in scale and mean, which standardising must undo."""
    ffn = make_ffn(experts, rank=rank)
    scale, shift = torch.logspace(-2, 1, 16), torch.linspace(-3, 3, 16)
    inputs = torch.randn(40_000, 16, generator=torch.Generator().manual_seed(1)) * scale + shift
    seen, unseen = inputs[:36_000], inputs[36_000:]
    target = target_of(ffn, unseen)
    training = RouterTraining(ffn, 0.03)
    for step, batch in enumerate(seen.split(1000)):
        training.schedule(step / 36)
        with torch.no_grad():
            training.observe(batch, ffn.hidden(batch))
    training.finish()
    with torch.no_grad():
        reached = kl(ffn.router(unseen), target).item()
    uniform = kl(torch.zeros_like(target), target).item()
    best = lowest_kl(unseen, target, rank)
    assert best < 0.85 * uniform
    assert reached < 1.2 * best


def test_quality_is_perfect_for_the_true_shares_and_names_what_is_missed():
    true = torch.tensor([[1.0, 2.0, 3.0, 6.0], [4.0, 0.5, 2.0, 1.5]])
    perfect = RouterQuality.of(router_target(true).log() + 5.0, true)
    assert abs(perfect.kl) < 1e-6 and perfect.recall == 1.0
    # One expert of four is a quarter: the first token's choice has 3 of 6, the second's 4 of 4.
    half = RouterQuality.of(torch.tensor([[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]), true)
    assert half.recall == pytest.approx(7 / 10) and half.kl > 0.05
