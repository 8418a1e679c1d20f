"""Calibration data as windows of token ids."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from prunepath.errors import PrunePathError

MIN_TOKENS = 64
READ_AHEAD = 8
"""The stream is read for up to this many times the tokens wanted, so that they are not all from its beginning."""


def token_documents(texts: Iterable, tokenizer: Any | None) -> Iterator[list[int]]:
    """Token ids of each text, with the tokenizer's end-of-text token behind it.

    Args:
        texts: strings; or, with `tokenizer` None, integer tensors of token ids of any shape, each one document.
    """
    if isinstance(texts, str):
        raise PrunePathError("texts must be an iterable of strings or of token-id tensors, got one string.")
    for text in texts:
        if tokenizer is None:
            if not isinstance(text, torch.Tensor) or text.is_floating_point() or text.dtype == torch.bool:
                kind = text.dtype if isinstance(text, torch.Tensor) else type(text).__name__
                raise PrunePathError(f"With tokenizer=None, texts must be integer tensors of token ids, got {kind}.")
            yield text.flatten().tolist()
        else:
            if not isinstance(text, str):
                raise PrunePathError(f"With a tokenizer, texts must be strings, got {type(text).__name__}.")
            if text:
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                end = tokenizer.eos_token_id
                yield ids if end is None else [*ids, end]


def token_windows(texts: Iterable, tokenizer: Any | None, sequence_length: int) -> Iterator[torch.Tensor]:
    """The documents one after another, cut into windows: int64 tensors [1, S].

    Every window has S = `sequence_length` tokens, except the last, which has what is left if that is at least 2.
    """
    pending: list[int] = []
    for document in token_documents(texts, tokenizer):
        pending += document
        whole = len(pending) - len(pending) % sequence_length
        for start in range(0, whole, sequence_length):
            yield torch.tensor([pending[start : start + sequence_length]])
        del pending[:whole]
    if len(pending) >= 2:
        yield torch.tensor([pending])


def sample_windows(
    texts: Iterable, tokenizer: Any | None, sequence_length: int, num_tokens: int, seed: int
) -> torch.Tensor:
    """A random sample, in random order, of about `num_tokens` tokens: int64 [windows, S].

    At most `READ_AHEAD` times that is read of the stream. Fewer tokens are returned if it holds no more, in shorter
    windows where it is very short, so that there are several.

    Raises:
        PrunePathError: if there are fewer than `MIN_TOKENS` tokens.
    """
    wanted = -(-num_tokens // sequence_length)
    rng = random.Random(seed)
    windows = list(itertools.islice(token_windows(texts, tokenizer, sequence_length), READ_AHEAD * wanted))
    total = sum(window.numel() for window in windows)
    if total < MIN_TOKENS:
        raise PrunePathError(f"Expected calibration data of at least {MIN_TOKENS} tokens, got {total}.")
    length = min(sequence_length, total // 8)
    tokens = torch.cat(windows, dim=1)[0, : total - total % length].view(-1, length)
    chosen = rng.sample(range(len(tokens)), min(-(-num_tokens // length), len(tokens)))
    return tokens[chosen]
