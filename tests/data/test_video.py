import io
import multiprocessing
import os
import pickle
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from hf_vla.data.recording.encoding import usual_priority
from hf_vla.data.video import VideoFrames, _Decoder, side_by_side

FPS, FRAMES = 30, 90
CODECS = [("libsvtav1", "2"), ("libsvtav1", "30"), ("libx264", "30"), ("libx265", "2"), ("libx265", "30")]
OPTIONS = {
    "libsvtav1": {"crf": "30", "preset": "8"},
    "libx264": {"bf": "3"},
    "libx265": {"x265-params": "log-level=none"},  # groups are open: frames before a key frame need the one before it
}


def shade(frame):
    """The picture of a frame carries its number in eight columns of black and white."""
    bits = [(frame >> place) & 1 for place in range(8)]
    return np.repeat(np.repeat(np.array(bits, np.uint8)[None, :, None] * 255, 8, 1), 64, 0).repeat(3, 2)


def number(picture):
    return sum(int(picture[32, 8 * place + 4].mean() > 127) << place for place in range(8))


@pytest.fixture(scope="module", params=CODECS, ids="-g".join)
def video(request, tmp_path_factory):
    codec, interval = request.param
    path = tmp_path_factory.mktemp("video") / "frames.mp4"
    with usual_priority(), av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={"g": interval, **OPTIONS[codec]})
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


@pytest.fixture
def work(monkeypatch):
    """Count what the decoders do."""
    done = {"seek": 0, "_advance": 0}

    def count(name, original):
        def counted(self, *args):
            done[name] += 1
            return original(self, *args)

        monkeypatch.setattr(_Decoder, name, counted)

    for name in done:
        count(name, getattr(_Decoder, name))
    return done


def test_reading_on_decodes_no_frame_twice(video, work):
    frames = VideoFrames()
    for frame in range(FRAMES):
        frames.read(video, [frame / FPS])
    assert work == {"seek": 1, "_advance": FRAMES}


def test_windows_that_overlap_decode_no_frame_twice(video, work):
    frames = VideoFrames()
    for frame in range(3, FRAMES):
        wanted = [*range(frame - 3, frame + 1)]
        pictures = frames.read(video, [frame / FPS for frame in wanted])
        assert [number(picture) for picture in pictures] == wanted
    assert work == {"seek": 1, "_advance": FRAMES}


def test_readers_that_each_go_forward_get_a_decoder_each(video, work):
    frames, starts = VideoFrames(), (0, 12, 31, 50, 69)
    for step in range(20):
        for start in starts:
            assert number(frames.read(video, [(start + step) / FPS])[0]) == start + step
    assert work["seek"] <= 3 * len(starts)
    assert work["_advance"] <= 20 * len(starts) + 3 * 30 * len(starts)  # and from the key frame before, thrice at most
    assert len(frames._decoders[video]) <= len(starts) + 1


def test_the_two_ends_of_a_window_do_not_seek(video, work):
    frames = VideoFrames()
    for frame in range(40, FRAMES):
        pictures = frames.read(video, [(frame - 40) / FPS, frame / FPS])
        assert [number(picture) for picture in pictures] == [frame - 40, frame]
    assert work["seek"] <= 6


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """More frames, and more bytes, than a decoder keeps at hand."""
    path, generator = tmp_path_factory.mktemp("video") / "long.mp4", np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "2"})
        stream.width = stream.height = 32
        for _ in range(2000):
            noise = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_frames_at_random_share_a_decoder(long_video):
    frames = VideoFrames()
    for frame in np.random.default_rng(0).integers(0, 2000, 500):
        frames.read(long_video, [frame / FPS])
    assert len(frames._decoders[long_video]) <= 4


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


