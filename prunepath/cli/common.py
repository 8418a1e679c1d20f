"""Arguments and options that several commands share, and how they are read."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prunepath.config import Backend
from prunepath.errors import PrunePathError

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint folder, GGUF file or Hugging Face hub name.")
]
SparseArgument = Annotated[str, typer.Argument(metavar="SPARSE", help="Sparse checkpoint folder or hub name.")]
OutArgument = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to write the checkpoint to. It has to be new or empty.")
]
SequenceLengthOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a window.", show_default="512, or the model's limit if less")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Windows of one forward pass.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
GPUExpertsOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Keep at most so much of the FFNs on the GPU, the rest in host memory: 4GiB."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON alone on standard output.")]


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Where texts come from.

    Args:
        data: text file, folder, JSONL file, or datasets name such as name:split. It may be given several times.
        text_column: JSONL field or dataset column that holds the text.
    """

    data: list[str]
    text_column: str = "text"

    def load(self):
        from prunepath.data import load_texts

        return load_texts(self.data, text_column=self.text_column)


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded and run.

    Args:
        dtype: load the weights in this dtype; `auto` is the one in which they are stored.
        device: device to work on, such as cpu or cuda:0.
        backend: what runs the sparse FFNs. By default the one that suits the device.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    backend: Backend | None = None

    def load(self, name: str) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        prunepath = import_prunepath()
        if self.device is not None:
            check_device(self.device)
        self.choose_backend()
        return prunepath.load(name, dtype=self.dtype, device=self.device)

    def load_offloaded(self, name: str, gpu_experts: str | None) -> tuple[Any, Any, Any]:
        """The model, its tokenizer and where its FFNs are: None unless a GPU is to run them from host memory."""
        if gpu_experts is None:
            return *self.load(name), None
        size, device = parse_size("gpu-experts", gpu_experts), self.device or "cuda"
        if device.partition(":")[0] == "cpu":
            raise PrunePathError("Expected a GPU to hold experts for --gpu-experts, got --device cpu.")
        check_device(device)
        prunepath = import_prunepath()
        from prunepath.memory.offload import offload_experts

        dataclasses.replace(self, device=device).choose_backend()
        model, tokenizer = prunepath.load(name, dtype=self.dtype)
        return model, tokenizer, offload_experts(model, size, device)

    def choose_backend(self) -> None:
        """Makes the backend this process's, before work is done that would need it.

        Raises:
            BackendError, NativeLibraryError: it does not work here or on the device.
        """
        import torch

        from prunepath import ops

        if self.backend is not None:
            ops.use_backend(self.backend)
        ops.resolve_backend(torch.device(self.device or "cpu"))


def sleep_while_waiting() -> None:
    """Lets torch's threads sleep while they wait for each other, if torch is not loaded yet.

    Else they spin, and several times longer where another process has their core. Decoding, whose calls are short,
    waits too often for this.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def import_prunepath():
    """The Python interface, with transformers kept from talking over the results."""
    import transformers

    import prunepath

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return prunepath


def check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    # torch raises RuntimeError or AssertionError, as the device is unknown or its driver is missing.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise PrunePathError(f"The device {device!r} cannot be used: {reason}.") from error


def state_beside(out: Path, suffix: str) -> Path:
    """Where the state of a run that will write the folder `out` is kept: a hidden file or folder beside it."""
    place = out.absolute()
    return place.with_name(f".{place.name}.{suffix}")


def check_picture(name: str, path: Path) -> None:
    """Raises PrunePathError unless the file `path` can be written."""
    if path.is_dir():
        raise PrunePathError(f"Expected --{name} to be a file to write, but {path} is a folder.")
    if not path.absolute().parent.is_dir():
        raise PrunePathError(f"Expected --{name} to be a file in a folder that is there, got {path}.")


def check_fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise PrunePathError(f"{name} must be in (0, 1], got {value:g}.")


def parse_fractions(name: str, text: str) -> list[float]:
    values = []
    for part in text.split(","):
        try:
            values.append(float(part))
        except ValueError:
            raise PrunePathError(
                f"{name} must be numbers in (0, 1] separated by commas, got {part.strip()!r} in {text!r}."
            ) from None
        check_fraction(name, values[-1])
    return values


def parse_size(name: str, text: str) -> int:
    """Bytes of a size such as 4GiB, 500MB or 1048576."""
    units = {"": 1, "b": 1} | {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
    units |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    try:
        size = float(number) * units[text.strip()[len(number) :].lower()]
        if not 0 < size < 1 << 62:
            raise ValueError
    except (ValueError, KeyError):
        raise PrunePathError(f"{name} must be a size such as 4GiB or 500MB, got {text!r}.") from None
    return int(size)


def window_length(model, sequence_length: int | None) -> int:
    """The tokens of an evaluation window: those asked for, or 512, if the model takes so many."""
    limit = getattr(model.config, "max_position_embeddings", None) or 512
    if sequence_length is not None and sequence_length > limit:
        raise PrunePathError(f"sequence_length must be at most the model's {limit}, got {sequence_length}.")
    return sequence_length or min(512, limit)
