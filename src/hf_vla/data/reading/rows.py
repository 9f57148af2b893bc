"""The rows of a LeRobot dataset, all columns but the pictures: read, put in order and checked once."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow.parquet as pq

from hf_vla.data import schema

# Files elsewhere that are read at once: a request waits much longer than it works.
READ_AT_ONCE = 16


@dataclass(frozen=True)
class Rows:
    """Columns in the order of the rows' own numbers.

    Args:
        columns (`dict[str, np.ndarray]`): of shape `(rows, *shape)`.
        files (`list[Path]`): that hold the rows.
        places (`np.ndarray` of shape `(rows,)`): where each row is in these files, one behind the other.
        row_groups (`list[list[int]]`): for each file, the rows of each of its row groups.
    """

    columns: dict[str, np.ndarray]
    files: list[Path]
    places: np.ndarray
    row_groups: list[list[int]]


def read_rows(
    files: Sequence[Path],
    features: Mapping[str, dict],
    episodes: Sequence[schema.Episode],
    open_file: Callable[[Path], BinaryIO | None] | None = None,
) -> Rows:
    """Read the rows of some episodes.

    One file after the other is read and cut down to these episodes: in memory is what is kept, and one file.

    Args:
        files (`Sequence[Path]`): in order.
        features (`Mapping[str, dict]`): the columns; `episode_index` and `index` among them.
        episodes (`Sequence[Episode]`): to keep.
        open_file (`Callable[[Path], BinaryIO | None]`, *optional*): opens files that are elsewhere, several at once;
            None for one that is on this machine.

    Raises:
        OSError, ValueError: see [`~hf_vla.data.schema.read_columns`].
    """
    wanted = np.array([episode.index for episode in episodes])

    def read(path: Path):
        with pq.ParquetFile((open_file and open_file(path)) or path, pre_buffer=True) as parquet:
            groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            columns = schema.file_columns(parquet, path, features)
        kept = np.flatnonzero(np.isin(columns["episode_index"], wanted))
        if len(kept) < len(columns["episode_index"]):
            columns = {key: column[kept] for key, column in columns.items()}
        return columns, kept, groups

    if open_file:
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            parts = list(pool.map(read, files))
    else:
        parts = [read(path) for path in files]
    groups = [part[2] for part in parts]
    starts = np.cumsum([0, *map(sum, groups)])
    places = np.concatenate([part[1] + start for part, start in zip(parts, starts, strict=False)])
    columns = {key: np.concatenate([part[0].pop(key) for part in parts]) for key in features}  # one at a time
    if (np.diff(columns["index"]) < 0).any():
        order = np.argsort(columns["index"], kind="stable")
        places = places[order]
        for key in columns:
            columns[key] = columns[key][order]
    return Rows(columns, list(files), places, groups)


def row_counts(columns: Mapping[str, np.ndarray], episodes: Sequence[schema.Episode]) -> np.ndarray:
    """Count the rows that each of these episodes has: `(len(episodes),)`."""
    numbers = np.array([episode.index for episode in episodes], np.int64)
    return np.bincount(columns["episode_index"], minlength=int(numbers.max()) + 1)[numbers]


def place(columns: Mapping[str, np.ndarray], row: int) -> str:
    """Name a row as errors do."""
    return f"episode {columns['episode_index'][row]}, frame {columns['frame_index'][row]}"


def check_order(name: str, columns: Mapping[str, np.ndarray], episodes: Sequence[schema.Episode]) -> None:
    """Check that every episode has its rows, once each and in order.

    Raises:
        ValueError: it is not so; the error names the episode, or the row.
    """
    numbers, lengths = np.array([(episode.index, episode.length) for episode in episodes], np.int64).T
    counts = row_counts(columns, episodes)
    if (wrong := counts != lengths).any():
        number = wrong.argmax()
        raise ValueError(
            f"{name}: the table of episodes gives episode {numbers[number]} {lengths[number]} rows, the data files "
            f"have {counts[number]} for it; the dataset was not written completely, or written twice."
        )
    starts = np.cumsum([0, *lengths])
    frames = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    wrong = (columns["episode_index"] != np.repeat(numbers, lengths)) | (columns["frame_index"] != frames)
    wrong[1:] |= np.diff(columns["index"]) == 0
    if wrong.any():
        row = wrong.argmax()
        raise ValueError(
            f"{name}: the row of index {columns['index'][row]}, {place(columns, row)}, does not follow the "
            "one before it; expected the rows of every episode once each, frames counted from 0. Write them anew."
        )


def check_texts(name: str, columns: Mapping[str, np.ndarray], indexed: Mapping[str, tuple]) -> None:
    """Check that every number of a text is one of its table.

    Raises:
        ValueError: it is not so; the error names the row.
    """
    for column, table, texts in indexed.values():
        unknown = ~np.isin(columns[column], list(texts))
        if unknown.any():
            row = unknown.argmax()
            raise ValueError(
                f"{name}: {column} {columns[column][row]} of {place(columns, row)} is none of the dataset's "
                f"{sum(number >= 0 for number in texts)} {table}(s); add it to meta/{table}s, or leave the "
                "episode out with `episodes`."
            )


def check_finite(name: str, columns: Mapping[str, np.ndarray]) -> None:
    """Check actions and observations.

    Raises:
        ValueError: they are NaN or infinite; the error names the first row.
    """
    for key, column in columns.items():
        if key.startswith((schema.ACTION, "observation.")) and column.dtype.kind == "f":
            wrong = ~np.isfinite(column).reshape(len(column), -1).all(1)
            if wrong.any():
                raise ValueError(
                    f"{name}: {key!r} is NaN or infinite in {wrong.sum()} row(s), first in "
                    f"{place(columns, wrong.argmax())}; leave the episode out with `episodes` or mend the data."
                )
