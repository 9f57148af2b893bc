import json
import shutil
import zlib

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from hf_vla.data import oxe_steps, schema
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.oxe import DATASETS, MIXTURES, oxe_dataset, oxe_mixture
from hf_vla.data.oxe_steps import EULER, OPERATIONS, STATES, parse, standardize

STEPS = 9
# numbers per step of what the datasets hold, as TensorFlow Datasets' catalogue lists them
WORLD = {"action/world_vector": 3, "action/rotation_delta": 3}
NATURAL = "observation/natural_language_instruction"
SHAPES = {
    "bridge_orig": {"action": 7, "observation/state": 7},
    "fractal20220817_data": {
        **WORLD,
        "action/gripper_closedness_action": 1,
        "observation/base_pose_tool_reached": 7,
        "observation/gripper_closed": 1,
    },
    "kuka": {
        **WORLD,
        "action/gripper_closedness_action": 1,
        "observation/clip_function_input/base_pose_tool_reached": 7,
        "observation/gripper_closed": 1,
    },
    "taco_play": {"action/rel_actions_world": 7, "observation/robot_obs": 15},
    "jaco_play": {
        "action/world_vector": 3,
        "action/gripper_closedness_action": 1,
        "observation/end_effector_cartesian_pos": 7,
    },
    "berkeley_cable_routing": {**WORLD, "observation/robot_state": 7},
    "roboturk": {**WORLD, "action/gripper_closedness_action": 1},
    "viola": {
        **WORLD,
        "action/gripper_closedness_action": None,
        "observation/joint_states": 7,
        "observation/gripper_states": 1,
    },
    "berkeley_autolab_ur5": {**WORLD, "action/gripper_closedness_action": None, "observation/robot_state": 15},
    "toto": {**WORLD, "action/open_gripper": None, "observation/state": 7},
    "language_table": {"action": 2, "observation/effector_translation": 2},
    "stanford_hydra_dataset": {"action": 7, "observation/state": 27},
    "austin_buds_dataset": {"action": 7, "observation/state": 24},
    "nyu_franka_play_dataset": {"action": 15, "observation/state": 13},
    "furniture_bench_dataset": {"action": 8, "observation/state": 35},
    "ucsd_kitchen_dataset": {"action": 8, "observation/state": 21},
    "austin_sailor_dataset": {"action": 7, "observation/state": 8},
    "austin_sirius_dataset": {"action": 7, "observation/state": 8},
    "dlr_edan_shared_control": {"action": 7, "observation/state": 7},
    "iamlab_cmu_pickup_insert": {"action": 8, "observation/state": 20},
    "utaustin_mutex": {"action": 7, "observation/state": 24},
    "berkeley_fanuc_manipulation": {"action": 6, "observation/state": 13},
    "cmu_stretch": {"action": 8, "observation/state": 4},
    "bc_z": {
        "action/future/xyz_residual": 30,
        "action/future/axis_angle_residual": 30,
        "action/future/target_close": 10,
        "observation/present/xyz": 3,
        "observation/present/axis_angle": 3,
        "observation/present/sensed_close": 1,
    },
    "fmb_dataset": {"action": 7, "observation/eef_pose": 7, "observation/state_gripper_pose": None},
    "dobbe": {"action": 7, "observation/state": 7},
    "droid": {
        "action_dict/cartesian_velocity": 6,
        "action_dict/gripper_position": 1,
        "observation/cartesian_position": 6,
        "observation/gripper_position": 1,
    },
    "rh20t_rlds": {
        "action/tcp_base": 6,
        "action/gripper": None,
        "observation/tcp_base": 6,
        "observation/gripper_width": None,
    },
}


def episode_of(name, steps=STEPS, seed=0):
    """An episode of random numbers in [-1, 1] with the dataset's keys and shapes."""
    generator = np.random.default_rng(seed)
    episode = {
        key: generator.uniform(-1, 1, (steps,) if width is None else (steps, width)).astype(np.float32)
        for key, width in SHAPES[name].items()
    }
    instruction = np.array([b"pick up the cup"] * steps, dtype=object)
    episode |= {"language_instruction": instruction, NATURAL: instruction, "success": np.array(True)}
    codes = [ord(letter) for letter in "push the heart"]
    return episode | {"observation/instruction": np.array([codes + [0] * 10] * steps)}


def test_the_table_and_the_catalogue_name_the_same_datasets():
    assert set(DATASETS) == set(SHAPES)


