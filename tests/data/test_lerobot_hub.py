"""Datasets on the Hub: what is downloaded, of which commit, and what is read in place by range requests."""

import io
import multiprocessing
import os
import pickle
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import close_session
from PIL import Image
from torch.utils.data import DataLoader

from hf_vla.data.cache import FrameCache
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.reading.files import DatasetFiles

TOP, WRIST = "observation.images.top", "observation.images.wrist"
NAMES = ["v30_video_av1", "v30_images", "v21_video"]
DELTAS = {"action": [0.0, 0.1], TOP: [-0.1, 0.0, 0.1]}


@pytest.fixture
def folder(goldens):
    return goldens / "lerobot" / "datasets"


def equal(item, other):
    assert item.keys() == other.keys()
    for key, value in item.items():
        assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def equal_datasets(one, other, rows=None):
    assert len(one) == len(other)
    for row in range(len(one)) if rows is None else rows:
        equal(one[int(row)], other[int(row)])


def data(hub):
    return [path for path in hub.fetched() if not path.startswith("meta/")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_items_are_those_of_the_folder(hub, folder, name, streaming):
    commit = hub.upload("somebody/blocks", folder / name)
    dataset = LeRobotEpisodes("somebody/blocks", DELTAS, streaming=streaming)
    assert (dataset.name, dataset.revision) == ("somebody/blocks", commit)
    assert dataset.statistics.keys() == LeRobotEpisodes(folder / name).statistics.keys()
    rows = np.random.default_rng(0).permutation(len(dataset))[:60]
    equal_datasets(dataset, LeRobotEpisodes(folder / name, DELTAS), rows)


@pytest.mark.parametrize(
    ("name", "cameras", "files"),
    [
        ("v30_video_av1", None, ["data/chunk-000/file-000.parquet", "data/chunk-000/file-001.parquet"]),
        ("v30_video_av1", [], ["data/chunk-000/file-000.parquet", "data/chunk-000/file-001.parquet"]),
        ("v21_video", [WRIST], [f"data/chunk-00{n // 3}/episode_00000{n}.parquet" for n in (1, 3)]),
        ("v30_images", None, ["data/chunk-000/file-000.parquet", "data/chunk-000/file-001.parquet"]),
    ],
)
def test_only_the_files_of_the_episodes_and_cameras_are_downloaded(hub, folder, name, cameras, files):
    hub.upload("somebody/blocks", folder / name)
    dataset = LeRobotEpisodes("somebody/blocks", episodes=[1, 3], cameras=cameras)
    videos = {
        f"videos/{key}/chunk-000/file-00{n}.mp4"
        for key, numbers in {TOP: (0, 1), WRIST: (0, 1)}.items()
        for n in numbers
        if name == "v30_video_av1" and cameras is None
    }
    if name == "v21_video":
        videos = {f"videos/chunk-00{n // 3}/{WRIST}/episode_00000{n}.mp4" for n in (1, 3)}
    assert data(hub) == sorted([*files, *videos])
    equal_datasets(dataset, LeRobotEpisodes(folder / name, episodes=[1, 3], cameras=cameras))
    sent = hub.sent()
    LeRobotEpisodes("somebody/blocks", episodes=[1, 3], cameras=cameras)
    assert hub.sent("*/resolve/*") <= sent  # a second time nothing is downloaded


def test_a_camera_that_is_not_asked_for_is_not_downloaded(hub, folder):
    hub.upload("somebody/blocks", folder / "v30_video_av1")
    LeRobotEpisodes("somebody/blocks", cameras=["wrist"])
    assert not hub.fetched(f"videos/{TOP}/*") and len(hub.fetched(f"videos/{WRIST}/*")) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_all_files_are_of_the_commit_the_revision_named(hub, copy, rewrite, streaming):
    root = copy()
    first = hub.upload("somebody/blocks", root)
    dataset = LeRobotEpisodes("somebody/blocks", streaming=streaming)
    shutil.copy(root / f"videos/{WRIST}/chunk-000/file-000.mp4", root / f"videos/{TOP}/chunk-000/file-000.mp4")
    for path in root.glob("data/*/*.parquet"):
        rewrite(path, "action", lambda column: pa.array([[9.0] * 7] * len(column), column.type))
    second = hub.upload("somebody/blocks", root)
    assert dataset.revision == first != second
    if streaming:
        again = pickle.loads(pickle.dumps(dataset))  # what is read from now on, too
        assert again[0][TOP].shape == dataset[0][TOP].shape == (3, 108, 108)
    else:
        assert dataset[0][TOP].shape == (3, 108, 108)
    newer = LeRobotEpisodes("somebody/blocks", streaming=streaming)
    assert newer.revision == second and newer[0]["action"].tolist() == [9.0] * 7
    assert newer[0][TOP].shape == (3, 72, 72)
    for revision in (first, "v1"):
        hub.repos["dataset", "somebody/blocks"].tags["v1"] = first
        older = LeRobotEpisodes("somebody/blocks", revision=revision, streaming=streaming, cameras=[])
        assert older.revision == first and older[0]["action"].tolist() != [9.0] * 7


def test_later_downloads_are_of_the_same_commit(hub, folder):
    hub.upload("somebody/blocks", folder / "v21_video")
    files = DatasetFiles("somebody/blocks")
    hub.upload("somebody/blocks", folder / "v30_images")
    files.fetch("data/*")
    files.fetch_files([files.root / "videos/chunk-001/observation.images.top/episode_000004.mp4"])
    assert len(files.glob("data/*/*.parquet")) == 5 and len(files.glob("videos/*/*/*.mp4")) == 1


def test_what_was_downloaded_is_read_without_the_hub(hub, folder):
    commit = hub.upload("somebody/blocks", folder / "v30_video_av1")
    LeRobotEpisodes("somebody/blocks")
    LeRobotEpisodes("somebody/blocks", episodes=[2])
    hub.close()
    close_session()
    for revision in (None, "main", commit):
        dataset = LeRobotEpisodes("somebody/blocks", revision=revision)
        assert dataset.revision == commit
        equal_datasets(dataset, LeRobotEpisodes(folder / "v30_video_av1"), [0, 100])
        assert len(LeRobotEpisodes("somebody/blocks", revision=revision, episodes=[2])) == 20


def test_wrong_file_numbers_cost_a_download_but_no_row(hub, copy, rewrite):
    root = copy()
    for path, number in zip(sorted(root.glob("meta/episodes/*/*.parquet")), (0, 7), strict=True):
        rewrite(path, "data/file_index", lambda column, number=number: pa.array([number] * len(column)))
    hub.upload("somebody/blocks", root)
    assert len(LeRobotEpisodes("somebody/blocks", episodes=[0, 2], cameras=[])) == 45
    assert data(hub) == ["data/chunk-000/file-000.parquet"]
    for streaming in (False, True):
        dataset = LeRobotEpisodes("somebody/blocks", episodes=[1, 3], cameras=[], streaming=streaming)
        assert dataset.column("index").tolist() == [*range(25, 58), *range(78, 118)]


@pytest.mark.parametrize("name", ["v30_video_av1", "v21_video"])
def test_streaming_fetches_videos_as_rows_ask_for_them(hub, folder, name):
    hub.upload("somebody/blocks", folder / name)
    dataset = LeRobotEpisodes("somebody/blocks", streaming=True)
    assert not hub.fetched("videos/*")
    dataset[len(dataset) - 1]
    assert len(hub.fetched("videos/*")) == 2  # one file for each camera
    sent = hub.sent("*/resolve/*")
    dataset[len(dataset) - 2]
    assert hub.sent("*/resolve/*") == sent  # which was fetched with the row behind it


def test_videos_are_fetched_in_blocks_of_which_the_last_are_kept(hub, folder, monkeypatch):
    hub.upload("somebody/blocks", folder / NAMES[0])
    monkeypatch.setattr("hf_vla.data.reading.remote.BLOCK_BYTES", 1000)
    monkeypatch.setattr("hf_vla.data.reading.remote.KEPT_BYTES", 8000)
    dataset = LeRobotEpisodes("somebody/blocks", streaming=True)
    equal_datasets(dataset, LeRobotEpisodes(folder / NAMES[0]), np.random.default_rng(0).permutation(175)[:8])
    assert max(request.sent for request in hub.requests("*.mp4")) == 1000
    assert len(dataset._files._elsewhere._blocks) == 8
    blocks = [(request.path, request.range) for request in hub.requests("*.mp4", "GET")]
    assert len(blocks) > len(set(blocks))  # some came twice


@pytest.fixture
def large_pictures(copy, rewrite):
    """Pictures of noise in row groups of 20: 300 kB each, for each of two cameras."""
    root, generator = copy("v30_images"), np.random.default_rng(0)

    def noise(column):
        pictures = [Image.fromarray(generator.integers(0, 256, (72, 72, 3), np.uint8)) for _ in column]
        files = [io.BytesIO() for _ in pictures]
        [picture.save(file, "PNG") for picture, file in zip(pictures, files, strict=True)]
        return pa.array([{"bytes": file.getvalue(), "path": None} for file in files], column.type)

    for path in root.glob("data/*/*.parquet"):
        rewrite(path, TOP, noise)
        rewrite(path, WRIST, noise)
        pq.write_table(pq.read_table(path), path, row_group_size=20)
    return root


def test_streaming_fetches_row_groups_as_rows_ask_for_them(hub, large_pictures):
    hub.upload("somebody/blocks", large_pictures)
    for cameras in (["wrist"], None):
        dataset = LeRobotEpisodes("somebody/blocks", cameras=cameras, streaming=True)
        expected = LeRobotEpisodes(large_pictures, cameras=cameras)
        opened = hub.sent()
        equal(dataset[25], expected[25])
        sent = hub.sent()
        group = 20 * 72 * 72 * 3 * len(dataset.camera_keys)
        assert group < sent - opened < group + 2**18  # and the footer
        equal_datasets(dataset, expected, range(20, 40))
        assert hub.sent() == sent
    assert opened < sum(path.stat().st_size for path in large_pictures.glob("data/*/*.parquet")) / 2


def test_streaming_reads_from_any_url(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder / "v30_images"), "/images", recursive=True)
    dataset = LeRobotEpisodes("memory://images", DELTAS, episodes=[0, 3], streaming=True)
    assert (dataset.name, dataset.revision) == ("memory://images", None)
    equal_datasets(dataset, LeRobotEpisodes(folder / "v30_images", DELTAS, episodes=[0, 3]))
    with pytest.raises(ValueError, match="is a URL: read it where it is with streaming=True, or copy it"):
        LeRobotEpisodes("memory://images")
    with pytest.raises(FileNotFoundError, match="meta/info.json is missing"):
        LeRobotEpisodes("memory://nothing", streaming=True)
    with pytest.raises(ValueError, match="nobody://images: fsspec cannot open such a URL here .*Protocol not known"):
        LeRobotEpisodes("nobody://images", streaming=True)


