"""SimplerEnv's four WidowX tasks, simulated twins of BridgeData V2's scenes, under ManiSkill3.

Actions: motion in metres and roll, pitch, yaw in radians, along the axes of the robot's base, from the last target,
not from where the hand got to; gripper +1 open, -1 closed; 5 Hz. State, as Bridge's: position in the base's frame,
roll, pitch, yaw from a hand that points down, a zero, and how far the gripper is open (1 open, 0 closed). The camera
is Bridge's, a Logitech C920. Behind robot and objects its pictures show a photograph of the real scene; depth is that
of the simulated table there, to the millimetre, and as far as the camera sees where nothing is.

SimplerEnv has a list of initial states, 24 a task, 64 for the eggplant: seed s below `FIRST_RECORDING_SEED` is its
`episode_id`, which begins anew after the last. Seeds from there on are for demonstrations: from those states, objects
are moved by up to 15 mm along x and y (the eggplant by 5 mm), or demonstrations would begin where evaluations do.

SimplerEnv reads success from the last step of an episode that never ends early; here success at any step ends it. It
also hands rotations over as rotation vectors where ManiSkill3 expects angles; here they are converted, which differs
by less than 0.005 rad for a tenth of a radian. The robot's links do not collide with each other: as published, its
fingers touch the bar behind them and cannot close.

Source: https://arxiv.org/abs/2405.05941; https://arxiv.org/abs/2410.00425
"""

import logging
import warnings
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import numpy as np

from hf_vla.actions.rotations import convert
from hf_vla.actions.spec import ActionSpec, CameraSpec, GripperSpec, StateSpec
from hf_vla.evaluation.envs.base import FIRST_RECORDING_SEED, SimulatedTask, check_known


class Twin(NamedTuple):
    """A task: its name in ManiSkill3, metres by which demonstrations' objects are moved, published initial states."""

    scene: str
    instruction: str
    horizon: int
    moved: tuple[float, float] = (0.015, 0.015)
    starts: int = 24


TASKS = {
    "widowx_spoon_on_towel": Twin("PutSpoonOnTableClothInScene-v1", "put the spoon on the towel", 60),
    "widowx_carrot_on_plate": Twin("PutCarrotOnPlateInScene-v1", "put carrot on plate", 60),
    "widowx_stack_cube": Twin(
        "StackGreenCubeOnYellowCubeBakedTexInScene-v1", "stack the green block on the yellow block", 60
    ),
    "widowx_put_eggplant_in_basket": Twin(
        "PutEggplantInBasketScene-v1", "put eggplant into yellow basket", 120, (0.005, 0.0), 64
    ),
}
CAMERA = CameraSpec("3rd_view_camera", 640, 480, ((623.588, 0, 319.501), (0, 623.588, 239.545), (0, 0, 1)))
MOTION = ("x", "y", "z", "roll", "pitch", "yaw")
HAND_DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])  # Bridge's zero orientation, in the base
FARTHEST = 10.0  # metres that the camera sees
FINGER_CLOSED, FINGER_OPEN = 0.015, 0.037  # metres from the middle
ASSETS = ("tasks/bridge_v2_real2sim_dataset", "robots/widowx/wx250s.urdf")
SHADERS = {"fast": "minimal", "full": "default"}


