"""The files of a LeRobot dataset (v2.0, v2.1 and v3.0): what is where, read and checked once.

Source: https://huggingface.co/docs/lerobot/lerobot-dataset-v3
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

ACTION = "action"
STATE = "observation.state"
IMAGES = "observation.images."
TASK = "task"
SUBTASK = "subtask"
INDEX_SUFFIX = "_index"
PAD_SUFFIX = "_is_pad"
TIMESTAMP = "timestamp"
VERSIONS = ("v2.0", "v2.1", "v3.0")
BY_EPISODE = VERSIONS[:2]  # a file for every episode, tables as jsonl; v2.0 has v3.0's file of statistics
# Seconds by which a timestamp may miss a video frame, and a delta a multiple of 1 / fps (LeRobot's own tolerance).
TOLERANCE_S = 1e-4


@dataclass(frozen=True)
class DatasetInfo:
    """What `meta/info.json` says.

    Args:
        codebase_version (`str`): "v2.0", "v2.1" or "v3.0".
        fps (`float`): rows per second.
        features (`dict`): column name -> {"dtype", "shape", "names"}.
        data_path (`str`): template of the parquet files.
        video_path (`str`, *optional*): template of the video files.
        chunks_size (`int`): files (before v3.0: episodes) per chunk folder.
        robot_type (`str`, *optional*): name of the robot.
    """

    codebase_version: str
    fps: float
    features: dict[str, dict]
    data_path: str
    video_path: str | None = None
    chunks_size: int = 1000
    robot_type: str | None = None

    @property
    def camera_keys(self) -> list[str]:
        """Columns that hold pictures, as video or as images, depth among them."""
        return [key for key, feature in self.features.items() if feature["dtype"] in ("video", "image")]

    @property
    def depth_keys(self) -> list[str]:
        """Those of them that are marked as depth."""
        places, marks = ("info", "video_info"), ("video.is_depth_map", "is_depth_map")  # of LeRobot's releases
        details = {key: [self.features[key].get(place) or {} for place in places] for key in self.camera_keys}
        return [key for key, each in details.items() if any(detail.get(mark) for detail in each for mark in marks)]

    @property
    def language_keys(self) -> list[str]:
        """Columns of LeRobot's language messages: for each row a list of any length, with roles, styles and times."""
        return [key for key, feature in self.features.items() if feature["dtype"] == "language"]


@dataclass(frozen=True)
class Episode:
    """One episode: its number, its rows, where each camera's pictures are (file, start in seconds), and its rows.

    The file of the rows is the one that the table of episodes names, which need not be right (see `data_files`).
    """

    index: int
    length: int
    videos: dict[str, tuple[Path, float]]
    data: Path | None = None


def camera_key(name: str) -> str:
    """Return a camera's column name: `wrist` and `observation.images.wrist` are the same camera.

    A name such as `observation.image`, which datasets of one camera have, is a column's already.
    """
    return name if name.startswith("observation.") else IMAGES + name


def read_info(root: Path) -> DatasetInfo:
    """Read and check `meta/info.json`.

    Raises:
        FileNotFoundError: the folder holds no LeRobot dataset.
        ValueError: another format version, or an entry is missing or of another form.
    """
    path, info = root / "meta/info.json", _read_json(root, "meta/info.json")
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise ValueError(
            f"{root}: expected a LeRobot dataset of version {' or '.join(VERSIONS)}, came {version!r}; "
            "convert it with LeRobot's own converter."
        )
    known = [field.name for field in fields(DatasetInfo)]
    missing = [name for name in ("fps", "features", "data_path") if not info.get(name)]
    features = info.get("features") or {}
    for key, feature in features.items():
        if not isinstance(feature, dict) or not {"dtype", "shape"} <= {*feature}:
            raise ValueError(f"{path}: expected a dtype and a shape of the feature {key!r}, came {feature!r}.")
    if any(feature["dtype"] == "video" for feature in features.values()) and not info.get("video_path"):
        missing.append("video_path")
    if missing:
        raise ValueError(f"{path}: {missing} missing; the dataset was not written completely.")
    places = ("episode_chunk", "episode_index") if version in BY_EPISODE else ("chunk_index", "file_index")
    for name in ("data_path", "video_path"):
        try:
            (info.get(name) or "").format(video_key="", **dict.fromkeys(places, 0))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"{path}: expected {name} to be a template of {' and '.join(places)}, as {version} has it, came "
                f"{info[name]!r}."
            ) from error
    return DatasetInfo(**{name: info[name] for name in known if name in info})


