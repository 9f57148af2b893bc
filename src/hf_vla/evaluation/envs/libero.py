"""LIBERO: forty tasks of a Panda arm in four suites, as policies are evaluated in them.

Actions, rate and gripper are robosuite's: translation in units of 5 cm, rotation vector in units of half a radian,
gripper -1 opens and +1 closes; 20 Hz. State: position of the grip, rotation vector of the hand, the two finger joints.
The rotation vector is LIBERO's own, whose angle may lie beyond pi.

Pictures are those of published policies and datasets, `raw[::-1, ::-1]`. Raw pictures are flipped, not turned, so that
the result is upright but mirrored: left is right. Depth is mirrored with them, and `camera_pose` has its x axis
to the right of the picture, which makes a left-handed frame (determinant -1): with it and the intrinsics, depth lands
where things are.

Seed s below `FIRST_RECORDING_SEED` is the official initial state number s % 50 of the task: from 50 on they repeat.
Seeds from there on are for demonstrations and draw from LIBERO's own sampler. In both cases ten actions pass before
the first look, until objects have fallen into place. What stands fixed is not part of an official state: it is drawn,
within its region, from s % 50 too.

Source: https://arxiv.org/abs/2306.03310; preprocessing and horizons: https://arxiv.org/abs/2406.09246
"""

import atexit
import contextlib
import io
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np

from hf_vla.actions.spec import ActionSpec, GripperSpec, StateSpec
from hf_vla.evaluation.envs.base import FIRST_RECORDING_SEED, numpy_seed
from hf_vla.evaluation.envs.mujoco import MujocoTask

BOWL = "pick_up_the_black_bowl_{}_and_place_it_on_the_plate"
PLACES = (
    *("between_the_plate_and_the_ramekin", "next_to_the_ramekin", "from_table_center", "on_the_cookie_box"),
    *("in_the_top_drawer_of_the_wooden_cabinet", "on_the_ramekin", "next_to_the_cookie_box", "on_the_stove"),
    *("next_to_the_plate", "on_the_wooden_cabinet"),
)
GROCERIES = (
    *("alphabet_soup", "cream_cheese", "salad_dressing", "bbq_sauce", "ketchup", "tomato_sauce", "butter", "milk"),
    *("chocolate_pudding", "orange_juice"),
)
SUITES = {
    "libero_spatial": tuple(BOWL.format(place) for place in PLACES),
    "libero_object": tuple(f"pick_up_the_{name}_and_place_it_in_the_basket" for name in GROCERIES),
    "libero_goal": (
        "open_the_middle_drawer_of_the_cabinet",
        "put_the_bowl_on_the_stove",
        "put_the_wine_bottle_on_top_of_the_cabinet",
        "open_the_top_drawer_and_put_the_bowl_inside",
        "put_the_bowl_on_top_of_the_cabinet",
        "push_the_plate_to_the_front_of_the_stove",
        "put_the_cream_cheese_in_the_bowl",
        "turn_on_the_stove",
        "put_the_bowl_on_the_plate",
        "put_the_wine_bottle_on_the_rack",
    ),
    "libero_10": (
        "LIVING_ROOM_SCENE2_put_both_the_alphabet_soup_and_the_tomato_sauce_in_the_basket",
        "LIVING_ROOM_SCENE2_put_both_the_cream_cheese_box_and_the_butter_in_the_basket",
        "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it",
        "KITCHEN_SCENE4_put_the_black_bowl_in_the_bottom_drawer_of_the_cabinet_and_close_it",
        "LIVING_ROOM_SCENE5_put_the_white_mug_on_the_left_plate_and_put_the_yellow_and_white_mug_on_the_right_plate",
        "STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_back_compartment_of_the_caddy",
        "LIVING_ROOM_SCENE6_put_the_white_mug_on_the_plate_and_put_the_chocolate_pudding_to_the_right_of_the_plate",
        "LIVING_ROOM_SCENE1_put_both_the_alphabet_soup_and_the_cream_cheese_box_in_the_basket",
        "KITCHEN_SCENE8_put_both_moka_pots_on_the_stove",
        "KITCHEN_SCENE6_put_the_yellow_and_white_mug_in_the_microwave_and_close_it",
    ),
}
HORIZONS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
MOTION = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
POSE = ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right")
INITIAL_STATES = 50
SETTLING = 10  # actions
STILL = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
VISUAL = (1,)  # the group of geoms that are there to be seen
MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])


