"""What `prunepath demo` runs: the whole chain on the embedded model, without a network."""

from __future__ import annotations

import contextlib
import copy
import importlib.resources
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import prunepath
from prunepath.checkpoint.folders import whole_folder
from prunepath.demo.corpus import stdlib_texts
from prunepath.eval.files import write_json
from prunepath.eval.perplexity import evaluate
from prunepath.eval.plots import plot_tradeoff
from prunepath.eval.tradeoff import tradeoff

BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.1)
SAMPLE_BUDGETS = (1.0, 0.5, 0.25, 0.1)
PROMPT = 'class Stack:\n    """A last-in, first-out collection."""\n\n    def __init__(self'
CONFIG = prunepath.PrunePathConfig()
SEQUENCE_LENGTH = 512
HELD_OUT_TOKENS = 16384
HELD_OUT_CHARACTERS = 1600
SAMPLE_TOKENS = 48
TEMPERATURE = 0.7  # greedily, a model this small repeats itself, dense or sparse
DECODE_TOKENS = 32
DECODE_REPEATS = 5


def run(out: str | Path, *, progress: Callable[[str], None] = lambda line: None) -> dict:
    """Converts the embedded model, measures it, and writes its checkpoint, tradeoff.json and tradeoff.png.

    Args:
        out: a folder that is new or empty; it appears whole at the end.
        progress: called with a line on each step. Progress bars go to standard error.

    Returns:
        What tradeoff.json holds: `model` (sizes, and the dense model's perplexity and bits per byte), `rows`
        (as `prunepath.eval.tradeoff.tradeoff` gives them), `samples` (budget, prompt, text), `machine`, and
        `seconds`.

    Raises:
        PrunePathError: `out` has something in it, or a native library is missing.
    """
    start = time.perf_counter()
    with whole_folder(out) as folder, _threads(1):
        # On matrices this small more threads mostly wait for each other, and far more so on a busy machine.
        torch.manual_seed(0)
        progress("Loading the embedded model.")
        with model_folder() as path:
            dense, tokenizer = prunepath.load(path, dtype="float32")
        # In path order the first modules would be all that the routers see.
        train = stdlib_texts("train")
        random.Random(0).shuffle(train)
        model = prunepath.convert(copy.deepcopy(dense), tokenizer, train, CONFIG, progress=True)

        progress("Measuring on modules of the standard library that the model has never seen.")
        held_out = [_beginning(text) for text in stdlib_texts("held_out")]
        shared = dict(sequence_length=SEQUENCE_LENGTH, max_tokens=HELD_OUT_TOKENS, batch_size=8, progress=True)
        reference = evaluate(dense, tokenizer, held_out, **shared)
        prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        rows = tradeoff(
            model,
            tokenizer,
            held_out,
            budgets=BUDGETS,
            dense=dense,
            prompt=prompt,
            new_tokens=DECODE_TOKENS,
            repeats=DECODE_REPEATS,
            **shared,
        )
        samples = [
            _sample(model, tokenizer, prompt, budget) for budget in tqdm(SAMPLE_BUDGETS, desc="generating", leave=False)
        ]
        prunepath.set_budget(model, 1.0)
        prunepath.save(model, tokenizer, folder)
        plot_tradeoff(rows, folder / "tradeoff.png", title="PrunePath demo")
        outcome = {
            "model": {
                "architecture": type(dense).__name__,
                "parameters": sum(parameter.numel() for parameter in dense.parameters()),
                "layers": len(prunepath.sparse_ffns(model)),
                "hidden_size": dense.config.hidden_size,
                "intermediate_size": dense.config.intermediate_size,
                "num_experts": next(iter(prunepath.sparse_ffns(model).values())).num_experts,
                "perplexity": reference.perplexity,
                "bits_per_byte": reference.bits_per_byte,
            },
            "rows": rows,
            "samples": samples,
            "machine": _machine(),
            "seconds": time.perf_counter() - start,
        }
        write_json(folder / "tradeoff.json", outcome)
    return outcome


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Limits torch to so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def model_folder() -> contextlib.AbstractContextManager[Path]:
    """The embedded model's checkpoint, as a folder for as long as the context lasts."""
    return importlib.resources.as_file(importlib.resources.files("prunepath.demo") / "model")


def _beginning(text: str) -> str:
    """The first lines of a document, so that a small sample has something of every held-out module."""
    return text[: text.rfind("\n", 0, HELD_OUT_CHARACTERS) + 1] if len(text) > HELD_OUT_CHARACTERS else text


def _sample(model, tokenizer, prompt: torch.Tensor, budget: float) -> dict:
    prunepath.set_budget(model, budget)
    torch.manual_seed(0)
    ids = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=True,
        temperature=TEMPERATURE,
        pad_token_id=tokenizer.eos_token_id,
    )[0, prompt.shape[1] :]
    return {"budget": budget, "prompt": PROMPT, "text": tokenizer.decode(ids, skip_special_tokens=True)}


def _machine() -> dict:
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()
