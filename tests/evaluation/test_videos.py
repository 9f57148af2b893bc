import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from hf_vla.evaluation.videos import Film, write_video

SHADES = np.linspace(0, 255, 24).astype(np.uint8)
PICTURES = [np.full((32, 48, 3), shade, np.uint8) for shade in SHADES]


@pytest.mark.parametrize("fps", [5.0, 12.5, 30.0, 80.0])
def test_a_gif_takes_as_long_as_the_episode(fps, tmp_path):
    write_video(PICTURES, tmp_path / "film.gif", fps)
    with Image.open(tmp_path / "film.gif") as image:
        frames = [
            (frame.info["duration"], np.asarray(frame.convert("RGB"))) for frame in ImageSequence.Iterator(image)
        ]
    durations = [duration for duration, _ in frames]
    assert all(40 <= duration <= 1000 / min(fps, 20) + 20 for duration in durations[:-2])
    until_last = (len(PICTURES) - 1) / fps * 1000
    assert sum(durations[:-1]) == pytest.approx(until_last, abs=10)
    assert abs(frames[0][1].astype(int) - PICTURES[0]).max() < 4
    assert abs(frames[-1][1].astype(int) - PICTURES[-1]).max() < 4, "it does not show how it ended"


def test_a_video_has_every_picture(tmp_path):
    film = Film(tmp_path / "going.mp4", 80.0)
    for picture in PICTURES:
        film.add(picture)
    film.finish(tmp_path / "success.mp4")
    assert [file.name for file in tmp_path.iterdir()] == ["success.mp4"]
    with av.open(str(tmp_path / "success.mp4")) as container:
        seen = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 80
    np.testing.assert_allclose(seen, SHADES, atol=8)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_nothing_stays_of_a_film_that_is_discarded(suffix, tmp_path):
    film = Film(tmp_path / f"film{suffix}", 20.0)
    for picture in PICTURES:
        film.add(picture)
    film.discard()
    assert not [*tmp_path.iterdir()]

    def interrupted():
        yield from PICTURES
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(interrupted(), tmp_path / f"film{suffix}", 20.0)
    assert not [*tmp_path.iterdir()]
