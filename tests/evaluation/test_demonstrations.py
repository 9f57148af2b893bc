import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from hf_vla.evaluation import demonstrations
from hf_vla.evaluation.demonstrations import Demonstrators, RecordingPlan, demonstrate
from hf_vla.evaluation.envs.experts.registry import EXPERTS, expert

PLAN = RecordingPlan("two_ways", ("reach-behind",), 3, noise=0.5)
SEED = PLAN.first_seed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"env": "metawrld"}, "No simulator is called 'metawrld'.*Did you mean 'metaworld'"),
        ({"tasks": ("reach-behnd",)}, "No task or split of two_ways.*'reach-behind'"),
        ({"tasks": ()}, "a task or more"),
        ({"rendering": "slow"}, "rendering among .*'slow'"),
        ({"episodes": 0}, "episodes to be 1 or more, came 0"),
        ({"horizon": 0}, "horizon to be 1 or more, came 0"),
        ({"noise": -0.1}, "came -0.1"),
        ({"noise": 1.1}, "came 1.1"),
        ({"first_seed": 999_999}, "1,000,000 or more, came 999,999: evaluations use the seeds below"),
    ],
)
def test_a_plan_says_what_is_wrong_with_it(changed, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **changed)


def test_a_simulator_without_an_expert_is_an_error():
    with pytest.raises(
        ValueError, match=r"No simulator with an expert is called 'metawrld'.*Did you mean 'metaworld'"
    ):
        expert("metawrld")
    assert expert("two_ways").__name__ == "TwoWaysExpert" and "metaworld" in EXPERTS


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise_is_executed_and_not_recorded(noise):
    env = PLAN.make("reach-behind")
    actor = expert("two_ways")(env)
    wanted, executed = [], []
    act, advance = actor.act, env.advance
    actor.act = lambda: wanted.append(act()) or wanted[-1]
    env.advance = lambda action: executed.append(action) or advance(action)
    frames = [frame for seed in range(SEED, SEED + 20) for frame in demonstrate(env, actor, seed, noise)]
    recorded, difference = np.array([frame["action"] for frame in frames]), np.array(executed) - np.array(wanted)
    assert np.array_equal(recorded, np.array(wanted, np.float32)) and recorded.dtype == np.float32
    np.testing.assert_allclose(difference.std(axis=0), [noise, noise, noise, 0.0], rtol=0.1, atol=1e-6)
    np.testing.assert_allclose(difference.mean(axis=0), 0.0, atol=0.05)
    assert abs(difference[:, 3]).max() < 1e-6  # the gripper's


def test_noise_follows_the_seed():
    env = PLAN.make("reach-behind")
    actor = expert("two_ways")(env)

    def states(seed, noise):
        return [frame["observation.state"].tolist() for frame in demonstrate(env, actor, seed, noise)]

    noisy = states(SEED, 0.5)
    assert noisy != states(SEED, 0.0) and noisy != states(SEED + 1, 0.5) and noisy == states(SEED, 0.5)


def test_the_expert_is_kept_to_what_the_robot_takes():
    env = PLAN.make("reach-behind")
    actor = expert("two_ways")(env)
    actor.act = lambda: np.array([3.0, 0.5, -2.0, 1.0])
    assert next(demonstrate(env, actor, SEED))["action"].tolist() == [1.0, 0.5, -1.0, 1.0]


def frames(demonstration):
    return [{key: np.asarray(value).tolist() for key, value in frame.items()} for frame in demonstration.frames]


@pytest.mark.parametrize(
    ("stop", "what"),
    [
        pytest.param(signal.SIGKILL, "died, exit code -9,", id="dies"),
        pytest.param(signal.SIGSTOP, "said nothing for 20 s", id="hangs", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_lost_is_replaced_and_its_attempt_made_again(stop, what, monkeypatch):
    monkeypatch.setattr(demonstrations, "SILENCE_S", 20.0)
    with Demonstrators(PLAN, 1) as demonstrators:
        before = demonstrators.submit("reach-behind", SEED).result()
        (worker,) = demonstrators._workers
        lost = worker._process.pid
        os.kill(lost, signal.SIGSTOP)  # so that it is met in the middle of its work
        again = demonstrators.submit("reach-behind", SEED)
        time.sleep(0.3)
        os.kill(lost, stop)
        after = again.result()
        assert worker._process.pid != lost
    assert before.restarts == [] and before.success
    assert after.restarts == [f"the process {what} at step 0"]
    assert frames(after) == frames(before) and after.success
    assert not worker._process.is_alive()


def test_gives_up_where_every_process_dies(monkeypatch):
    monkeypatch.setattr(demonstrations, "_work", os._exit)  # not a number: the process ends before its work begins
    monkeypatch.setattr(demonstrations, "ATTEMPTS", 2)
    with Demonstrators(PLAN, 1) as demonstrators:
        with pytest.raises(
            ChildProcessError, match=r"reach-behind, seed 1000000, cannot be demonstrated: (.*died.*){2}"
        ):
            demonstrators.submit("reach-behind", SEED).result()


def test_what_the_simulator_raises_comes_out():
    with Demonstrators(replace(PLAN, cameras={"side": (64, 64)}), 2) as demonstrators:
        with pytest.raises(ValueError, match="No camera of two_ways is called 'side'"):
            demonstrators.submit("reach-behind", SEED).result()


def test_leaving_does_not_wait_for_what_is_under_way():
    with Demonstrators(PLAN, 1) as demonstrators:
        demonstrators.submit("reach-behind", SEED).result()
        (worker,) = demonstrators._workers
        os.kill(worker._process.pid, signal.SIGSTOP)
        pending = [demonstrators.submit("reach-behind", SEED + seed) for seed in range(3)]
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert not worker._process.is_alive() and all(each.cancelled() or each.exception() for each in pending)
