"""Saving and loading whole models with their tokenizers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from prunepath.checkpoint.description import QUANT_METHOD, SparseDescription
from prunepath.checkpoint.folders import whole_folder
from prunepath.checkpoint.tensor_file import TensorFile
from prunepath.errors import CheckpointError, PrunePathError
from prunepath.nn import sparse_ffns

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def save(model: nn.Module, tokenizer: Any | None, out: str | os.PathLike) -> None:
    """Writes model and tokenizer into the folder `out`, which appears whole or not at all.

    Raises:
        PrunePathError: if `out` has something in it, or cannot be written.
    """
    with whole_folder(out) as folder:
        try:
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except (OSError, safetensors.SafetensorError) as error:
            raise PrunePathError(f"Expected to write the checkpoint {out}, but: {error}.") from error


def load(name: str | os.PathLike, *, dtype: Any = "auto", device: Any = None) -> tuple[nn.Module, Any]:
    """Loads a causal language model, sparse or dense, and its tokenizer.

    Args:
        name: a local folder, a local GGUF file, whose weights become dense, or a hub name.
        dtype: as `from_pretrained` takes it; `auto` is the checkpoint's.
        device: where to put the model; None leaves it on the CPU.

    Returns:
        (model, tokenizer), the model in evaluation mode.

    Raises:
        PrunePathError: if there is no such model, or its checkpoint is truncated, inconsistent or from the future.
    """
    import transformers

    path, options = _local(name)
    if path is not None and path.is_dir():
        _check_files(path)
    if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _loading(name):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name if path is None else path, dtype=dtype, output_loading_info=True, **options
        )
    damaged = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if damaged:
        raise CheckpointError(
            f"Expected {name} to hold every weight of its {type(model).__name__} in its right shape, but "
            f"{len(damaged)} are missing or of another shape, {damaged[0]} among them."
        )
    tokenizer = load_tokenizer(name)
    if device is not None:
        with _loading(name):
            model.to(device)
    return model, tokenizer


def load_tokenizer(name: str | os.PathLike) -> Any:
    """The tokenizer of a local folder, a GGUF file or a hub name, as `load` loads it."""
    import transformers

    path, options = _local(name)
    with _loading(name):
        return transformers.AutoTokenizer.from_pretrained(name if path is None else path, **options)


def _local(name: str | os.PathLike) -> tuple[Path | None, dict[str, str]]:
    """(the local folder that `name` says, None for a hub name; what `from_pretrained` needs beside it).

    Raises:
        PrunePathError: for a path where there is nothing, a folder that is no model, or a file that cannot be read.
    """
    path = Path(name)
    try:
        exists = path.exists()
    except OSError as error:  # such as a name that is too long
        raise PrunePathError(f"Expected a model folder or a hub name, but: {error}.") from error
    if not exists:
        if path.is_absolute() or str(name).startswith(".") or str(name).count("/") > 1 or path.suffix == ".gguf":
            raise PrunePathError(f"Expected a model folder or a hub name, but there is no folder {name}.")
        return None, {}
    if path.is_file() and path.suffix == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise PrunePathError(
                f"Expected the package gguf to read {name}, but it is not installed: pip install gguf."
            )
        return path.parent, {"gguf_file": path.name}
    read_model_config(path)
    return path, {}


@contextlib.contextmanager
def _loading(name: str | os.PathLike) -> Iterator[None]:
    """Turns whatever transformers, safetensors or tokenizers raise into one sentence."""
    try:
        yield
    except PrunePathError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise CheckpointError(
            f"Expected {name} to be a complete model and tokenizer that transformers loads, but: "
            f"{lines[0].removesuffix('.')}."
        ) from error


def read_model_config(folder: Path) -> dict[str, Any]:
    """The contents of a local model's config.json, whose `quantization_config` is checked if it is PrunePath's.

    Raises:
        PrunePathError: if there is none, or it cannot be read as one.
    """
    path = folder / CONFIG
    if not folder.is_dir() or not path.is_file():
        raise PrunePathError(f"Expected a model folder with a config.json, but {path} is not there.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
        sparsity = config.get("quantization_config")
        if sparsity is not None and not isinstance(sparsity, dict):
            raise ValueError("its quantization_config is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"Expected {path} to be a model's configuration in JSON, but: {error}.") from error
    if sparsity is not None and sparsity.get("quant_method") == QUANT_METHOD:
        SparseDescription.from_dict(sparsity)
    return config


def open_shards(folder: Path) -> list[TensorFile]:
    """A local checkpoint's safetensors files, the ones that transformers would load.

    Raises:
        CheckpointError: if there is none, or one is missing, damaged or outside the folder.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).exists() or not index.exists():
        return [TensorFile(folder / WEIGHTS)]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in names:
            if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
                raise ValueError(f"{str(name)[:100]!r} is no plain file name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"Expected {index} to say in which shard each weight is, but: {error}.") from error
    return [TensorFile(folder / name) for name in sorted(names)]


def _check_files(folder: Path) -> None:
    """Raises CheckpointError if a safetensors file is damaged, or a weight is of whole numbers by no known method.

    transformers would take such numbers for what they stand for.
    """
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        return  # another format, or nothing: transformers says so
    sparsity = read_model_config(folder).get("quantization_config")
    is_quantized = sparsity is not None and sparsity.get("quant_method") != QUANT_METHOD
    for file in open_shards(folder):
        for name, entry in file.entries.items():
            if name.endswith((".weight", ".bias")) and not is_quantized and not entry.dtype.startswith(("F", "BF")):
                raise CheckpointError(
                    f"Expected {name} in {file.path} to be of a floating-point dtype, got {entry.dtype}."
                )


def check_routers(model: nn.Module) -> None:
    """Raises CheckpointError if a router that is in memory holds a value that is not finite."""
    for path, ffn in sparse_ffns(model).items():
        for name, tensor in ffn.router.tensors().items():
            if not tensor.is_meta and not math.isfinite(tensor.detach().float().sum().item()):
                raise CheckpointError(
                    f"Expected finite numbers in {path}.router.{name}, but it has NaN or infinite ones."
                )
