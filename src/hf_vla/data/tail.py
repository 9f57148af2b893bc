"""What a chunk of actions holds where its window leaves the episode: a robot that stays where it is."""

import math

import numpy as np

from hf_vla.actions.rotations import convert, rotation_shape
from hf_vla.actions.spec import ActionSpec


def hold_tail(actions, is_pad, spec: ActionSpec):
    """Replace padded actions, in robot units, by actions that hold the position reached.

    - `delta_ee`: no motion, in the rotation's own format (a quaternion's or a matrix's identity is not zero).
    - `absolute_ee` and `joint`: the last real action; before the episode's start, the first one.
    - The gripper, and dimensions that the specification does not explain: the last real value, likewise.

    So a model that is also trained on the tail learns to stop at the goal. It has to be done before normalisation:
    the middle of the normalised range, which the published systems put there, is a motion.

    Args:
        actions (`np.ndarray` or `torch.Tensor` of shape `(..., chunk_size, action_dim)`): robot units; not changed.
        is_pad (the same, of shape `(..., chunk_size)`): True where an action lies outside the episode.
        spec ([`~hf_vla.actions.spec.ActionSpec`]): the meaning of the dimensions. `delta_ee` without a rotation
            moves by all dimensions but the gripper.

    Returns:
        As `actions`: type, shape and dtype.

    Raises:
        ValueError: the shapes do not fit, or a chunk holds no real action.
    """
    values, padded = np.asarray(actions), np.asarray(is_pad, dtype=bool)
    if values.ndim < 2 or values.shape[-1] != len(spec.names) or padded.shape != values.shape[:-1]:
        raise ValueError(
            f"Expected actions of shape (..., chunk_size, {len(spec.names)}) and is_pad of their shape without the "
            f"last axis, came {values.shape} and {padded.shape}."
        )
    if padded.all(axis=-1).any():
        raise ValueError("A chunk is padded from its first action to its last: there is no position to hold.")
    steps = np.arange(padded.shape[-1])
    nearest = np.maximum.accumulate(np.where(padded, -1, steps), axis=-1)
    nearest = np.where(nearest < 0, np.argmin(padded, axis=-1)[..., None], nearest)
    held = np.take_along_axis(values, nearest[..., None], axis=-2)
    if spec.kind == "delta_ee":
        moving, still = _no_motion(spec)
        held[..., moving] = np.where(padded[..., None], still.astype(held.dtype), held[..., moving])
    return held if isinstance(actions, np.ndarray) else _as_tensor(held, actions)


def _no_motion(spec) -> tuple[list[int], np.ndarray]:
    """Dimensions that move the end effector, and their values at rest."""
    moving = [index for index in range(len(spec.names)) if spec.gripper is None or index != spec.gripper.index]
    if spec.rotation is None:
        return moving, np.zeros(len(moving))
    identity = convert(np.zeros(3), "axis_angle", spec.rotation).reshape(-1)
    return moving[: 3 + math.prod(rotation_shape(spec.rotation))], np.concatenate([np.zeros(3), identity])


def _as_tensor(held, like):
    import torch

    return torch.from_numpy(held) if isinstance(like, torch.Tensor) else held
