import json
import shutil
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from hf_vla.data.filters import REASONS, DropReport, chunks_with, find_dropped
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


def rows(report, reason):
    return np.flatnonzero(report.dropped[reason]).tolist()


def drops(dataset, kind="delta_ee", **options):
    return find_dropped(dataset, kind, GRIPPER, **options)


def as_kind(kind, motions, dataset):
    """The same movement as motions or as positions; the gripper is a position in any case."""
    if kind == "delta_ee":
        return motions
    positions = np.concatenate(
        [part.cumsum(0, dtype=np.float64) for part in np.split(motions, dataset.episode_starts[1:-1])]
    )
    positions[:, GRIPPER] = motions[:, GRIPPER]
    return positions.astype(np.float32)


def test_without_thresholds_nothing_is_found(sawyer):
    found = drops(sawyer(action=lambda dataset: smooth(dataset) * 0))
    assert not found.removed.any() and not found.excluded.any() and list(found.lines()) == []
    assert list(found.dropped) == list(REASONS)


def test_idle_rows_neither_move_nor_tell_the_gripper_anything(sawyer):
    def change(dataset):
        actions = smooth(dataset)
        actions[[0, 1, 10, 11, 12], :GRIPPER] = 0.001
        actions[11:, GRIPPER] = 1.0  # row 11 closes the gripper: it is an action though the arm rests
        return actions

    found = drops(sawyer(action=change), idle=0.01, idle_seconds=0)
    assert rows(found, "idle") == [0, 1, 10, 12] and found.removed.sum() == 4
    assert rows(drops(sawyer(), idle=0.0001), "idle") == []


@pytest.mark.parametrize("kind", ["absolute_ee", "joint"])
def test_a_position_that_is_held_is_idle_and_one_that_changes_is_not(sawyer, kind):
    def change(dataset):
        actions = np.cumsum(smooth(dataset), axis=0).astype(np.float32)
        actions[:, GRIPPER] = -1
        actions[21:24, :GRIPPER] = actions[20, :GRIPPER]
        return actions

    dataset = sawyer(action=change)
    starts = dataset.episode_starts[:-1].tolist()
    assert rows(drops(dataset, kind, idle=0.001, idle_seconds=0), "idle") == [21, 22, 23]
    assert rows(drops(dataset, kind, idle=0.001, idle_seconds=3 / dataset.fps), "idle") == [21, 22, 23]
    assert rows(drops(dataset, kind, idle=0.001, idle_seconds=4 / dataset.fps), "idle") == []
    assert not set(starts) & set(rows(drops(dataset, kind, idle=10.0), "idle"))  # where it came from is not known


@pytest.mark.parametrize("kind", ["delta_ee", "joint"])
def test_slow_motion_is_not_idle(sawyer, kind):
    """The arm crosses its range in an episode of some 75 rows, and rests in the last one."""

    def change(dataset):
        motions = np.zeros((len(dataset), 4), np.float32)
        motions[: dataset.episode_starts[-2], 0] = 0.001
        return as_kind(kind, motions, dataset)

    dataset = sawyer(action=change)
    resting = np.arange(dataset.episode_starts[-2], len(dataset)).tolist()
    resting = resting if kind == "delta_ee" else resting[1:]
    assert rows(drops(dataset, kind, idle=0.03), "idle") == resting
    # without a shortest rest every third row stays, since more than 0.03 of the range has added up
    idle = rows(drops(dataset, kind, idle=0.03, idle_seconds=0), "idle")
    assert 0.6 < (len(idle) - len(resting)) / dataset.episode_starts[-2] < 0.7


def test_a_slow_drift_ends_a_rest_and_noise_does_not(sawyer):
    def change(dataset):
        actions = smooth(dataset)
        length = dataset.episode_starts[1]
        actions[10:length, :GRIPPER] = 0
        actions[10:length:2, 0], actions[11:length:2, 0] = 0.02, -0.02  # up to 0.004 of the positions' range
        return actions

    dataset = sawyer(action=change)
    end = int(dataset.episode_starts[1])
    assert rows(drops(dataset, idle=0.01), "idle") == [*range(10, end)]
    assert rows(drops(dataset, idle=0.001), "idle") == []


