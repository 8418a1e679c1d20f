"""Router training: the softmax learns each expert's share of the FFN's output."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.nn import functional as F

from prunepath.nn import SparseFFN
from prunepath.nn.experts import expert_contributions, router_target

RECALL_FRACTION = 0.25
_MINIBATCH = 128
_WARM_UP = 0.05


def contributions(ffn: SparseFFN, hidden: torch.Tensor) -> torch.Tensor:
    """What each expert adds to the output at the activations `hidden` [T, D], as routers learn it: float32 [T, E]."""
    with torch.autocast(hidden.device.type, enabled=False):
        return expert_contributions(hidden, ffn.tables()[-1], ffn.num_experts)


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
    by the first call's mean and deviation, so that one learning rate suits every model, and the scaling is folded into
    the weights at the end.

    Args:
        ffn: whose router is trained, of the rank that it has.
        learning_rate: peak learning rate of AdamW.
        seed: of the initial W_in and the order of tokens.
    """

    def __init__(self, ffn: SparseFFN, learning_rate: float, seed: int = 0) -> None:
        router = ffn.router
        device, rank, hidden_size = router.w_out.device, router.rank, ffn.hidden_size
        self.ffn = ffn
        self.mean = self.std = None
        self.seed = seed
        self.calls = 0
        self.w_in = None
        # A step of Adam moves every weight by about the learning rate, and so a result by the fan-in times that.
        groups = [{"params": [], "peak": learning_rate / math.sqrt(hidden_size)}]
        if rank:
            generator = torch.Generator().manual_seed(seed)
            w_in = torch.randn(rank, hidden_size, generator=generator, dtype=torch.float32) / math.sqrt(hidden_size)
            self.w_in = w_in.to(device)
            groups[0]["params"] = [self.w_in]
        self.w_out = torch.zeros(router.w_out.shape, dtype=torch.float32, device=device)
        self.bias = torch.zeros(router.bias.shape, dtype=torch.float32, device=device)
        groups.append({"params": [self.w_out, self.bias], "peak": learning_rate / math.sqrt(rank or hidden_size)})
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    def schedule(self, progress: float) -> None:
        """Sets the learning rate for the share `progress` in [0, 1] of all tokens seen: warm-up, then cosine."""
        factor = min(1.0, (progress + 1e-3) / _WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    @torch.no_grad()
    def observe(self, x: torch.Tensor, hidden: torch.Tensor) -> None:
        """Trains on tokens' inputs x [T, H] and activations [T, D]: T / 128 optimiser steps."""
        target = router_target(contributions(self.ffn, hidden))
        x = x.float()
        if self.mean is None:
            std, self.mean = torch.std_mean(x, 0, correction=0)
            # A feature that hardly varies in the first tokens may do so later.
            self.std = std.clamp_(min=1e-3 * std.mean().item() + 1e-6)
        inputs = (x - self.mean) / self.std
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed + self.calls))
        self.calls += 1
        with torch.autocast(x.device.type, enabled=False):
            for rows in order.to(x.device).split(_MINIBATCH):
                self._step(inputs[rows], target[rows])

    def _step(self, x: torch.Tensor, share: torch.Tensor) -> None:
        """One step along the gradient of the KL, which at the logits is softmax(z) − c/Σc."""
        inner = x if self.w_in is None else x @ self.w_in.t()
        error = torch.addmm(self.bias, inner, self.w_out.t()).softmax(-1).sub_(share).div_(len(x))
        self.bias.grad = error.sum(0)
        self.w_out.grad = error.t() @ inner
        if self.w_in is not None:
            self.w_in.grad = (error @ self.w_out).t() @ x
        self.optimizer.step()

    @property
    def is_begun(self) -> bool:
        """Whether it has seen tokens."""
        return self.mean is not None

    def state_dict(self) -> dict[str, Any]:
        """What a training that goes on later needs, beside what the constructor takes."""
        names = ("calls", "mean", "std", "w_in", "w_out", "bias")
        return {**{name: getattr(self, name) for name in names}, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls, self.mean, self.std = state["calls"], state["mean"], state["std"]
        for name in ("w_in", "w_out", "bias"):
            if state[name] is not None:
                getattr(self, name).copy_(state[name])
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def finish(self) -> None:
        """Writes the trained weights, in the units of the raw input, into the FFN's router."""
        router = self.ffn.router
        first = (self.w_out if self.w_in is None else self.w_in) / self.std
        shift = first @ self.mean
        if self.w_in is None:
            router.w_out.copy_(first)
            router.bias.copy_(self.bias - shift)
        else:
            router.w_in.copy_(first)
            router.w_out.copy_(self.w_out)
            router.bias.copy_(self.bias - self.w_out @ shift)
