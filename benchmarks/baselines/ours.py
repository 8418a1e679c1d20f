"""PrunePath, and what its parts are worth: another form of router, top-k in place of top-mass."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

import prunepath
from baselines.base import Batch, Method
from baselines.experts import ExpertMethod, TopK
from prunepath.config import PrunePathConfig, RouterForm
from prunepath.nn import SparseFFN
from prunepath.nn.experts import router_target
from prunepath.train.any_budget import AnyBudget
from prunepath.train.router import RouterTraining, contributions


class _SoftmaxRouted(ExpertMethod):
    """PrunePath's router, whose softmax learns each expert's share of the output, before and during fine-tuning."""

    def install_routers(self, inputs: list[torch.Tensor]) -> None:
        super().install_routers(inputs)
        rate = PrunePathConfig().router_learning_rate
        for ffn, x in zip(self.ffns, inputs, strict=True):
            training = RouterTraining(ffn, rate, self.settings.seed)
            chunks = x.split(1024)
            for i, chunk in enumerate(chunks):
                training.schedule(i / len(chunks), (i + 1) / len(chunks))
                training.observe(chunk, ffn.hidden(chunk))
            training.finish()
            ffn.router.requires_grad_(True)

    def router_weights(self, ffn: SparseFFN) -> float:
        return ffn.router.bytes_read(2) / 2

    def token_losses(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = router_target(contributions(ffn, hidden))
        return F.kl_div(ffn.router(x.detach()).log_softmax(-1), target, reduction="none").sum(-1)


class TopKRouted(_SoftmaxRouted, TopK):
    """PrunePath's router and training, but the k best experts for every token, k the same in all layers."""

    name = "topk"

    def scores(self, ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return ffn.router(x)


class PrunePath(Method):
    """The fewest experts whose probability adds up to τ: the package as its users call it."""

    name = "prunepath"
    one_checkpoint = True
    router_form: RouterForm | None = None  # the default

    def install(self, batches: Sequence[Batch]) -> None:
        # All the calibration batches are used.
        config = PrunePathConfig(
            expert_width=self.settings.expert_width,
            router_rank=self.settings.router_rank,
            router_form=self.router_form,
            seed=self.settings.seed,
            calibration_tokens=32768,
        )
        prunepath.convert(self.model, None, batches, config)
        self._any_budget = AnyBudget(self.model, seed=self.settings.seed)
        self._counting = contextlib.ExitStack()

    def trainable_parameters(self) -> list[nn.Parameter]:
        self._any_budget.attach()
        return super().trainable_parameters()

    def before_step(self, progress: float) -> None:
        self._any_budget.attach()
        self._any_budget.draw()

    def auxiliary_loss(self) -> torch.Tensor:
        return self._any_budget.router_loss()

    def calibrate(self, batches: Sequence[Batch]) -> None:
        self._any_budget.detach()
        prunepath.calibrate(self.model, None, batches)

    def bytes_read(self) -> float:
        return self.counts.read_fraction_at(2)  # as stored in bfloat16; here they may be float32

    def set_budget(self, budget: float) -> None:
        prunepath.set_budget(self.model, budget)
        self._counting.close()
        self.counts = self._counting.enter_context(prunepath.record_counts(self.model))


class PrunePathLinear(PrunePath):
    """PrunePath with routers whose logits are linear in the hidden state."""

    name = "prunepath-linear"
    router_form = "linear"
