import errno
import fcntl
import multiprocessing
import os
import pickle
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from hf_vla.data.cache import FrameCache
from hf_vla.data.lerobot import LeRobotEpisodes

SHAPE = (60, 80, 3)
SIZE = int(np.prod(SHAPE))
FORK = multiprocessing.get_context("fork")


def decode(path, seconds, seed=0, shape=SHAPE):
    """The picture of a time; each is another one."""
    generators = [np.random.default_rng([seed, round(second * 30)]) for second in seconds]
    return np.stack([generator.integers(0, 256, shape, dtype=np.uint8) for generator in generators])


def nothing_to_decode(path, seconds):
    raise AssertionError(f"{seconds} of {path} should be in the cache")


def times(*frames):
    return [frame / 30 for frame in frames]


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"a video")
    return path


@pytest.fixture
def cache(tmp_path):
    return FrameCache(tmp_path / "cache", 100 * SIZE)


def bytes_of_pictures(folder):
    return sum(path.stat().st_size for path in folder.glob("*.pictures"))


def run(function, *args):
    process = FORK.Process(target=function, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_what_was_decoded_is_kept(cache, video):
    wanted = times(5, 2, 2, 9)
    expected = decode(video, wanted)
    for source in (decode, nothing_to_decode):
        pictures = cache.read(video, wanted, source)
        assert (pictures.dtype, pictures.shape) == (np.uint8, (4, *SHAPE))
        np.testing.assert_array_equal(pictures, expected)
    assert bytes_of_pictures(cache.folder) == 3 * SIZE


def test_only_what_is_missing_is_decoded(cache, video):
    asked = []

    def noted(path, seconds):
        asked.append((path, seconds))
        return decode(path, seconds)

    cache.read(video, times(1, 2), decode)
    np.testing.assert_array_equal(cache.read(video, times(3, 2, 4), noted), decode(video, times(3, 2, 4)))
    assert asked == [(video, times(3, 4))]


def test_pictures_given_out_are_the_callers_own(cache, video):
    cache.read(video, times(1), decode)[:] = 0
    cache.read(video, times(1), nothing_to_decode)[:] = 0
    np.testing.assert_array_equal(cache.read(video, times(1), nothing_to_decode), decode(video, times(1)))


def test_videos_are_kept_apart(cache, tmp_path):
    paths = [tmp_path / f"{name}.mp4" for name in range(3)]
    for seed, path in enumerate(paths):
        cache.read(path, times(1), partial(decode, seed=seed, shape=(20 + seed, 30, 3)))
    for seed, path in enumerate(paths):
        expected = decode(path, times(1), seed, (20 + seed, 30, 3))
        np.testing.assert_array_equal(cache.read(path, times(1), nothing_to_decode), expected)


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_video_that_changed_is_decoded_anew(cache, video, change):
    cache.read(video, times(1, 2), decode)
    if change == "size":
        stat = video.stat()
        video.write_bytes(b"another video")
        os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        os.utime(video, ns=(1, 1))
    for source in (partial(decode, seed=7), nothing_to_decode):
        np.testing.assert_array_equal(cache.read(video, times(2), source), decode(video, times(2), seed=7))
    assert bytes_of_pictures(cache.folder) == SIZE  # those of the old video are gone
    reopened = FrameCache(cache.folder, cache.max_bytes)
    np.testing.assert_array_equal(reopened.read(video, times(2), nothing_to_decode), decode(video, times(2), seed=7))


def test_other_processes_find_what_one_keeps(cache, video):
    cache.read(video, times(1), decode)

    def go_on(cache):
        cache.read(video, times(1), nothing_to_decode)
        cache.read(video, times(2), decode)

    run(go_on, cache)
    cache.read(video, times(1, 2), nothing_to_decode)
    run(go_on, pickle.loads(pickle.dumps(cache)))


def keep_many(cache, videos, seed):
    generator = np.random.default_rng(seed)
    for _ in range(140):  # two processes fill no cache of 900, however long it takes to kill them
        path = videos[generator.integers(len(videos))]
        cache.read(path, times(*generator.integers(0, 400, 3)), decode)
    signal.pause()


def test_processes_that_are_killed_leave_whole_pictures(tmp_path):
    videos = [tmp_path / f"{name}.mp4" for name in range(3)]
    cache, generator = FrameCache(tmp_path / "cache", 900 * SIZE), np.random.default_rng(0)
    kept = []
    for attempt in range(20):
        processes = [FORK.Process(target=keep_many, args=(cache, videos, 2 * attempt + one)) for one in range(2)]
        for process in processes:
            process.start()
        while not bytes_of_pictures(cache.folder):  # of the first two: they have begun
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.01))
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()
        assert bytes_of_pictures(cache.folder) <= cache.max_bytes
        fresh, misses = FrameCache(tmp_path / "cache", 900 * SIZE), []
        for path in videos:
            for frame in range(400):
                picture = fresh._video(path).picture(frame / 30)
                if picture is None:
                    misses.append((path, frame))
                else:
                    np.testing.assert_array_equal(picture, decode(path, times(frame))[0])
        kept.append(len(videos) * 400 - len(misses))
    assert kept == sorted(kept)  # nothing that was kept is lost
    assert 0 < kept[0] < kept[-1]


