"""The knob of a sparse model: thresholds and budgets, for all requests or for each."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from torch import nn

from prunepath.checkpoint.description import describe, description_of, unwrapped
from prunepath.errors import PrunePathError
from prunepath.nn.model import require_sparse_ffns
from prunepath.nn.observers import CountRecord, counting, padding_masks
from prunepath.nn.thresholds import check_each, check_fraction, interpolate_thresholds, is_list

# Held while all FFNs' knobs turn, so that threads that turn them at once leave a model at one of their settings.
_turning = threading.Lock()


def get_thresholds(model: nn.Module) -> list[float]:
    """The current threshold τ of each FFN, in the order of the model's modules."""
    return [ffn.threshold for ffn in require_sparse_ffns(model).values()]


def set_threshold(model: nn.Module, threshold: float | Sequence[float]) -> None:
    """Sets the probability mass that a token's experts must cover, also in the checkpoint that the model saves.

    Args:
        model: a sparse model, also inside DataParallel, DistributedDataParallel or torch.compile.
        threshold: τ in (0, 1] for every FFN, or one for each. 1.0 is exactly dense.
    """
    ffns = require_sparse_ffns(model)
    if is_list(threshold):
        values = [check_fraction("threshold", value) for value in threshold]
        if len(values) != len(ffns):
            raise PrunePathError(f"Expected one threshold for each of the {len(ffns)} FFNs, got {len(values)}.")
    else:
        values = [check_fraction("threshold", threshold)] * len(ffns)
    with _turning:
        for ffn, value in zip(ffns.values(), values, strict=True):
            ffn.threshold = value
        description = description_of(model)
        description.thresholds = values
        describe(model, description)


def set_budget(model: nn.Module, budget: float) -> None:
    """Sets the thresholds that calibration found for an active fraction.

    Args:
        model: as for `set_threshold`.
        budget: the wanted mean share of FFN neurons that a token computes, in (0, 1]; 1.0 is exactly dense.
    """
    description = description_of(model)
    set_threshold(model, budget_thresholds(description.budgets, budget, len(description.ffns)))


def set_request_budgets(model: nn.Module, budgets: Sequence[float] | None) -> None:
    """Gives each sequence of a batch its own budget, until `set_budget` or `set_threshold` sets one for all.

    What a checkpoint stores, and `get_thresholds` returns, stays as those two left it. A captured CUDA graph follows as
    long as the number of sequences stays.

    Args:
        model: as for `set_threshold`.
        budgets: B budgets as of `set_budget`, for calls of B sequences alone, or of as many beams of each; None returns
            to one budget for all.

    Raises:
        PrunePathError: for no budgets, or one outside (0, 1]. A call of another number of sequences raises it too.
    """
    ffns = list(require_sparse_ffns(model).values())
    if budgets is None:
        with _turning:
            for ffn in ffns:
                ffn.set_request_thresholds(None)
        return
    table = description_of(model).budgets
    columns = [budget_thresholds(table, budget, len(ffns)) for budget in check_each("budget", budgets)]
    with _turning:
        for ffn, values in zip(ffns, zip(*columns, strict=True), strict=True):
            ffn.set_request_thresholds(values)


def budget_thresholds(table: dict[float, list[float]], budget: float, num_ffns: int) -> list[float]:
    """Each FFN's threshold for a budget, by a calibrated table.

    Raises:
        PrunePathError: for a budget outside (0, 1], or an empty table.
    """
    budget = check_fraction("budget", budget)
    if budget == 1.0:
        return [1.0] * num_ffns
    if not table:
        raise PrunePathError("This model has no calibrated budgets: convert it again, or use set_threshold.")
    return interpolate_thresholds(table, budget)


@contextlib.contextmanager
def record_counts(model: nn.Module) -> Iterator[CountRecord]:
    """Records how many experts each token runs, padding left out, inside a `with` block.

    Yields:
        A `CountRecord`, whose `active_fraction`, `per_layer` and `histogram` cover all calls so far.
    """
    with padding_masks(unwrapped(model)), counting(require_sparse_ffns(model).values()) as record:
        yield record
