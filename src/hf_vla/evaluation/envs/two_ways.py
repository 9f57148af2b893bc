"""A hand on a table, a goal, an obstacle right between them: to go round it on the left is as good as on the right.

Made to show what a policy does where the mean of two right actions is wrong, as the action-representation chapter has
it: of the same start half of the demonstrations go left, half go right, and nothing to be seen says which. Straight
ahead, between the two, is the obstacle. Whoever touches it has failed and is stopped: along an obstacle that is only
solid the hand would slide off to one of the sides, which would hide the mean.

Plain numpy and PIL. The table is a square of 2 m around the origin, z up, and the camera a pinhole above its middle.
Actions: xyz, +-1 is 5 cm, and the gripper's command, -1 opens; 10 Hz. Height and gripper decide nothing: they are
there, and the expert moves them, so that the actions are those of an arm, no number of which is constant.
"""

import math
from typing import ClassVar

import numpy as np
from PIL import Image, ImageDraw

from hf_vla.actions.spec import ActionSpec, CameraSpec, GripperSpec, StateSpec
from hf_vla.evaluation.envs.base import SimulatedTask, check_known

STEP = 0.05  # metres
DISTANCE = 0.7  # from the obstacle to the goal, and to where the hand starts, metres
OBSTACLE, HAND, GOAL = 0.18, 0.05, 0.1  # radii, metres; the goal is reached where the hand's centre is above it
HEIGHTS = {"goal": 0.0, "obstacle": 0.15}
CEILING = 0.4  # the hand's greatest height, metres
CAMERA_HEIGHT = 2.0  # metres; the picture shows just the table
COLORS = {"table": "#d9d4c8", "goal": "#2e8b3d", "obstacle": "#1f3a6e", "open": "#e0561b", "closed": "#8c1a1a"}
SMOOTHING = 4  # pixels are drawn that many times as fine


class TwoWaysTask(SimulatedTask):
    """Reach the goal behind the obstacle; see [`~hf_vla.evaluation.envs.base.SimulatedTask`].

    Attributes:
        side (`str`, *optional*): by which the hand went past the obstacle's middle, as seen by whoever looks from the
            start to the goal, "left" or "right"; None before.
        touched (`bool`): whether the hand touched the obstacle, which ends the episode (`truncated`).
        hand (`np.ndarray` of shape `(3,)`): where it is, metres; `gripper` is the last command, -1 to 1.
        goal (`np.ndarray` of shape `(2,)`), obstacle (`np.ndarray` of shape `(2,)`): where they are, metres.
        ahead (`np.ndarray` of shape `(2,)`): unit vector from the obstacle to the goal.
    """

    name, robot = "two_ways", "hand"
    default_cameras: ClassVar = {"top": (64, 64)}
    horizon = 60
    instruction = "reach the goal"
    action_spec = ActionSpec(
        ("x", "y", "z", "gripper"), "delta_ee", frame="world", control_hz=10.0, gripper=GripperSpec(3, -1.0, 1.0)
    )
    state_spec = StateSpec(("x", "y", "z", "gripper"), frame="world")

    @classmethod
    def splits(cls):
        """One task."""
        return {"all": ("reach-behind",)}

    def _make(self):
        self.camera_specs = {}
        for name, (width, height) in self.sizes.items():
            check_known("camera of two_ways", name, self.default_cameras)
            focal = 0.5 * height * CAMERA_HEIGHT
            intrinsics = ((focal, 0.0, width / 2), (0.0, focal, height / 2), (0.0, 0.0, 1.0))
            self.camera_specs[name] = CameraSpec(name, width, height, intrinsics)

    def _restart(self, seed):
        rng = np.random.default_rng(seed)
        angle = math.pi / 2 + rng.uniform(-0.4, 0.4)
        self.ahead = np.array([math.cos(angle), math.sin(angle)])
        self.obstacle = rng.uniform(-0.1, 0.1, 2)
        self.goal = self.obstacle + DISTANCE * self.ahead
        start = self.obstacle - DISTANCE * self.ahead + rng.uniform(-0.03, 0.03, 2)
        self.hand, self.gripper = np.array([*start, rng.uniform(0.2, CEILING)]), -1.0
        self.side, self.touched = None, False

    def advance(self, action):
        """Execute one action; a touch truncates the episode. See the base class."""
        terminated, truncated = super().advance(action)
        return terminated, truncated or self.touched

    def _advance(self, action):
        if self.touched:
            return False
        target = np.clip(self.hand + STEP * action[:3], [-1.0, -1.0, 0.0], [1.0, 1.0, CEILING])
        for place in np.linspace(self.hand, target, 6)[1:]:  # no step is so long that it jumps over an edge
            self.hand, across = place, self._across(place)
            self.touched = bool(np.linalg.norm(place[:2] - self.obstacle) < OBSTACLE + HAND)
            if self.touched:
                return False
            if self.side is None and across[0] >= 0:
                self.side = "left" if across[1] > 0 else "right"
        self.gripper = float(action[3])
        return bool(np.linalg.norm(self.hand[:2] - self.goal) < GOAL)

    def _across(self, place):
        """How far a place lies behind the obstacle's middle, and to its left, metres."""
        (x, y), (dx, dy) = place[:2] - self.obstacle, self.ahead
        return x * dx + y * dy, y * dx - x * dy

    def _info(self):
        return {**super()._info(), "side": self.side, "touched": self.touched}

    def _state(self):
        return np.array([*self.hand, self.gripper])

    def _pictures(self, camera, depth):
        picture = self._draw("RGB", camera, SMOOTHING, COLORS).reduce(SMOOTHING)
        if not depth:
            return np.array(picture), None
        heights = {**HEIGHTS, "table": 0.0, "open": self.hand[2], "closed": self.hand[2]}
        far = self._draw("F", camera, 1, {name: CAMERA_HEIGHT - height for name, height in heights.items()})
        return np.array(picture), np.array(far)

    def _draw(self, mode, camera, scale, fill):
        """Draw discs that lie flat at their heights, the highest last."""
        width, height = (scale * side for side in self.sizes[camera])
        image = Image.new(mode, (width, height), fill["table"])
        draw = ImageDraw.Draw(image)
        hand = "closed" if self.gripper > 0 else "open"
        discs = [
            ("goal", self.goal, HEIGHTS["goal"], GOAL),
            ("obstacle", self.obstacle, HEIGHTS["obstacle"], OBSTACLE),
        ]
        for name, (x, y), z, radius in sorted([*discs, (hand, self.hand[:2], self.hand[2], HAND)], key=lambda d: d[2]):
            focal = 0.5 * height * CAMERA_HEIGHT / (CAMERA_HEIGHT - z)
            draw.circle((width / 2 + focal * x - 0.5, height / 2 - focal * y - 0.5), focal * radius, fill=fill[name])
        return image

    def camera_pose(self, camera):
        """Camera to world; see the base class."""
        pose = np.diag([1.0, -1.0, -1.0, 1.0])
        pose[2, 3] = CAMERA_HEIGHT
        return pose