def read_tasks(root: Path, info: DatasetInfo) -> dict[int, str]:
    """Read the instructions: `task_index` -> text, which may be empty."""
    if info.codebase_version in BY_EPISODE:
        rows = _read_jsonl(root, "meta/tasks.jsonl", ("task_index", "task"))
        return {row["task_index"]: row["task"] for row in rows}
    return _read_texts(_existing(root, "meta/tasks.parquet"), TASK)


def read_subtasks(root: Path) -> dict[int, str] | None:
    """Read LeRobot's subtasks: `subtask_index` -> text; None where the dataset has none.

    Source: https://huggingface.co/docs/lerobot/main/dataset_subtask
    """
    path = root / "meta/subtasks.parquet"
    return _read_texts(path, SUBTASK) if path.is_file() else None


def read_annotations(root: Path) -> dict[str, str]:
    """Read which columns number further tasks of a row: GR00T's name of the annotation -> column.

    A file of another form declares none: who asks for such a text is told that it is missing.

    Source: https://github.com/NVIDIA/Isaac-GR00T/blob/main/getting_started/data_preparation.md
    """
    try:
        modality = _read_json(root, "meta/modality.json")
    except (FileNotFoundError, ValueError):
        return {}
    annotations = modality.get("annotation")
    columns = {}
    for name, entry in annotations.items() if isinstance(annotations, dict) else ():
        column = entry.get("original_key") if isinstance(entry, dict) else None
        columns[f"annotation.{name}"] = column if isinstance(column, str) else f"annotation.{name}"
    return columns


