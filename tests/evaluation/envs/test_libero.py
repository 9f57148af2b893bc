"""LIBERO on stand-ins: its own problems, sampler, states and controller, with boxes where the meshes would be.

With the meshes (LIBERO_CONFIG_PATH names a folder whose config.yaml says where) the contract tests run on them, too.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from hf_vla.evaluation.envs.base import FIRST_RECORDING_SEED
from hf_vla.evaluation.envs.libero import HORIZONS, SUITES, LiberoTask, find_assets, instruction, libero_paths

pytest.importorskip("libero")
robosuite = pytest.importorskip("robosuite")  # after the environments, which tell MuJoCo how to draw
yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.sim
TASK = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
HOPE = ("alphabet_soup", "salad_dressing", "cream_cheese", "milk", "tomato_sauce", "butter")
BOX = """<mujoco model="{name}"><worldbody><body><body name="object">
<geom type="box" size="{size}" group="{group}" rgba="{colour}" density="300"/>
<geom type="box" size="{size}" group="1" contype="0" conaffinity="0" rgba="{colour}" mass="0.001"/>
<site name="contain_region" type="box" pos="0 0 0.05" quat="1 0 0 0" size="0.08 0.08 0.1" rgba="0 0 0 0"/>
</body><site name="bottom_site" pos="0 0 -{half}" rgba="0 0 0 0" size="0.005"/>
<site name="top_site" pos="0 0 {half}" rgba="0 0 0 0" size="0.005"/>
<site name="horizontal_radius_site" pos="0.03 0.03 0" rgba="0 0 0 0" size="0.005"/></body></worldbody></mujoco>"""


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """Stand-ins for what the task above loads: robosuite's empty room, and boxes."""
    folder, theirs = tmp_path_factory.mktemp("assets"), Path(robosuite.__file__).parent / "models" / "assets"
    room = (theirs / "arenas" / "empty_arena.xml").read_text().replace("tex-light-gray-plaster", "tex-wall")
    (folder / "scenes").mkdir()
    floor = '<worldbody><body name="floor"/>'
    (folder / "scenes" / "libero_floor_base_style.xml").write_text(room.replace("<worldbody>", floor))
    (folder / "textures").mkdir()
    for name in ("light-gray-floor-tile.png", "light-gray-plaster.png"):
        shutil.copy(theirs / "textures" / name, folder / "textures")
    for index, name in enumerate((*HOPE, "basket")):
        kind = "stable_scanned_objects" if name == "basket" else "stable_hope_objects"
        half = 0.01 if name == "basket" else 0.03
        box = {"size": f"0.03 0.03 {half}", "half": half, "group": 0, "colour": f"{index / 6} 0.2 {1 - index / 6} 1"}
        (folder / kind / name).mkdir(parents=True)
        (folder / kind / name / f"{name}.xml").write_text(BOX.format(name=name, **box))
    return folder


@pytest.fixture(scope="module")
def env(assets, tmp_path_factory):
    config = tmp_path_factory.mktemp("config")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBERO_CONFIG_PATH", str(tmp_path_factory.mktemp("none")))
        paths = libero_paths()
        (config / "config.yaml").write_text(yaml.safe_dump({**paths, "assets": str(assets)}))
        patch.setenv("LIBERO_CONFIG_PATH", str(config))
        env = LiberoTask(TASK, {"agentview": (96, 96), "wrist": (64, 64)}, depth=True, rendering="full")
        yield env
        env.close()


def test_suites_are_liberos(env):
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map

    assert {suite: list(tasks) for suite, tasks in SUITES.items()} == {s: libero_task_map[s] for s in SUITES}
    assert len(LiberoTask.tasks()) == 40
    assert set(HORIZONS) == set(SUITES)


def test_instructions_are_those_of_the_benchmark(env):
    from libero.libero.benchmark import grab_language_from_filename

    for task in LiberoTask.tasks():
        assert instruction(task) == grab_language_from_filename(f"{task}.bddl")


def test_every_task_has_its_problem_and_its_states(env):
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    paths = libero_paths()
    for suite, tasks in SUITES.items():
        for task in tasks:
            assert robosuite_parse_problem(str(Path(paths["bddl_files"], suite, f"{task}.bddl")))["goal_state"]
            assert Path(paths["init_states"], suite, f"{task}.pruned_init").is_file()
    assert env.initial_states.shape == (50, 110) and np.isfinite(env.initial_states).all()


def test_nothing_is_asked_or_written_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    paths = libero_paths()
    assert Path(paths["bddl_files"], "libero_10").is_dir()
    assert not list(tmp_path.iterdir())
    assert libero_paths() == paths, "the second time it finds the first one's"


