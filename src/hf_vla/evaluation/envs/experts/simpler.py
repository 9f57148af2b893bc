"""A scripted expert for SimplerEnv's WidowX tasks."""

import numpy as np

from hf_vla.actions.rotations import convert
from hf_vla.evaluation.envs.base import Expert

CLEARANCE = {"flat_table": 0.07, "sink": 0.13}  # metres above object and target while the hand travels
STEP, TURN = 0.04, 0.3  # metres and radians of one action at most
NEAR = 0.01  # metres from a waypoint at which the hand goes on to the next
PATIENCE = 12  # actions until it goes on anyway
GRASP, RELEASE = 4, 3  # actions that the gripper takes
OPEN, CLOSED = 1.0, -1.0


class SimplerExpert(Expert):
    """Takes the object across its thin side, carries it over the target, puts it down and lets go."""

    def reset(self):
        """Begin anew."""
        self._commands = self._plan()

    def act(self):
        """Next action, `(7,)`."""
        return next(self._commands)

    def _plan(self):
        """Yield action after action; the simulator moves on between them."""
        scene = self.env.simulator
        source, target = scene.objs[scene.source_obj_name], scene.objs[scene.target_obj_name]
        above = np.array([0.0, 0.0, CLEARANCE[scene.scene_setting]])
        turn = self._across(source, scene.model_db[scene.source_obj_name]["bbox"])
        start = self._position(source)
        yield from self._travel(start + above, turn, OPEN)
        yield from self._travel(start, turn, OPEN)
        yield from self._wait(GRASP, CLOSED)
        yield from self._travel(start + above, turn, CLOSED)
        held = self._position(source) - self._hand()[0]
        goal = self._position(target) - held
        yield from self._travel(goal + above, turn, CLOSED)
        yield from self._travel(goal + [0.0, 0.0, 0.02], turn, CLOSED)
        yield from self._wait(RELEASE, OPEN)
        yield from self._travel(goal + above, turn, OPEN)
        while True:
            yield from self._wait(1, OPEN)

    def _travel(self, place, turn, gripper):
        """Go to a position and orientation, both of the hand in the base's frame."""
        for _ in range(PATIENCE):
            commanded, facing = self._hand(self.env.arm._target_pose)
            way = place - commanded
            way *= min(1.0, STEP / max(np.linalg.norm(way), 1e-9))
            rest = convert(turn @ facing.T, "matrix", "axis_angle")
            rest *= min(1.0, TURN / max(np.linalg.norm(rest), 1e-9))
            yield np.concatenate([way, convert(rest, "axis_angle", "euler_xyz"), [gripper]])
            reached, faces = self._hand()
            left = np.linalg.norm(convert(turn @ faces.T, "matrix", "axis_angle"))
            if np.linalg.norm(place - reached) < NEAR and left < 0.1:
                return

    def _wait(self, actions, gripper):
        for _ in range(actions):
            yield np.concatenate([np.zeros(6), [gripper]])

    def _hand(self, pose=None):
        """Position and rotation matrix of the hand, or of another pose in the base's frame."""
        matrix = (pose or self.env.arm.ee_pose_at_base).to_transformation_matrix()[0].numpy().astype(np.float64)
        return matrix[:3, 3], matrix[:3, :3]

    def _position(self, thing):
        return self._hand(self.env.arm.root_link.pose.inv() * thing.pose)[0]

    def _across(self, thing, box):
        """Orientation of a hand that points down and closes across the longest side of a box."""
        sides = np.subtract(box["max"], box["min"])
        rotation = self._hand(self.env.arm.root_link.pose.inv() * thing.pose)[1]
        along = rotation[:2, np.argmax(sides)]
        across = np.array([-along[1], along[0], 0.0]) / np.linalg.norm(along)
        if across @ self._hand()[1][:, 1] < 0:
            across = -across  # the gripper is symmetric: turn it by less than a right angle
        down = np.array([0.0, 0.0, -1.0])
        return np.stack([down, across, np.cross(down, across)], axis=1)
