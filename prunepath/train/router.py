"""Router training: the softmax learns each expert's share of the FFN's output."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.nn import functional as F

from prunepath.config import PrunePathConfig
from prunepath.nn import SparseFFN
from prunepath.nn.experts import expert_contributions, router_target

RECALL_FRACTION = 0.25
_MINIBATCH = 256
_WARM_UP = 0.05


def contributions(ffn: SparseFFN, x: torch.Tensor) -> torch.Tensor:
    """What each expert adds to the output for x [T, H], as the routers learn it: c, float32 [T, E]."""
    hidden = ffn.hidden(x)
    with torch.autocast(x.device.type, enabled=False):
        return expert_contributions(hidden, ffn.contribution_weight(), ffn.num_experts, ffn.center)


@dataclasses.dataclass(frozen=True)
class RouterQuality:
    """How well a router predicts contributions c.

    Attributes:
        kl: mean of KL(c/Σc ‖ softmax(z)) over tokens, in nats.
        recall: Σc of the `RECALL_FRACTION` of experts that the router likes best, as a share of what the best such
            selection has; 1 is perfect.
    """

    kl: float
    recall: float

    @classmethod
    @torch.no_grad()
    def of(cls, logits: torch.Tensor, true: torch.Tensor) -> RouterQuality:
        """From logits and contributions, float32 [T, E] each."""
        kl = F.kl_div(logits.log_softmax(-1), router_target(true), reduction="batchmean").item()
        active = max(1, round(RECALL_FRACTION * true.shape[1]))
        taken = true.gather(1, logits.topk(active).indices).sum().item()
        best = true.topk(active).values.sum().item()
        return cls(kl, taken / best if best > 0 else 1.0)


class RouterTraining:
    """Trains one FFN's router on the tokens that stream through the dense model, each seen once.

    Loss: KL(c/Σc ‖ softmax(z)), with c the experts' contributions (`expert_contributions`). The input is standardised
    while training, so that one learning rate suits every model, and the scaling is folded into the weights at the end.

    Args:
        ffn: whose router is trained.
        mean, std: of the input features, float32 [H].
        config: the learning rate.
    """

    def __init__(self, ffn: SparseFFN, mean: torch.Tensor, std: torch.Tensor, config: PrunePathConfig) -> None:
        self.ffn = ffn
        self.mean, self.std = mean, std
        self.weight = torch.zeros(ffn.num_experts, ffn.hidden_size, device=mean.device, requires_grad=True)
        self.bias = torch.zeros(ffn.num_experts, device=mean.device, requires_grad=True)
        # A step of Adam moves every weight by about the learning rate, and so a logit by H times that at worst.
        self.peak = config.router_learning_rate / math.sqrt(ffn.hidden_size)
        self.optimizer = torch.optim.AdamW(
            [self.weight, self.bias], lr=self.peak, weight_decay=0.0, fused=mean.is_cuda or None
        )
        self._kl: torch.Tensor | None = None
        self._progress = 0.0

    @property
    def kl(self) -> float:
        """A moving average of the loss, in nats; NaN before the first step."""
        return math.nan if self._kl is None else self._kl.item()

    def schedule(self, progress: float) -> None:
        """Sets the learning rate for the share `progress` in [0, 1] of all tokens seen: warm-up, then cosine."""
        warm = min(1.0, (progress + 1e-3) / _WARM_UP)
        rate = self.peak * warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def observe(self, ffn: SparseFFN, x: torch.Tensor) -> None:
        """An `observe_input` hook: x [T, H] becomes T / 256 optimiser steps."""
        with torch.no_grad():
            target = router_target(contributions(ffn, x))
            inputs = (x.float() - self.mean) / self.std
        with torch.autocast(x.device.type, enabled=False):
            self._train(inputs, target)

    def _train(self, inputs: torch.Tensor, target: torch.Tensor) -> None:
        for batch, share in zip(inputs.split(_MINIBATCH), target.split(_MINIBATCH), strict=True):
            with torch.enable_grad():
                loss = F.kl_div(F.linear(batch, self.weight, self.bias).log_softmax(-1), share, reduction="batchmean")
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            value = loss.detach()  # the host does not wait for it
            self._kl = value if self._kl is None else self._kl.lerp(value, 0.05)

    def state_dict(self) -> dict[str, Any]:
        """What a training that goes on later needs, beside what the constructor takes."""
        state = {"weight": self.weight.detach(), "bias": self.bias.detach(), "optimizer": self.optimizer.state_dict()}
        return state if self._kl is None else {**state, "kl": self._kl}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight.copy_(state["weight"])
        self.bias.copy_(state["bias"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._kl = state.get("kl")

    @torch.no_grad()
    def finish(self) -> None:
        """Writes the trained weights, in the units of the raw input, into the FFN's router."""
        weight = self.weight / self.std
        self.ffn.router.weight.copy_(weight)
        self.ffn.router.bias.copy_(self.bias - weight @ self.mean)