def open_files(folder):
    """The names of the files in a folder that this process holds open."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sorted(target.name for link in links if link.is_symlink() and (target := link.readlink()).parent == folder)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to see which files are open")
def test_only_the_files_used_last_stay_open(video, tmp_path):
    frames = VideoFrames(max_open=2)
    paths = [tmp_path / f"{copy}.mp4" for copy in range(3)]
    for path in paths:
        path.write_bytes(video.read_bytes())
    for path in (paths[0], paths[1], paths[0], paths[2]):
        frames.read(path, [1.0])
    assert open_files(tmp_path) == ["0.mp4", "2.mp4"]


def test_many_readers_of_few_decoders_are_right_and_bounded(video, tmp_path):
    frames = VideoFrames(max_open=3)
    paths = [tmp_path / f"{copy}.mp4" for copy in range(3)]
    for path in paths:
        path.write_bytes(video.read_bytes())
    for step in range(10):
        for start in (0, 30, 60):
            for path in paths:
                assert number(frames.read(path, [(start + step) / FPS])[0]) == start + step
                assert sum(map(len, frames._decoders.values())) <= 3


class Flaky(io.BytesIO):
    broken = False

    def read(self, size=-1):
        if Flaky.broken:
            raise OSError("the line is dead")
        return super().read(size)


def test_files_elsewhere_are_opened_by_the_caller(long_video, monkeypatch):
    opened = []

    def open_file(path):
        assert path == "far/away.mp4"
        opened.append(Flaky(long_video.read_bytes()))
        return opened[-1]

    frames, here = VideoFrames(open_file=open_file), VideoFrames()
    for seconds in ([3 / FPS], [1900 / FPS], [4 / FPS], [1000 / FPS, 2 / FPS]):
        np.testing.assert_array_equal(frames.read("far/away.mp4", seconds), here.read(long_video, seconds))
    assert len(opened) == 1
    monkeypatch.setattr(Flaky, "broken", True)
    with pytest.raises(OSError, match="the line is dead"):
        frames.read("far/away.mp4", [500 / FPS])
    assert opened[0].closed
    monkeypatch.setattr(Flaky, "broken", False)
    assert frames.read("far/away.mp4", [500 / FPS]).shape == (1, 32, 32, 3)  # opened anew
    assert len(opened) == 2


def read_and_compare(frames, path, wanted, expected, seed):
    for place in np.random.default_rng(seed).permutation(len(wanted)):
        np.testing.assert_array_equal(frames.read(path, [wanted[place]])[0], expected[place])


def test_forked_processes_open_their_own(long_video):
    wanted = [frame / FPS for frame in range(0, 2000, 9)]
    frames, expected = VideoFrames(), VideoFrames().read(long_video, wanted)
    frames.read(long_video, [0.5])  # with one file for all of them, each would move the others' place in it
    context = multiprocessing.get_context("fork")
    common = (frames, long_video, wanted, expected)
    processes = [context.Process(target=read_and_compare, args=(*common, seed)) for seed in range(2)]
    for process in processes:
        process.start()
    read_and_compare(*common, 2)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_copy_for_another_process_opens_its_own(video):
    frames = VideoFrames(max_open=5, open_file=open_for_reading)
    frames.read(video, [0.5])
    copied = pickle.loads(pickle.dumps(frames))
    assert (copied.max_open, copied.open_file) == (5, open_for_reading)
    assert [number(picture) for picture in copied.read(video, [1.0, 2.0])] == [30, 60]


def open_for_reading(path):
    return io.BytesIO(path.read_bytes())


@pytest.fixture(scope="module")
def torchcodec():
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"torchcodec does not import here: {str(error).splitlines()[0]}")
    return VideoDecoder


def test_frames_are_torchcodecs_bit_for_bit(video, torchcodec):
    order = np.random.default_rng(1).integers(0, FRAMES, 60).tolist()
    theirs = torchcodec(str(video), dimension_order="NHWC").get_frames_at(order).data.numpy()
    np.testing.assert_array_equal(VideoFrames().read(video, [frame / FPS for frame in order]), theirs)


def test_recorded_videos_are_torchcodecs_bit_for_bit(goldens, torchcodec):
    paths = sorted((goldens / "lerobot" / "datasets").glob("*/videos/**/*.mp4"))
    assert len(paths) > 5
    for path in paths:
        decoder = torchcodec(str(path), dimension_order="NHWC")
        frames = decoder.get_frames_at([*range(0, len(decoder), 7)])
        np.testing.assert_array_equal(VideoFrames().read(path, frames.pts_seconds.tolist()), frames.data.numpy())


@pytest.mark.parametrize("size", [64, 66])  # libraries convert them by different code
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
def test_colours_of_either_range_are_those_recorded(size, full, tmp_path):
    path, levels = tmp_path / "colours.mp4", np.linspace(0, 255, size).astype(np.uint8)
    recorded = np.stack([*np.meshgrid(levels, levels), np.full((size, size), 128, np.uint8)], -1)
    with usual_priority(), av.open(str(path), "w") as container:
        stream = container.add_stream("libsvtav1", rate=FPS, options={"crf": "5", "preset": "8"})
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        colours = {"color_range": 2 if full else 1, "colorspace": 5}
        frame = av.VideoFrame.from_ndarray(recorded, format="rgb24")
        frame = frame.reformat(format="yuv420p", **{f"dst_{key}": value for key, value in colours.items()})
        frame.pts, frame.time_base = 0, Fraction(1, FPS)
        for key, value in colours.items():
            setattr(frame, key, value)
            setattr(stream.codec_context, key, value)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (picture,) = VideoFrames().read(path, [0.0])
    assert np.abs(picture.astype(int) - recorded).mean() < 2  # the other range is off by 6


def thread_of(item):
    time.sleep(0.02)  # or one thread might do them all
    return item, threading.get_ident()


class ThreadsOfItems(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return side_by_side(thread_of, range(4))


def test_items_are_done_in_threads_and_in_order(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    met = threading.Barrier(2, timeout=30)  # passed by two threads only
    assert side_by_side(lambda item: (met.wait(), item)[1], range(2)) == [0, 1]
    done = []
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda item: (1 / item, time.sleep(0.1), done.append(item)), [0, 1])
    assert done == [1]  # none is left at work
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda item: 1 / item, [1, 0])


def test_in_a_worker_items_are_done_one_after_the_other(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    side_by_side(thread_of, range(4))  # the threads are there before the fork
    (done,) = DataLoader(ThreadsOfItems(), batch_size=None, num_workers=1)
    assert [item for item, _ in done] == [0, 1, 2, 3]
    assert len({thread for _, thread in done}) == 1


def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    side_by_side(thread_of, range(4))
    context = multiprocessing.get_context("fork")
    process = context.Process(target=side_by_side, args=(thread_of, range(4)))
    process.start()
    process.join(30)
    assert process.exitcode == 0


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
