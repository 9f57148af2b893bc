"""The health of a dataset's rows: read file by file, whatever is wrong with one of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from hf_vla.actions.statistics import ActionStatistics
from hf_vla.actions.values import is_constant
from hf_vla.data import schema
from hf_vla.data.checks.findings import Findings
from hf_vla.data.reading.rows import Rows

EPISODE, FRAME, INDEX, TIME = "episode_index", "frame_index", "index", "timestamp"
FILE, PLACE = "number of the file", "place in the files"
NUMBER = {"dtype": "int64", "shape": [1]}
# Statistics may miss the data's by this share of their range: they are of the same rows, but rounded and merged.
STATISTICS_SHARE = 0.01


@dataclass
class RowsFound:
    """What could be read of the rows.

    Args:
        rows (`Rows`): episode, frame, index, time and number of the file of every row, in order of episode and index,
            and the numbers of its texts.
        summaries (`dict[str, dict]`): statistics of every column of actions and observations that is a row of
            numbers, without the rows that are not finite.
        damaged (`set[str]`): columns that are not finite, or cannot be read, in some rows.
        moving (`set[int]`): episodes in which the actions (without any: the state) change.
        complete (`bool`): every file could be read.
    """

    rows: Rows
    summaries: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    moving: set[int] = field(default_factory=set)
    complete: bool = True

    def of(self, episode: int, key: str) -> np.ndarray:
        """Return a column's values in one episode."""
        return self.rows.columns[key][self.places(episode)]

    def places(self, episode: int) -> slice:
        """Return where an episode's rows are."""
        return slice(*np.searchsorted(self.rows.columns[EPISODE], [episode, episode + 1]))

    def file(self, row: int) -> Path:
        """Return the file that holds a row."""
        return self.rows.files[self.rows.columns[FILE][row]]


def read_found_rows(
    files: Sequence[Path],
    info: schema.DatasetInfo,
    texts: Mapping[str, tuple],
    wanted: np.ndarray | None,
    findings: Findings,
    progress: Callable[[int], None],
) -> RowsFound:
    """Read the rows of a dataset, noting what cannot be read, what has another shape, and what is not finite.

    In memory are the columns of one file, some seven numbers of every row and, up to two million rows, the actions
    and observations.

    Args:
        files (`Sequence[Path]`): in order.
        info (`DatasetInfo`): what the dataset declares.
        texts (`Mapping[str, tuple]`): the columns that number texts, see `text_tables`.
        wanted (`np.ndarray`, *optional*): numbers of the episodes; all by default, also unknown ones.
        findings (`Findings`): where to note what is wrong.
        progress (`Callable[[int], None]`): is told after every file that one more was read.
    """
    unread = {*info.camera_keys, *info.language_keys}
    features = {key: feature for key, feature in info.features.items() if key not in unread}
    features |= {key: NUMBER for key in (EPISODE, FRAME, INDEX) if key not in features}
    kept = [key for key in dict.fromkeys((EPISODE, FRAME, INDEX, TIME, *texts)) if key in features]
    moves = schema.ACTION if schema.ACTION in features else schema.STATE
    found, statistics, start = RowsFound(Rows({}, [], np.zeros(0, np.int64), [])), {}, 0
    parts = [dict.fromkeys((*kept, FILE, PLACE), np.zeros(0, np.int64))]
    for path in files:
        columns, groups = _read_file(path, features, findings)
        progress(1)
        if columns is None:
            found.complete = False
            continue
        found.damaged |= features.keys() - columns.keys()
        columns[PLACE] = np.arange(start, start + sum(groups))
        columns[FILE] = np.full(sum(groups), len(found.rows.files))
        if wanted is not None:
            chosen = np.isin(columns[EPISODE], wanted)
            columns = {key: column[chosen] for key, column in columns.items()}
        for key in columns:
            if key.startswith((schema.ACTION, "observation.")) and columns[key].dtype.kind in "fi":
                _take_in(key, columns, path, statistics, found, findings)
        if moves in columns:
            found.moving |= _moving(columns[EPISODE], columns[moves])
        parts.append({key: columns[key] for key in parts[0] if key in columns})
        found.rows.files.append(path)
        found.rows.row_groups.append(groups)
        start += sum(groups)
    everywhere = [key for key in parts[0] if all(key in part for part in parts)]
    columns = {key: np.concatenate([part.pop(key) for part in parts]) for key in everywhere}
    order = np.lexsort((columns[INDEX], columns[EPISODE]))
    columns = {key: column[order] for key, column in columns.items()}
    columns.setdefault(TIME, (columns[FRAME] / info.fps).astype(np.float32))
    found.rows = replace(found.rows, places=columns.pop(PLACE), columns=columns)
    found.summaries = {key: each.summary() for key, each in statistics.items()}
    return found


