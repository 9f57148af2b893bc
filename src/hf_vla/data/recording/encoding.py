"""Pictures encoded while they are recorded: as the segment of a video, or one by one as PNG."""

import io
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from hf_vla.actions.statistics import QUANTILES

# The names that `meta/info.json` has for what the encoders make.
CODECS = {"libsvtav1": "av1", "h264": "h264", "hevc": "hevc"}
QUEUE = 30  # pictures of a camera that wait for its encoder, at most; then the recording waits
THREADS = "/proc/self/task"
SVT_PRIORITY = (1, 99)  # first in, first out, before all else
_STATISTICS_SIZE = 150  # pictures are thinned to about this many pixels a side before they are counted, as LeRobot's


@dataclass(frozen=True)
class VideoOptions:
    """How videos are encoded.

    Args:
        vcodec (`str`, defaults to `"libsvtav1"`): "libsvtav1" (AV1), "h264" or "hevc".
        pix_fmt (`str`, defaults to `"yuv420p"`): the pixels' format.
        g (`int`, defaults to 2): frames from one key frame to the next; few make random access fast.
        crf (`int`, defaults to 30): quality; less is better and larger.
        preset (`int`, *optional*): SVT-AV1's speed; 8 by default. LeRobot takes 12, but from 10 on the encoder loses
            small changes between frames of flat pictures.
        threads (`int`, *optional*): of each encoder; the codec's own choice by default.
    """

    vcodec: str = "libsvtav1"
    pix_fmt: str = "yuv420p"
    g: int = 2
    crf: int = 30
    preset: int | None = None
    threads: int | None = None

    def __post_init__(self):
        if self.vcodec not in CODECS:
            raise ValueError(f"Expected a vcodec of {sorted(CODECS)}, came {self.vcodec!r}.")
        if self.preset is not None and self.vcodec != "libsvtav1":
            raise ValueError(f"preset={self.preset} is a speed of libsvtav1; {self.vcodec} has none, leave it out.")

    def add_stream(self, container, fps: Fraction, height: int, width: int):
        """Add a video stream to a container that is being written."""
        options = {"g": str(self.g), "crf": str(self.crf)}
        if self.vcodec == "libsvtav1":
            os.environ.setdefault("SVT_LOG", "1")  # errors alone: the encoder greets every file on stderr
            options["preset"] = str(8 if self.preset is None else self.preset)
            options |= {"svtav1-params": f"lp={self.threads}"} if self.threads else {}
        else:
            options |= {"threads": str(self.threads)} if self.threads else {}
            options |= {"x265-params": "log-level=error"} if self.vcodec == "hevc" else {}
            options["bf"] = "0"  # frames in the order they are shown: segments join without gaps in their clock
        stream = container.add_stream(self.vcodec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, self.pix_fmt
        return stream

    def check(self, fps: Fraction, height: int, width: int) -> None:
        """Encode one black frame.

        Raises:
            ValueError: the encoder does not take pictures of this size.
        """
        try:
            with usual_priority(), av.open(io.BytesIO(), "w", format="mp4") as container:
                stream = self.add_stream(container, fps, height, width)
                container.mux(stream.encode(_frame(np.zeros((height, width, 3), np.uint8), 0, fps)))
                container.mux(stream.encode())
        except (av.FFmpegError, ValueError) as error:
            raise ValueError(
                f"{self.vcodec} does not encode pictures of {height} x {width} in {self.pix_fmt} at {fps} per second "
                f"({error}). h264 and hevc need even sizes, libsvtav1 takes odd ones; dtype 'image' takes any."
            ) from error


class PictureEncoder(ABC):
    """Encodes the pictures of one camera on a thread of its own, and counts their values.

    At most `QUEUE` pictures wait; after that `add` waits as well. What goes wrong on the thread is raised by `add` or
    `close`.
    """

    def __init__(self):
        self._worker = ThreadPoolExecutor(1, thread_name_prefix=type(self).__name__)
        self._pending: deque[Future] = deque()
        self._histogram = np.zeros((3, 256), np.int64)
        self._length = 0

    def add(self, picture: np.ndarray) -> Future:
        """Take a picture `(height, width, 3)`, uint8; it is copied. Returns what will be its bytes, if it has some."""
        while self._pending and (len(self._pending) >= QUEUE or self._pending[0].done()):
            self._pending.popleft().result()
        self._pending.append(self._worker.submit(self._work, picture.copy()))
        return self._pending[-1]

    def close(self) -> None:
        """Wait for the pictures that were taken and finish the file."""
        while self._pending:
            self._pending.popleft().result()
        self._worker.submit(self._finish).result()
        self._worker.shutdown()

    def discard(self) -> None:
        """Stop, whatever happened before; what was written is of no use."""
        self._worker.shutdown(cancel_futures=True)

    def statistics(self) -> dict[str, np.ndarray]:
        """Return LeRobot's statistics of the pictures in [0, 1], each `(3, 1, 1)`, and "count" (their number)."""
        levels, total = np.arange(256) / 255, self._histogram[0].sum()
        cumulated = self._histogram.cumsum(axis=1)
        mean = self._histogram @ levels / total
        values = {
            "min": levels[(self._histogram > 0).argmax(axis=1)],
            "max": levels[255 - (self._histogram[:, ::-1] > 0).argmax(axis=1)],
            "mean": mean,
            "std": np.sqrt(np.maximum(self._histogram @ levels**2 / total - mean**2, 0.0)),
            "count": np.array([self._length]),
        }
        for name, rank in QUANTILES.items():
            values[name] = levels[[np.searchsorted(channel, rank * total) for channel in cumulated]]
        return {name: value if name == "count" else value.reshape(3, 1, 1) for name, value in values.items()}

    def _work(self, picture):
        height, width = picture.shape[:2]
        step = max(1, min(height, width) // _STATISTICS_SIZE)
        for counts, channel in zip(self._histogram, picture[::step, ::step].reshape(-1, 3).T, strict=True):
            counts += np.bincount(channel, minlength=256)
        encoded = self._encode(picture)
        self._length += 1
        return encoded

    @abstractmethod
    def _encode(self, picture): ...

    @abstractmethod
    def _finish(self): ...


class PngEncoder(PictureEncoder):
    """Makes a PNG of every picture."""

    def _encode(self, picture):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        return buffer.getvalue()

    def _finish(self):
        pass  # every picture is whole


class VideoEncoder(PictureEncoder):
    """Makes a video of the pictures.

    Args:
        path (`Path`): the file.
        fps (`Fraction`): pictures per second.
        shape (`Sequence[int]`): of a picture, `(height, width, 3)`.
        options (`VideoOptions`): how they are encoded.
    """

    def __init__(self, path: Path, fps: Fraction, shape, options: VideoOptions):
        super().__init__()
        self.path, self.fps = path, fps
        self._container = av.open(str(path), "w")
        self._stream = options.add_stream(self._container, fps, *shape[:2])

    def discard(self) -> None:
        """Stop, whatever happened before; what was written is of no use."""
        super().discard()
        try:
            self._finish()  # an encoder that is not asked for its last packets complains
        except (OSError, ValueError):
            pass  # the disk is full, or the file was finished before

    def _encode(self, picture):
        frame = _frame(picture, self._length, self.fps)
        if self._length > 0:
            self._container.mux(self._stream.encode(frame))
            return
        with usual_priority():  # the first frame starts the encoder
            self._container.mux(self._stream.encode(frame))

    def _finish(self):
        if self._container is not None:
            container, stream = self._container, self._stream
            self._container = self._stream = None  # the encoder's memory, tens of MB, goes with them
            try:
                container.mux(stream.encode())
            finally:
                container.close()


@contextmanager
def usual_priority() -> Iterator[None]:
    """Undo what SVT-AV1 does where root runs it, in a container for example: real-time priority.

    The encoder's many threads would leave nothing to whatever else the machine does, a simulator or a control loop.
    """
    priorities = _priorities()
    try:
        yield
    finally:
        for thread, priority in _priorities().items():
            # its own threads, and the one that started it, which may have been real-time in another way before
            policy, number = priorities.get(thread, (os.SCHED_OTHER, 0))
            if priority == SVT_PRIORITY:
                with suppress(ProcessLookupError):  # it has ended
                    os.sched_setscheduler(thread, policy, os.sched_param(number))


def _priorities() -> dict[int, tuple[int, int]]:
    """Thread of this process -> its policy and priority; {} on systems without."""
    found = {}
    for thread in map(int, os.listdir(THREADS) if os.path.isdir(THREADS) else ()):
        with suppress(ProcessLookupError):
            found[thread] = os.sched_getscheduler(thread), os.sched_getparam(thread).sched_priority
    return found


def concatenate(segments: list[tuple[Path, int]], path: Path, fps: Fraction) -> None:
    """Write videos of one encoder into one file, one after the other, without encoding anything anew.

    Frame n of the whole is shown at n / fps, exactly on the file's clock.

    Args:
        segments (`list` of `(Path, int)`): the files and their numbers of frames.
        path (`Path`): the file to write.
        fps (`Fraction`): frames per second.

    Raises:
        OSError: a file does not hold its number of frames.
    """
    with av.open(str(path), "w", options={"movflags": "faststart"}) as output:
        stream, first = None, 0
        for segment, length in segments:
            with av.open(str(segment)) as container:
                source = container.streams.video[0]
                if stream is None:
                    stream = output.add_stream_from_template(source, opaque=True)
                    stream.time_base = source.time_base
                offset, copied = round(first / fps / source.time_base), 0
                for packet in container.demux(source):
                    if packet.dts is None:
                        continue  # the end
                    packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, stream
                    output.mux(packet)
                    copied += 1
            if copied != length:
                raise OSError(f"{segment}: expected a video of {length} frames, it has {copied}.")
            first += length


def _frame(picture, number, fps):
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    frame.pts, frame.time_base = number, 1 / fps
    return frame
