"""What is special about Meta-World."""

import numpy as np
import pytest

from hf_vla.evaluation.envs.base import FIRST_RECORDING_SEED
from hf_vla.evaluation.envs.experts.registry import expert
from hf_vla.evaluation.envs.metaworld import INSTRUCTIONS, MT10, MetaWorldTask

pytestmark = pytest.mark.sim


@pytest.fixture(scope="module")
def env():
    env = MetaWorldTask("reach-v3", {"corner2": (64, 64), "corner4": (64, 64)})
    yield env
    env.close()


def test_splits_are_those_of_the_literature():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    splits = MetaWorldTask.splits()
    sizes = {name: len(splits[name]) for name in ("easy", "medium", "hard", "very_hard", "mt10", "mt50")}
    assert sizes == {"easy": 28, "medium": 11, "hard": 6, "very_hard": 5, "mt10": 10, "mt50": 50}
    assert set(splits["mt50"]) == set(ALL_V3_ENVIRONMENTS) == set(MetaWorldTask.tasks())
    assert set(MT10) < set(splits["mt50"])


def test_the_easiest_are_those_that_the_expert_does_soonest():
    steps = {}
    for task in MetaWorldTask.splits()["easy"]:
        env = MetaWorldTask(task, {"corner4": (8, 8)})
        actor, lengths = expert("metaworld")(env), []
        for seed in range(FIRST_RECORDING_SEED, FIRST_RECORDING_SEED + 10):
            env.restart(seed)
            actor.reset()
            while not any(env.advance(actor.act())):
                pass
            lengths.append(env.episode_length)
        steps[task] = np.mean(lengths)
        env.close()
    assert sorted(steps, key=steps.get)[:10] == sorted(MetaWorldTask.splits()["easiest"], key=steps.get)


def test_fifty_instructions_are_distinct():
    assert len({text.lower() for text in INSTRUCTIONS.values()}) == 50


def test_the_goal_that_is_seen_is_the_episodes(env):
    goals = []
    for seed in range(3):
        env.restart(seed)
        goals.append(env.simulator.data.site("goal").xpos.copy())
        np.testing.assert_allclose(goals[-1], env.simulator._target_pos, atol=1e-9)
        np.testing.assert_allclose(goals[-1], env.numbers[-3:], atol=1e-9, err_msg="the expert sees another goal")
    assert np.ptp(goals, axis=0).max() > 0.01


def test_an_action_of_one_is_a_centimetre(env):
    for axis in range(3):
        env.restart(0)
        before = env.observe()["observation.state"]
        for _ in range(12):
            env.advance(np.eye(4)[axis] * -1)
        moved = env.observe()["observation.state"] - before
        assert -0.12 <= moved[axis] < -0.06
        assert np.abs(np.delete(moved[:3], axis)).max() < 0.02


def test_the_gripper_closes_at_plus_one(env):
    openings = []
    for effort in (env.action_spec.gripper.open, env.action_spec.gripper.closed):
        env.restart(0)
        for _ in range(30):
            env.advance(np.array([0.0, 0.0, 0.0, effort]))
        openings.append(env.observe()["observation.state"][3])
    assert openings[0] > openings[1] + 0.2


def test_the_simulator_does_not_end_an_episode_of_ours(env):
    env.restart(0)
    for _ in range(env.horizon + 20):
        env.advance(np.array([0.0, 0.0, 1.0, 0.0]))
    assert env.episode_length == env.horizon + 20