@pytest.mark.parametrize("name", DATASETS)
def test_every_entry_can_be_read(name):
    dataset = DATASETS[name]
    expressions = [*dataset.motion, dataset.gripper_command, *dataset.states]
    keys = {parse(text)[0] for text in expressions if " x " not in text}
    assert keys == set(SHAPES[name])
    assert dataset.motion_then in (None, *OPERATIONS) and dataset.state_layout in STATES
    assert set(dataset.cameras) <= {"primary", "secondary", "wrist"} and "primary" in dataset.cameras
    assert set(dataset.bgr) <= set(dataset.cameras.values()) and set(dataset.intrinsics) <= set(dataset.cameras)
    assert dataset.action.control_hz == dataset.fps and dataset.action.gripper.open == 1.0
    assert dataset.rlds_action.kind == "delta_ee" and dataset.rlds_action.rotation == EULER
    assert len(dataset.action.names) == 7 and (dataset.state is None or len(dataset.state.names) == 8)


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_becomes_seven_actions_and_eight_states(name):
    dataset = DATASETS[name]
    steps = standardize(dataset, episode_of(name))
    length = STEPS - dataset.first - dataset.last
    assert steps["action"].shape == (length, 7) and steps["action"].dtype == np.float32
    assert ("observation.state" in steps) == bool(dataset.states) == (dataset.rlds_state is not None)
    if dataset.states:
        assert steps["observation.state"].shape == (length, 8) and steps["observation.state"].dtype == np.float32
        padding = [index for index, own in enumerate(dataset.rlds_state.names) if own.startswith("pad")]
        assert not steps["observation.state"][:, padding].any()
    assert steps["task"] == ("push the heart" if name == "language_table" else "pick up the cup")


def slow_binarize(values):
    carry, settled = values[-1], np.empty_like(values)
    for step in reversed(range(len(values))):
        if values[step] > 0.95 or values[step] < 0.05:
            carry = float(values[step] > 0.95)
        settled[step] = carry
    return settled


def slow_relative(values):
    command = [1 if value < -0.1 else -1 if value > 0.1 else 0 for value in values]
    state = next((-one for one in command if one), 1)
    states = []
    for one in command:
        state = one or state
        states.append(state / 2 + 0.5)
    return np.array(states)


@pytest.mark.parametrize(
    ("operation", "oracle"), [("binarize", slow_binarize), ("relative_to_absolute", slow_relative)]
)
def test_gripper_operations_equal_a_loop_over_the_steps(operation, oracle):
    generator = np.random.default_rng(1)
    for length in (1, 2, 7, 40):
        for _ in range(20):
            values = generator.choice([-1.0, -0.11, -0.09, 0.0, 0.04, 0.06, 0.11, 0.94, 0.96, 1.0], length)
            np.testing.assert_array_equal(OPERATIONS[operation](values[:, None])[:, 0], oracle(values))


def test_a_gripper_that_is_never_told_anything_is_open():
    np.testing.assert_array_equal(OPERATIONS["relative_to_absolute"](np.zeros((3, 1))), np.ones((3, 1)))


def test_changes_take_the_short_way_round():
    poses = np.array([[0, 0, 0, 3.1, -3.1, 0.2], [0.1, -0.2, 0.3, -3.1, 3.1, 0.5]])
    change = OPERATIONS["change_to_next"](poses)
    turn = 2 * np.pi - 6.2
    np.testing.assert_allclose(change, [[0.1, -0.2, 0.3, turn, -turn, 0.3], [0] * 6], atol=1e-12)


def test_motion_between_poses_leads_from_one_to_the_next():
    poses = np.random.default_rng(2).uniform(-1, 1, (12, 6))
    motion = OPERATIONS["motion_to_pose"](poses)
    np.testing.assert_allclose(motion[0], 0, atol=1e-12)
    np.testing.assert_allclose(poses[0, :3] + np.cumsum(motion[:, :3], axis=0), poses[:, :3], atol=1e-12)
    reached = Rotation.from_euler("xyz", poses[0, 3:])
    for turn, pose in zip(motion[1:, 3:], poses[1:, 3:], strict=True):
        reached = Rotation.from_euler("xyz", turn) * reached
        assert (reached * Rotation.from_euler("xyz", pose).inv()).magnitude() < 1e-9


