"""The dense models of the quality benchmark, trained here: small ones of real classes, with the demo's tokenizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from tasks.base import IGNORED, Examples, Task

DEMO = Path(__file__).parents[2] / "prunepath" / "demo" / "model"
_SENTINELS = 32


def new_model(
    family: str, vocab_size: int, end: int, *, labels: int = 0, causal: bool = False, tiny: bool = False
) -> nn.Module:
    """A model with random weights; BERT with a head for masked tokens, for the next token, or for `labels` classes."""
    hidden, inner, layers = (32, 64, 2) if tiny else (256, 1024, 6)
    heads = 2 if tiny else 4
    if family == "llama":
        if not tiny:
            return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
        config = transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
        )
        return transformers.LlamaForCausalLM(config)
    if family == "opt":
        config = transformers.OPTConfig(
            vocab_size=vocab_size,
            hidden_size=hidden,
            ffn_dim=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            word_embed_proj_dim=hidden,
            max_position_embeddings=512,
            dropout=0.1,
            pad_token_id=end,
            bos_token_id=end,
            eos_token_id=end,
        )
        return transformers.OPTForCausalLM(config)
    if family == "bert":
        config = transformers.BertConfig(
            vocab_size=vocab_size + 1,  # the mask token
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=256,
            pad_token_id=end,
            num_labels=max(2, labels),
            is_decoder=causal,
            # Without a task there is far more text than the model can learn by heart.
            hidden_dropout_prob=0.1 if labels else 0.0,
            attention_probs_dropout_prob=0.1 if labels else 0.0,
        )
        if labels:
            return transformers.BertForSequenceClassification(config)
        return transformers.BertLMHeadModel(config) if causal else transformers.BertForMaskedLM(config)
    config = transformers.T5Config(
        vocab_size=vocab_size + _SENTINELS,
        d_model=hidden,
        d_ff=inner,
        d_kv=hidden // heads,
        num_layers=max(2, layers * 2 // 3),
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.1,
        pad_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=end,
        tie_word_embeddings=True,
    )
    return transformers.T5ForConditionalGeneration(config)


def fuse_norms() -> None:
    """Makes the RMS norms of Llama and T5 one kernel each in this process; transformers writes them as eight."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    LlamaRMSNorm.forward = T5LayerNorm.forward = forward


