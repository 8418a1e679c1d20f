"""A task: examples in three splits as tensors, and how a model's outputs on them are scored."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

from prunepath.demo.corpus import MAX_FILE_BYTES, stdlib_texts

Examples = dict[str, torch.Tensor]
"""Model inputs with one row an example."""

SPLITS = ("train", "validation", "test")
IGNORED = -100


@dataclasses.dataclass
class Task:
    """Examples of one task.

    Attributes:
        name: as tables call it.
        family: the model's: `llama`, `opt`, `bert` or `t5`.
        metric: `bits_per_byte` (lower is better), `accuracy` or `rouge_l` (higher is better).
        splits: `train`, `validation` and `test` examples.
        sizes: UTF-8 bytes that a test example's labels spell, for `bits_per_byte`.
        references: the test examples' texts to generate, for `rouge_l`.
        labels: names of the classes, for `accuracy`.
    """

    name: str
    family: str
    metric: str
    splits: dict[str, Examples]
    sizes: list[int] = dataclasses.field(default_factory=list)
    references: list[str] = dataclasses.field(default_factory=list)
    labels: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Task:
        splits = {
            split: {name: tensor.to(device) for name, tensor in examples.items()}
            for split, examples in self.splits.items()
        }
        return dataclasses.replace(self, splits=splits)

    def count(self, split: str) -> int:
        return len(self.splits[split]["input_ids"])

    def batch(self, split: str, rows: torch.Tensor | slice) -> Examples:
        """The inputs of one call of the model, int64."""
        return {
            name: tensor[rows].long() for name, tensor in self.splits[split].items() if name != "decoder_attention_mask"
        }

    def inputs(self, batch: Examples) -> Examples:
        """What gives a batch's logits without its loss. T5's decoder reads its inputs off the labels."""
        return batch if self.family == "t5" else {name: rows for name, rows in batch.items() if name != "labels"}

    def batches(self, split: str, size: int, limit: int | None = None) -> Iterator[Examples]:
        """The examples in order, up to `limit` of them."""
        count = min(self.count(split), limit or self.count(split))
        for start in range(0, count, size):
            yield self.batch(split, slice(start, min(start + size, count)))

    def random_batches(self, size: int, seed: int) -> Iterator[Examples]:
        """Training batches for ever, epoch after epoch in a new order."""
        generator = torch.Generator().manual_seed(seed)
        device = self.splits["train"]["input_ids"].device
        size = min(size, self.count("train"))
        while True:
            order = torch.randperm(self.count("train"), generator=generator).to(device)
            for start in range(0, len(order) - size + 1, size):
                yield self.batch("train", order[start : start + size])

    def fingerprint(self) -> dict[str, str]:
        """A hash of each split."""
        hashes = {}
        for split, examples in self.splits.items():
            digest = hashlib.sha256()
            for name in sorted(examples):
                digest.update(examples[name].cpu().contiguous().numpy().tobytes())
            hashes[split] = digest.hexdigest()[:16]
        return hashes

    @property
    def shifted(self) -> bool:
        """Whether logits at a position predict the label of the next one."""
        return self.family in ("llama", "opt")

    def scored_positions(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Positions whose logits the labels score, bool like the logits' leading dimensions; None for all."""
        if labels.dim() == 1:
            return None
        scored = labels != IGNORED
        return torch.cat([scored[:, 1:], torch.zeros_like(scored[:, :1])], dim=1) if self.shifted else scored

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed negative log-likelihood of each example, in nats: float32 [B]."""
        logits = logits.float()
        if labels.dim() == 1:
            return F.cross_entropy(logits, labels, reduction="none")
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED).sum(1)


TASKS = ("lm-llama", "lm-opt", "instruct", "nlu", "nlg")


def build_task(name: str, tokenizer, *, size: str) -> Task:
    """The task of this name; `size` is `small` or, for tests, `tiny`."""
    from tasks import functions, hub, language_model, nlu

    makers = {
        "lm-llama": language_model.build,
        "lm-opt": language_model.build,
        "instruct": functions.build_instruct,
        "nlu": nlu.build,
        "nlg": functions.build_nlg,
        **dict.fromkeys(hub.HUB_TASKS, hub.build),
    }
    return makers[name](name, tokenizer, tiny=size == "tiny")


def texts_of(split: str, tiny: bool) -> list[str]:
    """Standard-library sources of a split, whole modules each (`prunepath.demo.corpus`)."""
    texts = stdlib_texts({"test": "held_out"}.get(split, split))
    return texts[:: max(1, len(texts) // 12)] if tiny else texts


_HELD_OUT_FOLDERS = {
    "validation": ("numpy/ma", "numpy/fft", "torch/autograd", "torch/profiler", "torch/jit", "torch/package"),
    "test": ("numpy/linalg", "numpy/polynomial", "torch/distributions", "torch/nn", "torch/optim"),
}


def package_texts(split: str) -> list[str]:
    """Sources of a split from the packages that PrunePath needs: numpy and torch, split by whole folders."""
    texts = []
    for package in ("numpy", "torch"):
        root = Path(importlib.util.find_spec(package).origin).parent
        for path in sorted(root.rglob("*.py")):
            folder = "/".join(path.relative_to(root.parent).parts[:2])
            of = next((name for name, folders in _HELD_OUT_FOLDERS.items() if folder in folders), "train")
            if of == split and path.stat().st_size <= MAX_FILE_BYTES:
                texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return texts


def padded(rows: list[list[int]], length: int, fill: int) -> torch.Tensor:
    """int16 [N, length]: rows cut or filled to `length`."""
    result = torch.full((len(rows), length), fill, dtype=torch.int16)
    for i, row in enumerate(rows):
        values = row[:length]
        result[i, : len(values)] = torch.tensor(values, dtype=torch.int16)
    return result
