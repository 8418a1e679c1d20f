"""Writes docs/performance.md from the JSON files of ffn.py, route.py and decode.py.

    python benchmarks/performance_report.py results/            # every .json in the folder
    python benchmarks/performance_report.py ffn.json decode.json --output performance.md

Each file says its command, machine and date. What a target asks of a row is compared with what was measured, "reached"
or "missed"; a target that no row measures is listed too. The notes, written by hand, say why a number is missed; they
are put in where they are, docs/performance-notes.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from prunepath.eval.files import replacing

DOCS = Path(__file__).resolve().parents[1] / "docs"
# Microseconds a layer in bfloat16 at batch 1, by active percent: CUDA, Triton.
GPU_TARGETS = {
    "llama-3-8b": {10: (11.5, 14), 25: (24, 27), 50: (44, 48)},
    "opt-6.7b": {10: (9.5, 12), 25: (19, 22), 50: (34, 38)},
    "qwen2.5-1.5b": {10: (5.0, 6.5), 25: (8.0, 9.5), 50: (13, 15)},
    "t5-large": {10: (3.2, 4.5), 25: (3.8, 5.2), 50: (4.8, 6.3)},
}
LARGE = ("llama-3-8b", "opt-6.7b")


@dataclass(frozen=True)
class Target:
    """Something asked for, and the measured values that it is about: (what it is of, value, limit, unit)."""

    text: str
    values: list[tuple[str, float, float]]
    unit: str
    at_most: bool = False

    def lines(self) -> Iterable[list[str]]:
        for what, value, limit in self.values:
            reached = value <= limit if self.at_most else value >= limit
            bound = f"{'at most' if self.at_most else 'at least'} {limit:g}{self.unit}"
            yield [
                self.text,
                what,
                bound,
                f"{value:.{2 if value < 20 else 1}f}{self.unit}",
                "reached" if reached else "**missed**",
            ]
        if not self.values:
            yield [self.text, "", "", "", "not measured"]


def table(head: list[str], lines: Iterable[list[str]], numbers: int) -> str:
    """A Markdown table whose columns from `numbers` on are flush right."""
    rule = ["---" if column < numbers else "--:" for column in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines)) + "\n"


def setting_of(row: dict) -> str:
    """The row's call in words, without its active fraction."""
    threads = f", {row['threads']} thread{'s' if row['threads'] > 1 else ''}" if row.get("threads") else ""
    return f"{row['shape']} {row['dtype']}, batch {row['batch']}{threads}"


def near(row: dict, percents: Iterable[int]) -> int | None:
    """Which of `percents` the row's active fraction stands for, experts being whole."""
    return next((p for p in percents if abs(row["active_percent"] - p) <= 0.5 + 50 / row["experts"]), None)


def ffn_section(files: list[dict]) -> str:
    parts = []
    for device in ("cpu", "cuda"):
        rows = [row for file in files for row in file["rows"] if row["device"] == device]
        if not rows:
            continue
        parts.append(f"### FFN, {'CPU' if device == 'cpu' else 'GPU'}\n\n{sources(files, device)}")
        groups: dict[str, list[dict]] = {}
        for row in rows:
            groups.setdefault(setting_of(row), []).append(row)
        for name, group in groups.items():
            candidates = list(dict.fromkeys(row["candidate"] for row in group))
            head = ["active", "probe GB/s", *candidates, "GB/s of routed_ffn", "of probe", "vs best dense"]
            lines = []
            for percent in dict.fromkeys(row["active_percent"] for row in group):
                cells = {row["candidate"]: row for row in group if row["active_percent"] == percent}
                ours = fastest(cells.values(), "routed_ffn")
                times = [f"{cells[c]['us']:.1f}" if c in cells and cells[c]["us"] else "–" for c in candidates]
                first = next(iter(cells.values()))
                shares = ["–"] * 3
                if ours:
                    ratio = ours["speedup_over_best_dense"]
                    shares = [
                        f"{ours['gb_per_s']:.1f}",
                        f"{ours['share_of_probe']:.0%}",
                        f"{ratio:.2f}x" if ratio else "–",
                    ]
                lines.append([f"{percent:.0f} %", f"{first['probe_gb_per_s']:.1f}", *times, *shares])
            parts.append(f"**{name}**, µs a call:\n\n{table(head, lines, 1)}")
            skipped = {row["candidate"]: row["skipped"] for row in group if row["skipped"]}
            parts.extend(f"{candidate}: {reason}\n" for candidate, reason in skipped.items())
    for file in files:
        if file.get("overhead"):
            lines = [[name, f"{us:.1f}"] for name, us in file["overhead"].items()]
            parts.append(f"Overhead, on an FFN that is too small to matter:\n\n{table(['call', 'µs'], lines, 1)}")
    return "\n".join(parts)


