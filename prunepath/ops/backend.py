"""Which implementation of the operators this process uses: the registry of backends."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

from prunepath import native
from prunepath.errors import BackendError, NativeLibraryError
from prunepath.ops import fakes, reference

NAMES = ("triton", "cuda", "cpu", "reference")
_chosen = os.environ.get("PRUNEPATH_BACKEND") or "auto"
_resolved: dict[tuple[str, torch.device], Backend] = {}


@dataclasses.dataclass(frozen=True)
class Backend:
    """The operators of one implementation; each callable has the signature of `prunepath.ops`."""

    name: str
    route: Callable
    select: Callable
    sparse_ffn: Callable
    routed_ffn: Callable


def backends() -> dict[str, str]:
    """Every backend's name, with `available` or one sentence saying why it is not."""
    return {name: _missing(name) or "available" for name in NAMES}


def cpu_kernel() -> str:
    """Which of the CPU's kernels this process uses: `avx512_bf16`, `avx512`, `avx2` or `portable`.

    The best that the processor has, unless the environment variable `PRUNEPATH_CPU_KERNEL` named one when it was
    first needed.

    Raises:
        BackendError: the variable names none that this processor supports.
        NativeLibraryError: the compiled library did not load.
    """
    native.require()
    try:
        return torch.ops.prunepath.cpu_kernel()
    except RuntimeError as error:
        raise BackendError(str(error)) from None


def use_backend(name: str) -> None:
    """Chooses the backend of every sparse FFN in this process; the environment variable `PRUNEPATH_BACKEND` does too.

    Args:
        name: `auto`, `triton`, `cuda`, `cpu` or `reference`; `auto` is `cpu` on a CPU and `cuda` on a GPU. Where
            PrunePath's CUDA library is missing or the GPU is not one that it was compiled for, as with AMD's GPUs, it
            is `triton`, and without Triton `reference`, each with a warning.

    Raises:
        BackendError: there is no such backend.
    """
    global _chosen
    if name not in ("auto", *NAMES):
        raise BackendError(f"Expected a backend out of auto, {', '.join(NAMES)}, got {name!r}.")
    _chosen = name


def resolve_backend(device: torch.device, name: str | None = None) -> Backend:
    """The backend for tensors on `device`.

    Args:
        device: where they are.
        name: as of `use_backend`; None is the one that it chose for this process.

    Raises:
        BackendError: there is no such backend, or it is not available here or for this device.
        NativeLibraryError: it is `auto` or `cpu`, and the compiled library did not load.
    """
    name = name or _chosen
    if torch.compiler.is_compiling():
        _remember(name, device)
    backend = _resolved.get((name, device))
    if backend is None:
        backend = _resolved[name, device] = _resolve(name, torch.device(device))
    return backend


@torch.compiler.assume_constant_result
def _remember(name: str, device: torch.device) -> None:
    """Remembers a backend before a trace reads what is remembered: else the next call would be compiled anew."""
    if (name, device) not in _resolved:
        with contextlib.suppress(BackendError, NativeLibraryError):  # which the trace meets itself
            _resolved[name, device] = _resolve(name, device)


def _resolve(name: str, device: torch.device) -> Backend:
    if name == "auto":
        name = _automatic(device)
    if name not in NAMES:
        raise BackendError(f"Expected a backend out of auto, {', '.join(NAMES)}, got {name!r}.")
    if name == "cpu":
        native.require()
    reason = _missing(name, device)
    if reason is not None:
        raise BackendError(reason)
    if name in ("cpu", "cuda") and device.type != name:
        raise BackendError(f"The backend {name} works on {name} tensors, got the device {device}.")
    if name == "triton" and device.type != "cuda" and not _interpreting():
        raise BackendError(f"The backend triton works on cuda tensors, got the device {device}.")
    if name == "reference":
        return Backend(name, reference.route, reference.select, reference.sparse_ffn, reference.routed_ffn)
    return _triton() if name == "triton" else _native(name)


def _native(name: str) -> Backend:
    from prunepath import ops  # here, because it imports this module

    native_ops = torch.ops.prunepath
    return Backend(name, ops.route, ops.select, native_ops.sparse_ffn.default, native_ops.routed_ffn.default)


def _automatic(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise BackendError(f"No backend was made for the device {device}; reference works on any device.")
    reason = native.cuda_error() or _outdated(device)
    if reason is None:
        return "cuda"
    name = "reference" if _missing("triton") else "triton"
    warnings.warn(f"The backend {name} is used on {device}. {reason}", stacklevel=3)
    return name


def _missing(name: str, device: torch.device | None = None) -> str | None:
    """Why a backend is not available, on `device` or at all, as one sentence, or None."""
    if name == "cpu":
        if native.error() is not None or not os.environ.get("PRUNEPATH_CPU_KERNEL"):
            return native.error()  # unless the variable asks for one, there are always kernels
        try:
            cpu_kernel()
        except BackendError as error:
            return str(error)
        return None
    if name == "cuda":
        if native.cuda_error() is not None:
            return native.cuda_error()
        if not torch.cuda.is_available():
            return "The backend cuda needs a GPU, and torch sees none."
        return _outdated(device if device is not None and device.type == "cuda" else None)
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "The backend triton needs the package triton: pip install triton."
        if not torch.cuda.is_available() and not _interpreting():
            return "The backend triton needs a GPU, and torch sees none."
    return None


def _outdated(device: torch.device | None) -> str | None:
    """Why PrunePath's CUDA library, which is loaded, has no code for a GPU as old as `device`, or None."""
    oldest = min(map(int, torch.ops.prunepath.cuda_architectures().split(",")))
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor >= oldest:
        return None
    return (
        f"PrunePath's library _C_cuda was compiled for GPUs of compute capability {oldest // 10}.{oldest % 10} or "
        f"newer, got {torch.cuda.get_device_name(device)} of {major}.{minor}."
    )


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton() -> Backend:
    """Triton's functions, which are operators where `torch.compile` traces a call: it would trace their launches.

    Elsewhere they are called as they are, which costs less. Without the compiled library there are no operators.
    """
    from prunepath.triton_kernels.route import route, select
    from prunepath.triton_kernels.routed_ffn import routed_ffn
    from prunepath.triton_kernels.sparse_ffn import sparse_ffn

    functions = {"route": route, "select": select}
    functions |= {f"{name}.tensor": function for name, function in functions.items()}
    functions |= {"sparse_ffn": sparse_ffn, "routed_ffn": routed_ffn}
    names = ("route", "select", "sparse_ffn", "routed_ffn")
    if native.error() is not None:
        return Backend("triton", *[functions[name] for name in names])
    fakes.register_twins("prunepath_triton", functions)

    def either(name: str) -> Callable:
        function, operator = functions[name], getattr(torch.ops.prunepath_triton, name)
        return lambda *args, **kwargs: (operator if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return Backend("triton", *[either(name) for name in names])
