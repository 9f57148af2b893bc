"""LeRobot datasets, version 2.1 and 3.0, as a torch dataset that equals LeRobot's own output."""

import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from operator import index as as_index
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from hf_vla.data import schema
from hf_vla.data.video import VideoFrames


class LeRobotEpisodes(Dataset):
    """Rows of a LeRobot dataset, with windows over time where they are asked for.

    An item holds LeRobot's own keys: cameras float32 `(3, height, width)` in [0, 1], columns float32 or int64 (a shape
    of (1,) as a scalar), `task` as text. A key in `delta_timestamps` gets a leading time axis and a boolean
    `<key>_is_pad`, True where the window leaves the episode; there the nearest row of the episode is repeated.

    Further texts, None where a row has none, are columns of text under their names, LeRobot's subtasks as `subtask`,
    and GR00T's annotations (`annotation.*`, where `meta/modality.json` declares them) in place of their numbers.
    LeRobot's language messages (columns of dtype "language") are left out: they are no text per row.

    Args:
        source (`str` or `Path`): the folder of the dataset, or its name on the Hub.
        delta_timestamps (`dict[str, list[float]]`, *optional*): column -> seconds relative to the row, multiples of
            1 / fps.
        episodes (`Iterable[int]`, *optional*): the episodes to read; all of them by default.
        cameras (`Sequence[str]`, *optional*): the cameras to decode, with or without `observation.images.`; all of
            them by default.
        revision (`str`, *optional*): branch, tag or commit of a dataset on the Hub.

    Raises:
        FileNotFoundError: a file of the dataset is missing.
        ValueError: unknown version, camera, episode or column; a delta that is no multiple of 1 / fps; actions or
            observations that are NaN or infinite; rows that disagree with the table of episodes, tasks or subtasks.
    """

    def __init__(
        self,
        source: str | Path,
        delta_timestamps: dict[str, Sequence[float]] | None = None,
        episodes: Iterable[int] | None = None,
        cameras: Sequence[str] | None = None,
        revision: str | None = None,
    ):
        self.name = str(source)
        self.root = local_folder(source, revision)
        self.info = schema.read_info(self.root)
        self.tasks = schema.read_tasks(self.root, self.info)
        self.camera_keys = self._select_cameras(cameras)
        self.episodes = self._select_episodes(episodes)
        unread = {*self.info.camera_keys, *self.info.language_keys} - {*self.camera_keys}
        self.features = {key: feature for key, feature in self.info.features.items() if key not in unread}
        self._indexed = self._indexed_texts()
        self._deltas = self._delta_indices(delta_timestamps or {})
        self._columns, self._rows = self._read_columns()
        self._videos = VideoFrames()

    @property
    def fps(self) -> float:
        """Rows per second."""
        return self.info.fps

    @property
    def num_episodes(self) -> int:
        """Number of the episodes read."""
        return len(self.episodes)

    @property
    def num_frames(self) -> int:
        """Number of rows."""
        return len(self)

    @cached_property
    def episode_starts(self) -> np.ndarray:
        """First row of every episode, and the number of rows at the end: `(num_episodes + 1,)`."""
        return np.cumsum([0] + [episode.length for episode in self.episodes])

    @cached_property
    def statistics(self) -> dict[str, dict[str, np.ndarray]]:
        """The dataset's own statistics over all its episodes: key -> {"mean", "std", "min", "max", "count", ...}."""
        return schema.read_statistics(self.root, self.info)

    def column(self, key: str) -> np.ndarray:
        """Return a column without decoding anything: `(num_frames, *shape)`, read-only."""
        if key not in self._columns:
            raise ValueError(f"{self.name}: no column {key!r}; it has {sorted(self._columns)}.")
        view = self._columns[key].view()
        view.flags.writeable = False
        return view

    @property
    def text_columns(self) -> list[str]:
        """The keys of an item that hold text."""
        texts = [key for key, column in self._columns.items() if self._is_text(key) and column.ndim == 1]
        return [*dict.fromkeys([*texts, *self._indexed])]

    def texts(self, key: str) -> np.ndarray:
        """Return the text of every row, None where a row has none: `(num_frames,)`, objects.

        Args:
            key (`str`): one of `text_columns`.

        Raises:
            ValueError: there is no such text.
        """
        if key in self._indexed:
            column, _, texts = self._indexed[key]
            return np.array([texts[index] for index in self._columns[column]], dtype=object)
        if key in self.text_columns:
            return self.column(key)
        hint = ""
        if key in self.info.language_keys:
            hint = " LeRobot's messages are no text per row: write the one meant to a column of text, or as subtasks."
        elif key.startswith("annotation."):
            hint = " GR00T's annotations are columns that meta/modality.json lists: {'annotation': {name: {}}}."
        elif key in (schema.SUBTASK, schema.SUBTASK + schema.INDEX_SUFFIX):
            hint = " Subtasks are the column 'subtask_index' and meta/subtasks.parquet together, read as 'subtask'."
        raise ValueError(f"{self.name}: no text {key!r}; it has {self.text_columns}.{hint}")

    def windows(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return every row's window of a column.

        Returns:
            `tuple` of `np.ndarray`: values `(num_frames, window, *shape)` and padding `(num_frames, window)`, bool.
        """
        column = self.column(key)
        if key not in self._deltas:
            raise ValueError(f"{self.name}: {key!r} has no window; give delta_timestamps for it.")
        rows, is_pad = self._window(np.arange(len(self)), key)
        return column[rows], is_pad

    def __len__(self) -> int:
        return int(self.episode_starts[-1])

    def __getitem__(self, index: int) -> dict:
        row = as_index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"{self.name}: row {row} of {len(self)}")
        row %= len(self)
        windows = {key: self._window(row, key) for key in self._deltas}
        item = {key: self._pictures(row, key, windows) for key in self.camera_keys}
        for key, column in self._columns.items():
            if key in windows:
                item[key] = torch.from_numpy(column[windows[key][0]])
            else:
                item[key] = column[row] if column.dtype == object else torch.tensor(column[row])
        for key, (_, is_pad) in windows.items():
            item[key + schema.PAD_SUFFIX] = torch.from_numpy(is_pad)
        for key, (column, _, texts) in self._indexed.items():
            item[key] = texts[self._columns[column][row]]
        return item

    def _is_text(self, key: str) -> bool:
        return self.features[key]["dtype"] == "string"

    def _indexed_texts(self) -> dict[str, tuple[str, str, dict[int, str | None]]]:
        """Return the texts that rows give by number: key -> (column of numbers, name of the table, its texts)."""
        task, subtask = schema.TASK + schema.INDEX_SUFFIX, schema.SUBTASK + schema.INDEX_SUFFIX
        indexed = {schema.TASK: (task, schema.TASK, self.tasks)}
        if self._is_number(subtask) and (subtasks := schema.read_subtasks(self.root)) is not None:
            indexed[schema.SUBTASK] = (subtask, schema.SUBTASK, {-1: None} | subtasks)  # -1: a row not annotated
        for key, column in schema.read_annotations(self.root).items():
            if self._is_number(column):
                indexed[key] = (column, schema.TASK, self.tasks)
        return indexed

    def _is_number(self, key: str) -> bool:
        feature = self.features.get(key, {"shape": None})
        return feature["shape"] in ([1], []) and not self._is_text(key)

    def _episode_of(self, rows):
        return np.searchsorted(self.episode_starts, rows, side="right") - 1

    def _window(self, rows, key: str) -> tuple[np.ndarray, np.ndarray]:
        position = self._episode_of(rows)
        first, last = self.episode_starts[position], self.episode_starts[position + 1] - 1
        wanted = np.expand_dims(rows, -1) + self._deltas[key]
        inside = np.minimum(np.maximum(wanted, np.expand_dims(first, -1)), np.expand_dims(last, -1))
        return inside, inside != wanted

    def _pictures(self, row: int, key: str, windows: dict) -> torch.Tensor:
        rows = windows[key][0] if key in windows else [row]
        if self.features[key]["dtype"] == "video":
            pictures = self._video_frames(row, rows, key)
        else:
            pictures = np.stack([self._image(frame, key) for frame in rows])
        pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().float().div_(255)
        return pictures if key in windows else pictures[0]

    def _video_frames(self, row: int, rows, key: str) -> np.ndarray:
        episode = self.episodes[self._episode_of(row)]
        path, start = episode.videos[key]
        try:
            return self._videos.read(path, [start + float(time) for time in self._columns["timestamp"][rows]])
        except (ValueError, OSError) as error:
            raise type(error)(f"{self.name}, {_place(self._columns, row)}, {key}: {error}") from error

    def _image(self, row: int, key: str) -> np.ndarray:
        data = self._images.data[key][int(self._rows[row])]["bytes"].as_py()
        try:
            if not data:
                raise ValueError("the picture has no bytes; was it left in a file of its own?")
            with Image.open(io.BytesIO(data)) as image:
                if image.mode.startswith(("I", "F")):  # convert() would clip them to white
                    raise ValueError(
                        f"expected 8 bits per channel, came mode {image.mode!r}; see `cameras` to skip it."
                    )
                return np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more
            raise ValueError(f"{self.name}, {_place(self._columns, row)}, {key}: {error}") from error

    @cached_property
    def _images(self):
        import datasets

        # Memory-mapped by `datasets`: pictures in parquet are too many for memory, and parquet has no random access.
        files = [str(path) for path in schema.data_files(self.root, self.info)]
        cameras = [key for key in self.camera_keys if self.features[key]["dtype"] == "image"]
        return datasets.load_dataset("parquet", data_files=files, columns=cameras, split="train")

    def _select_cameras(self, cameras: Sequence[str] | None) -> list[str]:
        known = self.info.camera_keys
        if cameras is None:
            return known
        if isinstance(cameras, str):
            raise ValueError(f"cameras should be a list of names, came the text {cameras!r}; write [{cameras!r}].")
        wanted = {camera if camera in known else schema.camera_key(camera) for camera in cameras}
        if not wanted <= set(known):
            raise ValueError(f"{self.name}: no camera {sorted(wanted - set(known))}; it has {known}.")
        return [key for key in known if key in wanted]

    def _select_episodes(self, episodes: Iterable[int] | None) -> list[schema.Episode]:
        known = schema.read_episodes(self.root, self.info)
        if episodes is None:
            return known
        wanted = {as_index(number) for number in episodes}
        unknown = sorted(wanted - {episode.index for episode in known})
        if unknown or not wanted:
            raise ValueError(
                f"{self.name}: expected episodes of its {len(known)}, {known[0].index} to {known[-1].index}, "
                f"came {unknown or 'none'}."
            )
        return [episode for episode in known if episode.index in wanted]

    def _delta_indices(self, delta_timestamps: dict[str, Sequence[float]]) -> dict[str, np.ndarray]:
        deltas = {}
        for key, seconds in delta_timestamps.items():
            if key not in self.features or self._is_text(key) or key in self._indexed:
                raise ValueError(
                    f"{self.name}: no column {key!r} to take a window of; it reads {sorted(self.features)}."
                )
            steps = np.asarray(seconds, dtype=np.float64) * self.fps
            with np.errstate(invalid="ignore"):  # of infinite steps, which are wrong as NaN is
                wrong = ~(np.abs(steps - np.round(steps)) / self.fps <= schema.TOLERANCE_S)
            if wrong.any():
                raise ValueError(
                    f"{self.name}: delta_timestamps of {key!r} should be multiples of 1/{self.fps} s, "
                    f"came {np.asarray(seconds)[wrong].tolist()}."
                )
            deltas[key] = np.round(steps).astype(np.int64)
        return deltas

    def _read_columns(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return the columns in order of the rows' own number, and each row's place in the files."""
        features = {key: feature for key, feature in self.features.items() if key not in self.camera_keys}
        columns = schema.read_columns(schema.data_files(self.root, self.info), features)
        rows = np.argsort(columns["index"], kind="stable")
        rows = rows[np.isin(columns["episode_index"][rows], [episode.index for episode in self.episodes])]
        columns = {key: column[rows] for key, column in columns.items()}
        self._check_rows(columns)
        optional = {key for key, _, texts in self._indexed.values() if -1 in texts}
        with_nulls = [key for key in optional if columns[key].dtype.kind != "i"]
        for key in with_nulls:  # a row without a number has no text, like one of number -1
            missing = [number is None or number != number for number in columns[key].tolist()]
            columns[key] = np.where(missing, -1, columns[key])
        self._check_texts(columns)
        columns |= {key: columns[key].astype(np.int64) for key in with_nulls}
        self._check_finite(columns)
        return columns, rows

    def _check_rows(self, columns: dict[str, np.ndarray]):
        table = np.array([(episode.index, episode.length) for episode in self.episodes], np.int64).reshape(-1, 2)
        numbers, lengths = table.T
        wanted = np.bincount(numbers, lengths).astype(np.int64)
        counts = np.bincount(columns["episode_index"], minlength=len(wanted))
        wrong = counts != wanted
        if wrong.any():
            number = wrong.argmax()
            raise ValueError(
                f"{self.name}: the table of episodes gives episode {number} {wanted[number]} rows, the data files "
                f"have {counts[number]} for it; the dataset was not written completely, or written twice."
            )
        frames = np.arange(len(self)) - np.repeat(self.episode_starts[:-1], lengths)
        wrong = (columns["episode_index"] != np.repeat(numbers, lengths)) | (columns["frame_index"] != frames)
        wrong[1:] |= np.diff(columns["index"]) == 0
        if wrong.any():
            row = wrong.argmax()
            raise ValueError(
                f"{self.name}: the row of index {columns['index'][row]}, {_place(columns, row)}, does not follow the "
                "one before it; expected the rows of every episode once each, frames counted from 0. Write them anew."
            )

    def _check_texts(self, columns: dict[str, np.ndarray]):
        for column, table, texts in self._indexed.values():
            unknown = ~np.isin(columns[column], list(texts))
            if unknown.any():
                row = unknown.argmax()
                raise ValueError(
                    f"{self.name}: {column} {columns[column][row]} of {_place(columns, row)} is none of the dataset's "
                    f"{sum(number >= 0 for number in texts)} {table}(s); add it to meta/{table}s, or leave the "
                    "episode out with `episodes`."
                )

    def _check_finite(self, columns: dict[str, np.ndarray]):
        for key, column in columns.items():
            if key.startswith((schema.ACTION, "observation.")) and column.dtype.kind == "f":
                rows = np.argwhere(~np.isfinite(column))
                if len(rows):
                    row = rows[0, 0]
                    raise ValueError(
                        f"{self.name}: {key!r} is NaN or infinite in {len(np.unique(rows[:, 0]))} row(s), first in "
                        f"{_place(columns, row)}; leave the episode out with `episodes` or mend the data."
                    )


def _place(columns: dict[str, np.ndarray], row: int) -> str:
    return f"episode {columns['episode_index'][row]}, frame {columns['frame_index'][row]}"


def local_folder(source: str | Path, revision: str | None) -> Path:
    """Folder of a dataset; one on the Hub is downloaded.

    Args:
        source (`str` or `Path`): the folder, or its name on the Hub.
        revision (`str`, *optional*): branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: there is no such folder, and it is no dataset's name.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if not isinstance(source, str) or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(f"{source}: no such folder, and no dataset name of the form owner/name either.")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, repo_type="dataset", revision=revision))
