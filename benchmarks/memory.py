"""Measures what a model takes of memory: dense, sparse, packed and offloaded, side by side.

    python benchmarks/memory.py --dense MODEL --sparse OUT
    python benchmarks/memory.py --convert 10 --open --folder /a/large/disk

Every model has a process of its own, whose memory is read from outside it: its largest resident set in /proc, the
checkpoint file's part of that from its maps, and on a GPU what it has allocated there. The processes are alike up to
the moment when the model is loaded, so that the growth from then on is the model's, and what a call needs.

The sparse models run at the budget, and all of them read the same held-out text token by token with a KV cache. Checked
before anything is printed: the sparse model's logits at threshold 1 are the dense model's, and at the budget those of
the packed and of the offloaded model are the sparse one's on the same device. Bits per byte are of each model at the
budget. Tokens/s are of reading the text a second time.

--convert N makes a synthetic dense checkpoint of N GB in shards, converts it layer by layer as `prunepath convert
--low-memory` does, and reads that process's peak from outside; --open packs the outcome and times opening it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from common import machine, today
from rich.console import Console
from rich.table import Table

import prunepath
from prunepath.checkpoint.loading import INDEX, read_model_config
from prunepath.checkpoint.packing import pack
from prunepath.checkpoint.tensor_file import NewTensor, write_tensor_file
from prunepath.demo.corpus import stdlib_texts
from prunepath.demo.run import model_folder
from prunepath.eval.decode import with_cache
from prunepath.eval.files import write_json
from prunepath.eval.memory import process_memory, report_memory
from prunepath.eval.perplexity import evaluate
from prunepath.families import find_ffns
from prunepath.memory.offload import offload_experts

TOLERANCE = 1e-4
ROUNDED = 5e-2  # kernels and matrix products round half precision differently
ACROSS_DEVICES = 1e-2  # what rounds otherwise may turn a choice of experts
BEGINNING = 1600  # characters of each held-out file, so that a small sample has something of all of them


def held_out() -> list[str]:
    texts = stdlib_texts("held_out")
    return [t[: t.rfind("\n", 0, BEGINNING) + 1] if len(t) > BEGINNING else t for t in texts]


def worker(pipe: Connection, spec: dict) -> None:
    """A process with one model; the parent reads its memory when it says where it is."""
    try:
        _work(pipe, spec)
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})


def _work(pipe: Connection, spec: dict) -> None:
    torch.set_num_threads(spec["threads"])
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pipe.send("ready")
    pipe.recv()
    start = time.perf_counter()
    model, tokenizer = prunepath.load(spec["folder"], dtype=spec["dtype"])
    seconds = time.perf_counter() - start
    device, extra = torch.device("cpu"), {}
    ffn_bytes = sum(weight.numel() * weight.element_size() for weight in ffn_weights(model))
    dense = not prunepath.is_sparse(model)
    if not dense:
        prunepath.set_budget(model, spec["budget"])
    if spec["kind"] == "offloaded":
        device = torch.device("cuda")
        extra["ffn_gpu_bytes"] = offload_experts(model, spec["gpu_experts"], device).gpu_bytes
    if spec["kind"] == "sparse, GPU":
        device = torch.device("cuda")
        model.to(device)
        extra["ffn_gpu_bytes"] = ffn_bytes
    ids = tokenizer("".join(held_out()), return_tensors="pt")["input_ids"][:, : spec["tokens"]].to(device)
    with contextlib.nullcontext() if dense else prunepath.record_counts(model) as record:
        logits = decode(model, ids)
    extra |= {"ffn_bytes": ffn_bytes, "file_bytes": report_memory(model).touched_bytes}
    if device.type == "cuda":
        extra["gpu_bytes"] = torch.cuda.max_memory_allocated()
    path = Path(spec["scratch"]) / f"{spec['kind']}.pt"
    torch.save(logits, path)
    active = 1.0 if dense else record.active_fraction
    pipe.send({"logits": str(path), "active": active, "load_seconds": seconds, **extra})
    pipe.recv()
    start = time.perf_counter()
    decode(model, ids)
    timed = {"tokens_per_second": ids.shape[1] / (time.perf_counter() - start)}
    pipe.send(timed)
    pipe.recv()
    if spec["kind"] == "sparse":
        prunepath.set_threshold(model, 1.0)
        torch.save(decode(model, ids), Path(spec["scratch"]) / "at threshold 1.pt")
        prunepath.set_budget(model, spec["budget"])
    if spec["quality"]:
        result = evaluate(model, tokenizer, held_out(), sequence_length=512, max_tokens=spec["quality"], batch_size=8)
        pipe.send({"bits_per_byte": result.bits_per_byte})
        pipe.recv()


def decode(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits of each token [T, V], read one by one with a KV cache."""
    logits, cached = [], with_cache(model)
    with torch.inference_mode():
        for at in range(ids.shape[1]):
            output = model(input_ids=ids[:, at : at + 1], **cached)
            logits.append(output.logits[0, -1].float().cpu())
    return torch.stack(logits)