class RangeHandler(SimpleHTTPRequestHandler):
    """A folder with its listings, of whose files parts may be asked for."""

    def send_head(self):
        path, wanted = self.translate_path(self.path), self.headers.get("Range")
        if not wanted or not os.path.isfile(path):
            return super().send_head()
        first, last = (int(place) for place in wanted.removeprefix("bytes=").split("-"))
        data = Path(path).read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}")
        self.send_header("Content-Length", str(len(data[first : last + 1])))
        self.end_headers()
        return io.BytesIO(data[first : last + 1])

    def log_message(self, *_):
        """Say nothing."""


@pytest.mark.parametrize("name", NAMES)
def test_streaming_over_http_also_in_forked_workers(folder, name):
    """fsspec fetches in a thread, which a forked process lacks."""
    pytest.importorskip("aiohttp", reason="fsspec's HTTP needs aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        dataset = LeRobotEpisodes(url, DELTAS, episodes=[0, 1], streaming=True)
        expected = LeRobotEpisodes(folder / name, DELTAS, episodes=[0, 1])
        rows = [3, len(expected) - 1, 30]
        equal_datasets(dataset, expected, rows)
        options = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 30}
        for row, item in zip(rows, DataLoader(dataset, sampler=rows, batch_size=None, **options), strict=True):
            equal(item, expected[row])
    finally:
        server.shutdown()
        server.server_close()


