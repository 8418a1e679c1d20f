"""Any-budget fine-tuning with transformers' Trainer: learning rates, distillation, evaluation, LoRA, other families."""

import copy

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainerCallback

import prunepath
from prunepath.errors import PrunePathError
from prunepath.nn import sparse_ffns
from prunepath.train.any_budget import AnyBudget, AnyBudgetConfig, is_router
from prunepath.train.trainer import AnyBudgetCallback, AnyBudgetTrainer, dense_teacher


def test_training_improves_the_model_at_a_quarter_of_its_experts(model, arguments, dataset, windows):
    held_out = windows(32, 7)

    @torch.no_grad()
    def losses() -> list[float]:
        model.eval()
        values = []
        for budget in (1.0, 0.25):
            with AnyBudget(model).evaluating_at(budget):
                values.append(model(input_ids=held_out, labels=held_out).loss.item())
        return values

    before = losses()
    trainer = AnyBudgetTrainer(model, arguments(max_steps=40), train_dataset=dataset(), distillation_weight=0.0)
    trainer.train()
    after = losses()
    assert after[0] < before[0] - 0.2 and after[1] < before[1] - 0.2, (before, after)


def test_routers_have_their_own_learning_rate(model, arguments, dataset):
    trainer = AnyBudgetTrainer(model, arguments(), train_dataset=dataset(), router_learning_rate=0.02)
    with trainer.any_budget:
        optimizer = trainer.create_optimizer()
        names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        kinds = {is_router(names[id(p)]) for p in group["params"]}
        assert len(kinds) == 1
        assert group["lr"] == (0.02 if kinds.pop() else 1e-3)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


def test_it_trains_again_with_what_packed_routers_have_become(model, arguments, dataset):
    trainer = AnyBudgetTrainer(model, arguments(max_steps=2, learning_rate=0.05), train_dataset=dataset())
    states = []
    for _ in range(2):
        trainer.train()
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items() if is_router(name)})
    assert any(name.endswith("w_out") and tensor.dtype == torch.uint8 for name, tensor in states[0].items())
    assert all(not torch.equal(t, states[1][n]) for n, t in states[0].items() if not n.endswith("_scale"))


def test_an_optimizer_that_lacks_routers_is_refused(model, arguments, dataset):
    def trainer():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return AnyBudgetTrainer(model, arguments(), train_dataset=dataset(), optimizers=(optimizer, None))

    with pytest.raises(PrunePathError, match=r"make it after prunepath\.for_training"):
        trainer().train()
    prunepath.for_training(model)
    trainer().train()


def test_the_teacher_is_a_dense_copy_that_stays_as_it_is(model, arguments, dataset, windows):
    ids = windows(8, 9)
    expected = model(input_ids=ids).logits
    prunepath.set_threshold(model, 0.3)
    for ffn in sparse_ffns(model).values():
        ffn.max_experts = 20
    teacher = dense_teacher(model)
    torch.testing.assert_close(teacher(input_ids=ids).logits, expected)
    AnyBudgetTrainer(model, arguments(), train_dataset=dataset(), teacher=teacher).train()
    torch.testing.assert_close(teacher(input_ids=ids).logits, expected)


def test_the_callback_trains_routers_and_backbone_in_any_trainer(model, arguments, dataset):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = arguments(gradient_accumulation_steps=2)
    Trainer(model, settings, train_dataset=dataset(), callbacks=[AnyBudgetCallback(model)]).train()
    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []
    assert all(ffn.selector is None for ffn in sparse_ffns(model).values())


def test_a_frozen_backbone_stays_as_it_is(model, arguments, dataset):
    model.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    AnyBudgetTrainer(model, arguments(), train_dataset=dataset()).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not is_router(name)), name


def test_weights_lie_row_by_row_while_they_train_and_by_neurons_afterwards(model, arguments, dataset):
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seen.append([p.is_contiguous() for p in model.parameters()])
            if state.global_step == 2:
                raise KeyboardInterrupt

    ffns = sparse_ffns(model).values()
    assert all(ffn.has_row_tables() for ffn in ffns)
    seen = []
    trainer = AnyBudgetTrainer(model, arguments(), train_dataset=dataset(), callbacks=[Look()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(seen) == 2 and all(map(all, seen))
    assert all(ffn.has_row_tables() and ffn.selector is None for ffn in ffns)
    assert not any(p.requires_grad for name, p in model.named_parameters() if is_router(name))


def test_training_goes_on_where_it_was_interrupted(model, arguments, dataset):
    settings = arguments(max_steps=6, save_strategy="steps", save_steps=3, dataloader_num_workers=0)
    resumed = copy.deepcopy(model)
    AnyBudgetTrainer(model, settings, train_dataset=dataset()).train()
    AnyBudgetTrainer(resumed, settings, train_dataset=dataset(), teacher=dense_teacher(resumed)).train(
        resume_from_checkpoint=f"{settings.output_dir}/checkpoint-3"
    )
    for (name, expected), parameter in zip(model.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, msg=name)


def test_accumulated_gradients_are_those_of_the_whole_batch(model, arguments, dataset):
    trained = []
    for rows, accumulated in ((16, 1), (4, 4)):
        copied = copy.deepcopy(model)
        settings = arguments(
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


def test_half_precision_autocast_reaches_student_and_teacher(model, arguments, dataset):
    trainer = AnyBudgetTrainer(model, arguments(bf16=True), train_dataset=dataset())
    seen = []
    trainer.teacher.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    result = trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert torch.tensor(result.training_loss).isfinite()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_evaluation_reports_each_budget(model, arguments, dataset):
    trainer = AnyBudgetTrainer(
        model,
        arguments(eval_strategy="steps", eval_steps=2, metric_for_best_model="eval_0.1_loss"),
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


def test_a_frozen_backbone_needs_no_teacher(model, arguments, dataset):
    model.requires_grad_(False)
    assert AnyBudgetTrainer(model, arguments(), train_dataset=dataset()).teacher is None


def test_lora_trains_beside_frozen_weights_that_the_teacher_shares(model, arguments, dataset, windows):
    peft = pytest.importorskip("peft")
    ids = windows(8, 12)
    dense = model(input_ids=ids).logits
    settings = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["router"])
    tuned = peft.get_peft_model(model, settings)
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    trainer = AnyBudgetTrainer(tuned, arguments(), train_dataset=dataset())
    copies = dict(trainer.teacher.named_parameters())
    trainer.train()
    for name, parameter in tuned.named_parameters():
        learns = "lora_" in name or "modules_to_save" in name
        assert torch.equal(parameter, before[name]) == (not learns), name
        assert (copies[name].data_ptr() == parameter.data_ptr()) == (not learns), name
    torch.testing.assert_close(trainer.teacher(input_ids=ids).logits, dense)


def test_an_encoder_decoder_trains_with_padding(make_sparse, arguments, windows):
    torch.manual_seed(0)
    shape = dict(vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=2, decoder_start_token_id=0)
    model = make_sparse(T5ForConditionalGeneration(T5Config(**shape, feed_forward_proj="relu")).eval(), num_experts=8)
    sources, targets = windows(64, 13), windows(64, 14)[:, :8].clone()
    mask = torch.ones_like(sources)
    mask[:, 10:] = 0
    targets[:, 5:] = -100
    rows = [{"input_ids": s, "attention_mask": m, "labels": t} for s, m, t in zip(sources, mask, targets, strict=True)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    AnyBudgetTrainer(model, arguments(), train_dataset=rows).train()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []
