import json
import shutil
from pathlib import Path

import annotate_phases as script
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_vla.data.lerobot import LeRobotEpisodes

ROWS, INFO, SUBTASKS = "data/chunk-000/file-000.parquet", "meta/info.json", "meta/subtasks.parquet"


def rewrite(path, change):
    """Change a table group by group, and keep the groups."""
    with pq.ParquetFile(path) as file:
        groups = [change(file.read_row_group(group)) for group in range(file.num_row_groups)]
    with pq.ParquetWriter(path, groups[0].schema) as writer:
        for group in groups:
            writer.write_table(group)


@pytest.fixture
def bare(demos, tmp_path):
    """The example data without its subtasks."""

    def undo(table):
        said = json.loads(table.schema.metadata[b"huggingface"])
        del said["info"]["features"]["subtask_index"]
        said["fingerprint"] = "of the rows as they were"
        return table.drop_columns("subtask_index").replace_schema_metadata({"huggingface": json.dumps(said)})

    root = shutil.copytree(demos, tmp_path / "bare")
    (root / SUBTASKS).unlink()
    rewrite(root / ROWS, undo)
    info = json.loads((root / INFO).read_text())
    del info["features"]["subtask_index"]
    (root / INFO).write_text(json.dumps(info, indent=4))
    return root


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def check_annotation(root, demos):
    """Everything is what the repository holds: rows and table by value, as writers differ, all else to the byte."""
    ours, theirs = contents(root), contents(demos)
    assert ours.keys() == theirs.keys()
    assert {str(name) for name in ours if ours[name] != theirs[name]} <= {ROWS, SUBTASKS}
    assert pq.read_table(root / ROWS).equals(pq.read_table(demos / ROWS), check_metadata=True)
    pd.testing.assert_frame_equal(pd.read_parquet(root / SUBTASKS), pd.read_parquet(demos / SUBTASKS))


def test_the_example_data_is_what_the_script_makes(bare, demos, tmp_path):
    before = contents(bare)
    script.main([str(bare), "--output", str(tmp_path / "copy")])
    assert contents(bare) == before
    check_annotation(tmp_path / "copy", demos)
    script.main([str(bare)])
    check_annotation(bare, demos)
    assert pq.read_metadata(bare / ROWS).num_row_groups == LeRobotEpisodes(bare, cameras=[]).num_episodes


def test_a_run_that_was_interrupted_can_be_repeated(bare, demos):
    info = (bare / INFO).read_text()
    script.main([str(bare)])
    (bare / INFO).write_text(info)  # it is written last
    script.main([str(bare)])
    check_annotation(bare, demos)


@pytest.mark.parametrize("moment", ["writing", "replacing"])
def test_a_run_that_breaks_off_leaves_a_dataset(bare, demos, monkeypatch, moment):
    """Untouched while files are written; readable, and without the column, once they are replaced."""
    before, columns = contents(bare), LeRobotEpisodes(bare, cameras=[]).features
    place, name = {"writing": (pd.DataFrame, "to_parquet"), "replacing": (Path, "replace")}[moment]
    original, calls = getattr(place, name), []

    def break_off(self, *arguments):
        calls.append(self)
        if moment == "writing" or len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, break_off)
        with pytest.raises(KeyboardInterrupt):
            script.main([str(bare)])
    after = contents(bare)
    assert after.keys() == before.keys() and (after == before) == (moment == "writing")
    assert LeRobotEpisodes(bare, cameras=[]).features == columns
    script.main([str(bare)])
    check_annotation(bare, demos)


def test_a_gripper_that_is_told_nothing_is_open(bare, demos):
    def nothing(table):
        actions = np.array(table["action"].to_pylist(), np.float32)
        actions[:, 6] = np.maximum(actions[:, 6], 0)
        column = pa.array(actions.tolist(), table["action"].type)
        return table.set_column(table.column_names.index("action"), "action", column)

    rewrite(bare / ROWS, nothing)
    script.main([str(bare)])
    same = LeRobotEpisodes(demos, cameras=[]).texts("subtask")
    assert LeRobotEpisodes(bare, cameras=[]).texts("subtask").tolist() == same.tolist()


