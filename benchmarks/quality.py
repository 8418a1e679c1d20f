"""Quality of sparse models at equal active fractions: PrunePath beside other methods, on real text, offline.

    python benchmarks/quality.py --out quality                  # everything: data, dense models, methods, report
    python benchmarks/quality.py --out quality --stage cells --jobs 12 --time-limit 500   # go on where it stopped
    python benchmarks/quality.py --tasks glue-sst2,squad,xsum           # through the `datasets` package

Everything is kept under --out, and what is there is not computed again: `data/`, `dense/` (trained models), `cells/`
(one JSON file for each task, method and seed), `partitions/` and `search/` (learning rates). `cells.json.xz` gathers
the finished cells once a minute; `--stage report` needs it alone. The processes of `--jobs` take turns over the GPUs,
and a cell begins as soon as the dense model of its task is trained. Many small processes share a GPU best under
NVIDIA's MPS.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import json
import lzma
import math
import multiprocessing
import os
import platform
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Behind the installed packages: an installed prunepath comes first, else the source tree with libraries built there.
sys.path += [str(path) for path in (ROOT, ROOT / "benchmarks") if str(path) not in sys.path]

import torch  # noqa: E402
from baselines import METHODS, Method, Settings  # noqa: E402
from quality_report import BOUNDS, write_report  # noqa: E402
from tasks import HUB_TASKS, TASKS, Task, build_task  # noqa: E402
from tasks.models import DEMO, fuse_norms, train_dense  # noqa: E402
from training import calibrate, evaluate, finetune, install  # noqa: E402

BUDGETS = (0.5, 0.25, 0.1)
FIRST_RATE = 2e-4
RATE_LIMITS = (1.25e-5, 6.4e-3)
"""Learning rates are searched from the first by factors of two until the best has a worse one on each side of it."""
SEARCH_SHARE = 1 / 6
SEARCH_BUDGET = 0.25
_FIRST = {name: i for i, name in enumerate(("dense", "prunepath", "lte", "static-flap", "static-wanda", "static-mean"))}
_LONGEST = {name: i for i, name in enumerate(("nlg", "nlu", "lm-opt", "instruct"))}
_BESIDE_DENSE = 6
"""Cells at a time on a GPU that trains a dense model, which the cells of its task wait for."""
_ATTEMPTS = 2
_GATHER_SECONDS = 60.0
PRETRAINING = "lm-opt"
"""The task whose training tokens dense models are pre-trained on."""


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
    for name in dict.fromkeys([*args.tasks, PRETRAINING]):
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
    stream = load_task(args.out, PRETRAINING, "cpu").splits["train"]["input_ids"].flatten()
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


_loaded: dict[str, tuple[Task, torch.nn.Module, torch.nn.Module]] = {}


def _task_and_dense(args: argparse.Namespace, name: str) -> tuple[Task, torch.nn.Module, torch.nn.Module]:
    """A task, its dense model, and the same as a teacher: on a GPU in bfloat16, as it is stored."""
    if name not in _loaded:
        _loaded.clear()
        task = load_task(args.out, name, args.device)
        dense = load_dense(args, name, task.family)
        teacher = copy.deepcopy(dense).to(torch.bfloat16) if args.device.startswith("cuda") else dense
        _loaded[name] = task, dense, teacher
    return _loaded[name]


def search_path(args: argparse.Namespace, task: str, method: str) -> Path:
    return args.out / "search" / f"{task}.{method}.json"


def cell_path(args: argparse.Namespace, task: str, method: str, seed: int) -> Path:
    return args.out / "cells" / f"{task}.{method}.{seed}.json"


def learning_rate(args: argparse.Namespace, task_name: str, method: str, installed: Method) -> float:
    """The best rate by validation loss at `SEARCH_BUDGET` after a short run of a copy of the installed method.

    The loss is measured without calibration, each batch having the thresholds that obtain the budget on it.

    Searched once for a task and a method, by the first seed that comes.
    """
    losses = known_losses(args, task_name, method)
    task, _, teacher = _task_and_dense(args, task_name)
    while (rate := next_rate(losses)) is not None:
        instance = copy.deepcopy(installed)
        steps = max(2, round(SEARCH_SHARE * args.steps))
        finetune(instance, teacher, task, steps=steps, batch_size=args.batch_size, rate=rate, seed=0)
        at = 1.0 if method == "dense" else SEARCH_BUDGET
        loss = evaluate(instance, task, "validation", at, limit=256, calibrated=False)["loss"]
        losses[rate] = math.inf if math.isnan(loss) else loss
        text = json.dumps({f"{each:g}": losses[each] for each in sorted(losses)}, indent=2)
        write_whole(search_path(args, task_name, method), text.encode())
    return min(losses, key=losses.get)


def known_losses(args: argparse.Namespace, task: str, method: str) -> dict[float, float]:
    """Learning rate -> validation loss, as far as the search has come."""
    path = search_path(args, task, method)
    return {float(rate): loss for rate, loss in json.loads(path.read_text()).items()} if path.exists() else {}


def next_rate(losses: dict[float, float]) -> float | None:
    """The learning rate to try after those whose losses are known; None if the search is over."""
    if not losses:
        return FIRST_RATE
    best = min(losses, key=losses.get)
    if best == min(losses) and best > RATE_LIMITS[0]:
        return best / 2.0
    if best == max(losses) and best < RATE_LIMITS[1]:
        return best * 2.0
    return None


def run_cell(args: argparse.Namespace, task_name: str, method: str, seed: int) -> None:
    """One method on one task with one seed: without and with fine-tuning, at all budgets."""
    started = time.monotonic()
    task, dense, teacher = _task_and_dense(args, task_name)
    tokenizer = load_tokenizer()
    one = METHODS[method].one_checkpoint
    partitions = args.out / "partitions" / f"{task_name}.{args.expert_width}.{seed}"
    settings = Settings(args.expert_width, args.router_rank, BUDGETS, seed, partitions)
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
                finetune(instance, teacher, task, steps=args.steps, batch_size=args.batch_size, rate=rate, seed=seed)
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


@dataclasses.dataclass(frozen=True)
class Job:
    """The training of a dense model, or with a method and a seed a cell."""

    task: str
    method: str | None = None
    seed: int = 0

    def __str__(self) -> str:
        return f"dense {self.task}" if self.method is None else f"{self.task} {self.method} seed {self.seed}"

    def run(self, args: argparse.Namespace) -> None:
        if self.method is None:
            make_dense(args, self.task)
        else:
            run_cell(args, self.task, self.method, self.seed)

    def is_done(self, args: argparse.Namespace) -> bool:
        if self.method is None:
            return (dense_path(args, self.task) / "config.json").exists()
        return cell_path(args, self.task, self.method, self.seed).exists()


def _gpus(args: argparse.Namespace) -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    if args.device != "cuda":
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def _serve(connection: Connection, args: argparse.Namespace, gpu: str | None) -> None:
    """A worker process: runs the jobs that come, answers None, and ends with the first error, which it answers with."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA has not been initialised here yet
    _quiet()
    fuse_norms()
    while (job := connection.recv()) is not None:
        try:
            job.run(args)
            connection.send(None)
        except Exception as error:  # one method's failure leaves the others' results
            traceback.print_exc()
            connection.send(f"{type(error).__name__}: {error}")
            return  # after an error of CUDA nothing works in this process
        torch.cuda.empty_cache()  # other processes share the GPU


