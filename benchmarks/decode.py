"""Times decoding end to end, dense beside sparse, with random-weight models of real shapes at chosen active fractions.

    python benchmarks/decode.py --device cpu --model qwen2.5-1.5b
    python benchmarks/decode.py --device cuda --model llama-3-8b --active 0.1,0.25,0.5,1 --json decode.json

Every model has a process of its own, so that its peak memory can be read from outside, and the dense and the sparse
one take turns, so that a busy machine slows both alike. The weights are drawn at random, the same for all, and so are a
prompt and the tokens that are fed after it, whatever the logits say: all models do the same work, and a random model's
habit of repeating one token does not make every token choose the same experts.

Active fraction: the routers are random, so each FFN's threshold is the quantile of the probability mass before an
expert, over all experts and all the tokens that will be fed, that makes just that share of them active. One pass over
the text sets them FFN by FFN, each with the thresholds of those before it in force; decoding then meets the same
inputs. A token takes as many experts as its own probabilities ask for; the mean obtained and the least and most of a
token are printed, and nothing is timed if the mean is more than a point off. "read" is the bytes of FFN weights that a
token reads, the routers' included, as a share of the dense model's. The sparse model's logits at threshold 1 have to be
the dense model's first.

Settings, for the dense model and for the sparse one alike (the sparse FFNs are `routed_ffn` in all of them):

    eager      generate with a dynamic cache
    prepacked  the same, every linear but those of sparse FFNs a oneDNN one with its weights packed beforehand (CPU)
    compiled   generate with a static cache and torch.compile: on a CPU with the linears of `prepacked` (inductor's own
               freezing, which packs them too, breaks static caches); on a GPU in the mode reduce-overhead, which makes
               CUDA graphs
    graph      our own decode loop under one CUDA graph (GPU)
    compiled-graph  the same, its step compiled (GPU)

Speed is of the tokens after the first, so that the prompt is not in it. "vs dense" is against the dense model's best
setting. Memory is the process's largest resident set while it decoded; on a GPU, what torch had allocated at most.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import multiprocessing
import statistics
import time
import warnings
import zlib
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from common import fractions, machine, seconds, today
from rich.console import Console
from rich.table import Table
from torch import nn

import prunepath
from prunepath import native
from prunepath.checkpoint.description import SparseDescription, describe, install, path_in_backbone
from prunepath.conversion.streaming import return_freed_memory
from prunepath.eval.decode import with_cache
from prunepath.eval.files import write_json
from prunepath.nn.observers import CountRecord, observing_counts, observing_inputs
from prunepath.ops import reference

QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
MODELS = {
    "qwen2.5-0.5b": {
        **QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "qwen2.5-1.5b": {
        **QWEN,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "tie_word_embeddings": False,
    },
}
DEFAULT_MODELS = {"cpu": ["qwen2.5-0.5b", "qwen2.5-1.5b"], "cuda": ["qwen2.5-1.5b", "llama-3-8b"]}
SETTINGS = {
    "cpu": ["eager", "prepacked", "compiled"],
    "cuda": ["compiled", "graph", "compiled-graph"],
}
# Largest relative error of a step's logits at threshold 1: rounding in the order of sums, through all layers.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
WEIGHT_STD = 0.02
ROUTER_LOGIT_STD = 2.0


def build(
    name: str, layers: int | None, dtype: torch.dtype, device: torch.device, sparsity: prunepath.PrunePathConfig | None
) -> nn.Module:
    """A model made on the meta device whose weights are drawn on `device`; sparse if `sparsity` is given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    entries = dict(MODELS[name], max_position_embeddings=32768)
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    config.num_hidden_layers = layers or config.num_hidden_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if sparsity is not None:
        paths = [path_in_backbone(model, path) for path in install(model, sparsity)]
        describe(model, SparseDescription(sparsity, paths, [1.0] * len(paths)))
        prunepath.for_training(model)  # whose routers' tables are numbers, as are drawn here
    model.to_empty(device=device)
    model.tie_weights()
    with torch.device(device):  # its buffers are in no checkpoint, and empty now
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    for name, parameter in model.named_parameters():
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        with torch.no_grad():
            if ".router.w_" in name:  # unit inputs give logits of ROUTER_LOGIT_STD, by one matrix or by two
                std = 1.0 if name.endswith("w_in") else ROUTER_LOGIT_STD
                parameter.normal_(0, std * parameter.shape[1] ** -0.5, generator=generator)
            elif parameter.dim() > 1:
                parameter.normal_(0, WEIGHT_STD, generator=generator)
            else:
                parameter.fill_(float(name.endswith(("norm.weight", "router.floor"))))
    if sparsity is not None:
        for ffn in prunepath.sparse_ffns(model).values():
            ffn.router.fit_scales()
        prunepath.for_inference(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def set_active(model: nn.Module, ids: torch.Tensor, first: int, fraction: float) -> None:
    """Sets each FFN's threshold so that of the tokens of `ids` from `first` on this share of the experts is active."""
    if fraction == 1.0:
        prunepath.set_threshold(model, 1.0)
        return

    def choose(ffn: prunepath.SparseFFN, x: torch.Tensor) -> None:
        before = reference.mass_before(ffn.router(x[first:])).flatten().sort().values
        active = min(max(1, round(fraction * len(before))), len(before) - 1)
        ffn.threshold = min(1.0, before[active - 1 : active + 1].mean().item())

    with observing_inputs(dict.fromkeys(prunepath.sparse_ffns(model).values(), choose)), torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    prunepath.set_threshold(model, prunepath.get_thresholds(model))


# Inductor cannot take oneDNN's layout as an input, so that the packed weights are known to the operator by number.
_packed: list[tuple[torch.Tensor, torch.Tensor | None]] = []
_library = torch.library.Library("prunepath_benchmark", "DEF")
_library.define("linear(Tensor x, int index, int out_features) -> Tensor")
_library.impl(
    "linear",
    lambda x, index, _: torch.ops.mkldnn._linear_pointwise.default(x, *_packed[index], "none", [], ""),
    "CPU",
)
torch.library.register_fake(
    "prunepath_benchmark::linear", lambda x, _, out_features: x.new_empty((*x.shape[:-1], out_features)), lib=_library
)


class PrepackedLinear(nn.Module):
    """A linear layer by oneDNN, with its weight in oneDNN's own layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.index, self.out_features = len(_packed), linear.out_features
        _packed.append((torch.ops.mkldnn._reorder_linear_weight.default(linear.weight.detach(), 1), linear.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.prunepath_benchmark.linear.default(x, self.index, self.out_features)


def prepack(model: nn.Module) -> None:
    for parent in list(model.modules()):
        if not isinstance(parent, prunepath.SparseFFN):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    setattr(parent, name, PrepackedLinear(child))


class Script:
    """A logits processor that makes `generate` choose given tokens, and notes when each was asked for."""

    def __init__(self, tokens: torch.Tensor, vocab_size: int) -> None:
        self.tokens = tokens.tolist()
        self.scores = torch.zeros(1, vocab_size, device=tokens.device)
        self.times: list[float] = []
        self.logits: list[torch.Tensor] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if self.logits is not None:
            self.logits.append(scores[0].float().cpu())
        step = len(self.times) - 1
        self.scores[0, self.tokens[step - 1]] = 0.0
        self.scores[0, self.tokens[step]] = 1.0
        return self.scores


class Worker:
    """A model in a process of its own, and what the parent asks of it."""

    def __init__(self, spec: dict) -> None:
        self.device, self.setting = torch.device(spec["device"]), spec["setting"]
        torch.set_num_threads(spec["threads"])
        self.model = build(spec["model"], spec["layers"], getattr(torch, spec["dtype"]), self.device, spec["sparsity"])
        generator = torch.Generator().manual_seed(spec["seed"])
        size = (1, spec["prompt"] + spec["tokens"])
        ids = torch.randint(0, self.model.config.vocab_size, size, generator=generator).to(self.device)
        self.ids, self.prompt, self.script = ids, ids[:, : spec["prompt"]], ids[0, spec["prompt"] :]
        self.vocab_size = self.model.config.vocab_size
        if self.device.type == "cpu" and self.setting != "eager":
            prepack(self.model)
        self.options: dict = {}
        if self.setting == "compiled":
            from transformers import CompileConfig

            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.options = {
                "cache_implementation": "static",
                "compile_config": CompileConfig(fullgraph=True, mode=mode),
            }
            self.options["compile_config"]._compile_all_devices = True
        self.loop = None
        if "graph" in self.setting:
            from prunepath.eval.decode import DecodeLoop

            self.loop = DecodeLoop(self.model, 1, ids.shape[1], compiled=self.setting == "compiled-graph")

    def activate(self, fraction: float) -> dict:
        """Sets the active fraction, and counts what decoding the script makes of it."""
        set_active(self.model, self.ids[:, :-1], self.prompt.shape[1], fraction)
        ffns = list(prunepath.sparse_ffns(self.model).values())
        calls = {ffn: [] for ffn in ffns}
        with observing_counts(ffns, lambda ffn, counts: calls[ffn].append(counts)), torch.inference_mode():
            cached = with_cache(self.model)
            for part in (self.prompt, *self.script[:-1].view(-1, 1, 1)):
                self.model(input_ids=part, **cached)
        counts = {ffn: torch.cat(parts)[self.prompt.shape[1] :] for ffn, parts in calls.items()}
        record = CountRecord(ffns)
        for ffn in ffns:
            record.add(ffn, counts[ffn])
        share = torch.stack(list(counts.values())).float().mean(0) / ffns[0].num_experts  # of each token
        found = {"active": share.mean(), "least": share.min(), "most": share.max()}
        return {name: value.item() for name, value in found.items()} | {"read": record.read_fraction}

    def run(self, keep_logits: bool = False) -> tuple[float, torch.Tensor | None]:
        """Seconds for a token after the first, and the logits [tokens, vocabulary]."""
        if self.loop is not None:
            return self.run_loop(keep_logits)
        from transformers import LogitsProcessorList

        script = Script(self.script, self.vocab_size)
        script.logits = [] if keep_logits else None
        self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            max_new_tokens=len(self.script),
            do_sample=False,
            logits_processor=LogitsProcessorList([script]),
            **self.options,
        )
        spent = (script.times[-1] - script.times[0]) / (len(script.times) - 1)
        return spent, torch.stack(script.logits) if keep_logits else None

    def run_loop(self, keep_logits: bool) -> tuple[float, torch.Tensor | None]:
        self.loop.start(self.prompt)
        logits = [self.loop.logits[0].float().cpu()] if keep_logits else None
        feeds = list(self.script[:-1].view(-1, 1, 1))
        torch.cuda.synchronize()

        def steps() -> None:
            for feed in feeds:
                self.loop.step(feed)
                if keep_logits:
                    logits.append(self.loop.logits[0].float().cpu())
            torch.cuda.synchronize()

        spent = seconds(steps) / len(feeds)
        return spent, torch.stack(logits) if keep_logits else None

    def settle(self) -> None:
        """Gives memory back that loading and calibration have freed, so that it does not count as the model's."""
        return_freed_memory()

    def gpu_peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


def serve(connection: Connection, spec: dict) -> None:
    """The child's main: answers (method, arguments) with what it returns, or with the error's text."""
    warnings.filterwarnings("ignore")
    worker = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            if method == "start":
                worker = Worker(spec)
                connection.send((True, None))
            else:
                connection.send((True, getattr(worker, method)(*arguments)))
        except Exception as error:  # whatever it is, the others go on
            connection.send((False, f"{type(error).__name__}: {error}".strip().splitlines()[0]))


class Child:
    """The parent's side of a worker."""

    def __init__(self, kind: str, spec: dict) -> None:
        context = multiprocessing.get_context("spawn")
        self.kind, self.setting, self.spec = kind, spec["setting"], spec
        self.failure: str | None = None
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, spec), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, *arguments):
        """The worker's answer; None once it has failed."""
        self.send(method, *arguments)
        return self.receive()

    def send(self, method: str, *arguments) -> None:
        if self.failure is None:
            self.connection.send((method, arguments))

    def receive(self):
        if self.failure is not None:
            return None
        try:
            good, answer = self.connection.recv()
        except (EOFError, ConnectionError):
            good, answer = False, "the process died, out of memory perhaps"
        if not good:
            self.failure = answer
            self.close()
            return None
        return answer

    def forget_peak(self) -> None:
        """Makes the kernel's high-water mark of the resident set start from now."""
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def peak_bytes(self) -> int | None:
        if self.spec["device"] == "cuda":
            return self.ask("gpu_peak")
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return None

    def close(self) -> None:
        self.connection.close()
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()


