"""Where an end effector would go: actions added up, and seen by a camera."""

import numpy as np

FIXED_FRAMES = (None, "world", "base", "camera")  # whose axes do not turn with the hand


def end_effector_path(chunks, spec):
    """Add up the translations of end-effector actions.

    Args:
        chunks (`np.ndarray` of shape `(..., T, D)`): robot units.
        spec ([`~hf_vla.actions.spec.ActionSpec`], *optional*): what they mean.

    Returns:
        `tuple`: the path, robot units: `(..., T + 1, 3)` from zero, where actions are motions, or `(..., T, 3)` of
        absolute positions. None where there is none, and then the reason, a sentence.
    """
    if spec is None:
        return None, "The checkpoint does not say what its numbers mean, so no path can be drawn."
    if spec.kind == "joint":
        return None, "These are joint values. Without the arm's kinematics nobody knows where its hand would go."
    if chunks.shape[-1] < 3:
        return None, "An action has fewer than three numbers, so there is no path in space."
    if spec.kind == "absolute_ee":
        return chunks[..., :3], None
    moves = chunks[..., :3].astype(np.float64)
    if spec.frame not in FIXED_FRAMES:
        return None, (
            f"The motions are in the axes of the {spec.frame}, which turn on the way by an angle that the checkpoint "
            "does not tell, so they cannot be added up."
        )
    return np.concatenate([np.zeros_like(moves[..., :1, :]), moves.cumsum(-2)], -2), None


def project(points, intrinsics, camera_to_world):
    """See points through a pinhole camera.

    Args:
        points (`np.ndarray` of shape `(..., 3)`): in the world, metres.
        intrinsics (`np.ndarray` of shape `(3, 3)`): in pixels.
        camera_to_world (`np.ndarray` of shape `(4, 4)`): metres; x to the right of the picture, y down, z ahead.

    Returns:
        `np.ndarray` of shape `(..., 2)`: pixels from the left upper corner; NaN for points that are not in front.
    """
    pose = np.asarray(camera_to_world, np.float64)
    seen = (np.asarray(points, np.float64) - pose[:3, 3]) @ pose[:3, :3]  # its columns are the camera's axes
    pixels = seen @ np.asarray(intrinsics, np.float64).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(seen[..., 2:] > 1e-6, pixels[..., :2] / pixels[..., 2:], np.nan)
