from fractions import Fraction

import av
import numpy as np
import pytest

from hf_vla.data.video import VideoFrames

FPS, FRAMES = 30, 90


def shade(frame):
    """The picture of a frame carries its number in eight columns of black and white."""
    bits = [(frame >> place) & 1 for place in range(8)]
    return np.repeat(np.repeat(np.array(bits, np.uint8)[None, :, None] * 255, 8, 1), 64, 0).repeat(3, 2)


def number(picture):
    return sum(int(picture[32, 8 * place + 4].mean() > 127) << place for place in range(8))


@pytest.fixture(scope="module", params=[("libsvtav1", "2"), ("libsvtav1", "30"), ("libx264", "30")], ids="-g".join)
def video(request, tmp_path_factory):
    codec, interval = request.param
    path = tmp_path_factory.mktemp("video") / "frames.mp4"
    options = {"g": interval, "crf": "30", "preset": "8"} if codec == "libsvtav1" else {"g": interval, "bf": "3"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 64, 64, "yuv420p", Fraction(1, FPS)
        for frame in range(FRAMES):
            picture = av.VideoFrame.from_ndarray(shade(frame), format="rgb24")
            picture.pts, picture.time_base = frame, Fraction(1, FPS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


ORDERS = {
    "forward": range(FRAMES),
    "backward": range(FRAMES - 1, -1, -1),
    "stride": range(0, FRAMES, 7),
    "random": np.random.default_rng(0).integers(0, FRAMES, 200),
    "same": [41, 41, 41],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_every_order_gives_the_frames_asked_for(video, order):
    frames = VideoFrames()
    assert [number(frames.read(video, [frame / FPS])[0]) for frame in order] == [*order]


def test_a_window_keeps_its_order_and_its_repetitions(video):
    wanted = [12, 3, 3, 89, 0, 12]
    pictures = VideoFrames().read(video, [frame / FPS for frame in wanted])
    assert (pictures.shape, pictures.dtype) == ((6, 64, 64, 3), np.uint8)
    assert [number(picture) for picture in pictures] == wanted


def test_reading_on_decodes_no_frame_twice(video, monkeypatch):
    seeks = []
    frames = VideoFrames()
    frames.read(video, [0.0])
    opened = frames._open[video]
    monkeypatch.setattr(opened, "_seek_is_shorter", lambda time, ask=opened._seek_is_shorter: seeks.append(ask(time)))
    for frame in range(FRAMES):
        frames.read(video, [frame / FPS])
    assert not any(seeks)


@pytest.mark.parametrize("frame", [10, FRAMES - 1])
def test_the_tolerance_is_a_tenth_of_a_millisecond(video, frame):
    frames = VideoFrames()
    for shift in (9e-5, -9e-5):
        assert number(frames.read(video, [frame / FPS + shift])[0]) == frame
    for shift in (1.1e-4, -1.1e-4):
        with pytest.raises(ValueError, match=rf"{video.name}: expected a frame within 0.0001 s of .* nearest are"):
            frames.read(video, [frame / FPS + shift])
    assert number(frames.read(video, [frame / FPS])[0]) == frame  # an error leaves the reader usable


def test_times_past_the_end_are_errors(video):
    with pytest.raises(ValueError, match="of 99.000000 s"):
        VideoFrames().read(video, [99.0])


def test_only_the_files_used_last_stay_open(video, tmp_path):
    frames = VideoFrames(max_open=2)
    paths = [tmp_path / f"{copy}.mp4" for copy in range(3)]
    for path in paths:
        path.write_bytes(video.read_bytes())
    for path in (paths[0], paths[1], paths[0], paths[2]):
        frames.read(path, [1.0])
    assert [*frames._open] == [paths[0], paths[2]]


def test_files_that_hold_no_video_are_errors_that_name_them(video, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.mp4: no such file"):
        VideoFrames().read(tmp_path / "none.mp4", [0.0])
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video" * 100)
    with pytest.raises(ValueError, match="broken.mp4: no video in it"):
        VideoFrames().read(broken, [0.0])
    content = bytearray(video.read_bytes())
    start = content.index(b"mdat") + 4
    content[start : start + 4000] = bytes(4000)
    broken.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken.mp4: (cannot be decoded|expected a frame within|no video in it)"):
        VideoFrames().read(broken, [0.0])
