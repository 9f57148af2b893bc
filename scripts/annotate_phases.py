"""Say for every frame of demonstrations what the robot is about to do, as LeRobot's own subtasks.

`python scripts/annotate_phases.py FOLDER [--output COPY]` adds the column `subtask_index` and `meta/subtasks.parquet`
to a LeRobot v3.0 dataset; everything else stays as it is. Of pick-and-place demonstrations, the actions alone decide:

| phase | from | phrase |
|---|---|---|
| reach | the first frame | reach for the red cube |
| grasp | the gripper is told to close | grasp the red cube |
| lift | the hand is told to move again | lift the red cube |
| carry | ... sideways | carry the red cube |
| place | ... down, for the last time before the gripper opens | place the red cube |
| release | the gripper is told to open | release the red cube |

The object is what the instruction names first: "stack the red cube on top of the green cube" is about the red cube.

Of any demonstrations, `--motions` says which way the hand will move in the next `--ahead` frames, "right forward
down" for example, or "stay" (language motions, https://huggingface.co/papers/2403.01823).
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from hf_vla.data import schema
from hf_vla.data.lerobot import LeRobotEpisodes

COLUMN = "subtask_index"
PHRASES = ("reach for {}", "grasp {}", "lift {}", "carry {}", "place {}", "release {}")
OBJECT = re.compile(r"\b(?:the|an?) .+?(?= (?:and|at|from|in|into|on|onto|to|with)\b|$)")
WAYS = (("left", "right"), ("back", "forward"), ("down", "up"))  # against and along each axis of the state
STILL = 0.1  # of the dataset's largest command: less is no motion


def main(arguments: list[str] | None = None):
    """Annotate a dataset.

    Args:
        arguments (`list[str]`, *optional*): instead of those of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a LeRobot v3.0 dataset")
    parser.add_argument("--output", type=Path, help="annotate a copy, written here")
    parser.add_argument("--motion", nargs=3, default=["dx", "dy", "dz"], help="names of the hand's motion, up last")
    parser.add_argument("--gripper", default="gripper", help="name of the gripper's action, which is closed above 0")
    parser.add_argument("--motions", action="store_true", help="say which way the hand moves")
    parser.add_argument("--hand", nargs=3, default=["x", "y", "z"], help="names of the hand's place in the state")
    parser.add_argument("--commanded", action="store_true", help="take motions from relative actions, not from states")
    parser.add_argument("--ahead", type=int, default=16, help="frames over which the hand moves")
    parser.add_argument(
        "--still", type=float, default=0.01, help="less is no motion, in units of the states or actions"
    )
    options = parser.parse_args(arguments)
    root = options.folder
    if options.motions:
        phrases, numbers = annotate_motions(root, options.hand, options.ahead, options.still, options.commanded)
    else:
        phrases, numbers = annotate(root, options.motion, options.gripper)
    if options.output:
        root = Path(shutil.copytree(root, options.output))
    write(root, phrases, numbers)


def annotate(root: Path, motion: list[str], gripper: str) -> tuple[list[str], dict[int, int]]:
    """Return the phrases, and which of them each row has: its `index` -> number of the phrase.

    Raises:
        ValueError: no v3.0, annotated already, an action's name or an instruction's object is missing, or an episode
            does not close the gripper exactly once.
    """
    dataset = unannotated(root)
    *motion, gripper = named(dataset, schema.ACTION, [*motion, gripper], "--motion and --gripper")
    actions = dataset.column(schema.ACTION)
    commands, closed = actions[:, motion], actions[:, gripper] > 0
    still = STILL * np.linalg.norm(commands, axis=1).max()
    phrases, numbers, starts, tasks = {}, {}, dataset.episode_starts, dataset.texts(schema.TASK)
    for episode, start, end in zip(dataset.episodes, starts[:-1], starts[1:], strict=True):
        thing = OBJECT.search(tasks[start])
        if thing is None:
            raise ValueError(
                f"{root}, episode {episode.index}: {tasks[start]!r} names no object, as 'lift the can' does."
            )
        try:
            found = phases(commands[start:end], closed[start:end], still)
        except ValueError as error:
            raise ValueError(f"{root}, episode {episode.index}: {error}") from error
        for row, phase in zip(dataset.column("index")[start:end], found, strict=True):
            phrase = PHRASES[phase].format(thing.group())
            numbers[int(row)] = phrases.setdefault(phrase, len(phrases))
    return [*phrases], numbers


