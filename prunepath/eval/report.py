"""A page that shows what a sparse checkpoint does along its knob: quality, experts per token, layers, experts."""

from __future__ import annotations

import base64
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import prunepath
from prunepath.checkpoint.description import description_of
from prunepath.errors import PrunePathError
from prunepath.eval.files import replacing
from prunepath.eval.perplexity import evaluate
from prunepath.eval.plots import heat_map
from prunepath.nn import sparse_ffns
from prunepath.nn.observers import ExpertUsage, observing_counts, observing_inputs

PASSAGE_TOKENS = 256
"""Tokens of the passage that is shown coloured."""

_HEAT = (99, 102, 241)  # legible on white and on black
_MAX_BARS = 64


def measure(
    model,
    tokenizer,
    texts: Iterable[str],
    *,
    name: str,
    budgets: Sequence[float],
    sequence_length: int,
    max_tokens: int | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> dict:
    """Measures what the report shows.

    Args:
        model: a sparse, calibrated causal language model; afterwards it has its thresholds from before again.
        tokenizer: its tokenizer.
        texts: held-out texts; the first one's beginning is the passage.
        name: what to call the model.
        budgets: active fractions to aim for. The dense model, 1.0, is added where it is missing.
        sequence_length, max_tokens, batch_size, progress: as for `prunepath.eval.perplexity.evaluate`.

    Returns:
        A JSON-ready dict: `model`; `architecture`, `layers`, `num_experts`, `intermediate_sizes`; `rows`, one a budget
        from dense to sparse, with `budget`, `thresholds` (one a layer), `active_fraction`, `perplexity`,
        `bits_per_byte`, `tokens`, `bytes`, `per_layer` (active fraction), `histogram` (how many pairs of a token and a
        layer run 0, 1, … E experts) and `usage` (for each layer the share of tokens that run each expert); and
        `passage` with `pieces` (strings), `tokens` (how many tokens spell each) and `counts` (for each row and piece
        the mean experts in each layer).

    Raises:
        PrunePathError: for a dense model or one that was not calibrated, a budget outside (0, 1], none below 1, or
            nothing to evaluate on.
    """
    description = _check_calibrated(model)
    if all(budget == 1.0 for budget in budgets):
        raise PrunePathError("Expected at least one budget below 1 to compare with the dense model, got none.")
    ffns = list(sparse_ffns(model).values())
    budgets = sorted({1.0, *budgets}, reverse=True)
    if iter(texts) is texts:
        texts = list(texts)
    # The beginning token takes one place of the window.
    pieces = _passage(tokenizer, texts, max(1, min(PASSAGE_TOKENS, sequence_length - 1)))
    before = prunepath.get_thresholds(model)
    rows, counts = [], []
    try:
        for budget in budgets:
            prunepath.set_budget(model, budget)
            usage = ExpertUsage(ffns)
            with observing_inputs(dict.fromkeys(ffns, usage.observe)):
                result = evaluate(
                    model,
                    tokenizer,
                    texts,
                    sequence_length=sequence_length,
                    max_tokens=max_tokens,
                    batch_size=batch_size,
                    progress=progress,
                )
            if not math.isfinite(result.nll):
                raise PrunePathError(f"Expected a finite loss at budget {budget:g}, got {result.nll}.")
            active = [(a.double() / tokens).tolist() for a, tokens in zip(usage.active, usage.tokens, strict=True)]
            rows.append(
                {
                    "budget": budget,
                    "thresholds": prunepath.get_thresholds(model),
                    "active_fraction": result.active_fraction,
                    "perplexity": result.perplexity,
                    "bits_per_byte": result.bits_per_byte,
                    "tokens": result.tokens,
                    "bytes": result.bytes,
                    "per_layer": [statistics.fmean(shares) for shares in active],
                    "histogram": torch.stack(usage.histogram).sum(0).tolist(),
                    "usage": active,
                }
            )
            counts.append(_passage_counts(model, tokenizer, pieces))
    finally:
        prunepath.set_threshold(model, before)
    return {
        "model": name,
        "architecture": type(model).__name__,
        "layers": len(ffns),
        "num_experts": description.config.num_experts,
        "intermediate_sizes": [ffn.intermediate_size for ffn in ffns],
        "rows": rows,
        "passage": {
            "pieces": [text for text, _ in pieces],
            "tokens": [len(ids) for _, ids in pieces],
            "counts": counts,
        },
    }


def split_pieces(tokenizer, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The text of token ids piece by piece: (text, its ids).

    A piece is one token, or the tokens that only together spell a whole character, as those of a byte-level tokenizer
    may.
    """
    pieces, done, pending = [], "", []
    for i, token in enumerate(ids):
        pending.append(token)
        text = tokenizer.decode(ids[: i + 1], clean_up_tokenization_spaces=False)
        # U+FFFD at the end: a character that the next tokens finish. None takes more than 4 bytes.
        if text.endswith("\ufffd") and len(pending) < 4 and i + 1 < len(ids):
            continue
        pieces.append((text[len(done) :], pending))
        done, pending = text, []
    return pieces


def write_report(numbers: dict, path: str | Path) -> None:
    """Writes what `measure` returned as one HTML file that needs nothing else.

    Raises:
        PrunePathError: the file cannot be written.
    """
    page = _render(numbers)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _check_calibrated(model):
    """The description of a sparse model that has calibrated budgets."""
    if not prunepath.is_sparse(model):
        raise PrunePathError(
            f"Expected a sparse checkpoint to report on, got a dense {type(model).__name__}: convert it first."
        )
    description = description_of(model)
    if not description.budgets:
        raise PrunePathError("Expected a checkpoint with calibrated budgets, but it has none: calibrate it first.")
    return description


def _passage(tokenizer, texts: Iterable[str], length: int) -> list[tuple[str, list[int]]]:
    """The pieces of the first text that has tokens, up to `length` of them."""
    for text in texts:
        # A token is at least a character's part, and seldom more than 32 characters of prose or code.
        ids = tokenizer(text[: 32 * length], add_special_tokens=False, verbose=False)["input_ids"][:length]
        if ids:
            return split_pieces(tokenizer, ids)
    raise PrunePathError("Expected text to report on, but there is none.")


@torch.inference_mode()
def _passage_counts(model, tokenizer, pieces: Sequence[tuple[str, list[int]]]) -> list[list[float]]:
    """For each piece the mean experts of its tokens in each layer."""
    ffns = list(sparse_ffns(model).values())
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [*([] if start is None else [start]), *itertools.chain.from_iterable(ids for _, ids in pieces)]
    found = {}
    was_training = model.training
    model.eval()
    with observing_counts(ffns, lambda ffn, counts: found.__setitem__(ffn, counts.cpu().double())):
        model(input_ids=torch.tensor([ids], device=next(model.parameters()).device), use_cache=False)
    model.train(was_training)
    counts = torch.stack([found[ffn] for ffn in ffns], dim=1)[start is not None :]  # [T, layers]
    parts = counts.split([len(ids) for _, ids in pieces])
    return [[round(count, 2) for count in part.mean(0).tolist()] for part in parts]


def _render(numbers: dict) -> str:
    import jinja2

    rows, layers = numbers["rows"], numbers["layers"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prunepath", "eval"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    quality = [row["bits_per_byte"] for row in rows]
    pictures = [heat_map(row["usage"], _HEAT) for row in rows]
    passages = [_colored(counts, numbers["num_experts"]) for counts in numbers["passage"]["counts"]]
    return environment.get_template("report.html.jinja").render(
        numbers,
        version=prunepath.__version__,
        colors=[_color(i, len(rows)) for i in range(len(rows))],
        chosen=rows.index(min(rows[1:], key=lambda row: abs(row["budget"] - 0.25))),
        quality=_scale(min(quality), max(quality)),
        histograms=[_bars(row["histogram"]) for row in rows],
        layer_ticks=sorted({round(i * (layers - 1) / 5) for i in range(6)}),
        pictures=[f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in pictures],
        passages=passages,
    )


def _percent(fraction: float) -> str:
    """12 %, 1.2 %, 0.12 %: at least two digits."""
    value = 100 * fraction
    return f"{value:.0f}%" if value >= 9.95 or value == 0 else f"{value:.1f}%" if value >= 0.95 else f"{value:.2g}%"


def _color(i: int, count: int) -> str:
    """Grey for dense, then from blue over violet to orange as the budgets fall."""
    return "var(--dense)" if i == 0 else f"hsl({215 + 170 * (i - 1) / max(1, count - 2):.0f} 75% 55%)"


def _scale(low: float, high: float) -> dict:
    """An axis that holds [low, high]: its `low` and `high`, round `ticks`, and the `digits` that they take."""
    span = max(high - low, 1e-3 * max(abs(high), 1e-3))
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= 4.001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (round(step / power, 1) == 2.5))
    ticks = [k * step for k in range(first, last + 1)]
    return {"low": ticks[0], "high": ticks[-1], "ticks": ticks, "digits": digits}


def _bars(histogram: Sequence[int]) -> dict:
    """Shares of 1, 2, … E experts in at most `_MAX_BARS` `bars` of equal width, the `mean` and the `peak` share."""
    experts = len(histogram) - 1
    width = math.ceil(experts / _MAX_BARS)
    total = sum(histogram)
    bars = []
    for first in range(1, experts + 1, width):
        last = min(first + width - 1, experts)
        label = f"{first}" if first == last else f"{first}–{last}"
        bars.append({"label": label, "share": sum(histogram[first : last + 1]) / total})
    mean = sum(count * tokens for count, tokens in enumerate(histogram)) / total
    return {"bars": bars, "mean": mean, "peak": max(bar["share"] for bar in bars)}


def _colored(counts: Sequence[Sequence[float]], num_experts: int) -> dict:
    """Each piece's mean experts, and its place from 0 to 100 between those of the 2nd and the 98th percentile."""
    means = [statistics.fmean(layers) for layers in counts]
    ordered = sorted(means)
    low, high = ordered[int(0.02 * len(ordered))], ordered[int(0.98 * (len(ordered) - 1))]
    span = max(high - low, 1e-6 * num_experts)
    heat = [round(100 * min(1.0, max(0.0, (mean - low) / span))) for mean in means]
    return {"means": means, "heat": heat, "low": low, "high": high}
