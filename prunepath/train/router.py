"""Router training: the softmax learns each expert's share of what a token's experts add to the output."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.nn import functional as F

from prunepath.errors import PrunePathError
from prunepath.nn import SparseFFN
from prunepath.nn.experts import expert_contributions, router_target
from prunepath.nn.router import TABLES, row_scales

RECALL_FRACTION = 0.25
_MINIBATCH = 128
_WARM_UP = 0.05
_RIDGE = 1e-4
_LEAST_MISS = 1e-4


def contributions(ffn: SparseFFN, hidden: torch.Tensor) -> torch.Tensor:
    """What each expert adds to the output at the activations `hidden` [T, D], as routers learn it: float32 [T, E]."""
    with torch.autocast(hidden.device.type, enabled=False):
        return expert_contributions(hidden, ffn.tables()[-1], ffn.num_experts)


@dataclasses.dataclass(frozen=True)
class RouterQuality:
    """How well a router predicts contributions c.

    Attributes:
        kl: mean of KL(√c/Σ√c ‖ softmax(z)) over tokens, in nats.
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

    Loss: KL(√c/Σ√c ‖ softmax(z)), with c the experts' contributions (`expert_contributions`). A linear router begins at
    random, on inputs standardised by the first call's mean and deviation, so that one learning rate suits every model;
    the scaling is folded into the weights at the end. A factored one begins as the rank-r map that is nearest to the
    FFN's own input projections on the first call's tokens, and its learning rates are relative to its weights.

    Args:
        ffn: whose router is trained, of the form and rank that it has.
        learning_rate: peak learning rate of AdamW; a factored router's is a fifth of it.
        seed: of the initial W_in and the order of tokens.
    """

    def __init__(self, ffn: SparseFFN, learning_rate: float, seed: int = 0) -> None:
        self.ffn = ffn
        self.learning_rate = learning_rate
        self.seed = seed
        self.calls = 0
        self.part = (0.0, 0.0)
        self.mean = self.std = self.optimizer = None
        self.weights: dict[str, torch.Tensor] = {}
        """The router's parameters by name, float32, in units of standardised inputs."""

    def schedule(self, begin: float, end: float) -> None:
        """Says which part of all its steps the next call makes, as shares in [0, 1]: warm-up, then cosine to zero."""
        self.part = (begin, end)

    @torch.no_grad()
    def observe(self, x: torch.Tensor, hidden: torch.Tensor) -> None:
        """Trains on tokens' inputs x [T, H] and activations [T, D]: T / 128 optimiser steps."""
        target = router_target(contributions(self.ffn, hidden))
        x = x.float()
        with torch.autocast(x.device.type, enabled=False):
            if not self.is_begun:
                self._begin(x)
            inputs = (x - self.mean) / self.std
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed + self.calls))
            self.calls += 1
            minibatches = order.to(x.device).split(_MINIBATCH)
            begin, end = self.part
            for i, rows in enumerate(minibatches):
                progress = begin + (end - begin) * i / len(minibatches)
                factor = min(1.0, (progress + 1e-3) / _WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * progress))
                for group in self.optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                self._step(inputs[rows], target[rows])

    def _begin(self, x: torch.Tensor) -> None:
        if self.ffn.router.factors:
            self.mean, self.std = torch.zeros_like(x[0]), torch.ones_like(x[0])
            weights = factored_weights(self.ffn, x, self.seed)
            rates = {name: 0.2 * self.learning_rate * weight.square().mean().sqrt() for name, weight in weights.items()}
            rates["log_scale"] = 0.2 * self.learning_rate
            # A bias moves by as much as what it is added to.
            rates["bias"] = rates["w_out"] * weights["w_out"].shape[1] ** 0.5
        else:
            std, self.mean = torch.std_mean(x, 0, correction=0)
            # A feature that hardly varies in the first tokens may do so later.
            self.std = std.clamp_(min=1e-3 * std.mean().item() + 1e-6)
            weights = self._random_weights(x.device)
            # A step of Adam moves every weight by about the learning rate, and so a result by the fan-in times that.
            rates = {name: self.learning_rate / math.sqrt(weights["w_out"].shape[1]) for name in weights}
            rates["w_in"] = self.learning_rate / math.sqrt(self.ffn.hidden_size)
        self._train(weights, {name: float(rates[name]) for name in weights})

    def _random_weights(self, device: torch.device) -> dict[str, torch.Tensor]:
        ffn, router, weights = self.ffn, self.ffn.router, {}
        if router.rank:
            generator = torch.Generator().manual_seed(self.seed)
            w_in = torch.randn(router.rank, ffn.hidden_size, generator=generator, dtype=torch.float32)
            weights["w_in"] = (w_in / math.sqrt(ffn.hidden_size)).to(device)
        for name, shape in (("w_out", (ffn.num_experts, router.rank or ffn.hidden_size)), ("bias", (ffn.num_experts,))):
            weights[name] = torch.zeros(shape, dtype=torch.float32, device=device)
        return weights

    def _train(self, weights: dict[str, torch.Tensor], rates: dict[str, float]) -> None:
        self.weights, self.rates = weights, rates
        groups = [{"params": [weight.requires_grad_(True)], "peak": rates[name]} for name, weight in weights.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    def _step(self, x: torch.Tensor, share: torch.Tensor) -> None:
        with torch.enable_grad():
            logits = torch.func.functional_call(self.ffn.router, self.weights, (x,))
            loss = F.kl_div(logits.log_softmax(-1), share, reduction="batchmean")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @property
    def is_begun(self) -> bool:
        """Whether it has seen tokens."""
        return self.optimizer is not None

    def state_dict(self) -> dict[str, Any]:
        """What a training that goes on later needs, beside what the constructor takes; empty before it has begun."""
        if not self.is_begun:
            return {}
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        state = {name: getattr(self, name) for name in ("calls", "mean", "std", "rates")}
        return {**state, "weights": weights, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self.calls, self.mean, self.std = state["calls"], state["mean"], state["std"]
        self._train({name: weight.clone() for name, weight in state["weights"].items()}, state["rates"])
        self.optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def finish(self) -> None:
        """Writes the trained weights, in the units of the raw input, into the FFN's router."""
        weights = {name: weight.detach().clone() for name, weight in self.weights.items()}
        first = "w_in" if "w_in" in weights else "w_out"
        weights[first] /= self.std
        shift = weights[first] @ self.mean
        weights["bias"] -= shift if first == "w_out" else weights["w_out"] @ shift
        router = self.ffn.router
        router.unpack()
        for name, weight in weights.items():
            getattr(router, name).copy_(weight)
        router.pack()


def factored_weights(ffn: SparseFFN, x: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """A factored router that estimates the FFN's own pre-activations: its parameters by name, float32.

    W_out·W_in is the matrix of its rank that is nearest to the input projections W, in the mean square of what it is
    applied to: deviations of x from their mean, of covariance C = R·Rᵀ. That is the truncated singular value
    decomposition of W·R, times R⁻¹. What it misses is the floor.

    Any rotation between the two factors makes the same matrix. Tables of 4 bits get a random one: rows of the
    decomposition have a few large numbers, and rotated ones look normal, which a grid rounds best.

    Args:
        x: inputs float32 [T, H].
        seed: of the rotation.

    Raises:
        PrunePathError: for inputs that are not finite.
    """
    router = ffn.router
    *inputs, down_t = ffn.tables()
    wanted = torch.cat([table.float() for table in inputs])  # [F·E, H]
    mean = x.mean(0)
    deviations = x - mean
    covariance = deviations.t() @ deviations / len(x)
    if not covariance.isfinite().all():
        raise PrunePathError(
            "Expected finite inputs of every FFN, got some that are not: run the model in a wider dtype."
        )
    covariance += _RIDGE * covariance.diagonal().mean() * torch.eye(x.shape[1], device=x.device)
    values, vectors = torch.linalg.eigh(covariance)
    root = values.clamp(min=1e-12).sqrt()
    spread = wanted @ (vectors * root)  # W·R
    total = spread.square().sum(1)
    weights, bias = {}, wanted @ mean
    if router.rank:
        leading = torch.linalg.eigh(spread.t() @ spread).eigenvectors[:, -router.rank :]
        if router.bits == 4:
            generator = torch.Generator().manual_seed(seed)
            normal = torch.randn(router.rank, router.rank, generator=generator, dtype=torch.float32)
            leading = leading @ torch.linalg.qr(normal).Q.to(x.device)
        w_in, w_out = (vectors / root @ leading).t(), spread @ leading
        # Factors of one size suit half precision, and one learning rate.
        balance = (w_out.square().mean() / w_in.square().mean()).sqrt().sqrt()
        weights["w_in"], w_out = (w_in * balance).contiguous(), w_out / balance
        bias = bias - w_out @ (weights["w_in"] @ mean)
        missed = (total - (spread @ leading).square().sum(1)).clamp(min=0)
    else:
        w_out, missed, bias = wanted, torch.zeros_like(total), torch.zeros_like(total)
    for index, own in enumerate(ffn.biases()[:-1]):
        if own is not None:
            bias[index * router.num_experts : (index + 1) * router.num_experts] += own.float()
    floor = missed.clamp(min=_LEAST_MISS * total.mean()).sqrt()
    floor[: router.num_experts] *= 0.5  # an activation halves errors around zero
    log_scale = 0.5 * down_t.float().norm(dim=1).clamp(min=1e-12).log()
    weights |= {"w_out": w_out, "bias": bias, "floor": floor, "log_scale": log_scale}
    if router.bits == 4:
        weights |= {f"{name}_scale": row_scales(weights[name]) for name in TABLES if name in weights}
    return weights
