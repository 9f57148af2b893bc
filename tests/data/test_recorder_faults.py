"""What a recording leaves that is killed, or finds the disk full. Run as a script, this file is that recording."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hf_vla.data.recorder import LeRobotRecorder

FPS, LENGTHS = 10, (5, 9, 4)
FEATURES = {
    "observation.images.front": {"dtype": "video", "shape": [64, 64, 3], "names": None},
    "observation.images.still": {"dtype": "image", "shape": [16, 16, 3], "names": None},
    "action": {"dtype": "float32", "shape": [3], "names": None},
}


def shade(episode, frame):
    return 20 + 60 * (episode % 3) + 6 * frame


def record_episode(writer, length):
    episode = writer.num_episodes
    for frame in range(length):
        pictures = {
            key: np.full(FEATURES[key]["shape"], shade(episode, frame), np.uint8) for key in list(FEATURES)[:2]
        }
        writer.add_frame({**pictures, "action": np.full(3, 100 * episode + frame), "task": f"task {episode}"})
    writer.save_episode()


def record(root):
    """Record what is missing of the three episodes; a file beside the folder counts them."""
    with LeRobotRecorder(root, FPS, FEATURES) as writer:
        for length in LENGTHS[writer.num_episodes :]:
            record_episode(writer, length)
            Path(f"{root}.saved").write_text(str(writer.num_episodes))


def check(root, episodes):
    """The dataset holds this many episodes, and all of them wholly."""
    from hf_vla.data.lerobot import LeRobotEpisodes

    data = LeRobotEpisodes(root)
    assert [episode.length for episode in data.episodes] == [*LENGTHS[:episodes]]
    rows = [(episode, frame) for episode in range(episodes) for frame in range(LENGTHS[episode])]
    for (episode, frame), item in zip(rows, data, strict=True):
        assert item["action"].tolist() == [100 * episode + frame] * 3 and item["task"] == f"task {episode}"
        for key in data.camera_keys:
            assert abs(item[key].mean().item() * 255 - shade(episode, frame)) < 2.5, (key, episode, frame)


def check_left(root):
    """What the killed recording left can be read, and the next one completes it."""
    saved, log = 0, Path(f"{root}.saved")
    if log.exists() and log.read_text():
        saved = int(log.read_text())
    info, table = root / "meta/info.json", root / "meta/episodes/chunk-000/file-000.parquet"
    listed = saved
    if table.exists():
        import pyarrow.parquet as pq

        listed = pq.read_metadata(table).num_rows
        check(root, listed)
    # LeRobot reads as many episodes as are counted, and finds all of them; one more may be there already.
    counted = json.loads(info.read_text())["total_episodes"] if info.exists() else 0
    assert saved <= counted <= listed <= min(counted + 1, 3)
    record(root)
    check(root, 3)
    assert not (root / ".recording").exists()
    assert json.loads(info.read_text())["total_frames"] == sum(LENGTHS)
    assert json.loads((root / "meta/stats.json").read_text())["action"]["count"] == [sum(LENGTHS)]
    return listed


def run_script(*arguments):
    command = [sys.executable, __file__, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Recordings killed just before each of their renames, until one has none left to make."""
    folder = tmp_path_factory.mktemp("killed")
    return folder, run_script("renames", folder)


def test_a_kill_before_any_rename_leaves_whole_episodes(killed):
    folder, recordings = killed
    assert recordings > 20
    listed = [check_left(folder / str(recording)) for recording in range(recordings)]
    assert {*listed} == {0, 1, 2, 3} and listed == sorted(listed)


@pytest.mark.parametrize("moments", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_a_kill_at_any_time_leaves_whole_episodes(moments, tmp_path):
    run_script("times", tmp_path, moments)
    listed = [check_left(tmp_path / str(recording)) for recording in range(moments)]
    assert len({*listed}) > 1  # they died at different places


@pytest.mark.parametrize("place", ["save", "frame"])
def test_a_full_disk_leaves_the_episodes_before(place, tmp_path):
    report = run_script("full", tmp_path / "dataset", place)
    assert report == {"error": True, "after": 1, "retried": place == "save"}
    check(tmp_path / "dataset", 3 if place == "save" else 2)


def kill_before_rename(count):
    """Have the process killed instead of its rename of this number."""
    left = [count]

    def hook(event, _):
        if event == "os.rename":
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    sys.addaudithook(hook)


def fork(root, count=None):
    """Record in a child process, which shares what was imported and no threads."""
    child = os.fork()
    if child:
        return child
    if count is not None:
        kill_before_rename(count)
    try:
        record(root)
    except BaseException:
        os._exit(1)
    os._exit(0)


def die_before_renames(folder):
    status, count = None, -1
    while status != 0:
        count += 1
        status = os.waitpid(fork(folder / str(count), count), 0)[1]
        if status not in (0, signal.SIGKILL):
            raise RuntimeError(f"the recording failed with status {status}")
    return count + 1


def die_at_times(folder, moments):
    start = time.monotonic()
    os.waitpid(fork(folder / "whole"), 0)
    whole = time.monotonic() - start
    for moment in range(moments):
        child = fork(folder / str(moment))
        time.sleep(whole * (moment + 1) / (moments + 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return moments


def fill_disk(root, place):
    """Let no file grow beyond what the second episode needs, in mid-episode or only where it joins the first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    report = {"error": False, "retried": False}
    with LeRobotRecorder(root, FPS, FEATURES) as writer:
        record_episode(writer, LENGTHS[0])
        largest = max(path.stat().st_size for path in root.rglob("*") if path.is_file())
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest if place == "save" else 100, hard))
        try:
            record_episode(writer, LENGTHS[1])
        except OSError as error:
            report["error"] = error.errno in (errno.EFBIG, errno.ENOSPC)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        check(root, 1)
        report["after"] = writer.num_episodes
        try:
            writer.save_episode()
            report["retried"] = True
            record_episode(writer, LENGTHS[2])
        except ValueError:
            writer.discard_episode()
            record_episode(writer, LENGTHS[1])
    return report


if __name__ == "__main__":
    kind, folder, *rest = sys.argv[1:]
    if kind == "renames":
        result = die_before_renames(Path(folder))
    elif kind == "times":
        result = die_at_times(Path(folder), int(rest[0]))
    else:
        result = fill_disk(Path(folder), rest[0])
    sys.stdout.write(json.dumps(result))