def bench(name: str, args: argparse.Namespace, console: Console) -> list[dict]:
    """A row for each model, setting and active fraction. Two processes live at a time."""
    rows, expected = [], None
    for setting in args.settings:
        spec = {
            "device": args.device,
            "model": name,
            "layers": args.layers,
            "dtype": args.dtype,
            "threads": args.threads,
            "prompt": args.prompt,
            "tokens": args.tokens,
            "seed": args.seed,
            "setting": setting,
        }
        sparsity = prunepath.PrunePathConfig(expert_width=args.expert_width, router_rank=args.router_rank)
        children = [Child("dense", {**spec, "sparsity": None}), Child("sparse", {**spec, "sparsity": sparsity})]
        try:
            expected = check(name, args, children, expected)
            rows.extend(measure(name, args, children))
        finally:
            for child in children:
                if child.failure is None:
                    child.close()
    for fraction in args.active:
        group = [row for row in rows if row["asked"] == fraction]
        times = [row["ms_per_token"] for row in group if row["kind"] == "dense" and row["ms_per_token"]]
        for row in group:
            spent = row["ms_per_token"]
            row["speedup_over_best_dense"] = min(times) / spent if times and spent else None
        show(group, console)
    return rows


def check(name: str, args: argparse.Namespace, children: list[Child], expected: torch.Tensor | None) -> torch.Tensor:
    """Starts the models and compares their logits with `expected`, or with those of the first dense one."""
    for child in children:
        child.send("start")
    for child in children:
        child.receive()
    for child in children:
        if child.kind == "sparse":
            child.ask("activate", 1.0)
        answer = child.ask("run", True)
        if answer is None:
            continue
        logits = answer[1]
        if expected is None:
            if child.kind != "dense":
                raise SystemExit(f"{name}: no dense model ran to check the sparse one by: {children[0].failure}")
            expected = logits
        errors = (logits - expected).norm(dim=1) / expected.norm(dim=1)
        error = math.nan if errors.isnan().any() else errors.max().item()
        if not error <= TOLERANCES[args.dtype]:
            raise SystemExit(
                f"{name}, {child.kind} {child.setting}: expected the dense model's logits within a relative error of "
                f"{TOLERANCES[args.dtype]:g}, got {error:.1e}: nothing is timed."
            )
        child.spec["relative_error"] = error
    return expected


