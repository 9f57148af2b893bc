"""What a recording leaves that is interrupted or finds the disk full. Run as a script, this file is that recording."""

import errno
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hf_vla.data.recorder import LeRobotRecorder
from hf_vla.data.recording.commits import FolderTransaction
from hf_vla.data.recording.encoding import VideoOptions
from hf_vla.data.recording.publishing import push_dataset

FPS, LENGTHS = 10, (5, 9, 4)
FEATURES = {
    "observation.images.front": {"dtype": "video", "shape": [64, 64, 3], "names": None},
    "observation.images.still": {"dtype": "image", "shape": [16, 16, 3], "names": None},
    "action": {"dtype": "float32", "shape": [3], "names": None},
}


H264 = VideoOptions("h264")  # quick to start


def shade(episode, frame):
    return 20 + 60 * (episode % 3) + 6 * frame


def make_frame(episode, frame):
    pictures = {key: np.full(FEATURES[key]["shape"], shade(episode, frame), np.uint8) for key in list(FEATURES)[:2]}
    return {**pictures, "action": np.full(3, 100 * episode + frame), "task": f"task {episode}"}


def record_episode(writer, length):
    episode = writer.num_episodes
    for frame in range(length):
        writer.add_frame(make_frame(episode, frame))
    writer.save_episode()


def record(root):
    """Record what is missing of the three episodes; a file beside the folder counts them."""
    with LeRobotRecorder(root, FPS, FEATURES, video=H264) as writer:
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
    info, listed = root / "meta/info.json", saved
    if tables := [*root.glob("meta/episodes/*/*.parquet")]:
        import pyarrow.parquet as pq

        listed = sum(pq.read_metadata(table).num_rows for table in tables)
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


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """Recordings in which a rename of the second episode fails, for each way to fail and go on and each rename."""
    folder = tmp_path_factory.mktemp("failed")
    return folder, run_script("failures", folder)


@pytest.mark.parametrize("way", ["interrupt", "error", "stuck", "save", "discard", "add", "finalize"])
def test_a_rename_that_fails_leaves_whole_episodes(failed, way):
    folder, reports = failed
    assert len(reports[way]) == 7  # a journal, video, rows, tasks, episodes, statistics, info
    for rename, report in enumerate(reports[way]):
        root = folder / way / str(rename)
        decided = rename > 0  # the journal was written
        assert report["error"] == ("KeyboardInterrupt" if way == "interrupt" else "PermissionError")
        assert report["unfinished"] == (way == "stuck" and decided)
        if way in ("save", "discard", "add", "finalize"):
            assert report["refused"] == (way in ("add", "finalize") and not decided), (way, rename)
        if way != "stuck":
            # From the journal on the episode is in the dataset; before, it is so only if it was saved again.
            counted = json.loads((root / "meta/info.json").read_text())["total_episodes"]
            assert counted == (2 if decided or way == "save" else 1), (way, rename)
            check(root, counted)
        check_left(root)


def test_an_unfinished_dataset_is_not_pushed(failed):
    folder, _ = failed
    root = shutil.copytree(folder / "unfinished", folder / "unfinished_copy")
    with pytest.raises(ValueError, match="saved by halves; open the folder with LeRobotRecorder"):
        push_dataset(root, "somebody/dataset")


def test_the_next_commit_finishes_the_one_before(tmp_path):
    root, obstacle = tmp_path / "folder", tmp_path / "folder" / "b" / "two"
    obstacle.mkdir(parents=True)
    folder = FolderTransaction(root)

    def aside(name):
        (folder.work / name).write_text(name)
        return folder.work / name

    with pytest.raises(OSError):
        folder.commit([(aside("1"), Path("a/one")), (aside("2"), Path("b/two"))])
    with pytest.raises(OSError):
        folder.close()
    with pytest.raises(OSError) as error:  # whose traceback keeps the object
        FolderTransaction(root)
    obstacle.rename(root / "aside")
    folder = FolderTransaction(root)
    assert error and (root / "a/one").read_text() == "1" and obstacle.read_text() == "2"
    obstacle.unlink()
    (root / "aside").rename(obstacle)
    with pytest.raises(OSError):
        folder.commit([(aside("3"), Path("a/one")), (aside("4"), Path("b/two"))])
    obstacle.rmdir()
    folder.commit([(aside("5"), Path("c"))])
    folder.close()
    assert [(root / name).read_text() for name in ("a/one", "b/two", "c")] == ["3", "4", "5"]
    assert sorted(path.name for path in root.iterdir()) == ["a", "b", "c"]


