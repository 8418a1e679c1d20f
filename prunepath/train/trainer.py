"""Any-budget fine-tuning with `transformers.Trainer`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from prunepath.errors import PrunePathError
from prunepath.nn import SparseFFN, for_inference, for_training, sparse_ffns
from prunepath.nn.thresholds import check_fraction
from prunepath.train.any_budget import AnyBudget, AnyBudgetConfig, distillation_loss, is_router

ROUTER_RATE = 3.0
"""The routers' learning rate over the backbone's, where nothing else is said."""


def dense_teacher(model: nn.Module, *, share_frozen: bool = False) -> nn.Module:
    """A frozen copy of a sparse model that runs all experts.

    Args:
        share_frozen: parameters that need no gradient are the model's own, not copies: with LoRA nearly all of them.
            They must then stay frozen, but for the routers, whose choice makes no difference to it.
    """
    shared = {id(p): p for p in model.parameters() if share_frozen and not p.requires_grad}
    teacher = copy.deepcopy(model, shared).eval().requires_grad_(False)
    for ffn in sparse_ffns(teacher).values():
        ffn.threshold = 1.0
        ffn.max_experts = 0
        ffn.selector, ffn.executor = None, _run_densely
        ffn._input_hooks.clear()
        ffn._counts_hooks.clear()
    return teacher


def _run_densely(ffn: SparseFFN, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An executor that saves the router, the selection and the mask of an FFN that runs all its experts."""
    counts = torch.full((len(x),), ffn.num_experts, dtype=torch.int32, device=x.device)
    return ffn.project(ffn.hidden(x)), counts


class AnyBudgetTrainer(Trainer):
    """A Trainer whose every step runs a sparse model at a budget drawn at random (`AnyBudget`).

    Loss: the model's own, plus `distillation_weight` times the divergence from the dense teacher's output, plus
    `router_weight` times the routers' divergence from their experts' contributions. Works under `accelerate` on several
    processes, all of which draw the same budgets. After training, budgets need new thresholds: `prunepath.calibrate`.

    Args:
        model: a sparse model.
        teacher: the dense model, with the same vocabulary; None takes `model` as it is now with all its experts, which
            costs memory for a copy of the weights that train. Where only routers train, no teacher is used: nothing
            could learn from it.
        any_budget: see `AnyBudgetConfig`.
        evaluation_budgets: `evaluate` measures at these too, for example as `eval_0.25_loss`, beside the model's own
            thresholds (`eval_loss`).
        distillation_weight: 0 uses no teacher.
        router_weight: of the routers' loss.
        router_learning_rate: None is `ROUTER_RATE` times the learning rate of the arguments.
        args, keywords: as for `transformers.Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        teacher: nn.Module | None = None,
        any_budget: AnyBudgetConfig | None = None,
        evaluation_budgets: Sequence[float] = (),
        distillation_weight: float = 1.0,
        router_weight: float = 1.0,
        router_learning_rate: float | None = None,
        **keywords: Any,
    ) -> None:
        args = TrainingArguments() if args is None else args
        # Every parameter gets a gradient in every step, though the routers get none from the model's own output.
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        if args.n_gpu > 1:
            args._n_gpu = 1  # nn.DataParallel would train copies of the FFNs; accelerate starts a process for each GPU
        super().__init__(model, args, **keywords)
        # The loss is then a mean over each micro-batch, as the two other terms are.
        self.model_accepts_loss_kwargs = False
        self._makes_optimizer = self.optimizer is None
        self.any_budget = AnyBudget(model, any_budget, seed=self.args.seed)
        self.add_callback(_ContinueBudgets(self.any_budget))
        self.evaluation_budgets = [check_fraction("budget", budget) for budget in evaluation_budgets]
        self.distillation_weight = distillation_weight
        self.router_weight = router_weight
        self.router_learning_rate = router_learning_rate
        self.teacher = None
        if distillation_weight and any(p.requires_grad for name, p in model.named_parameters() if not is_router(name)):
            if teacher is None:
                sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # takes the model's own storage apart
                teacher = dense_teacher(model, share_frozen=not sharded)
            self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)

    def create_optimizer(self, *arguments: Any, **keywords: Any) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            held = {p for group in self.optimizer.param_groups for p in group["params"]}
            if any(p.requires_grad and p not in held for name, p in self.model.named_parameters() if is_router(name)):
                raise PrunePathError(
                    "Expected an optimizer of all routers' parameters: make it after prunepath.for_training(model)."
                )
        else:
            super().create_optimizer(*arguments, **keywords)
            routers = {p for name, p in self.model.named_parameters() if is_router(name)}
            rate = self.router_learning_rate or ROUTER_RATE * self.args.learning_rate
            for group in list(self.optimizer.param_groups):
                own = [p for p in group["params"] if p in routers]
                if own:
                    group["params"] = [p for p in group["params"] if p not in routers]
                    self.optimizer.add_param_group({**group, "params": own, "lr": rate, "initial_lr": rate})
            self.optimizer.param_groups[:] = [group for group in self.optimizer.param_groups if group["params"]]
        return self.optimizer

    def train(self, *arguments: Any, **keywords: Any):
        for_training(self.model)
        try:
            with self.any_budget:
                return super().train(*arguments, **keywords)
        finally:
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # whose weights are parts of other tensors
                for_inference(self.model)
                if self._makes_optimizer:
                    self.optimizer = None  # another training has other parameters: the routers' are packed now

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **keywords: Any):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **keywords)
        self.any_budget.draw()
        loss, outputs = super().compute_loss(model, inputs, True, **keywords)
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                teacher_logits = self.teacher(**inputs).logits
            loss = loss + self.distillation_weight * distillation_loss(
                outputs.logits, teacher_logits, predicted_positions(self.teacher, inputs, outputs.logits)
            )
        loss = loss + self.router_weight * self.any_budget.router_loss()
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ):
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        for budget in self.evaluation_budgets:
            prefix = f"{metric_key_prefix}_{budget:g}"
            with self.any_budget.evaluating_at(budget):
                at_budget = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, prefix)
            output.metrics.update(at_budget.metrics)
        return output


class _ContinueBudgets(TrainerCallback):
    """Lets a resumed training draw the budgets that the interrupted one would have drawn."""

    def __init__(self, any_budget: AnyBudget) -> None:
        self.any_budget = any_budget

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        self.any_budget.restart(state.global_step * args.gradient_accumulation_steps)


def predicted_positions(model: nn.Module, inputs: dict, logits: torch.Tensor) -> torch.Tensor | None:
    """Which of the logits [B, S, V] the labels score: bool [B, S]; None for all, or for logits [B, V]."""
    labels = inputs.get("labels")
    if labels is None or logits.dim() != 3 or labels.shape != logits.shape[:2]:
        return None
    scored = labels != -100
    if getattr(model.config, "is_encoder_decoder", False) or not predicts_next(model):
        return scored
    return torch.cat([scored[:, 1:], torch.zeros_like(scored[:, :1])], dim=1)  # logits i predict label i + 1


def predicts_next(model: nn.Module) -> bool:
    """Whether this is a causal language model, whose logits i score label i + 1."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # a peft model stands around it
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


