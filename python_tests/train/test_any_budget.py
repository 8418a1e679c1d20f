"""Any-budget training: passes at the drawn budget, thresholds from a sample of tokens, and what learns from what."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import prunepath
from prunepath.errors import PrunePathError
from prunepath.nn import sparse_ffns
from prunepath.ops import reference
from prunepath.train import any_budget as module
from prunepath.train.any_budget import (
    AnyBudget,
    AnyBudgetConfig,
    distillation_loss,
    is_router,
    mass_quantile,
    router_parameters,
    sample_tokens,
)


def test_a_training_step_runs_at_the_drawn_budget(model, windows):
    model.train()
    ids = windows(64, 3)
    with AnyBudget(model, AnyBudgetConfig(dense_share=0.0, min_budget=0.2)) as any_budget:
        for _ in range(5):
            budget = any_budget.draw()
            with prunepath.record_counts(model) as counts:
                model(input_ids=ids)
            assert counts.active_fraction == pytest.approx(budget, abs=0.01)


def test_padding_counts_neither_towards_a_budget_nor_for_routers(model, windows):
    model.train()
    ids = windows(64, 3)
    mask = (torch.arange(16) < 6).long().expand(64, 16)
    config = AnyBudgetConfig(dense_share=0.0, min_budget=0.1)
    losses = []
    for token in (0, 40):
        padded = torch.where(mask.bool(), ids, token)
        with AnyBudget(model, config, seed=5) as any_budget:
            budget = any_budget.draw()
            with prunepath.record_counts(model) as counts:
                model(input_ids=padded, attention_mask=mask)
            assert counts.active_fraction == pytest.approx(budget, abs=0.01)
            losses.append(any_budget.router_loss())
    torch.testing.assert_close(*losses)


def test_a_dense_step_is_the_dense_model(model, windows):
    ids = windows(8, 4)
    expected = model(input_ids=ids).logits
    model.train()
    with AnyBudget(model, AnyBudgetConfig(dense_share=1.0)) as any_budget:
        assert any_budget.draw() == 1.0
        torch.testing.assert_close(model(input_ids=ids).logits, expected)


def test_a_restart_goes_on_with_the_same_budgets(model):
    any_budget = AnyBudget(model, seed=3)
    budgets = [any_budget.draw() for _ in range(8)]
    any_budget.restart(5)
    assert [any_budget.draw() for _ in range(3)] == budgets[5:]
    assert [AnyBudget(model, seed=4).draw() for _ in range(3)] != budgets[:3]


def test_evaluation_at_a_budget_needs_no_calibration(model, windows):
    ids = windows(64, 10)
    prunepath.set_threshold(model, 0.5)
    before = model(input_ids=ids).logits
    any_budget = AnyBudget(model)
    with any_budget.evaluating_at(0.25), prunepath.record_counts(model) as counts:
        model(input_ids=ids)
    assert counts.active_fraction == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert all(ffn.selector is None for ffn in sparse_ffns(model).values())
    assert not any(p.requires_grad for name, p in model.named_parameters() if is_router(name))


def test_evaluation_at_a_budget_leaves_training_at_the_drawn_one(model, windows):
    ids = windows(64, 10)
    with AnyBudget(model, AnyBudgetConfig(dense_share=1.0)) as any_budget:
        any_budget.draw()
        with any_budget.evaluating_at(0.25), prunepath.record_counts(model) as counts:
            model.train()(input_ids=ids)
        assert counts.active_fraction == 1.0
        any_budget.router_loss()
        with prunepath.record_counts(model) as counts:
            model(input_ids=ids)
        assert counts.active_fraction == 1.0


@pytest.mark.parametrize("num_experts", [16, 512])
def test_a_quantile_of_mass_activates_that_fraction(num_experts):
    logits = torch.randn(300, num_experts, generator=torch.Generator().manual_seed(0)) * 2
    for fraction in (0.01, 0.1, 0.35, 0.8, 1.0):
        mask, _ = reference.select(logits, mass_quantile(logits, fraction))
        assert mask.sum().item() == pytest.approx(max(fraction * mask.numel(), 300), abs=2)


def test_a_quantile_never_waits_for_the_device():
    # Whatever needs a value on the host raises in this mode.
    with FakeTensorMode():
        logits, valid = torch.empty(40, 16), torch.empty(40, dtype=torch.bool)
        tokens = sample_tokens(40, valid, 8, 5, device=logits.device)
        assert mass_quantile(logits[tokens], 0.3).shape == ()


def test_sampled_tokens_are_spread_over_the_valid_ones():
    valid = torch.arange(10_000) % 3 == 1
    tokens = sample_tokens(10_000, valid, 500, 12345, device=valid.device)
    assert len(tokens) == 500 and valid[tokens].all() and len(tokens.unique()) == 500
    for part in (tokens, tokens[:60]):
        per_quarter = torch.bincount(part // 2500, minlength=4).float() / len(part)
        assert per_quarter == pytest.approx([0.25] * 4, abs=0.03)
        positions = torch.bincount(part % 16, minlength=16)  # in sequences of 16 tokens
        assert positions.max() <= 2.5 * len(part) / 16
    few = sample_tokens(300, torch.arange(300) >= 290, 300, device=valid.device)
    assert torch.bincount(few - 290).tolist() == pytest.approx([30] * 10, abs=2)
    assert sample_tokens(40, None, 40, device=valid.device) == slice(None)
    nothing = sample_tokens(40, torch.zeros(40, dtype=torch.bool), 8, device=valid.device)
    assert nothing.min() >= 0 and nothing.max() < 40


def test_routers_learn_from_a_sample_where_all_logits_would_not_fit(model, windows, monkeypatch):
    ids = windows(64, 5)

    def router_gradient() -> torch.Tensor:
        with AnyBudget(model.train(), AnyBudgetConfig(dense_share=1.0)) as any_budget:
            any_budget.draw()
            model(input_ids=ids)
            any_budget.router_loss().backward()
            parameters = [p for ffn in sparse_ffns(model).values() for p in router_parameters(ffn)]
            gradient = torch.cat([p.grad.flatten() for p in parameters])
        model.zero_grad()
        return gradient

    whole = router_gradient()
    monkeypatch.setattr(module, "SAMPLED_LOGITS", 512 * 64)
    sampled = router_gradient()
    assert not torch.equal(sampled, whole)
    assert torch.cosine_similarity(sampled, whole, dim=0) > 0.9


@pytest.mark.parametrize("min_experts,max_experts", [(5, 0), (1, 4)])
def test_limits_on_experts_come_before_the_budget(model, windows, min_experts, max_experts):
    for ffn in sparse_ffns(model).values():
        ffn.min_experts, ffn.max_experts = min_experts, max_experts
    with AnyBudget(model).evaluating_at(0.05 if max_experts == 0 else 0.9), prunepath.record_counts(model) as counts:
        model(input_ids=windows(8, 3))
    for histogram in counts.histogram:
        ran = histogram.nonzero()
        assert ran.min() >= min_experts and ran.max() <= (max_experts or 64)


def gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.train()
    with AnyBudget(model, AnyBudgetConfig(dense_share=0.0), seed=1) as any_budget:
        any_budget.draw()
        loss = model(**inputs, labels=inputs["input_ids"]).loss + any_budget.router_loss()
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("padded", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, windows, padded):
    ids = windows(40, 11)
    inputs = {"input_ids": ids}
    if padded:
        inputs["attention_mask"] = (torch.arange(16) < torch.arange(3, 43)[:, None] % 17).long()
    expected = gradients(copy.deepcopy(model), **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(model, **inputs).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_a_pass_recomputed_in_another_thread_chooses_the_same_experts(model, windows):
    """As autograd does on a GPU, where the thread knows of no padding."""
    import threading

    ids = windows(40, 11)
    mask = (torch.arange(16) < 5).long().expand(40, 16)
    model.train()
    with AnyBudget(model, AnyBudgetConfig(dense_share=0.0), seed=1) as any_budget:
        any_budget.draw()
        ffn = next(iter(sparse_ffns(model).values()))
        called = []
        hook = ffn.register_input_hook(lambda ffn, x: called.append(x))
        model(input_ids=ids, attention_mask=mask)
        hook.remove()
        choices = [any_budget._choose(ffn, called[0], ffn.hidden(called[0]))]
        thread = threading.Thread(
            target=lambda: choices.append(any_budget._choose(ffn, called[0], ffn.hidden(called[0])))
        )
        thread.start()
        thread.join()
    assert torch.equal(*choices) and not choices[0].all()


def test_reentrant_gradient_checkpointing_is_refused(model, windows):
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(PrunePathError, match="use_reentrant"):
        gradients(model, input_ids=windows(8, 11))


def test_routers_learn_from_their_own_loss_and_nothing_else_does(model, windows):
    model.train()
    ids = windows(8, 5)
    with AnyBudget(model, AnyBudgetConfig(dense_share=0.0)) as any_budget:
        any_budget.draw()
        loss = model(input_ids=ids, labels=ids).loss
        any_budget.router_loss().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == is_router(name), name
        model.zero_grad()
        loss.backward()
        assert all(p.grad is None for name, p in model.named_parameters() if is_router(name))


def test_routers_require_gradients_while_they_learn_alone(model):
    def learning() -> set[bool]:
        return {p.requires_grad for name, p in model.named_parameters() if is_router(name)}

    assert learning() == {False}
    any_budget = AnyBudget(model)
    any_budget.attach()
    any_budget.attach()
    assert learning() == {True}
    any_budget.detach()
    assert learning() == {False}
    with AnyBudget(model.requires_grad_(True)):
        pass
    assert learning() == {True}, "as the user had it"


def test_router_loss_needs_a_forward_pass(model):
    with AnyBudget(model) as any_budget, pytest.raises(PrunePathError, match="forward pass"):
        any_budget.router_loss()


def test_a_dense_model_is_refused(llama):
    with pytest.raises(PrunePathError, match="got a dense LlamaForCausalLM"):
        AnyBudget(llama)


def test_detached_ffns_are_as_before(model, windows):
    ids = windows(8, 6)
    prunepath.set_threshold(model, 0.5)
    before = model(input_ids=ids).logits
    with AnyBudget(model) as any_budget:
        any_budget.draw()
        torch.testing.assert_close(model(input_ids=ids).logits, before)  # evaluation mode: the model's own thresholds
    model.train()
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_distillation_loss_is_a_divergence():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 7, generator=generator)
    assert distillation_loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = (p * (p.log() - q.log())).sum(-1)
    assert distillation_loss(student, teacher).item() == pytest.approx(expected.mean().item(), rel=1e-5)
    mask = torch.arange(5).expand(3, 5) < 2
    assert distillation_loss(student, teacher, mask).item() == pytest.approx(expected[mask].mean().item(), rel=1e-5)


def test_distillation_refuses_another_vocabulary():
    with pytest.raises(PrunePathError, match=r"\[2, 3, 7\], got \[2, 3, 8\]"):
        distillation_loss(torch.zeros(2, 3, 7), torch.zeros(2, 3, 8))
