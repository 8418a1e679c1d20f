"""Weights belong to whoever trains them: evaluating between steps neither moves nor copies them."""

import itertools

import pytest
import torch
import transformers

import prunepath
from prunepath.nn import sparse_ffns

SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
DENSE = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, intermediate_size=64)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=64)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, pad_token_id=1)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, intermediate_size=64)),
}


@pytest.fixture(params=DENSE)
def model(request, make_sparse):
    torch.manual_seed(0)
    model = make_sparse(DENSE[request.param]().eval(), router_rank=8)
    prunepath.set_threshold(model, 0.7)
    return model


def step(model, ids, optimizer) -> float:
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    return loss.item()


def both_ways(model, ids) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits by the kernels, and by autograd's masked computation, which reads the parameters anew each time."""
    with torch.no_grad():
        served = model(input_ids=ids).logits
    return served, model(input_ids=ids).logits.detach()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_every_step_of_an_optimiser_counts_in_the_next_call(model, ids, options):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
    before, _ = both_ways(model, ids)
    for _ in range(3):
        step(model, ids, optimizer)
        served, masked = both_ways(model, ids)
        torch.testing.assert_close(served, masked, rtol=1e-4, atol=1e-4)
        assert (served - before).abs().max() > 1e-2
        before = served


def test_parameters_that_are_views_of_one_buffer_stay_so(model, ids):
    prunepath.for_training(model)
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    offsets = [0, *itertools.accumulate(p.numel() for p in parameters)]
    for parameter, start in zip(parameters, offsets, strict=False):
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
    before, _ = both_ways(model, ids)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        for parameter, start in zip(parameters, offsets, strict=False):
            if parameter.grad is not None:
                flat[start : start + parameter.numel()] -= 0.1 * parameter.grad.flatten()
                parameter.grad = None
        model.state_dict()
        model.train().eval()
        served, masked = both_ways(model, ids)
        torch.testing.assert_close(served, masked, rtol=1e-4, atol=1e-4)
        assert (served - before).abs().max() > 1e-3
        before = served
    starts = [flat.data_ptr() + 4 * start for start in offsets[:-1]]
    assert [p.data_ptr() for p in parameters] == starts


def test_adding_to_weights_through_data_counts_in_the_next_call(model, ids):
    before, _ = both_ways(model, ids)
    for ffn in sparse_ffns(model).values():
        for name in ffn.layout.projections:
            projection = ffn.projection(name)
            projection.weight.data += 0.05 * torch.randn_like(projection.weight)
            if projection.bias is not None:
                projection.bias.data += 0.5
    served, masked = both_ways(model, ids)
    torch.testing.assert_close(served, masked, rtol=1e-4, atol=1e-4)
    assert (served - before).abs().max() > 1e-2


def test_training_goes_on_after_evaluating_and_laying_out_in_inference_mode(model, ids):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for lay_out in (prunepath.for_training, prunepath.for_inference) * 2:
        losses.append(step(model, ids, optimizer))
        with torch.inference_mode():
            lay_out(model)
            model(input_ids=ids)
            model.generate(ids[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=1)
            model.state_dict()
    assert losses[-1] < losses[0]
    assert not any(parameter.is_inference() for parameter in model.parameters())
