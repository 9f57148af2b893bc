"""Whether a checkpoint fits a simulated robot: asked before the first step, answered with every difference at once.

One difference is none: what the two ends of the gripper are called. Both sides say it, and actions are converted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hf_vla.actions.spec import ActionSpec, CameraSpec, StateSpec
from hf_vla.evaluation.envs.base import SimulatedTask
from hf_vla.policy import DEPTH, IMAGES, Policy

TOLERANCE = 1.5  # pixels by which intrinsics may differ


@dataclass(frozen=True)
class CameraPlan:
    """Which of the simulator's cameras a checkpoint looks through.

    Args:
        names (`dict[str, str]`): the checkpoint's name of a camera -> the simulator's.
        sizes (`dict[str, tuple[int, int]]`): the simulator's name -> width and height in pixels.
        depth (`bool`): whether one of them gives depth.
    """

    names: dict[str, str]
    sizes: dict[str, tuple[int, int]]
    depth: bool

    def rename(self, observation: dict) -> dict:
        """Call a simulator's pictures as the checkpoint does; cameras that it does not look through are left out."""
        seen = {key: value for key, value in observation.items() if not key.startswith((IMAGES, DEPTH))}
        for own, name in self.names.items():
            for prefix in (IMAGES, DEPTH):
                if prefix + name in observation:
                    seen[prefix + own] = observation[prefix + name]
        return seen


def plan_cameras(policy: Policy, simulator: type[SimulatedTask], mapping: Mapping[str, str] | None = None):
    """Choose a simulator's cameras for a policy.

    Args:
        policy ([`~hf_vla.policy.Policy`]): declares its cameras; one that declares none looks through the simulator's
            first.
        simulator (`type[SimulatedTask]`): whose cameras.
        mapping (`Mapping[str, str]`, *optional*): the checkpoint's name of a camera -> the simulator's; the same name
            by default.

    Returns:
        [`CameraPlan`]

    Raises:
        ValueError: the mapping names a camera that the checkpoint does not look through, or two cameras of different
            sizes are one in the simulator.
    """
    (first, size), mapping = next(iter(simulator.default_cameras.items())), dict(mapping or {})
    declared = policy.cameras or (CameraSpec(None, *size),)
    wanted = {"image" if camera.name is None else camera.name: camera for camera in declared}
    if unknown := sorted(mapping.keys() - wanted.keys()):
        raise ValueError(f"This checkpoint has no camera {', '.join(map(repr, unknown))}; it has {sorted(wanted)}.")
    names, sizes = {}, {}
    for own, camera in wanted.items():
        name = names[own] = mapping.get(own, first if camera.name is None else own)
        if sizes.setdefault(name, (camera.width, camera.height)) != (camera.width, camera.height):
            raise ValueError(
                f"Two of the checkpoint's cameras are {name!r}, which has one size only: {sorted(names)}."
            )
    return CameraPlan(names, sizes, any(camera.depth for camera in declared))


def check_contract(
    policy: Policy,
    cameras: CameraPlan,
    action_spec: ActionSpec,
    state_spec: StateSpec,
    camera_specs: Mapping[str, CameraSpec],
    name: str = "the simulator",
    refused: str = "",
) -> None:
    """Compare what a checkpoint declares with a simulated robot.

    A `control_hz` or frame that it leaves out fits any, and so do the gripper's ends: see [`convert_gripper`].

    Args:
        policy ([`~hf_vla.policy.Policy`]): of the checkpoint.
        cameras ([`CameraPlan`]): what it looks through.
        action_spec (`ActionSpec`), state_spec (`StateSpec`), camera_specs (`Mapping[str, CameraSpec]`): the
            simulator's.
        name (`str`): what to call it.
        refused (`str`): what it said to the cameras that were asked for.

    Raises:
        ValueError: they differ; the text names every difference and how to mend it.
    """
    codec, key = policy.processor.action_codec, policy.unnorm_key
    wrong = [*_spec_errors(policy.action_spec, action_spec, codec.normalizer(key).action_dim, name)]
    if policy.takes_state:
        wrong += _spec_errors(policy.state_spec, state_spec, codec.state_normalizer(key).action_dim, name)
    declared = policy.cameras or ()
    for own, camera in zip(cameras.names, declared, strict=False):
        wrong += _camera_errors(own, camera, cameras.names[own], camera_specs, name, refused)
    if wrong:
        raise ValueError(f"This checkpoint is not for {name}:\n" + "\n".join(f"- {each}" for each in wrong))


def convert_gripper(actions: np.ndarray, own: ActionSpec | None, other: ActionSpec) -> np.ndarray:
    """Say in another robot's numbers how far the gripper is to open.

    Bridge, for example, has 1 for open and 0 for closed, SimplerEnv 1 and -1: x becomes 2x - 1. Nothing is lost, and
    what is half open stays so.

    Args:
        actions (`np.ndarray` of shape `(..., action_dim)`): robot units.
        own (`ActionSpec`, *optional*): whose actions they are; None where nobody knows, and they stay as they are.
        other (`ActionSpec`): whose they are to be.

    Returns:
        `np.ndarray` of shape `(..., action_dim)`: of the same dtype; what came where the ends are the same.
    """
    if not ends_differ(own, other):
        return actions
    ours, theirs, actions = own.gripper, other.gripper, actions.copy()
    opening = (actions[..., ours.index] - ours.closed) / (ours.open - ours.closed)
    actions[..., ours.index] = theirs.closed + opening * (theirs.open - theirs.closed)
    return actions


def ends_differ(own: ActionSpec | None, other: ActionSpec) -> bool:
    """Whether two robots have the same gripper dimension with other numbers for open and closed."""
    if own is None or None in (own.gripper, other.gripper) or own.gripper.index != other.gripper.index:
        return False
    return own.gripper != other.gripper


def _spec_errors(own, other, count, name):
    if own is None:
        if count != len(other.names):
            kind = type(other).__name__
            yield (
                f"{kind}: the checkpoint, which declares none, has {count} dimensions, {name} has {len(other.names)}, "
                f"{list(other.names)}. Use a checkpoint made for this robot."
            )
        return
    fitting = {field: None for field in ("control_hz", "frame") if getattr(own, field, ...) is None}
    if isinstance(own, ActionSpec) and ends_differ(own, other):
        fitting["gripper"] = own.gripper
    try:
        own.check(replace(other, **fitting), "the checkpoint", name)
    except ValueError as error:
        yield str(error)


def _camera_errors(own, camera, mapped, specs, name, refused):
    if mapped not in specs:
        why = refused or f"{name} has no camera {mapped!r}, it has {sorted(specs)}."
        yield f"Camera {own!r}: {why} Say which of its cameras it is: --camera {own}=NAME."
        return
    spec = specs[mapped]
    if (camera.width, camera.height) != (spec.width, spec.height):
        yield (
            f"Camera {own!r}: the checkpoint's pictures have {camera.width} x {camera.height} pixels, those of "
            f"{mapped!r} {spec.width} x {spec.height}."
        )
    elif None not in (camera.intrinsics, spec.intrinsics):
        off = np.abs(np.subtract(camera.intrinsics, spec.intrinsics)).max()
        if off > TOLERANCE:
            yield (
                f"Camera {own!r}: its intrinsics and those of {mapped!r} differ by {off:.1f} pixels, "
                f"{_matrix(camera)} and {_matrix(spec)}. Choose the camera it was trained with: --camera {own}=NAME."
            )


def _matrix(spec):
    return np.round(spec.intrinsics, 1).tolist()
