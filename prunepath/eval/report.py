"""A page that shows what a sparse checkpoint does along its knob: quality, experts per token, layers, experts."""

from __future__ import annotations

import base64
import contextlib
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

import prunepath
from prunepath.checkpoint.description import description_of
from prunepath.errors import PrunePathError
from prunepath.eval.files import replacing
from prunepath.eval.perplexity import evaluate
from prunepath.eval.plots import heat_map
from prunepath.nn import SparseFFN, sparse_ffns
from prunepath.nn.observers import observing_counts

PASSAGE_TOKENS = 256
"""Tokens of the passage that is shown coloured."""

_HEAT = (99, 102, 241)  # legible on white and on black
_MAX_BARS = 64
_MAX_COLUMNS = 128


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
        A JSON-ready dict: `model`; `architecture`, `layers`; `num_experts` and `intermediate_sizes`, one a layer;
        `rows`, one a budget from dense to sparse; and `passage`. A row has `budget`, `thresholds` (one a layer),
        `active_fraction`, `read_fraction`, `perplexity`, `bits_per_byte`, `tokens`, `bytes`, `per_layer` (active
        fraction), `histogram` (the share of pairs of a token and a layer that run up to 1/n, 2/n, … of the experts) and
        `usage` (for each layer the share of tokens that run an expert, from the most to the least used; where there
        are many, means over neighbours in that order). The passage has `pieces` (strings), `tokens` (how many tokens
        spell each) and `active` (for each row and piece the mean active fraction in each layer).

    Raises:
        PrunePathError: for a dense model or one that was not calibrated, a budget outside (0, 1], none below 1, or
            nothing to evaluate on.
    """
    _check_calibrated(model)
    if all(budget == 1.0 for budget in budgets):
        raise PrunePathError("Expected at least one budget below 1 to compare with the dense model, got none.")
    ffns = list(sparse_ffns(model).values())
    budgets = sorted({1.0, *budgets}, reverse=True)
    if iter(texts) is texts:
        texts = list(texts)
    # The beginning token takes one place of the window.
    pieces = _passage(tokenizer, texts, max(1, min(PASSAGE_TOKENS, sequence_length - 1)))
    before = prunepath.get_thresholds(model)
    rows, active = [], []
    try:
        for budget in budgets:
            prunepath.set_budget(model, budget)
            with prunepath.record_counts(model) as counts, _usage(ffns) as usage:
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
            histogram = counts.histogram
            tokens = histogram[0].sum().item()
            rows.append(
                {
                    "budget": budget,
                    "thresholds": prunepath.get_thresholds(model),
                    "active_fraction": result.active_fraction,
                    "read_fraction": result.read_fraction,
                    "perplexity": result.perplexity,
                    "bits_per_byte": result.bits_per_byte,
                    "tokens": result.tokens,
                    "bytes": result.bytes,
                    "per_layer": counts.per_layer,
                    "histogram": _histogram(histogram),
                    "usage": [_from_most_used(usage[ffn] / tokens) for ffn in ffns],
                }
            )
            active.append(_passage_active(model, tokenizer, pieces))
    finally:
        prunepath.set_threshold(model, before)
    return {
        "model": name,
        "architecture": type(model).__name__,
        "layers": len(ffns),
        "num_experts": [ffn.num_experts for ffn in ffns],
        "intermediate_sizes": [ffn.intermediate_size for ffn in ffns],
        "rows": rows,
        "passage": {
            "pieces": [text for text, _ in pieces],
            "tokens": [len(ids) for _, ids in pieces],
            "active": active,
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


def _check_calibrated(model) -> None:
    if not prunepath.is_sparse(model):
        raise PrunePathError(
            f"Expected a sparse checkpoint to report on, got a dense {type(model).__name__}: convert it first."
        )
    if not description_of(model).budgets:
        raise PrunePathError("Expected a checkpoint with calibrated budgets, but it has none: calibrate it first.")


def _passage(tokenizer, texts: Iterable[str], length: int) -> list[tuple[str, list[int]]]:
    """The pieces of the first text that has tokens, up to `length` of them."""
    for text in texts:
        # A token is at least a character's part, and seldom more than 32 characters of prose or code.
        ids = tokenizer(text[: 32 * length], add_special_tokens=False, verbose=False)["input_ids"][:length]
        if ids:
            return split_pieces(tokenizer, ids)
    raise PrunePathError("Expected text to report on, but there is none.")


@contextlib.contextmanager
def _usage(ffns: Sequence[SparseFFN]) -> Iterator[dict[SparseFFN, torch.Tensor]]:
    """Counts for each FFN, float64 [E] on the CPU, the tokens that run each expert inside the `with` block."""
    usage = {ffn: torch.zeros(ffn.num_experts, dtype=torch.float64) for ffn in ffns}

    def choose(ffn: SparseFFN, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        active, _ = ffn.select(x)
        usage[ffn] += active.sum(0).cpu()
        return active

    before = {ffn: ffn.selector for ffn in ffns}
    for ffn in ffns:
        ffn.selector = choose
    try:
        yield usage
    finally:
        for ffn, selector in before.items():
            ffn.selector = selector


def _histogram(histograms: Sequence[torch.Tensor]) -> list[float]:
    """Of all FFNs' tokens, the share that run up to 1/n, 2/n, … of the experts, n at most `_MAX_BARS`."""
    bars = min(_MAX_BARS, max(len(histogram) - 1 for histogram in histograms))
    total = torch.zeros(bars, dtype=torch.float64)
    for histogram in histograms:
        experts = len(histogram) - 1
        places = (torch.arange(1, experts + 1) * bars - 1) // experts
        total.scatter_add_(0, places, histogram[1:].double())
    return (total / total.sum()).tolist()


