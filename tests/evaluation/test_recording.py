"""What is recorded, whatever happens meanwhile. The simulators' own recordings have the marker `sim`."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.evaluation.demonstrations import Demonstration, Demonstrators, RecordingPlan, demonstrate
from hf_vla.evaluation.envs.experts.registry import expert
from hf_vla.evaluation.recording import GIVE_UP, LOG, Recorded, record

FIRST = 1_000_000
# of reach-v3's and button-press-v3's seeds some take more steps than these
PLANS = {
    "two_ways": RecordingPlan("two_ways", ("reach-behind",), 6, noise=0.3, horizon=37),
    "metaworld": RecordingPlan(
        "metaworld", ("button-press-v3", "reach-v3"), 3, {"corner4": (64, 64), "topview": (96, 64)}, horizon=59
    ),
}
EVERYWHERE = pytest.mark.parametrize(
    "plan", ["two_ways", pytest.param("metaworld", marks=pytest.mark.sim)], indirect=True, scope="module"
)
COMMAND = [sys.executable, "-c", "from hf_vla.cli.main import app; app()", "record"]


@pytest.fixture(scope="module")
def plan(request):
    return PLANS[request.param]


@pytest.fixture(scope="module")
def recorded(plan, tmp_path_factory):
    """A recording that one process made, undisturbed."""
    folder = tmp_path_factory.mktemp("recorded") / "dataset"
    record(plan, folder)
    return folder


def attempts(folder):
    return json.loads((folder / LOG).read_text())["attempts"]


def content(folder):
    """Every value of a dataset, and every pixel."""
    dataset = LeRobotEpisodes(folder)
    rows = [{key: np.asarray(value).tolist() for key, value in row.items()} for row in dataset]
    return rows, attempts(folder), {key: value["mean"].tolist() for key, value in dataset.statistics.items()}


def assert_same(folder, other):
    (rows, tried, means), (other_rows, other_tried, other_means) = content(folder), content(other)
    assert tried == other_tried
    assert len(rows) == len(other_rows)
    assert all(row == other_row for row, other_row in zip(rows, other_rows, strict=True))
    assert means.keys() == other_means.keys()
    for key, mean in means.items():
        np.testing.assert_allclose(mean, other_means[key], rtol=1e-6, atol=1e-9)


@EVERYWHERE
def test_the_dataset_is_what_was_rendered(plan, recorded):
    """Run in other environments, the episodes come out the same: pictures but for the codec."""
    dataset, row = LeRobotEpisodes(recorded), 0
    for task in plan.tasks:
        env = plan.make(task)
        assert dataset.fps == env.action_spec.control_hz
        assert dataset.features["action"]["names"] == list(env.action_spec.names)
        assert dataset.features["observation.state"]["names"] == list(env.state_spec.names)
        for attempt in attempts(recorded):
            if attempt["task"] != task:
                continue
            frames = list(demonstrate(env, expert(plan.env)(env), attempt["seed"], plan.noise))
            assert (attempt["episode"] is not None) == env.success and attempt["steps"] == len(frames)
            for frame in frames if env.success else ():
                item = dataset[row]
                assert item["task"] == env.instruction and item["episode_index"] == attempt["episode"]
                for key in ("action", "observation.state"):
                    assert item[key].numpy().tobytes() == frame[key].tobytes()
                for camera in env.sizes:
                    key = f"observation.images.{camera}"
                    seen = item[key].permute(1, 2, 0).numpy() * 255
                    assert seen.shape == frame[key].shape and abs(seen - frame[key]).mean() < 8
                row += 1
        env.close()
    assert row == len(dataset)


@EVERYWHERE
def test_only_successes_are_kept_and_failures_counted(plan, recorded):
    tried = attempts(recorded)
    for task in plan.tasks:
        own = [attempt for attempt in tried if attempt["task"] == task]
        assert [attempt["seed"] for attempt in own] == [*range(FIRST, FIRST + len(own))]
        kept = [attempt for attempt in own if attempt["episode"] is not None]
        assert len(kept) == plan.episodes and own[-1] is kept[-1]
    assert any(attempt["episode"] is None for attempt in tried)
    assert [a["episode"] for a in tried if a["episode"] is not None] == [*range(len(plan.tasks) * plan.episodes)]
    lengths = np.bincount([int(row["episode_index"]) for row in LeRobotEpisodes(recorded, cameras=[])])
    assert lengths.tolist() == [attempt["steps"] for attempt in tried if attempt["episode"] is not None]


@EVERYWHERE
def test_the_log_says_what_was_asked_for(plan, recorded):
    log = json.loads((recorded / LOG).read_text())
    info = json.loads((recorded / "meta" / "info.json").read_text())
    assert info["robot_type"] == plan.make(plan.tasks[0]).robot != plan.env
    assert log["plan"]["env"] == plan.env and log["plan"]["tasks"] == list(plan.tasks)
    assert {name: tuple(size) for name, size in log["plan"]["cameras"].items()} == plan.make(plan.tasks[0]).sizes
    assert (log["plan"]["first_seed"], log["plan"]["noise"]) == (FIRST, plan.noise)
    assert log["versions"].keys() >= {"hf-vla", "numpy", *({"metaworld", "mujoco"} if plan.env == "metaworld" else ())}


@EVERYWHERE
def test_two_processes_record_the_same_as_one(plan, recorded, tmp_path):
    told = []
    done = record(plan, tmp_path / "dataset", processes=2, on_progress=lambda *progress: told.append(progress))
    assert_same(tmp_path / "dataset", recorded)
    tried = attempts(recorded)
    for task in plan.tasks:
        failures = sum(attempt["task"] == task and attempt["episode"] is None for attempt in tried)
        assert done[task] == Recorded(plan.episodes, failures) and done[task].attempts == plan.episodes + failures
    assert [sum(task.attempts for task in found.values()) for found, _ in told] == [*range(len(tried) + 1)]
    assert told[0][1] == 0 and told[-1][1] == len(LeRobotEpisodes(recorded))


def command(plan, folder):
    named = {"env": plan.env, "tasks": ",".join(plan.tasks), "episodes": plan.episodes, "noise": plan.noise}
    named |= {"horizon": plan.horizon, "out": folder, "processes": 2}
    return [*COMMAND, *(text for name, value in named.items() for text in (f"--{name}", str(value)))]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
@EVERYWHERE
def test_an_interrupted_recording_goes_on(plan, stop, tmp_path):
    episodes = 3 if plan.env == "metaworld" else 30
    plan, folder, whole = replace(plan, cameras=None, episodes=episodes), tmp_path / "dataset", tmp_path / "whole"
    record(plan, whole)
    total = len(plan.tasks) * plan.episodes
    process = subprocess.Popen(
        command(plan, folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while process.poll() is None and not ((folder / LOG).exists() and attempts(folder)):
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, stop) if stop is signal.SIGKILL else os.killpg(process.pid, stop)
    said, errors = process.communicate()
    assert process.returncode != 0 and "Traceback" not in errors
    assert ("the same command goes on" in said) == (stop is signal.SIGINT)
    end = time.monotonic() + 60
    while any(map(is_running, children)):
        assert time.monotonic() < end, "a process of the recording goes on without it"
        time.sleep(0.1)
    saved = sum(attempt["episode"] is not None for attempt in attempts(folder))
    assert saved < total, "it was interrupted too late to show anything"
    subprocess.run(command(plan, folder), check=True, capture_output=True)
    assert_same(folder, whole)


def test_ctrl_c_while_its_processes_start_is_no_traceback(tmp_path):
    process = subprocess.Popen(
        command(PLANS["two_ways"], tmp_path / "dataset"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # the tracker of multiprocessing's resources, and two that record
    while len(psutil.Process(process.pid).children()) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)  # Python has begun, and imports
    os.killpg(process.pid, signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "the same command goes on" in said and "Traceback" not in errors


def test_goes_on_where_an_episode_was_noted_but_not_saved(tmp_path):
    plan = PLANS["two_ways"]
    record(plan, tmp_path / "whole")
    half = replace(plan, episodes=2)
    record(half, tmp_path / "half")
    log = json.loads((tmp_path / "half" / LOG).read_text())
    log["plan"]["episodes"] = plan.episodes
    following = attempts(tmp_path / "whole")[len(log["attempts"]) :]
    assert log["attempts"] == attempts(tmp_path / "whole")[: len(log["attempts"])]
    until = next(place for place, attempt in enumerate(following) if attempt["episode"] is not None)
    log["attempts"] += following[: until + 1]
    (tmp_path / "half" / LOG).write_text(json.dumps(log))
    record(plan, tmp_path / "half")
    assert_same(tmp_path / "half", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"episodes": 7}, "episodes: then 6, now 7"),
        ({"noise": 0.25, "first_seed": FIRST + 5}, "noise: then 0.3, now 0.25; first_seed: then 1000000, now 1000005"),
        ({"cameras": {"top": (80, 64)}}, r"cameras: then \{'top': \[64, 64\]\}, now \{'top': \[80, 64\]\}"),
        ({"horizon": None}, "horizon: then 37, now None"),
    ],
)
@pytest.mark.parametrize("plan", ["two_ways"], indirect=True, scope="module")
def test_another_recording_is_refused(plan, recorded, changed, message):
    before = {path: path.read_bytes() for path in recorded.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"holds a recording that differs in {message}. Choose another folder"):
        record(replace(plan, **changed), recorded)
    assert before == {path: path.read_bytes() for path in recorded.rglob("*") if path.is_file()}


@pytest.mark.parametrize("plan", ["two_ways"], indirect=True, scope="module")
def test_other_versions_are_refused(plan, recorded, monkeypatch):
    monkeypatch.setattr("hf_vla.evaluation.recording.version", lambda name: "9.9")
    with pytest.raises(ValueError, match="numpy: then '2.*', now '9.9'"):
        record(plan, recorded)


def test_a_dataset_of_another_making_is_refused(tmp_path):
    plan = replace(PLANS["two_ways"], episodes=1)
    record(plan, tmp_path)
    (tmp_path / LOG).unlink()
    with pytest.raises(ValueError, match="holds episodes that are not in meta/recording.json; choose another folder"):
        record(plan, tmp_path)


def test_no_attempt_is_in_vain_and_few_wait(tmp_path, monkeypatch):
    submitted, waiting = [], []
    submit = Demonstrators.submit
    monkeypatch.setattr(Demonstrators, "submit", lambda self, *what: submitted.append(what) or submit(self, *what))

    def on_progress(recorded, frames):
        waiting.append(len(submitted) - sum(task.attempts for task in recorded.values()))

    record(PLANS["two_ways"], tmp_path, processes=2, on_progress=on_progress)
    assert submitted == [(attempt["task"], attempt["seed"]) for attempt in attempts(tmp_path)]
    assert max(waiting) == 3  # and the one that was waited for


def test_a_task_that_only_fails_is_given_up(tmp_path):
    plan = replace(PLANS["two_ways"], horizon=3)
    expected = {"reach-behind": Recorded(0, GIVE_UP, GIVE_UP)}
    assert record(plan, tmp_path, processes=2) == expected and expected["reach-behind"].given_up
    tried = attempts(tmp_path)
    assert [(attempt["seed"], attempt["steps"]) for attempt in tried] == [(FIRST + n, 3) for n in range(GIVE_UP)]
    assert record(plan, tmp_path) == expected and attempts(tmp_path) == tried


def test_a_success_among_failures_is_worth_waiting_for():
    found = Recorded()
    for success in [*[False] * (GIVE_UP - 1), True, *[False] * (GIVE_UP - 1)]:
        found = found.after(success)
        assert not found.given_up
    assert found == Recorded(1, 2 * GIVE_UP - 2, GIVE_UP - 1) and found.after(False).given_up


def test_restarts_are_noted(tmp_path, monkeypatch):
    class Restarted(Demonstration):
        def __init__(self, task, seed, success=False, frames=None, restarts=()):
            super().__init__(task, seed, success, frames or [], ["the process died"] if seed == FIRST + 1 else [])

    monkeypatch.setattr("hf_vla.evaluation.demonstrations.Demonstration", Restarted)
    record(replace(PLANS["two_ways"], episodes=2, horizon=60), tmp_path)
    assert [attempt.get("restarts") for attempt in attempts(tmp_path)] == [None, ["the process died"]]


def test_no_processes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="1 process or more, came 0"):
        record(PLANS["two_ways"], tmp_path / "dataset", processes=0)
    assert not (tmp_path / "dataset").exists()
