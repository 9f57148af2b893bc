"""Frames of video files by their time, with the files kept open."""

import os
from collections import OrderedDict
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from hf_vla.data.schema import TOLERANCE_S

# Frames that are decoded in the time that one seek takes: nearer targets are reached by decoding on.
SEEK_COST_FRAMES = 2


class VideoFrames:
    """Reads single frames; the files used last stay open, because opening one costs more than decoding a frame.

    A decoder cannot be shared between processes, neither by pickling nor by forking: every process opens its own.

    Args:
        max_open (`int`, defaults to 32): files kept open at once.
    """

    def __init__(self, max_open: int = 32):
        self.max_open = max_open
        self._open: OrderedDict[Path, _OpenVideo] = OrderedDict()
        self._process = os.getpid()

    def read(self, path: Path, seconds: list[float]) -> np.ndarray:
        """Decode the frames at these times.

        Args:
            path (`Path`): the file.
            seconds (`list[float]`): times on the file's own clock, in any order.

        Returns:
            `np.ndarray` of shape `(len(seconds), height, width, 3)`, uint8, RGB.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no frame lies within 1e-4 s of a time, or the file cannot be decoded.
        """
        video = self._video(path)
        try:
            frames = {time: video.frame(time) for time in sorted(set(seconds))}
        except av.FFmpegError as error:
            self._open.pop(path).close()
            raise ValueError(f"{path}: cannot be decoded ({error}); is the file complete?") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return np.stack([frames[time] for time in seconds])

    def _video(self, path: Path) -> "_OpenVideo":
        if self._process != os.getpid():
            self._open.clear()
            self._process = os.getpid()
        if path not in self._open:
            try:
                self._open[path] = _OpenVideo(path)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{path}: no such file; the dataset is incomplete.") from error
            except (av.FFmpegError, IndexError) as error:
                raise ValueError(f"{path}: no video in it ({error}); is the file complete?") from error
            if len(self._open) > self.max_open:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        return self._open[path]

    def __getstate__(self):
        return {"max_open": self.max_open}

    def __setstate__(self, state):
        self.__init__(**state)


class _OpenVideo:
    def __init__(self, path: Path):
        self.container = av.open(str(path))
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1  # more threads cost more than they bring, and h264's can deadlock
        self.reformatter = VideoReformatter()  # one per file keeps its colour tables; eight times faster
        self.frames = self.current = None

    def frame(self, seconds: float) -> np.ndarray:
        if self.current is None or self._seek_is_shorter(seconds):
            self.container.seek(round(seconds / float(self.stream.time_base)), stream=self.stream)
            self.frames = self.container.decode(self.stream)
            self.current = next(self.frames, None)
        before = None
        while self.current is not None and self.current.time < seconds - TOLERANCE_S:
            before, self.current = self.current, next(self.frames, None)
        if self.current is None or self.current.time > seconds + TOLERANCE_S:
            near = ", ".join(f"{frame.time:.6f} s" for frame in (before, self.current) if frame is not None)
            raise ValueError(
                f"expected a frame within {TOLERANCE_S} s of {seconds:.6f} s, the nearest are {near or None}"
            )
        # One thread as well: a forked worker that frees a converter with threads waits for ever for threads it lacks.
        return self.reformatter.reformat(self.current, format="rgb24", threads=1).to_ndarray()

    def _seek_is_shorter(self, seconds: float) -> bool:
        if seconds < self.current.time - TOLERANCE_S:
            return True
        index, target = self.stream.index_entries, round(seconds / float(self.stream.time_base))
        here = index.search_timestamp(self.current.pts, any_frame=True)
        there = index.search_timestamp(target, any_frame=True)
        return there - here > there - index.search_timestamp(target) + SEEK_COST_FRAMES

    def close(self):
        self.container.close()