def fastest(rows: Iterable[dict], name: str) -> dict | None:
    return min(
        (row for row in rows if row["candidate"].startswith(name) and row["us"]), key=lambda r: r["us"], default=None
    )


def sources(files: list[dict], device: str) -> str:
    """Machine, date and commands of the files that have rows of the device."""
    lines = []
    for file in files:
        commands = dict.fromkeys(
            row["command"] for row in file["rows"] if "command" in row and row.get("device", "cpu") == device
        )
        if not commands and any(row.get("device", "cpu") == device for row in file["rows"]):
            commands = [file["command"]]
        if commands:
            text = "\n".join(shorten(list(commands)))
            lines.append(f"{file['machine']}, {file.get('date', 'no date')}:\n\n```\n{text}\n```\n")
    return "\n".join(lines)


def shorten(commands: list[str]) -> list[str]:
    """Commands that differ in one option's value alone as one, that option's values joined."""
    merged: list[list[str]] = []
    for command in commands:
        words = command.split()
        for other in merged:
            differences = [i for i, (a, b) in enumerate(zip(words, other, strict=False)) if a != b]
            if (
                len(words) == len(other)
                and len(differences) <= 1
                and all(other[i - 1][:2] == "--" for i in differences)
            ):
                for i in differences:
                    other[i] = f"{other[i]},{words[i]}"
                break
        else:
            merged.append(words)
    joined = [" ".join(words) for words in merged]
    return joined if len(joined) in (len(commands), 1) else shorten(joined)


