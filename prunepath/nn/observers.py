"""Watching sparse FFNs at work: their inputs, how many experts their tokens run, and which tokens are padding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from prunepath.nn.sparse_ffn import SparseFFN


class CountRecord:
    """Experts per token, gathered while it is attached, without waiting for the device."""

    def __init__(self, ffns: Iterable[SparseFFN]) -> None:
        self._ffns = list(ffns)
        self._index = {ffn: i for i, ffn in enumerate(self._ffns)}
        self._tokens = [torch.zeros(ffn.num_experts + 1, dtype=torch.int64) for ffn in self._ffns]

    def add(self, ffn: SparseFFN, counts: torch.Tensor) -> None:
        """An `observe_counts` hook: counts int32 [T]."""
        i = self._index[ffn]
        valid = ffn.valid_tokens(len(counts))
        tokens = torch.ones_like(counts, dtype=torch.int64) if valid is None else valid.long()
        added = tokens.new_zeros(ffn.num_experts + 1).scatter_add_(0, counts.long(), tokens)
        self._tokens[i] = self._tokens[i].to(counts.device) + added

    @property
    def histogram(self) -> list[torch.Tensor]:
        """For each FFN an int64 tensor [E + 1] on the CPU: how many tokens ran 0, 1, … E experts."""
        return [tokens.cpu() for tokens in self._tokens]

    @property
    def per_layer(self) -> list[float]:
        """The active fraction of each FFN, a share of the dense one; NaN for one that saw no token."""
        fractions = []
        for ffn, counts in zip(self._ffns, self.histogram, strict=True):
            experts = torch.arange(len(counts), dtype=torch.float64)
            tokens = counts.sum().item()
            mean = (counts * experts).sum().item() / tokens if tokens else float("nan")
            fractions.append(mean / ffn.dense_experts)
        return fractions

    @property
    def active_fraction(self) -> float:
        """The share of all the dense FFNs' neurons computed, FFNs weighted by their width."""
        widths = [ffn.dense_experts * ffn.expert_width for ffn in self._ffns]
        return sum(w * f for w, f in zip(widths, self.per_layer, strict=True)) / sum(widths)


class ExpertUsage:
    """Which experts the router chooses, gathered by `observe` as an `observe_input` hook.

    Attributes:
        tokens: for each FFN, the tokens seen.
        active: for each FFN an int64 tensor [E]: how many of them run each expert. E counts removed experts too, last.
        histogram: for each FFN an int64 tensor [E + 1]: how many of them run 0, 1, … E experts.
    """

    def __init__(self, ffns: Iterable[SparseFFN]) -> None:
        self._index = {ffn: i for i, ffn in enumerate(ffns)}
        self.tokens = [0] * len(self._index)
        self.active = [torch.zeros(ffn.dense_experts, dtype=torch.int64) for ffn in self._index]
        self.histogram = [torch.zeros(ffn.dense_experts + 1, dtype=torch.int64) for ffn in self._index]

    def observe(self, ffn: SparseFFN, x: torch.Tensor) -> None:
        """x: [T, H], without padding."""
        i = self._index[ffn]
        expert_ids, _, counts = ffn.route(x)
        self.tokens[i] += len(x)
        self.active[i] += torch.bincount(expert_ids[expert_ids >= 0].cpu(), minlength=ffn.dense_experts)
        self.histogram[i] += torch.bincount(counts.cpu(), minlength=ffn.dense_experts + 1)


@contextlib.contextmanager
def observing_counts(ffns: Iterable[SparseFFN], observer: Callable[[SparseFFN, torch.Tensor], None]) -> Iterator[None]:
    """Attaches an `observe_counts` hook to each FFN inside the `with` block, in place of the one it has."""
    before = {ffn: ffn.observe_counts for ffn in ffns}
    for ffn in before:
        ffn.observe_counts = observer
    try:
        yield
    finally:
        for ffn, former in before.items():
            ffn.observe_counts = former


@contextlib.contextmanager
def counting(ffns: Iterable[SparseFFN]) -> Iterator[CountRecord]:
    """Records the experts per token of every call inside the `with` block."""
    record = CountRecord(ffns)
    with observing_counts(record._ffns, record.add):
        yield record


@contextlib.contextmanager
def observing_inputs(observers: dict[SparseFFN, Callable[[SparseFFN, torch.Tensor], None]]) -> Iterator[None]:
    """Attaches an `observe_input` hook to each FFN inside the `with` block; it sees no padding."""

    def without_padding(ffn: SparseFFN, x: torch.Tensor) -> None:
        valid = ffn.valid_tokens(len(x))
        observers[ffn](ffn, x if valid is None else x[valid])

    for ffn in observers:
        ffn.observe_input = without_padding
    try:
        yield
    finally:
        for ffn in observers:
            ffn.observe_input = None


@contextlib.contextmanager
def padding_masks(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, each forward pass of `model` tells its sparse FFNs which tokens are padding.

    Padding has 0 in the `attention_mask`, or for the decoder of an encoder-decoder in `decoder_attention_mask`, or
    without that a label of -100.
    """
    two_stacks = bool(getattr(model.config, "is_encoder_decoder", False))
    stacks: dict[bool, list[SparseFFN]] = {False: [], True: []}
    for path, module in model.named_modules():
        if isinstance(module, SparseFFN):
            stacks[two_stacks and "decoder" in path.split(".")].append(module)

    def set_masks(_, args: tuple, kwargs: dict) -> None:
        labels, decoder = kwargs.get("labels"), kwargs.get("decoder_attention_mask")
        if decoder is None and labels is not None and two_stacks:
            decoder = labels != -100
        for is_decoder, mask in ((False, kwargs.get("attention_mask")), (True, decoder)):
            known = mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
            for ffn in stacks[is_decoder]:
                ffn.padding_mask = known

    hook = model.register_forward_pre_hook(set_masks, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        for ffn in (*stacks[False], *stacks[True]):
            ffn.padding_mask = None