def text_tables(root: Path, info: schema.DatasetInfo, findings: Findings) -> dict[str, tuple[str, dict]]:
    """Return the columns that number texts: column -> (file of the texts, number -> text)."""
    version = "jsonl" if info.codebase_version in schema.BY_EPISODE else "parquet"
    task, subtask = schema.TASK + schema.INDEX_SUFFIX, schema.SUBTASK + schema.INDEX_SUFFIX
    tables = {}
    for column, name, read in (
        (task, f"meta/tasks.{version}", lambda: schema.read_tasks(root, info)),
        (subtask, "meta/subtasks.parquet", lambda: schema.read_subtasks(root)),
    ):
        try:
            if column in info.features and (texts := read()) is not None:
                tables[column] = name, texts
        except (ValueError, OSError, KeyError, TypeError) as error:
            note_unreadable(name, error, findings)
    annotations = [column for column in schema.read_annotations(root).values() if column in info.features]
    return tables | {column: tables[task] for column in annotations if task in tables}


def note_unreadable(name: str, error: Exception, findings: Findings) -> None:
    """Note that a file of meta is missing, or is not what it should be."""
    missing = isinstance(error, FileNotFoundError)
    text = "expected the file, it is not there" if missing else f"cannot be read ({type(error).__name__}: {error})"
    findings.add("missing file" if missing else "unreadable file", name, text)


def check_order(found: RowsFound, episodes: Sequence[schema.Episode], findings: Findings) -> bool:
    """Compare the rows with the table of episodes; returns whether every episode has its rows, once and in order."""
    columns, files = found.rows.columns, found.rows.files
    numbers, starts, counts = np.unique(columns[EPISODE], return_index=True, return_counts=True)
    step = np.diff(columns[INDEX], prepend=-1)
    wrong = columns[FRAME] != np.arange(len(step)) - np.repeat(starts, counts)
    wrong |= step <= 0  # the first row of an episode follows the last one of the episode before
    has = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    known = {episode.index: episode for episode in episodes}
    spoilt = {*columns[EPISODE][wrong].tolist(), *has.keys() - known.keys()}
    spoilt |= {number for number, episode in known.items() if has.get(number, 0) != episode.length}
    for number in sorted(spoilt):
        if number in has:
            _describe(found, number, known.get(number), wrong[found.places(number)], findings)
        elif (path := known[number].data) not in files and not path.is_file():
            findings.add("missing file", path, "expected the episode's rows, there is no such file", number)
        elif path not in files:
            findings.add("unreadable file", path, "expected the episode's rows, none can be used", number)
        elif found.complete:  # else they are perhaps in the file that cannot be read
            findings.add("row count", path, f"expected {known[number].length} rows, came none", number)
    return not spoilt


def _describe(found: RowsFound, number: int, episode: schema.Episode | None, wrong: np.ndarray, findings: Findings):
    """Say what is wrong with the rows of an episode, `wrong` of which are not where they should be."""
    frames, indices = found.of(number, FRAME), found.of(number, INDEX)
    once, repeats = np.unique(frames, return_counts=True)
    count = len(frames)
    if episode is None:
        kind, frame, text = "row count", None, "expected an episode of the table of episodes, which lacks this one"
    elif count > max(episode.length, len(once)):
        kind, frame = "repeated rows", once[repeats > 1][0]
        text = f"expected {episode.length} rows once each, came {count}, {count - len(once)} of them again"
    elif count != episode.length:
        kind, frame = "row count", np.setdiff1d(np.arange(max(count, episode.length) + 1), frames)[0]
        text = f"expected {episode.length} rows, as the table of episodes says, came {count}"
    else:
        kind, frame = "row order", wrong.argmax()
        text = (
            f"expected frame {frame} with a higher index than the row before it, came frame {frames[frame]} with "
            f"index {indices[frame]}"
        )
    findings.add(kind, found.file(found.places(number).start), text, number, frame)


