"""Safetensors files through one memory map, and writing them with every tensor where a page begins.

The safetensors package gives no memory back before a file is closed, and places tensors at multiples of 8 bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from prunepath.errors import CheckpointError

PAGE_BYTES = 4096
PADDING = "padding."
"""How the names of the tensors begin that fill a page: a safetensors file may have no holes."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """What a file's header says of one tensor.

    Attributes:
        dtype: safetensors' name of it, such as BF16.
        shape: its shape.
        begin, end: where its bytes are, from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file of which nothing but the header is read until a tensor's elements are.

    Attributes:
        path: the file.
        entries: name -> `TensorEntry`, in the order of their bytes.
        metadata: the header's texts.

    Raises:
        CheckpointError: a file that is missing, cut short or no safetensors file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="pt"):
                pass  # the library checks the header, against the file too: offsets, overlaps, dtypes, shapes
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                # Private: a write, as of an optimiser, goes to memory of this process and never to the file.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(
                f"Expected the safetensors file {self.path}, but it cannot be read: {error.strerror or error}."
            ) from error
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"Expected {self.path} to be a whole safetensors file, but: {error}.") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        entries = {
            name: TensorEntry(entry["dtype"], tuple(entry["shape"]), *(8 + length + at for at in entry["data_offsets"]))
            for name, entry in header.items()
        }
        self.entries = dict(sorted(entries.items(), key=lambda item: item[1].begin))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor on the map: nothing is read before its elements are.

        Raises:
            CheckpointError: no such tensor, or one of a dtype that the kernels do not compute with.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"Expected {self.path} to hold {name}, but it does not.")
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"Expected {name} in {self.path} to be float32, bfloat16, float16 or uint8, got {entry.dtype}."
            )
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        flat = torch.frombuffer(self._map, dtype=_DTYPES[entry.dtype], count=count, offset=entry.begin)
        return flat.view(entry.shape)

    def bytes(self, name: str) -> memoryview:
        """A tensor's bytes on the map, whatever its dtype."""
        entry = self.entries[name]
        return memoryview(self._map)[entry.begin : entry.end]

    def require(self, name: str, shape: Sequence[int], *, packed: bool = False) -> None:
        """Raises CheckpointError unless the file holds a tensor of this name and shape that kernels compute with.

        It is of bytes if it is `packed`, else of floating-point numbers.
        """
        found, dtype = list(self.tensor(name).shape), self.entries[name].dtype
        if (dtype == "U8") != packed:
            expected = "uint8" if packed else "float32, bfloat16 or float16"
            raise CheckpointError(f"Expected {name} in {self.path} to be {expected}, got {dtype}.")
        if found != list(shape):
            raise CheckpointError(f"Expected {name} of shape {list(shape)} in {self.path}, got {found}.")

    def release(self) -> None:
        """Takes the file out of this process's memory; using it again reads it, and what was written to it is lost."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to write.

    Attributes:
        dtype: safetensors' name of it, such as BF16.
        shape: its shape.
        read: gives its bytes, once, when they are due.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    read: Callable[[], memoryview]

    @classmethod
    def copied(cls, file: TensorFile, name: str) -> NewTensor:
        """A tensor of another file as it is there."""
        entry = file.entries[name]
        return cls(entry.dtype, entry.shape, entry.end - entry.begin, lambda: file.bytes(name))

    @classmethod
    def computed(cls, dtype: torch.dtype, shape: Iterable[int], compute: Callable[[], torch.Tensor]) -> NewTensor:
        """A tensor that `compute` makes when it is due."""
        shape = tuple(shape)

        def read() -> memoryview:
            tensor = compute()
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"Expected a tensor of {dtype} {list(shape)} to write, got {tensor.dtype} {list(tensor.shape)}."
                )
            return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())

        return cls(_NAMES[dtype], shape, math.prod(shape) * dtype.itemsize, read)


def write_tensor_file(
    path: str | os.PathLike, tensors: dict[str, NewTensor], metadata: dict[str, str], *, align: int = 8
) -> None:
    """Writes a safetensors file, one tensor in memory at a time, each beginning at a multiple of `align` bytes.

    The header is filled with spaces, and tensors named `padding.…` stand where one ends before the next may begin.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    parts: list[Callable[[], memoryview | bytes]] = []
    at = 0

    def add(name: str, dtype: str, shape: Iterable[int], size: int, read: Callable[[], memoryview | bytes]) -> None:
        nonlocal at
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        parts.append(read)
        at += size

    for name, tensor in tensors.items():
        if gap := -at % align:
            add(f"{PADDING}{len(parts)}", "U8", [gap], gap, lambda gap=gap: bytes(gap))
        add(name, tensor.dtype, tensor.shape, tensor.size, tensor.read)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % max(align, 8))
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for read in parts:
            file.write(read())
        file.flush()
        os.fsync(file.fileno())