def test_bridge_moves_by_the_states_reached():
    episode = episode_of("bridge_orig")
    episode["action"][:, 6] = [1, 1, 0.5, 0.5, 0, 0, 0.5, 1, 1]
    steps = standardize(oxe_dataset("bridge_orig"), episode)
    state = episode["observation/state"]
    np.testing.assert_allclose(steps["action"][:, :6], state[2:, :6] - state[1:-1, :6], atol=1e-6)
    np.testing.assert_array_equal(steps["action"][:, 6], [1, 0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(steps["observation.state"][:, :6], state[1:-1, :6])
    np.testing.assert_array_equal(steps["observation.state"][:, 7], state[1:-1, 6])


def test_fractal_closes_on_command():
    episode = episode_of("fractal20220817_data")
    episode["action/gripper_closedness_action"][:, 0] = [0, 0, 1, 0, 0, -1, 0, 0, 0]
    steps = standardize(oxe_dataset("fractal20220817_data"), episode)
    np.testing.assert_array_equal(steps["action"][:, 6], [1, 1, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(steps["action"][:, :3], episode["action/world_vector"])


def test_kuka_unpacks_compressed_numbers_and_leaves_failures_out():
    episode, key = episode_of("kuka"), "observation/clip_function_input/base_pose_tool_reached"
    plain = standardize(oxe_dataset("kuka"), episode)
    packed = np.array([zlib.compress(row.tobytes()) for row in episode[key]], dtype=object)
    np.testing.assert_array_equal(
        standardize(oxe_dataset("kuka"), episode | {key: packed})["observation.state"], plain["observation.state"]
    )
    assert standardize(oxe_dataset("kuka"), episode | {"success": np.array(False)}) is None


@pytest.mark.parametrize("name", ["ucsd_kitchen_dataset", "iamlab_cmu_pickup_insert"])
def test_absolute_poses_become_motion(name):
    generator = np.random.default_rng(3)
    position, angles = generator.uniform(-0.5, 0.5, (STEPS, 3)), generator.uniform(-1, 1, (STEPS, 3))
    if name == "ucsd_kitchen_dataset":
        action = np.concatenate([position * 1000, np.degrees(angles), np.ones((STEPS, 2))], axis=1)
    else:
        quaternions = Rotation.from_euler("xyz", angles).as_quat()
        action = np.concatenate([position, -quaternions, np.ones((STEPS, 1))], axis=1)  # -q is the same rotation
    steps = standardize(oxe_dataset(name), episode_of(name) | {"action": action.astype(np.float32)})
    np.testing.assert_allclose(steps["action"][:, :3], np.diff(position, axis=0), atol=1e-6)
    turns = Rotation.from_euler("xyz", angles[1:]) * Rotation.from_euler("xyz", angles[:-1]).inv()
    np.testing.assert_allclose(steps["action"][:, 3:6], turns.as_euler("xyz"), atol=1e-5)
    np.testing.assert_array_equal(steps["action"][:, 6], 1.0)


def test_rotations_come_out_as_roll_pitch_yaw():
    vector = np.random.default_rng(4).uniform(-1, 1, (STEPS, 3))
    episode = episode_of("bc_z") | {"observation/present/axis_angle": vector}
    state = standardize(oxe_dataset("bc_z"), episode)["observation.state"]
    np.testing.assert_allclose(state[:, 3:6], Rotation.from_rotvec(vector).as_euler("xyz"), atol=1e-6)
    residual = episode["action/future/axis_angle_residual"][:, :3]
    action = standardize(oxe_dataset("bc_z"), episode)["action"]
    np.testing.assert_allclose(action[:, 3:6], Rotation.from_rotvec(residual).as_euler("xyz"), atol=1e-6)
    np.testing.assert_allclose(action[:, 6], 1 - episode["action/future/target_close"][:, 0], atol=1e-6)


@pytest.mark.parametrize("command", [-1.0, 0.0, 0.25, 1.0])
def test_closing_grippers_are_clipped_and_turned_round(command):
    episode = episode_of("austin_buds_dataset")
    episode["action"][:, 6] = command
    steps = standardize(oxe_dataset("austin_buds_dataset"), episode)
    np.testing.assert_array_equal(steps["action"][:, 6], 1 - max(command, 0))


def test_pictures_and_instructions_of_the_kept_steps_come_along():
    episode = episode_of("bridge_orig") | {"observation/image_0": np.arange(STEPS), "observation/image_3": None}
    steps = standardize(oxe_dataset("bridge_orig"), episode)
    np.testing.assert_array_equal(steps["observation.images.image_0"], np.arange(1, STEPS - 1))
    assert set(steps) == {"action", "observation.state", "observation.images.image_0", "task"}
    empty = episode | {"language_instruction": np.array([b""] * STEPS, dtype=object)}
    assert standardize(oxe_dataset("bridge_orig"), empty)["task"] == ""


def test_damaged_episodes_are_refused():
    bridge, episode = oxe_dataset("bridge_orig"), episode_of("bridge_orig")
    with pytest.raises(ValueError, match=r"no 'observation/state'; it has \['action'"):
        standardize(bridge, {"action": episode["action"]})
    with pytest.raises(ValueError, match="has 2 step"):
        standardize(bridge, episode_of("bridge_orig", steps=2))
    for value in (np.nan, 1e28):
        broken = episode["observation/state"].copy()
        broken[4, 1] = value
        with pytest.raises(ValueError, match=r"action\[1\] is .* at step 3; expected finite values below 1000"):
            standardize(bridge, episode | {"observation/state": broken})
    with pytest.raises(ValueError, match=r"expected 9 steps of \('action\[-1:\] > binarize',\), came \[8\]"):
        standardize(bridge, episode | {"action": episode["action"][1:]})


@pytest.mark.parametrize(
    ("expression", "message"), [("action[6:7] > flip", "unknown operation"), ("action[6]", "Expected 'key'")]
)
def test_expressions_that_say_nothing_are_refused(expression, message):
    with pytest.raises(ValueError, match=message):
        oxe_steps.parse(expression)


def test_names_are_found_in_all_their_spellings():
    assert oxe_dataset("bridge_orig/1.0.0") is oxe_dataset("IPEC-COMMUNITY/bridge_orig_lerobot")
    buds = oxe_dataset("austin_buds_dataset_converted_externally_to_rlds/0.1.0")
    assert buds.lerobot == "IPEC-COMMUNITY/austin_buds_dataset_lerobot"
    with pytest.raises(ValueError, match=r"No Open X-Embodiment dataset 'bridge_orgi'\. Did you mean 'bridge_orig'\?"):
        oxe_dataset("bridge_orgi")
    with pytest.raises(ValueError, match=r"No mixture 'magic_soup_plus'\. Did you mean 'oxe_magic_soup_plus'"):
        oxe_mixture("magic_soup_plus")


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_hold_known_datasets(name):
    mixture = oxe_mixture(name)
    assert set(mixture) <= set(DATASETS) and all(weight > 0 for weight in mixture.values())
    mixture.clear()
    assert oxe_mixture(name)  # a copy was given


def test_mixtures_are_the_published_ones():
    assert MIXTURES["bridge"] == {"bridge_orig": 1.0} and MIXTURES["fractal"] == {"fractal20220817_data": 1.0}
    assert {name: len(mixture) for name, mixture in MIXTURES.items() if len(mixture) > 2} == {
        "rtx": 10,
        "oxe_magic_soup": 23,
        "oxe_magic_soup_plus": 27,
        "oxe_spatial_vla_plus": 28,
        "oxe_spatial_vla_plus_stage2": 27,
    }
    soup, spatial = MIXTURES["oxe_magic_soup_plus"], MIXTURES["oxe_spatial_vla_plus"]
    changed = {name: weight for name, weight in spatial.items() if weight != soup.get(name)}
    assert changed == {
        "kuka": 0.4,
        "toto": 0.5,
        "berkeley_fanuc_manipulation": 0.5,
        "fmb_dataset": 0.2,
        "rh20t_rlds": 0.015,
    }
    assert {**MIXTURES["oxe_spatial_vla_plus_stage2"], "droid": 0.06} == spatial
    assert MIXTURES["rtx"]["fractal20220817_data"] == 0.54087122203 and MIXTURES["rtx"]["jaco_play"] == 2.0


def test_lerobot_conversions_are_described_as_they_are():
    assert oxe_dataset("droid").cameras == {
        "primary": "exterior_image_1_left",
        "secondary": "exterior_image_2_left",
        "wrist": "wrist_image_left",
    }
    absolute = {name for name, dataset in DATASETS.items() if dataset.action.kind != "delta_ee"}
    assert absolute == {"ucsd_kitchen_dataset", "iamlab_cmu_pickup_insert"}
    assert oxe_dataset("ucsd_kitchen_dataset").action.rotation is None  # degrees are none of our formats
    assert oxe_dataset("bc_z").action.rotation == oxe_dataset("bc_z").state.rotation == "axis_angle"
    assert oxe_dataset("bc_z").rlds_state.rotation == EULER
    assert oxe_dataset("rh20t_rlds").lerobot is None
    camera = oxe_dataset("bridge_orig").intrinsics["primary"].scaled(224, 224)
    np.testing.assert_allclose(np.array(camera.intrinsics)[0], [623.588 * 0.35, 0, 319.501 * 0.35])


def test_the_version_of_the_lerobot_conversions_can_be_read(goldens, tmp_path):
    """They are v2.0: v2.1 with the statistics of all episodes in one file."""
    newer = LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v21_video")
    shutil.copytree(newer.root, tmp_path, dirs_exist_ok=True)
    info = json.loads((tmp_path / "meta/info.json").read_text()) | {"codebase_version": "v2.0"}
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    (tmp_path / "meta/episodes_stats.jsonl").unlink()
    stats = {key: {name: value.tolist() for name, value in own.items()} for key, own in newer.statistics.items()}
    (tmp_path / "meta/stats.json").write_text(json.dumps(stats))
    older = LeRobotEpisodes(tmp_path)
    assert len(older) == len(newer) and older.texts(schema.TASK).tolist() == newer.texts(schema.TASK).tolist()
    for key in (schema.ACTION, schema.STATE):
        np.testing.assert_array_equal(older.column(key), newer.column(key))
        np.testing.assert_array_equal(older.statistics[key]["mean"], newer.statistics[key]["mean"])
    camera = newer.camera_keys[0]
    assert (older[7][camera] == newer[7][camera]).all()
