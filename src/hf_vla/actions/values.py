"""Checks of numbers that a dataset, or its statistics, hold."""

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
