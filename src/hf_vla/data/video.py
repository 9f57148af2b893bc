"""Frames of video files by their time, with decoders that are kept where they stopped."""

import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from torch.utils.data import get_worker_info

from hf_vla.data.schema import TOLERANCE_S

# Frames that may lie before the next key frame and still be decoded on the way to it, rather than sought over.
SEEK_COST_FRAMES = 2
# Places per file that decoders left lately; a reader that comes back to one of them gets a decoder of its own.
REMEMBERED_PLACES = 32


class VideoFrames:
    """Reads single frames; decoders stay open where they stopped, because what costs time is decoding key frames.

    Several readers that each go forward, such as the two ends of a window over time, or windows read side by side, get
    a decoder each: a reader shows itself by going on, twice, where a decoder was taken away from it. Frames read at
    random share one decoder per file.

    A decoder cannot be shared between processes, neither by pickling nor by forking: every process opens its own. An
    object of this class serves one thread at a time.

    PyAV reads also where torchcodec imports. Both decode with FFmpeg, so that costs the same: of 128 x 128 AV1, in CPU
    ms for PyAV and torchcodec 0.13, a frame at random 0.60 and 0.58, two in a row at random 0.95 and 0.90, in order
    0.32 and 0.32, in 16 windows side by side 0.36 and 0.59 (`scripts/benchmark_data.py`: its decoder keeps one place).
    Tried in here for the frames at random alone, with the checks that takes and a second decoder, it was 3 to 4 %
    slower (480 x 640: 2 %, h264: the same). Its frames are these bit for bit, but it takes full range for limited in
    some sizes, rounds ten bits otherwise, and unless it reads all of a file first finds neighbours in HEVC's open
    groups.

    Args:
        max_open (`int`, defaults to 32): decoders, each with its file, kept open at once; one takes about 1 MB.
        open_file (`Callable[[str or Path], BinaryIO]`, *optional*): opens a path that is no local file, for reading
            and seeking.
    """

    def __init__(self, max_open: int = 32, open_file: Callable[[str | Path], BinaryIO] | None = None):
        self.max_open = max_open
        self.open_file = open_file
        self._forget()

    def read(self, path: str | Path, seconds: list[float]) -> np.ndarray:
        """Decode the frames at these times.

        Args:
            path (`str` or `Path`): the file.
            seconds (`list[float]`): times on the file's own clock, in any order.

        Returns:
            `np.ndarray` of shape `(len(seconds), height, width, 3)`, uint8, RGB.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no frame lies within 1e-4 s of a time, or the file cannot be decoded.
        """
        if self._process != os.getpid():
            self._forget()
        times = sorted(set(seconds))
        try:
            pictures = {time: self._decoder(path, time).picture(time, len(times)) for time in times}
        except av.FFmpegError as error:
            self._close(path)
            raise ValueError(f"{path}: cannot be decoded ({error}); is the file complete?") from error
        except _NoFrameError as error:
            raise ValueError(f"{path}: {error}") from error
        except OSError:  # of a remote file
            self._close(path)
            raise
        return np.stack([pictures[time] for time in seconds])

    def _decoder(self, path: str | Path, seconds: float) -> "_Decoder":
        decoders = self._decoders[path] if path in self._decoders else [self._open(path)]
        target, key = decoders[0].target(seconds)
        # Places from which the target is reached by decoding on, at no more cost than from the key frame before it.
        near = range(max(key - SEEK_COST_FRAMES, 0), target + 1)
        reaching = [decoder for decoder in decoders if decoder.place in near and not decoder.is_past(seconds)]
        holding = [decoder for decoder in decoders if decoder.held(seconds) is not None]
        if holding or reaching:
            chosen = max(holding or reaching, key=lambda decoder: decoder.place)
            if not holding and target - chosen.place > SEEK_COST_FRAMES:  # perhaps the place of another reader
                self._left[path].append((chosen.place, chosen.goes_on))
        else:
            went_on = [twice for place, twice in self._left[path] if place in near]
            chosen = self._open(path) if any(went_on) else self._taken_away(decoders)
            chosen.seek(seconds)
            chosen.goes_on = bool(went_on)
        chosen.used = next(self._clock)
        return chosen

    def _open(self, path: str | Path) -> "_Decoder":
        everywhere = [decoder for decoders in self._decoders.values() for decoder in decoders]
        if len(everywhere) >= self.max_open:
            oldest = self._taken_away(everywhere)
            oldest.close()
            self._decoders[oldest.path].remove(oldest)
            if not self._decoders[oldest.path]:
                del self._decoders[oldest.path], self._left[oldest.path]
        try:
            decoder = _Decoder(path, self.open_file)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path}: no such file; the dataset is incomplete.") from error
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"{path}: no video in it ({error}); is the file complete?") from error
        self._decoders.setdefault(path, []).append(decoder)
        return decoder

    def _taken_away(self, decoders: list["_Decoder"]) -> "_Decoder":
        oldest = min(decoders, key=lambda decoder: decoder.used)
        self._left[oldest.path].append((oldest.place, oldest.goes_on))
        return oldest

    def _close(self, path: str | Path):
        for decoder in self._decoders.pop(path, ()):
            decoder.close()

    def _forget(self):
        self._decoders: dict[str | Path, list[_Decoder]] = {}
        self._left: dict[str | Path, deque[tuple[int, bool]]] = defaultdict(lambda: deque(maxlen=REMEMBERED_PLACES))
        self._clock = count()
        self._process = os.getpid()

    def __getstate__(self):
        return {"max_open": self.max_open, "open_file": self.open_file}

    def __setstate__(self, state):
        self.__init__(**state)


