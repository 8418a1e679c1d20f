import pytest
import torch
from torch import nn

from prunepath.errors import PrunePathError
from prunepath.nn import FFNLayout, SparseFFN
from prunepath.nn.experts import expert_contributions, router_target
from prunepath.ops.reference import ACTIVATIONS
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


@pytest.mark.parametrize(("experts", "rank", "calls"), [(8, 0, 36), (64, 4, 36), (8, 0, 2), (64, 4, 1)])
def test_one_pass_comes_close_to_the_best_router_of_its_rank(experts, rank, calls):
    """On inputs not trained on, whose features differ in scale and mean, which standardising must undo."""
    ffn = make_ffn(experts, rank=rank)
    scale, shift = torch.logspace(-2, 1, 16), torch.linspace(-3, 3, 16)
    inputs = torch.randn(40_000, 16, generator=torch.Generator().manual_seed(1)) * scale + shift
    seen, unseen = inputs[:36_000], inputs[36_000:]
    target = target_of(ffn, unseen)
    training = RouterTraining(ffn, 0.03)
    for call, batch in enumerate(seen.chunk(calls)):
        training.schedule(call / calls, (call + 1) / calls)
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


def fine_ffn(form, rank, activation="silu", gated=True, hidden=32, width=64, bits=16):
    """Experts of one neuron, with biases."""
    torch.manual_seed(0)
    dense = nn.Module()
    names = ["gate", "up"] if gated else ["up"]
    for name in names:
        setattr(dense, name, nn.Linear(hidden, width))
    dense.down = nn.Linear(width, hidden)
    layout = FFNLayout(gate="gate" if gated else None, up="up", down="down", activation=activation)
    return SparseFFN(dense, layout, width, router_rank=rank, router_form=form, router_bits=bits).eval()


def correlated(tokens, hidden=32, seed=1):
    """Inputs most of whose variance is in a few directions, as those of real models, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(0))
    return torch.randn(tokens, hidden, generator=generator) * torch.logspace(0.3, -1, hidden) @ basis * 0.5 + 0.3


def trained(ffn, tokens=16384, rate=0.1):
    training = RouterTraining(ffn, rate)
    for step, batch in enumerate(correlated(tokens).split(2048)):
        training.schedule(step * 2048 / tokens, (step + 1) * 2048 / tokens)
        with torch.no_grad():
            training.observe(batch, ffn.hidden(batch))
    training.finish()
    return ffn


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_a_factored_router_of_full_rank_begins_as_the_contributions_themselves(activation, gated):
    ffn = trained(fine_ffn("factored", 0, activation, gated), tokens=2048, rate=1e-9)
    x = correlated(256, seed=2)
    with torch.no_grad():
        found = RouterQuality.of(ffn.router(x), expert_contributions(ffn.hidden(x), ffn.down.weight.t(), 64))
    assert found.kl < 0.01 and found.recall > 0.995


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_factored_router_chooses_better_than_a_linear_one(activation, gated):
    x = correlated(2048, seed=2)
    qualities = {}
    for form in ("linear", "factored"):
        ffn = trained(fine_ffn(form, 12, activation, gated))
        with torch.no_grad():
            true = expert_contributions(ffn.hidden(x), ffn.down.weight.t(), 64)
            qualities[form] = RouterQuality.of(ffn.router(x), true)
    assert qualities["factored"].kl < qualities["linear"].kl
    assert qualities["factored"].recall > qualities["linear"].recall


def test_inputs_that_are_not_finite_are_refused():
    ffn, x = fine_ffn("factored", 16), correlated(64)
    x[3, 5] = torch.inf
    with pytest.raises(PrunePathError, match="finite inputs of every FFN"):
        RouterTraining(ffn, 0.1).observe(x, ffn.hidden(x))


def test_a_factored_router_does_not_mind_the_scale_of_the_ffn():
    """Half precision's weights are of one size, and half of what float32 chooses is not lost to it."""
    x = correlated(512, seed=2)
    choices = []
    for scale in (1.0, 0.01):
        ffn = fine_ffn("factored", 16)
        with torch.no_grad():
            ffn.down.weight *= scale
        trained(ffn)
        sizes = [w.square().mean().sqrt().item() for w in (ffn.router.w_in, ffn.router.w_out)]
        assert 0.2 < sizes[0] / sizes[1] < 5.0
        choices.append(ffn.router(x).topk(16).indices.sort().values)
        choices.append(ffn.router.bfloat16()(x).topk(16).indices.sort().values)
    same = [(choices[0].unsqueeze(2) == other.unsqueeze(1)).any(2).float().mean() for other in choices[1:]]
    assert min(same) > 0.95


@pytest.mark.parametrize("rank", [0, 16])
def test_four_bits_lose_little_to_sixteen(rank):
    x = correlated(2048, seed=2)
    found = {}
    for bits in (16, 4):
        ffn = trained(fine_ffn("factored", rank, bits=bits))
        assert ffn.router.is_packed == (bits == 4)
        with torch.no_grad():
            found[bits] = RouterQuality.of(ffn.router(x), expert_contributions(ffn.hidden(x), ffn.down.weight.t(), 64))
    assert found[16].kl < found[4].kl < 1.5 * found[16].kl + 0.02
    assert found[4].recall > found[16].recall - 0.03
