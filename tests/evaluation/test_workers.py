import os
import re
import time

import numpy as np
import pytest

pytest.importorskip("gymnasium")

from hf_vla.evaluation.workers import Begun, EnvironmentWorkers, Lost, SimulatorOptions, Went  # noqa: E402

FORWARD = np.tile(np.float32([[0.1, 0.0, 0.0, 1.0]]), (3, 1))


@pytest.fixture
def make(point):
    return lambda envs=1, processes=1, horizon=None, deadline_s=60.0, **options: EnvironmentWorkers(
        SimulatorOptions(point.PointTask, horizon=horizon, **options), envs, processes, deadline_s
    )


def only(workers):
    ((env, answer),) = workers.wait()
    return env, answer


def alike(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_a_chunk_is_what_its_steps_are(make, point):
    env = point.PointTask("left")
    expected, _ = env.reset(seed=3)
    with make() as workers:
        workers.begin(0, "left", 3)
        _, begun = only(workers)
        assert isinstance(begun, Begun) and begun.instruction == "Go to the left" and begun.horizon == 10
        assert alike(begun.observation, expected) and begun.picture is None
        assert (begun.action_spec, begun.camera_specs) == (env.action_spec, env.camera_specs)
        seen = [env.step(action)[0] for action in FORWARD]
        workers.advance(0, FORWARD)
        _, went = only(workers)
        assert isinstance(went, Went) and (went.steps, went.success, went.done) == (3, False, False)
        assert alike(went.observations[0], seen[-1]) and len(went.observations) == 1 and not went.pictures
        seen = [env.step(action)[0] for action in FORWARD]
        workers.advance(0, FORWARD, look_always=True, film=True)
        _, went = only(workers)
        assert all(alike(*pair) for pair in zip(went.observations, seen, strict=True))
        assert np.array_equal(went.pictures, [each["observation.images.corner4"] for each in seen])


def test_an_episode_ends_within_a_chunk(make):
    with make(horizon=5) as workers:
        workers.begin(0, "left", 3, film=True)
        assert only(workers)[1].picture.shape == (48, 48, 3)
        workers.advance(0, FORWARD)
        workers.advance(0, FORWARD, film=True)
        only(workers)
        _, went = only(workers)
        assert (went.steps, went.success, went.done, went.observations) == (2, False, True, [])
        assert len(went.pictures) == 2
        workers.begin(0, "left", 3)
        only(workers)
        workers.advance(0, -10 * np.ones((9, 4)))
        _, went = only(workers)
        assert went.success and went.done and went.steps < 5


def test_environments_of_several_tasks_share_processes(make, point, monkeypatch, tmp_path):
    monkeypatch.setenv(point.PIDS, str(tmp_path))
    with make(envs=3, processes=2) as workers:
        for env, task in enumerate(("left", "right", "left")):
            workers.begin(env, task, env)
        answers = {}
        while len(answers) < 3:
            answers |= workers.wait()
        assert [answers[env].instruction for env in range(3)] == [
            f"Go to the {end}" for end in ("left", "right", "left")
        ]
        workers.begin(0, "right", 5)  # the same environment goes on with another task
        assert only(workers)[1].instruction == "Go to the right" and not workers.busy
        assert workers.wait(0) == []
        pids = [int(file.name) for file in tmp_path.iterdir()]
        assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("kind", ["kill", "hang"])
def test_a_process_that_dies_or_hangs_is_replaced(make, point, monkeypatch, tmp_path, kind):
    monkeypatch.setenv(point.FAULT, f"{kind} left 3 4 {tmp_path / 'happened'}")
    with make(envs=2, deadline_s=60 if kind == "kill" else 30) as workers:
        for env, seed in ((0, 3), (1, 4)):
            workers.begin(env, "left", seed)
            only(workers)
        workers.advance(0, FORWARD)
        only(workers)
        before = time.monotonic()
        workers._processes[0]._deadline_s = 60 if kind == "kill" else 1.0
        workers.advance(0, FORWARD)
        lost = dict(workers.wait())
        why = "gave no answer for 1 s" if kind == "hang" else "died, exit code -9"
        assert lost == {0: Lost(f"its process {why}", True), 1: Lost(f"its process {why}", False)}
        assert kind == "kill" or time.monotonic() - before >= 1
        workers._processes[0]._deadline_s = 60
        workers.begin(0, "left", 3)
        workers.advance(0, np.tile(FORWARD, (2, 1)))
        assert isinstance(only(workers)[1], Begun) and only(workers)[1].steps == 6


def test_an_environment_that_raises_is_lost_alone(make, point, monkeypatch, tmp_path):
    monkeypatch.setenv(point.FAULT, f"raise left 3 0 {tmp_path / 'happened'}")
    monkeypatch.setenv(point.PIDS, str(tmp_path))
    with make(envs=2) as workers:
        for env, seed in ((0, 3), (1, 4)):
            workers.begin(env, "left", seed)
            only(workers)
        workers.advance(0, FORWARD)
        env, lost = only(workers)
        assert env == 0 and lost.guilty
        assert re.search(r"(?s)Traceback.*in _advance.*RuntimeError: the point is lost", lost.why)
        workers.advance(1, FORWARD)
        assert only(workers)[1].steps == 3
        workers.begin(0, "left", 3)
        assert only(workers)[1].instruction == "Go to the left"
    (file,) = [file for file in tmp_path.iterdir() if file.name.isdecimal()]
    assert file.read_text() == "...", "one process, and one environment of the two made anew"


def test_a_simulator_that_is_not_installed_says_so_itself(make, point, monkeypatch):
    monkeypatch.setenv(point.FAULT, "missing - -1 -1 -")
    with make() as workers, pytest.raises(ImportError, match="^The simulator 'point' needs swampland: `pip install"):
        workers.describe("left")
    monkeypatch.setenv(point.FAULT, "assets - -1 -1 -")
    with make() as workers, pytest.raises(FileNotFoundError, match="^The point's assets"):
        workers.describe("left")


def test_a_task_can_be_looked_at(make):
    with make(cameras={"top": (32, 24)}, depth=True) as workers:
        robot = workers.describe("right")
        assert robot.instruction == "Go to the right" and robot.observation is None and robot.refused == ""
        assert [(each.width, each.height) for each in robot.camera_specs.values()] == [(32, 24)]
        assert "gymnasium" in robot.versions
    with make(cameras={"front": (32, 24)}) as workers:
        robot = workers.describe("right")
        assert [*robot.camera_specs] == ["corner4"] and "scene is called 'front'" in robot.refused
