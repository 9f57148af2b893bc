"""robosuite: a Panda arm with a parallel gripper at a table or at two bins.

Actions: translation in units of 5 cm and rotation vector in units of half a radian (+-1 each), from where the hand is,
along the axes of the world; gripper -1 opens, +1 closes; 20 Hz. State: position of the grip, rotation vector of the
hand, positions of the two finger joints. The hand points down, half a turn away from no rotation, where a rotation
vector that is kept within half a turn jumps between two signs; this one goes on beyond, as LIBERO's does. Cubes have
one size, while robosuite draws Lift's anew between 40 and 44 mm.

Source: https://arxiv.org/abs/2009.12293
"""

import logging
import warnings
from typing import ClassVar

import numpy as np

from hf_vla.actions.spec import ActionSpec, GripperSpec, StateSpec
from hf_vla.evaluation.envs.base import numpy_seed
from hf_vla.evaluation.envs.mujoco import MujocoTask

# task -> what the robot is told, control steps until it is given up
TASKS = {
    "Lift": ("pick up the red cube", 200),
    "Stack": ("stack the red cube on top of the green cube", 300),
    "PickPlaceCan": ("pick up the can and place it in the bin", 400),
    "PickPlaceMilk": ("pick up the milk and place it in the bin", 400),
    "PickPlaceCereal": ("pick up the cereal and place it in the bin", 400),
    "PickPlaceBread": ("pick up the bread and place it in the bin", 400),
}
MOTION = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
POSE = ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right")
VISUAL = (1,)  # the group of geoms that are there to be seen; 0 is for collisions


class RobosuiteTask(MujocoTask):
    """One of robosuite's tasks with a single Panda; see [`~hf_vla.evaluation.envs.base.SimulatedTask`].

    Cameras: agentview, wrist (robosuite's robot0_eye_in_hand), frontview, birdview, robot0_robotview, and sideview
    where there is a table.
    """

    name, robot = "robosuite", "panda"
    default_cameras: ClassVar = {"agentview": (128, 128), "wrist": (128, 128)}
    action_spec = ActionSpec(
        MOTION, "delta_ee", rotation="axis_angle", frame="world", control_hz=20.0, gripper=GripperSpec(6, -1.0, 1.0)
    )
    state_spec = StateSpec(POSE, rotation="axis_angle", frame="world")

    @classmethod
    def splits(cls):
        """The tasks on the table, those with two bins, and all."""
        tasks = tuple(TASKS)
        return {"lift_stack": tasks[:2], "pick_place": tasks[2:], "all": tasks}

    def _make(self):
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # it wants a file of macros
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import robosuite
            from robosuite.utils.transform_utils import quat2axisangle

        self.instruction, self.horizon = TASKS[self.task]
        options = {
            "controller_configs": robosuite.load_controller_config(default_controller="OSC_POSE"),
            "control_freq": self.action_spec.control_hz,
            "hard_reset": False,  # or every episode would build the scene anew
            "ignore_done": True,
            "has_offscreen_renderer": False,
            "use_camera_obs": False,
            "use_object_obs": False,
        }
        with numpy_seed(0):  # draws the size of Lift's cube
            self.simulator = robosuite.make(self.task, robots="Panda", **options)
        sim = self.simulator.sim
        self._axis_angle = quat2axisangle
        names = {"wrist": "robot0_eye_in_hand"}
        self._film(sim.model._model, sim.data._data, geom_groups=VISUAL, scene_names=names)

    def _restart(self, seed):
        gripper = self.simulator.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)  # robosuite would go on from the last episode's
        with numpy_seed(seed):
            self.simulator.reset()
        self._cameras.settle()

    def _advance(self, action):
        self.simulator.step(action)
        return self.simulator._check_success()

    def _state(self):
        data, robot = self.simulator.sim.data, self.simulator.robots[0]
        turn = data.get_body_xquat(robot.robot_model.eef_name)[[1, 2, 3, 0]]
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([data.site_xpos[robot.eef_site_id], self._axis_angle(turn), fingers])