def test_filters_find_the_same_in_motions_and_in_positions(sawyer):
    found = []
    for kind in ("delta_ee", "joint"):

        def change(dataset, kind=kind):
            motions = 0.01 * smooth(dataset)
            motions[:, GRIPPER] = -1
            motions[10 : dataset.episode_starts[1], :GRIPPER] = 0
            motions[dataset.episode_starts[1] + 20, 0] += 0.02  # twice the usual range of speeds
            return as_kind(kind, motions, dataset)

        dataset = sawyer(action=change)
        found.append(drops(dataset, kind, idle=0.01, jerk=1.0))
    first = int(dataset.episode_starts[1])
    for report in found:
        assert rows(report, "jerk") == [first + 20, first + 21, first + 22]
        assert rows(report, "idle") == [*range(10, first)]


@pytest.mark.parametrize("kind", ["delta_ee", "joint"])
def test_a_jerk_is_one_beside_the_usual_speeds(sawyer, kind):
    def change(dataset):
        motions = np.zeros((len(dataset), 4), np.float32)
        motions[:, 0] = 1 + 0.1 * smooth(dataset)[:, 0]  # 0.95 to 1.05: a position's unknown first speed is not 0
        motions[20, 0] += 0.2
        return as_kind(kind, motions, dataset)

    assert rows(drops(sawyer(action=change), kind, jerk=1.0), "jerk") == [20, 21, 22]


def test_an_outlier_does_not_make_an_episode_idle(sawyer):
    def change(dataset):
        actions = smooth(dataset)
        actions[dataset.episode_starts[:-1:2] + 5, :GRIPPER] = 1e6
        return actions

    assert rows(drops(sawyer(action=change), idle=0.01), "idle") == []


def test_outliers_stay_in_the_timeline(sawyer):
    def change(dataset):
        actions = smooth(dataset)
        actions[30, 1], actions[40, GRIPPER] = 9.0, 50.0
        return actions

    found = drops(sawyer(action=change), outliers=3.0)
    assert rows(found, "outlier") == [30]  # the gripper is not judged
    assert np.flatnonzero(found.excluded).tolist() == [30] and not found.removed.any()


def test_sudden_changes_are_found_and_an_episodes_seam_is_none(sawyer):
    def change(dataset):
        actions = smooth(dataset)
        actions[20, 0] += 2.0
        return actions

    dataset = sawyer(action=change)
    assert rows(drops(dataset, jerk=1.0), "jerk") == [20, 21, 22]  # the jump, its way back, and the rest of the two


@pytest.mark.parametrize("kind", ["delta_ee", "joint"])
def test_an_episodes_beginning_is_no_sudden_change(sawyer, kind):
    def steady(dataset):
        """Every episode moves at a speed of its own, from a place of its own."""
        actions = np.zeros((len(dataset), 4), np.float32)
        speed = 1.0 + dataset.column("episode_index")
        actions[:, 0] = speed if kind == "delta_ee" else speed * (10 + dataset.column("frame_index"))
        return actions

    assert rows(drops(sawyer(action=steady), kind, jerk=1e-4), "jerk") == []


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
    assert rows(drops(dataset, duplicates=True), "duplicate") == []  # other states: another episode
    dataset = sawyer(observation__state=same("observation.state"))
    found = drops(dataset, duplicates=True)
    (episode,) = np.unique(dataset.column("episode_index")[found.removed])
    assert found.removed.sum() == np.diff(dataset.episode_starts)[episode] and episode > 0


