"""What is special about robosuite: the demonstrations in the repository come from it, so the two must agree."""

import json

import numpy as np
import pytest

from hf_vla.actions.rotations import convert
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.evaluation.envs.robosuite import TASKS, RobosuiteTask, numpy_seed

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def env():
    env = RobosuiteTask("Lift", {"agentview": (96, 96), "wrist": (96, 96)})
    yield env
    env.close()


def test_specs_are_the_demonstrations(demos):
    info = json.loads((demos / "meta" / "info.json").read_text())
    assert list(RobosuiteTask.action_spec.names) == info["features"]["action"]["names"]
    assert list(RobosuiteTask.state_spec.names) == info["features"]["observation.state"]["names"]
    assert (RobosuiteTask.action_spec.control_hz, RobosuiteTask.robot) == (info["fps"], info["robot_type"])
    cameras = {key.rpartition(".")[2] for key in info["features"] if "images" in key}
    assert cameras == set(RobosuiteTask.default_cameras)


def test_instructions_are_the_demonstrations_and_distinct(demos):
    dataset = LeRobotEpisodes(demos)
    told = {dataset[int(start)]["task"] for start in np.flatnonzero(dataset.column("frame_index") == 0)}
    instructions = [instruction for instruction, _ in TASKS.values()]
    assert told <= set(instructions)
    assert len(set(instructions)) == len(TASKS)


def test_episodes_begin_and_look_as_the_demonstrations_do(env, demos):
    item = LeRobotEpisodes(demos)[0]
    seen, _ = env.reset(seed=0)
    state, theirs = (np.asarray(one["observation.state"], dtype=float) for one in (seen, item))
    np.testing.assert_allclose(state[:3], theirs[:3], atol=0.08)
    np.testing.assert_allclose(state[6:], theirs[6:], atol=1e-3)
    turns = [convert(one[3:6], "axis_angle", "matrix") for one in (state, theirs)]
    assert np.linalg.norm(convert(turns[0] @ turns[1].T, "matrix", "axis_angle")) < 0.5
    for camera in env.sizes:
        picture = seen[f"observation.images.{camera}"] / 255
        recorded = np.asarray(item[f"observation.images.{camera}"]).transpose(1, 2, 0)
        apart = [np.abs(turned - recorded).mean() for turned in (picture, picture[::-1], picture[::-1, ::-1])]
        assert apart[0] < 0.06 and apart[0] < 0.7 * min(apart[1:])


def test_motions_are_along_the_axes_of_the_world(env):
    for axis in range(3):
        for sign in (-1.0, 1.0):
            env.restart(0)
            before = env.observe()["observation.state"][:3]
            for _ in range(4):
                env.advance(sign * 0.5 * np.eye(7)[axis])
            moved = env.observe()["observation.state"][:3] - before
            assert sign * moved[axis] > 0.012 and np.abs(np.delete(moved, axis)).max() < 0.005


def test_turns_are_about_the_axes_of_the_world(env):
    for axis in range(3):
        env.restart(0)
        before = convert(env.observe()["observation.state"][3:6], "axis_angle", "matrix")
        for _ in range(4):
            env.advance(0.4 * np.eye(7)[3 + axis])
        after = convert(env.observe()["observation.state"][3:6], "axis_angle", "matrix")
        turned = convert(after @ before.T, "matrix", "axis_angle")
        assert turned[axis] > 0.1 and np.abs(np.delete(turned, axis)).max() < 0.3 * turned[axis]


def test_the_gripper_closes_at_plus_one(env):
    openings = []
    for command in (env.action_spec.gripper.open, env.action_spec.gripper.closed):
        env.restart(0)
        for _ in range(15):
            env.advance(command * np.eye(7)[6])
        left, right = env.observe()["observation.state"][6:]
        openings.append(left - right)
    assert openings[0] > 0.07 and openings[1] < 0.01


def test_lift_succeeds_when_the_cube_is_up(env):
    env.restart(0)
    assert env.advance(np.zeros(7)) == (False, False)
    env.simulator.sim.data.set_joint_qpos("cube_joint0", np.array([0.0, 0.1, 0.95, 1.0, 0.0, 0.0, 0.0]))
    assert env.advance(np.zeros(7)) == (True, False)
    for _ in range(20):
        ended = env.advance(np.zeros(7))
    assert ended[0], "success at any step is success"


def test_every_task_starts(env):
    for task in RobosuiteTask.tasks()[1:]:
        other = RobosuiteTask(task, {"agentview": (32, 32)})
        seen, _ = other.reset(seed=0)
        assert seen["task"] == other.instruction
        assert other.advance(np.zeros(7)) == (False, False)
        other.close()


def test_the_seed_is_numpys_only_inside():
    with numpy_seed(1):
        inside = np.random.rand()
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    with numpy_seed(1):
        assert np.random.rand() == inside
    assert np.random.rand() == expected
