"""LoRA adapters on the projections of sparse FFNs: trained, merged, saved, and brought from the dense model."""

import pytest
import torch

import prunepath
from prunepath.nn import sparse_ffns
from prunepath.train.any_budget import AnyBudget, is_router

peft = pytest.importorskip("peft")

TARGETS = {"llama": ["gate_proj", "up_proj", "down_proj"], "opt": ["fc1", "fc2"]}
BUDGET_THRESHOLDS = (1.0, 0.7)


@pytest.fixture(params=TARGETS)
def family(request):
    return request.param


def adapted(model, family, **more):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS[family], init_lora_weights=False, **more)
    return peft.get_peft_model(model, config).eval()


@torch.no_grad()
def logits(model, ids, threshold: float | None = None) -> torch.Tensor:
    if threshold is not None:
        prunepath.set_threshold(model, threshold)
    return model(input_ids=ids).logits


def test_an_adapter_trains_and_its_merged_weights_give_the_same_outputs(make_sparse, family, ids):
    model = make_sparse(family, router_rank=8)
    plain = logits(model, ids)
    tuned = adapted(model, family)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    with AnyBudget(tuned) as any_budget:
        tuned.train()
        for _ in range(6):
            any_budget.draw()
            loss = tuned(input_ids=ids, labels=ids).loss
            losses.append(loss.item())
            (loss + any_budget.router_loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert min(losses[3:]) < losses[0]
    tuned.eval()
    expected = [logits(tuned, ids, threshold) for threshold in BUDGET_THRESHOLDS]
    assert (expected[0] - plain).abs().max() > 0.1
    merged = tuned.merge_and_unload()
    assert all(ffn.has_row_tables() for ffn in sparse_ffns(merged).values())
    for threshold, before in zip(BUDGET_THRESHOLDS, expected, strict=True):
        torch.testing.assert_close(logits(merged, ids, threshold), before, rtol=1e-3, atol=1e-3)


def test_an_adapter_merged_in_place_counts_in_the_next_call_and_can_be_taken_out(make_sparse, family, ids):
    tuned = adapted(make_sparse(family, router_rank=8), family)
    expected = logits(tuned, ids, 0.7)
    with tuned.disable_adapter():
        plain = logits(tuned, ids)
    tuned.merge_adapter()
    torch.testing.assert_close(logits(tuned, ids), expected, rtol=1e-3, atol=1e-3)
    tuned.unmerge_adapter()
    with tuned.disable_adapter():
        torch.testing.assert_close(logits(tuned, ids), plain, rtol=1e-3, atol=1e-3)


def test_routers_that_an_adapter_holds_are_the_ones_that_train(make_sparse, family, ids, tmp_path):
    model = make_sparse(family, router_rank=8)
    tuned = adapted(model, family, modules_to_save=["router"])
    before = {name: p.detach().clone() for name, p in tuned.named_parameters() if is_router(name)}
    with AnyBudget(tuned) as any_budget:
        any_budget.draw()
        tuned.train()(input_ids=ids)
        any_budget.router_loss().backward()
        torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0).step()
    for name, parameter in tuned.named_parameters():
        if is_router(name):
            assert torch.equal(parameter, before[name]) == ("original_module" in name), name
    tuned.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_sparse(family, router_rank=8), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids, 0.7), logits(tuned, ids, 0.7))


def test_adapters_beside_the_ffns_leave_them_to_the_kernels(make_sparse, ids):
    targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["router"]}
    tuned = peft.get_peft_model(make_sparse("llama", router_rank=8), peft.LoraConfig(r=4, **targets)).eval()
    served = logits(tuned, ids, 0.7)
    with torch.no_grad():
        assert all(ffn.is_served_by_kernels(torch.empty(1, 32)) for ffn in sparse_ffns(tuned).values())
    torch.testing.assert_close(served, tuned(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