def test_a_picture_that_was_half_written_is_overwritten(cache, video):
    cache.read(video, times(1), decode)
    for path in cache.folder.glob("*.pictures"):
        path.write_bytes(path.read_bytes() + b"half a picture")
    for path in cache.folder.glob("*.index"):
        path.write_bytes(path.read_bytes() + b"half")
    for frames in ([1, 2], [3]):
        cache = FrameCache(cache.folder, cache.max_bytes)
        np.testing.assert_array_equal(cache.read(video, times(*frames), decode), decode(video, times(*frames)))
    FrameCache(cache.folder, cache.max_bytes).read(video, times(1, 2, 3), nothing_to_decode)


def test_bytes_that_are_not_those_written_are_decoded_anew(cache, video):
    cache.read(video, times(1, 2), decode)
    (path,) = cache.folder.glob("*.pictures")
    content = bytearray(path.read_bytes())
    content[17] ^= 1
    path.write_bytes(content)
    for source in (decode, nothing_to_decode):
        cache = FrameCache(cache.folder, cache.max_bytes)
        np.testing.assert_array_equal(cache.read(video, times(1, 2), source), decode(video, times(1, 2)))


@pytest.mark.parametrize("lost", ["*.pictures", "*.index", "*.*"])
def test_files_that_were_deleted_are_made_anew(cache, video, lost):
    cache.read(video, times(1), decode)
    for path in cache.folder.glob(lost):
        path.unlink()
    cache = FrameCache(cache.folder, cache.max_bytes)
    for source in (decode, nothing_to_decode):
        np.testing.assert_array_equal(cache.read(video, times(1), source), decode(video, times(1)))


def test_files_made_anew_by_another_are_noticed(cache, video):
    cache.read(video, times(1, 2), decode)
    for path in cache.folder.glob("*.*"):
        path.unlink()
    FrameCache(cache.folder, cache.max_bytes).read(video, times(5, 6, 7), decode)
    np.testing.assert_array_equal(cache.read(video, times(7, 5), nothing_to_decode), decode(video, times(7, 5)))


def keep_some(cache, video, seed, together):
    together.wait()
    for frame in np.random.default_rng(seed).permutation(60):
        picture = cache.read(video, times(frame), decode)
        np.testing.assert_array_equal(picture, decode(video, times(frame)))


