"""Perplexity and bits per byte on held-out text."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch.nn import functional as F
from tqdm import tqdm

import prunepath
from prunepath.errors import PrunePathError


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        nll: summed negative log-likelihood of the predicted tokens, in nats.
        tokens: predicted tokens.
        bytes: UTF-8 bytes of the text that those tokens spell; None without a tokenizer.
        active_fraction: mean share of FFN neurons computed; 1.0 for a dense model.
        read_fraction: bytes of FFN weights read for a token, the routers' included, as a share of the dense model's.
    """

    nll: float
    tokens: int
    bytes: int | None
    active_fraction: float
    read_fraction: float

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens); infinity where a float cannot hold it."""
        try:
            return math.exp(self.nll / self.tokens)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """nll / (ln 2 · bytes), which compares models of different tokenizers; None without a tokenizer."""
        return None if not self.bytes else self.nll / math.log(2) / self.bytes


def evaluate(
    model,
    tokenizer,
    texts: Iterable[str] | Iterable[torch.Tensor],
    *,
    sequence_length: int,
    max_tokens: int | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> Evaluation:
    """Measures how well a causal language model, dense or sparse, predicts texts.

    The texts are joined, each begun with the tokenizer's beginning-of-text token (or else its end-of-text
    token), and cut into windows of `sequence_length`. Every token of a text is predicted once, from the
    tokens before it in its window; the beginning token itself is not. Where the tokenizer has neither, a
    text's first token is not predicted.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer, or None where `texts` holds token ids.
        texts: strings, or with `tokenizer=None` int64 tensors of token ids [n] or [1, n].
        sequence_length: tokens of a window.
        max_tokens: stop after this many predicted tokens.
        batch_size: windows of one forward pass.
        progress: show a progress bar on standard error.

    Returns:
        An `Evaluation`. Where `max_tokens` cuts a text inside a character, its bytes are counted to within
        one character.

    Raises:
        PrunePathError: `texts` holds nothing to predict, or a number is out of range.
    """
    for name, value in (
        ("sequence_length", sequence_length),
        ("max_tokens", max_tokens),
        ("batch_size", batch_size),
    ):
        if value is not None and value < 1:
            raise PrunePathError(f"{name} must be at least 1, got {value}.")
    size = _ByteCount()
    stream = _tokens(tokenizer, texts, max_tokens, size)
    device = next(model.parameters()).device
    nll, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    bar = tqdm(total=max_tokens, desc="evaluating", unit="tok", leave=False, disable=not progress)
    try:
        with torch.inference_mode(), _counts(model) as counts, bar:
            for ids, predicted in _batches(_windows(stream, sequence_length), batch_size):
                logits = model(input_ids=ids[:, :-1].to(device), use_cache=False).logits.float()
                losses = F.cross_entropy(
                    logits.flatten(0, 1), ids[:, 1:].flatten().to(device), reduction="none"
                ).double()
                mask = predicted[:, 1:].flatten()
                nll += losses[mask.to(device)].sum().item()
                tokens += int(mask.sum())
                bar.update(int(mask.sum()))
    finally:
        model.train(was_training)
    if tokens == 0:
        raise PrunePathError("Expected text of at least two tokens to evaluate on, but there is nothing to predict.")
    return Evaluation(
        nll=nll,
        tokens=tokens,
        bytes=None if tokenizer is None else size.bytes,
        active_fraction=1.0 if counts is None else counts.active_fraction,
        read_fraction=1.0 if counts is None else counts.read_fraction,
    )


class _ByteCount:
    bytes = 0


@contextlib.contextmanager
def _counts(model):
    if prunepath.is_sparse(model):
        with prunepath.record_counts(model) as counts:
            yield counts
    else:
        yield None


def _tokens(tokenizer, texts, max_tokens: int | None, size: _ByteCount) -> Iterator[tuple[int, bool]]:
    """Gives (token id, whether it is to be predicted), and adds up the bytes of the predicted ones."""
    left = math.inf if max_tokens is None else max_tokens
    start = None
    if tokenizer is not None:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    for text in texts:
        if left <= 0:
            return
        if tokenizer is None:
            ids = torch.as_tensor(text).flatten().tolist()
        else:
            # verbose=False: a text longer than the model's context is expected here, it is cut into windows.
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            continue
        # A given beginning, or the text's own first token in its place.
        first, predicted = (start, ids) if start is not None else (ids[0], ids[1:])
        cut = len(predicted) > left
        if cut:
            predicted = predicted[: int(left)]
        if tokenizer is not None:
            if cut:
                size.bytes += _byte_length(tokenizer, predicted)
            else:
                skipped = 0 if start is not None else _byte_length(tokenizer, ids[:1])
                size.bytes += len(text.encode("utf-8", "surrogatepass")) - skipped
        left -= len(predicted)
        yield first, False
        yield from zip(predicted, itertools.repeat(True))


def _byte_length(tokenizer, ids: list[int]) -> int:
    return len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())


def _windows(stream: Iterator[tuple[int, bool]], sequence_length: int) -> Iterator[list[tuple[int, bool]]]:
    """Windows of sequence_length + 1 tokens; the last token of one is also the first of the next."""
    window = list(itertools.islice(stream, sequence_length + 1))
    while len(window) > 1:
        yield window
        window = [window[-1], *itertools.islice(stream, sequence_length)]


def _batches(windows, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and which of them to predict, both [B, S + 1]; only windows of one length share a batch."""
    for _, group in itertools.groupby(windows, key=len):
        while batch := list(itertools.islice(group, batch_size)):
            pairs = torch.tensor(batch)
            yield pairs[..., 0], pairs[..., 1].bool()
