"""Rotations of end effectors, from any of the field's formats to any other; the mathematics is scipy's."""

import re

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

_SHAPES: dict[str, tuple[int, ...]] = {
    "axis_angle": (3,),
    "quaternion_wxyz": (4,),
    "quaternion_xyzw": (4,),
    "rot6d": (6,),
    "matrix": (3, 3),
}
_EULER = re.compile(r"euler_(?!.*(.)\1)([xyz]{3}|[XYZ]{3})")
_DEGENERATE = 1e-6  # shorter vectors have no direction worth trusting
_ENDLESS = 1e100  # radians; the square of the angle must not overflow


def rotation_shape(rotation_format: str) -> tuple[int, ...]:
    """Return the trailing shape of one rotation, which also checks the name of the format.

    Args:
        rotation_format (`str`): `"euler_xyz"` (lower case: extrinsic, about fixed axes, in the order named) or
            `"euler_XYZ"` (upper case: intrinsic), any order of axes without equal neighbours, in radians;
            `"axis_angle"` (rotation vector, radians), `"quaternion_wxyz"`, `"quaternion_xyzw"`, `"rot6d"` (the first
            two rows of the matrix, row after row) or `"matrix"`.

    Returns:
        `tuple[int, ...]`: for example `(3,)`, or `(3, 3)` for a matrix.

    Raises:
        ValueError: the format is unknown.
    """
    if _EULER.fullmatch(str(rotation_format)):
        return (3,)
    if rotation_format not in _SHAPES:
        raise ValueError(
            f"Unknown rotation format {rotation_format!r}; expected one of {sorted(_SHAPES)}, or Euler angles with "
            "their order of axes: 'euler_xyz' (extrinsic) or 'euler_XYZ' (intrinsic)."
        )
    return _SHAPES[rotation_format]


def convert(rotation: ArrayLike, source: str, target: str) -> np.ndarray:
    """Convert rotations between formats.

    Quaternions come out with w >= 0, so that q and -q (the same rotation) give the same numbers. At gimbal lock the
    Euler angles are not unique: the third one is set to zero and the three still name the same rotation.

    Args:
        rotation (`np.ndarray` of shape `(..., *rotation_shape(source))`): radians where the format has angles.
            Quaternions need not have unit norm; rot6d is orthonormalised by Gram-Schmidt (first row kept), matrices
            to the nearest rotation.
        source (`str`): format of `rotation`, see `rotation_shape`.
        target (`str`): wanted format.

    Returns:
        `np.ndarray` of shape `(..., *rotation_shape(target))`: float64.

    Raises:
        ValueError: a format is unknown, the shape does not fit it, a value is NaN or infinite, or the numbers name no
            rotation (zero quaternion, parallel or zero rot6d rows, singular or mirroring matrix, endless angle).

    Source: rot6d, Zhou et al. 2019, https://huggingface.co/papers/1812.07035; the rest, scipy's `Rotation`.
    """
    shape, target_shape = rotation_shape(source), rotation_shape(target)
    values = np.asarray(rotation, dtype=np.float64)
    if values.shape[-len(shape) :] != shape:
        raise ValueError(f"Expected {source} of shape (..., {', '.join(map(str, shape))}), came {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError(f"Expected finite {source} values, came NaN or infinity; check the recording or the model.")
    leading = values.shape[: values.ndim - len(shape)]
    if 0 in leading:
        return np.empty(leading + target_shape)
    result = _to_format(_from_format(values.reshape(-1, *shape), source), target)
    return result.reshape(leading + target_shape)


def _from_format(values, source):
    if source == "axis_angle":
        _require(np.abs(values).max(axis=1) < _ENDLESS, source, values)
        return Rotation.from_rotvec(values)
    if source == "rot6d":
        return Rotation.from_matrix(_gram_schmidt(values))
    if source == "matrix":
        scaled = _tamed(values)
        _require(np.linalg.det(scaled) > _DEGENERATE * np.abs(scaled).max(axis=(1, 2)) ** 3, source, values)
        return Rotation.from_matrix(scaled)
    if source in ("quaternion_wxyz", "quaternion_xyzw"):
        return Rotation.from_quat(_unit(values, source, values), scalar_first=source == "quaternion_wxyz")
    return Rotation.from_euler(source.removeprefix("euler_"), values)


def _to_format(rotation, target):
    if target == "axis_angle":
        return rotation.as_rotvec()
    if target == "rot6d":
        return rotation.as_matrix()[:, :2]
    if target == "matrix":
        return rotation.as_matrix()
    if target in ("quaternion_wxyz", "quaternion_xyzw"):
        return rotation.as_quat(canonical=True, scalar_first=target == "quaternion_wxyz")
    return rotation.as_euler(target.removeprefix("euler_"), suppress_warnings=True)


def _gram_schmidt(values):
    first, second = (_unit(row, "rot6d", values) for row in (values[:, :3], values[:, 3:]))
    second = _unit(second - (first * second).sum(axis=1, keepdims=True) * first, "rot6d", values)
    return np.stack([first, second, np.cross(first, second)], axis=1)


def _unit(vectors, source, values):
    vectors = _tamed(vectors)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    _require(norm[:, 0] > _DEGENERATE, source, values)
    return vectors / norm


def _tamed(values):
    """Scale rows that exceed 1, as a rotation's entries never do, down to 1: their squares and cubes may overflow."""
    axes = tuple(range(1, values.ndim))
    return values / np.maximum(1.0, np.abs(values).max(axis=axes, keepdims=True))


def _require(valid, source, values):
    if not valid.all():
        row = int(np.argmin(valid))
        raise ValueError(
            f"Expected {source} values that name a rotation, came {values[row].tolist()} at row {row}, which is "
            "degenerate; check the recording or the model."
        )