def test_the_annotation_is_lerobots(demos):
    """Whose item is `subtasks.iloc[subtask_index].name`, from columns whose types the file repeats for `datasets`."""
    subtasks, dataset = pd.read_parquet(demos / SUBTASKS), LeRobotEpisodes(demos, cameras=[])
    assert subtasks["subtask_index"].tolist() == [*range(len(subtasks))] and subtasks.index.name == "subtask"
    names = [subtasks.iloc[number].name for number in dataset.column("subtask_index")]
    assert names == dataset.texts("subtask").tolist()
    features = datasets.Features.from_arrow_schema(pq.read_schema(demos / ROWS))
    assert features["subtask_index"] == features["task_index"] and len(features) == 8


def test_every_episode_of_the_example_data_goes_through_its_phases_once(demos):
    dataset = LeRobotEpisodes(demos, cameras=[])
    texts, tasks, starts = dataset.texts("subtask"), dataset.column("task_index"), dataset.episode_starts
    lengths = {}
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        verbs = [text.split()[0] for text in texts[start:end]]
        firsts = [row for row in range(len(verbs)) if row == 0 or verbs[row] != verbs[row - 1]]
        said = [verbs[row] for row in firsts]
        assert said == ["reach", "grasp", "lift", "carry", "place", "release"][: 3 if tasks[start] == 0 else 6]
        for verb, length in zip(said, np.diff([*firsts, len(verbs)]), strict=True):
            lengths.setdefault(verb, []).append(length)
    spread = {verb: (min(counts), max(counts)) for verb, counts in lengths.items()}
    assert spread == {
        "reach": (14, 32),
        "grasp": (6, 6),
        "lift": (9, 13),
        "carry": (4, 64),
        "place": (7, 15),
        "release": (13, 14),
    }
    # What is placed sinks, what is lifted rises: by the hand's own height.
    height = dataset.column("observation.state")[:, 2]
    for verb, sign in (("lift", 1), ("place", -1)):
        for start, end in zip(starts[:-1], starts[1:], strict=True):
            rows = [row for row in range(start, end) if texts[row].startswith(verb)]
            assert not rows or sign * (height[rows[-1]] - height[rows[0]]) > 0.03


STILL, UP, DOWN, ASIDE, DRIFT = (0, 0, 0), (0, 0, 1), (0, 0, -1), (1, 0, 0.05), (1, 0, -0.05)
CASES = {  # commands, where the gripper closes and opens, frames of reach, grasp, lift, carry, place, release
    "whole": ([DOWN] * 4 + [STILL] * 2 + [UP] * 3 + [ASIDE] * 5 + [DOWN] * 2 + [UP] * 3, (4, 16), [4, 2, 3, 5, 2, 3]),
    "drifting": ([DOWN, STILL, UP, DRIFT, DRIFT, DOWN, (0, 0, -0.1), UP], (1, 7), [1, 1, 1, 2, 2, 1]),
    "down and up": ([DOWN, STILL, UP, ASIDE, DOWN, UP, ASIDE, DOWN, UP], (1, 8), [1, 1, 1, 4, 1, 1]),
    "along the other axis": ([DOWN, STILL, UP, (0, -1, 0), DOWN, UP], (1, 5), [1, 1, 1, 1, 1, 1]),
    "let fall": ([DOWN, STILL, UP, ASIDE, ASIDE, UP], (1, 5), [1, 1, 1, 2, 0, 1]),
    "no sideways": ([DOWN, STILL, UP, UP, UP], (1, 4), [1, 1, 2, 0, 0, 1]),
    "kept": ([DOWN, STILL, UP, ASIDE, DOWN], (1, 5), [1, 1, 1, 2, 0, 0]),
    "held still": ([DOWN, STILL, STILL, UP], (1, 3), [1, 2, 0, 0, 0, 1]),
    "closed from the start": ([STILL, UP], (0, 2), [0, 1, 1, 0, 0, 0]),
}


