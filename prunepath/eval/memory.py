"""What a loaded model takes of memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from prunepath.nn import sparse_ffns


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes, as Linux counts them; 0 where the system does not say.

    Attributes:
        resident_bytes: of the whole process in memory now, mapped files included.
        peak_bytes: the most that was.
        mapped_bytes: of checkpoint files that experts are used from.
        touched_bytes: of those, what is in memory now because it was used.
    """

    resident_bytes: int
    peak_bytes: int
    mapped_bytes: int
    touched_bytes: int


def report_memory(model: torch.nn.Module) -> MemoryReport:
    """Reads this process's memory, and the part of it that belongs to the experts of a packed `model`."""
    files = {id(ffn.pages.file): ffn.pages.file for ffn in sparse_ffns(model).values() if ffn.pages is not None}
    return MemoryReport(
        *process_memory(),
        sum(file.mapped_bytes for file in files.values()),
        sum(file.touched_bytes() for file in files.values()),
    )


def process_memory(process: int | str = "self") -> tuple[int, int]:
    """(resident bytes, the most they were) of a process by its number; (0, 0) where the system does not say."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0, 0
    sizes = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return tuple(int(sizes[name][0]) * 1024 if name in sizes else 0 for name in ("VmRSS", "VmHWM"))