class Worker:
    """A process that runs one job at a time, and is started anew after a job that failed."""

    def __init__(self, args: argparse.Namespace, gpu: str | None) -> None:
        self.args, self.gpu = args, gpu
        self.job: Job | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.args, self.gpu), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, job: Job) -> None:
        self.job = job
        self.connection.send(job)

    def finish(self) -> str | None:
        """The error of the job that has ended."""
        try:
            error = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            error = f"the process ended with exit code {self.process.exitcode}"
        if error is not None:
            self.process.join()
            self._start()
        self.job = None
        return error

    def stop(self) -> None:
        if self.job is None:
            self.connection.send(None)
        else:
            self.process.terminate()
        self.process.join()


def all_jobs(args: argparse.Namespace) -> list[Job]:
    """What is to be computed, in the order in which it is begun.

    All methods of the first seed come before the second; the bounds of further seeds come last. Within a seed one
    method comes after another: first what all are compared with, then what takes longest. So what runs at a time is of
    several tasks: those that keep a GPU busy share it with those that wait for the host.
    """
    dense = sorted((Job(name) for name in args.tasks), key=lambda job: _LONGEST.get(job.task, 9))
    cells = [Job(name, method, seed) for seed in args.seeds for method in args.methods for name in args.tasks]
    first = args.seeds[0]

    def rank(job: Job) -> tuple:
        further_bound = job.method in BOUNDS and job.seed != first
        first_method = _FIRST.get(job.method, 9), job.method
        return further_bound, job.seed, *first_method, _LONGEST.get(job.task, 9), job.task

    cells.sort(key=rank)
    jobs = [*dense, *(cells if args.stage != "dense" else [])]
    return [job for job in jobs if not job.is_done(args)]


def _seconds_before(args: argparse.Namespace, job: Job) -> float:
    """How long a cell like `job` with another seed took; 0 if there is none."""
    paths = [cell_path(args, job.task, job.method, seed) for seed in args.seeds]
    return max((json.loads(path.read_text())["seconds"] for path in paths if path.exists()), default=0.0)


