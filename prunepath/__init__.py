"""Sparse language models with a knob: FFNs as experts, routed by cumulative probability mass (arXiv 2605.28283).

    model = prunepath.convert(model, tokenizer, texts)
    prunepath.set_budget(model, 0.25)

Importing this package lets transformers' `from_pretrained` load sparse checkpoints as sparse models, and imports torch
only once something of it is used; `import prunepath.ops` registers `torch.ops.prunepath.*`.
"""

import importlib

from prunepath.integrations import register as _register_integrations

__version__ = "0.2.0"

_MODULES = {
    "prunepath.budgets": ("get_thresholds", "record_counts", "set_budget", "set_request_budgets", "set_threshold"),
    "prunepath.checkpoint.loading": ("load", "save"),
    "prunepath.config": ("PrunePathConfig",),
    "prunepath.conversion.convert": ("calibrate", "convert"),
    "prunepath.errors": ("BackendError", "CheckpointError", "NativeLibraryError", "PrunePathError"),
    "prunepath.families": ("FFNAdapter", "register_adapter"),
    "prunepath.nn": ("FFNLayout", "SparseFFN", "for_inference", "for_training", "is_sparse", "sparse_ffns"),
    "prunepath.ops": ("use_backend",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register_integrations()
