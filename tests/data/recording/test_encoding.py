import os
import subprocess
import sys
import threading
from fractions import Fraction

import av
import numpy as np
import pytest

from hf_vla.data.recording import encoding
from hf_vla.data.recording.encoding import PngEncoder, VideoEncoder, VideoOptions, concatenate
from hf_vla.data.video import VideoFrames

CODECS = [VideoOptions(), VideoOptions(g=30, preset=6, threads=1), VideoOptions("h264"), VideoOptions("hevc", g=30)]


def shade(number):
    return np.full((64, 64, 3), 10 + 7 * number, np.uint8)


def encode(path, numbers, fps, options):
    encoder = VideoEncoder(path, fps, (64, 64, 3), options)
    for number in numbers:
        encoder.add(shade(number))
    encoder.close()
    return path, len(numbers)


@pytest.mark.parametrize("options", CODECS, ids=lambda options: f"{options.vcodec}-g{options.g}")
@pytest.mark.parametrize(
    "fps", [Fraction(30), Fraction(5), Fraction("29.97"), Fraction("12.5"), Fraction(240)], ids=str
)
def test_joined_videos_keep_their_frames_and_their_clock(options, fps, tmp_path):
    lengths = (7, 1, 12)
    segments, first = [], 0
    for length in lengths:
        segments.append(encode(tmp_path / f"{first}.mp4", range(first, first + length), fps, options))
        first += length
    concatenate(segments[:2], tmp_path / "two.mp4", fps)
    concatenate([(tmp_path / "two.mp4", 8), segments[2]], tmp_path / "all.mp4", fps)
    with av.open(str(tmp_path / "all.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
        assert float(container.duration / av.time_base) == pytest.approx(float(first / fps), abs=2e-3)
    np.testing.assert_allclose(times, [float(number / fps) for number in range(first)], rtol=0, atol=1e-6)
    frames = VideoFrames().read(tmp_path / "all.mp4", [float(number / fps) for number in range(first)])
    assert [round((frame.mean() - 10) / 7) for frame in frames] == [*range(first)]


def test_a_truncated_segment_is_not_joined(tmp_path):
    path, length = encode(tmp_path / "part.mp4", range(5), Fraction(10), VideoOptions())
    with pytest.raises(OSError, match="expected a video of 6 frames, it has 5"):
        concatenate([(path, length + 1)], tmp_path / "whole.mp4", Fraction(10))


def test_sizes_are_tried_before_recording():
    VideoOptions().check(Fraction(10), 65, 97)
    with pytest.raises(ValueError, match="h264 does not encode pictures of 65 x 97 .* even sizes"):
        VideoOptions("h264").check(Fraction(10), 65, 97)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vcodec": "vp9"}, r"\['h264', 'hevc', 'libsvtav1'\], came 'vp9'"),
        ({"vcodec": "h264", "preset": 8}, "leave it out"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        VideoOptions(**options)


@pytest.mark.parametrize("size", [(40, 60), (310, 460)])
def test_statistics_are_numpys(size):
    pictures = np.random.default_rng(0).integers(3, 250, (6, *size, 3)).astype(np.uint8)
    encoder = PngEncoder()
    files = [encoder.add(picture) for picture in pictures]
    encoder.close()
    assert all(file.result().startswith(b"\x89PNG") for file in files)
    step = max(1, size[0] // 150)
    values, statistics = pictures[:, ::step, ::step].reshape(-1, 3) / 255, encoder.statistics()
    assert statistics.pop("count").tolist() == [6]
    for name, got in statistics.items():
        if name.startswith("q"):
            wanted = np.quantile(values, int(name[1:]) / 100, axis=0, method="inverted_cdf")
        else:
            wanted = getattr(np, name)(values, axis=0)
        np.testing.assert_allclose(got, wanted.reshape(3, 1, 1), atol=1e-12, err_msg=name)


def test_few_pictures_wait_and_what_fails_is_raised(monkeypatch):
    go_on, busy = threading.Event(), threading.Event()

    class Slow(PngEncoder):
        def _encode(self, picture):
            busy.set()
            go_on.wait(5)
            if picture[0, 0, 0] == 1:
                raise OSError("no space left")

    monkeypatch.setattr(encoding, "QUEUE", 3)
    encoder, taken = Slow(), []

    def feed():
        for number in range(6):
            encoder.add(np.full((2, 2, 3), number == 5, np.uint8))
            taken.append(number)

    feeder = threading.Thread(target=feed)
    feeder.start()
    busy.wait()
    feeder.join(0.2)
    assert taken == [0, 1, 2]  # the fourth waits
    go_on.set()
    feeder.join()
    with pytest.raises(OSError, match="no space left"):
        encoder.close()
    encoder.discard()


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="this system has no such priorities")
def test_encoding_leaves_the_process_its_priority(tmp_path):
    script = """
import os, sys
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
import numpy as np
from hf_vla.data.recording.encoding import VideoEncoder, VideoOptions

for size in (64, 2):
    with suppress(ValueError):  # 2 x 2 is too small
        VideoOptions().check(Fraction(30), size, size)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
encoder = VideoEncoder(Path(sys.argv[1]), Fraction(30), (64, 64, 3), VideoOptions())
encoder.add(np.zeros((64, 64, 3), np.uint8)).result()
encoder.add(np.zeros((64, 64, 3), np.uint8)).result()
policies = {os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")}
encoder.close()
policies.add(os.sched_getscheduler(0))
assert policies == {os.SCHED_OTHER}, policies
with suppress(PermissionError):  # root's control loop
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    VideoOptions().check(Fraction(30), 64, 64)
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == (os.SCHED_FIFO, 50)
"""
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "video.mp4"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
