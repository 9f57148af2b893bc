"""LeRobot datasets, versions 2.0 to 3.0, as a torch dataset that equals LeRobot's own output."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from operator import index as as_index
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from hf_vla.data import schema
from hf_vla.data.cache import FrameCache
from hf_vla.data.reading.files import DatasetFiles
from hf_vla.data.reading.pictures import MappedPictures, ParquetPictures, decoded
from hf_vla.data.reading.roles import own_keys
from hf_vla.data.reading.rows import Rows, check_finite, check_order, check_texts, place, read_rows, row_counts
from hf_vla.data.video import VideoFrames, side_by_side


class LeRobotEpisodes(Dataset):
    """Rows of a LeRobot dataset, with windows over time where they are asked for.

    An item holds LeRobot's own keys: cameras float32 `(3, height, width)` in [0, 1], columns float32 or int64 (a shape
    of (1,) as a scalar), `task` as text. A key in `delta_timestamps` gets a leading time axis and a boolean
    `<key>_is_pad`, True where the window leaves the episode; there the nearest row of the episode is repeated.

    Further texts, None where a row has none, are columns of text under their names, LeRobot's subtasks as `subtask`,
    and GR00T's annotations (`annotation.*`, where `meta/modality.json` declares them) in place of their numbers.
    LeRobot's language messages (columns of dtype "language") are left out: they are no text per row.

    Of a dataset on the Hub only the files of these episodes and cameras are downloaded, all of the commit that the
    revision named when it was opened. With `streaming`, videos and pictures in parquet stay where they are, and items
    fetch what they need of them by range requests: from the Hub, or from the URL of a folder that fsspec can list and
    read by ranges, such as `s3://`; an HTTP server has to offer both.

    Pictures in parquet cannot be read at random: opening a dataset on this machine copies those of its cameras to the
    cache of `datasets` (`HF_DATASETS_CACHE`), as many bytes again, once for every choice of cameras.

    In memory are the columns without pictures, 4 or 8 bytes for every number of a row: 100 for a robot with seven
    dimensions of state and action, so 10 GB for 100 million rows, and up to 25 GB for the minutes that opening them
    takes. Texts of a row's own (not by number) come on top: each some 60 bytes and its letters.

    Args:
        source (`str` or `Path`): the folder of the dataset, its name on the Hub, or (to stream) its URL.
        delta_timestamps (`dict[str, list[float]]`, *optional*): column -> seconds relative to the row, multiples of
            1 / fps.
        delta_indices (`dict[str, list[int]]`, *optional*): of further columns, the same in rows.
        episodes (`Iterable[int]`, *optional*): the episodes to read; all of them by default.
        cameras (`Sequence[str]`, *optional*): the cameras to decode, with or without `observation.images.`; all but
            those of depth by default.
        revision (`str`, *optional*): branch, tag or commit of a dataset on the Hub.
        camera_map (`Mapping[str, str]`, *optional*): role -> the dataset's camera, with or without
            `observation.images.`: it is read under the role's name everywhere, in `cameras` and `delta_timestamps`
            too. Other cameras keep theirs.
        column_map (`Mapping[str, str]`, *optional*): key -> the dataset's column that is read under it, likewise:
            `{"action": "actions", "observation.state": "state"}`.
        streaming (`bool`, defaults to `False`): leave the pictures where they are.
        frame_cache ([`FrameCache`], *optional*): keeps decoded frames of videos.

    Attributes:
        name (`str`): the source.
        revision (`str` or `None`): the commit of a dataset on the Hub.

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
        camera_map: Mapping[str, str] | None = None,
        streaming: bool = False,
        frame_cache: FrameCache | None = None,
        column_map: Mapping[str, str] | None = None,
        delta_indices: dict[str, Sequence[int]] | None = None,
    ):
        self._files = DatasetFiles(source, revision, streaming)
        self.name, self.root, self.revision = self._files.name, self._files.root, self._files.revision
        info = schema.read_info(self.root)
        self._own_keys = own_keys(self.name, info, camera_map or {}, column_map or {})
        self._roles = {own: role for role, own in self._own_keys.items()}
        self.info = replace(info, features={self._roles[key]: entry for key, entry in info.features.items()})
        self.tasks = schema.read_tasks(self.root, self.info)
        self.camera_keys = self._select_cameras(cameras)
        self.episodes = self._select_episodes(info, episodes)
        unread = {*self.info.camera_keys, *self.info.language_keys} - {*self.camera_keys}
        self.features = {key: feature for key, feature in self.info.features.items() if key not in unread}
        self._indexed = self._indexed_texts()
        steps = {key: np.divide(steps, self.fps) for key, steps in (delta_indices or {}).items()}
        self._deltas = self._delta_indices({**(delta_timestamps or {}), **steps})
        self._rows = self._read_rows(whole=episodes is None)
        self._encoded = self._open_pictures()
        open_file = self._files.open_video if self._files.remote else None
        cameras = [key for key in self.camera_keys if self.features[key]["dtype"] == "video"]
        self._videos = {key: VideoFrames(open_file=open_file) for key in cameras}  # each of them in one thread
        self._frame_cache = frame_cache
        self._fetch_videos(whole=episodes is None)

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
        """The dataset's own statistics: key -> {"mean", "std", "min", "max", "count", ...}.

        They are of all its rows, whichever episodes are read and whatever [`keep`] took out.
        """
        statistics = schema.read_statistics(self.root, self.info)
        return {self._roles.get(key, key): entry for key, entry in statistics.items()}

    def column(self, key: str) -> np.ndarray:
        """Return a column without decoding anything: `(num_frames, *shape)`, read-only."""
        if key not in self._rows.columns:
            raise ValueError(f"{self.name}: no column {key!r}; it has {sorted(self._rows.columns)}.")
        view = self._rows.columns[key].view()
        view.flags.writeable = False
        return view

    @property
    def text_columns(self) -> list[str]:
        """The keys of an item that hold text."""
        texts = [key for key, column in self._rows.columns.items() if self._is_text(key) and column.ndim == 1]
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
            return np.array([texts[index] for index in self._rows.columns[column]], dtype=object)
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

    def keep(self, mask: np.ndarray) -> "LeRobotEpisodes":
        """Return the same dataset without the other rows: windows jump over what was taken out, such as idle frames.

        Args:
            mask (`np.ndarray` of shape `(num_frames,)`): bool; True where a row stays.

        Raises:
            ValueError: the mask has another shape or type, or keeps nothing.
        """
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != (len(self),) or not mask.any():
            raise ValueError(
                f"{self.name}: expected a mask of {len(self)} bool, some of them True, came {mask.dtype} of shape "
                f"{mask.shape}, {np.count_nonzero(mask)} of them True."
            )
        kept = copy.copy(self)
        kept.__dict__.pop("episode_starts", None)
        columns = {key: column[mask] for key, column in self._rows.columns.items()}
        kept._rows = replace(self._rows, columns=columns, places=self._rows.places[mask])
        lengths = np.add.reduceat(mask, self.episode_starts[:-1], dtype=np.int64).tolist()
        episodes = zip(self.episodes, lengths, strict=True)
        kept.episodes = [replace(episode, length=length) for episode, length in episodes if length]
        return kept

    def windows(self, key: str, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return every row's window of a column.

        Args:
            key (`str`): a column with a window.
            rows (`np.ndarray` of shape `(n,)`, *optional*): those asked for; all by default.

        Returns:
            `tuple` of `np.ndarray`: values `(n, window, *shape)` and padding `(n, window)`, bool.
        """
        column = self.column(key)
        if key not in self._deltas:
            raise ValueError(f"{self.name}: {key!r} has no window; give delta_timestamps for it.")
        rows, is_pad = self._window(np.arange(len(self)) if rows is None else rows, key)
        return column[rows], is_pad

    def __len__(self) -> int:
        return int(self.episode_starts[-1])

    def __getitem__(self, index: int) -> dict:
        row = as_index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"{self.name}: row {row} of {len(self)}")
        row %= len(self)
        windows = {key: self._window(row, key) for key in self._deltas}
        videos = side_by_side(lambda key: self._video_frames(row, key, windows), self._videos)
        pictures = dict(zip(self._videos, videos, strict=True))
        item = {key: self._pictures(row, key, windows, pictures) for key in self.camera_keys}
        for key, column in self._rows.columns.items():
            if key in windows:
                item[key] = torch.from_numpy(column[windows[key][0]])
            else:
                item[key] = column[row] if column.dtype == object else torch.tensor(column[row])
        for key, (_, is_pad) in windows.items():
            item[key + schema.PAD_SUFFIX] = torch.from_numpy(is_pad)
        for key, (column, _, texts) in self._indexed.items():
            item[key] = texts[self._rows.columns[column][row]]
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
        return self.episode_starts.searchsorted(rows, side="right") - 1

    def _window(self, rows, key: str) -> tuple[np.ndarray, np.ndarray]:
        position = self._episode_of(rows)
        first, last = self.episode_starts[position], self.episode_starts[position + 1] - 1
        wanted = np.expand_dims(rows, -1) + self._deltas[key]
        inside = np.minimum(np.maximum(wanted, np.expand_dims(first, -1)), np.expand_dims(last, -1))
        return inside, inside != wanted

    def _pictures(self, row: int, key: str, windows: dict, videos: dict[str, np.ndarray]) -> torch.Tensor:
        pictures = videos.get(key)
        if pictures is None:
            pictures = np.stack([self._image(frame, key) for frame in (windows[key][0] if key in windows else [row])])
        pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        pictures = pictures.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return pictures if key in windows else pictures[0]

    def _video_frames(self, row: int, key: str, windows: dict) -> np.ndarray:
        path, start = self.episodes[self._episode_of(row)].videos[key]
        times = self._rows.columns["timestamp"][windows[key][0] if key in windows else [row]]
        seconds = [start + time for time in times.tolist()]
        try:
            if self._frame_cache is None:
                return self._videos[key].read(path, seconds)
            return self._frame_cache.read(path, seconds, self._videos[key].read)
        except (ValueError, OSError) as error:
            raise type(error)(f"{self.name}, {place(self._rows.columns, row)}, {key}: {error}") from error

    def _image(self, row: int, key: str) -> np.ndarray:
        try:
            return decoded(self._encoded.encoded(self._own_keys[key], int(self._rows.places[row])))
        except (ValueError, OSError) as error:
            raise type(error)(f"{self.name}, {place(self._rows.columns, row)}, {key}: {error}") from error

    def _open_pictures(self) -> MappedPictures | ParquetPictures | None:
        if self._files.remote:
            return ParquetPictures(self._rows, self._files.open_remote)
        cameras = [self._own_keys[key] for key in self.camera_keys if self.features[key]["dtype"] == "image"]
        return MappedPictures(self._rows.files, cameras) if cameras else None

    def _select_cameras(self, cameras: Sequence[str] | None) -> list[str]:
        known = self.info.camera_keys
        if cameras is None:
            return [key for key in known if key not in self.info.depth_keys]
        if isinstance(cameras, str):
            raise ValueError(f"cameras should be a list of names, came the text {cameras!r}; write [{cameras!r}].")
        wanted = {camera if camera in known else schema.camera_key(camera) for camera in cameras}
        if not wanted <= set(known):
            raise ValueError(f"{self.name}: no camera {sorted(wanted - set(known))}; it has {known}.")
        return [key for key in known if key in wanted]

    def _select_episodes(self, info: schema.DatasetInfo, episodes: Iterable[int] | None) -> list[schema.Episode]:
        known = schema.read_episodes(self.root, info)
        if any(role != own for role, own in self._own_keys.items()):
            known = [replace(e, videos={self._roles[key]: video for key, video in e.videos.items()}) for e in known]
        if not known:
            raise ValueError(f"{self.name}: expected one episode or more in the table of episodes, came none.")
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

    def _read_rows(self, whole: bool) -> Rows:
        """Read these episodes' rows, of the files that the table of episodes names if they are there."""
        features = {self._own_keys[key]: entry for key, entry in self.features.items() if key not in self.camera_keys}
        has_images = any(feature["dtype"] == "image" for feature in self.info.features.values())
        here = not self._files.remote or not has_images  # files without pictures are fetched whole
        rows, pattern = None, schema.data_pattern(self.info)
        if not whole:
            named = {episode.data for episode in self.episodes}
            if here:
                self._files.fetch_files(named)
            if files := [path for path in self._files.glob(pattern) if path in named]:
                rows = read_rows(files, features, self.episodes, self._open_file)
                lengths = [episode.length for episode in self.episodes]
                rows = rows if (row_counts(rows.columns, self.episodes) == lengths).all() else None
        if rows is None:
            if here:
                self._files.fetch(pattern)
            if not (files := self._files.glob(pattern)):
                raise FileNotFoundError(f"{self.root / pattern}: no such file; the dataset is incomplete.")
            rows = read_rows(files, features, self.episodes, self._open_file)
        rows = replace(rows, columns={self._roles[key]: column for key, column in rows.columns.items()})
        self._check(rows.columns)
        return rows

    @property
    def _open_file(self):
        return self._files.open_remote if self._files.remote else None

    def _check(self, columns: dict[str, np.ndarray]):
        check_order(self.name, columns, self.episodes)
        optional = {key for key, _, texts in self._indexed.values() if -1 in texts}
        with_nulls = [key for key in optional if columns[key].dtype.kind != "i"]
        for key in with_nulls:  # a row without a number has no text, like one of number -1
            missing = [number is None or number != number for number in columns[key].tolist()]
            columns[key] = np.where(missing, -1, columns[key])
        check_texts(self.name, columns, self._indexed)
        columns |= {key: columns[key].astype(np.int64) for key in with_nulls}
        check_finite(self.name, columns)

    def _fetch_videos(self, whole: bool) -> None:
        if self._files.remote:
            return
        cameras = [key for key in self.camera_keys if self.features[key]["dtype"] == "video"]
        if whole:
            self._files.fetch([schema.video_pattern(self.info, self._own_keys[key]) for key in cameras])
        else:
            self._files.fetch_files({episode.videos[key][0] for episode in self.episodes for key in cameras})
