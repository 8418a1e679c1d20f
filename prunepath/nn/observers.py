"""Watching sparse FFNs at work: their inputs, how many experts their tokens run, and which tokens are padding."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn

from prunepath.nn.sparse_ffn import SparseFFN

# Which tokens of the forward pass under way are no padding, for each of its FFNs: bool [B, S]. A context variable, so
# that two threads may run one model.
_valid: contextvars.ContextVar[Mapping[SparseFFN, torch.Tensor] | None] = contextvars.ContextVar("valid", default=None)


class CountRecord:
    """Experts per token, gathered while it is attached, without waiting for the device."""

    def __init__(self, ffns: Iterable[SparseFFN]) -> None:
        self._ffns = list(ffns)
        self._index = {ffn: i for i, ffn in enumerate(self._ffns)}
        self._tokens = [torch.zeros(ffn.num_experts + 1, dtype=torch.int64) for ffn in self._ffns]

    def add(self, ffn: SparseFFN, counts: torch.Tensor) -> None:
        """A counts hook: counts int32 [T]."""
        i = self._index[ffn]
        valid = valid_tokens(ffn, len(counts))
        tokens = torch.ones_like(counts, dtype=torch.int64) if valid is None else valid.long()
        added = tokens.new_zeros(ffn.num_experts + 1).scatter_add_(0, counts.long(), tokens)
        self._tokens[i] = self._tokens[i].to(counts.device) + added

    @property
    def histogram(self) -> list[torch.Tensor]:
        """For each FFN an int64 tensor [E + 1] on the CPU: how many tokens ran 0, 1, … E experts."""
        return [tokens.cpu() for tokens in self._tokens]

    @property
    def per_layer(self) -> list[float]:
        """The active fraction of each FFN; NaN for one that saw no token."""
        fractions = []
        for ffn, counts in zip(self._ffns, self.histogram, strict=True):
            experts = torch.arange(len(counts), dtype=torch.float64)
            tokens = counts.sum().item()
            mean = (counts * experts).sum().item() / tokens if tokens else float("nan")
            fractions.append(mean / ffn.num_experts)
        return fractions

    @property
    def active_fraction(self) -> float:
        """The share of all FFNs' neurons computed, FFNs weighted by their width."""
        widths = [ffn.intermediate_size for ffn in self._ffns]
        return sum(w * f for w, f in zip(widths, self.per_layer, strict=True)) / sum(widths)

    @property
    def read_fraction(self) -> float:
        """Bytes of weights read for a token, the routers' included, as a share of those that the dense FFNs read.

        Biases of the FFNs are left out.
        """
        return self.read_fraction_at(self._ffns[0].router.bias.element_size())

    def read_fraction_at(self, number: int) -> float:
        """`read_fraction` of a model whose weights are numbers of so many bytes, but for what is packed."""
        dense = [ffn.hidden_size * ffn.intermediate_size * (2 if ffn.layout.gate is None else 3) for ffn in self._ffns]
        routers = sum(ffn.router.bytes_read(number) for ffn in self._ffns)
        return (sum(d * f for d, f in zip(dense, self.per_layer, strict=True)) + routers / number) / sum(dense)


@contextlib.contextmanager
def observing_counts(ffns: Iterable[SparseFFN], hook: Callable[[SparseFFN, torch.Tensor], None]) -> Iterator[None]:
    """Registers a counts hook on each FFN inside the `with` block."""
    with contextlib.ExitStack() as handles:
        for ffn in ffns:
            handles.enter_context(ffn.register_counts_hook(hook))
        yield


@contextlib.contextmanager
def counting(ffns: Iterable[SparseFFN]) -> Iterator[CountRecord]:
    """Records the experts per token of every call inside the `with` block."""
    record = CountRecord(ffns)
    with observing_counts(record._ffns, record.add):
        yield record


@contextlib.contextmanager
def observing_inputs(hooks: Mapping[SparseFFN, Callable[[SparseFFN, torch.Tensor], None]]) -> Iterator[None]:
    """Registers an input hook on each FFN inside the `with` block; it sees no padding."""

    def without_padding(ffn: SparseFFN, x: torch.Tensor) -> None:
        valid = valid_tokens(ffn, len(x))
        hooks[ffn](ffn, x if valid is None else x[valid])

    with contextlib.ExitStack() as handles:
        for ffn in hooks:
            handles.enter_context(ffn.register_input_hook(without_padding))
        yield


@contextlib.contextmanager
def observing_hidden(
    hooks: Mapping[SparseFFN, Callable[[SparseFFN, torch.Tensor, torch.Tensor], None]],
) -> Iterator[None]:
    """Inside the `with` block, each FFN runs densely, without its router, and shows its hook what it computes.

    A hook gets (ffn, x [T, H], activations h [T, D]) of the tokens that are no padding.
    """

    def select(ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        valid = valid_tokens(ffn, len(x))
        hooks[ffn](ffn, *((x, hidden) if valid is None else (x[valid], hidden[valid])))
        return torch.ones(len(x), ffn.num_experts, dtype=torch.bool, device=x.device)

    before = {ffn: ffn.selector for ffn in hooks}
    for ffn in hooks:
        ffn.selector = select
    try:
        yield
    finally:
        for ffn, selector in before.items():
            ffn.selector = selector


def valid_tokens(ffn: SparseFFN, num_tokens: int) -> torch.Tensor | None:
    """Which of the T tokens of a call under way are no padding: bool [T]; None if all are, or nobody said.

    `padding_masks` says it.
    """
    mask = (_valid.get() or {}).get(ffn)
    if mask is None or num_tokens % len(mask):
        return None
    length = num_tokens // len(mask)  # with a KV cache, a call has only the sequences' last tokens
    return mask[:, -length:].flatten() if length <= mask.shape[1] else None


@contextlib.contextmanager
def padding_masks(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, `valid_tokens` knows which tokens of a forward pass of `model` are padding.

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
        known = {}
        for is_decoder, mask in ((False, kwargs.get("attention_mask")), (True, decoder)):
            if isinstance(mask, torch.Tensor) and mask.dim() == 2:
                known |= dict.fromkeys(stacks[is_decoder], mask.bool())
        _valid.set(known)

    with model.register_forward_pre_hook(set_masks, with_kwargs=True):
        yield
    _valid.set(None)
