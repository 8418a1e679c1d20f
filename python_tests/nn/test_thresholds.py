import pytest

from prunepath.errors import PrunePathError
from prunepath.nn.thresholds import SMALLEST_THRESHOLD, check_fraction, interpolate_thresholds

TABLE = {0.25: [0.4, 0.5], 0.5: [0.8, 0.7]}


def test_calibrated_budgets_give_their_thresholds():
    assert interpolate_thresholds(TABLE, 0.25) == pytest.approx([0.4, 0.5])
    assert interpolate_thresholds(TABLE, 0.5) == pytest.approx([0.8, 0.7])


def test_budgets_between_are_interpolated():
    assert interpolate_thresholds(TABLE, 0.375) == pytest.approx([0.6, 0.6])


def test_the_table_ends_in_dense_and_in_the_fewest_experts():
    assert interpolate_thresholds(TABLE, 1.0) == [1.0, 1.0]
    assert interpolate_thresholds(TABLE, 0.75) == pytest.approx([0.9, 0.85])
    low = interpolate_thresholds(TABLE, 1e-9)
    assert all(SMALLEST_THRESHOLD <= value < 1e-6 for value in low)


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, float("nan"), float("inf"), None, "half"])
def test_fractions_out_of_range_are_named(value):
    with pytest.raises(PrunePathError, match=r"budget must be a number in \(0, 1\]"):
        check_fraction("budget", value)
