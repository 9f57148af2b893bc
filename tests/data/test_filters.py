import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from hf_vla.data.filters import REASONS, find_flaws, reaching
from hf_vla.data.lerobot import LeRobotEpisodes

GRIPPER = 3


@pytest.fixture
def sawyer(demos, rewrite, tmp_path):
    """A real dataset whose columns a function of their rows changes; in each episode the arm moves smoothly."""

    def make(**changes):
        root = tmp_path / "sawyer"
        if not root.exists():
            shutil.copytree(demos.parent / "metaworld_demos", root, ignore=shutil.ignore_patterns("videos"))
        (path,) = root.glob("data/*/*.parquet")
        for key, change in changes.items():
            key = key.replace("__", ".")
            column = change(LeRobotEpisodes(root, cameras=[]))
            rewrite(path, key, lambda old, new=column: pa.array(new.tolist(), old.type))
        return LeRobotEpisodes(root, cameras=[])

    return make


def smooth(dataset):
    """Actions of a smooth motion, without gripper."""
    frames = dataset.column("frame_index")
    phase = 0.2 * frames[:, None] + np.arange(4)
    return np.where(np.arange(4) == GRIPPER, -1.0, 0.5 * np.sin(phase)).astype(np.float32)


def rows(found, reason):
    return np.flatnonzero(found.found[reason]).tolist()


def flaws(dataset, kind="delta_ee", **options):
    return find_flaws(dataset, kind, GRIPPER, **options)


def test_without_thresholds_nothing_is_found(sawyer):
    found = flaws(sawyer(action=lambda dataset: smooth(dataset) * 0))
    assert not found.taken_out.any() and not found.spoilt.any() and list(found.lines()) == []
    assert list(found.found) == list(REASONS)


def test_idle_rows_neither_move_nor_tell_the_gripper_anything(sawyer):
    def change(dataset):
        actions = smooth(dataset)
        actions[[0, 1, 10, 11, 12], :GRIPPER] = 0.001
        actions[11:, GRIPPER] = 1.0  # row 11 closes the gripper: it is an action though the arm rests
        return actions

    found = flaws(sawyer(action=change), idle=0.01)
    assert rows(found, "idle") == [0, 1, 10, 12] and found.taken_out.sum() == 4
    assert rows(flaws(sawyer(), idle=0.0001), "idle") == []


@pytest.mark.parametrize("kind", ["absolute_ee", "joint"])
def test_a_position_that_is_held_is_idle_and_one_that_changes_is_not(sawyer, kind):
    def change(dataset):
        actions = np.cumsum(smooth(dataset), axis=0).astype(np.float32)
        actions[:, GRIPPER] = -1
        actions[21:24, :GRIPPER] = actions[20, :GRIPPER]
        return actions

    dataset = sawyer(action=change)
    starts = dataset.episode_starts[:-1].tolist()
    assert rows(flaws(dataset, kind, idle=0.001), "idle") == [21, 22, 23]
    assert not set(starts) & set(rows(flaws(dataset, kind, idle=10.0), "idle"))  # where it came from is not known


def test_outliers_stay_in_the_timeline(sawyer):
    def change(dataset):
        actions = smooth(dataset)
        actions[30, 1], actions[40, GRIPPER] = 9.0, 50.0
        return actions

    found = flaws(sawyer(action=change), outliers=3.0)
    assert rows(found, "outlier") == [30]  # the gripper is not judged
    assert np.flatnonzero(found.spoilt).tolist() == [30] and not found.taken_out.any()


def test_sudden_changes_are_found_and_an_episodes_seam_is_none(sawyer):
    def change(dataset):
        actions = smooth(dataset)
        actions[20, 0] += 2.0
        return actions

    dataset = sawyer(action=change)
    assert rows(flaws(dataset, jerk=1.0), "jerk") == [20, 21, 22]  # the jump, its way back, and the rest of the two


@pytest.mark.parametrize("kind", ["delta_ee", "joint"])
def test_an_episodes_beginning_is_no_sudden_change(sawyer, kind):
    def steady(dataset):
        """Every episode moves at a speed of its own, from a place of its own."""
        actions = np.zeros((len(dataset), 4), np.float32)
        speed = 1.0 + dataset.column("episode_index")
        actions[:, 0] = speed if kind == "delta_ee" else speed * (10 + dataset.column("frame_index"))
        return actions

    assert rows(flaws(sawyer(action=steady), kind, jerk=1e-4), "jerk") == []


def test_an_episode_that_is_there_twice_is_left_out_once(sawyer):
    def same(key):
        def change(dataset):
            values = dataset.column(key).copy()
            lengths = np.diff(dataset.episode_starts)
            first, second = np.flatnonzero(lengths == np.bincount(lengths).argmax())[:2]
            start, length = dataset.episode_starts[[first, second]], lengths[first]
            values[start[1] : start[1] + length] = values[start[0] : start[0] + length]
            return values

        return change

    dataset = sawyer(action=same("action"))
    assert rows(flaws(dataset, duplicates=True), "duplicate") == []  # other states: another episode
    dataset = sawyer(observation__state=same("observation.state"))
    found = flaws(dataset, duplicates=True)
    (episode,) = np.unique(dataset.column("episode_index")[found.taken_out])
    assert found.taken_out.sum() == np.diff(dataset.episode_starts)[episode] and episode > 0


def test_rows_that_are_not_judged_are_neither_found_nor_usual(sawyer):
    def change(dataset):
        actions = smooth(dataset)
        actions[:100, :GRIPPER] = 1000.0
        return actions

    dataset = sawyer(action=change)
    judged = np.arange(len(dataset)) >= 100
    assert rows(flaws(dataset, outliers=1.0), "outlier") == []  # 4 % of the rows make it usual
    assert rows(flaws(dataset, outliers=1.0, judged=judged), "outlier") == []
    narrow = flaws(dataset, idle=0.9, judged=judged)
    assert not narrow.taken_out[:100].any() and narrow.taken_out.any()


def test_chunks_reach_ahead_but_not_into_the_next_episode():
    spoilt = np.zeros(10, bool)
    spoilt[[3, 6]] = True
    assert np.flatnonzero(reaching(spoilt, np.array([0, 6, 10]), 3)).tolist() == [1, 2, 3, 6]
    assert reaching(spoilt, np.array([0, 6, 10]), 1).tolist() == spoilt.tolist()


def test_the_report_says_what_and_why(sawyer):
    def change(dataset):
        actions = smooth(dataset)
        actions[[1, 2, 5], :GRIPPER] = 0
        return actions

    found = flaws(sawyer(action=change), idle=0.01)
    report = json.loads(json.dumps(found.report()))
    assert report["dropped"]["idle"]["rows"] == 3
    assert report["dropped"]["idle"]["episodes"] == {"0": [[1, 2], [5, 5]]}
    assert report["dropped"]["jerk"] == {"means": REASONS["jerk"], "rows": 0, "episodes": {}}
    (line,) = found.lines()
    assert "idle: 3 rows (0.133 %) of 1 episodes, first in episode 0, frame 1" in line


@pytest.mark.parametrize("name", ["idle", "outliers", "jerk"])
def test_a_negative_threshold(sawyer, name):
    with pytest.raises(ValueError, match=f"Expected {name} of 0 or more, as a share of the actions' range, came -1"):
        flaws(sawyer(), **{name: -1})
