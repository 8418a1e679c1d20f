"""Budgets and thresholds: checking them, and reading a calibrated table."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Any

from prunepath.errors import PrunePathError

SMALLEST_THRESHOLD = 2.0**-24
"""Stands for "the fewest experts" where a threshold must be greater than zero."""
LARGEST_THRESHOLD = 1.0 - 2.0**-24
"""The float32 below 1, where a threshold must not make the model dense."""


def check_fraction(name: str, value: Any) -> float:
    """`value`, which may be a scalar of numpy or torch, as a float, or an error if it is no number in (0, 1]."""
    number = float("nan")
    try:
        scalar = value.item() if hasattr(value, "item") else value
        if not isinstance(scalar, str | bytes | bool):
            number = float(scalar)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of tensors with no or several values
        pass
    if not 0.0 < number <= 1.0:
        raise PrunePathError(f"{name} must be a number in (0, 1], got {_shown(value)}.")
    return number


def check_each(name: str, values: Any) -> list[float]:
    """A list of fractions, one for each sequence of a batch, or an error if `values` is none or empty."""
    fractions = [check_fraction(name, value) for value in values] if is_list(values) else []
    if not fractions:
        raise PrunePathError(f"Expected a {name} for each sequence of a batch, got {_shown(values)}.")
    return fractions


def is_list(value: Any) -> bool:
    """Whether `value` is several values, as arrays of numpy and torch are if they have a dimension, and no text."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) > 0


def _shown(value: Any) -> str:
    """`value` as a sentence can name it."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}…"


def interpolate_thresholds(table: dict[float, list[float]], budget: float) -> list[float]:
    """Thresholds of each FFN for `budget`, linear between the table's budgets.

    Beyond its ends the table continues to the fewest experts at budget 0, and to all of them at budget 1.
    """
    budget = check_fraction("budget", budget)
    num_ffns = len(next(iter(table.values())))
    points = {0.0: [SMALLEST_THRESHOLD] * num_ffns, 1.0: [1.0] * num_ffns, **table}
    budgets = sorted(points)
    above = bisect.bisect_left(budgets, budget)
    low, high = budgets[above - 1], budgets[above]
    share = (budget - low) / (high - low)
    return [a + share * (b - a) for a, b in zip(points[low], points[high], strict=True)]