@pytest.mark.parametrize("case", CASES)
def test_phases_of_an_episode(case):
    commands, (close, release), expected = CASES[case]
    closed = np.isin(np.arange(len(commands)), np.arange(close, release))
    found = script.phases(np.array(commands, np.float32), closed, 0.15)
    assert np.bincount(found, minlength=6).tolist() == expected and (np.diff(found) >= 0).all()


@pytest.mark.parametrize(
    ("task", "thing"),
    [
        ("pick up the red cube", "the red cube"),
        ("stack the red cube on top of the green cube", "the red cube"),
        ("pick up the can and place it in the bin", "the can"),
        ("put an apple into a bowl", "an apple"),
        ("open the drawer", "the drawer"),
        ("pick up cans", None),
    ],
)
def test_the_object_is_what_the_instruction_names_first(task, thing):
    found = script.OBJECT.search(task)
    assert (found and found.group()) == thing


def test_motions_are_the_way_the_hand_will_have_gone(bare):
    script.main([str(bare), "--motions", "--hand", "x", "y", "z", "--ahead", "5", "--still", "0.02"])
    dataset = LeRobotEpisodes(bare, cameras=[])
    states, words, starts = dataset.column("observation.state"), dataset.texts("subtask"), dataset.episode_starts
    spoken = set()
    for row in range(starts[3], starts[4]):
        x, y, z = states[min(row + 5, starts[4] - 1)][:3] - states[row][:3]
        expected = ["left"] if x <= -0.02 else ["right"] if x >= 0.02 else []
        expected += ["back"] if y <= -0.02 else ["forward"] if y >= 0.02 else []
        expected += ["down"] if z <= -0.02 else ["up"] if z >= 0.02 else []
        assert words[row] == (" ".join(expected) or "stay")
        spoken.add(words[row])
    assert len(spoken) > 3 and words[starts[4] - 1] == "stay"


def test_motions_are_what_the_actions_ask_for(bare):
    script.main([str(bare), "--motions", "--commanded", "--hand", "dx", "dy", "dz", "--ahead", "4", "--still", "0.5"])
    dataset = LeRobotEpisodes(bare, cameras=[])
    actions, words, starts = dataset.column("action"), dataset.texts("subtask"), dataset.episode_starts
    for row in range(starts[3], starts[4]):
        x, y, z = actions[row : min(row + 4, starts[4] - 1), :3].sum(0, dtype=np.float64)
        expected = ["left"] if x <= -0.5 else ["right"] if x >= 0.5 else []
        expected += ["back"] if y <= -0.5 else ["forward"] if y >= 0.5 else []
        expected += ["down"] if z <= -0.5 else ["up"] if z >= 0.5 else []
        assert words[row] == (" ".join(expected) or "stay")


def test_what_cannot_be_annotated_is_refused_and_left_as_it_was(bare, demos, goldens, tmp_path):
    def refused(root, message, *options):
        before = contents(root)
        with pytest.raises(ValueError, match=message):
            script.main([str(root), *options])
        assert contents(root) == before

    refused(demos, "expected a LeRobot v3.0 dataset without a column 'subtask_index'")
    refused(goldens / "lerobot/datasets/v21_video", "expected a LeRobot v3.0 dataset")
    refused(bare, r"action has no \['claw'\] among .*'gripper'\]; see --motion and --gripper", "--gripper", "claw")
    # drx, which wavers around zero, as gripper
    refused(bare, r"bare, episode 0: expected the gripper to close once, it does so \d+ times", "--gripper", "drx")
    tasks = pq.read_table(bare / "meta/tasks.parquet")
    texts = pa.array(["pick up the red cube", "stack cubes", "pick up the can"])
    pq.write_table(tasks.set_column(1, "__index_level_0__", texts), bare / "meta/tasks.parquet")
    refused(bare, r"bare, episode 8: 'stack cubes' names no object, as 'lift the can'", "--output", str(tmp_path))
