"""Robot units <-> normalised values, per dimension, in the conventions of SpatialVLA, LeRobot and TinyVLA."""

import logging
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_vla.actions.values import EPSILON, check_finite, is_constant

logger = logging.getLogger(__name__)

# mode -> the two statistics it needs, and the interval it maps them to (None: unbounded)
MODES: dict[str, tuple[tuple[str, ...], tuple[float, float] | None]] = {
    "quantile": (("q01", "q99"), (-1.0, 1.0)),
    "quantile10": (("q10", "q90"), (-1.0, 1.0)),
    "min_max": (("min", "max"), (-1.0, 1.0)),
    "zero_one": (("min", "max"), (0.0, 1.0)),
    "mean_std": (("mean", "std"), None),
    "identity": ((), None),
}
CONVENTIONS = ("spatialvla", "lerobot", "tinyvla")
TINYVLA_MARGIN = 1e-4  # by which TinyVLA widens min..max on both sides, robot units
TINYVLA_LEAST_STD = 1e-2


class ActionNormalizer:
    """An affine map per dimension: `normalize` to model targets, `unnormalize` back to robot units.

    Modes: `"quantile"` (q01..q99 to [-1, 1]), `"quantile10"` (q10..q90 to [-1, 1]), `"min_max"` (min..max to [-1, 1]),
    `"zero_one"` (min..max to [0, 1], for grippers), `"mean_std"` ((x - mean) / std) and `"identity"`. The conventions
    differ in what surrounds these formulas:

    - `"spatialvla"`: divides by (high - low + 1e-8) and clips to the interval; constant dimensions become 0.
    - `"lerobot"`: no 1e-8 (but in `mean_std`), no clipping, statistics rounded to float32 as LeRobot holds them;
      constant dimensions become -1 (`mean_std`: 0), which is what LeRobot gives where they hold their constant.
    - `"tinyvla"`: no 1e-8, no clipping; `min_max` maps min - 1e-4..max + 1e-4, `mean_std` takes a std of 0.01 at
      least, both in the inverse, too; constant dimensions become 0.

    The inverse uses the plain range, without the 1e-8, and never clips. A dimension is constant where the mode's
    range, or min..max where known, is empty (see `hf_vla.actions.values.is_constant`): it is logged, every value
    normalises to the one number above and every prediction decodes to the constant, so that nothing is divided by
    nearly zero.

    Args:
        statistics (`dict`): arrays or lists of D numbers in LeRobot's names, see `ActionStatistics.to_dict`; only
            those that the modes need are read. May hold `"mask"`.
        mode (`str` or `list[str]`): one for all dimensions or one each.
        mask (`list[bool]`, *optional*): False leaves a dimension unchanged. Default: the statistics' mask or all True.
        clip (`bool`, *optional*): clip normalised values to the mode's interval. Default: the convention's.
        convention (`str`): `"spatialvla"`, `"lerobot"` or `"tinyvla"`.

    Raises:
        ValueError: a statistic is missing, not finite, of another length or upside down, or an argument is unknown.

    Source: SpatialVLA's processor, LeRobot 0.4.4's normaliser, TinyVLA's dataset (all recorded in the tests).
    """

    def __init__(
        self,
        statistics: dict[str, Any],
        mode: str | list[str] = "quantile",
        mask: list[bool] | None = None,
        clip: bool | None = None,
        convention: str = "spatialvla",
    ):
        if convention not in CONVENTIONS:
            raise ValueError(f"Expected a normalization convention among {list(CONVENTIONS)}, came {convention!r}.")
        if clip is not None and not isinstance(clip, bool):
            raise ValueError(f"Expected clip to be true or false, came {clip!r}.")
        statistics = statistics or {}
        mask = statistics.get("mask") if mask is None else mask
        self.action_dim = _action_dim(statistics, mode, mask)
        self.mask = np.ones(self.action_dim, bool) if mask is None else _vector(mask, "mask", self.action_dim, bool)
        modes = [mode] * self.action_dim if isinstance(mode, str) else list(mode)
        self.mode = _checked_modes(modes, self.action_dim)
        self.clip = convention == "spatialvla" if clip is None else clip
        self.convention = convention
        self.constant = np.zeros(self.action_dim, bool)
        self._scale, self._inverse_scale = np.ones((2, self.action_dim))
        self._offset, self._inverse_offset = np.zeros((2, self.action_dim))
        self._bounds = np.full((2, self.action_dim), [[-np.inf], [np.inf]])
        for name in dict.fromkeys(self.mode):
            dimensions = np.array([own == name for own in self.mode]) & self.mask
            if name != "identity" and dimensions.any():
                self._prepare(name, dimensions, statistics)
        if self.constant.any():
            logger.warning(
                "Action dimensions %s are constant in these statistics; they normalise to a constant and every "
                "prediction decodes to the recorded value.",
                np.flatnonzero(self.constant).tolist(),
            )

    def normalize(self, actions: ArrayLike) -> np.ndarray:
        """Map robot units to normalised values.

        Args:
            actions (`np.ndarray` of shape `(..., D)`): robot units.

        Returns:
            `np.ndarray` of the same shape: float64 for float64 (or integers), else float32.

        Raises:
            ValueError: the last axis is not D, or a value is NaN or infinite.
        """
        values = self._checked(actions, "actions")
        normalized = values * self._scale
        normalized += self._offset
        if self.clip:
            np.clip(normalized, *self._bounds, out=normalized)
        return normalized.astype(np.result_type(values, np.float32), copy=False)

    def unnormalize(self, normalized_actions: ArrayLike) -> np.ndarray:
        """Map normalised values to robot units; the inverse of `normalize`, same shapes, types and errors."""
        values = self._checked(normalized_actions, "normalized actions")
        actions = values * self._inverse_scale
        actions += self._inverse_offset
        return actions.astype(np.result_type(values, np.float32), copy=False)

    def _prepare(self, mode, dimensions, statistics):
        """Set scales, offsets and bounds of the dimensions that share a mode."""
        names, interval = MODES[mode]
        first, second = self._read(mode, names, dimensions, statistics)
        if interval is None:
            low, span, width, start = first, second, 1.0, 0.0  # the mean goes to 0, one std above it to 1
        else:
            low, span, width, start = first, second - first, interval[1] - interval[0], interval[0]
            self._bounds[:, dimensions] = np.array(interval)[:, None]
        if (span < 0).any():
            wanted = "std >= 0" if mode == "mean_std" else f"{names[0]} <= {names[1]}"
            raise ValueError(
                f"Expected {wanted}, came {names[0]}={first.tolist()}, {names[1]}={second.tolist()} for dimensions "
                f"{np.flatnonzero(dimensions).tolist()}; compute the statistics anew."
            )
        constant = is_constant(low, low + span)
        if statistics.get("min") is not None and statistics.get("max") is not None:
            constant |= is_constant(*self._read(mode, ("min", "max"), dimensions, statistics))
        if self.convention == "tinyvla" and mode == "min_max":
            margin = np.where(constant, 0.0, TINYVLA_MARGIN)
            low, span = low - margin, span + 2 * margin
        elif self.convention == "tinyvla" and mode == "mean_std":
            span = np.maximum(span, TINYVLA_LEAST_STD)
        with_epsilon = self.convention != "tinyvla" and (
            mode == "mean_std" or (self.convention == "spatialvla" and mode != "zero_one")
        )
        scale = np.where(constant, 0.0, width / np.where(constant, 1.0, span + EPSILON * with_epsilon))
        constant_value = start if self.convention == "lerobot" else 0.0
        self.constant[dimensions] = constant
        self._scale[dimensions] = scale
        self._offset[dimensions] = np.where(constant, constant_value, start - low * scale)
        self._inverse_scale[dimensions] = inverse = np.where(constant, 0.0, span / width)
        self._inverse_offset[dimensions] = low - start * inverse

    def _read(self, mode, names, dimensions, statistics):
        if missing := [name for name in names if statistics.get(name) is None]:
            raise ValueError(
                f"Normalization mode {mode!r} needs the statistics {missing}; came {sorted(statistics)}. Compute them "
                "with ActionStatistics (LeRobot v2.1 files hold no quantiles), or choose another mode."
            )
        values = [_vector(statistics[name], name, self.action_dim)[dimensions] for name in names]
        for name, array in zip(names, values, strict=True):
            check_finite(array[None], f"statistics {name!r}")
        if self.convention == "lerobot":
            values = [array.astype(np.float32).astype(np.float64) for array in values]
        return values

    def _checked(self, actions, what):
        actions = np.asarray(actions)
        if actions.ndim == 0 or actions.shape[-1] != self.action_dim:
            raise ValueError(f"Expected {what} of shape (..., {self.action_dim}), came {actions.shape}.")
        check_finite(actions, what)
        return actions


def _action_dim(statistics, mode, mask):
    known = [statistics[name] for names, _ in MODES.values() for name in names if statistics.get(name) is not None]
    for sized in (*known, mask, None if isinstance(mode, str) else mode):
        if sized is not None:
            return len(sized)
    raise ValueError(f"Normalization mode {mode!r} needs statistics; came {sorted(statistics)}.")


def _checked_modes(modes, action_dim):
    if len(modes) != action_dim:
        raise ValueError(f"Expected one normalization mode for each of {action_dim} dimensions, came {len(modes)}.")
    if unknown := sorted(set(modes) - set(MODES)):
        raise ValueError(f"Unknown normalization modes {unknown}; known are {sorted(MODES)}.")
    return modes


def _vector(values, name, action_dim, dtype=np.float64):
    values = np.asarray(values, dtype=dtype)
    if values.shape != (action_dim,):
        raise ValueError(f"Expected {name!r} for {action_dim} dimensions, came shape {values.shape}.")
    return values