def test_after_a_fork_files_are_opened_by_a_file_system_of_the_process(folder):
    """Whatever it is: those of clouds are not to be shared."""
    import fsspec

    fsspec.filesystem("memory").put(str(folder / "v30_images"), "/forked", recursive=True)
    dataset = LeRobotEpisodes("memory://forked", streaming=True)
    elsewhere = dataset._files._elsewhere
    before, item = elsewhere.file_system, dataset[3]
    assert elsewhere.file_system is before
    elsewhere._process = -1  # as a child finds it
    dataset._encoded._process = -1
    equal(dataset[3], item)
    assert elsewhere.file_system is not before


def test_a_url_of_the_hub_is_a_name_with_its_revision(hub, folder):
    commit = hub.upload("somebody/blocks", folder / "v30_images", branch="clean")
    hub.upload("somebody/blocks", folder / "v21_video")
    dataset = LeRobotEpisodes("hf://datasets/somebody/blocks@clean", cameras=[])
    assert (dataset.revision, len(dataset)) == (commit, 95)


def test_a_folder_streams_as_it_reads(folder):
    dataset = LeRobotEpisodes(folder / "v30_video_av1", streaming=True)
    equal_datasets(dataset, LeRobotEpisodes(folder / "v30_video_av1"), [3, 60, 170])
    with pytest.raises(ValueError, match="revision 'main' is of a dataset on the Hub"):
        LeRobotEpisodes(folder / "v30_video_av1", revision="main")