class LiberoTask(MujocoTask):
    """One of LIBERO's tasks; see [`~hf_vla.evaluation.envs.base.SimulatedTask`].

    Cameras: agentview, wrist (LIBERO's robot0_eye_in_hand), 256 x 256 in the literature; frontview, birdview,
    sideview, galleryview, robot0_robotview where a scene has them.
    """

    name, robot = "libero", "panda"
    how_to_install = (
        "`pip install 'hf-vla[sim]' easydict future pyyaml` and `pip install --no-deps hf-libero==0.1.4 bddl==1.0.1`"
    )
    default_cameras: ClassVar = {"agentview": (256, 256), "wrist": (256, 256)}
    action_spec = ActionSpec(
        MOTION, "delta_ee", rotation="axis_angle", frame="world", control_hz=20.0, gripper=GripperSpec(6, -1.0, 1.0)
    )
    state_spec = StateSpec(POSE, rotation="axis_angle", frame="world")

    @classmethod
    def splits(cls):
        """The four suites, in their published order."""
        return SUITES

    @classmethod
    def count_starts(cls, task):
        """Those that were published."""
        return INITIAL_STATES

    def _make(self):
        paths = libero_paths()
        import torch

        suite = next(suite for suite, tasks in SUITES.items() if self.task in tasks)
        self.horizon, self.instruction = HORIZONS[suite], instruction(self.task)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), numpy_seed(0):
            warnings.simplefilter("ignore")
            import libero.libero
            from robosuite.utils.transform_utils import quat2axisangle

            libero.libero._assets_path_cache = str(find_assets(paths))  # or it would try to download them
            from libero.libero.envs.env_wrapper import ControlEnv

            self.simulator = ControlEnv(
                bddl_file_name=str(Path(paths["bddl_files"], suite, f"{self.task}.bddl")),
                has_offscreen_renderer=False,
                use_camera_obs=False,
                ignore_done=True,  # its own end of an episode, after 1000 steps, is not ours
                hard_reset=False,  # or every episode would build the scene anew
            )
        self._axis_angle = quat2axisangle
        with torch.serialization.safe_globals(array_parts()):
            self.initial_states = torch.load(
                Path(paths["init_states"], suite, f"{self.task}.pruned_init"), weights_only=True
            )
        sim = self.simulator.sim
        names = {"wrist": "robot0_eye_in_hand"}
        self._film(sim.model._model, sim.data._data, geom_groups=VISUAL, scene_names=names)

    def _restart(self, seed):
        official = seed < FIRST_RECORDING_SEED
        gripper = self.simulator.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)  # robosuite would go on from the last episode's
        with numpy_seed(seed % INITIAL_STATES if official else seed):
            self.simulator.reset()
        if official:
            self.simulator.set_init_state(self.initial_states[seed % INITIAL_STATES])
        for _ in range(SETTLING):
            self.simulator.step(STILL)
        self._cameras.settle()

    def _advance(self, action):
        return self.simulator.step(action)[2]

    def _state(self):
        data, robot = self.simulator.sim.data, self.simulator.robots[0]
        turn = data.get_body_xquat(robot.robot_model.eef_name)[[1, 2, 3, 0]]
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([data.site_xpos[robot.eef_site_id], self._axis_angle(turn), fingers])

    def _pictures(self, camera, depth):
        picture, metres = super()._pictures(camera, depth)
        return np.ascontiguousarray(picture[:, ::-1]), np.ascontiguousarray(metres[:, ::-1]) if depth else None

    def camera_pose(self, camera):
        """Camera to world; see the base class, and the module for why its determinant is -1."""
        return super().camera_pose(camera) @ MIRROR


def instruction(task: str) -> str:
    """What published policies are told: a task's name without its scene; the problem files have other wordings."""
    words = task.split("_")
    scene = next((index for index, word in enumerate(words) if word.startswith("SCENE")), -1)
    return " ".join(words[scene + 1 :])


def libero_paths() -> dict[str, str]:
    """Where LIBERO's files are, by its config.yaml; without one, those of the package.

    LIBERO asks on the terminal when it is first imported and finds no config.yaml in LIBERO_CONFIG_PATH or ~/.libero;
    then a temporary folder with one is named in LIBERO_CONFIG_PATH, and nothing is asked or written elsewhere.

    Raises:
        ImportError: LIBERO is not installed.
    """
    import libero  # its libero.libero is what asks
    import yaml

    config = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"), "config.yaml")
    if not config.is_file():
        root = Path(libero.__file__).parent / "libero"
        paths = {"benchmark_root": root, "bddl_files": root / "bddl_files", "init_states": root / "init_files"}
        paths |= {"datasets": root.parent / "datasets", "assets": root / "assets"}
        config = Path(tempfile.mkdtemp(prefix="libero_"), "config.yaml")
        atexit.register(shutil.rmtree, config.parent, ignore_errors=True)
        config.write_text(yaml.safe_dump({key: str(path) for key, path in paths.items()}))
        os.environ["LIBERO_CONFIG_PATH"] = str(config.parent)
    return yaml.safe_load(config.read_text())


def find_assets(paths) -> Path:
    """The folder of LIBERO's meshes: where config.yaml says, or where LIBERO itself puts them.

    Raises:
        FileNotFoundError: they are in neither; the text says how to get them.
    """
    places = [Path(paths["assets"]), Path.home() / ".cache" / "libero" / "assets"]
    for place in places:
        if (place / "scenes").is_dir():
            return place
    raise FileNotFoundError(
        f"LIBERO's meshes are not installed: there is no scenes/ in {[str(place) for place in places]}. Get them with "
        "`hf download lerobot/libero-assets --repo-type dataset --local-dir FOLDER`, and let `assets:` in the "
        "config.yaml of the folder LIBERO_CONFIG_PATH say FOLDER; see docs/simulators.md."
    )


def array_parts() -> list:
    """What numpy arrays are made of in LIBERO's files, so that torch reads them without running what else is there."""
    from _codecs import encode

    from numpy._core.multiarray import _reconstruct

    rebuild = (_reconstruct, "numpy.core.multiarray._reconstruct")
    return [rebuild, (encode, "_codecs.encode"), np.ndarray, np.dtype, type(np.dtype(np.float64))]