class _NoFrameError(ValueError):
    pass


class _Decoder:
    """An open file and the frame that was decoded last; places are numbers in the file's index."""

    def __init__(self, path: str | Path, open_file: Callable[[str | Path], BinaryIO] | None):
        self.path = path
        self.file = open_file(path) if open_file else None
        self.container = av.open(self.file or str(path))
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1  # more threads cost more than they bring, and h264's can deadlock
        self.ticks_per_second = float(1 / self.stream.time_base)
        self.reformatter = VideoReformatter()  # one per file keeps its colour tables; eight times faster
        self.frames = self.current = None
        self.place = -1
        self.goes_on = False
        self.recent: dict[float, av.VideoFrame] = {}  # what the last window was made of: the next one overlaps it
        self.used = 0

    def target(self, seconds: float) -> tuple[int, int]:
        """Return the places of the frame at a time, and of the key frame before it."""
        time = self._ticks(seconds)
        index = self.stream.index_entries
        return index.search_timestamp(time, any_frame=True), index.search_timestamp(time)

    def seek(self, seconds: float):
        """Decode the key frame before a time; the one before that where the frame needs it (HEVC's open groups)."""
        self.recent.clear()
        time, index = self._ticks(seconds), self.stream.index_entries
        while True:
            self.container.seek(time, stream=self.stream)
            self.frames = self.container.decode(self.stream)
            self._advance()
            key = index.search_timestamp(time)
            if key <= 0 or not self.is_past(seconds):
                return
            time = index[key].timestamp - 1

    def picture(self, seconds: float, keep: int) -> np.ndarray:
        """Return the frame at a time, reached by decoding on; the last `keep` ones returned stay at hand."""
        frame = self.held(seconds) or self._reached(seconds)
        parts = frame.format.components
        if len(parts) == 1 and parts[0].bits > 8:  # depth, of which rgb24 keeps the upper bits
            raise _NoFrameError(f"expected pictures of 8 bits, came {frame.format.name}; leave it out of `cameras`")
        self.recent[frame.time] = frame
        while len(self.recent) > keep:
            del self.recent[next(iter(self.recent))]
        # One thread as well: a forked worker that frees a converter with threads waits for ever for threads it lacks.
        return self.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()

    def held(self, seconds: float) -> av.VideoFrame | None:
        """Return the frame at a time where it is at hand."""
        for time, frame in self.recent.items():
            if abs(time - seconds) <= TOLERANCE_S:
                return frame
        return None

    def is_past(self, seconds: float) -> bool:
        return self.current is None or self.current.time > seconds + TOLERANCE_S

    def _reached(self, seconds: float) -> av.VideoFrame:
        before = None
        while self.current is not None and self.current.time < seconds - TOLERANCE_S:
            before = self.current
            self._advance()
        if self.is_past(seconds):
            near = ", ".join(f"{frame.time:.6f} s" for frame in (before, self.current) if frame is not None)
            raise _NoFrameError(
                f"expected a frame within {TOLERANCE_S} s of {seconds:.6f} s, the nearest are {near or None}"
            )
        return self.current

    def _advance(self):
        self.current = next(self.frames, None)
        if self.current is None:
            self.place = -1
        else:
            self.place = self.stream.index_entries.search_timestamp(self.current.pts, any_frame=True)

    def _ticks(self, seconds: float) -> int:
        return math.floor((seconds + TOLERANCE_S) * self.ticks_per_second)

    def close(self):
        self.container.close()
        if self.file is not None:
            self.file.close()


def side_by_side(function: Callable, items: Iterable) -> list:
    """Apply a function to items, in threads at once; results in their order.

    Decoding lets other threads run, so two cameras take the time of one. In a `DataLoader`'s worker one follows the
    other: there the workers use the processors already.
    """
    items = list(items)
    if len(items) < 2 or (os.cpu_count() or 1) < 2 or get_worker_info() is not None:
        return [function(item) for item in items]
    futures = [_threads(os.getpid()).submit(function, item) for item in items[1:]]
    try:
        first = function(items[0])
    finally:
        for future in futures:
            future.exception()  # waits: none is left at work when another has failed
    return [first, *(future.result() for future in futures)]


@lru_cache(maxsize=1)  # of this process: a forked one has none of the threads
def _threads(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="hf_vla-decode")