def read_episodes(root: Path, info: DatasetInfo) -> list[Episode]:
    """Read the table of episodes, in order."""
    videos = [key for key in info.camera_keys if info.features[key]["dtype"] == "video"]
    episodes = []
    if info.codebase_version in BY_EPISODE:
        for row in _read_jsonl(root, "meta/episodes.jsonl", ("episode_index", "length")):
            index = row["episode_index"]
            place = {"episode_chunk": index // info.chunks_size, "episode_index": index}
            files = {key: (root / info.video_path.format(video_key=key, **place), 0.0) for key in videos}
            episodes.append(Episode(index, row["length"], files, root / info.data_path.format(**place)))
    else:
        parts = ("chunk_index", "file_index", "from_timestamp")
        columns = ["episode_index", "length", *(f"videos/{key}/{part}" for key in videos for part in parts)]
        columns += [f"data/{part}" for part in parts[:2]]
        path = cache(root.joinpath)  # the episodes of one file share its path
        for row in _read_parquets(root, "meta/episodes/*/*.parquet", columns).to_pylist():
            files = {}
            for key in videos:
                chunk, file, start = (row[f"videos/{key}/{part}"] for part in parts)
                files[key] = (path(info.video_path.format(video_key=key, chunk_index=chunk, file_index=file)), start)
            chunk, file = (row[f"data/{part}"] for part in parts[:2])
            data = path(info.data_path.format(chunk_index=chunk, file_index=file))
            episodes.append(Episode(row["episode_index"], row["length"], files, data))
    return sorted(episodes, key=lambda episode: episode.index)


def read_lengths(root: Path, info: DatasetInfo) -> tuple[np.ndarray, np.ndarray]:
    """Read every episode's number and how many rows it has, of a million episodes in a second."""
    columns = ["episode_index", "length"]
    if info.codebase_version in BY_EPISODE:
        rows = [[row[name] for name in columns] for row in _read_jsonl(root, "meta/episodes.jsonl", columns)]
        return tuple(np.array(rows, np.int64).reshape(-1, 2).T)
    table = _read_parquets(root, "meta/episodes/*/*.parquet", columns)
    return tuple(table[name].to_numpy().astype(np.int64) for name in columns)


def data_pattern(info: DatasetInfo) -> str:
    """Return the pattern that all files of rows fit."""
    return re.sub(r"\{[^}]*\}", "*", info.data_path)


def video_pattern(info: DatasetInfo, key: str) -> str:
    """Return the pattern that all files of a camera fit."""
    return re.sub(r"\{[^}]*\}", "*", info.video_path.replace("{video_key}", key))


def data_files(root: Path, info: DatasetInfo) -> list[Path]:
    """Return every parquet file of rows, in the order of their names.

    LeRobot 0.4's converter writes wrong file numbers into the table of episodes: the files are listed, not looked up.
    """
    return _glob(root, data_pattern(info))


def read_columns(files: list[Path], features: dict[str, dict]) -> dict[str, np.ndarray]:
    """Read the rows of some columns.

    Returns:
        `dict` of `np.ndarray` of shape `(rows, *shape)`, a shape of (1,) as `(rows,)`; floats are float32, whole
        numbers int64, text objects.

    Raises:
        ValueError: a column is missing, or its rows do not have the shape that `meta/info.json` gives, or are no text
            where that says so.
    """
    parts = [file_columns(pq.ParquetFile(path), path, features) for path in files]
    return {key: np.concatenate([part.pop(key) for part in parts]) for key in features}


def file_columns(parquet: pq.ParquetFile, path: Path, features: dict[str, dict]) -> dict[str, np.ndarray]:
    """Read the rows of some columns of one file: see `read_columns`.

    Args:
        parquet (`pq.ParquetFile`): the file, opened wherever it is.
        path (`Path`): names it in errors.
        features (`dict[str, dict]`): the columns, as `meta/info.json` has them.
    """
    names = parquet.schema_arrow.names
    missing = sorted(set(features) - set(names))
    if missing:
        raise ValueError(f"{path}: meta/info.json declares the columns {missing}, the file has {names}.")
    table = parquet.read(columns=list(features))
    columns = {}
    for key, feature in features.items():
        values = table[key].combine_chunks()
        while values.type.num_fields:  # lists in lists for a feature of several axes
            values = values.flatten()
        values = values.to_numpy(zero_copy_only=False)
        if values.dtype.kind in "fiu":
            values = values.astype(np.float32 if values.dtype.kind == "f" else np.int64, copy=False)
        if feature["dtype"] == "string" and (other := next(filter(_is_no_text, values.tolist()), None)) is not None:
            raise ValueError(
                f"{path}: meta/info.json declares column {key!r} as text, but it holds {other!r}; "
                "write its values as text, or declare them as what they are."
            )
        shape = () if tuple(feature["shape"]) == (1,) else tuple(feature["shape"])
        if values.size != table.num_rows * int(np.prod(shape)):
            raise ValueError(
                f"{path}: column {key!r} should hold {table.num_rows} rows of shape {shape}, "
                f"but holds {values.size} values."
            )
        columns[key] = values.reshape(table.num_rows, *shape)
    return columns


def flat_names(names) -> list:
    """Names of a feature's numbers as datasets write them, in order; empty where there are none.

    They are a list, `{"x": 0, "y": 1}`, groups such as `{"motors": [...]}`, or lists in lists.
    """
    if isinstance(names, dict):
        if all(place in names.values() for place in range(len(names))):
            return sorted(names, key=names.get)
        names = list(names.values())
    return [name for each in names for name in flat_names(each)] if isinstance(names, list) else [names] * bool(names)


def read_statistics(root: Path, info: DatasetInfo) -> dict[str, dict[str, np.ndarray]]:
    """Read the dataset's own statistics: column -> {"mean", "std", "min", "max", "count", ...}."""
    if info.codebase_version == "v2.1":
        name = "meta/episodes_stats.jsonl"
        try:
            return merge_statistics([row["stats"] for row in _read_jsonl(root, name, ["stats"])])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{root / name}: expected mean, std, count, min and max of every column ({error!r})."
            ) from error
    stats = _read_json(root, "meta/stats.json")
    return {key: {name: np.asarray(value) for name, value in entry.items()} for key, entry in stats.items()}


