"""Quality of sparse forms of a real model: PrunePath beside other methods, in what a user pays.

    python benchmarks/quality.py --model DIR --data DATA --out DIR                     # all methods, tasks and seeds
    python benchmarks/quality.py --model DIR --data DATA --out DIR --methods teal --tasks wikitext --no-training
    python benchmarks/quality.py --model DIR --data DATA --out DIR --small             # 10 minutes on two cores

Every finished cell, one method with one seed before or after training, is a JSON file under --out, and is not computed
again. Several processes with one --out share the work, each with its GPU by CUDA_VISIBLE_DEVICES: a small model alone
keeps no large GPU busy. docs/quality.md says what is measured; the report writes `quality.csv`, `quality.json`,
`quality.md` and a plot.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import json
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Behind the installed packages: an installed prunepath comes first, else the source tree with libraries built there.
sys.path += [str(path) for path in (ROOT, ROOT / "benchmarks") if str(path) not in sys.path]

import torch  # noqa: E402
from baselines import METHODS, Settings  # noqa: E402
from common import choices, fractions, processor, today, whole_numbers  # noqa: E402
from mixture import Mixture  # noqa: E402
from quality_report import write_report  # noqa: E402
from tasks import TASKS  # noqa: E402
from torch import nn  # noqa: E402
from training import finetune, make_heads  # noqa: E402

from prunepath.errors import PrunePathError  # noqa: E402
from prunepath.eval.files import write_json  # noqa: E402

BUDGETS = (0.75, 0.5, 0.25, 0.1)
LEARNING_RATE = 2e-4
INSTALL_TOKENS = 65536
CALIBRATION_TOKENS = 32768
SETTINGS = (
    *("model", "tasks", "budgets", "tokens", "tokens_per_step", "rate", "expert_width", "router_rank", "limit"),
    *("head_examples", "install_tokens", "calibration_tokens"),
)
"""What all cells of a folder share."""
UNKEPT = ("predictions", "log_likelihoods", "sizes")
"""What tasks find for each example, but for its score."""
SMALL = {"tokens": 0, "limit": 4, "tasks": ["wikitext", "gsm8k", "piqa"], "budgets": [0.5, 0.25], "seeds": [0]}
SMALL_METHODS = ["dense", "static-wanda", "cats", "prunepath", "oracle-topmass"]


class Run:
    """What all cells share: the model, the tasks, the data they train on, and the folder of results."""

    def __init__(self, args: argparse.Namespace) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.args = args
        self.started = time.monotonic()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        self.tokenizer.model_max_length = 10**9  # sequences are cut here
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.dense = load(args.model, dtype=torch.float32).to(args.device).eval()
        cuda = args.device.startswith("cuda")
        torch.set_float32_matmul_precision("high" if cuda else "highest")  # of routers and heads; the rest is bfloat16
        self.teacher = copy.deepcopy(self.dense).to(torch.bfloat16) if cuda else self.dense
        self.tasks = {name: TASKS[name](args.data, self.tokenizer, limit=args.limit) for name in args.tasks}
        # A shorter list of tasks changes what is measured, not what is trained on.
        trained_on = {name: self.tasks.get(name) or TASKS[name](args.data, self.tokenizer) for name in TASKS}
        fill = self.tokenizer.eos_token_id or 0
        examples = {name: task.training_examples() for name, task in trained_on.items()}
        self.training = Mixture(examples, fill)
        self.validation = Mixture({name: task.validation_examples() for name, task in trained_on.items()}, fill)
        headed = trained_on if args.tokens else self.tasks
        classes = {name: task.num_classes for name, task in headed.items() if task.num_classes}
        self.heads = make_heads(self.teacher, classes, {n: examples[n][: args.head_examples] for n in classes}, seed=0)
        self.say(f"{sum(p.numel() for p in self.dense.parameters()) / 1e6:.1f} M parameters, {len(self.tasks)} tasks")

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.started:6.0f} s  {line}", flush=True)

    def plain(self, mixture: Mixture, tokens: int, seed: int) -> list[dict]:
        """Batches of plain rows with so many tokens in all, two or more: PrunePath tries on one what others gave it."""
        rows = max(1, min(self.args.tokens_per_step, tokens // 2) // 512)
        batches = mixture.plain_batches(max(2, tokens // (512 * rows)), rows, seed)
        return [{name: values.to(self.args.device) for name, values in batch.items()} for batch in batches]

    def cell_path(self, method: str, seed: int, budget: float | None, trained: bool) -> Path:
        name = f"{method}{'' if budget is None else f'-{budget:g}'}.{'trained' if trained else 'plain'}.{seed}.json"
        return self.args.out / "cells" / name

    def run_method(self, name: str, seed: int) -> None:
        """A method without and with training; what is known is not computed again."""
        method_type = METHODS[name]
        budgets = (1.0,) if name == "dense" else tuple(self.args.budgets)
        # Where a checkpoint is for one budget, each is made by itself.
        groups = [(None, budgets)] if method_type.one_checkpoint else [(b, (b,)) for b in budgets]
        for budget, evaluated in groups:
            paths = {trained: self.cell_path(name, seed, budget, trained) for trained in self._stages(name)}
            wanted = [trained for trained, path in paths.items() if not path.exists()]
            if not wanted:
                continue
            if self._is_late():
                self.say(f"no time for {name} seed {seed}")
                return
            with _claiming(paths[wanted[0]]) as is_ours:
                if is_ours:
                    self._run_cells(name, seed, budget, evaluated, {trained: paths[trained] for trained in wanted})

    def _run_cells(
        self, name: str, seed: int, budget: float | None, evaluated: tuple[float, ...], paths: dict[bool, Path]
    ) -> None:
        """The cells of one checkpoint, by whether it is trained: installs it, and writes them."""
        method_type = METHODS[name]
        began = time.monotonic()
        partitions = self.args.out / "partitions" / str(seed)
        settings = Settings(self.args.expert_width, self.args.router_rank, tuple(self.args.budgets), seed, partitions)
        method = method_type(copy.deepcopy(self.dense), settings, budget)
        method.install(self.plain(self.training, self.args.install_tokens, seed))
        heads = copy.deepcopy(self.heads)
        self.say(f"{name} seed {seed}{'' if budget is None else f' at {budget:g}'}: installed")
        for trained, path in paths.items():
            cell = {"method": name, "seed": seed, "trained": trained, "one_checkpoint": method_type.one_checkpoint}
            cell["tokens"] = self.args.tokens if trained else 0
            if trained:
                cell |= self._train(method, heads, seed)
            method.calibrate(self.plain(self.validation, self.args.calibration_tokens, seed))
            at = evaluated if name == "dense" or budget is not None else (1.0, *evaluated)
            cell["results"] = [self._evaluate(method, heads, b) for b in at]
            cell["seconds"] = time.monotonic() - began
            write_json(path, cell)

    def _stages(self, name: str) -> list[bool]:
        bound = name.startswith("oracle")
        return [False] if bound or not self.args.tokens else [False, True] if self.args.untrained else [True]

    def _is_late(self) -> bool:
        return self.args.time_limit is not None and time.monotonic() - self.started > self.args.time_limit

    def _train(self, method, heads: nn.ModuleDict, seed: int) -> dict:
        rows = max(1, self.args.tokens_per_step // 512)
        steps = max(1, self.args.tokens // (rows * 512))
        began = time.monotonic()
        batches = self.training.batches(rows, seed)
        losses = finetune(method, heads, self.teacher, batches, steps=steps, rate=self.args.rate, seed=seed)
        seconds = time.monotonic() - began
        speed = steps * rows * 512 / seconds
        self.say(f"  trained {steps} steps in {seconds:.0f} s, {speed / 1000:.0f} k tokens/s, loss {losses[-1]:.3f}")
        return {"training_seconds": seconds, "tokens_per_second": speed, "losses": losses[:: max(1, steps // 50)]}

    @torch.no_grad()
    def _evaluate(self, method, heads: nn.ModuleDict, budget: float) -> dict:
        method.model.eval()
        method.set_budget(budget)
        cuda = self.args.device.startswith("cuda")
        found = {}
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            for name, task in self.tasks.items():
                result = task.evaluate(method.model, heads)
                found[name] = {key: value for key, value in result.items() if key not in UNKEPT}
                found[name]["scores"] = [float(f"{score:.4g}") for score in result["scores"]]
        active, read = method.active_fraction(), method.bytes_read()
        values = ", ".join(f"{name} {result['value']:.4f}" for name, result in found.items())
        self.say(f"  budget {budget:g}: active {active:.3f}, bytes {read:.3f}, {values}")
        return {"budget": budget, "active": active, "bytes": read, "per_layer": method.per_layer(), "tasks": found}


@contextlib.contextmanager
def _claiming(cell: Path) -> Iterator[bool]:
    """Keeps other processes from computing a cell while the `with` block does; False if one of them does already."""
    with cell.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield not cell.exists()
        finally:
            Path(lock.name).unlink(missing_ok=True)


def check_settings(args: argparse.Namespace) -> None:
    """Keeps in the folder what its cells share, or compares with what is there.

    Raises:
        PrunePathError: if the folder's cells have other settings.
    """
    asked = {name: getattr(args, name) for name in SETTINGS} | {"model": args.model.resolve().name}
    (args.out / "cells").mkdir(parents=True, exist_ok=True)
    path = args.out / "settings.json"
    known = json.loads(path.read_text()) if path.exists() else asked
    for name, value in known.items():
        if asked[name] != value and (name != "tokens" or (value and asked[name])):
            raise PrunePathError(
                f"Expected {name} {value}, as the other results in {args.out} have, got {asked[name]}."
            )
    write_json(path, asked | {"tokens": known["tokens"] or asked["tokens"]})


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a dense causal model, as transformers saves it")
    parser.add_argument("--data", type=Path, required=True, help="folder of the public sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is written")
    parser.add_argument("--stage", choices=("cells", "report", "all"), default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tasks", type=choices(TASKS), default=list(TASKS))
    parser.add_argument("--methods", type=choices(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=whole_numbers, default=[0, 1, 2])
    parser.add_argument("--budgets", type=fractions, default=list(BUDGETS))
    parser.add_argument("--tokens", type=int, default=8_192_000, help="of training; 0 for none")
    parser.add_argument("--tokens-per-step", type=int, default=16384)
    parser.add_argument("--rate", type=float, default=LEARNING_RATE, help="peak learning rate")
    parser.add_argument("--no-training", dest="tokens", action="store_const", const=0)
    parser.add_argument(
        "--only-trained", dest="untrained", action="store_false", help="leave out results before training"
    )
    parser.add_argument(
        "--expert-width", type=int, default=1, help="neurons of an expert, for methods without a choice"
    )
    parser.add_argument("--router-rank", type=int, help="of PrunePath's routers; 0 is full rank")
    parser.add_argument("--limit", type=int, help="at most so many test examples of each task")
    parser.add_argument("--head-examples", type=int, default=8192, help="of each classification set, for its head")
    parser.add_argument("--install-tokens", type=int, default=INSTALL_TOKENS)
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    parser.add_argument(
        "--small", action="store_true", help="tries all of it: too little data for routers, no training"
    )
    parser.add_argument("--time-limit", type=float, help="seconds after which no method begins")
    args = parser.parse_args(argv)
    if args.small:
        for name, value in SMALL.items():
            setattr(args, name, value)
        args.methods = SMALL_METHODS
        args.install_tokens, args.calibration_tokens, args.tokens_per_step = 4096, 1024, 4096
    return args


def main() -> None:
    args = parse_arguments()
    failures = measure(args) if args.stage != "report" else []
    if args.stage != "cells":
        write_report(args.out)
    if failures:
        raise SystemExit("failed: " + "; ".join(failures))


def measure(args: argparse.Namespace) -> list[str]:
    """Computes all cells that are not there yet; says what failed."""
    check_settings(args)
    run = Run(args)
    failures = []
    for seed in args.seeds:
        for name in args.methods:
            try:
                run.run_method(name, seed)
            except Exception as error:  # one method's failure leaves the others' results
                traceback.print_exc()
                failures.append(f"{name} seed {seed}: {type(error).__name__}: {error}")
    cuda = args.device.startswith("cuda")
    folders = {str(args.model): "DIR", str(args.data): "DATA", str(args.out): "OUT"}
    about = {
        "command": " ".join(["python", "benchmarks/quality.py", *(folders.get(a, a) for a in sys.argv[1:])]),
        "machine": torch.cuda.get_device_name() if cuda else processor(),
        "date": today(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    write_json(args.out / "about.json", about)
    return failures


if __name__ == "__main__":
    main()
