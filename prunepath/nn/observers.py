"""Watching sparse FFNs at work: their inputs, and how many experts their tokens run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from prunepath.nn.sparse_ffn import SparseFFN


class CountRecord:
    """Experts per token, gathered while it is attached.

    Attributes:
        histogram: for each FFN an int64 tensor [E + 1]: how many tokens ran 0, 1, … E experts.
    """

    def __init__(self, ffns: Iterable[SparseFFN]) -> None:
        self._ffns = list(ffns)
        self._index = {ffn: i for i, ffn in enumerate(self._ffns)}
        self.histogram = [torch.zeros(ffn.num_experts + 1, dtype=torch.int64) for ffn in self._ffns]

    def add(self, ffn: SparseFFN, counts: torch.Tensor) -> None:
        """An `observe_counts` hook: counts int32 [T]."""
        i = self._index[ffn]
        self.histogram[i] += torch.bincount(counts.cpu(), minlength=ffn.num_experts + 1)

    @property
    def per_layer(self) -> list[float]:
        """The active fraction of each FFN; NaN for one that saw no token."""
        fractions = []
        for counts in self.histogram:
            experts = torch.arange(len(counts), dtype=torch.float64)
            tokens = counts.sum().item()
            mean = (counts * experts).sum().item() / tokens if tokens else float("nan")
            fractions.append(mean / (len(counts) - 1))
        return fractions

    @property
    def active_fraction(self) -> float:
        """The share of all FFN neurons computed, FFNs weighted by their width."""
        widths = [ffn.intermediate_size for ffn in self._ffns]
        return sum(w * f for w, f in zip(widths, self.per_layer, strict=True)) / sum(widths)


@contextlib.contextmanager
def counting(ffns: Iterable[SparseFFN]) -> Iterator[CountRecord]:
    """Records the experts per token of every call inside the `with` block."""
    record = CountRecord(ffns)
    before = {ffn: ffn.observe_counts for ffn in record._ffns}
    for ffn in before:
        ffn.observe_counts = record.add
    try:
        yield record
    finally:
        for ffn, observer in before.items():
            ffn.observe_counts = observer


@contextlib.contextmanager
def observing_inputs(observers: dict[SparseFFN, object]) -> Iterator[None]:
    """Attaches an `observe_input` hook to each FFN inside the `with` block."""
    for ffn, observer in observers.items():
        ffn.observe_input = observer
    try:
        yield
    finally:
        for ffn in observers:
            ffn.observe_input = None
