"""The report says of every target whether the numbers reach it."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not (BENCHMARKS / "performance_report.py").is_file():
    pytest.skip("needs the benchmarks folder of the source tree", allow_module_level=True)
sys.path.append(str(BENCHMARKS))  # where the benchmarks import each other from; prunepath itself is not there

import performance_report  # noqa: E402


def ffn_file(
    cells: dict[str, float], *, active: int = 25, batch: int = 1, share: float = 0.9, threads: int = 2
) -> dict:
    """One call's rows: the microseconds of each candidate."""
    dense = min(us for name, us in cells.items() if name in ("F.linear", "oneDNN prepacked"))
    rows = [
        {
            "command": f"python benchmarks/ffn.py --active {active} --batch {batch}",
            "device": "cpu",
            "shape": "t5-large",
            "dtype": "bfloat16",
            "batch": batch,
            "threads": threads,
            "experts": 128,
            "active_percent": 100 * round(active / 100 * 128) / 128,
            "probe_gb_per_s": 30.0,
            "candidate": name,
            "us": us,
            "gb_per_s": 30 * share,
            "share_of_probe": share,
            "speedup_over_best_dense": dense / us,
            "skipped": None,
        }
        for name, us in cells.items()
    ]
    return {"machine": "a machine", "date": "2026-01-02", "rows": rows}


def decode_file(ratio: float) -> dict:
    row = {
        "model": "qwen2.5-1.5b",
        "device": "cpu",
        "layers": None,
        "asked": 0.25,
        "kind": "sparse",
        "setting": "eager",
        "active": 0.2513,
        "read": 0.3,
        "ms_per_token": 50.0,
        "tokens_per_s": 20.0,
        "speedup_over_best_dense": ratio,
        "peak_bytes": 3e9,
        "skipped": None,
    }
    failed = {**row, "setting": "compiled", "skipped": "no compiler", "ms_per_token": None, "tokens_per_s": None}
    failed["speedup_over_best_dense"] = None
    return {
        "machine": "a machine",
        "date": "2026-01-02",
        "command": "python benchmarks/decode.py",
        "rows": [row, failed],
    }


def verdicts(*files: dict) -> dict[str, list[str]]:
    text = performance_report.report(list(files), "")
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    found: dict[str, list[str]] = {}
    for line in lines:
        if len(line) == 5 and line[-1] in ("reached", "**missed**", "not measured"):
            found.setdefault(line[0], []).append(line[-1])
    return found


@pytest.mark.parametrize(
    ("file", "target", "verdict"),
    [
        (ffn_file({"routed_ffn": 10, "oneDNN prepacked": 35}), "CPU, batch 1: share of the read bandwidth", "reached"),
        (
            ffn_file({"routed_ffn": 10, "oneDNN prepacked": 35}, threads=1),
            "CPU, batch 1: share of the read bandwidth",
            "**missed**",
        ),
        (
            ffn_file({"routed_ffn": 10, "oneDNN prepacked": 33, "F.linear": 50}),
            "CPU, batch 1, 25 % active: over dense oneDNN with packed weights",
            "**missed**",
        ),
        (
            ffn_file({"routed_ffn": 10, "oneDNN prepacked": 35, "F.linear": 9}),
            "CPU, batch 1, 25 % active: over dense oneDNN with packed weights",
            "reached",
        ),
        (
            ffn_file({"routed_ffn": 10.4, "F.linear": 10}, active=100),
            "CPU, all active: against the best dense FFN",
            "reached",
        ),
        (
            ffn_file({"routed_ffn": 10.6, "F.linear": 10}, active=100),
            "CPU, all active: against the best dense FFN",
            "**missed**",
        ),
        (
            ffn_file({"routed_ffn": 9, "SparseFFN": 12, "F.linear": 10}, batch=512),
            "CPU, prefill: against the best dense FFN",
            "**missed**",
        ),
        (decode_file(1.71), "CPU: tokens/s over the best dense setting", "reached"),
        (decode_file(1.69), "CPU: tokens/s over the best dense setting", "**missed**"),
    ],
)
def test_a_number_reaches_its_target_or_misses_it(file, target, verdict):
    found = verdicts(file)
    assert found[target] == [verdict]
    assert found["GPU: tokens/s over the best dense setting"] == ["not measured"]


def test_the_document_holds_notes_numbers_and_where_they_come_from(tmp_path, monkeypatch):
    for name, file in (("ffn", ffn_file({"routed_ffn": 10, "F.linear": 35})), ("decode", decode_file(2.0))):
        (tmp_path / f"{name}.json").write_text(json.dumps(file))
    (tmp_path / "notes.md").write_text("## Why\n\nBecause.\n")
    output = tmp_path / "performance.md"
    options = ["--notes", str(tmp_path / "notes.md"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["performance_report.py", str(tmp_path), *options])
    performance_report.main()
    text = output.read_text()
    for part in (
        "a machine, 2026-01-02",
        "--active 25 --batch 1",
        "Because.",
        "skipped: no compiler",
        "| 20.0 | 2.00x |",
    ):
        assert part in text


def test_commands_that_differ_in_one_option_are_one_line():
    commands = [f"x.py --shape s --active {a} --batch {b} --seed 0" for b in (1, 8) for a in (10, 25)]
    assert performance_report.shorten(commands) == ["x.py --shape s --active 10,25 --batch 1,8 --seed 0"]


def test_other_files_are_refused():
    with pytest.raises(SystemExit, match=r"Expected JSON files that ffn\.py"):
        performance_report.report([{"rows": [{"x": 1}]}], "")
