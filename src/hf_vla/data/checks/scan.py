"""One pass over the numbers of a LeRobot dataset: statistics and samples in bounded memory, no video decoded."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import index as as_index
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hf_vla.actions.statistics import ActionStatistics
from hf_vla.data import schema
from hf_vla.data.checks.reservoir import Reservoir
from hf_vla.data.reading.files import DatasetFiles

COLUMNS = (schema.ACTION, schema.STATE)
BATCH_ROWS = 65_536
SAMPLE_ROWS = 200_000  # of each column, for grids and plots
SAMPLE_WINDOWS = 10_000  # of `chunk_size` actions
SHOWN_PLACES = 20  # of rows that are NaN or infinite
_EPISODE, _FRAME = "episode_index", "frame_index"


@dataclass(frozen=True)
class ScanPlan:
    """What of a dataset is read, and where it lies.

    Args:
        name (`str`): of the dataset.
        root (`Path`): its folder.
        files (`tuple[Path, ...]`): the parquet files of its rows.
        columns (`dict[str, tuple[str, ...]]`): column -> the names of its numbers.
        lengths (`np.ndarray` of shape `(highest episode + 1,)`): rows of every episode; -1 for one that is not there.
        wanted (`np.ndarray`): of the same shape, which episodes are read.
        chunk_size (`int`): actions of a window.
        open_file (`Callable[[Path], BinaryIO | None]`, *optional*): opens files that are elsewhere; None for one that
            is in the folder.
    """

    name: str
    root: Path
    files: tuple[Path, ...]
    columns: dict[str, tuple[str, ...]]
    lengths: np.ndarray
    wanted: np.ndarray
    chunk_size: int
    open_file: Callable[[Path], BinaryIO | None] | None = None

    @property
    def rows(self) -> int:
        """Rows that shall be read."""
        return int(self.lengths[self.wanted].sum())


@dataclass
class ColumnScan:
    """What is known of one column: its statistics, a sample of its rows, and the rows that are no numbers.

    Args:
        names (`tuple[str, ...]`): of its numbers.
        statistics (`ActionStatistics`): of all its rows but the bad ones.
        sample (`Reservoir`): of the same rows.
        bad_rows (`int`): rows that hold NaN or infinity; left out of statistics and sample.
        bad_places (`list[tuple[int, int]]`): (episode, frame) of the first of them.
    """

    names: tuple[str, ...]
    statistics: ActionStatistics = field(default_factory=ActionStatistics)
    sample: Reservoir = field(default_factory=lambda: Reservoir(SAMPLE_ROWS))
    bad_rows: int = 0
    bad_places: list[tuple[int, int]] = field(default_factory=list)

    def merge(self, other: "ColumnScan") -> None:
        """Add the rows of another."""
        self.statistics.merge(other.statistics)
        self.sample.merge(other.sample)
        self.report(other.bad_rows, other.bad_places)

    def report(self, count: int, places: Iterable[tuple[int, int]]) -> None:
        """Note rows that are NaN or infinite."""
        self.bad_rows += count
        self.bad_places = sorted({*self.bad_places, *places})[:SHOWN_PLACES]


class DatasetScan:
    """What one pass over a dataset's rows found; grows file by file, and merges with the scans of other processes.

    Args:
        plan ([`ScanPlan`]): what is read.

    Attributes:
        columns (`dict[str, ColumnScan]`): of every column of the plan.
        windows (`Reservoir`): of `chunk_size` consecutive actions of one episode, `(chunk_size, D)` each.
    """

    def __init__(self, plan: ScanPlan):
        self.plan = plan
        self.columns = {key: ColumnScan(names) for key, names in plan.columns.items()}
        self.windows = Reservoir(SAMPLE_WINDOWS)
        self._counts = np.zeros(len(plan.lengths), np.int64)

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.plan.name

    @property
    def num_episodes(self) -> int:
        """Episodes read so far."""
        return int(np.count_nonzero(self._counts))

    @property
    def num_rows(self) -> int:
        """Rows read so far, the bad ones among them."""
        return int(self._counts.sum())

    def merge(self, other: "DatasetScan") -> None:
        """Add the rows of another scan: of the same dataset by another process, or of another dataset.

        Raises:
            ValueError: the other lacks one of the columns, or has other dimensions there.
        """
        for key, column in self.columns.items():
            column.merge(other.columns[key])
        if schema.ACTION in self.columns:
            self.windows.merge(other.windows)
        if other.plan.files == self.plan.files:
            self._counts += other._counts
        else:
            self._counts = np.concatenate([self._counts, other._counts])

    def read(self, path: Path) -> Iterator[int]:
        """Read a file of the dataset batch by batch, yielding how many wanted rows each had.

        Raises:
            ValueError: the file cannot be read, lacks a column, has rows of another shape or of an unknown episode.
        """
        # Drawn anew for every file from its name, so that no process needs to know of another's.
        generator = np.random.default_rng(crc32(f"{self.name}/{path.relative_to(self.plan.root)}".encode()))
        tail = None
        try:
            elsewhere = self.plan.open_file and self.plan.open_file(path)
            with pq.ParquetFile(elsewhere or path, pre_buffer=elsewhere is not None) as file:
                keys = [*dict.fromkeys((_EPISODE, _FRAME, *self.columns))]
                if missing := sorted(set(keys) - set(file.schema_arrow.names)):
                    raise ValueError(f"expected the columns {missing}, the file has {file.schema_arrow.names}")
                groups = self._wanted_groups(file.metadata)
                for batch in file.iter_batches(BATCH_ROWS, groups, keys, use_threads=False):
                    rows, tail = self._update(batch, generator.random(len(batch)), tail)
                    yield rows
        except (ValueError, OSError) as error:  # pyarrow's are both
            raise ValueError(f"{self.name}, {path}: {error}") from error

    def check(self) -> None:
        """Raise a ValueError where an episode has not the rows that the table of episodes gives it."""
        wrong = np.flatnonzero(self.plan.wanted & (self._counts != self.plan.lengths))
        if len(wrong):
            raise ValueError(
                f"{self.name}: the table of episodes gives episode {wrong[0]} {self.plan.lengths[wrong[0]]} rows, the "
                f"data files have {self._counts[wrong[0]]} for it; the dataset was not written completely, or written "
                "twice."
            )

    def _wanted_groups(self, metadata: pq.FileMetaData) -> list[int]:
        """Return the row groups that hold wanted or unknown episodes, or may, by the bounds noted for each group."""
        place = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == _EPISODE)
        groups = []
        for group in range(metadata.num_row_groups):
            bounds = metadata.row_group(group).column(place).statistics
            known = bounds is not None and bounds.has_min_max and 0 <= bounds.min <= bounds.max < len(self.plan.wanted)
            if not known or self.plan.wanted[bounds.min : bounds.max + 1].any():
                groups.append(group)
        return groups

    def _update(self, batch: pa.RecordBatch, numbers: np.ndarray, tail) -> tuple[int, tuple | None]:
        episodes, frames = (batch[key].to_numpy() for key in (_EPISODE, _FRAME))
        self._check_episodes(episodes)
        columns = {}
        for key, column in self.columns.items():
            if (wrong := _wrong_row(batch[key], len(column.names))) is not None:
                raise ValueError(
                    f"expected {len(column.names)} numbers a row under {key!r}, as meta/info.json says, came "
                    f"{batch[key][wrong].as_py()!r} in episode {episodes[wrong]}, frame {frames[wrong]}"
                )
            columns[key] = _numbers(batch[key], len(column.names))
        wanted = self.plan.wanted[episodes]
        if not wanted.all():
            episodes, frames, numbers = episodes[wanted], frames[wanted], numbers[wanted]
            columns = {key: rows[wanted] for key, rows in columns.items()}
        if not len(episodes):
            return 0, None
        starts = np.flatnonzero(np.diff(episodes, prepend=-1))
        np.add.at(self._counts, episodes[starts], np.diff(starts, append=len(episodes)))
        for key, rows in columns.items():
            column, place = self.columns[key], (episodes, frames, numbers)
            if rows.dtype.kind == "f" and not (good := np.isfinite(rows)).all():
                good = good.all(axis=1)
                bad = np.flatnonzero(~good)
                first = bad[:SHOWN_PLACES]
                column.report(len(bad), zip(episodes[first].tolist(), frames[first].tolist(), strict=True))
                rows, place = rows[good], tuple(values[good] for values in place)
            column.statistics.update(rows)
            column.sample.update(place[2], rows.__getitem__)
            if key == schema.ACTION:
                tail = self._update_windows(rows, *place, tail)
        return len(episodes), tail

    def _update_windows(self, actions, episodes, frames, numbers, tail):
        """Offer the windows that end in these rows; `tail` holds the rows before them; returns the next one."""
        size = self.plan.chunk_size
        arrays = (actions, episodes, frames, numbers)
        if tail is not None:
            arrays = tuple(np.concatenate(pair) for pair in zip(tail, arrays, strict=True))
        actions, episodes, frames, numbers = arrays
        starts = max(len(actions) - size + 1, 0)
        whole = (episodes[size - 1 :] == episodes[:starts]) & (frames[size - 1 :] - frames[:starts] == size - 1)
        self.windows.update(
            np.where(whole, numbers[:starts], np.inf), lambda first: actions[first[:, None] + np.arange(size)]
        )
        return tuple(array[starts:].copy() for array in arrays)

    def _check_episodes(self, episodes: np.ndarray):
        known = len(self.plan.lengths)
        if len(episodes) and not 0 <= episodes.min() <= episodes.max() < known:
            number = episodes.min() if episodes.min() < 0 else episodes.max()
        elif (unknown := self.plan.lengths[episodes] < 0).any():
            number = episodes[unknown.argmax()]
        else:
            return
        raise ValueError(f"there are rows of episode {number}, which the table of episodes does not have")


def plan_scan(
    source: str | Path,
    columns: Sequence[str] | None = None,
    episodes: Iterable[int] | None = None,
    revision: str | None = None,
    chunk_size: int = 16,
) -> ScanPlan:
    """Look up what of a dataset is to be read.

    Of one on the Hub, the files of its rows are downloaded, but no video. Where they hold pictures, only the columns
    are fetched from them, by range requests, when they are read.

    Args:
        source (`str` or `Path`): the folder of the dataset, or its name on the Hub.
        columns (`Sequence[str]`, *optional*): columns of numbers; by default the action and the state it has.
        episodes (`Iterable[int]`, *optional*): the episodes to read; all of them by default.
        revision (`str`, *optional*): branch, tag or commit of a dataset on the Hub.
        chunk_size (`int`, defaults to 16): actions of a window.

    Raises:
        FileNotFoundError: a file of the dataset is missing.
        ValueError: an unknown column or episode, or a column that is no row of numbers.
    """
    dataset = DatasetFiles(source, revision)
    root, info = dataset.root, schema.read_info(dataset.root)
    if any(feature["dtype"] == "image" for feature in info.features.values()):
        dataset = DatasetFiles(source, dataset.revision, streaming=True)
    else:
        dataset.fetch(schema.data_pattern(info))
    if columns is None:
        columns = [key for key in COLUMNS if key in info.features]
    names = {key: _column_names(source, key, info) for key in dict.fromkeys(columns)}
    if not names:
        raise ValueError(f"{source}: there is neither {' nor '.join(COLUMNS)}; name columns of {_known(info)}.")
    numbers, rows = schema.read_lengths(root, info)
    lengths = np.full(numbers.max(initial=-1) + 1, -1)
    lengths[numbers] = rows
    wanted = lengths >= 0
    if episodes is not None:
        chosen = {as_index(number) for number in episodes}
        unknown = sorted(chosen - set(numbers.tolist()))
        if unknown or not chosen:
            raise ValueError(
                f"{source}: expected episodes of its {len(numbers)}, {numbers.min()} to {numbers.max()}, came "
                f"{unknown or 'none'}."
            )
        wanted = np.isin(np.arange(len(lengths)), [*chosen])
    if not (files := tuple(dataset.glob(schema.data_pattern(info)))):
        raise FileNotFoundError(f"{root / schema.data_pattern(info)}: no such file; the dataset is incomplete.")
    open_file = dataset.open_remote if dataset.remote else None
    return ScanPlan(str(source), root, files, names, lengths, wanted, chunk_size, open_file)


def merged_plan(plans: Sequence[ScanPlan], name: str = "merged") -> ScanPlan:
    """Return the plan of what several datasets have in common: the columns of equal dimensions.

    Numbers that the datasets name differently are named by their places.
    """
    columns = {}
    for key, names in plans[0].columns.items():
        others = {plan.columns.get(key) for plan in plans}
        if None not in others and len({*map(len, others)}) == 1:
            columns[key] = names if len(others) == 1 else _numbered(key, len(names))
    nothing = np.zeros(0, np.int64)
    return ScanPlan(name, Path(name), (), columns, nothing, nothing.astype(bool), plans[0].chunk_size)


def _wrong_row(values: pa.Array, size: int) -> int | None:
    """Return the first row that is missing or does not hold `size` numbers."""
    wrong = values.is_null()
    if pa.types.is_fixed_size_list(values.type):
        if values.type.list_size != size:
            return 0
    elif pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        wrong = pc.or_kleene(wrong, pc.not_equal(pc.list_value_length(values), size))
    elif size != 1:
        return 0
    return pc.index(wrong, True).as_py() if pc.any(wrong).as_py() else None


def _numbers(values: pa.Array, size: int) -> np.ndarray:
    """Return rows as the training sees them: float32 or int64 of shape (n, size)."""
    rows = (values.flatten() if values.type.num_fields else values).to_numpy(zero_copy_only=False)
    if rows.dtype.kind not in "fiub":
        raise ValueError(f"expected numbers, came {values.type}")
    if rows.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and reported as such
            rows = rows.astype(np.float32, copy=False)
    return rows.reshape(-1, size)


def _column_names(source, key: str, info: schema.DatasetInfo) -> tuple[str, ...]:
    feature = info.features.get(key)
    if feature is None or key not in _known(info):
        came = "no column" if feature is None else f"{feature['dtype']} of shape {list(feature['shape'])}"
        raise ValueError(f"{source}: expected a row of numbers under {key!r}, came {came}; there are {_known(info)}.")
    size = int(np.prod(feature["shape"]))
    names = schema.flat_names(feature.get("names"))
    return tuple(map(str, names)) if len(names) == size else _numbered(key, size)


def _known(info: schema.DatasetInfo) -> list[str]:
    words = ("video", "image", "string", "language")
    return [key for key, each in info.features.items() if each["dtype"] not in words and len(each["shape"]) <= 1]


def _numbered(key: str, size: int) -> tuple[str, ...]:
    return tuple(f"{key.rpartition('.')[2]}_{place}" for place in range(size))
