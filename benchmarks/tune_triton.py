"""Finds the fastest configurations of the Triton FFN kernels on this GPU, and writes them to triton_kernels/tuned.py.

    python benchmarks/tune_triton.py                                     # four real shapes, 1, 8 and 32 tokens
    python benchmarks/tune_triton.py --shapes llama-3-8b --batch 1,64 --seconds 60 --output tuned.py

A configuration of `routed_ffn` is timed only after its result was compared with a float64 reference. Times are those of
CUDA graphs over several layers, so that the weights come from memory, and the score is the geometric mean over the
active fractions. Kernels are compiled by as many processes as there are processors before anything is timed. Entries
of other GPUs, shapes and numbers of tokens stay in the table.
"""

import argparse
import itertools
import math
import os
import pprint
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from common import graph_seconds, last_level_cache_bytes, machine, seconds, whole_numbers
from ffn import SHAPES, TOLERANCES, Layer, choices, count_experts, make_inputs
from prunepath.triton_kernels import configs, tuned
from prunepath.triton_kernels.configs import Fused, Hidden, Output
from prunepath.triton_kernels.routed_ffn import routed_ffn

from prunepath.eval.files import replacing

NUM_EXPERTS = 128
# Of a multiprocessor: bytes of shared memory that its programs may have together, and their warps.
MAX_SHARED = 200_000
MAX_WARPS = 32


def fused_candidates(shape: configs.Shape, tokens: int) -> list[Fused]:
    """Programs whose step of weights takes few enough registers of a thread, and enough to be worth a step."""
    row = configs.block_hidden(shape)
    found = []
    for programs, neurons, warps, stages in itertools.product((1, 2, 3, 4), (1, 2, 4, 8), (4, 8, 16), (1, 2)):
        step = neurons * row * (shape.inner + 1) * shape.dtype.itemsize
        registers = step / 4 / (32 * warps)
        kept = 2 * tokens * row / (32 * warps)  # x and the output
        shared = step * programs if stages > 1 else 0
        if not 8 <= programs * warps <= MAX_WARPS or shared > MAX_SHARED:
            continue
        if registers < 8 or registers + kept > 65536 / (programs * warps * 32) - 32:
            continue
        found.append(Fused(programs, neurons, warps, stages))
    return found


def hidden_candidates(shape: configs.Shape, tokens: int) -> list[Hidden]:
    found = []
    for programs, neurons, columns, stages in itertools.product((1, 2, 3), (16, 32, 64), (64, 128, 256), (3, 5)):
        shared = stages * (max(16, tokens) + neurons * shape.inner) * columns * shape.dtype.itemsize
        if 60_000 <= programs * shared <= MAX_SHARED:
            found.append(Hidden(programs, neurons, columns, 8 if neurons * shape.inner >= 128 else 4, stages))
    return found


def output_candidates(shape: configs.Shape, tokens: int) -> list[Output]:
    found = []
    for columns, neurons, splits, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8, 16), (3, 5)):
        shared = stages * (max(16, tokens) + columns) * neurons * shape.dtype.itemsize
        programs = splits * shape.hidden_size // columns
        if 10_000 <= shared <= 66_000 and 128 <= programs <= 600:
            found.append(Output(columns, neurons, splits, 4, stages))
    return found


def compile_candidates(shape: configs.Shape, tokens: int, candidates: list) -> None:
    """Fills Triton's cache; in a process of its own. Small weights compile the kernels of large ones."""
    width = 16
    small = shape._replace(intermediate_size=NUM_EXPERTS * width)
    w_in = torch.zeros(NUM_EXPERTS, width, shape.inner, shape.hidden_size, dtype=shape.dtype, device="cuda")
    w_out, router = w_in[:, :, 0].contiguous(), w_in[:, 0, 0].contiguous()
    x = torch.zeros(tokens, shape.hidden_size, dtype=shape.dtype, device="cuda")
    threshold = torch.ones(tokens, device="cuda")
    activation = next(
        s.activation for s in SHAPES.values() if s.hidden_size == shape.hidden_size and s.gated == (shape.inner == 2)
    )
    for candidate in candidates:
        tuned.TABLE[configs.key(configs.architecture(x.device), small, tokens)] = candidate
        try:
            routed_ffn(x, router, None, threshold, w_in, w_out, activation)
            torch.cuda.synchronize()
        except Exception as error:  # too much shared memory, say: found again when it is its turn
            print(f"{candidate}: {str(error).splitlines()[0]}")


