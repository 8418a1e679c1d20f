"""Inputs of every shape and stride, and function transforms of torch.func over a sparse model."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap

import prunepath
from prunepath.nn import FFNLayout, SparseFFN

H, D = 24, 40


@pytest.fixture
def ffn():
    torch.manual_seed(0)
    owner = nn.Module()
    owner.gate, owner.up, owner.down = nn.Linear(H, D), nn.Linear(H, D), nn.Linear(D, H)
    ffn = SparseFFN(owner, FFNLayout(gate="gate", up="up", down="down", activation="silu"), D, router_rank=6).eval()
    for parameter in ffn.router.parameters():
        nn.init.normal_(parameter)
    ffn.lay_out_for_inference()
    ffn.threshold = 0.5
    return ffn


@pytest.fixture
def model(make_sparse):
    model = make_sparse("llama")
    prunepath.set_threshold(model, 0.5)
    return model


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


INPUTS = {
    "1-D": tokens(H),
    "4-D": tokens(2, 3, 2, H),
    "many": tokens(2, 50, H),
    "no tokens": tokens(0, H),
    "no sequences": tokens(0, 3, H),
    "transposed": tokens(H, 6).t(),
    "permuted": tokens(H, 3, 2).permute(2, 1, 0),
    "sliced": tokens(2, 3, 2 * H)[..., ::2],
    "expanded": tokens(1, H).expand(5, H),
    "a late offset": tokens(7, H + 3)[1:, 3:],
}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", INPUTS)
def test_any_shape_and_stride_gives_each_tokens_output(ffn, name, context):
    x = INPUTS[name]
    with context():
        y = ffn(x)
        assert y.shape == x.shape
        rows = [ffn(row[None].clone()) for row in x.reshape(-1, H)]
        expected = torch.cat(rows) if rows else x.new_empty(0, H)
        torch.testing.assert_close(y.reshape(-1, H), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (H + 1,), (6, H // 2), (2, 2 * H), (0,)])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_another_width_is_one_sentence(ffn, shape, context):
    with context(), pytest.raises(prunepath.PrunePathError, match=rf"\[\.\.\., {H}\], got") as raised:
        ffn(torch.zeros(shape))
    assert "\n" not in str(raised.value)


@torch.no_grad()
def test_no_tokens_and_one_request(ffn):
    ffn.set_request_thresholds([0.4, 0.6])
    assert ffn(torch.zeros(0, H)).shape == (0, H)
    assert ffn(torch.zeros(2, 0, H)).shape == (2, 0, H)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_functional_call_computes_with_the_given_weights(model, ids, context):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        expected = other(input_ids=ids, use_cache=False).logits
    weights = dict(other.named_parameters())
    with context():
        logits = functional_call(model, weights, (), {"input_ids": ids, "use_cache": False}).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_grad_of_a_functional_call_is_autograds(model, ids):
    weights = {name: p.detach() for name, p in model.named_parameters() if "mlp" in name and "router" not in name}

    def loss(weights):
        return functional_call(model, weights, (), {"input_ids": ids, "labels": ids, "use_cache": False}).loss

    found = grad(loss)(weights)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_jvp_is_what_autograd_gives(ffn, context):
    x, direction = tokens(6, H), tokens(6, H) * 0.1
    matrix = torch.autograd.functional.jacobian(ffn, x).reshape(6 * H, 6 * H)
    expected = (matrix @ direction.flatten()).view(6, H)
    with context():
        y, tangent = jvp(ffn, (x,), (direction,))
        torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(y, ffn(x), rtol=1e-4, atol=1e-5)
    if context is torch.inference_mode:
        return
    with context(), forward_ad.dual_level():
        dual = forward_ad.unpack_dual(ffn(forward_ad.make_dual(x, direction)))
        torch.testing.assert_close(dual.tangent, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_vmap_is_each_input_alone(ffn, context):
    x = tokens(3, 2, H)
    with context():
        torch.testing.assert_close(vmap(ffn)(x), ffn(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vmap(ffn, in_dims=1)(x), ffn(x).transpose(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_jacobians_and_gradients_of_each_sample(ffn):
    x = tokens(2, H)
    expected = torch.autograd.functional.jacobian(ffn, x)
    torch.testing.assert_close(jacrev(ffn)(x), expected, rtol=1e-4, atol=1e-5)
    each = vmap(grad(lambda row: ffn(row).square().sum()))(x)
    leaf = x.clone().requires_grad_()
    ffn(leaf).square().sum().backward()
    torch.testing.assert_close(each, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_an_ensemble_of_weights(ffn):
    others = [copy.deepcopy(ffn) for _ in range(2)]
    for i, other in enumerate(others):
        other.up.weight.data.mul_(1.0 + i)
    stacked = {
        name: torch.stack([dict(other.named_parameters())[name].detach() for other in others])
        for name, _ in ffn.named_parameters()
    }
    x = tokens(3, H)
    found = vmap(lambda weights: functional_call(ffn, weights, (x,)))(stacked)
    expected = torch.stack([other(x) for other in others])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