def test_a_copy_of_a_held_out_episode_is_left_out_wherever_it_stands(sawyer):
    def copied(key):
        def change(dataset):
            values, starts = dataset.column(key).copy(), dataset.episode_starts
            lengths = np.diff(starts)
            same = np.flatnonzero(lengths == np.bincount(lengths).argmax())[:3]
            for episode in same[1:]:
                values[starts[episode] : starts[episode + 1]] = values[starts[same[0]] : starts[same[0] + 1]]
            copies[:] = same.tolist()
            return values

        return change

    copies = []
    dataset = sawyer(action=copied("action"))
    dataset = sawyer(observation__state=copied("observation.state"))

    def left_out(held_out):
        found = drops(dataset, held_out=held_out, duplicates=True)
        return np.unique(dataset.column("episode_index")[found.removed]).tolist()

    first, second, third = copies
    assert left_out([]) == [second, third]
    assert left_out([third]) == [first, second]  # the held-out copy comes last
    assert left_out([first, third]) == [second]
    assert left_out(copies) == []


def test_held_out_episodes_are_neither_dropped_nor_usual(sawyer):
    def change(dataset):
        actions = smooth(dataset)
        first = dataset.episode_starts[2]
        actions[:first, :GRIPPER] = 1000.0
        actions[first + 30, 1] = 9.0
        return actions

    dataset = sawyer(action=change)
    first = int(dataset.episode_starts[2])
    assert rows(drops(dataset, outliers=1.0), "outlier") == []  # 6 % of the rows make it usual
    assert rows(drops(dataset, outliers=1.0, held_out=[0, 1]), "outlier") == [first + 30]
    others = drops(dataset, idle=0.9, idle_seconds=0, held_out=[0, 1])
    assert not others.removed[:first].any() and others.removed[first:].mean() > 0.5
    with pytest.raises(ValueError, match="expected an episode to train on, all of them are held out"):
        drops(dataset, held_out=range(dataset.num_episodes))


def test_chunks_reach_ahead_but_not_into_the_next_episode():
    wanted = np.zeros(10, bool)
    wanted[[3, 6]] = True
    assert np.flatnonzero(chunks_with(wanted, np.array([0, 6, 10]), 3)).tolist() == [1, 2, 3, 6]
    assert chunks_with(wanted, np.array([0, 6, 10]), 1).tolist() == wanted.tolist()


def test_chunks_of_many_rows_take_little_memory():
    starts = np.arange(0, 400_001, 100)
    wanted = np.arange(400_000) % 100 == 99
    tracemalloc.start()
    try:
        found = chunks_with(wanted, starts, 50)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.flatnonzero(found[:100]).tolist() == [*range(50, 100)] and peak < 400_000 * 50


def test_a_report_of_many_episodes_takes_little_time():
    episodes, frames = np.repeat(np.arange(60_000), 10), np.tile(np.arange(10), 60_000)
    report = DropReport("many", {"idle": frames % 5 < 2}, episodes, frames)
    start = time.process_time()
    runs = report.to_dict()["dropped"]["idle"]["episodes"]
    assert time.process_time() - start < 2  # 0.2 s; with a pass over all rows for every episode 8 s
    assert len(runs) == 60_000 and runs[59_999] == [[0, 1], [5, 6]]


def test_runs_end_with_their_episode():
    report = DropReport("two", {"idle": np.ones(3, bool)}, np.array([0, 0, 1]), np.array([4, 5, 6]))
    assert report.to_dict()["dropped"]["idle"]["episodes"] == {0: [[4, 5]], 1: [[6, 6]]}


def test_the_report_says_what_and_why(sawyer):
    def change(dataset):
        actions = smooth(dataset)
        actions[[1, 2, 5], :GRIPPER] = 0
        return actions

    found = drops(sawyer(action=change), idle=0.001, idle_seconds=0)
    report = json.loads(json.dumps(found.to_dict()))
    assert report["dropped"]["idle"]["rows"] == 3
    assert report["dropped"]["idle"]["episodes"] == {"0": [[1, 2], [5, 5]]}
    assert report["dropped"]["jerk"] == {"means": REASONS["jerk"], "rows": 0, "episodes": {}}
    (line,) = found.lines()
    assert "idle: 3 rows (0.133 %) of 1 episodes, first in episode 0, frame 1" in line


@pytest.mark.parametrize("name", ["idle", "idle_seconds", "outliers", "jerk"])
def test_a_negative_threshold(sawyer, name):
    with pytest.raises(ValueError, match=f"Expected {name} of 0 or more, came -1"):
        drops(sawyer(), **{name: -1})