def _from_most_used(shares: torch.Tensor) -> list[float]:
    """Shares [E] from the greatest to the least, in at most `_MAX_COLUMNS` means of neighbours."""
    ordered = shares.sort(descending=True).values
    return [round(part.mean().item(), 5) for part in ordered.tensor_split(min(len(ordered), _MAX_COLUMNS))]


@torch.inference_mode()
def _passage_active(model, tokenizer, pieces: Sequence[tuple[str, list[int]]]) -> list[list[float]]:
    """For each piece the mean active fraction of its tokens in each layer."""
    ffns = list(sparse_ffns(model).values())
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [*([] if start is None else [start]), *itertools.chain.from_iterable(ids for _, ids in pieces)]
    found = {}
    was_training = model.training
    model.eval()
    with observing_counts(ffns, lambda ffn, counts: found.__setitem__(ffn, counts.cpu().double() / ffn.num_experts)):
        model(input_ids=torch.tensor([ids], device=next(model.parameters()).device), use_cache=False)
    model.train(was_training)
    active = torch.stack([found[ffn] for ffn in ffns], dim=1)[start is not None :]  # [T, layers]
    parts = active.split([len(ids) for _, ids in pieces])
    return [[round(share, 4) for share in part.mean(0).tolist()] for part in parts]


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
    pictures = [heat_map(_equally_long(row["usage"]), _HEAT) for row in rows]
    smallest, largest = min(numbers["num_experts"]), max(numbers["num_experts"])
    return environment.get_template("report.html.jinja").render(
        numbers,
        version=prunepath.__version__,
        experts=f"{largest:,}" if smallest == largest else f"{smallest:,} to {largest:,}",
        columns=max(len(usage) for usage in rows[0]["usage"]),
        colors=[_color(i, len(rows)) for i in range(len(rows))],
        chosen=rows.index(min(rows[1:], key=lambda row: abs(row["budget"] - 0.25))),
        quality=_scale(min(quality), max(quality)),
        histograms=[_bars(row["histogram"]) for row in rows],
        layer_ticks=sorted({round(i * (layers - 1) / 5) for i in range(6)}),
        pictures=[f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in pictures],
        passages=[_colored(active) for active in numbers["passage"]["active"]],
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


def _bars(histogram: Sequence[float]) -> dict:
    """The `bars` of a histogram, each with its `label` and `share`, and the `peak` share."""
    edges = [_percent(i / len(histogram)) for i in range(len(histogram) + 1)]
    bars = [{"label": f"{edges[i]} to {edges[i + 1]}", "share": share} for i, share in enumerate(histogram)]
    return {"bars": bars, "peak": max(histogram)}


def _equally_long(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    """Rows stretched to the length of the longest."""
    longest = max(map(len, rows))
    return [[row[i * len(row) // longest] for i in range(longest)] for row in rows]


def _colored(active: Sequence[Sequence[float]]) -> dict:
    """Each piece's mean active fraction, and its place from 0 to 100 between the 2nd and the 98th percentile."""
    means = [statistics.fmean(layers) for layers in active]
    ordered = sorted(means)
    low, high = ordered[int(0.02 * len(ordered))], ordered[int(0.98 * (len(ordered) - 1))]
    span = max(high - low, 1e-6)
    heat = [round(100 * min(1.0, max(0.0, (mean - low) / span))) for mean in means]
    return {"means": means, "heat": heat, "low": low, "high": high}
