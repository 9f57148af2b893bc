"""The health of a dataset's pictures: what a video's container says of all frames, and a few decoded per episode."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import av
import numpy as np

from hf_vla.data import schema
from hf_vla.data.checks.findings import Findings
from hf_vla.data.checks.health_rows import FRAME, TIME, RowsFound
from hf_vla.data.reading.pictures import ParquetPictures, decoded
from hf_vla.data.video import VideoFrames

SAMPLED = 4  # pictures of an episode, its first and last among them
SAMPLED_AGAIN = 10  # where those are alike, the same ones among them
RATE_SHARE = 0.01  # by which a video's rate may differ
BLOCK = 8  # pixels whose mean is compared, so that an encoder's noise does not count
# Grey levels of 255 by which a block may change in pictures of a camera that hangs. H264 with a key frame in every
# second one changes a still picture by up to 18, a robot in the example data by 120 and more.
ALIKE = 20.0
BLANK = 3.0  # grey levels of 255 by which the blocks of a picture of nothing differ


class PicturesCheck:
    """Checks one camera.

    Args:
        key (`str`): the camera's column.
        info (`DatasetInfo`): what the dataset declares.
        found (`RowsFound`): the rows.
        root (`Path`): the dataset's folder.
        rate (`float`): pictures per second, as the rows' timestamps have them.
        decode (`bool`): look at pictures; else only at the containers of videos.
    """

    def __init__(self, key: str, info: schema.DatasetInfo, found: RowsFound, root: Path, rate: float, decode: bool):
        self.key, self.info, self.found, self.rate, self.decode = key, info, found, rate, decode
        self.shape = tuple(info.features[key]["shape"])
        self.findings = Findings(root)

    def videos(self, episodes: Sequence[schema.Episode], progress: Callable[[int], None]) -> Findings:
        """Check the videos of some episodes.

        Of every file the container's tables are read: the times of all frames and where they lie (and all packets,
        but none decoded, of a codec that reorders frames). Decoded are a few frames of every episode.
        """
        files: dict[Path, list[tuple[schema.Episode, float]]] = {}
        for episode in episodes:
            path, start = episode.videos[self.key]
            files.setdefault(path, []).append((episode, start))
        reader = VideoFrames(max_open=1)
        for path, held in files.items():
            frames = self._frame_times(path, [episode.index for episode, _ in held])
            for episode, start in held if frames is not None else ():
                seconds = start + self.found.of(episode.index, TIME).astype(np.float64)
                rows = self._rows_with_frames(path, episode.index, seconds, *frames)
                if self.decode and len(rows):
                    self._look(path, episode.index, rows, partial(_video_frame, reader, path, seconds))
            progress(len(held))
        return self.findings

    def images(
        self, pictures: ParquetPictures, episodes: Sequence[schema.Episode], progress: Callable[[int], None]
    ) -> Findings:
        """Check the pictures in parquet of some episodes, a few of each."""
        for episode in episodes:
            place = self.found.places(episode.index)
            where = self.found.rows.places[place]
            if self.decode:
                read = partial(self._image, pictures, where)
                self._look(self.found.file(place.start), episode.index, np.arange(len(where)), read)
            progress(1)
        return self.findings

    def _image(self, pictures: ParquetPictures, places: np.ndarray, row: int) -> np.ndarray:
        return decoded(pictures.encoded(self.key, int(places[row])))

    def _frame_times(self, path: Path, episodes: list[int]) -> tuple[np.ndarray, float] | None:
        """Return the times of the frames that are whole, in order, and from when on some are not; None for no video.

        The tables know when a frame is decoded, which is not after it is shown.
        """
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                entries = [(entry.timestamp, entry.pos + entry.size) for entry in stream.index_entries]
                ticks, ends = np.array(entries, np.int64).reshape(-1, 2).T
                cut = ends > path.stat().st_size
                cut_from = ticks[cut].min() * float(stream.time_base) if cut.any() else np.inf
                ticks = ticks[~cut]
                if stream.codec_context.has_b_frames or not entries:
                    packets = [packet for packet in container.demux(stream) if packet.pts is not None]
                    ticks = np.array([packet.pts for packet in packets if not packet.is_corrupt], np.int64)
                times = np.sort(ticks) * float(stream.time_base)
                rate, size = float(stream.average_rate or self.rate), (stream.height, stream.width)
        except (av.FFmpegError, IndexError) as error:
            missing = isinstance(error, FileNotFoundError)
            kind = "missing file" if missing else "truncated video"
            text = "there is no such file" if missing else f"none can be opened in it ({error})"
            for episode in episodes:
                self.findings.add(kind, path, f"expected the episode's video, {text}", episode)
            return None
        if abs(rate / self.rate - 1) > RATE_SHARE:
            text = f"expected {self.rate:.6g} pictures per second, as the rows have them, came {rate:.6g}"
            for episode in episodes:
                self.findings.add("video rate", path, text, episode)
        for episode in episodes:
            self._check_size(path, size, episode)
        return times, cut_from

    def _rows_with_frames(
        self, path: Path, episode: int, seconds: np.ndarray, times: np.ndarray, cut_from: float
    ) -> np.ndarray:
        """Return the rows of an episode that the video has a frame for; none of an episode where the file ends."""
        times = np.concatenate([[-np.inf], times, [np.inf]])
        after = np.searchsorted(times[1:-1], seconds) + 1
        before, behind = times[after - 1], times[after]
        nearest = np.where(seconds - before < behind - seconds, before, behind)
        lacks = ~(np.abs(nearest - seconds) <= schema.TOLERANCE_S)
        if not lacks.any():
            return np.arange(len(seconds))
        count, row, kind = lacks.sum(), lacks.argmax(), "missing frames"
        came = f"came the nearest at {nearest[row]:.6f} s"
        if (seconds[lacks] > cut_from - schema.TOLERANCE_S).all():
            kind, came = "truncated video", "but the file ends before it"
            lacks[:] = True  # decoders stumble over the frame that is cut, and the ones before it
        elif (seconds[lacks] > times[-2]).all():
            kind, came = "short video", f"came the last one at {times[-2]:.6f} s"
        text = (
            f"{count} of the episode's {len(seconds)} rows have no frame within {schema.TOLERANCE_S} s: "
            f"expected one at {seconds[row]:.6f} s, {came}"
        )
        self.findings.add(kind, path, text, episode, self.found.of(episode, FRAME)[row])
        return np.flatnonzero(~lacks)

    def _look(self, path: Path, episode: int, rows: np.ndarray, read: Callable[[int], np.ndarray]) -> None:
        """Look at some pictures of an episode; at more where those are alike."""
        frames, seen = self.found.of(episode, FRAME), {}
        for count in (SAMPLED, SAMPLED_AGAIN):
            places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
            for row in rows[places].tolist():
                if row in seen:
                    continue
                try:
                    picture = read(row)
                except (ValueError, OSError) as error:
                    text = str(error).removeprefix(f"{path}: ")
                    self.findings.add("undecodable picture", path, text, episode, frames[row], self.key)
                    return
                self._check_size(path, picture.shape[:2], episode)
                seen[row] = block_means(picture)
                if np.ptp(seen[row], axis=(0, 1)).max() <= BLANK:
                    text = f"expected a picture, came a single colour, {seen[row].mean((0, 1)).round()} in RGB"
                    self.findings.add("blank picture", path, text, episode, frames[row], self.key)
                    return
            first, *others = seen.values()
            same = all(each.shape == first.shape and np.abs(each - first).max() <= ALIKE for each in others)
            if episode not in self.found.moving or not others or not same:
                return
        text = f"{len(seen)} pictures spread over the episode are alike, while its actions change"
        self.findings.add("frozen camera", path, text, episode, frames[rows[0]], self.key)

    def _check_size(self, path: Path, size: tuple[int, int], episode: int) -> None:
        shape = self.shape
        if len(shape) == 3 and size not in (shape[:2], shape[1:]):  # channels come last, or first
            text = f"expected pictures of shape {list(shape)}, as in meta/info.json, came {size[0]} x {size[1]}"
            self.findings.add("picture size", path, text, episode, subject=self.key)


def block_means(picture: np.ndarray) -> np.ndarray:
    """Return the means of blocks of pixels, `(rows, columns, 3)`; what is left at the edges is left out."""
    height, width = (min(BLOCK, side) for side in picture.shape[:2])
    rows, columns = picture.shape[0] // height, picture.shape[1] // width
    picture = picture[: rows * height, : columns * width].astype(np.float32)
    return picture.reshape(rows, height, columns, width, -1).mean((1, 3))


def _video_frame(reader: VideoFrames, path: Path, seconds: np.ndarray, row: int) -> np.ndarray:
    return reader.read(path, [float(seconds[row])])[0]
