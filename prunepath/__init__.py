"""Sparse language models with a knob: FFNs as experts, routed by cumulative probability mass (arXiv 2605.28283).

    model = prunepath.convert(model, tokenizer, texts, prunepath.PrunePathConfig(num_experts=64))
    prunepath.set_budget(model, 0.25)

Importing this package registers `torch.ops.prunepath.*` and lets transformers' `from_pretrained` load sparse
checkpoints as sparse models.
"""

from prunepath.config import PrunePathConfig
from prunepath.convert.adapters import FFNAdapter, register_adapter
from prunepath.errors import BackendError, CheckpointError, NativeLibraryError, PrunePathError
from prunepath.integrations import register as _register_integrations
from prunepath.modeling import (
    calibrate,
    convert,
    get_thresholds,
    is_sparse,
    load,
    record_counts,
    save,
    set_budget,
    set_request_budgets,
    set_threshold,
    sparse_ffns,
)
from prunepath.nn import FFNLayout, SparseFFN

__version__ = "0.1.0"

_register_integrations()

__all__ = [
    "BackendError",
    "CheckpointError",
    "FFNAdapter",
    "FFNLayout",
    "NativeLibraryError",
    "PrunePathConfig",
    "PrunePathError",
    "SparseFFN",
    "calibrate",
    "convert",
    "get_thresholds",
    "is_sparse",
    "load",
    "record_counts",
    "register_adapter",
    "save",
    "set_budget",
    "set_request_budgets",
    "set_threshold",
    "sparse_ffns",
]