def test_processes_together_keep_no_more_than_max_bytes(tmp_path, video):
    cache, together = FrameCache(tmp_path / "cache", 40 * SIZE + 5), FORK.Barrier(4)
    processes = [FORK.Process(target=keep_some, args=(cache, video, seed, together)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert bytes_of_pictures(cache.folder) == 40 * SIZE
    kept = FrameCache(cache.folder, cache.max_bytes)._video(video)
    assert sum(kept.picture(frame / 30) is not None for frame in range(60)) == 40  # none has overwritten another's


def test_who_adds_waits_for_others_who_add_and_who_reads_does_not(cache, video):
    cache.read(video, times(1), decode)
    process = FORK.Process(target=cache.read, args=(video, times(2), decode))
    with open(cache.folder / "lock", "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process.start()
        process.join(0.3)
        assert process.is_alive()
        cache.read(video, times(1), nothing_to_decode)
        fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: the process has the file as well
    process.join(30)
    assert process.exitcode == 0
    cache.read(video, times(2), nothing_to_decode)


def test_videos_nobody_asks_for_give_way(tmp_path):
    paths = [tmp_path / f"{name}.mp4" for name in range(3)]
    for path in paths[:2]:
        FrameCache(tmp_path / "cache", 4 * SIZE).read(path, times(1, 2), decode)
    full = FrameCache(tmp_path / "cache", 4 * SIZE)
    np.testing.assert_array_equal(full.read(paths[2], times(1), decode), decode(paths[2], times(1)))
    full.read(paths[1], times(1, 2), nothing_to_decode)  # asked for a moment ago: it stays
    full.read(paths[0], times(1, 2), nothing_to_decode)
    assert bytes_of_pictures(full.folder) == 4 * SIZE
    hour_ago = time.time() - 3600
    for path in full.folder.glob("*.index"):
        os.utime(path, (hour_ago, hour_ago))
    later = FrameCache(tmp_path / "cache", 4 * SIZE)
    later.read(paths[1], times(1, 2), nothing_to_decode)
    later.read(paths[2], times(1), decode)
    for path, frames in ((paths[1], (1, 2)), (paths[2], (1,))):
        later.read(path, times(*frames), nothing_to_decode)
    assert bytes_of_pictures(later.folder) == 3 * SIZE
    with pytest.raises(AssertionError, match="should be in the cache"):
        later.read(paths[0], times(1), nothing_to_decode)
    # Who still has the old files open keeps on reading them, and adds to new ones.
    full.read(paths[0], times(1, 2), nothing_to_decode)
    full._full = False
    full.read(paths[0], times(3), decode)
    later.read(paths[0], times(3), nothing_to_decode)


def test_threads_may_share_it(cache, tmp_path):
    paths = [tmp_path / f"{name}.mp4" for name in range(4)]

    def many(path):
        for frame in np.random.default_rng(0).integers(0, 20, 100):
            np.testing.assert_array_equal(cache.read(path, times(frame), decode), decode(path, times(frame)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(many, paths))
    assert bytes_of_pictures(cache.folder) == 80 * SIZE


def fill_a_disk_of(size, cache, video):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    cache.read(video, times(0), decode)
    with pytest.raises(OSError, match=r"a picture cannot be kept \(.*\), \d+ of max_bytes .* make room") as error:
        cache.read(video, times(1), decode)  # of which half is written
    assert error.value.errno in (errno.ENOSPC, errno.EFBIG)
    cache.read(video, times(0), nothing_to_decode)


def test_a_full_disk_is_an_error_that_says_so(cache, video):
    run(fill_a_disk_of, int(1.5 * SIZE), cache, video)
    np.testing.assert_array_equal(cache.read(video, times(0, 1), decode), decode(video, times(0, 1)))


def test_what_can_not_be_is_an_error_at_once(tmp_path):
    with pytest.raises(OSError, match="does not fit.*bytes are free; give a smaller max_bytes"):
        FrameCache(tmp_path, 2**60)
    with pytest.raises(ValueError, match="max_bytes should be positive, came 0"):
        FrameCache(tmp_path, 0)


def test_items_with_a_cache_are_those_without(goldens, tmp_path):
    root = goldens / "lerobot" / "datasets" / "v30_video_av1"
    deltas = {"observation.images.top": [-0.1, 0.0]}
    plain = LeRobotEpisodes(root, deltas)
    cache = FrameCache(tmp_path / "cache", 10**8)
    for attempt in range(2):
        cached = LeRobotEpisodes(root, deltas, frame_cache=cache)
        if attempt:
            for videos in cached._videos.values():
                videos.read = nothing_to_decode
        for row in range(0, len(plain), 9):
            expected, item = plain[row], cached[row]
            for key in plain.camera_keys:
                assert item[key].equal(expected[key])