def test_missing_meshes_are_named_with_the_way_to_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="lerobot/libero-assets --repo-type dataset"):
        find_assets({"assets": str(tmp_path / "nothing")})


def test_a_seed_is_an_official_state_and_they_repeat(env, monkeypatch):
    began = []
    monkeypatch.setattr(env.simulator, "set_init_state", began.append)
    for seed in (0, 7, 57, FIRST_RECORDING_SEED):
        env.restart(seed)
    assert len(began) == 3, "demonstrations begin elsewhere"
    np.testing.assert_array_equal(began, env.initial_states[[0, 7, 7]])


def test_official_states_put_objects_where_they_say(env, monkeypatch):
    monkeypatch.setattr("hf_vla.evaluation.envs.libero.SETTLING", 0)
    env.restart(7)
    sim = env.simulator.sim
    np.testing.assert_allclose(sim.get_state().flatten(), env.initial_states[7], atol=1e-12)


def test_objects_have_settled_and_no_step_is_lost(env):
    env.restart(0)
    assert env.simulator.env.timestep == 10
    assert env.horizon == 280 and env.episode_length == 0


def test_demonstrations_begin_elsewhere_each(env):
    soups = []
    for seed in (FIRST_RECORDING_SEED, FIRST_RECORDING_SEED + 1, FIRST_RECORDING_SEED):
        env.restart(seed)
        soups.append(env.simulator.sim.data.get_body_xpos("alphabet_soup_1_main")[:2].copy())
    assert np.abs(soups[0] - soups[1]).max() > 1e-4
    np.testing.assert_array_equal(soups[0], soups[2])


def test_pictures_are_the_published_ones(env):
    from robosuite.utils.binding_utils import MjRenderContextOffscreen

    seen, _ = env.reset(seed=1)
    sim = env.simulator.sim
    context = MjRenderContextOffscreen(sim, device_id=-1, max_width=96, max_height=96)
    context.vopt.geomgroup[0] = 0
    raw = sim.render(camera_name="agentview", width=96, height=96)
    context.gl_ctx.free()
    published = raw[::-1, ::-1].astype(int)
    assert np.abs(seen["observation.images.agentview"].astype(int) - published).mean() < 2
    assert np.abs(seen["observation.images.agentview"][:, ::-1].astype(int) - published).mean() > 5


def test_depth_lands_on_things_in_spite_of_the_mirror(env):
    seen, _ = env.reset(seed=1)
    (focal, _, x), (_, _, y), _ = env.camera_specs["agentview"].intrinsics
    pose, depth = env.camera_pose("agentview"), seen["observation.depth.agentview"].astype(float)
    rows, columns = np.mgrid[:96, :96] + 0.5
    points = np.stack([(columns - x) / focal * depth, (rows - y) / focal * depth, depth], axis=-1)
    points = points @ pose[:3, :3].T + pose[:3, 3]
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(-1.0)
    for name in ("alphabet_soup", "milk", "butter"):
        middle = env.simulator.sim.data.get_body_xpos(f"{name}_1_main")
        on_top = np.abs(points - (middle + [0, 0, 0.03])) < [0.03, 0.03, 0.004]
        assert on_top.all(axis=-1).sum() > 3, name


def test_state_is_the_published_one(env):
    from robosuite.utils.transform_utils import quat2axisangle

    env.restart(2)
    for _ in range(5):
        env.advance(np.array([0.3, -0.2, -0.4, 0.1, 0.2, 0.3, 1.0]))
    raw = env.simulator.env._get_observations(force_update=True)
    turn = quat2axisangle(raw["robot0_eef_quat"])
    expected = np.concatenate([raw["robot0_eef_pos"], turn, raw["robot0_gripper_qpos"]])
    np.testing.assert_allclose(env.observe()["observation.state"], expected, atol=1e-6)


def test_the_gripper_opens_at_minus_one_and_up_is_up(env):
    states = []
    for gripper in (1.0, -1.0):
        env.restart(2)
        for _ in range(10):
            env.advance(np.array([0, 0, 0.5, 0, 0, 0, gripper]))
        states.append(env.observe()["observation.state"])
    closed, opened = (state[6] - state[7] for state in states)
    assert opened > 0.07 > 0.02 > closed
    env.restart(2)
    assert states[0][2] > env.observe()["observation.state"][2] + 0.05


def test_success_is_liberos(env):
    env.restart(3)
    still = np.array([0, 0, 0, 0, 0, 0, -1.0])
    assert env.advance(still) == (False, False)
    basket = env.simulator.sim.data.get_body_xpos("basket_1_main")
    where = [*(basket + [0, 0, 0.05]), 1, 0, 0, 0]
    env.simulator.sim.data.set_joint_qpos("alphabet_soup_1_joint0", where)
    assert env.advance(still)[0] is True
