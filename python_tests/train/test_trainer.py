"""Any-budget fine-tuning with transformers' Trainer: budgets, distillation, routers, several processes."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import prunepath
from prunepath.conversion.batches import mean_loss
from prunepath.errors import PrunePathError
from prunepath.train.any_budget import AnyBudget, AnyBudgetConfig, distillation_loss, mass_quantile_mask
from prunepath.train.trainer import AnyBudgetCallback, AnyBudgetTrainer, dense_teacher, is_router

LENGTH = 16


def windows(count: int, seed: int) -> torch.Tensor:
    """Rows that count upwards from a random start: easy to learn."""
    starts = torch.randint(0, 64, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + torch.arange(LENGTH)) % 64


@pytest.fixture(scope="module")
def converted():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    settings = prunepath.PrunePathConfig(
        num_experts=16, router_tokens=1024, partition_tokens=256, calibration_tokens=512, sequence_length=LENGTH
    )
    return prunepath.convert(model.eval(), None, list(windows(128, 1)), settings)


@pytest.fixture
def model(converted):
    return copy.deepcopy(converted)


def arguments(folder, **more) -> TrainingArguments:
    defaults = dict(max_steps=4, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[], save_strategy="no")
    return TrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **(defaults | more))


def dataset(count: int = 64) -> list[dict]:
    return [{"input_ids": row, "labels": row} for row in windows(count, 2)]


@pytest.mark.parametrize("jitter,min_budget", [(0.0, 0.2), (0.5, 0.2), (0.5, 0.8)])
def test_a_training_step_runs_at_the_drawn_budget(model, jitter, min_budget):
    model.train()
    ids = windows(64, 3)
    with AnyBudget(model, AnyBudgetConfig(dense_share=0.0, min_budget=min_budget, layer_jitter=jitter)) as any_budget:
        for _ in range(5):
            budget = any_budget.draw()
            with prunepath.record_counts(model) as counts:
                model(input_ids=ids)
            assert counts.active_fraction == pytest.approx(budget, abs=0.02)


def test_a_dense_step_is_the_dense_model(model):
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


def test_evaluation_at_a_budget_needs_no_calibration(model):
    ids = windows(64, 10)
    prunepath.set_threshold(model, 0.5)
    before = model(input_ids=ids).logits
    any_budget = AnyBudget(model)
    with any_budget.evaluating_at(0.25), prunepath.record_counts(model) as counts:
        model(input_ids=ids)
    assert counts.active_fraction == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert all(ffn.select is None for ffn in prunepath.sparse_ffns(model).values())


@pytest.mark.parametrize("padded", [False, True])
def test_selection_never_waits_for_the_device(padded):
    # Whatever needs a value on the host cannot run on the meta device.
    logits = torch.empty(40, 16, device="meta")
    valid = torch.empty(40, dtype=torch.bool, device="meta") if padded else None
    assert mass_quantile_mask(logits, valid, 0.3, 2, 9).shape == (40, 16)


@pytest.mark.parametrize("min_experts,max_experts", [(3, 0), (1, 4)])
def test_limits_on_experts_come_before_the_budget(min_experts, max_experts):
    logits = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)) * 3
    counts = mass_quantile_mask(logits, None, 0.05 if max_experts == 0 else 0.9, min_experts, max_experts).sum(-1)
    assert counts.min() >= min_experts and counts.max() <= (max_experts or 16)


def gradients(model, ids) -> dict[str, torch.Tensor]:
    model.train()
    with AnyBudget(model, AnyBudgetConfig(dense_share=0.0), seed=1) as any_budget:
        any_budget.draw()
        loss = model(input_ids=ids, labels=ids).loss + any_budget.router_loss()
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradient_checkpointing_changes_no_gradient(model):
    ids = windows(8, 11)
    expected = gradients(copy.deepcopy(model), ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients(model, ids).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_reentrant_gradient_checkpointing_is_refused(model):
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(PrunePathError, match="use_reentrant"):
        gradients(model, windows(8, 11))


def test_routers_learn_from_their_own_loss_and_nothing_else_does(model):
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


def test_router_loss_needs_a_forward_pass(model):
    with AnyBudget(model) as any_budget, pytest.raises(PrunePathError, match="forward pass"):
        any_budget.router_loss()


def test_detached_ffns_are_as_before(model):
    ids = windows(8, 6)
    prunepath.set_threshold(model, 0.5)
    before = model(input_ids=ids).logits
    with AnyBudget(model) as any_budget:
        any_budget.draw()
        torch.testing.assert_close(model(input_ids=ids).logits, before)  # evaluation mode: the model's own thresholds
    model.train()
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_padding_does_not_count_towards_a_budget():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 16, generator=generator)
    valid = torch.arange(40) < 24
    mask = mass_quantile_mask(logits, valid, 0.3)
    torch.testing.assert_close(mask[valid], mass_quantile_mask(logits[valid], None, 0.3))
    assert mask[valid].float().mean().item() == pytest.approx(0.3, abs=0.01)


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


def test_training_improves_the_model_at_a_quarter_of_its_experts(model, tmp_path):
    held_out = [{"input_ids": windows(32, 7), "labels": windows(32, 7)}]

    def losses() -> list[float]:
        prunepath.calibrate(model, None, list(windows(64, 8)))
        values = []
        for budget in (1.0, 0.25):
            prunepath.set_budget(model, budget)
            values.append(mean_loss(model, held_out))
        return values

    before = losses()
    trainer = AnyBudgetTrainer(
        model, arguments(tmp_path, max_steps=40), train_dataset=dataset(), distillation_weight=0.0
    )
    trainer.train()
    model.eval()
    after = losses()
    assert after[0] < before[0] - 0.2 and after[1] < before[1] - 0.2, (before, after)


def test_routers_have_their_own_learning_rate(model, tmp_path):
    trainer = AnyBudgetTrainer(model, arguments(tmp_path), train_dataset=dataset(), router_learning_rate=0.02)
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        kinds = {is_router(names[id(p)]) for p in group["params"]}
        assert len(kinds) == 1
        assert group["lr"] == (0.02 if kinds.pop() else 1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_the_teacher_is_a_dense_copy_that_stays_as_it_is(model, tmp_path):
    ids = windows(8, 9)
    expected = model(input_ids=ids).logits
    prunepath.set_threshold(model, 0.3)
    teacher = dense_teacher(model)
    torch.testing.assert_close(teacher(input_ids=ids).logits, expected)
    AnyBudgetTrainer(model, arguments(tmp_path), train_dataset=dataset(), teacher=teacher).train()
    torch.testing.assert_close(teacher(input_ids=ids).logits, expected)


def test_the_callback_trains_routers_and_backbone_in_any_trainer(model, tmp_path):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = arguments(tmp_path, gradient_accumulation_steps=2)
    Trainer(model, settings, train_dataset=dataset(), callbacks=[AnyBudgetCallback(model)]).train()
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []
    assert all(ffn.select is None for ffn in prunepath.sparse_ffns(model).values())


def test_a_frozen_backbone_stays_as_it_is(model, tmp_path):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_router(name))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    AnyBudgetTrainer(model, arguments(tmp_path), train_dataset=dataset()).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not is_router(name)), name


def test_accumulated_gradients_are_those_of_the_whole_batch(model, tmp_path):
    trained = []
    for rows, accumulated in ((16, 1), (4, 4)):
        copied = copy.deepcopy(model)
        settings = arguments(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulated,
            optim="sgd",
            learning_rate=0.1,
        )
        AnyBudgetTrainer(copied, settings, train_dataset=dataset(), any_budget=AnyBudgetConfig(dense_share=1.0)).train()
        trained.append(dict(copied.named_parameters()))
    start = dict(model.named_parameters())
    for name, parameter in trained[0].items():
        assert not torch.equal(parameter, start[name]), name
        torch.testing.assert_close(trained[1][name], parameter, msg=name, rtol=1e-4, atol=1e-5)


def test_half_precision_autocast_reaches_student_and_teacher(model, tmp_path):
    trainer = AnyBudgetTrainer(model, arguments(tmp_path, bf16=True), train_dataset=dataset())
    seen = []
    trainer.teacher.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    result = trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert torch.tensor(result.training_loss).isfinite()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_evaluation_reports_each_budget(model, tmp_path):
    trainer = AnyBudgetTrainer(
        model,
        arguments(tmp_path, eval_strategy="steps", eval_steps=2, metric_for_best_model="eval_0.1_loss"),
        train_dataset=dataset(),
        eval_dataset=dataset(16),
        evaluation_budgets=[0.1, 1.0],
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_1_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert metrics["eval_0.1_loss"] > metrics["eval_loss"] + 1e-4
    during = [entry["eval_0.1_loss"] for entry in trainer.state.log_history if "eval_0.1_loss" in entry]
    assert len(during) == 3 and trainer.state.best_metric == min(during[:2])


def test_a_frozen_backbone_needs_no_teacher(model, tmp_path):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_router(name))
    assert AnyBudgetTrainer(model, arguments(tmp_path), train_dataset=dataset()).teacher is None


def test_lora_trains_beside_frozen_weights_that_the_teacher_shares(model, tmp_path):
    peft = pytest.importorskip("peft")
    ids = windows(8, 12)
    dense = model(input_ids=ids).logits
    settings = peft.LoraConfig(
        r=4, target_modules="all-linear", exclude_modules=r".*\.router", modules_to_save=["router"]
    )
    tuned = peft.get_peft_model(model, settings)
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    trainer = AnyBudgetTrainer(tuned, arguments(tmp_path), train_dataset=dataset())
    copies = dict(trainer.teacher.named_parameters())
    trainer.train()
    for name, parameter in tuned.named_parameters():
        learns = "lora_" in name or "modules_to_save" in name
        assert torch.equal(parameter, before[name]) == (not learns), name
        assert (copies[name].data_ptr() == parameter.data_ptr()) == (not learns), name
    torch.testing.assert_close(trainer.teacher(input_ids=ids).logits, dense)


def test_an_encoder_decoder_trains_with_padding(tmp_path):
    torch.manual_seed(0)
    shape = dict(vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(T5Config(**shape, feed_forward_proj="relu")).eval()
    sources, targets = windows(64, 13), windows(64, 14)[:, :8].clone()
    mask = torch.ones_like(sources)
    mask[:, 10:] = 0
    targets[:, 5:] = -100
    rows = [{"input_ids": s, "attention_mask": m, "labels": t} for s, m, t in zip(sources, mask, targets, strict=True)]
    batches = [{name: torch.stack([row[name] for row in rows[i : i + 8]]) for name in rows[0]} for i in range(0, 64, 8)]
    settings = prunepath.PrunePathConfig(
        num_experts=8, router_tokens=256, partition_tokens=256, calibration_tokens=128, sequence_length=LENGTH
    )
    prunepath.convert(model, None, batches, settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    AnyBudgetTrainer(model, arguments(tmp_path), train_dataset=rows).train()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


_TWO_PROCESSES = """
import sys, torch, prunepath
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from prunepath.train.trainer import AnyBudgetTrainer

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=2))
rows = (torch.arange(64)[:, None] + torch.arange(16)) % 64
settings = prunepath.PrunePathConfig(num_experts=8, router_tokens=512, partition_tokens=256, calibration_tokens=256,
                                     sequence_length=16)
prunepath.convert(model, None, list(rows), settings)
arguments = TrainingArguments(output_dir=sys.argv[1], use_cpu=True, ddp_backend="gloo", max_steps=3,
                              per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], save_strategy="no")
start = torch.cat([p.detach().flatten() for p in model.parameters()])
trainer = AnyBudgetTrainer(model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in rows])
trainer.train()
end = torch.cat([p.detach().flatten() for p in model.parameters()])
torch.save((start, end), f"{sys.argv[1]}/rank{trainer.args.process_index}-of-{trainer.args.world_size}.pt")
"""


def test_two_processes_train_one_model(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(_TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    result = subprocess.run(
        [*command, str(script), str(tmp_path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (start0, end0), (start1, end1) = (torch.load(tmp_path / f"rank{rank}-of-2.pt") for rank in range(2))
    assert torch.equal(start0, start1) and torch.equal(end0, end1)
    assert not torch.equal(start0, end0)