def run_jobs(args: argparse.Namespace) -> None:
    """Runs all jobs, as many at a time as `--jobs` says, until none is left or the time is up.

    At the time limit what is running is stopped; a cell that would not end in time, judging by how long it took with
    another seed, does not begin. A job that fails is tried once more.
    """
    started = gathered = time.monotonic()
    limit = math.inf if args.time_limit is None else args.time_limit
    gpus = _gpus(args) or [None]
    pending = all_jobs(args)
    workers = [Worker(args, gpus[i % len(gpus)]) for i in range(min(args.jobs, max(1, len(pending))))]
    first, failures, skipped = args.seeds[0], [], []
    took: dict[tuple[str, str], float] = {}
    begun: dict[Job, float] = {}
    attempts: collections.Counter[Job] = collections.Counter()

    def is_ready(job: Job, gpu: str | None) -> bool:
        if job.method is None:
            return True
        running = [worker.job for worker in workers if worker.job is not None]
        beside = [worker.job for worker in workers if worker.job is not None and worker.gpu == gpu]
        cells = sum(other.method is not None for other in beside)
        if not Job(job.task).is_done(args) or len(beside) > cells >= _BESIDE_DENSE:
            return False
        # The first seed searches for the learning rate.
        searched = next_rate(known_losses(args, job.task, job.method)) is None
        return job.seed == first or searched or Job(job.task, job.method, first) not in [*pending, *running]

    try:
        while True:
            now = time.monotonic() - started
            for worker in workers:
                while worker.job is None:
                    job = next((job for job in pending if is_ready(job, worker.gpu)), None)
                    if job is None:
                        break
                    pending.remove(job)
                    if job.method is not None:
                        expected = took.get((job.task, job.method)) or _seconds_before(args, job)
                        if now + expected > limit:
                            skipped.append(job)
                            continue
                    worker.begin(job)
                    attempts[job] += 1
                    begun[job] = now
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                break
            for connection in wait([worker.connection for worker in busy], timeout=max(0.0, min(5.0, limit - now))):
                worker = next(worker for worker in busy if worker.connection is connection)
                job = worker.job
                error = worker.finish()
                now = time.monotonic() - started
                if error is not None:
                    print(f"failed: {job}: {error}", flush=True)
                    if attempts[job] < _ATTEMPTS:
                        pending.insert(0, job)
                    else:
                        failures.append(f"{job}: {error}")
                elif job.method is not None:
                    took[job.task, job.method] = now - begun[job]
            if now >= limit:
                break
            if time.monotonic() - gathered > _GATHER_SECONDS and args.stage != "dense":
                gather(args, preset=0)
                gathered = time.monotonic()
    finally:
        stopped = [worker.job for worker in workers if worker.job is not None]
        for worker in workers:
            worker.stop()
    unfinished = [*stopped, *skipped, *pending]
    if unfinished:
        print(f"not finished: {', '.join(map(str, unfinished))}", flush=True)
    if args.stage != "dense":
        gather(args)
    if failures:
        raise SystemExit("failed: " + "; ".join(failures))


@functools.cache
def describe_task(path: Path) -> dict:
    task = torch.load(path, weights_only=False)
    return {
        "family": task.family,
        "metric": task.metric,
        "examples": {split: task.count(split) for split in task.splits},
        "sha256": task.fingerprint(),
        "sizes": task.sizes,
        "references": task.references,
    }


def gather(args: argparse.Namespace, preset: int = 6) -> None:
    """All cells, and what they were measured on, in one file; `preset` is the effort of its compression, 0 to 9."""
    cells = [json.loads(path.read_text()) for path in sorted((args.out / "cells").glob("*.json"))]
    paths = {name: args.out / "data" / f"{name}.pt" for name in (*TASKS, *HUB_TASKS)}
    tasks = {name: describe_task(path) for name, path in paths.items() if path.exists()}
    import transformers

    if args.device.startswith("cuda"):
        where = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    else:
        where = platform.processor() or "CPU"
    data = {
        "command": " ".join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
        "settings": {
            name: getattr(args, name)
            for name in ("size", "steps", "batch_size", "expert_width", "router_rank", "jobs", "time_limit")
        },
        "asked": {"tasks": args.tasks, "methods": args.methods, "seeds": args.seeds},
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
    write_whole(args.out / "cells.json.xz", lzma.compress(json.dumps(data).encode(), preset=preset))


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
    parser.add_argument("--steps", type=int, default=400, help="of fine-tuning")
    parser.add_argument("--batch-size", type=int, default=24, help="examples of a step")
    parser.add_argument("--expert-width", type=int, default=1, help="neurons of an expert")
    parser.add_argument("--router-rank", type=int, help="of PrunePath's routers; 0 is full rank")
    parser.add_argument("--time-limit", type=float, help="seconds after which what is running is stopped")
    args = parser.parse_args()
    for kind, chosen, known in (("task", args.tasks, (*TASKS, *HUB_TASKS)), ("method", args.methods, METHODS)):
        for name in chosen:
            if name not in known:
                parser.error(f"expected --{kind}s among {', '.join(known)}, got {name}.")
    if args.stage in ("data", "dense", "cells", "all"):
        prepare_data(args)
    if args.stage in ("dense", "cells", "all"):
        run_jobs(args)
    if args.stage in ("report", "all"):
        write_report(args.out / "cells.json.xz", ROOT / "docs")


if __name__ == "__main__":
    main()