class AnyBudgetCallback(TrainerCallback):
    """Any-budget training of a sparse model in any other Trainer, on one process: budgets and routers, no distillation.

    The routers' loss has its own backward pass after the Trainer's. From when it is made until training ends, passes in
    training mode run at drawn budgets, and the routers require gradients.

    Args:
        model: the sparse model that the Trainer trains.
        config: see `AnyBudgetConfig`.
        router_weight: of the routers' loss.
        seed: of the drawn budgets.
    """

    def __init__(
        self, model: nn.Module, config: AnyBudgetConfig | None = None, *, router_weight: float = 1.0, seed: int = 0
    ) -> None:
        self.any_budget = AnyBudget(model, config, seed=seed)
        self.any_budget.attach()  # the Trainer's optimiser takes what requires gradients before it calls back
        self.router_weight = router_weight

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        if args.world_size > 1 or args.fp16:
            raise PrunePathError(
                "Expected one process and no fp16 loss scaling with AnyBudgetCallback; for those there "
                "is AnyBudgetTrainer."
            )
        self.any_budget.restart(state.global_step * args.gradient_accumulation_steps)
        self.any_budget.attach()

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        self.any_budget.draw()

    def on_substep_end(self, args, state, control, **_: Any) -> None:
        self._train_routers(args)
        self.any_budget.draw()

    def on_pre_optimizer_step(self, args, state, control, **_: Any) -> None:
        self._train_routers(args)

    def on_train_end(self, args, state, control, **_: Any) -> None:
        self.any_budget.detach()

    def _train_routers(self, args) -> None:
        (self.any_budget.router_loss() * (self.router_weight / args.gradient_accumulation_steps)).backward()
