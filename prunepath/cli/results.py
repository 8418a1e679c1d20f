"""What a command prints: for people, or as one JSON value."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator

COLUMNS = {
    "budget": ("budget", "{:.2f}"),
    "threshold": ("threshold", "{:.3f}"),
    "active_fraction": ("active", "{:.1%}"),
    "read_fraction": ("read", "{:.1%}"),
    "perplexity": ("ppl", "{:.3f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "tokens_per_second": ("tok/s", "{:.1f}"),
    "dense_tokens_per_second": ("dense tok/s", "{:.1f}"),
    "loss_before": ("loss before", "{:.4f}"),
    "loss_after": ("after", "{:.4f}"),
    "ffn": ("FFN", "{}"),
    "kl": ("router KL (nats)", "{:.4f}"),
    "recall": ("recall at 25 %", "{:.1%}"),
}
"""A row's entry -> its column's title and format."""


@contextlib.contextmanager
def printing(as_json: bool) -> Iterator[Results]:
    """Gives a command its `Results`; whatever else is printed meanwhile, by libraries say, goes to standard error."""
    results = Results(as_json)
    with contextlib.redirect_stdout(sys.stderr):
        yield results


class Results:
    """Prints a command's results, either for people or as one JSON value, on the real standard output."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.stdout = sys.stdout

    def json(self, value: object) -> None:
        if self.as_json:
            print(json.dumps(_finite(value), indent=2, allow_nan=False), file=self.stdout)

    def text(self, line: str) -> None:
        if not self.as_json:
            print(line, file=self.stdout, flush=True)

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def table(self, rows: list[dict]) -> None:
        if self.as_json:
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table

        columns = {name: column for name, column in COLUMNS.items() if any(row.get(name) is not None for row in rows)}
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # fits in 80 columns
        for title, _ in columns.values():
            table.add_column(title, justify="right")
        for row in rows:
            cells = (form.format(row[name]) if row[name] is not None else "-" for name, (_, form) in columns.items())
            table.add_row(*cells)
        Console(file=self.stdout).print(table)

    def fields(self, value: dict) -> None:
        if self.as_json:
            return
        for name, field in value.items():
            if isinstance(field, dict):
                self.text(f"{name}:")
                for key, entry in field.items():
                    self.text(f"  {key}: {_plain(entry)}")
            else:
                self.text(f"{name}: {_plain(field)}")

    def streamer(self, tokenizer):
        """Prints generated text as it comes; None with --json."""
        if self.as_json:
            return None
        from transformers import TextStreamer

        results = self

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                print(text, end="\n" if stream_end else "", file=results.stdout, flush=True)

        return Streamer(tokenizer, skip_prompt=False, skip_special_tokens=True)


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(entry) for entry in value)
    if isinstance(value, dict):
        inner = {
            name: f"({_plain(entry)})" if isinstance(entry, dict) else _plain(entry) for name, entry in value.items()
        }
        return "; ".join(f"{name} {entry}" for name, entry in inner.items()) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _finite(value: object) -> object:
    """JSON has no infinity (the perplexity of a ruined model) and no NaN: null stands for them."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
