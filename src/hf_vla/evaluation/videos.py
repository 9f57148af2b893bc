"""Videos of episodes, and pictures that move."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from hf_vla.data.recording.encoding import VideoEncoder, VideoOptions

GIF_FPS = 20  # at most: viewers show no more
OFF = 6  # levels of 255 by which a picture in another one's colours may be off


def write_video(pictures: Iterable[np.ndarray], path: Path, fps: float) -> None:
    """Write pictures that are there already; see [`Film`]."""
    film = Film(path, fps)
    try:
        for picture in pictures:
            film.add(picture)
        film.finish(path)
    except BaseException:
        film.discard()
        raise


class Film:
    """An mp4, or a GIF that repeats itself, made while its pictures come: a long episode fits into no memory.

    Args:
        path (`Path`): says by its suffix which of the two; the file is there when the film is finished.
        fps (`float`): pictures a second.
    """

    def __init__(self, path: Path, fps: float):
        self._aside, self._fps = path.with_name(f".{path.name}"), fps
        self._gif = _Gif(fps) if path.suffix == ".gif" else None
        self._encoder: VideoEncoder | None = None

    def add(self, picture: np.ndarray) -> None:
        """Take the next picture, `(H, W, 3)` uint8."""
        if self._gif is not None:
            self._gif.add(picture)
            return
        if self._encoder is None:
            rate, options = Fraction(self._fps).limit_denominator(1000), VideoOptions(g=30, threads=1)
            self._encoder = VideoEncoder(self._aside, rate, picture.shape, options)
        self._encoder.add(picture)

    def finish(self, path: Path) -> None:
        """Write the file, under the name that it has got meanwhile, in the same folder; there is never half of it."""
        if self._gif is not None:
            self._gif.save(self._aside)
        elif self._encoder is not None:
            self._encoder.close()
        self._aside.replace(path)

    def discard(self) -> None:
        """Stop; what was made is of no use."""
        if self._encoder is not None:
            self._encoder.discard()
        self._aside.unlink(missing_ok=True)


class _Gif:
    """Pictures thinned to what viewers show, in real time."""

    def __init__(self, fps):
        self._fps, self._step = fps, max(1, round(fps / GIF_FPS))
        self._frames, self._times = [], []  # the latter in pictures
        self._count, self._last = 0, None

    def add(self, picture):
        if self._count % self._step == 0:
            self._keep(picture, self._count)
        self._last = picture
        self._count += 1

    def _keep(self, picture, time):
        """Keep 256 colours of it: the first picture's, so that what stands still takes no bytes, if they do."""
        image = Image.fromarray(picture)
        for palette in (*self._frames[:1], None):
            frame = image.quantize(256, palette=palette, dither=Image.Dither.NONE)
            if abs(np.asarray(frame.convert("RGB"), np.int16) - picture).mean() <= OFF:
                break
        self._frames.append(frame)
        self._times.append(time)

    def save(self, path):
        if self._times[-1] < self._count - 1:
            self._keep(self._last, self._count - 1)  # how it ended
        ends = [*self._times, self._times[-1] + self._step]
        durations = 10 * np.diff(np.rint(100 * np.array(ends) / self._fps))  # in hundredths of a second, GIF's clock
        first, *others = self._frames
        first.save(path, save_all=True, append_images=others, duration=durations.astype(int).tolist(), loop=0)