class SimplerTask(SimulatedTask):
    """One of SimplerEnv's WidowX tasks; see [`~hf_vla.evaluation.envs.base.SimulatedTask`].

    Camera: 3rd_view_camera, 640 x 480 in the literature; another size shows the same view, squeezed where its aspect
    ratio differs, as published policies do with their pictures.
    """

    name, robot = "simpler", "widowx"
    how_to_install = "`pip install mani-skill==3.0.1 sapien==3.0.3`"
    default_cameras: ClassVar = {CAMERA.name: (CAMERA.width, CAMERA.height)}
    action_spec = ActionSpec(
        (*MOTION, "gripper"), "delta_ee", "euler_xyz", frame="base", control_hz=5.0, gripper=GripperSpec(6, 1.0, -1.0)
    )
    state_spec = StateSpec((*MOTION, "pad", "gripper"), "euler_xyz", frame="base")

    @classmethod
    def splits(cls):
        """The four tasks."""
        return {"widowx": tuple(TASKS)}

    @classmethod
    def count_starts(cls, task):
        """Those that were published."""
        return TASKS[task].starts

    def _make(self):
        for camera in self.sizes:
            check_known("camera of this scene", camera, self.default_cameras)
        self.instruction, self.horizon = TASKS[self.task].instruction, TASKS[self.task].horizon
        self.camera_specs = {name: CAMERA.scaled(*size) for name, size in self.sizes.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SAPIEN's, of a library of Vulkan that it brings itself
            self.simulator = self._twin()
        self.simulator._obs_mode = "none"  # a step takes no picture, until `_pictures` wants one
        self._places = self.simulator.xyz_configs.clone()

    def _twin(self):
        """Build ManiSkill3's environment."""
        import torch
        from mani_skill import ASSET_DIR, logger
        from mani_skill.agents.robots.widowx.widowx import WidowX250S
        from mani_skill.envs.tasks.digital_twins import bridge_dataset_eval  # noqa: F401  (registers the tasks)
        from mani_skill.utils.registration import REGISTERED_ENVS

        if missing := [str(ASSET_DIR / name) for name in ASSETS if not (ASSET_DIR / name).exists()]:
            raise FileNotFoundError(
                f"SimplerEnv's assets are not installed: there is no {missing}. Get them with `python -m "
                "mani_skill.utils.download_asset bridge_v2_real2sim -y` and the same for widowx250s, or set "
                "MS_ASSET_DIR to the folder whose data/ holds them before Python starts; see docs/simulators.md."
            )
        logger.setLevel(logging.ERROR)
        WidowX250S.disable_self_collisions = True
        published = REGISTERED_ENVS[TASKS[self.task].scene].cls
        # ManiSkill3 keeps these in the class: two tasks in one process would share a photograph
        own = {"_rgb_overlay_images": {}, "_objects_to_remove_from_greenscreen": []}
        twin = type(published.__name__, (published,), {**own, "SUPPORTED_OBS_MODES": ["rgb+depth+segmentation"]})
        views = {
            name: {"width": spec.width, "height": spec.height, "intrinsic": np.array(spec.intrinsics)}
            for name, spec in self.camera_specs.items()
        }
        try:
            return twin(
                sensor_configs={**views, "shader_pack": SHADERS[self.rendering]},
                sim_backend="physx_cpu",
                render_backend="gpu" if torch.cuda.is_available() else "cpu",
            )
        except RuntimeError as error:
            raise RuntimeError(
                f"SAPIEN could not be started ({error}). It draws with Vulkan; without a GPU that is Mesa's lavapipe, "
                "24.3 or newer, with VK_DRIVER_FILES naming its lvp_icd.json; see docs/simulators.md."
            ) from error

    def _restart(self, seed):
        import torch

        places = self._places.clone()
        if seed >= FIRST_RECORDING_SEED:
            reach = np.array(TASKS[self.task].moved)[:, None]
            places[..., :2] += torch.from_numpy(np.random.default_rng(seed).uniform(-reach, reach, (2, 2))).to(places)
        self.simulator.xyz_configs = places
        # a scene of its own: what PhysX remembers of the last episode would move objects by tenths of a millimetre
        with without_deprecations():
            self.simulator.reset(seed=seed, options={"episode_id": seed, "reconfigure": True})
        self.arm = self.simulator.agent.controller.controllers["arm"]

    def _advance(self, action):
        turn = convert(action[3:6], "euler_xyz", "euler_XYZ")
        with without_deprecations():
            return self.simulator.step(np.concatenate([action[:3], turn, action[6:]]))[-1]["success"].item()

    def _state(self):
        hand = self.arm.ee_pose_at_base
        turn = convert(hand.q[0].numpy(), "quaternion_wxyz", "matrix") @ HAND_DOWN.T
        fingers = self.simulator.agent.robot.get_qpos()[0, -2:].mean().item()
        opened = min((fingers - FINGER_CLOSED) / (FINGER_OPEN - FINGER_CLOSED), 1.0)
        return np.concatenate([hand.p[0].numpy(), convert(turn, "matrix", "euler_xyz"), [0.0, opened]])

    def _pictures(self, camera, depth):
        seen = self.simulator._get_obs_sensor_data()[camera]
        metres = seen["depth"][0, ..., 0].cpu().numpy().astype(np.float32) / 1000 if depth else None
        if depth:
            metres[metres == 0] = FARTHEST  # where nothing is
        return seen["rgb"][0].cpu().numpy(), metres

    def camera_pose(self, camera):
        """Camera to world; see the base class."""
        pose = self.simulator.get_sensor_params()[camera]["cam2world_gl"][0].cpu().numpy().astype(np.float64)
        return pose @ np.diag([1.0, -1.0, -1.0, 1.0])  # from OpenGL's axes

    def _action_space(self):
        return self.simulator.single_action_space

    def close(self):
        """Give scene and renderer back."""
        self.simulator.close()


@contextmanager
def without_deprecations():
    """Silence what Python and numpy 2 say of ManiSkill3's code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