def annotate_motions(
    root: Path, hand: list[str], ahead: int, still: float, commanded: bool = False
) -> tuple[list[str], dict[int, int]]:
    """Return the phrases, and which of them each row has; see `annotate`.

    `commanded`: what relative actions ask for, which is what an expert wants where it is pushed about.

    Raises:
        ValueError: no v3.0, annotated already, or a name is missing among the state's.
    """
    dataset = unannotated(root)
    key = schema.ACTION if commanded else schema.STATE
    places = dataset.column(key)[:, named(dataset, key, hand, "--hand")]
    if commanded:  # where each row's action begins, if all before it did what they ask for
        places = np.cumsum(places, axis=0, dtype=np.float64) - places
    phrases, numbers, starts = {}, {}, dataset.episode_starts
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        later = np.minimum(np.arange(start, end) + ahead, end - 1)
        for row, way in zip(dataset.column("index")[start:end], places[later] - places[start:end], strict=True):
            words = [WAYS[axis][int(way[axis] > 0)] for axis in range(3) if abs(way[axis]) >= still]
            numbers[int(row)] = phrases.setdefault(" ".join(words) or "stay", len(phrases))
    return [*phrases], numbers


def unannotated(root: Path) -> LeRobotEpisodes:
    """Open a dataset that may be annotated."""
    dataset = LeRobotEpisodes(root, cameras=[])
    if dataset.info.codebase_version != "v3.0" or COLUMN in dataset.features:
        raise ValueError(f"{root}: expected a LeRobot v3.0 dataset without a column {COLUMN!r}.")
    return dataset


def named(dataset: LeRobotEpisodes, key: str, wanted: list[str], options: str) -> list[int]:
    """Return the places of names among a column's."""
    names = dataset.features[key]["names"] or []
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(f"{dataset.root}: {key} has no {missing} among its {names}; see {options}.")
    return [names.index(name) for name in wanted]


def phases(commands: np.ndarray, closed: np.ndarray, still: float) -> np.ndarray:
    """Return an episode's phases, `(frames,)`, as places in `PHRASES`.

    Args:
        commands (`np.ndarray` of shape `(frames, 3)`): relative motion of the hand, up last.
        closed (`np.ndarray` of shape `(frames,)`): True where the gripper is told to close.
        still (`float`): commands below are no motion.

    Raises:
        ValueError: the gripper does not close exactly once.
    """
    turns = np.diff(closed.astype(int), prepend=0, append=0)
    closings, openings = np.flatnonzero(turns == 1), np.flatnonzero(turns == -1)
    if len(closings) != 1:
        raise ValueError(f"expected the gripper to close once, it does so {len(closings)} times.")
    (grasp,), (release,) = closings, openings
    held = np.arange(grasp, release)
    lift = next(iter(held[np.linalg.norm(commands[held], axis=1) > still]), release)
    carry = next(iter(held[np.linalg.norm(commands[held, :2], axis=1) > still]), release)
    # The last descent, from where it is one; an object that the hand keeps is not placed.
    descent = carry + np.flatnonzero(commands[carry:release, 2] >= 0).max(initial=-1) + 1
    sinking = held[(held >= descent) & (commands[held, 2] < -still)]
    place = next(iter(sinking), release) if release < len(closed) else release
    return np.repeat(np.arange(len(PHRASES)), np.diff([0, grasp, lift, carry, place, release, len(closed)]))


def write(root: Path, phrases: list[str], numbers: dict[int, int]):
    """Add the column, the table of phrases and, last, what `meta/info.json` says of them.

    Everything is written beside the files that it replaces once all is there: a run that ends early, wherever it does,
    leaves a dataset that can be read, and annotated again.
    """
    files = schema.data_files(root, schema.read_info(root))
    info_path, subtasks = root / "meta/info.json", root / "meta/subtasks.parquet"
    new = {path: path.with_name(f".{path.name}.new") for path in [*files, subtasks, info_path]}
    try:
        for path in files:
            with pq.ParquetFile(path) as file:  # in LeRobot's row groups, one for each episode
                tables = [_with_column(file.read_row_group(group), numbers) for group in range(file.num_row_groups)]
            with pq.ParquetWriter(new[path], tables[0].schema) as writer:
                for table in tables:
                    writer.write_table(table)
        table = pd.DataFrame({COLUMN: range(len(phrases))}, index=pd.Index(phrases, name=schema.SUBTASK))
        table.to_parquet(new[subtasks])
        info = json.loads(info_path.read_text(encoding="utf-8"))
        info["features"][COLUMN] = {"dtype": "int64", "shape": [1], "names": None}
        new[info_path].write_text(json.dumps(info, indent=4, ensure_ascii=False), encoding="utf-8")
        for path, written in new.items():
            written.replace(path)
    finally:
        for written in new.values():
            written.unlink(missing_ok=True)


def _with_column(table: pa.Table, numbers: dict[int, int]) -> pa.Table:
    table = table.select([name for name in table.column_names if name != COLUMN])  # of a run that was interrupted
    table = table.append_column(COLUMN, pa.array([numbers[row] for row in table["index"].to_pylist()], pa.int64()))
    metadata = dict(table.schema.metadata or {})
    if b"huggingface" in metadata:  # the columns' types once more, for `datasets`
        said = json.loads(metadata[b"huggingface"])
        said["info"]["features"][COLUMN] = {"dtype": "int64", "_type": "Value"}
        said.pop("fingerprint", None)  # of the rows as they were
        metadata[b"huggingface"] = json.dumps(said).encode()
    return table.replace_schema_metadata(metadata)


if __name__ == "__main__":
    main()