def check_files(found: RowsFound, episodes: Sequence[schema.Episode], findings: Findings) -> None:
    """Note the episodes whose rows are in another file than the table of episodes names."""
    for episode in episodes:
        place = found.places(episode.index)
        if place.start < place.stop and (path := found.file(place.start)) != episode.data:
            text = f"the table of episodes says that the rows are in {episode.data.relative_to(findings.root)}"
            findings.add("file number", path, text, episode.index)


def check_texts(found: RowsFound, texts: Mapping[str, tuple], findings: Findings) -> None:
    """Note numbers of tasks, subtasks and annotations that their tables lack."""
    columns = found.rows.columns
    for column, (table, known) in texts.items():
        if column not in columns:
            continue
        numbers = columns[column]
        unknown = ~np.isin(numbers, [*known])
        if column.startswith(schema.SUBTASK):
            unknown &= numbers >= 0  # -1 and null: a row not annotated
        for row in np.flatnonzero(unknown):
            text = f"expected {column} to be of the {len(known)} texts of {table}, came {numbers[row]:g}"
            place = columns[EPISODE][row], columns[FRAME][row]
            findings.add("unknown text", found.file(row), text, *place, subject=column)


def check_times(found: RowsFound, fps: float, findings: Findings) -> float:
    """Compare the timestamps with the rate; returns the rate that they have."""
    columns = found.rows.columns
    numbers, starts, counts = np.unique(columns[EPISODE], return_index=True, return_counts=True)
    spans = columns[TIME][starts + counts - 1].astype(np.float64) - columns[TIME][starts]
    rate, late = fps, _off_beat(columns, fps)
    if np.count_nonzero(late) > len(late) / 2 and (spans > 0).any():
        own = float(np.median((counts[spans > 0] - 1) / spans[spans > 0]))
        if (by_own := _off_beat(columns, own)).mean() < 0.5:
            text = f"expected the rows' {own:.6g} per second, as their timestamps say, came fps {fps:g}"
            findings.add("fps", "meta/info.json", text)
            rate, late = own, by_own
    for number in np.unique(columns[EPISODE][late]):
        place = found.places(number)
        row = place.start + late[place].argmax()
        expected, came = columns[FRAME][row] / rate, columns[TIME][row]
        text = f"expected frame_index / fps = {expected:.6f} s within {schema.TOLERANCE_S} s, came {came:.6f} s"
        findings.add("timestamps", found.file(row), text, number, columns[FRAME][row])
    return rate


def check_dimensions(found: RowsFound, info: schema.DatasetInfo, findings: Findings) -> None:
    """Note dimensions that never or hardly vary."""
    for key, summary in found.summaries.items():
        names, never = dimension_names(key, info), is_constant(summary["min"], summary["max"])
        for place in np.flatnonzero(never | is_constant(summary["q01"], summary["q99"])):
            kind = "still gripper" if "grip" in names[place].lower() else "constant dimension"
            came = "is always" if never[place] else "is, but for fewer than 1 % of the rows on either side,"
            text = f"dimension {place} of {key!r} ({names[place]}) {came} {summary['q01'][place]:.6g}"
            findings.add(kind, schema.data_pattern(info), text, subject=f"{key} {place}")