def measure(name: str, args: argparse.Namespace, children: list[Child]) -> list[dict]:
    """A row for each child and active fraction."""
    rows = []
    for fraction in args.active:
        found = {}
        for child in children:
            if child.kind == "sparse" and (answer := child.ask("activate", fraction)) is not None:
                found[child] = answer
                if abs(answer["active"] - fraction) > 0.01:
                    raise SystemExit(
                        f"{name}: expected {fraction:.0%} of the experts to be active, got {answer['active']:.1%}: "
                        "nothing is timed."
                    )
            child.ask("settle")
            child.forget_peak()
        times = {child: [] for child in children}
        for repeat in range(args.repeats + 1):
            for child in children:
                answer = child.ask("run")
                if repeat > 0 and answer is not None:
                    times[child].append(answer[0])
        for child in children:
            spent = statistics.median(times[child]) if times[child] else None
            rows.append(
                {
                    "model": name,
                    "device": args.device,
                    "dtype": args.dtype,
                    "threads": args.threads if args.device == "cpu" else None,
                    "layers": args.layers,
                    "expert_width": args.expert_width,
                    "router_rank": args.router_rank,
                    "prompt": args.prompt,
                    "tokens": args.tokens,
                    "asked": fraction,
                    "kind": child.kind,
                    "setting": child.setting,
                    **found.get(child, dict.fromkeys(("active", "least", "most", "read"))),
                    "ms_per_token": spent and 1e3 * spent,
                    "tokens_per_s": spent and 1 / spent,
                    "peak_bytes": child.peak_bytes() if spent else None,
                    "relative_error": child.spec.get("relative_error"),
                    "skipped": child.failure,
                }
            )
    return rows


