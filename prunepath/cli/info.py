from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from prunepath.cli.common import JsonOption
from prunepath.cli.results import printing
from prunepath.errors import CheckpointError


def info(
    out: Annotated[str | None, typer.Argument(metavar="[OUT]", help="Checkpoint folder to describe.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Describe this installation, or a checkpoint."""
    with printing(as_json) as results:
        description = describe_installation() if out is None else describe_checkpoint(out)
        results.json(description)
        results.fields(_summary(description))


def describe_installation() -> dict:
    import platform

    import torch

    import prunepath
    from prunepath import native, ops

    try:
        from prunepath import _host
    except ImportError as error:
        build, features = {"missing": str(error)}, {}
    else:
        build, features = _host.build_info(), _host.cpu_features()
    return {
        "prunepath": prunepath.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "libraries": {"_C": native.error() or "loaded", "_C_cuda": native.cuda_error() or "loaded"},
        "backends": ops.backends(),
        "cpu_kernel": ops.cpu_kernel() if ops.backends()["cpu"] == "available" else None,
        "cpu_features": features,
        "build": build,
    }


def describe_checkpoint(path: str | Path) -> dict:
    """A checkpoint as its folder tells it, without loading the weights."""
    from safetensors import SafetensorError, safe_open

    from prunepath.checkpoint.description import QUANT_METHOD, SparseDescription
    from prunepath.checkpoint.loading import read_model_config

    folder = Path(path)
    config = read_model_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"Expected weights in {folder}, but it has no .safetensors file.")
    weights, routers, packed = 0, 0, False
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                packed = packed or (tensors.metadata() or {}).get("prunepath") == "packed"
                for name in tensors.keys():
                    if name.startswith("padding."):
                        continue
                    stored = tensors.get_slice(name)
                    # Of packed tables a byte holds two.
                    size = math.prod(stored.get_shape()) * (2 if stored.get_dtype() == "U8" else 1)
                    weights += size
                    routers += size if ".router." in name else 0
        except SafetensorError as error:
            raise CheckpointError(f"Expected {file} to be a whole safetensors file, but: {error}.") from error
    description = {
        "path": str(folder),
        "architecture": ", ".join(config.get("architectures") or ["unknown"]),
        "family": config.get("model_type"),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "parameters": weights,
        "megabytes": sum(file.stat().st_size for file in files) / 1e6,
        "sparse": False,
    }
    sparsity = config.get("quantization_config")
    if not isinstance(sparsity, dict) or sparsity.get("quant_method") != QUANT_METHOD:
        return description
    sparse = SparseDescription.from_dict(sparsity)
    return description | {
        "sparse": True,
        "format_version": sparsity["format_version"],
        "layers": len(sparse.ffns),
        "router_parameters": routers,
        "packed": packed,
        "conversion": dataclasses.asdict(sparse.config),
        "calibration": sparse.calibration,
        "thresholds": sparse.thresholds,
        "budgets": {f"{budget:g}": values for budget, values in sorted(sparse.budgets.items(), reverse=True)},
    }


def _summary(value: Any) -> Any:
    """`value` with the range of its numbers in the place of each list that has one for every FFN."""
    if isinstance(value, dict):
        return {name: _summary(entry) for name, entry in value.items()}
    if isinstance(value, list) and value:
        if all(isinstance(entry, dict) for entry in value):
            return {name: _summary([entry[name] for entry in value]) for name in value[0]}
        if all(isinstance(entry, float) for entry in value):
            return f"{min(value):.4f} to {max(value):.4f} in {len(value)} FFNs"
    return value


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
