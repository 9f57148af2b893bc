"""Picks and places robosuite's objects from above, by their poses."""

from dataclasses import dataclass

import numpy as np

from hf_vla.evaluation.envs.base import Expert

OPEN, CLOSE = -1.0, 1.0
MOTION_SCALE, TURN_SCALE = 0.05, 0.5  # metres and radians of an action of 1
GAIN = 2.0  # the arm follows a goal that is as far ahead again; critically damped
HOVER, HAND = 0.1, 0.1  # metres above an object before the descent; half the width of the hand
BINS_INSIDE = np.array([[-0.09, -0.49], [0.29, -0.01]])  # corners of the bin where objects lie, world frame
REACH = 0.79  # metres from the base, horizontally, to which the hand gets while it points down
DROP = 0.01  # metres above its place where an object is released


@dataclass(frozen=True)
class Grasp:
    """How an object is held.

    Args:
        body (`str`): its name in the scene.
        axes (`str`): those of the body along which the fingers may close; none for a round one.
        above (`float`): height of the grip over the body's origin, metres.
        rest (`float`): height of the body's origin over what it stands on, metres.
        travel (`float`): height of the grip while it is carried, metres in the world.
    """

    body: str
    axes: str
    above: float
    rest: float
    travel: float


GRASPS = {
    "Lift": Grasp("cube_main", "xy", 0.0, 0.021, 1.0),
    "Stack": Grasp("cubeA_main", "xy", 0.0, 0.02, 0.95),
    "PickPlaceCan": Grasp("Can_main", "", 0.01, 0.04, 1.03),
    "PickPlaceMilk": Grasp("Milk_main", "xy", 0.05, 0.061, 1.07),
    "PickPlaceCereal": Grasp("Cereal_main", "y", 0.045, 0.075, 1.08),
    "PickPlaceBread": Grasp("Bread_main", "xy", 0.012, 0.023, 1.0),
}
PHASES = ("above", "descend", "close", "lift", "carry", "lower", "release", "retreat")
PATIENCE = {"descend": 40, "close": 6, "lower": 40, "release": 4}  # steps after which these phases are over


class RobosuiteExpert(Expert):
    """Goes above the object, grasps it and, where the task asks for it, places it; begins anew where it slips."""

    def __init__(self, env):
        super().__init__(env)
        self._grasp = GRASPS[env.task]

    def reset(self):
        """Begin anew."""
        self._enter("above")
        self._axis = None

    def _enter(self, phase):
        self._phase, self._steps = phase, 0

    def act(self):
        """Next action, `(7,)`."""
        data = self.env.simulator.sim.data
        grip = data.get_site_xpos("gripper0_grip_site")
        body = data.get_body_xpos(self._grasp.body)
        if self._axis is None:
            self._axis = self._closing_axis(body)
        if self._phase in ("above", "descend", "close", "lift"):
            self._azimuth = self._direction(grip)
        turn = self._turn(grip)
        self._proceed(grip, body, np.abs(turn).max())
        held = self._phase in ("close", "lift", "carry", "lower")
        motion = GAIN * (self._target(grip, body) - grip) / MOTION_SCALE
        action = np.concatenate([motion, GAIN * turn / TURN_SCALE, [CLOSE if held else OPEN]])
        self._steps += 1
        return np.clip(action, -1.0, 1.0)

    def _target(self, grip, body):
        """Where the grip should go, `(3,)`."""
        over = body + [0.0, 0.0, self._grasp.above]
        place = self._place() + (grip - body)  # the object, not the grip, is to arrive
        if self._phase in ("above", "descend", "close"):
            return over + [0.0, 0.0, HOVER * (self._phase == "above")]
        if self._phase == "lift":
            return np.array([*grip[:2], self._grasp.travel + DROP])
        if self._phase == "carry":
            return np.array([*place[:2], self._grasp.travel])
        return place if self._phase == "lower" else grip + [0.0, 0.0, HOVER * (self._phase == "retreat")]

    def _proceed(self, grip, body, turn):
        """Enter the next phase where the present one is done, or the first where the object slipped."""
        if self._phase in ("lift", "carry", "lower") and np.linalg.norm(grip - body) > self._grasp.above + 0.04:
            return self.reset()
        away = np.abs(self._target(grip, body) - grip)
        arrived = {
            "above": away[:2].max() < 0.01 and away[2] < 0.03 and turn < 0.06,
            "descend": away.max() < 0.008,
            "lift": away[2] < 0.02 and self.env.task != "Lift",
            "carry": away[:2].max() < 0.008,
            "lower": away.max() < 0.01,
        }.get(self._phase, False)
        if arrived or self._steps >= PATIENCE.get(self._phase, np.inf):
            self._enter(PHASES[PHASES.index(self._phase) + 1])

    def _place(self):
        """Where the body's origin belongs when it is released, `(3,)`."""
        simulator = self.env.simulator
        if self.env.task == "Lift":
            return np.zeros(3)
        if self.env.task == "Stack":
            support, top = simulator.sim.data.get_body_xpos("cubeB_main"), 0.025
        else:
            support, top = simulator.target_bin_placements[simulator.object_id].copy(), 0.02
            base = simulator.robots[0].base_pos[:2]
            away = support[:2] - base
            support[:2] = base + away * min(1.0, REACH / np.linalg.norm(away))
        return support + [0.0, 0.0, top + self._grasp.rest + DROP]

    def _fingers(self):
        """The direction from one finger to the other, `(2,)`, in the horizontal plane."""
        data = self.env.simulator.sim.data
        apart = data.get_body_xpos("gripper0_leftfinger") - data.get_body_xpos("gripper0_rightfinger")
        return apart[:2] / np.linalg.norm(apart[:2])

    def _closing_axis(self, body):
        """The horizontal direction in which to grasp, `(2,)`: where nothing is in the way, with the least turning."""
        data = self.env.simulator.sim.data
        fingers = self._fingers()
        columns = data.get_body_xmat(self._grasp.body)[:2, ["xyz".index(axis) for axis in self._grasp.axes]].T
        axes = [column / np.linalg.norm(column) for column in columns] or [fingers]

        def cost(axis):
            turning = np.arccos(min(1.0, abs(axis @ fingers)))
            if self.env.task == "Stack":
                beside = data.get_body_xpos("cubeB_main")[:2] - body[:2]
                return turning + 3 * abs(axis @ beside) / np.linalg.norm(beside) ** 2 * 0.05
            if self.env.task.startswith("PickPlace"):
                ends = body[:2] + HAND * np.outer([-1.0, 1.0], axis)
                return turning + 100 * np.maximum(0, np.maximum(BINS_INSIDE[0] - ends, ends - BINS_INSIDE[1])).max()
            return turning

        return min(axes, key=cost)

    def _direction(self, grip):
        """Where the grip is, as seen from the arm's base, radians."""
        return np.arctan2(*(grip - self.env.simulator.robots[0].base_pos)[1::-1])

    def _turn(self, grip):
        """Rotation vector, `(3,)`, that points the hand down and the fingers along the axis of the grasp."""
        swung = self._direction(grip) - self._azimuth  # carried around the base, or the last joint came to its end
        down = self.env.simulator.sim.data.get_site_xmat("gripper0_grip_site")[:, 2]
        tilt = np.cross(down, [0.0, 0.0, -1.0])
        turn = swung + np.arctan2(*self._axis[::-1]) - np.arctan2(*self._fingers()[::-1])
        turn -= np.pi * np.round(turn / np.pi)  # the fingers may change places
        return np.array([*tilt[:2], turn])
