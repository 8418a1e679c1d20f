"""Saving and loading whole models with their tokenizers."""

from __future__ import annotations

import contextlib
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
        name: a local folder or a hub name.
        dtype: as `from_pretrained` takes it; `auto` is the checkpoint's.
        device: where to put the model; None leaves it on the CPU.

    Returns:
        (model, tokenizer), the model in evaluation mode.

    Raises:
        PrunePathError: if there is no such model, or its checkpoint is truncated, inconsistent or from the future.
    """
    import transformers

    folder = Path(name)
    if not folder.exists() and (folder.is_absolute() or str(name).startswith(".") or str(name).count("/") > 1):
        raise PrunePathError(f"Expected a model folder or a hub name, but there is no folder {name}.")
    if folder.exists():
        read_model_config(folder)
    with _loading(name):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    damaged = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if damaged:
        raise CheckpointError(
            f"Expected {name} to hold every weight of its {type(model).__name__} in its right shape, but "
            f"{len(damaged)} are missing or of another shape, {damaged[0]} among them."
        )
    if folder.exists():
        _check_dtypes(folder)
    tokenizer = load_tokenizer(name)
    return (model if device is None else model.to(device)), tokenizer


def _check_dtypes(folder: Path) -> None:
    """Raises CheckpointError if a weight is of whole numbers, which transformers would take for what they stand for."""
    sparsity = read_model_config(folder).get("quantization_config")
    if sparsity is not None and sparsity.get("quant_method") != QUANT_METHOD:
        return  # such weights are what another quantization makes
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in TensorFile(path).entries.items():
            if name.endswith((".weight", ".bias")) and not entry.dtype.startswith(("F", "BF")):
                raise CheckpointError(f"Expected {name} in {path} to be of a floating-point dtype, got {entry.dtype}.")


def load_tokenizer(name: str | os.PathLike) -> Any:
    """The tokenizer of a local folder or a hub name, as `load` loads it."""
    import transformers

    if Path(name).exists():
        read_model_config(Path(name))
    with _loading(name):
        return transformers.AutoTokenizer.from_pretrained(name)


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
    path = folder / "config.json"
    if not folder.is_dir() or not path.is_file():
        raise PrunePathError(f"Expected a model folder with a config.json, but {path} is not there.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Expected {path} to be a model's configuration in JSON, but: {error}.") from error
    sparsity = config.get("quantization_config")
    if isinstance(sparsity, dict) and sparsity.get("quant_method") == QUANT_METHOD:
        SparseDescription.from_dict(sparsity)
    return config


def check_routers(model: nn.Module) -> None:
    """Raises CheckpointError if a router holds a value that is not finite."""
    for path, ffn in sparse_ffns(model).items():
        for name, tensor in ffn.router.named_parameters():
            if not math.isfinite(tensor.detach().float().sum().item()):
                raise CheckpointError(f"Expected finite numbers in {path}.router.{name}, but it has NaN or infinite ones.")
