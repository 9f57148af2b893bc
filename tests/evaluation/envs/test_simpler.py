"""SimplerEnv, where MS_ASSET_DIR points at its assets and a Vulkan driver is there; see also the contract tests."""

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("mani_skill", exc_type=ImportError)

from hf_vla.actions.rotations import convert
from hf_vla.evaluation.envs.base import FIRST_RECORDING_SEED
from hf_vla.evaluation.envs.experts.simpler import SimplerExpert
from hf_vla.evaluation.envs.simpler import TASKS, SimplerTask

pytestmark = pytest.mark.sim
CAMERA = "3rd_view_camera"
MISSING = "from hf_vla.evaluation.envs.simpler import SimplerTask; SimplerTask('widowx_stack_cube')"


def open_env(task, **options):
    try:
        return SimplerTask(task, **options)
    except (FileNotFoundError, RuntimeError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=TASKS)
def env(request):
    """Every task, all of them in one process."""
    env = open_env(request.param)
    yield env
    env.close()


@pytest.fixture(scope="module")
def stack():
    env = open_env("widowx_stack_cube", cameras={CAMERA: (320, 160)}, depth=True)
    yield env
    env.close()


def where(env):
    """Places of object and target, (2, 3)."""
    return np.stack([thing.pose.p[0].numpy() for thing in env.simulator.objs.values()])


def test_instruction_and_horizon_are_maniskills(env):
    from mani_skill.utils.registration import REGISTERED_ENVS

    assert env.simulator.get_language_instruction() == [env.instruction]
    assert REGISTERED_ENVS[TASKS[env.task].scene].max_episode_steps == env.horizon


def test_seeds_count_through_the_published_list(env):
    states = len(env._places) * len(env.simulator.quat_configs)
    assert states == (64 if "eggplant" in env.task else 24)
    places = []
    for seed in (1, 1 + states, 2, FIRST_RECORDING_SEED, FIRST_RECORDING_SEED + states):
        env.restart(seed)
        places.append(where(env))
    np.testing.assert_array_equal(places[0], places[1])
    for one, other in ((1, 2), (3, 4)):
        assert np.abs(places[one] - places[other]).max() > 1e-4 or "carrot" in env.task


def test_demonstrations_begin_beside_evaluations_and_not_far(env):
    states = len(env._places) * len(env.simulator.quat_configs)
    seed = FIRST_RECORDING_SEED + 3
    env.restart(seed % states)
    published = where(env)
    env.restart(seed)
    moved = np.abs(where(env) - published)[:, :2].max(axis=1)
    assert 1e-3 < moved[0] < 0.03 and moved[1] < 0.03


def test_expert_solves_the_task(env):
    expert, solved = SimplerExpert(env), 0
    for seed in (0, 1, FIRST_RECORDING_SEED):
        env.restart(seed)
        expert.reset()
        ended = False
        while not ended:
            ended = any(env.advance(expert.act()))
        solved += env.success
    assert solved >= 2


def test_doing_nothing_solves_nothing(stack):
    stack.restart(0)
    while not stack.advance(np.zeros(7))[1]:
        pass
    assert not stack.success


def test_actions_move_the_hand_as_they_say(stack):
    stack.restart(0)
    before = stack.observe()["observation.state"].astype(float)
    moves = np.array([0.01, 0.02, -0.01, 0.04, -0.05, 0.06, -1.0])
    for action in (moves, *[np.r_[np.zeros(6), -1.0]] * 5):
        stack.advance(action)
    after = stack.observe()["observation.state"].astype(float)
    np.testing.assert_allclose(after[:3] - before[:3], moves[:3], atol=2e-3)
    turns = [convert(state[3:6], "euler_xyz", "matrix") for state in (before, after)]
    made = convert(turns[1] @ turns[0].T, "matrix", "euler_xyz")
    np.testing.assert_allclose(made, moves[3:6], atol=0.01)
    assert before[7] == pytest.approx(1.0, abs=0.01) and after[7] < 0.05
    assert before[6] == after[6] == 0.0


def test_other_sizes_show_the_same_view(stack):
    full = open_env(stack.task)
    picture = full.reset(seed=0)[0][f"observation.images.{CAMERA}"].astype(float)
    full.close()
    small = stack.reset(seed=0)[0][f"observation.images.{CAMERA}"].astype(float)
    shrunk = picture.reshape(160, 3, 320, 2, 3).mean(axis=(1, 3))
    assert np.abs(small - shrunk).mean() < 4
    np.testing.assert_allclose(stack.camera_specs[CAMERA].intrinsics[0][0], 623.588 / 2)
    np.testing.assert_allclose(stack.camera_specs[CAMERA].intrinsics[1][1], 623.588 / 3)


def test_depth_lands_on_the_cubes(stack):
    seen, _ = stack.reset(seed=0)
    (focal_x, _, x), (_, focal_y, y), _ = stack.camera_specs[CAMERA].intrinsics
    depth, pose = seen[f"observation.depth.{CAMERA}"].astype(float), stack.camera_pose(CAMERA)
    rows, columns = np.mgrid[:160, :320] + 0.5
    points = np.stack([(columns - x) / focal_x * depth, (rows - y) / focal_y * depth, depth], axis=-1)
    points = points @ pose[:3, :3].T + pose[:3, 3]
    green, yellow = where(stack)
    for cube, channel in ((green, 0), (yellow, 2)):
        on_top = (np.abs(points - (cube + [0, 0, 0.015])) < [0.012, 0.012, 0.003]).all(axis=-1)
        assert on_top.sum() > 10
        colour = seen[f"observation.images.{CAMERA}"][on_top].mean(axis=0)
        assert colour.argmin() == channel or colour[1] > 1.1 * colour[channel], colour


def test_two_tasks_in_one_process_keep_their_photographs():
    """ManiSkill3 keeps the photograph behind a scene in a class that all tasks share."""
    first = open_env("widowx_stack_cube", cameras={CAMERA: (64, 48)})
    before = first.reset(seed=0)[0][f"observation.images.{CAMERA}"]
    second = open_env("widowx_put_eggplant_in_basket", cameras={CAMERA: (64, 48)})
    np.testing.assert_array_equal(first.reset(seed=0)[0][f"observation.images.{CAMERA}"], before)
    sink = second.reset(seed=0)[0][f"observation.images.{CAMERA}"].astype(int)
    assert np.abs(sink - before).mean() > 20
    first.close(), second.close()


def test_missing_assets_are_named_with_the_way_to_them(tmp_path):
    surroundings = {**os.environ, "MS_ASSET_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", MISSING], env=surroundings, capture_output=True, text=True)
    assert "FileNotFoundError: SimplerEnv's assets are not installed" in done.stderr
    assert "download_asset bridge_v2_real2sim" in done.stderr and "MS_ASSET_DIR" in done.stderr
