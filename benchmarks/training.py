"""One harness for all methods: the same data, steps and loss."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
from baselines.base import Method
from mixture import IGNORED, Packed
from tasks.base import last_states
from torch import nn
from torch.nn import functional as F

from prunepath.nn import SparseFFN
from prunepath.train.any_budget import is_router

DISTILLATION_WEIGHT = 1.0
HEAD_WEIGHT = 0.5
ROUTER_RATE = 3.0
_WARM_UP = 0.04
_POSITIONS = 4096


def warm_cosine(progress: float) -> float:
    """A factor of the learning rate: a linear warm-up, then half a cosine to zero."""
    return min(1.0, (progress + 1e-3) / _WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * progress))


def _error(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed loss, its gradient) of logits [N, V]: cross-entropy plus KL(teacher ‖ student)."""
    log_p, log_t = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    p, t = log_p.exp(), log_t.exp()
    loss = -log_p.gather(1, labels.unsqueeze(1)).sum() + DISTILLATION_WEIGHT * (t * (log_t - log_p)).sum()
    gradient = (1.0 + DISTILLATION_WEIGHT) * p - DISTILLATION_WEIGHT * t
    gradient = gradient.scatter_add(1, labels.unsqueeze(1), torch.full_like(log_p[:, :1], -1.0))
    return loss, gradient.to(student.dtype)


_compiled_error = torch.compile(_error, dynamic=True)


class LanguageLoss(torch.autograd.Function):
    """Mean over positions of cross-entropy plus distillation, from hidden states.

    Logits exist for `_POSITIONS` positions at a time, and gradients are found in the forward pass: all logits of a step
    would take most of the memory and its bandwidth.
    """

    @staticmethod
    def forward(ctx, hidden, weight, teacher_hidden, teacher_weight, labels):
        dtype = torch.bfloat16 if hidden.is_cuda else hidden.dtype
        hidden_low, weight_low = hidden.to(dtype), weight.to(dtype)
        error = _compiled_error if hidden.is_cuda else _error
        total = torch.zeros((), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden_low)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            logits = hidden_low[part] @ weight_low.t()
            loss, gradient = error(logits, teacher_hidden[part] @ teacher_weight.t(), labels[part])
            total += loss
            hidden_gradient[part] = gradient @ weight_low
            weight_gradient += gradient.t() @ hidden_low[part]
        scale = 1.0 / max(1, len(hidden))
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.scale, ctx.dtypes = scale, (hidden.dtype, weight.dtype)
        return total * scale

    @staticmethod
    def backward(ctx, upstream):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        factor = upstream * ctx.scale
        return (
            (hidden_gradient * factor).to(ctx.dtypes[0]),
            (weight_gradient * factor).to(ctx.dtypes[1]),
            None,
            None,
            None,
        )


def final_hidden(model: nn.Module, batch: Packed) -> torch.Tensor:
    """Hidden states after the last norm, [B·S, H]."""
    return model.get_decoder()(**batch.inputs(), use_cache=False).last_hidden_state.flatten(0, 1)


class Teacher:
    """The original model's final hidden states of batches of one shape; on a GPU as one captured graph.

    A small model's forward pass is mostly the time that its many kernels take to launch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, batch: Packed) -> torch.Tensor:
        """[B·S, H], of the last call alone."""
        if not batch.input_ids.is_cuda:
            return final_hidden(self.model, batch)
        if self.graph is None:
            self.batch = dataclasses.replace(batch, heads={})
            self.names = ("input_ids", "position_ids", "documents")
            for name in self.names:
                setattr(self.batch, name, getattr(batch, name).clone())
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                final_hidden(self.model, self.batch)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.hidden = final_hidden(self.model, self.batch)
        for name in self.names:
            getattr(self.batch, name).copy_(getattr(batch, name))
        self.graph.replay()
        return self.hidden


@contextlib.contextmanager
def compiled_parts(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Compiles, inside the `with` block, what all methods have in common: attention, norms, dense FFNs; and routers.

    Launching their many small kernels takes longer than the kernels do. Blocks are alike and share what is compiled.
    """
    blocks = [block for blocks in model.modules() if isinstance(blocks, nn.ModuleList) for block in blocks]
    parts = [child for block in blocks for child in block.children()]
    parts = [part for part in parts if not any(isinstance(module, SparseFFN) for module in part.modules())]
    parts += [module.router for module in model.modules() if isinstance(module, SparseFFN)]
    for part in parts if enabled else ():
        part.compile()
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None


def finetune(
    method: Method,
    heads: nn.ModuleDict,
    teacher: nn.Module,
    batches: Iterator[Packed],
    *,
    steps: int,
    rate: float,
    seed: int,
) -> list[float]:
    """Trains all of the method's parameters, routers at `ROUTER_RATE` times the learning rate, and the heads.

    The loss, for every method: cross-entropy and distillation from the original dense model on the scored tokens, the
    classification heads' cross-entropy, and the method's own. On a GPU the student trains under autocast.

    Returns:
        The loss of every step.
    """
    torch.manual_seed(seed)  # dropout
    model = method.model
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = method.trainable_parameters()
    backbone, routers = [], []
    for parameter in parameters:
        name = names.get(id(parameter), "router")
        (routers if is_router(name) or "predictor" in name else backbone).append(parameter)
    device = backbone[0].device
    groups = [
        {"params": backbone, "peak": rate},
        {"params": routers, "peak": ROUTER_RATE * rate},
        {"params": list(heads.parameters()), "peak": ROUTER_RATE * rate},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    target_of = Teacher(teacher)
    losses = []
    model.train()
    with compiled_parts(model, enabled=device.type == "cuda"):
        for step in range(steps):
            batch = next(batches).to(device)
            method.before_step(step / steps)
            scored = (batch.labels.flatten() != IGNORED).nonzero().squeeze(1)
            target = target_of(batch)[scored]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                hidden = final_hidden(model, batch)
            loss = LanguageLoss.apply(
                hidden[scored],
                model.get_output_embeddings().weight,
                target,
                teacher.get_output_embeddings().weight,
                batch.labels.flatten()[scored],
            )
            loss = loss + method.auxiliary_loss()
            if batch.heads:
                of_heads = [
                    F.cross_entropy(heads[n](hidden[where].float()), c) for n, (where, c) in batch.heads.items()
                ]
                loss = loss + HEAD_WEIGHT * torch.stack(of_heads).mean()
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * warm_cosine(step / steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            losses.append(loss.detach())
    model.eval()
    return torch.stack(losses).tolist() if losses else []


def make_heads(model: nn.Module, classes: dict[str, int], examples: dict[str, list], *, seed: int, steps: int = 300):
    """Linear classification heads on the frozen model's last hidden states: what untrained methods use.

    Args:
        classes: task -> number of classes.
        examples: task -> its training examples.
    """
    torch.manual_seed(seed)
    device = model.get_input_embeddings().weight.device
    heads = nn.ModuleDict()
    for name, count in classes.items():
        features = last_states(model, [example.ids for example in examples[name]]).float()
        targets = torch.tensor([example.label for example in examples[name]], device=device)
        mean, std = features.mean(0), features.std(0).clamp(min=1e-3)
        inputs = (features - mean) / std
        linear = nn.Linear(features.shape[1], count).to(device)
        nn.init.zeros_(linear.weight)
        optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-2, weight_decay=1.0)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * warm_cosine(step / steps)
            loss = F.cross_entropy(linear(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            linear.weight.div_(std)
            linear.bias.sub_(linear.weight @ mean)
        heads[name] = linear
    return heads