def check_statistics(root: Path, found: RowsFound, info: schema.DatasetInfo, findings: Findings, whole: bool) -> None:
    """Compare the dataset's own statistics with the rows.

    Args:
        root (`Path`): the dataset's folder.
        found (`RowsFound`): the rows.
        info (`DatasetInfo`): what the dataset declares.
        findings (`Findings`): where to note what is wrong.
        whole (`bool`): the rows are all of the dataset, each once; else they are not compared.
    """
    name = "meta/episodes_stats.jsonl" if info.codebase_version == "v2.1" else "meta/stats.json"
    try:
        written = schema.read_statistics(root, info)
    except FileNotFoundError:
        findings.add("missing statistics", name, "expected the dataset's statistics, the file is not there")
        return
    except (ValueError, OSError, KeyError, TypeError, IndexError) as error:
        note_unreadable(name, error, findings)
        return
    for key in [key for key in found.summaries if whole and key not in found.damaged]:
        if key not in written:
            findings.add("missing statistics", name, f"expected an entry {key!r}, came {sorted(written)}", subject=key)
            continue
        summary, names = found.summaries[key], dimension_names(key, info)
        tolerance = STATISTICS_SHARE * (summary["max"] - summary["min"]) + 1e-6 * np.abs(summary["max"]) + 1e-6
        for statistic in ("mean", "std", "min", "max"):
            came = np.asarray(written[key].get(statistic, np.nan), np.float64).ravel()
            if came.shape != tolerance.shape:
                text = f"expected {statistic} of {key!r} with {len(names)} numbers, came {came.size}"
            elif (wrong := ~(np.abs(came - summary[statistic]) <= tolerance)).any():
                place = wrong.argmax()
                text = (
                    f"expected {statistic} of {key!r} in dimension {place} ({names[place]}) to be "
                    f"{summary[statistic][place]:.6g}, as in the rows, came {came[place]:.6g}"
                )
            else:
                continue
            findings.add("wrong statistics", name, text, subject=key)


def dimension_names(key: str, info: schema.DatasetInfo) -> list[str]:
    """Return the names of a column's numbers; their places where it has none."""
    feature = info.features[key]
    size, names = int(np.prod(feature["shape"])), schema.flat_names(feature.get("names"))
    return [str(name) for name in names] if len(names) == size else [str(place) for place in range(size)]


def _read_file(path: Path, features: Mapping[str, dict], findings: Findings) -> tuple[dict | None, list[int]]:
    """Read the columns of a file that can be read, None if they tell no row's place, and each row group's rows."""
    columns, groups = {}, []
    try:
        with pq.ParquetFile(path) as parquet:
            groups = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            for key, feature in features.items():
                try:
                    columns |= schema.file_columns(parquet, path, {key: feature})
                except (ValueError, OSError) as error:
                    findings.add("column", path, str(error).removeprefix(f"{path}: "), subject=key)
    except (ValueError, OSError) as error:
        findings.add("unreadable file", path, f"cannot be read ({error})")
        return None, groups
    for key in (EPISODE, FRAME, INDEX):
        if key in columns and columns[key].dtype.kind != "i":
            came = columns.pop(key).dtype
            findings.add("column", path, f"expected whole numbers under {key!r}, came {came}", subject=key)
    return columns if {EPISODE, FRAME, INDEX} <= columns.keys() else None, groups


def _take_in(key: str, columns: Mapping, path: Path, statistics: dict, found: RowsFound, findings: Findings) -> None:
    """Add a column's rows to its statistics, and note those that are no numbers."""
    finite = np.isfinite(columns[key])
    finite = finite.all(axis=tuple(range(1, finite.ndim)))
    for row in np.flatnonzero(~finite):
        text = f"{key!r} is NaN or infinite in {np.count_nonzero(~finite)} row(s) of the file"
        findings.add("not finite", path, text, columns[EPISODE][row], columns[FRAME][row], subject=key)
        found.damaged.add(key)
    if columns[key].ndim <= 2 and finite.any():
        rows = columns[key][finite]
        statistics.setdefault(key, ActionStatistics()).update(rows.reshape(len(rows), -1))


def _moving(episodes: np.ndarray, values: np.ndarray) -> set[int]:
    changes = values[1:] != values[:-1]
    changes = changes.any(axis=tuple(range(1, changes.ndim))) & (np.diff(episodes) == 0)
    return {*episodes[1:][changes].tolist()}


def _off_beat(columns: Mapping[str, np.ndarray], fps: float) -> np.ndarray:
    """Rows whose timestamp is not where a steady rate puts it; what float32 cannot hold is no fault of theirs."""
    times = columns[TIME]
    tolerance = schema.TOLERANCE_S + np.spacing(np.abs(times).astype(np.float32))
    return ~(np.abs(times.astype(np.float64) - columns[FRAME] / fps) <= tolerance)
