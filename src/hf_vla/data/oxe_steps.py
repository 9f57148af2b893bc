"""What a table entry of `hf_vla.data.oxe` means: expressions over an episode's steps, and the dataset they describe.

An expression is text: a key of the episode, a slice of its numbers, and operations, applied from left to right to the
whole episode at once, as in `"action[6:7] > clip > invert"`. `"0 x 3"` is three columns of zeros. Keys are paths into
a step, as `RldsEpisodes` gives them: `"observation/state"`.
"""

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_vla.actions.rotations import convert
from hf_vla.actions.spec import ActionSpec, CameraSpec, GripperSpec, StateSpec
from hf_vla.data import schema

EULER = "euler_xyz"
MOTION = ("x", "y", "z", "roll", "pitch", "yaw")
JOINTS = tuple(f"joint_{index}" for index in range(7))
# what the eight numbers of a state are: names, and the format of the rotation after x y z
STATES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "pose": ((*MOTION, "pad", "gripper"), EULER),
    "pose_only": ((*MOTION, "pad", "pad_2"), EULER),
    "quaternion": (("x", "y", "z", "rx", "ry", "rz", "rw", "gripper"), "quaternion_xyzw"),
    "joints": ((*JOINTS, "gripper"), None),
    "joints_only": ((*JOINTS, "pad"), None),
    "six_joints": ((*JOINTS[:6], "pad", "gripper"), None),
    "position": (("x", "y", "z", "pad", "pad_2", "pad_3", "pad_4", "gripper"), None),
    "plane": (("x", "y", "pad", "pad_2", "pad_3", "pad_4", "pad_5", "pad_6"), None),
    "undocumented": (("x", "y", "z", *(f"state_{index}" for index in range(3, 8))), None),
}
PLAUSIBLE = 1e3  # robot units; RH20T holds values of 1e28
_KEY = re.compile(r"(?P<key>[^\[\]]+?)(\[(?P<start>-?\d*):(?P<stop>-?\d*)\])?")
_CONSTANT = re.compile(r"(?P<value>[01]) x (?P<width>\d)")


def binarize(values: np.ndarray) -> np.ndarray:
    """Make a gripper command 0 or 1; what lies between 0.05 and 0.95 becomes the next command that does not.

    Where none follows, the episode's last value stands, as it is.
    """
    decided = (values > 0.95) | (values < 0.05)
    decided[-1] = True
    rows = np.arange(len(values))[:, None]
    following = np.minimum.accumulate(np.where(decided, rows, len(values))[::-1])[::-1]
    settled = np.where(values > 0.95, 1.0, np.where(values < 0.05, 0.0, values))
    return np.take_along_axis(settled, following, axis=0)


def relative_to_absolute(values: np.ndarray) -> np.ndarray:
    """Turn closing (above 0.1) and opening (below -0.1) commands into the gripper they lead to: 1 open, 0 closed.

    Before the first command the gripper is what that command changes; without any it is open throughout.
    """
    command = (values < -0.1).astype(np.float64) - (values > 0.1)
    rows = np.arange(len(values))[:, None]
    latest = np.maximum.accumulate(np.where(command != 0, rows, -1))
    first = command[np.argmax(command != 0, axis=0), np.arange(command.shape[1])]
    before = np.where(first == 0, 1.0, -first)
    return np.where(latest < 0, before, np.take_along_axis(command, np.maximum(latest, 0), axis=0)) / 2 + 0.5


def change_to_next(poses: np.ndarray) -> np.ndarray:
    """Difference to the next step's pose (x y z roll pitch yaw), angles the short way round; zero in the last step."""
    change = np.diff(poses, axis=0, append=poses[-1:])
    angles = change[:, 3:]
    change[:, 3:] = np.where(np.abs(angles) > np.pi, (angles + np.pi) % (2 * np.pi) - np.pi, angles)
    return change


def motion_to_pose(poses: np.ndarray) -> np.ndarray:
    """Motion from the last step's target pose (x y z roll pitch yaw) to this one's, in base frame; zero at first."""
    rotation = convert(poses[:, 3:], EULER, "matrix")
    before = np.concatenate([rotation[:1], rotation[:-1]])
    turn = convert(rotation @ before.swapaxes(-1, -2), "matrix", EULER)
    return np.concatenate([np.diff(poses[:, :3], axis=0, prepend=poses[:1, :3]), turn], axis=1)


OPERATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "clip": lambda values: np.clip(values, 0.0, 1.0),
    "invert": lambda values: 1.0 - values,
    "binarize": binarize,
    "relative_to_absolute": relative_to_absolute,
    "quaternion_to_euler": lambda values: convert(values, "quaternion_xyzw", EULER),
    "axis_angle_to_euler": lambda values: convert(values, "axis_angle", EULER),
    "millimetres": lambda values: values / 1000.0,
    "degrees": np.radians,
    "change_to_next": change_to_next,
    "motion_to_pose": motion_to_pose,
}


@dataclass(frozen=True)
class OxeDataset:
    """One dataset of Open X-Embodiment: where it is, and what its numbers mean.

    `action` and `state` describe the LeRobot conversion, which keeps some datasets' own conventions; `rlds_action`
    and `rlds_state` what `standardize` makes of the RLDS original: always the 7-D motion of the end effector per
    step (metres or the dataset's own scale, radians), gripper 1 open and 0 closed.

    Args:
        name (`str`): name of the RLDS dataset, without `_converted_externally_to_rlds`.
        robot (`str`): robot_type in LeRobot's spelling.
        fps (`float`): steps per second.
        cameras (`dict[str, str]`): role (primary, secondary, wrist) -> camera's name.
        motion (`tuple[str, ...]`): expressions for x y z roll pitch yaw, side by side.
        gripper_command (`str`): expression for the gripper.
        motion_then (`str`, *optional*): operation on the six columns of `motion`.
        states (`tuple[str, ...]`): expressions for the state, side by side; empty if there is none.
        state_layout (`str`): what the state's numbers are, a key of `STATES`.
        language (`str`): key of the instruction.
        success (`str`, *optional*): key of the episode's flag that says whether to use it.
        first, last (`int`): steps to leave out at the start and at the end.
        bgr (`tuple[str, ...]`): cameras whose colours are stored in the wrong order.
        frame (`str`, *optional*): frame of the motion, where documented.
        published_kind, published_rotation (`str`): what the LeRobot conversion's actions are.
        published_names (`tuple[str, ...]`): the conversion's first six action dimensions, where units differ.
        intrinsics (`dict[str, CameraSpec]`): role -> calibrated camera, at the size it was calibrated for.
        lerobot (`str`, *optional*): the LeRobot conversion's name on the Hub.
    """

    name: str
    robot: str
    fps: float
    cameras: Mapping[str, str]
    motion: tuple[str, ...]
    gripper_command: str
    motion_then: str | None = None
    states: tuple[str, ...] = ()
    state_layout: str = "pose"
    language: str = "language_instruction"
    success: str | None = None
    first: int = 0
    last: int = 0
    bgr: tuple[str, ...] = ()
    frame: str | None = None
    published_kind: str = "delta_ee"
    published_rotation: str | None = EULER
    published_names: tuple[str, ...] = MOTION
    intrinsics: Mapping[str, CameraSpec] = field(default_factory=dict)
    lerobot: str | None = None

    @property
    def gripper(self) -> GripperSpec:
        """The gripper's dimension: 1 open, 0 closed."""
        return GripperSpec(6, open=1.0, closed=0.0)

    @property
    def action(self) -> ActionSpec:
        """What the LeRobot conversion's actions are."""
        return self._action(self.published_names, self.published_kind, self.published_rotation)

    @property
    def rlds_action(self) -> ActionSpec:
        """What `standardize` returns as actions."""
        return self._action(MOTION, "delta_ee", EULER)

    @property
    def state(self) -> StateSpec | None:
        """What the LeRobot conversion's state is; None where it is filled with zeros."""
        return self._state(self.published_rotation or EULER)

    @property
    def rlds_state(self) -> StateSpec | None:
        """What `standardize` returns as state; None where the dataset has none."""
        return self._state(EULER)

    def _action(self, names, kind, rotation) -> ActionSpec:
        return ActionSpec((*names, "gripper"), kind, rotation, self.frame, self.fps, self.gripper)

    def _state(self, euler) -> StateSpec | None:
        if not self.states:
            return None
        names, rotation = STATES[self.state_layout]
        rotation = euler if rotation == EULER else rotation
        return StateSpec(names, rotation, "base" if rotation else None)