def train_dense(task: Task, stream: torch.Tensor, vocab_size: int, end: int, *, tiny: bool, report) -> nn.Module:
    """A dense model of the task's family, pre-trained on the token stream and then trained on the task.

    The checkpoint of the lowest validation loss is kept. `report` is called with a line now and then.
    """
    torch.manual_seed(0)
    device = task.splits["train"]["input_ids"].device
    make = {"family": task.family, "vocab_size": vocab_size, "end": end, "tiny": tiny}
    model = new_model(**make).to(device)
    steps = _STEPS_TINY if tiny else _STEPS
    # Tasks of the hub are trained as the task made here for their model is.
    alike = {"llama": "instruct", "bert": "nlu", "t5": "nlg"}.get(task.family, task.name)
    pretraining, training = steps.get(task.name, steps[alike])
    rows, length = (8, 32) if tiny else (64, {"bert": 128, "t5": 160}.get(task.family, 256))

    def pretrain(model: nn.Module, kind: Callable, steps: int) -> None:
        batches = kind(stream, length, rows, vocab_size)
        fit(model, batches, steps, _RATES[task.family][0], None, lambda line: report(f"{task.name} {line}"))

    if pretraining and task.family == "bert":
        # An encoder that has first learned to predict the next token learns to fill in masked ones in far fewer steps
        # (arXiv 2507.00994).
        causal = new_model(**make, causal=True).to(device)
        pretrain(causal, _windows, pretraining // 2)
        model.load_state_dict(causal.state_dict())
        pretrain(model, _masked, pretraining - pretraining // 2)
    elif pretraining:
        kind = _corrupted if task.family == "t5" else _windows
        pretrain(model, kind, pretraining)
    if task.family == "bert":
        encoder = model.bert.state_dict()
        model = new_model(**make, labels=len(task.labels)).to(device)
        model.bert.load_state_dict(encoder, strict=False)
    if training:
        batches = task.random_batches(rows, seed=0)
        fit(model, batches, training, _RATES[task.family][1], task, lambda line: report(f"{task.name} {line}"))
    return model.eval()


# Optimiser steps of pre-training on the token stream and of training on the task. The Llama model comes trained.
_STEPS = {"lm-llama": (0, 0), "lm-opt": (2600, 0), "instruct": (0, 900), "nlu": (5000, 1200), "nlg": (3500, 800)}
# Learning rates of pre-training and of training on the task. BERT's normalisation after each layer bears no more: at
# 5e-4 its output stops depending on its input. T5's are relative to each matrix's size: see `fit`.
_RATES = {"llama": (1.5e-3, 3e-4), "opt": (1.5e-3, 5e-4), "bert": (3e-4, 2e-4), "t5": (1e-2, 3e-3)}
_STEPS_TINY = {"lm-llama": (4, 0), "lm-opt": (4, 0), "instruct": (4, 4), "nlu": (4, 4), "nlg": (4, 4)}


def fit(model: nn.Module, batches: Iterator[Examples], steps: int, rate: float, task: Task | None, report) -> None:
    """Trains in place; with a task, ends with the weights of the lowest validation loss.

    T5's initial weights differ widely in size, and each matrix's learning rate is relative to its own (as Adafactor's,
    with which T5 came: arXiv 1910.10683, section 3.1.2).
    """
    cuda = next(model.parameters()).is_cuda
    relative = model.config.model_type == "t5"
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for p in model.parameters():
        size = max(1e-3, p.detach().square().mean().sqrt().item()) if relative else 1.0
        size = 2.0 ** (round(2.0 * math.log2(size)) / 2.0)  # each group costs kernels of its own
        groups[rate * size, 0.1 if p.dim() >= 2 and not relative else 0.0].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()],
        betas=(0.9, 0.95),
        fused=cuda,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
    best, kept = math.inf, None
    model.train()
    for step in range(steps):
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            loss = model(**next(batches)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 8) == 0:
            line = f"step {step + 1} of {steps}, training loss {loss.item():.3f}"
            if task is not None:
                value = validation_loss(model, task)
                line += f", validation loss {value:.3f}"
                if value < best:
                    best = value
                    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                model.train()
            report(line)
    if kept is not None:
        model.load_state_dict(kept)


@torch.no_grad()
def validation_loss(model: nn.Module, task: Task, limit: int = 512) -> float:
    model.eval()
    total, weight = 0.0, 0
    for batch in task.batches("validation", 64, limit):
        labels = batch["labels"]
        count = len(labels) if labels.dim() == 1 else int((labels != IGNORED).sum())
        total += model(**batch).loss.item() * count
        weight += count
    return total / weight


def warm_cosine(step: int, steps: int) -> float:
    """The learning rate's share of its peak: warm-up over a twentieth of the steps, then a cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, steps // 20))
    return warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _random_windows(stream: torch.Tensor, length: int, rows: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, len(stream) - length, (rows, 1), generator=generator, device=stream.device)
    return stream[starts + torch.arange(length, device=stream.device)].long()


def _windows(stream: torch.Tensor, length: int, rows: int, vocab_size: int) -> Iterator[Examples]:
    generator = torch.Generator(stream.device).manual_seed(0)
    while True:
        ids = _random_windows(stream, length, rows, generator)
        yield {"input_ids": ids, "labels": ids}


def _masked(stream: torch.Tensor, length: int, rows: int, vocab_size: int) -> Iterator[Examples]:
    """Masked language modelling (BERT, arXiv 1810.04805, section 3.1); the token after the vocabulary is the mask."""
    generator = torch.Generator(stream.device).manual_seed(0)
    while True:
        ids = _random_windows(stream, length, rows, generator)
        masked = torch.rand(ids.shape, generator=generator, device=ids.device) < 0.15
        yield {"input_ids": ids.masked_fill(masked, vocab_size), "labels": ids.masked_fill(~masked, IGNORED)}


def _corrupted(stream: torch.Tensor, length: int, rows: int, vocab_size: int) -> Iterator[Examples]:
    """Span corruption (T5, arXiv 1910.10683, section 3.1.4) with one span of four tokens in every stretch of twenty."""
    generator = torch.Generator(stream.device).manual_seed(0)
    stretch, span = 20, 4
    pieces = length // stretch
    sentinels = vocab_size + torch.arange(pieces, device=stream.device) % _SENTINELS
    while True:
        ids = _random_windows(stream, pieces * stretch, rows, generator).view(rows, pieces, stretch)
        start = torch.randint(0, stretch - span + 1, (rows, pieces, 1), generator=generator, device=ids.device)
        place = torch.arange(stretch, device=ids.device)
        inside = (place >= start) & (place < start + span)
        mark = sentinels.expand(rows, pieces).unsqueeze(-1)
        # The sentinel stands in the place of its span.
        kept = torch.where(place == start, mark, ids)[~inside | (place == start)]
        labels = torch.cat([mark, ids[inside].view(rows, pieces, span)], dim=-1).flatten(1)
        yield {"input_ids": kept.view(rows, -1), "labels": labels}
