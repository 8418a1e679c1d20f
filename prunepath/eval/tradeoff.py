"""Quality and speed of one sparse checkpoint at several budgets or thresholds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

import torch

import prunepath
from prunepath.errors import PrunePathError
from prunepath.eval.decode import DecodeSpeed, decode_speed
from prunepath.eval.perplexity import Evaluation, evaluate


def tradeoff(
    model,
    tokenizer,
    texts: Iterable[str] | Iterable[torch.Tensor],
    *,
    budgets: Sequence[float] | None = None,
    thresholds: Sequence[float] | None = None,
    sequence_length: int,
    max_tokens: int | None = None,
    batch_size: int = 1,
    dense=None,
    prompt: torch.Tensor | None = None,
    new_tokens: int = 64,
    repeats: int = 5,
    progress: bool = False,
    on_row=None,
) -> list[dict]:
    """Evaluates a sparse model along its knob.

    Args:
        model: a sparse model; afterwards it has its thresholds from before again.
        tokenizer: its tokenizer, or None where `texts` holds token ids.
        texts: held-out texts, as for `prunepath.eval.perplexity.evaluate`.
        budgets: active fractions to aim for, or else
        thresholds: thresholds for all layers alike. Exactly one of the two.
        sequence_length, max_tokens, batch_size: as for `evaluate`.
        dense: the model before conversion, to compare decoding speed with; None reports no speed.
        prompt: int64 [1, n], decoded from where `dense` is given.
        new_tokens, repeats: as for `prunepath.eval.decode.decode_speed`.
        progress: show progress bars on standard error.
        on_row: called with each row once it is done.

    Returns:
        One JSON-ready dict a point: `budget` (None for thresholds), `threshold` (mean over layers),
        `thresholds` (one a layer), `active_fraction`, `read_fraction`, `perplexity`, `bits_per_byte` (None without a
        tokenizer), `tokens`, `bytes`, `tokens_per_second` and `dense_tokens_per_second` (None without `dense`).

    Raises:
        PrunePathError: a budget or threshold outside (0, 1], nothing to evaluate on, or a sparse model that
            at threshold 1 is not the dense one.
    """
    if (budgets is None) == (thresholds is None):
        raise PrunePathError("Expected either budgets or thresholds.")
    if dense is not None and prompt is None:
        raise PrunePathError("Expected a prompt to decode from, since a dense model to compare speed with was given.")
    if iter(texts) is texts:
        texts = list(texts)
    before = prunepath.get_thresholds(model)
    rows = []
    try:
        for value in budgets if thresholds is None else thresholds:
            (prunepath.set_budget if thresholds is None else prunepath.set_threshold)(model, value)
            now = prunepath.get_thresholds(model)
            result = evaluate(
                model,
                tokenizer,
                texts,
                sequence_length=sequence_length,
                max_tokens=max_tokens,
                batch_size=batch_size,
                progress=progress,
            )
            speed = None
            if dense is not None:
                speed = decode_speed(dense, model, prompt, new_tokens=new_tokens, repeats=repeats)
            rows.append(_row(result, value if thresholds is None else None, now, speed))
            if on_row is not None:
                on_row(rows[-1])
    finally:
        prunepath.set_threshold(model, before)
    return rows


def dense_row(model, tokenizer, texts: Iterable[str] | Iterable[torch.Tensor], **options) -> dict:
    """A dense model's row, as `tradeoff` gives them; `options` are those of `evaluate`."""
    return _row(evaluate(model, tokenizer, texts, **options), None, [], None)


def _row(result: Evaluation, budget: float | None, thresholds: list[float], speed: DecodeSpeed | None) -> dict:
    return {
        "budget": budget,
        "threshold": statistics.fmean(thresholds) if thresholds else None,
        "thresholds": thresholds,
        "active_fraction": result.active_fraction,
        "read_fraction": result.read_fraction,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
        "tokens_per_second": speed and speed.tokens_per_second,
        "dense_tokens_per_second": speed and speed.dense_tokens_per_second,
    }
