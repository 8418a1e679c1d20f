"""Block sizes, warps and numbers of programs of the FFN's kernels: tuned ones from a table, or else defaults.

Nothing is measured here or while a model runs; `benchmarks/tune_triton.py` measures, and writes the table `tuned.py`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from . import tuned
from .arithmetic import INTERPRETED

MAX_DECODE_TOKENS = 64
MIN_BLOCK_TOKENS = 16  # of a product on tensor cores
# Elements that a fused program keeps of x, and of the output: more do not fit in its registers.
_MAX_FUSED_ELEMENTS = 16384


class Fused(NamedTuple):
    """`fused_kernel`: how many programs a multiprocessor gets, and neurons that a program takes at a time."""

    programs: int
    neurons: int
    warps: int
    stages: int


class Hidden(NamedTuple):
    """`hidden_kernel`; `columns` of x and w_in are multiplied at a time."""

    programs: int
    neurons: int
    columns: int
    warps: int
    stages: int


class Output(NamedTuple):
    """`output_kernel`: the block of output columns, the neurons multiplied at a time, and shares of the neurons."""

    columns: int
    neurons: int
    splits: int
    warps: int
    stages: int


class Shape(NamedTuple):
    """What the choice of a configuration depends on, besides the device and the number of tokens."""

    hidden_size: int
    intermediate_size: int
    inner: int  # G
    dtype: torch.dtype


def is_fused(shape: Shape, num_tokens: int) -> bool:
    """Whether a call takes `fused_kernel`. In half precision, tensor cores are faster from two tokens on."""
    most = 4 if shape.dtype == torch.float32 else 1
    return num_tokens <= most and _ceil_power_of_two(num_tokens) * block_hidden(shape) <= _MAX_FUSED_ELEMENTS


def bucket(shape: Shape, num_tokens: int) -> int:
    """The most tokens that share a configuration: 1, 2 or 4 if they are fused, else 16, 32 or 64."""
    most = _ceil_power_of_two(num_tokens)
    return most if is_fused(shape, num_tokens) else max(MIN_BLOCK_TOKENS, most)


@functools.cache
def architecture(device: torch.device) -> str:
    """`sm_90`, say, or AMD's name."""
    if INTERPRETED or device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def overlaps(arch: str, num_tokens: int) -> bool:
    """Whether kernels start before the one before them on the stream ends (programmatic dependent launch).

    With 32 tokens that took 9 µs longer on an H100, at Llama-3-8B's shape; with 1 to 8 it takes 1 to 2 µs less.
    """
    return num_tokens <= MIN_BLOCK_TOKENS and arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    if INTERPRETED or device.type != "cuda":
        return 3  # enough to have several programs, few enough to run them one by one
    return torch.cuda.get_device_properties(device).multi_processor_count


def key(arch: str, shape: Shape, num_tokens: int) -> tuple:
    """Where `tuned.TABLE` has a configuration."""
    dtype = str(shape.dtype).removeprefix("torch.")
    return (arch, shape.hidden_size, shape.intermediate_size, shape.inner, dtype, bucket(shape, num_tokens))


def fused(arch: str, shape: Shape, num_tokens: int) -> Fused:
    found = tuned.TABLE.get(key(arch, shape, num_tokens))
    return default_fused(shape, num_tokens) if found is None else Fused(*found)


def hidden_and_output(arch: str, shape: Shape, num_tokens: int) -> tuple[Hidden, Output]:
    found = tuned.TABLE.get(key(arch, shape, num_tokens))
    if found is None:
        return default_hidden(shape, num_tokens), default_output(shape, num_tokens)
    return Hidden(*found[0]), Output(*found[1])


def _ceil_power_of_two(number: int) -> int:
    """The smallest one that is not below `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()


def _power_of_two(number: float) -> int:
    """The largest one that is not above `number`, and at least 1."""
    return 1 << max(0, int(number).bit_length() - 1)


def block_hidden(shape: Shape) -> int:
    """Columns of a fused program's blocks: whole rows."""
    return max(64, _ceil_power_of_two(max(1, shape.hidden_size)))


def default_fused(shape: Shape, num_tokens: int) -> Fused:
    row = block_hidden(shape)
    warps = 4 if row <= 1024 else 8 if num_tokens * row <= 8192 else 16
    # A thread keeps the weights of a step, and for every token x and the output.
    registers = (96 if warps <= 8 else 64) - 2 * num_tokens * row // (32 * warps)
    weights = row * (shape.inner + 1) * shape.dtype.itemsize // 4 / (32 * warps)
    neurons = min(8, _power_of_two(max(registers, 16) / weights))
    return Fused(2 if warps <= 8 else 1, neurons, warps, 1)


def default_hidden(shape: Shape, num_tokens: int) -> Hidden:
    if shape.dtype == torch.float32:
        return Hidden(2, 16, 32, 4, 2)
    if shape.hidden_size < 1024:
        return Hidden(2, 32, 64, 4, 3)
    return Hidden(1, 32, 128, 4, 5) if num_tokens <= MIN_BLOCK_TOKENS else Hidden(2, 32, 128, 4, 3)


def default_output(shape: Shape, num_tokens: int) -> Output:
    columns = 64 if shape.hidden_size >= 1024 else 32
    splits = max(1, min(8, 256 * columns // max(1, shape.hidden_size)))
    if shape.dtype == torch.float32:
        return Output(32, 32, splits, 4, 2)
    return Output(columns, 64, splits, 4, 3)


def prefill_hidden(shape: Shape) -> tuple[int, int, int, int, int]:
    """Blocks of tokens, neurons and columns, warps, stages of `grouped_hidden_kernel`."""
    if shape.dtype == torch.float32:
        return 32, 32, 32, 4, 2
    return 64, 64, 64, 4, 3


def prefill_output(shape: Shape) -> tuple[int, int, int, int, int]:
    """Blocks of tokens, neurons and columns, warps, stages of `output_kernel` for many tokens."""
    if shape.dtype == torch.bfloat16:
        return 128, 64, 128, 8, 3
    return 32, 32, 32, 4, 2
