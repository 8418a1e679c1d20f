"""Budgets and thresholds: checking them, and reading a calibrated table."""

from __future__ import annotations

import bisect

from prunepath.errors import PrunePathError

SMALLEST_THRESHOLD = 2.0**-24
"""Stands for "the fewest experts" where a threshold must be greater than zero."""
LARGEST_THRESHOLD = 1.0 - 2.0**-24
"""The float32 below 1, where a threshold must not make the model dense."""


def check_fraction(name: str, value: float) -> float:
    """`value` as a float, or an error if it is no number in (0, 1]."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not 0.0 < number <= 1.0:
        raise PrunePathError(f"{name} must be a number in (0, 1], got {value!r}.")
    return number


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
