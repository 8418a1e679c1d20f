"""Quality of sparse models at equal active fractions: PrunePath beside other methods, on real text, offline.

    python benchmarks/quality.py --out quality                  # everything: data, dense models, methods, report
    python benchmarks/quality.py --out quality --stage cells --jobs 14 --time-limit 900    # go on where it stopped

Everything is kept under --out, and what is there is not computed again: `data/`, `dense/` (trained models), `cells/`
(one JSON file for each task, method and seed) and `search/` (learning rates). `--stage report` needs the cells alone.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import multiprocessing
import os
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Behind the installed packages: an installed prunepath comes first, else the source tree with libraries built there.
sys.path += [str(path) for path in (ROOT, ROOT / "benchmarks") if str(path) not in sys.path]

import torch  # noqa: E402
from baselines import METHODS, Method, Settings  # noqa: E402
from quality_report import BOUNDS, write_report  # noqa: E402
from tasks import TASKS, Task, build_task  # noqa: E402
from tasks.models import DEMO, train_dense  # noqa: E402
from training import calibrate, evaluate, finetune, install  # noqa: E402

BUDGETS = (0.5, 0.25, 0.1)
RATES = (2e-4, 5e-4, 1e-3)
SEARCH_SHARE = 0.25
SEARCH_BUDGET = 0.25
_LONGEST_FIRST = {name: i for i, name in enumerate(("prunepath", "lte", "static-flap", "static-wanda", "static-mean"))}


def write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)


def load_tokenizer():
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    tokenizer.model_max_length = 10**9  # windows are cut here
    return tokenizer


def load_task(out: Path, name: str, device: str) -> Task:
    return torch.load(out / "data" / f"{name}.pt", weights_only=False).to(device)


def prepare_data(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer()
    for name in args.tasks:
        path = args.out / "data" / f"{name}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            task = build_task(name, tokenizer, size=args.size)
            temporary = path.with_suffix(".writing")
            torch.save(task, temporary)
            temporary.replace(path)
            print(f"data {name}: {', '.join(f'{task.count(split)} {split}' for split in task.splits)}", flush=True)


def dense_path(args: argparse.Namespace, name: str) -> Path:
    return args.out / "dense" / name


def make_dense(args: argparse.Namespace, name: str) -> None:
    """Trains the dense model of a task, unless it is there, and writes it in bfloat16."""
    folder = dense_path(args, name)
    if (folder / "config.json").exists():
        return
    started = time.monotonic()
    _quiet()
    tokenizer = load_tokenizer()
    task = load_task(args.out, name, args.device)
    source = "lm-llama" if task.family == "llama" else "lm-opt"
    stream = torch.load(args.out / "data" / f"{source}.pt", weights_only=False).splits["train"]["input_ids"].flatten()
    model = train_dense(
        task,
        stream.to(args.device),
        len(tokenizer),
        tokenizer.eos_token_id,
        tiny=args.size == "tiny",
        report=lambda line: print(f"dense {line}, {time.monotonic() - started:.0f} s", flush=True),
    )
    temporary = folder.with_name(f".{name}")
    model.to(torch.bfloat16).save_pretrained(temporary)
    temporary.replace(folder)


def load_dense(args: argparse.Namespace, name: str, family: str) -> torch.nn.Module:
    import transformers

    auto = {
        "bert": transformers.AutoModelForSequenceClassification,
        "t5": transformers.AutoModelForSeq2SeqLM,
    }.get(family, transformers.AutoModelForCausalLM)
    return auto.from_pretrained(dense_path(args, name), dtype=torch.float32).to(args.device).eval()


def _quiet() -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


_loaded: dict[str, tuple[Task, torch.nn.Module]] = {}


def _task_and_dense(args: argparse.Namespace, name: str) -> tuple[Task, torch.nn.Module]:
    if name not in _loaded:
        _loaded.clear()
        task = load_task(args.out, name, args.device)
        _loaded[name] = task, load_dense(args, name, task.family)
    return _loaded[name]


def search_path(args: argparse.Namespace, task: str, method: str) -> Path:
    return args.out / "search" / f"{task}.{method}.json"


def cell_path(args: argparse.Namespace, task: str, method: str, seed: int) -> Path:
    return args.out / "cells" / f"{task}.{method}.{seed}.json"


def learning_rate(args: argparse.Namespace, task_name: str, method: str, installed: Method) -> float:
    """The best of `RATES` by validation loss at `SEARCH_BUDGET` after a short run of a copy of the installed method.

    Searched once for a task and a method, by the first seed that comes.
    """
    path = search_path(args, task_name, method)
    if not path.exists():
        task, dense = _task_and_dense(args, task_name)
        losses = {}
        for rate in RATES:
            instance = copy.deepcopy(installed)
            steps = max(2, round(SEARCH_SHARE * args.steps))
            finetune(instance, dense, task, steps=steps, batch_size=args.batch_size, rate=rate, seed=0)
            calibrate(instance, task, args.batch_size)
            at = 1.0 if method == "dense" else SEARCH_BUDGET
            losses[f"{rate:g}"] = evaluate(instance, task, "validation", at, limit=256)["loss"]
        write_whole(path, json.dumps(losses, indent=2).encode())
    losses = json.loads(path.read_text())
    return float(min(losses, key=losses.get))


def run_cell(args: argparse.Namespace, task_name: str, method: str, seed: int) -> None:
    """One method on one task with one seed: without and with fine-tuning, at all budgets."""
    started = time.monotonic()
    task, dense = _task_and_dense(args, task_name)
    tokenizer = load_tokenizer()
    one = METHODS[method].one_checkpoint
    settings = Settings(args.num_experts, BUDGETS, seed)
    cell = {"task": task_name, "method": method, "seed": seed, "one_checkpoint": one, "results": []}
    budgets = (1.0,) if method == "dense" else BUDGETS
    # Where every budget has its own checkpoint, the one that learning rates are compared on comes first.
    groups = [budgets] if one else [(budget,) for budget in sorted(budgets, key=lambda b: b != SEARCH_BUDGET)]
    for group in groups:
        instance = install(METHODS[method], dense, task, settings, None if one else group[0])
        if "learning_rate" not in cell:
            cell["learning_rate"] = rate = learning_rate(args, task_name, method, instance)
        for finetuned in (False, True):
            if finetuned:
                finetune(instance, dense, task, steps=args.steps, batch_size=args.batch_size, rate=rate, seed=seed)
            calibrate(instance, task, args.batch_size)
            routed = one and method != "dense"
            for budget in (1.0, *group) if routed else group:
                result = evaluate(instance, task, "test", budget, tokenizer=tokenizer)
                cell["results"].append({"budget": budget, "finetuned": finetuned, **result})
    cell["seconds"] = time.monotonic() - started
    write_whole(cell_path(args, task_name, method, seed), json.dumps(cell).encode())
    after = [
        f"{r['budget']:g}: {r['loss']:.3f} ({r['active_fraction']:.3f})" for r in cell["results"] if r["finetuned"]
    ]
    print(f"{task_name} {method} seed {seed}, rate {rate:g}, {cell['seconds']:.0f} s: {', '.join(after)}", flush=True)


def _work(job: tuple) -> str | None:
    args, name, method, seed, deadline = job
    if cell_path(args, name, method, seed).exists() or time.time() > deadline:
        return None
    _quiet()
    try:
        run_cell(args, name, method, seed)
    except Exception as error:  # one method's failure leaves the others' results
        import traceback

        traceback.print_exc()
        return f"{name} {method} seed {seed}: {type(error).__name__}: {error}"
    return None


def run_cells(args: argparse.Namespace) -> None:
    deadline = time.time() + (args.time_limit or 1e9)
    jobs = [
        (args, name, method, seed, deadline) for seed in args.seeds for method in args.methods for name in args.tasks
    ]
    # What is compared comes before the bounds, and the longest first: these have a calibration of their own for each
    # learning rate, or a training for each budget.
    jobs.sort(key=lambda job: (job[2] in BOUNDS and job[3] != args.seeds[0], job[3], _LONGEST_FIRST.get(job[2], 9)))
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        failures = [failure for failure in pool.imap_unordered(_work, jobs) if failure]
    gather(args)
    if failures:
        raise SystemExit("failed: " + "; ".join(failures))


def gather(args: argparse.Namespace) -> None:
    """All cells, and what they were measured on, in one file."""
    cells = [json.loads(path.read_text()) for path in sorted((args.out / "cells").glob("*.json"))]
    tasks = {}
    for name in TASKS:
        if (args.out / "data" / f"{name}.pt").exists():
            task = load_task(args.out, name, "cpu")
            tasks[name] = {
                "family": task.family,
                "metric": task.metric,
                "examples": {split: task.count(split) for split in task.splits},
                "sha256": task.fingerprint(),
                "sizes": task.sizes,
                "references": task.references,
            }
    import transformers

    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "CPU"
    data = {
        "command": " ".join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
        "settings": {name: getattr(args, name) for name in ("size", "steps", "batch_size", "num_experts")},
        "machine": where,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "tasks": tasks,
        "cells": cells,
    }
    write_whole(args.out / "cells.json.gz", gzip.compress(json.dumps(data).encode()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder of everything that is written")
    parser.add_argument("--stage", choices=("data", "dense", "cells", "report", "all"), default="all")
    parser.add_argument("--size", choices=("tiny", "small"), default="small", help="tiny: to test the benchmark")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--tasks", type=lambda s: s.split(","), default=list(TASKS))
    parser.add_argument("--methods", type=lambda s: s.split(","), default=list(METHODS))
    parser.add_argument("--seeds", type=lambda s: [int(part) for part in s.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    parser.add_argument("--batch-size", type=int, default=24, help="examples of a step")
    parser.add_argument("--num-experts", type=int, default=128)
    parser.add_argument("--time-limit", type=float, help="seconds after which no further cell begins")
    args = parser.parse_args()
    for kind, chosen, known in (("task", args.tasks, TASKS), ("method", args.methods, METHODS)):
        for name in chosen:
            if name not in known:
                parser.error(f"expected --{kind}s among {', '.join(known)}, got {name}.")
    if args.stage in ("data", "dense", "cells", "all"):
        prepare_data(args)
    if args.stage in ("dense", "cells", "all"):
        missing = [name for name in args.tasks if not (dense_path(args, name) / "config.json").exists()]
        if missing:
            with multiprocessing.get_context("spawn").Pool(min(args.jobs, len(missing))) as pool:
                pool.starmap(make_dense, [(args, name) for name in missing])
    if args.stage in ("cells", "all"):
        run_cells(args)
    if args.stage in ("report", "all"):
        write_report(args.out / "cells.json.gz", ROOT / "docs")


if __name__ == "__main__":
    main()