def standardize(dataset: OxeDataset, episode: Mapping[str, Any]) -> dict[str, Any] | None:
    """Bring an episode as it is in the RLDS dataset into the form that all datasets share.

    Args:
        dataset ([`OxeDataset`]): the dataset's entry in the table.
        episode (`dict`): key -> what the steps hold, first axis the steps (or a scalar for the whole episode), as
            [`~hf_vla.data.rlds.RldsEpisodes`] gives it.

    Returns:
        `dict` in LeRobot's keys, or None for an episode that is marked as a failure: `action` `(steps, 7)` and, where
        there is one, `observation.state` `(steps, 8)`, float32; `task`, empty where there is none; the cameras of
        the table's roles that the episode holds, `observation.images.<camera>`, as they came.

    Raises:
        ValueError: a key is missing, a value is NaN, infinite or absurd, or no step is left.
    """
    if dataset.success and not _values(episode, dataset.success, dataset.name).all():
        return None
    motion = _columns(dataset, episode, dataset.motion)
    if dataset.motion_then:
        motion = OPERATIONS[dataset.motion_then](motion)
    gripper = _columns(dataset, episode, (dataset.gripper_command,), len(motion))
    rows = slice(dataset.first, len(motion) - dataset.last)
    if rows.stop <= rows.start:
        raise ValueError(
            f"{dataset.name}: the episode has {len(motion)} step(s), of which the first {dataset.first} and the last "
            f"{dataset.last} hold no action; leave it out."
        )
    steps = {schema.ACTION: np.concatenate([motion, gripper], axis=1)[rows].astype(np.float32)}
    if dataset.states:
        steps[schema.STATE] = _columns(dataset, episode, dataset.states, len(motion))[rows].astype(np.float32)
    for key, values in steps.items():
        wrong = ~(np.abs(values) < PLAUSIBLE)
        if wrong.any():
            step, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"{dataset.name}: {key}[{column}] is {values[step, column]} at step {step + dataset.first}; expected "
                f"finite values below {PLAUSIBLE:g}. The recording is damaged: leave the episode out."
            )
    cameras = [key for key in (f"observation/{camera}" for camera in dataset.cameras.values()) if key in episode]
    pictures = {schema.camera_key(key.removeprefix("observation/")): episode[key][rows] for key in cameras}
    return {**steps, **pictures, schema.TASK: text(_values(episode, dataset.language, dataset.name))}


def text(values: np.ndarray) -> str:
    """Return the instruction of an episode: that of its first step; Language-Table gives code points."""
    value = values[0] if np.ndim(values) else values.item() if isinstance(values, np.ndarray) else values
    if np.ndim(value):
        return "".join(chr(code) for code in value).split("\0")[0].strip()
    return (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)).strip()


def parse(expression: str) -> tuple[str, slice, list[str]]:
    """Split an expression into its key, the slice of its numbers, and the names of its operations.

    Raises:
        ValueError: it is no expression, or an operation is unknown.
    """
    source, *operations = expression.split(" > ")
    match = _KEY.fullmatch(source)
    if match is None:
        raise ValueError(f"Expected 'key', 'key[start:stop]' or '0 x columns', came {source!r}.")
    if unknown := [name for name in operations if name not in OPERATIONS]:
        raise ValueError(f"{expression!r}: unknown operation {unknown}; known are {sorted(OPERATIONS)}.")
    bounds = (int(match[name]) if match[name] else None for name in ("start", "stop"))
    return match["key"], slice(*bounds), operations


def _columns(dataset, episode, expressions, length=None) -> np.ndarray:
    """Evaluate expressions side by side: `(steps, columns)`, float64."""
    columns = []
    for expression in expressions:
        if constant := _CONSTANT.fullmatch(expression):
            columns.append(np.full((1, int(constant["width"])), float(constant["value"])))
            continue
        key, numbers, operations = parse(expression)
        values = _values(episode, key, dataset.name)
        if values.dtype.kind in "OS":  # some mirrors of Kuka compress its numbers
            values = np.stack([np.frombuffer(zlib.decompress(number), np.float32) for number in values.tolist()])
        values = values.reshape(len(values), -1)[:, numbers].astype(np.float64)
        for name in operations:
            values = OPERATIONS[name](values)
        columns.append(values)
    length = length or max(map(len, columns))
    if other := {len(column) for column in columns} - {1, length}:
        raise ValueError(f"{dataset.name}: expected {length} steps of {expressions}, came {sorted(other)}.")
    return np.concatenate([np.broadcast_to(column, (length, column.shape[1])) for column in columns], axis=1)


def _values(episode, key, name) -> np.ndarray:
    if key not in episode:
        raise ValueError(f"{name}: the episode has no {key!r}; it has {sorted(episode)}. Is it another dataset?")
    return np.asarray(episode[key])
