"""What a checkpoint expects of a robot: the meaning of every action and state number, and the cameras."""

import math
from dataclasses import MISSING, asdict, dataclass, fields, replace
from numbers import Integral
from typing import Any, ClassVar, Self

import numpy as np

from hf_vla.actions.rotations import rotation_shape

ACTION_KINDS = ("delta_ee", "absolute_ee", "joint")


@dataclass(frozen=True)
class _Spec:
    """Dictionary round trip and comparison shared by the specifications."""

    _nested: ClassVar[dict] = {}

    def to_dict(self) -> dict[str, Any]:
        """Return the specification as a JSON-safe dictionary."""
        return {name: _as_json(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Rebuild a specification from `to_dict()`.

        Raises:
            ValueError: a field is unknown or missing, or its value is not valid.
        """
        if not isinstance(values, dict):
            raise ValueError(f"Expected a dictionary for {cls.__name__}, came {type(values).__name__}.")
        known = [field.name for field in fields(cls)]
        required = [field.name for field in fields(cls) if field.default is MISSING]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"{cls.__name__} has no field {unknown}; it knows {known}.")
        if missing := [name for name in required if name not in values]:
            raise ValueError(f"{cls.__name__} needs {missing}; came only {sorted(values)}.")
        nested = {
            name: cls._nested[name].from_dict(values[name]) for name in cls._nested if values.get(name) is not None
        }
        return cls(**{**values, **nested})

    def check(self, other: "_Spec", side: str = "this", other_side: str = "the other") -> None:
        """Compare with another specification; equal ones pass silently.

        Args:
            other (same class): what the other side says.
            side, other_side (`str`): what to call the two sides in the error, for example `"the checkpoint"`.

        Raises:
            ValueError: they differ; the text names both sides and every differing field.
        """
        if type(other) is not type(self):
            raise ValueError(f"{side} is {type(self).__name__}, {other_side} is {type(other).__name__}.")
        pairs = {field.name: (getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        different = [f"{name}: {side} {a!r}, {other_side} {b!r}" for name, (a, b) in pairs.items() if a != b]
        if different:
            raise ValueError(
                f"{type(self).__name__} of {side} and of {other_side} differ in {'; '.join(different)}. "
                "Convert the data, or use a checkpoint made for this robot."
            )


@dataclass(frozen=True)
class GripperSpec(_Spec):
    """The gripper's dimension and its two ends.

    Args:
        index (`int`): position of the gripper among the action's dimensions.
        open (`float`): value of the fully open gripper, robot units.
        closed (`float`): value of the fully closed gripper, robot units.

    Raises:
        ValueError: the index is no integer or negative, or the two ends are equal or not finite.
    """

    index: int
    open: float
    closed: float

    def __post_init__(self):
        object.__setattr__(self, "index", whole_number(self.index, "a gripper index", least=0))
        if not (_is_number(self.open) and _is_number(self.closed)) or self.open == self.closed:
            raise ValueError(
                f"Expected two different, finite gripper ends, came open={self.open!r} and closed={self.closed!r}."
            )


@dataclass(frozen=True)
class ActionSpec(_Spec):
    """The meaning of each action dimension.

    Args:
        names (`tuple[str, ...]`): one per dimension, in order.
        kind (`str`): `"delta_ee"` (end-effector motion per step), `"absolute_ee"` (end-effector pose) or `"joint"`.
        rotation (`str`, *optional*): rotation format, see `hf_vla.actions.rotations.rotation_shape`.
        frame (`str`, *optional*): frame the end-effector values are given in, for example `"base"`.
        control_hz (`float`, *optional*): actions per second.
        gripper (`GripperSpec`, *optional*): None for a robot without one.

    Raises:
        ValueError: a value is not one of the above, names repeat, or the gripper's index is out of range.
    """

    names: tuple[str, ...]
    kind: str
    rotation: str | None = None
    frame: str | None = None
    control_hz: float | None = None
    gripper: GripperSpec | None = None

    _nested: ClassVar[dict] = {"gripper": GripperSpec}

    def __post_init__(self):
        object.__setattr__(self, "names", _names(self.names))
        if self.kind not in ACTION_KINDS:
            raise ValueError(f"Expected an action kind among {list(ACTION_KINDS)}, came {self.kind!r}.")
        if self.rotation is not None:
            rotation_shape(self.rotation)
            if self.kind == "joint":
                raise ValueError(f"Joint actions have no rotation format, came {self.rotation!r}; leave it None.")
        if self.control_hz is not None and not (_is_number(self.control_hz) and self.control_hz > 0):
            raise ValueError(f"Expected control_hz above 0, came {self.control_hz!r}.")
        if self.gripper is not None and self.gripper.index >= len(self.names):
            raise ValueError(f"Gripper index {self.gripper.index} is outside the {len(self.names)} action dimensions.")
        needed = 0 if self.rotation is None else 3 + math.prod(rotation_shape(self.rotation)) + bool(self.gripper)
        if needed > len(self.names):
            raise ValueError(
                f"A translation, a rotation as {self.rotation!r} and the gripper take {needed} numbers; the action "
                f"has {len(self.names)}: {list(self.names)}."
            )


@dataclass(frozen=True)
class StateSpec(_Spec):
    """The meaning of each proprioceptive state dimension.

    Args:
        names (`tuple[str, ...]`): one per dimension, in order.
        rotation (`str`, *optional*): rotation format, see `hf_vla.actions.rotations.rotation_shape`.
        frame (`str`, *optional*): frame the end-effector values are given in.

    Raises:
        ValueError: names are missing or repeat, the rotation format is unknown, or there are too few numbers for it.
    """

    names: tuple[str, ...]
    rotation: str | None = None
    frame: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "names", _names(self.names))
        needed = 0 if self.rotation is None else 3 + math.prod(rotation_shape(self.rotation))
        if needed > len(self.names):
            raise ValueError(
                f"A translation and a rotation as {self.rotation!r} take {needed} numbers; the state has "
                f"{len(self.names)}: {list(self.names)}. Leave rotation out where there is none."
            )


@dataclass(frozen=True)
class CameraSpec(_Spec):
    """A camera and its pinhole intrinsics.

    Args:
        name (`str`, *optional*): the camera's name in the dataset; None if there is but one.
        width, height (`int`): pixels of the image that `intrinsics` belong to.
        intrinsics (3 x 3 numbers, *optional*): pinhole matrix K in pixels of width x height; None if not calibrated.
        depth (`bool`): whether the camera gives metric depth.

    Raises:
        ValueError: a size is no positive integer, or `intrinsics` are not a finite 3 x 3 matrix with positive focal
            lengths.
    """

    name: str | None
    width: int
    height: int
    intrinsics: tuple[tuple[float, ...], ...] | None = None
    depth: bool = False

    def __post_init__(self):
        for side in ("width", "height"):
            object.__setattr__(self, side, whole_number(getattr(self, side), f"a camera {side} in pixels"))
        if self.intrinsics is None:
            return
        try:
            matrix = np.asarray(self.intrinsics, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Expected 3 x 3 intrinsics, came {self.intrinsics!r}.") from error
        if matrix.shape != (3, 3):
            raise ValueError(f"Expected 3 x 3 intrinsics, came shape {matrix.shape}.")
        if not (np.isfinite(matrix).all() and matrix[0, 0] > 0 and matrix[1, 1] > 0):
            raise ValueError(f"Expected finite intrinsics with positive focal lengths, came {matrix.tolist()}.")
        object.__setattr__(self, "intrinsics", tuple(map(tuple, matrix.tolist())))

    def scaled(self, width: int, height: int) -> "CameraSpec":
        """Return the same camera for images resized to width x height: K's first two rows scale with the pixels."""
        if self.intrinsics is None:
            return replace(self, width=width, height=height)
        scale = np.array([[width / self.width], [height / self.height], [1.0]])
        return replace(self, width=width, height=height, intrinsics=np.asarray(self.intrinsics) * scale)


def whole_number(value: Any, what: str, least: int = 1) -> int:
    """Return an integer, Python's or numpy's, as an int; raise a ValueError if it is none or below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"Expected {what} of {least} or more, came {value!r} ({type(value).__name__}).")
    return int(value)


def _names(names):
    if isinstance(names, str) or not all(isinstance(name, str) for name in names) or not len(names):
        raise ValueError(f"Expected one name per dimension, came {names!r}.")
    if repeated := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"Dimension names must differ, {repeated} came more than once.")
    return tuple(names)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _as_json(value):
    return [_as_json(item) for item in value] if isinstance(value, (tuple, list)) else value