def ffn_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    """The weight matrices of a model's FFNs, dense or sparse."""
    ffns = prunepath.sparse_ffns(model).values()
    if ffns:
        return [ffn.projection(name).weight for ffn in ffns for name in ffn.layout.projections]
    owners = [(getattr(site.parent, site.name), site.layout) for site in find_ffns(model)]
    return [owner.get_submodule(name).weight for owner, layout in owners for name in layout.projections]


def measure(spec: dict) -> dict:
    """One model's row. The peak is read before its bits per byte are measured."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=worker, args=(other, spec), daemon=True)
    process.start()
    other.close()
    try:
        pipe.recv()
        before = process_memory(process.pid)[0]
        pipe.send("go")
        row = pipe.recv()
        if "error" in row:
            raise SystemExit(f"{spec['kind']}: {row['error']}")
        resident, peak = process_memory(process.pid)
        row |= {"kind": spec["kind"], "before_bytes": before, "resident_bytes": resident, "peak_bytes": peak}
        pipe.send("go")
        row |= pipe.recv()
        pipe.send("go")
        if spec["quality"]:
            row |= pipe.recv()
            pipe.send("done")
        return row
    finally:
        process.join(timeout=5)
        process.kill()


def check(rows: dict[str, dict], dtype: str) -> None:
    """Stops unless the models' outputs are what they have to be."""
    logits = {kind: torch.load(row["logits"]) for kind, row in rows.items()}
    logits["threshold 1"] = torch.load(Path(rows["sparse"]["logits"]).with_name("at threshold 1.pt"))
    for row in rows.values():
        del row["logits"]

    def error(kind: str, reference: str) -> float:
        return ((logits[kind] - logits[reference]).norm() / logits[reference].norm()).item()

    for kind, reference, tolerance in (
        ("packed", "sparse", TOLERANCE),
        ("sparse, GPU", "sparse", ACROSS_DEVICES),
        ("offloaded", "sparse, GPU", TOLERANCE),
        ("dense", "threshold 1", TOLERANCE if dtype == "float32" else ROUNDED),
    ):
        if kind in logits:
            rows[kind]["relative_error"] = found = error(kind, reference)
            if not found <= tolerance:
                raise SystemExit(f"{kind}: expected {reference}'s logits within {tolerance:g}, got {found:.1e}.")


def show(rows: list[dict], console: Console) -> None:
    table = Table(title="Resident memory, MB", title_justify="left")
    for column in (
        "model",
        "active",
        "FFNs",
        "of them on the GPU",
        "file",
        "grown",
        "peak",
        "GPU",
        "tokens/s",
        "bits/byte",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")

    def megabytes(size: float | None) -> str:
        return "-" if size is None else f"{size / 1e6:.1f}"

    for row in rows:
        bits = row.get("bits_per_byte")
        table.add_row(
            row["kind"],
            f"{row['active']:.1%}",
            megabytes(row["ffn_bytes"]),
            megabytes(row.get("ffn_gpu_bytes")),
            megabytes(row["file_bytes"]),
            megabytes(row["resident_bytes"] - row["before_bytes"]),
            megabytes(row["peak_bytes"]),
            megabytes(row.get("gpu_bytes")),
            f"{row['tokens_per_second']:.1f}",
            "-" if bits is None else f"{bits:.4f}",
        )
    console.print(table)


def synthetic(folder: Path, gigabytes: float, shard_layers: int = 2) -> None:
    """A dense bfloat16 Llama checkpoint of about that size, written shard by shard."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    sizes = dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_key_value_heads=8)
    layer = 2 * (3 * 2048 * 8192 + 3 * 2048 * 2048)
    layers = max(1, math.ceil((gigabytes * 1e9 - 2 * 2 * 32000 * 2048) / layer))
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=32000, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    names = {name: parameter.shape for name, parameter in model.named_parameters()}

    def draw(name: str) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(names[name], dtype=torch.bfloat16)
        return torch.empty(names[name], dtype=torch.bfloat16).normal_(0, 0.02)

    groups: dict[int, list[str]] = {}
    for name in names:
        parts = name.split(".")
        groups.setdefault(1 + int(parts[2]) // shard_layers if parts[1] == "layers" else 0, []).append(name)
    weight_map, total = {}, 0
    for number, group in groups.items():
        shard = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {n: NewTensor.computed(torch.bfloat16, names[n], lambda n=n: draw(n)) for n in group}
        write_tensor_file(folder / shard, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(group, shard)
        total += sum(tensor.size for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def watch(command: list[str]) -> tuple[int, float]:
    """(largest resident bytes, seconds) of a command, read from outside; it must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    peak = 0
    while process.poll() is None:
        peak = max(peak, process_memory(process.pid)[1])
        time.sleep(0.02)
    reader.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors[0][-2000:]}")
    return peak, time.perf_counter() - start


