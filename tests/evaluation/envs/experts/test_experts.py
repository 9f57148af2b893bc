"""Every expert solves what it is an expert in; run over the registry."""

import numpy as np
import pytest

from hf_vla.evaluation.envs.base import FIRST_RECORDING_SEED
from hf_vla.evaluation.envs.experts.registry import EXPERTS, expert
from hf_vla.evaluation.envs.registry import simulator

WITHOUT_SIMULATOR = {"two_ways"}  # so that it also runs by default
NAMES = [pytest.param(name, marks=[] if name in WITHOUT_SIMULATOR else pytest.mark.sim) for name in sorted(EXPERTS)]
FAST = {"metaworld": "button-press-topdown-v3"}  # else the first task


def successes(name, task, episodes):
    """How many episodes the expert solves."""
    cls = simulator(name)
    camera = next(iter(cls.default_cameras))
    try:
        env = cls(task, {camera: (32, 32)})
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(str(error))
    solver, solved = expert(name)(env), 0
    for seed in range(FIRST_RECORDING_SEED, FIRST_RECORDING_SEED + episodes):
        env.restart(seed)
        solver.reset()
        terminated = truncated = False
        while not (terminated or truncated):
            action = solver.act()
            assert action.shape == env.action_space.shape
            assert (action >= env.action_space.low).all() and (action <= env.action_space.high).all()
            terminated, truncated = env.advance(action)
        solved += terminated
    env.close()
    return solved


@pytest.mark.parametrize("name", NAMES)
def test_expert_solves_a_task(name):
    assert successes(name, FAST.get(name, simulator(name).tasks()[0]), 10) >= 9


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_expert_solves_every_task(name):
    solved = {task: successes(name, task, 10) for task in simulator(name).tasks()}
    assert min(solved.values()) >= 6, solved
    assert np.mean(list(solved.values())) >= 9.0, solved


def test_an_unknown_expert_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'robosuite'"):
        expert("robosuit")
