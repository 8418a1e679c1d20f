"""What a loaded model takes of memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Bytes, as Linux counts them; 0 where the system does not say.

    Attributes:
        resident_bytes: of the whole process in memory now, mapped files included.
        peak_bytes: the most that was.
        mapped_bytes: of checkpoint files that the model's weights are used from.
        touched_bytes: of those, what is in memory now because it was used; the system takes it back when it must.
    """

    resident_bytes: int
    peak_bytes: int
    mapped_bytes: int
    touched_bytes: int


def report_memory(model: torch.nn.Module) -> MemoryReport:
    """Reads this process's memory, and the part of it that is maps of the files that `model` was loaded from."""
    addresses = [p.data_ptr() for p in model.parameters() if p.device.type == "cpu"]
    mapped = touched = 0
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    of_model = False
    for line in lines:
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):  # a mapping: its addresses, permissions, offset, device, inode and file
            begin, end = (int(address, 16) for address in first.split("-"))
            of_model = rest[3] != "0" and any(begin <= address < end for address in addresses)
            mapped += (end - begin) * of_model
        elif first == "Rss:" and of_model:
            touched += int(rest[0]) * 1024
    return MemoryReport(*process_memory(), mapped, touched)


def process_memory(process: int | str = "self") -> tuple[int, int]:
    """(resident bytes, the most they were) of a process by its number; (0, 0) where the system does not say."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0, 0
    sizes = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    return tuple(int(sizes[name][0]) * 1024 if name in sizes else 0 for name in ("VmRSS", "VmHWM"))