@pytest.mark.parametrize(
    ("name", "context"),
    [(NAMES[0], "fork"), (NAMES[1], "fork"), pytest.param(NAMES[0], "spawn", marks=pytest.mark.slow)],
)
def test_workers_stream_for_themselves(hub, folder, name, context):
    hub.upload("somebody/blocks", folder / name)
    dataset = LeRobotEpisodes("somebody/blocks", streaming=True)
    rows = np.random.default_rng(0).permutation(len(dataset))[:40].tolist()
    alone = [dataset[row] for row in rows]  # files are open by now
    options = {"num_workers": 2, "multiprocessing_context": multiprocessing.get_context(context)}
    for item, expected in zip(DataLoader(dataset, sampler=rows, batch_size=None, **options), alone, strict=True):
        equal(item, expected)


def test_what_was_decoded_need_not_be_fetched_again(hub, folder, tmp_path):
    hub.upload("somebody/blocks", folder / NAMES[0])
    expected = LeRobotEpisodes(folder / NAMES[0])
    for _ in range(2):
        cache = FrameCache(tmp_path / "frames", 2**24)
        dataset = LeRobotEpisodes("somebody/blocks", streaming=True, frame_cache=cache)
        sent = hub.sent("*.mp4")
        equal_datasets(dataset, expected, range(5))
    assert hub.sent("*.mp4") == sent > 0