def route_section(files: list[dict]) -> str:
    parts = []
    for file in files:
        columns = ["device", "experts", "tokens", "dtype", "route_us", "triton_us", "plain_torch_us", "speedup"]
        columns = [column for column in columns if column in file["rows"][0]]
        lines = [
            [f"{row[c]:.1f}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in file["rows"]
        ]
        head = [column.replace("_us", ", µs").replace("_", " ") for column in columns]
        parts.append(
            f"### Routing\n\n{file['machine']}, {file.get('date', 'no date')}:\n\n```\n{file['command']}\n```\n\n"
            f"{table(head, lines, 0)}"
        )
    return "\n".join(parts)


def decode_section(files: list[dict]) -> str:
    parts = []
    for file in files:
        device = file["rows"][0]["device"]
        parts.append(
            f"### Decoding end to end, {'CPU' if device == 'cpu' else 'GPU'}\n\n{file['machine']}, "
            f"{file.get('date', 'no date')}:\n\n```\n{file['command']}\n```\n"
        )
        head = ["model", "active", "read", "", "setting", "ms a token", "tokens/s", "vs best dense", "peak MB"]
        lines = []
        for row in file["rows"]:
            name = row["model"] + (f", {row['layers']} layers" if row["layers"] else "")
            active = f"{100 * row['active']:.1f} %" if row["active"] is not None else "–"
            asked = f"{100 * row['asked']:.0f} %"
            if row["skipped"]:
                lines.append([name, asked, "–", row["kind"], row["setting"], f"skipped: {row['skipped']}", "", "", ""])
                continue
            ratio, peak = row["speedup_over_best_dense"], row["peak_bytes"]
            lines.append(
                [
                    name,
                    active if row["kind"] == "sparse" else f"beside {asked}",
                    f"{100 * row['read']:.1f} %" if row["read"] is not None else "–",
                    row["kind"],
                    row["setting"],
                    f"{row['ms_per_token']:.2f}",
                    f"{row['tokens_per_s']:.1f}",
                    f"{ratio:.2f}x" if ratio else "–",
                    f"{peak / 1e6:.0f}" if peak else "–",
                ]
            )
        parts.append(table(head, lines, 5))
    return "\n".join(parts)


def ffn_targets(files: list[dict]) -> list[Target]:
    rows = [row for file in files for row in file["rows"]]

    def pick(
        device: str, name: str, keep: Callable[[dict], bool], value: Callable[[dict], float | None], limit
    ) -> list:
        found = []
        for row in rows:
            if row["device"] == device and row["candidate"] == name and row["us"] and keep(row):
                got, bound = value(row), limit(row) if callable(limit) else limit
                if got is not None and bound is not None:
                    found.append((f"{setting_of(row)}, {row['active_percent']:.0f} %", got, bound))
        return found

    def percent(row: dict) -> float:
        return 100 * row["share_of_probe"]

    def over_dense(row: dict) -> float | None:
        return row["speedup_over_best_dense"]

    def over_prepacked(row: dict) -> float | None:
        same = [r for r in rows if setting_of(r) == setting_of(row) and r["active_percent"] == row["active_percent"]]
        dense = next((r["us"] for r in same if r["candidate"] == "oneDNN prepacked" and r["us"]), None)
        return dense and dense / row["us"]

    def single(row: dict) -> bool:
        return row["batch"] == 1 and row["dtype"] == "bfloat16"

    def sparse(row: dict) -> bool:
        return near(row, (10, 25, 50)) is not None

    def full(row: dict) -> bool:
        return row["active_percent"] == 100

    targets = [
        Target(
            "CPU, batch 1: share of the read bandwidth",
            pick(
                "cpu",
                "routed_ffn",
                lambda r: single(r) and sparse(r),
                percent,
                lambda r: 95 if r["threads"] == 1 else 85,
            ),
            " %",
        ),
        Target(
            "CPU, batch 1, 25 % active: over dense oneDNN with packed weights",
            pick("cpu", "routed_ffn", lambda r: single(r) and near(r, (25,)) is not None, over_prepacked, 3.4),
            "x",
        ),
        Target(
            "CPU, all active: against the best dense FFN",
            pick("cpu", "routed_ffn", lambda r: full(r) and r["batch"] <= 64, over_dense, 0.95),
            "x",
        ),
        Target(
            "CPU, prefill: against the best dense FFN",
            pick("cpu", "SparseFFN", lambda r: r["batch"] > 64, over_dense, 0.9),
            "x",
        ),
    ]
    for index, (backend, share) in enumerate((("cuda", 85), ("triton", 77))):
        name = f"routed_ffn {backend}"

        def micros(row: dict, index: int = index) -> float | None:
            points = GPU_TARGETS.get(row["shape"], {})
            point = near(row, points)
            return None if point is None else points[point][index]

        targets += [
            Target(
                f"GPU, batch 1, {backend}: time of a layer",
                pick("cuda", name, single, lambda r: r["us"], micros),
                " µs",
                at_most=True,
            ),
            Target(
                f"GPU, batches 8 and 32, {backend}: share of the floor",
                pick(
                    "cuda",
                    name,
                    lambda r: r["batch"] in (8, 32) and r["shape"] in LARGE and r["dtype"] == "bfloat16" and sparse(r),
                    percent,
                    share,
                ),
                " %",
            ),
        ]
    overhead = [
        ("routed_ffn", file["overhead"]["routed_ffn"], 10.0)
        for file in files
        if "routed_ffn" in (file.get("overhead") or {})
    ]
    targets.append(Target("CPU: overhead of one routed_ffn call", overhead, " µs", at_most=True))
    return targets


def route_targets(files: list[dict]) -> list[Target]:
    values = [
        (f"T = {row['tokens']}", row["speedup"], 10.0)
        for file in files
        for row in file["rows"]
        if row["experts"] == 128 and row["tokens"] in (1, 64) and row.get("device", "cpu") == "cpu"
    ]
    return [Target("CPU: route at E = 128 over torch's softmax, sort, cumsum and mask", values, "x")]


def decode_targets(files: list[dict]) -> list[Target]:
    rows = [row for file in files for row in file["rows"] if row["layers"] is None]

    def best(device: str, model: str | None, asked: float, limit: float) -> list[tuple[str, float, float]]:
        found: dict[str, float] = {}
        for row in rows:
            ratio = row.get("speedup_over_best_dense")
            if (row["device"], row["kind"], row["asked"]) == (device, "sparse", asked) and ratio:
                if model in (None, row["model"]):
                    found[row["model"]] = max(ratio, found.get(row["model"], 0.0))
        return [(f"{name}, {100 * asked:.0f} %", ratio, limit) for name, ratio in found.items()]

    return [
        Target("CPU: tokens/s over the best dense setting", best("cpu", "qwen2.5-1.5b", 0.25, 1.7), "x"),
        Target("CPU, all active: tokens/s", best("cpu", None, 1.0, 0.95), "x"),
        Target("GPU: tokens/s over the best dense setting", best("cuda", "llama-3-8b", 0.25, 1.9), "x"),
        Target("GPU, all active: tokens/s", best("cuda", None, 1.0, 0.95), "x"),
    ]


def report(files: list[dict], notes: str) -> str:
    """The document; a file is known by what its rows hold."""
    kinds: dict[str, list[dict]] = {"candidate": [], "route_us": [], "tokens_per_s": []}
    for file in files:
        key = next((key for key in kinds if file.get("rows") and key in file["rows"][0]), None)
        if key is None:
            raise SystemExit("Expected JSON files that ffn.py, route.py or decode.py wrote, got one with other rows.")
        kinds[key].append(file)
    ffn, route, decode = kinds.values()
    targets = [*ffn_targets(ffn), *route_targets(route), *decode_targets(decode)]
    lines = [line for target in targets for line in target.lines()]
    parts = [
        "# Performance\n",
        "Written by `python benchmarks/performance_report.py` from the benchmarks' JSON files. Every result was "
        "checked before it was timed; times are medians of rounds in which all candidates took turns. The bandwidth "
        "probe ran beside each row. It reads ordinary pages: weights in large pages, which `pack_experts` asks for, "
        "can be read faster.\n",
        "## Targets\n",
        table(["target", "measured on", "asked", "got", ""], lines, 2),
        notes,
        "## Measurements\n",
        ffn_section(ffn),
        route_section(route),
        decode_section(decode),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part.strip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files, or folders of them")
    parser.add_argument("--notes", type=Path, default=DOCS / "performance-notes.md")
    parser.add_argument("--output", type=Path, default=DOCS / "performance.md")
    args = parser.parse_args()
    paths = [file for path in args.results for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not paths:
        parser.error(f"expected JSON files, found none in {', '.join(map(str, args.results))}")
    try:
        files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        notes = args.notes.read_text(encoding="utf-8") if args.notes.is_file() else ""
    except (OSError, ValueError) as error:
        parser.error(f"cannot read the results: {error}")
    text = report(files, notes)
    with replacing(str(args.output)) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    print(f"Wrote {args.output} from {', '.join(map(str, paths))}.")


if __name__ == "__main__":
    main()
