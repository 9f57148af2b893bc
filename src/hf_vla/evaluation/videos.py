"""Videos of episodes, and pictures that move."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from hf_vla.data.recording.encoding import VideoEncoder, VideoOptions

GIF_FPS = 20  # what viewers show; frames between are left out


def write_video(pictures: Sequence[np.ndarray], path: Path, fps: float) -> None:
    """Write an mp4, or a GIF that repeats itself, as the file's name says.

    Args:
        pictures (`Sequence[np.ndarray]`): `(H, W, 3)` uint8.
        path (`Path`): the file; there is never half of it.
        fps (`float`): pictures a second.
    """
    aside = path.with_name(f".{path.name}{path.suffix}")
    if path.suffix == ".gif":
        frames = [Image.fromarray(picture) for picture in pictures[:: max(1, round(fps / GIF_FPS))]]
        frames[0].save(aside, save_all=True, append_images=frames[1:], duration=1000 // GIF_FPS, loop=0)
    else:
        rate = Fraction(fps).limit_denominator(1000)
        encoder = VideoEncoder(aside, rate, pictures[0].shape, VideoOptions(g=30, threads=1))
        try:
            for picture in pictures:
                encoder.add(picture)
            encoder.close()
        except BaseException:
            encoder.discard()
            raise
    aside.replace(path)