def test_an_interrupted_connection_is_tried_again(hub, folder, monkeypatch):
    hub.upload("somebody/blocks", folder / "v30_video_av1")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between the attempts
    dataset = LeRobotEpisodes("somebody/blocks", streaming=True)
    hub.cut("*.mp4", after=1000)
    hub.fail("*.mp4", status=503)
    equal(dataset[30], LeRobotEpisodes(folder / "v30_video_av1")[30])
    assert {request.status for request in hub.requests("*.mp4")} == {206, 503}


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_file_that_cannot_be_fetched_is_named_with_the_frame_that_needs_it(hub, folder, name, monkeypatch):
    hub.upload("somebody/blocks", folder / name)
    dataset = LeRobotEpisodes("somebody/blocks", streaming=True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its attempts
    hub.fail("*/resolve/*", times=99, status=503)
    with pytest.raises(OSError, match=r"somebody/blocks, episode 1, frame 5, .*top: .*file-000\.\w+ could not be"):
        dataset[int(dataset.episode_starts[1]) + 5]
    assert 3 <= len(hub.requests("*/resolve/*", "GET")) - len(hub.fetched()) < 20
    hub.faults.clear()
    equal(dataset[30], LeRobotEpisodes(folder / name)[30])


def test_a_missing_file_is_named_with_the_frame_that_needs_it(hub, copy):
    root = copy()
    (root / f"videos/{WRIST}/chunk-000/file-001.mp4").unlink()
    hub.upload("somebody/blocks", root)
    for streaming, episodes in ((False, None), (False, [0, 2]), (True, None)):
        dataset = LeRobotEpisodes("somebody/blocks", episodes=episodes, streaming=streaming)
        row = int(dataset.episode_starts[[episode.index for episode in dataset.episodes].index(2)])
        with pytest.raises(FileNotFoundError, match=r"episode 2, frame 3, .*wrist: .*file-001.mp4: no such file"):
            dataset[row + 3]


def test_a_private_dataset_needs_a_token(hub, folder, monkeypatch):
    hub.upload("somebody/blocks", folder / "v30_images", private=True)
    with pytest.raises(FileNotFoundError, match="blocks: the Hub has no such dataset, or none .* `hf auth login`.$"):
        LeRobotEpisodes("somebody/blocks")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    equal_datasets(LeRobotEpisodes("somebody/blocks", streaming=True), LeRobotEpisodes(folder / "v30_images"), [0, 50])


@pytest.mark.parametrize("variable", ["HF_LEROBOT_HOME", "HF_HOME"])
def test_a_dataset_that_lerobot_recorded_is_named_where_the_hub_has_none(hub, folder, tmp_path, monkeypatch, variable):
    home = tmp_path if variable == "HF_LEROBOT_HOME" else tmp_path / "lerobot"
    monkeypatch.delenv("HF_LEROBOT_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path if variable == "HF_HOME" else "nowhere"))
    shutil.copytree(folder / "v30_images", home / "somebody/blocks")
    with pytest.raises(
        FileNotFoundError, match=f"Hub has no such .* name in {home}/somebody/blocks: give that folder"
    ):
        LeRobotEpisodes("somebody/blocks")
    hub.upload("somebody/blocks", folder / "v30_images")
    assert LeRobotEpisodes("somebody/blocks", cameras=[]).revision  # the Hub's is what a name means
    with pytest.raises(FileNotFoundError, match="no branch, tag or commit 'v9' on the Hub. LeRobot keeps"):
        LeRobotEpisodes("somebody/blocks", revision="v9")
    hub.close()
    close_session()
    with pytest.raises(FileNotFoundError, match="somebody/other: the Hub cannot be reached, and what is needed was"):
        LeRobotEpisodes("somebody/other")


def test_row_groups_are_kept_up_to_a_number_of_bytes(copy):
    """Parquet of several row groups, read from a URL: rows in order cost each of them once."""
    import fsspec

    root = copy("v30_images")
    for path in root.glob("data/*/*.parquet"):
        pq.write_table(pq.read_table(path), path, row_group_size=7)
    fsspec.filesystem("memory").put(str(root), "/groups", recursive=True)
    dataset, expected = LeRobotEpisodes("memory://groups", streaming=True), LeRobotEpisodes(root)
    equal_datasets(dataset, expected)
    small = LeRobotEpisodes("memory://groups", streaming=True)
    small._encoded.max_bytes = 0
    equal_datasets(small, expected, np.random.default_rng(0).permutation(len(small))[:30])
    assert (len(dataset._encoded._kept), len(small._encoded._kept)) == (28, 1)
