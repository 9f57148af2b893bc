"""Checks of numbers that a dataset, or its statistics, hold."""

from collections.abc import Mapping
from typing import Any

import numpy as np

EPSILON = 1e-8


def check_finite(values: np.ndarray, what: str = "actions") -> None:
    """Raise a ValueError that names the first row and dimension where `values` (..., D) are NaN or infinite."""
    finite = np.isfinite(values)
    if not finite.all():
        row, dimension = np.argwhere(~finite.reshape(-1, values.shape[-1]))[0].tolist()
        value = values.reshape(-1, values.shape[-1])[row, dimension]
        raise ValueError(
            f"Expected finite {what}, came {value} at row {row}, dimension {dimension} of {values.shape}; "
            "drop or repair these rows, or mask the dimension where the data are wrong."
        )


def is_constant(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether each range is empty up to rounding: `high - low <= 1e-8 * max(1, |low|, |high|)`."""
    return high - low <= EPSILON * np.maximum(1.0, np.maximum(np.abs(low), np.abs(high)))


def middle(statistics: Mapping[str, Any], size: int) -> np.ndarray:
    """Return the mean of recorded values; where it is not known, the middle of their range; else zeros.

    Args:
        statistics (`Mapping`): of actions or states, see [`~hf_vla.actions.statistics`].
        size (`int`): their number of dimensions, D.

    Returns:
        `np.ndarray` of shape `(D,)`: float64, robot units.
    """
    if statistics.get("mean") is not None:
        return np.asarray(statistics["mean"], np.float64)
    for low, high in (("q01", "q99"), ("q10", "q90"), ("min", "max")):
        if statistics.get(low) is not None and statistics.get(high) is not None:
            return np.add(statistics[low], statistics[high]) / 2
    return np.zeros(size)