class Case:
    """A shape and a number of tokens: its calls at every active fraction, and the table's entry for it."""

    def __init__(self, name: str, tokens: int, dtype: torch.dtype, active: list[int], layers: list[Layer]):
        spec = SHAPES[name]
        self.name, self.tokens = name, tokens
        self.shape = configs.Shape(spec.hidden_size, spec.intermediate_size, 1 + spec.gated, dtype)
        self.key = configs.key(configs.architecture(torch.device("cuda")), self.shape, tokens)
        self.tolerance = TOLERANCES[str(dtype).removeprefix("torch.")]
        self.inputs, self.calls = [], []
        for percent in active:
            count = count_experts(percent, NUM_EXPERTS)
            enough = math.ceil(2 * last_level_cache_bytes("cuda") / (layers[0].nbytes * count / NUM_EXPERTS))
            number = min(len(layers), max(3, enough))
            given = [
                make_inputs(layer, count, tokens, 0.0, spec.activation, 1000 + index)
                for index, layer in enumerate(layers[:number])
            ]
            self.inputs.append(given)
            self.calls.append(
                [
                    partial(
                        routed_ffn, i.x, i.layer.router, None, i.threshold, i.layer.w_in, i.layer.w_out, spec.activation
                    )
                    for i in given
                ]
            )

    def microseconds(self, candidate: tuple) -> float | None:
        """The score of a configuration; None if it does not run, or gives a wrong result."""
        tuned.TABLE[self.key] = candidate
        scores = []
        try:
            for inputs, calls in zip(self.inputs, self.calls, strict=True):
                for given, call in zip(inputs[:2], calls, strict=False):
                    y, counts = call()
                    error = ((y.double() - given.expected).norm() / given.expected.norm()).item()
                    if not (error <= self.tolerance and torch.equal(counts, given.counts)):
                        print(f"  {candidate}: WRONG, relative error {error:.1e}, counts {counts.tolist()}")
                        return None
                sample = graph_seconds(calls)
                scores.append(statistics.median(sample() for _ in range(7)))
        except Exception as error:
            print(f"  {candidate}: {str(error).splitlines()[0]}")
            return None
        return 1e6 * statistics.geometric_mean(scores)

    def best(self, candidates: list[tuple], deadline: float) -> tuple[tuple, float]:
        """The fastest of the candidates, the first of which is always tried."""
        scores = {}
        for candidate in candidates:
            if scores and time.monotonic() > deadline:
                print(f"  out of time after {len(scores)} of {len(candidates)} configurations")
                break
            score = self.microseconds(candidate)
            if score is not None:
                scores[candidate] = score
        if not scores:
            raise SystemExit(f"{self.name}, {self.tokens} tokens: no configuration works.")
        winner = min(scores, key=scores.get)
        return winner, scores[winner]


def plans(shape: configs.Shape, tokens: int) -> list[list]:
    """What is to be compiled: the table's entries of all candidates, in lists for one process each."""
    if configs.is_fused(shape, tokens):
        unique = {
            candidate[1:]: candidate for candidate in fused_candidates(shape, tokens)
        }  # of any number of programs
        entries = [configs.default_fused(shape, tokens), *unique.values()]
    else:
        hidden, output = configs.default_hidden(shape, tokens), configs.default_output(shape, tokens)
        entries = [(candidate, output) for candidate in [hidden, *hidden_candidates(shape, tokens)]]
        entries += [(hidden, candidate) for candidate in output_candidates(shape, tokens)]
    return [entries[start : start + 4] for start in range(0, len(entries), 4)]


def tune(case: Case, deadline: float) -> tuple[tuple, float]:
    shape, tokens = case.shape, case.tokens
    if configs.is_fused(shape, tokens):
        default = configs.default_fused(shape, tokens)
        return case.best([default, *fused_candidates(shape, tokens)], deadline)
    hidden, output = configs.default_hidden(shape, tokens), configs.default_output(shape, tokens)
    half = (time.monotonic() + deadline) / 2
    (hidden, _), _ = case.best([(c, output) for c in (hidden, *hidden_candidates(shape, tokens))], half)
    return case.best([(hidden, c) for c in (output, *output_candidates(shape, tokens))], deadline)


def write_table(path: Path, found: dict) -> None:
    """The table's module, its docstring kept, with `found` in place of what it had for the same keys."""
    header = f'"""{tuned.__doc__}"""\n\n'
    table = {**tuned.TABLE, **found}
    plain = {
        key: tuple(entry) if isinstance(entry, Fused) else tuple(map(tuple, entry)) for key, entry in table.items()
    }
    with replacing(path) as temporary:
        Path(temporary).write_text(f"{header}TABLE = {pprint.pformat(plain, width=110)}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", type=choices(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--batch",
        type=whole_numbers,
        default=[1, 8, 32],
        help="tokens in a call, up to 64; 8 stands for all from 2 to 16",
    )
    parser.add_argument("--active", type=whole_numbers, default=[10, 50], help="percent of the experts")
    parser.add_argument("--dtype", choices=list(TOLERANCES), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=90, help="for the timing of all, after compiling")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "triton_kernels" / "tuned.py")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    if not all(1 <= tokens <= configs.MAX_DECODE_TOKENS for tokens in args.batch):
        parser.error(f"argument --batch: expected numbers from 1 to {configs.MAX_DECODE_TOKENS}, got {args.batch}")
    dtype = getattr(torch, args.dtype)
    print(machine("cuda"), configs.architecture(torch.device("cuda")))

    jobs = []
    for name in args.shapes:
        spec = SHAPES[name]
        shape = configs.Shape(spec.hidden_size, spec.intermediate_size, 1 + spec.gated, dtype)
        jobs += [(shape, tokens, entries) for tokens in args.batch for entries in plans(shape, tokens)]

    def compile_all() -> None:
        with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
            for future in [pool.submit(compile_candidates, *job) for job in jobs]:
                future.result()

    print(f"compiled {sum(len(job[2]) for job in jobs)} entries in {seconds(compile_all):.0f} s", flush=True)

    found = {}
    start = time.monotonic()
    cases = len(args.shapes) * len(args.batch)
    for name in args.shapes:
        spec = SHAPES[name]
        layer_bytes = spec.intermediate_size * (2 + spec.gated) * spec.hidden_size * dtype.itemsize
        number = math.ceil(2 * last_level_cache_bytes("cuda") / (layer_bytes * min(args.active) / 100))
        layers = [Layer.random(spec, NUM_EXPERTS, dtype, torch.device("cuda"), seed) for seed in range(number)]
        for tokens in args.batch:
            case = Case(name, tokens, dtype, args.active, layers)
            left = start + args.seconds - time.monotonic()
            entry, score = tune(case, time.monotonic() + left / (cases - len(found)))
            found[case.key] = entry
            print(f"{name}, {tokens} tokens: {entry}, {score:.1f} µs", flush=True)
    write_table(args.output, found)
    print(f"wrote {args.output}")
    print(args.output.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