CONVERT = """
import sys, torch, prunepath
from prunepath.conversion.streaming import convert_streaming
torch.set_num_threads(int(sys.argv[3]))
generator = torch.Generator().manual_seed(0)
texts = [torch.randint(0, 32000, (256,), generator=generator) for _ in range(64)]
config = prunepath.PrunePathConfig(
    sequence_length=64, router_tokens=256, partition_tokens=256, calibration_tokens=128
)
convert_streaming(sys.argv[1], sys.argv[2], None, texts, config)
"""

OPEN = """
import sys, time, prunepath, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
from transformers import AutoModelForCausalLM
start = time.perf_counter()
AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(time.perf_counter() - start)
"""


def convert_large(folder: Path, gigabytes: float, threads: int) -> dict:
    synthetic(folder / "dense", gigabytes)
    size = sum(path.stat().st_size for path in (folder / "dense").glob("*.safetensors"))
    command = [sys.executable, "-c", CONVERT, str(folder / "dense"), str(folder / "sparse"), str(threads)]
    peak, seconds = watch(command)
    shutil.rmtree(folder / "dense")
    return {"checkpoint_bytes": size, "peak_bytes": peak, "seconds": seconds}


def open_large(folder: Path) -> dict:
    """Packs the checkpoint at `folder`/sparse and opens it in a process of its own, three times."""
    pack(folder / "sparse", folder / "packed")
    size = sum(path.stat().st_size for path in (folder / "packed").glob("*.safetensors"))
    times = [
        float(subprocess.run([sys.executable, "-c", OPEN, folder / "packed"], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    return {"checkpoint_bytes": size, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sparse", type=Path, help="a converted checkpoint, say of prunepath demo")
    parser.add_argument("--dense", type=Path, help="what it was converted from; the embedded model unless given")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=64, help="read one by one while memory is measured")
    parser.add_argument("--quality-tokens", type=int, default=16384, help="that bits per byte are measured on; 0: none")
    parser.add_argument("--gpu-experts", type=int, default=10 << 20, help="bytes of the GPU for FFNs")
    parser.add_argument("--convert", type=float, metavar="GB", help="also convert a checkpoint of this size")
    parser.add_argument("--open", action="store_true", help="also pack what --convert made, and time opening it")
    parser.add_argument("--folder", type=Path, help="where large files may be; a temporary folder unless given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    if args.sparse is None and args.convert is None:
        parser.error("expected --sparse or --convert")
    if args.open and args.convert is None:
        parser.error("argument --open: expected --convert too")
    console = Console(width=max(Console().width, 150))
    command = "python benchmarks/memory.py " + " ".join(sys.argv[1:])
    console.print(f"$ {command}\n{machine()}, {today()}", highlight=False, soft_wrap=True)
    figures: dict = {"command": command, "machine": machine(), "date": today()}
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        if args.sparse is not None:
            figures["models"] = compare(args, Path(scratch))
            show(figures["models"], console)
        if args.convert is not None:
            found = figures["convert"] = convert_large(Path(scratch), args.convert, args.threads)
            console.print(
                f"Converting {found['checkpoint_bytes'] / 1e9:.2f} GB with --low-memory: peak resident "
                f"{found['peak_bytes'] / 1e9:.2f} GB, {found['seconds']:.0f} s."
            )
        if args.open:
            found = figures["open"] = open_large(Path(scratch))
            times = ", ".join(f"{seconds:.2f}" for seconds in found["seconds"])
            console.print(f"Opening {found['checkpoint_bytes'] / 1e9:.2f} GB, packed: {times} s.")
    if args.json:
        write_json(args.json, figures)


def compare(args: argparse.Namespace, scratch: Path) -> list[dict]:
    pack(args.sparse, scratch / "packed")
    with model_folder() as embedded:
        shutil.copytree(args.dense or embedded, scratch / "dense")
    folders = {"dense": scratch / "dense", "sparse": args.sparse}
    folders["packed"] = scratch / "packed"
    if torch.cuda.is_available():
        folders |= {"sparse, GPU": args.sparse, "offloaded": args.sparse}
    rows = {}
    for kind, folder in folders.items():
        spec = {
            "kind": kind,
            "folder": str(folder),
            "dtype": read_model_config(args.sparse)["dtype"],
            "budget": args.budget,
            "tokens": args.tokens,
            "quality": args.quality_tokens if kind in ("dense", "sparse") else 0,
            "gpu_experts": args.gpu_experts,
            "threads": args.threads,
            "scratch": str(scratch),
        }
        rows[kind] = measure(spec)
    check(rows, read_model_config(args.sparse)["dtype"])
    return list(rows.values())


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