def test_what_is_pushed_is_finished_before(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with LeRobotRecorder(tmp_path / "dataset", FPS, FEATURES, video=H264) as writer:
        record_episode(writer, LENGTHS[0])
        statistics = tmp_path / "dataset/meta/stats.json"
        statistics.unlink()
        statistics.mkdir()  # no file can take its place
        with pytest.raises(OSError):
            record_episode(writer, LENGTHS[1])
        statistics.rmdir()
        writer.push_to_hub("somebody/dataset")
        record_episode(writer, LENGTHS[2])
    assert json.loads(hub.read("somebody/dataset", "meta/info.json"))["total_episodes"] == 2
    check(tmp_path / "dataset", 3)


def test_ctrl_c_within_a_frame_breaks_its_episode_alone(tmp_path):
    with LeRobotRecorder(tmp_path / "dataset", FPS, FEATURES, video=H264) as writer:
        record_episode(writer, LENGTHS[0])
        writer.add_frame(make_frame(1, 0))
        with pytest.raises(KeyboardInterrupt):
            writer.add_frame(make_frame(1, 1) | {"task": Interrupting("task 1")})
        with pytest.raises(ValueError, match=r"could not be written \(KeyboardInterrupt\(\)\); discard it"):
            writer.save_episode()
        writer.discard_episode()
        record_episode(writer, LENGTHS[1])
    check(tmp_path / "dataset", 2)


class Interrupting(str):
    """A text at which Ctrl-C is pressed, after the cameras took their pictures."""

    def __hash__(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["save", "frame", "first frame"])
def test_a_full_disk_leaves_the_episodes_before(place, tmp_path):
    report = run_script("full", tmp_path / "dataset", place)
    assert report == {"error": True, "after": 1, "retried": place == "save"}
    check(tmp_path / "dataset", 3 if place == "save" else 2)


def test_a_folder_is_let_go_whatever_happens(tmp_path):
    writer = LeRobotRecorder(tmp_path / "dataset", FPS, FEATURES, video=H264)
    with pytest.raises(OSError), writer:
        writer.add_frame(make_frame(0, 0))
        shutil.rmtree(tmp_path / "dataset/.recording/episode")  # so that it cannot be removed
        raise RuntimeError("the robot fell")
    LeRobotRecorder(tmp_path / "dataset", FPS, FEATURES, video=H264).finalize()


def kill_before_rename(count):
    """Have the process killed instead of its rename of this number."""
    left = [count]

    def hook(event, _):
        if event == "os.rename":
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    sys.addaudithook(hook)


class Renames:
    """Has renames fail, from the one of a number on; a permission that was withdrawn, or Ctrl-C."""

    def __init__(self):
        self.left = self.times = 0
        sys.addaudithook(self)  # for good

    def fail(self, error, after, times):
        self.error, self.left, self.times = error, after, times

    def __call__(self, event, _):
        if event == "os.rename" and self.times:
            if self.left == 0:
                self.times -= 1
                raise self.error
            self.left -= 1


def go_on(writer, way):
    """What a program may do after its save_episode failed; returns whether the recorder refuses it."""
    try:
        if way == "add":
            writer.add_frame(make_frame(2, 0))  # of the next episode, where this one is in the dataset
        else:
            getattr(writer, {"save": "save_episode", "discard": "discard_episode"}.get(way, way))()
    except ValueError:
        return True
    finally:
        writer.discard_episode()
    return False


def fail_at_renames(folder):
    renames, reports = Renames(), {}
    for way in ("interrupt", "error", "stuck", "save", "discard", "add", "finalize"):
        reports[way] = []
        while not reports[way] or reports[way][-1]["error"]:
            count = len(reports[way])
            root = folder / way / str(count)
            error = KeyboardInterrupt() if way == "interrupt" else PermissionError(errno.EACCES, "withdrawn")
            size = 1e-3 if way in ("error", "discard") else None  # then rows are renamed from where they were recorded
            report = {"error": None, "refused": None}
            try:
                with LeRobotRecorder(root, FPS, FEATURES, video=H264, data_files_size_in_mb=size) as writer:
                    record_episode(writer, LENGTHS[0])  # into files that the second replaces
                    renames.fail(error, count, 1000 if way == "stuck" else 1)
                    try:
                        record_episode(writer, LENGTHS[1])
                    except (OSError, KeyboardInterrupt) as failure:
                        report["error"] = type(failure).__name__
                        if way in ("interrupt", "error", "stuck"):
                            raise
                        report["refused"] = go_on(writer, way)
            except (OSError, KeyboardInterrupt):
                pass
            renames.times = 0
            report["unfinished"] = (root / ".recording/commit.json").exists()
            reports[way].append(report)
        reports[way].pop()
    shutil.copytree(folder / "stuck/3", folder / "unfinished")
    return reports


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
    with LeRobotRecorder(root, FPS, FEATURES, video=H264) as writer:
        record_episode(writer, LENGTHS[0])
        largest = max(path.stat().st_size for path in root.rglob("*") if path.is_file())
        limit = {"save": largest, "frame": 100, "first frame": 0}[place]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
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
    for module in ("pandas", "pyarrow.dataset", "pyarrow.pandas_compat"):  # or each recording waits for them
        importlib.import_module(module)
    if kind == "renames":
        result = die_before_renames(Path(folder))
    elif kind == "times":
        result = die_at_times(Path(folder), int(rest[0]))
    elif kind == "failures":
        result = fail_at_renames(Path(folder))
    else:
        result = fill_disk(Path(folder), rest[0])
    sys.stdout.write(json.dumps(result))
