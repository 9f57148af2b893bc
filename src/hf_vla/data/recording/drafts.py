"""The episode that is being recorded, kept aside with its statistics."""

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_vla.actions.statistics import QUANTILES, ActionStatistics
from hf_vla.data import schema
from hf_vla.data.recording.encoding import PictureEncoder, PngEncoder, VideoEncoder, VideoOptions
from hf_vla.data.recording.features import NUMERIC, arrow_schema

NAMES = ("min", "max", "mean", "std", "count")  # in LeRobot's order, quantiles after them
_ROWS = 64  # rows kept in memory before they are written aside


class EpisodeDraft:
    """Rows and pictures of one episode, written to a folder of its own as they come.

    Args:
        folder (`Path`): the folder; it is made, in place of what an interrupted draft left, and removed by `discard`.
        features (`dict`): of `check_features`.
        fps (`Fraction`): frames per second.
        episode_index (`int`): the number of the episode.
        first_index (`int`): the number of its first row.
        texts (`dict[str, list[str]]`): the texts known so far under "task" and "subtask"; the draft's own `texts` has
            those of the episode besides.
        options (`VideoOptions`): how videos are encoded.
    """

    def __init__(
        self,
        folder: Path,
        features: dict[str, dict],
        fps: Fraction,
        episode_index: int,
        first_index: int,
        texts: dict[str, list[str]],
        options: VideoOptions,
    ):
        self.folder, self.fps = folder, fps
        self.episode_index, self.first_index = episode_index, first_index
        self.length = 0
        self.tasks: list[str] = []  # of the episode, in the order in which they came
        self.texts = {name: [*known] for name, known in texts.items()}
        self._numbers = {name: {text: n for n, text in enumerate(known)} for name, known in texts.items()}
        self.columns = {key: feature for key, feature in features.items() if feature["dtype"] != "video"}
        self._rows: list[dict] = []
        self.numbers = {
            key: ActionStatistics() for key, feature in self.columns.items() if feature["dtype"] in NUMERIC
        }
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._writer = pq.ParquetWriter(self.data, arrow_schema(features))
        self.encoders: dict[str, PictureEncoder] = {}
        for key, feature in features.items():
            if feature["dtype"] == "video":
                self.encoders[key] = VideoEncoder(self.video(key), fps, feature["shape"], options)
            elif feature["dtype"] == "image":
                self.encoders[key] = PngEncoder()
        self._closed, self._error = False, None

    @property
    def data(self) -> Path:
        """The file of the rows."""
        return self.folder / "rows.parquet"

    def video(self, key: str) -> Path:
        """Return the file of a camera."""
        return self.folder / f"{key}.mp4"

    def add(self, frame: dict) -> None:
        """Take a frame of `check_frame`.

        Raises:
            ValueError: the draft is broken or closed.
            OSError: it could not be written.
        """
        self._require_sound()
        if self._closed:
            raise ValueError("The episode is complete and waits to be saved; save it again, or discard it.")
        time, task = self.length / self.fps, frame[schema.TASK]
        if abs(float(np.float32(time)) - time) > schema.TOLERANCE_S / 2:
            raise ValueError(
                f"An episode of {float(time):.0f} s is too long for its timestamps, which are float32 and would miss "
                "their pictures; save it and go on with another."
            )
        row = dict(frame)
        try:
            for key, encoder in self.encoders.items():
                row[key] = encoder.add(frame[key])
            row |= {"timestamp": float(time), "frame_index": self.length, "episode_index": self.episode_index}
            row["index"] = self.first_index + self.length
            for name, numbers in self._numbers.items():
                row[name + schema.INDEX_SUFFIX] = self._number(name, numbers, row.pop(name))
            self.tasks += [task] if task not in self.tasks else []
            self._rows.append(row)
            self.length += 1
            if len(self._rows) == _ROWS:
                self._flush()
        except BaseException as error:  # KeyboardInterrupt too: one camera may have the frame, another not
            self._error = error
            raise

    def close(self) -> None:
        """Finish the files. Closing a draft again does nothing.

        Raises:
            ValueError: the draft is broken.
            OSError: the files could not be written.
        """
        self._require_sound()
        if not self._closed:
            try:
                self._flush()
                self._writer.close()
                for encoder in self.encoders.values():
                    encoder.close()
            except BaseException as error:
                self._error = error
                raise
        self._closed = True

    def discard(self) -> None:
        """Stop and remove the folder."""
        for encoder in self.encoders.values():
            encoder.discard()
        try:
            self._writer.close()
        except OSError:
            pass  # the disk is full
        shutil.rmtree(self.folder)

    def pictures(self) -> dict[str, dict[str, np.ndarray]]:
        """Return the statistics of the cameras."""
        return {key: encoder.statistics() for key, encoder in self.encoders.items()}

    def _require_sound(self):
        if self._error is not None:
            raise ValueError(
                f"Episode {self.episode_index} could not be written ({self._error!r}); discard it. The episodes saved "
                "before are complete."
            ) from self._error

    def _number(self, name, numbers, text):
        if text not in numbers:
            numbers[text] = len(self.texts[name])
            self.texts[name].append(text)
        return numbers[text]

    def _flush(self):
        if not self._rows:
            return
        arrays = []
        for key, feature in self.columns.items():
            values = [row[key] for row in self._rows]
            kind = self._writer.schema.field(key).type
            if feature["dtype"] == "image":
                first = self.length - len(values)
                names = (f"frame-{first + place:06d}.png" for place in range(len(values)))
                values = [{"bytes": value.result(), "path": name} for value, name in zip(values, names, strict=True)]
            elif key in self.numbers:
                rows = np.array(values, feature["dtype"]).reshape(len(values), *feature["shape"])
                self.numbers[key].update(rows.reshape(len(rows), -1))
                values = rows[:, 0] if feature["shape"] == [1] else rows.tolist()
            arrays.append(pa.array(values, type=kind))
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._writer.schema))
        self._rows = []


def summarize(statistics: ActionStatistics, feature: dict) -> dict[str, np.ndarray]:
    """Return statistics under LeRobot's names, in the shape of their feature."""
    summary = {name: value.reshape(feature["shape"]) for name, value in statistics.summary().items()}
    if not feature["dtype"].startswith("float"):
        summary |= {name: summary[name].astype(feature["dtype"]) for name in ("min", "max")}
    summary["count"] = np.array([statistics.count])
    return {name: summary[name] for name in (*NAMES, *QUANTILES)}


def merge_pictures(known: dict[str, np.ndarray] | None, own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the statistics of pictures of several episodes; quantiles are means over the episodes, as LeRobot's."""
    if known is None:
        return own
    merged = schema.merge_statistics([{"": known}, {"": own}])[""]
    share = own["count"] / merged["count"]
    merged = {name: merged[name] for name in NAMES}
    quantiles = {name: (1 - share) * known[name] + share * own[name] for name in QUANTILES if name in known}
    return merged | quantiles


def write_texts(path: Path, name: str, texts: list[str]) -> Path:
    """Write the table of tasks or subtasks, whose index pandas and LeRobot take the texts for."""
    import pandas as pd

    pd.DataFrame({name + schema.INDEX_SUFFIX: range(len(texts))}, index=pd.Index(texts, name=name)).to_parquet(path)
    return path
