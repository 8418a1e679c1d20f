"""The sparse FFNs of a whole model."""

from __future__ import annotations

from torch import nn

from prunepath.errors import PrunePathError
from prunepath.nn.sparse_ffn import SparseFFN


def sparse_ffns(model: nn.Module) -> dict[str, SparseFFN]:
    """The model's sparse FFNs by dotted path, in the order of its modules; empty for a dense model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SparseFFN)}


def is_sparse(model: nn.Module) -> bool:
    """Whether `model` has been converted."""
    return any(isinstance(module, SparseFFN) for module in model.modules())


def require_sparse_ffns(model: nn.Module) -> dict[str, SparseFFN]:
    """`sparse_ffns` of a model that has some.

    Raises:
        PrunePathError: for a dense model.
    """
    ffns = sparse_ffns(model)
    if not ffns:
        raise PrunePathError(
            f"Expected a model converted by prunepath, got a dense {type(model).__name__}: convert it, or import "
            "prunepath before loading it."
        )
    return ffns


def for_inference(model: nn.Module) -> nn.Module:
    """Lays the weights of a sparse model's FFNs out as the kernels read them: each neuron's in one place.

    Down projections [H, D] are stored column by column; their values, shapes and names stay. The tables of routers of 4
    bits are packed (`prunepath.nn.Router`). Conversion, loading and the end of training call this. Weights that have
    been replaced since then need it once more.

    Returns:
        `model`.
    """
    for ffn in require_sparse_ffns(model).values():
        ffn.lay_out_for_inference()
    return model


def for_training(model: nn.Module) -> nn.Module:
    """Lays the weights of a sparse model's FFNs out row by row, as a dense model's are.

    FSDP, DeepSpeed and optimisers that flatten parameters need it; others train in either layout. The packed tables of
    routers become parameters: an optimiser that is made before training starts needs it too.

    Returns:
        `model`.
    """
    for ffn in require_sparse_ffns(model).values():
        ffn.lay_out_for_training()
    return model