def show(rows: list[dict], console: Console) -> None:
    first = rows[0]
    threads = f", threads {first['threads']}" if first["threads"] else ""
    table = Table(
        title=f"{first['model']}, {first['dtype']}{threads}: {first['asked']:.0%} active", title_justify="left"
    )
    for column in (
        "model",
        "setting",
        "active",
        "of a token",
        "read",
        "ms a token",
        "tokens/s",
        "vs dense",
        "peak MB",
        "error",
    ):
        table.add_column(column, justify="left" if column in ("model", "setting") else "right")
    for row in rows:
        if row["skipped"]:
            continue
        sparse = row["active"] is not None
        table.add_row(
            row["kind"],
            row["setting"],
            f"{row['active']:.1%}" if sparse else "100%",
            f"{row['least']:.0%} to {row['most']:.0%}" if sparse else "",
            f"{row['read']:.1%}" if sparse else "100%",
            f"{row['ms_per_token']:.2f}",
            f"{row['tokens_per_s']:.2f}",
            f"{row['speedup_over_best_dense']:.2f}x" if row["speedup_over_best_dense"] else "-",
            f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] else "-",
            f"{row['relative_error']:.0e}",
        )
    console.print(table)
    for row in rows:
        if row["skipped"]:
            console.print(f"{row['kind']} {row['setting']}: skipped: {row['skipped']}", highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--model", type=functools.partial(str.split, sep=","), help=f"comma-separated: {', '.join(MODELS)}"
    )
    parser.add_argument("--active", type=fractions, default=[0.1, 0.25, 0.5, 1.0], help="comma-separated fractions")
    parser.add_argument(
        "--settings",
        type=functools.partial(str.split, sep=","),
        help="comma-separated; all of the device's unless given",
    )
    parser.add_argument("--dtype", choices=list(TOLERANCES), default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=32, help="that are decoded in a run, at least 3")
    parser.add_argument("--prompt", type=int, default=32, help="its length in tokens")
    parser.add_argument("--expert-width", type=int, default=1, help="neurons of an expert")
    parser.add_argument("--router-rank", type=int, help="0 is full rank; the model's default unless given")
    parser.add_argument("--layers", type=int, help="of the model, fewer than it has")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two layers, few tokens: to see that it runs")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    args.model = args.model or DEFAULT_MODELS[args.device]
    args.settings = args.settings or SETTINGS[args.device]
    if args.quick:
        args.layers, args.tokens, args.repeats = 2, 6, 1
    for given, known, option in ((args.model, MODELS, "--model"), (args.settings, SETTINGS[args.device], "--settings")):
        for value in given:
            if value not in known:
                parser.error(f"argument {option}: expected some of {', '.join(known)}, got {value}")
    if args.tokens < 3 or min(args.prompt, args.threads, args.repeats) < 1:
        parser.error("expected at least 3 tokens, and prompt, threads and repeats of at least 1")
    for name in args.model:
        width = MODELS[name]["intermediate_size"]
        if args.expert_width < 1 or width % args.expert_width:
            parser.error(f"argument --expert-width: expected a divisor of {name}'s {width}, got {args.expert_width}")
    if args.router_rank is not None and args.router_rank < 0:
        parser.error(f"argument --router-rank: expected at least 0, got {args.router_rank}")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        parser.error(f"the folder of {args.json} does not exist")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no GPU")
    native.require()

    command = (
        f"python benchmarks/decode.py --device {args.device} --model {','.join(args.model)} "
        f"--active {','.join(f'{f:g}' for f in args.active)} --settings {','.join(args.settings)} --dtype {args.dtype} "
        f"--threads {args.threads} --tokens {args.tokens} --prompt {args.prompt} --expert-width {args.expert_width} "
        f"{'' if args.router_rank is None else f'--router-rank {args.router_rank} '}"
        f"{f'--layers {args.layers} ' if args.layers else ''}--repeats {args.repeats} --seed {args.seed}"
    )
    console = Console(width=max(Console().width, 120))
    console.print(f"$ {command}\n{machine(args.device)}", highlight=False, soft_wrap=True)
    rows = []
    for name in args.model:
        rows.extend(bench(name, args, console))
        if args.json:  # after each model, so that an interruption loses one at most
            write_json(args.json, {"command": command, "machine": machine(args.device), "date": today(), "rows": rows})


if __name__ == "__main__":
    main()
