"""Loads the compiled operator libraries, and says in one sentence why one is not there.

`_C` (schemas and CPU kernels) and `_C_cuda` are libraries of LibTorch's stable ABI, registered with
`torch.ops.load_library`. `_host` is an ordinary Python extension: `import prunepath._host`.
"""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import torch

from prunepath.errors import NativeLibraryError

_FOLDER = Path(__file__).parent
_INSTALL = "`pip install .` builds and installs it, `python setup.py build_ext --inplace` builds it in the source tree"

_loaded = False
_error: str | None = None
_cuda_error: str | None = None


def load() -> None:
    """Registers `torch.ops.prunepath.*` once: `_C`, then `_C_cuda` where torch is a CUDA build. Never raises.

    What went wrong is in `error()` and `cuda_error()`.
    """
    global _loaded, _error, _cuda_error
    if _loaded:
        return
    _loaded = True
    _error = _load_library("_C")
    if _error is not None:
        _cuda_error = _error
    elif torch.version.cuda is None:
        _cuda_error = f"PrunePath's library _C_cuda needs a CUDA build of torch, got torch {torch.__version__}."
    else:
        _cuda_error = _load_library("_C_cuda")


def error() -> str | None:
    """Why `_C` did not load and how to get it, as one sentence; None if it is loaded."""
    load()
    return _error


def cuda_error() -> str | None:
    """Why `_C_cuda` did not load and how to get it, as one sentence; None if it is loaded."""
    load()
    return _cuda_error


def require() -> None:
    """Raises NativeLibraryError with the sentence of `error()` unless `_C` is loaded."""
    load()
    if _error is not None:
        raise NativeLibraryError(_error)


def _load_library(name: str) -> str | None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 11):
        return f"PrunePath's library {name} needs torch 2.11 or newer, got torch {torch.__version__}."
    paths = [_FOLDER / (name + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        needs = " where nvcc is found" if name == "_C_cuda" else ""
        return f"PrunePath's library {name} is missing: expected {paths[0]}; {_INSTALL}{needs}."
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as failure:
        # load_library names the file alone; the linker's reason, such as an undefined symbol, is the cause.
        reason = _first_line(failure.__cause__ or failure)
        return f"PrunePath's library {name} does not load ({reason}); {_INSTALL}."
    return None


def _first_line(failure: BaseException) -> str:
    lines = str(failure).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(failure).__name__