def merge_statistics(parts: list[dict[str, dict]]) -> dict[str, dict[str, np.ndarray]]:
    """Merge the statistics of disjoint sets of rows, exactly; of each column those of the sets that have it.

    The variance of the whole is the mean of the variances plus the variance of the means, each weighted by its rows.
    """
    merged = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        entries = [part[key] for part in parts if key in part]
        names = ("mean", "std", "count", "min", "max")
        mean, std, count, low, high = (np.stack([np.asarray(entry[name]) for entry in entries]) for name in names)
        weight = count.reshape(-1, *[1] * (mean.ndim - 1)) / count.sum()
        total = (weight * mean).sum(0)
        merged[key] = {
            "min": low.min(0),
            "max": high.max(0),
            "mean": total,
            "std": np.sqrt((weight * (std**2 + (mean - total) ** 2)).sum(0)),
            "count": count.sum(0),
        }
    return merged


def _read_texts(path: Path, name: str) -> dict[int, str]:
    table, number = pq.read_table(path), name + INDEX_SUFFIX
    # LeRobot up to 0.4 writes the text as an unnamed pandas index, later versions name it.
    column = next((text for text in (name, "__index_level_0__") if text in table.column_names), None)
    if column is None:
        raise ValueError(f"{path}: expected a column {name!r}, came {table.column_names}.")
    texts = dict(enumerate(table[column].to_pylist()))  # LeRobot takes the place of a row for its number
    if (other := next(filter(_is_no_text, texts.values()), None)) is not None:
        raise ValueError(f"{path}: expected texts in the column {column!r}, came {other!r}; write them as text.")
    if number in table.column_names and table[number].to_pylist() != [*texts]:
        raise ValueError(
            f"{path}: expected the rows in the order of their {number}, came {table[number].to_pylist()}; sort them, "
            "or LeRobot and this library would read different texts."
        )
    return texts


def _is_no_text(value) -> bool:
    return value is not None and not isinstance(value, str)


def _existing(root: Path, name: str) -> Path:
    path = root / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: expected the root folder of a LeRobot dataset of version {' or '.join(VERSIONS)}."
        )
    return path


def _glob(root: Path, pattern: str) -> list[Path]:
    files = sorted(root.glob(pattern))
    if not files:
        raise FileNotFoundError(f"{root / pattern}: no such file; the dataset is incomplete.")
    return files


def _read_json(root: Path, name: str) -> dict:
    path = _existing(root, name)
    return _parsed(path.read_bytes(), path)


def _read_jsonl(root: Path, name: str, keys: Iterable[str]) -> list[dict]:
    """Read a table, a line for each row, of which every one has these keys."""
    path = _existing(root, name)
    with path.open("rb") as lines:  # lines of text would end at U+2028 too, which may stand within a JSON text
        return [_parsed(line, f"{path}, line {n}", keys) for n, line in enumerate(lines, 1) if line.strip()]


def _parsed(content: bytes, where: str | Path, keys: Iterable[str] = ()) -> dict:
    try:
        entries = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{where}: cannot be read as JSON ({error}); is the file complete?") from error
    if not isinstance(entries, dict) or not {*keys} <= {*entries}:
        raise ValueError(f"{where}: expected an object with {', '.join(keys) or 'entries'}, came {entries!r:.200}.")
    return entries


def _read_parquets(root: Path, pattern: str, columns: list[str]):
    files = _glob(root, pattern)
    missing = sorted(set(columns) - set(pq.read_schema(files[0]).names))
    if missing:
        raise ValueError(f"{files[0]}: the columns {missing} are missing; the dataset was not written completely.")
    return pq.read_table(files, columns=columns)
