import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.recorder import LeRobotRecorder
from hf_vla.data.recording import staging
from hf_vla.data.recording.encoding import VideoOptions
from hf_vla.data.recording.features import COUNTED
from hf_vla.data.recording.publishing import push_dataset

FPS = 30
CAMERAS = {"front": ("video", 64, 64), "wrist": ("video", 49, 97), "still": ("image", 32, 49)}
FEATURES = {
    **{
        f"observation.images.{name}": {"dtype": dtype, "shape": [height, width, 3], "names": ["height", "width", "c"]}
        for name, (dtype, height, width) in CAMERAS.items()
    },
    "observation.state": {"dtype": "float32", "shape": [8], "names": None},
    "action": {"dtype": "float32", "shape": [7], "names": None},
    "grid": {"dtype": "float64", "shape": [2, 3], "names": None},
    "done": {"dtype": "bool", "shape": [1], "names": None},
    "note": {"dtype": "string", "shape": [1], "names": None},
    "subtask_index": {"dtype": "int64", "shape": [1], "names": None},
}
TASKS = ["pick up the cube", "öffne die Schublade ☃", ""]
LENGTHS = (23, 1, 31)


def picture(code, height, width):
    """Sixteen columns of dark and bright that spell a number."""
    bits = np.array([(code >> place) & 1 for place in range(16)], np.uint8)
    columns = np.zeros(width, np.uint8)
    columns[: width // 16 * 16] = np.repeat(bits * 160 + 48, width // 16)
    return np.repeat(np.repeat(columns[None, :, None], height, 0), 3, 2)


def number(image):
    """Read it from a picture float (3, height, width)."""
    width = image.shape[2] // 16
    return sum(
        int(image[:, 8:-8, place * width + 1 : (place + 1) * width - 1].mean() > 0.5) << place for place in range(16)
    )


def make_frame(episode, frame):
    code = 100 * episode + frame
    cameras = {
        f"observation.images.{name}": picture(code + place, height, width)
        for place, (name, (_, height, width)) in enumerate(CAMERAS.items())
    }
    return cameras | {
        "observation.state": np.full(8, code / 7, np.float32),
        "action": np.arange(7) * 0.5 + code,  # float64, as simulators give it
        "grid": np.full((2, 3), code / 3),
        "done": frame % 2 == 0,
        "note": f"n{code} ✓",
        "task": TASKS[episode % 3],
        "subtask": ("reach", "grasp")[frame // 10 % 2],
    }


def record(root, lengths=LENGTHS, first=0, **options):
    with LeRobotRecorder(root, FPS, FEATURES, "toy", **options) as writer:
        for episode, length in enumerate(lengths, first):
            for frame in range(length):
                writer.add_frame(make_frame(episode, frame))
            writer.save_episode()
    return root


def check(root, lengths, **options):
    """Every row of the dataset is what was recorded."""
    data = LeRobotEpisodes(root, **options)
    rows = [(episode, frame) for episode, length in enumerate(lengths) for frame in range(length)]
    assert len(data) == len(rows)
    for row, (episode, frame) in enumerate(rows):
        item, wanted = data[row], make_frame(episode, frame)
        for key, value in wanted.items():
            if not key.startswith("observation.images"):
                got = item[key] if isinstance(value, str) else np.asarray(item[key])
                assert np.array_equal(got, value if isinstance(value, str) else np.asarray(value, got.dtype)), key
        for key in data.camera_keys:
            error = np.abs(item[key].numpy() - wanted[key].transpose(2, 0, 1) / 255)
            assert error.mean() < (0.02 if key[-5:] != "still" else 1e-6), key
        codes = [number(item[f"observation.images.{name}"]) for name in CAMERAS]
        assert codes == [100 * episode + frame + place for place in range(3)]
        counted = [item[key].item() for key in ("index", "episode_index", "frame_index")]
        assert counted == [row, episode, frame]
        assert item["timestamp"].item() == np.float32(frame / FPS)
    return data


def files(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return record(tmp_path_factory.mktemp("recorded") / "dataset")


def test_what_was_recorded_is_read(dataset):
    data = check(dataset, LENGTHS)
    assert [episode.length for episode in data.episodes] == [*LENGTHS]
    videos = [f"videos/observation.images.{name}/chunk-000/file-000.mp4" for name in ("front", "wrist")]
    rows = ["data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"]
    tables = ["meta/info.json", "meta/stats.json", "meta/subtasks.parquet", "meta/tasks.parquet"]
    assert files(dataset) == rows + tables + videos  # nothing is left of the recording


def test_windows_reach_over_files_and_stop_at_episodes(dataset):
    deltas = {"observation.images.wrist": [-2 / FPS, 0.0, 1 / FPS], "action": [0.0, 1 / FPS]}
    data = LeRobotEpisodes(dataset, delta_timestamps=deltas)
    item = data[LENGTHS[0]]  # an episode of one frame
    assert [number(image) for image in item["observation.images.wrist"]] == [101] * 3
    assert item["observation.images.wrist_is_pad"].tolist() == [True, False, True]
    item = data[LENGTHS[0] + 1 + 5]
    assert [number(image) for image in item["observation.images.wrist"]] == [204, 206, 207]
    assert item["action"][:, 0].tolist() == [205, 206]


def record_like(root, info, length, task):
    """Record an episode with the features of another dataset; its pictures spell the frames' numbers."""
    with LeRobotRecorder(root, info["fps"], info["features"], info["robot_type"]) as writer:
        for frame in range(length):
            values = {"task": task}
            for key, feature in writer.features.items():
                if feature["dtype"] in ("image", "video"):
                    values[key] = picture(frame, *feature["shape"][:2])
                elif key not in COUNTED:
                    values[key] = np.full(feature["shape"], frame, feature["dtype"])
            writer.add_frame(values)
        writer.save_episode()


def test_files_are_those_that_lerobot_writes(goldens, tmp_path):
    golden = goldens / "lerobot" / "datasets" / "v30_video_av1"
    info = json.loads((golden / "meta/info.json").read_text())
    record_like(tmp_path / "dataset", info, 5, "wait")
    own = json.loads((tmp_path / "dataset/meta/info.json").read_text())
    assert own.keys() == info.keys()
    same = ("codebase_version", "robot_type", "fps", "data_path", "video_path", "features")
    assert {key: own[key] for key in same} == {key: info[key] for key in same}
    assert (own["total_episodes"], own["total_frames"], own["splits"]) == (1, 5, {"train": "0:1"})
    for name in ("data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"):
        ours, theirs = (pq.read_schema(root / name) for root in (tmp_path / "dataset", golden))
        assert ours.names == theirs.names
        assert [str(kind).replace("item", "element") for kind in ours.types] == [
            str(kind).replace("item", "element") for kind in theirs.types
        ]
    ours, theirs = (json.loads((root / "meta/stats.json").read_text()) for root in (tmp_path / "dataset", golden))
    shapes = [{key: {n: np.shape(v) for n, v in part.items()} for key, part in s.items()} for s in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_statistics_are_those_of_all_rows(dataset):
    rows = [make_frame(episode, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)]
    statistics = LeRobotEpisodes(dataset).statistics
    for key in ("action", "grid", "observation.images.still"):
        values, part = np.stack([row[key] for row in rows]), statistics[key]
        if key.startswith("observation"):
            values = values.reshape(-1, 3) / 255
        assert part["count"].tolist() == [len(rows)]
        for name in ("mean", "std", "min", "max"):
            got = part[name].reshape(values.shape[1:])
            np.testing.assert_allclose(got, getattr(np, name)(values, axis=0), rtol=1e-6, atol=1e-9)
        if not key.startswith("observation"):
            for name, rank in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
                np.testing.assert_allclose(part[name], np.quantile(values, rank, axis=0), rtol=1e-6)
    assert statistics["done"]["mean"][0] == pytest.approx(np.mean([row["done"] for row in rows]))
    table = pq.read_table(dataset / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert table[1]["stats/action/mean"] == table[1]["stats/action/q01"] == (np.arange(7) * 0.5 + 100).tolist()
    assert [row["tasks"] for row in table] == [[task] for task in TASKS]


def test_full_files_and_folders_are_followed_by_others(tmp_path):
    small = {"data_files_size_in_mb": 0.012, "video_files_size_in_mb": 0.003, "chunks_size": 2}
    lengths = (20, 12, 25, 8, 9)
    check(record(tmp_path / "dataset", lengths, **small), lengths)
    written = files(tmp_path / "dataset")
    assert {"data/chunk-001/file-000.parquet", "videos/observation.images.front/chunk-000/file-001.mp4"} < {*written}
    assert not any("file-002" in name for name in written)
    assert len([name for name in written if "front" in name]) < len(lengths)  # some share one


def test_a_video_ends_before_float32_misses_its_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "LONGEST_VIDEO_S", 20.5 / FPS)
    check(record(tmp_path / "dataset", (8, 8, 8)), (8, 8, 8))
    table = pq.read_table(tmp_path / "dataset/meta/episodes/chunk-000/file-000.parquet")
    assert table["videos/observation.images.front/file_index"].to_pylist() == [0, 0, 1]
    assert table["videos/observation.images.front/from_timestamp"].to_pylist() == [0.0, 8 / FPS, 0.0]


def test_episodes_may_end_where_rows_are_written_aside(tmp_path):
    check(record(tmp_path / "dataset", (64, 65)), (64, 65))


def test_the_table_of_episodes_is_divided(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "EPISODES_PER_TABLE", 2)
    check(record(tmp_path / "dataset", (2, 3, 4)), (2, 3, 4))
    assert "meta/episodes/chunk-000/file-001.parquet" in files(tmp_path / "dataset")


def test_a_later_session_goes_on(tmp_path):
    root, whole = tmp_path / "dataset", tmp_path / "whole"
    record(root, LENGTHS[:1])
    record(root, ())
    record(root, LENGTHS[1:], first=1)
    data = check(root, LENGTHS)
    uninterrupted = LeRobotEpisodes(record(whole)).statistics
    for key, part in data.statistics.items():
        for name in part:
            # what is float64 is read back as float32, as LeRobot does
            np.testing.assert_allclose(part[name], uninterrupted[key][name], rtol=1e-6, atol=1e-12, err_msg=key)


def test_lerobots_own_dataset_goes_on(copy):
    root = copy("v30_video_av1")
    before = LeRobotEpisodes(root)
    info = json.loads((root / "meta/info.json").read_text())
    last = before[len(before) - 1]
    tables = sorted(root.glob("meta/episodes/*/*"))
    for path in tables:  # converted datasets have no quantiles
        table = pq.read_table(path)
        pq.write_table(table.select([name for name in table.column_names if "/q" not in name]), path)
    record_like(root, info, 12, "go on")
    (added,) = {*root.glob("meta/episodes/*/*")} - {*tables}
    assert pq.read_schema(added).names == pq.read_schema(path).names
    after = LeRobotEpisodes(root)
    assert (len(after), after.num_episodes) == (len(before) + 12, before.num_episodes + 1)
    for row in (0, len(before) - 1):
        for key in before.camera_keys:
            assert (after[row][key] == before[row][key]).all()
    assert after[len(before) - 1]["task"] == last["task"] and after[-1]["task"] == "go on"
    assert [number(after[len(before) + code][before.camera_keys[0]]) for code in range(12)] == [*range(12)]
    assert after.statistics["action"]["count"] == [len(after)]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fps": 20}, "fps is 30, the recorder's 20"),
        ({"chunks_size": 5}, "chunks_size is 1000, the recorder's 5"),
        ({"robot_type": "other"}, "robot_type is 'toy', the recorder's 'other'"),
        ({"features": FEATURES | {"action": FEATURES["action"] | {"shape": [6]}}}, r"'action'.*\[7\].*\[6\]"),
        ({"features": FEATURES | {"more": FEATURES["action"]}}, "'more' is None"),
        ({"features": {key: f for key, f in FEATURES.items() if key != "note"}}, "'note'.*None"),
    ],
)
def test_another_dataset_does_not_go_on(dataset, change, message):
    with pytest.raises(ValueError, match=message):
        LeRobotRecorder(**{"root": dataset, "fps": FPS, "features": FEATURES, "robot_type": "toy"} | change)
    assert not (dataset / ".recording").exists()


def test_another_codec_does_not_go_on_but_another_order_does(tmp_path):
    features = {key: FEATURES[key] for key in ("observation.images.front", "action", "observation.state")}
    for order in (features, dict(reversed(features.items()))):
        record_like(tmp_path, {"fps": FPS, "features": order, "robot_type": "toy"}, 3, "wait")
    assert [*pq.read_table(tmp_path / "data/chunk-000/file-001.parquet").column_names][:2] == [*features][1:]
    with pytest.raises(ValueError, match="'video.codec': 'av1'.*'video.codec': 'h264'"):
        LeRobotRecorder(tmp_path, FPS, features, "toy", VideoOptions("h264"))


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "table.csv").touch()
    with pytest.raises(ValueError, match=r"it holds \['data'\], but no meta/info.json"):
        LeRobotRecorder(tmp_path, FPS, FEATURES)


def test_a_folder_has_one_recorder(tmp_path):
    with LeRobotRecorder(tmp_path / "dataset", FPS, FEATURES):
        with pytest.raises(BlockingIOError, match="another recorder has the folder open"):
            LeRobotRecorder(tmp_path / "dataset", FPS, FEATURES)
    LeRobotRecorder(tmp_path / "dataset", FPS, FEATURES).finalize()


FRONT = "observation.images.front"
BAD = {
    "missing": ({"action": ...}, "missing are ['action']"),
    "unknown": ({"timestamp": 0.1}, "unknown ['timestamp']"),
    "no task": ({"task": None}, "'task' to be a text, came None"),
    "no text": ({"note": 3}, "'note' to be a text, came 3"),
    "shape": ({"action": np.zeros(6)}, "'action' of shape (7,), came (6,)"),
    "text": ({"action": ["x"] * 7}, "'action' of dtype float32, came <U1"),
    "float for bool": ({"done": 0.5}, "'done' of dtype bool, came float64"),
    "nan": ({"action": np.full(7, np.nan)}, "finite numbers of dtype float32 in 'action', came nan at [0]"),
    "too large": ({"action": np.full(7, 1e39)}, "in 'action', came 1e+39 at [0]"),
    "channels first": (
        {FRONT: np.zeros((3, 64, 64), np.uint8)},
        "(64, 64, 3), came (3, 64, 64); put its channels last: np.moveaxis(picture, 0, -1)",
    ),
    "grey": ({FRONT: np.zeros((64, 64), np.uint8)}, "np.repeat(picture.reshape(64, 64, 1), 3, axis=-1)"),
    "four channels": ({FRONT: np.zeros((64, 64, 4), np.uint8)}, "leave its fourth channel out: picture[..., :3]"),
    "another size": ({FRONT: np.zeros((32, 64, 3), np.uint8)}, "(64, 64, 3), came (32, 64, 3)."),
    "picture's dtype": ({FRONT: np.zeros((64, 64, 3))}, "dtype uint8, came float64"),
}


def test_bad_frames_are_refused_and_the_episode_goes_on(tmp_path):
    with LeRobotRecorder(tmp_path / "dataset", FPS, FEATURES, "toy") as writer:
        for frame, (change, message) in enumerate(BAD.values()):
            bad = make_frame(0, frame) | change
            bad = {key: value for key, value in bad.items() if value is not ...}
            with pytest.raises(ValueError) as error:
                writer.add_frame(bad)
            assert f"dataset, episode 0, frame {frame}: " in str(error.value) and message in str(error.value)
            writer.add_frame(make_frame(0, frame))
        writer.save_episode()
    check(tmp_path / "dataset", (len(BAD),))


def test_frames_are_copied(tmp_path):
    with LeRobotRecorder(tmp_path / "dataset", FPS, FEATURES, "toy") as writer:
        frame = make_frame(0, 0)
        for number in range(5):
            for key, value in make_frame(0, number).items():
                if isinstance(value, np.ndarray):
                    frame[key][...] = value
                else:
                    frame[key] = value
            writer.add_frame(frame)
        writer.save_episode()
    check(tmp_path / "dataset", (5,))


def test_episodes_are_discarded_not_forgotten(tmp_path):
    root = tmp_path / "dataset"
    with pytest.raises(RuntimeError, match="the robot fell"), LeRobotRecorder(root, FPS, FEATURES, "toy") as writer:
        writer.add_frame(make_frame(7, 0) | {"task": "is not in the dataset"})
        assert writer.episode_length == 1
        writer.discard_episode()
        with pytest.raises(ValueError, match="no frames to save"):
            writer.save_episode()
        writer.add_frame(make_frame(0, 0))
        writer.save_episode()
        writer.add_frame(make_frame(1, 0))
        with pytest.raises(ValueError, match="1 frames were neither saved nor discarded"):
            writer.finalize()
        raise RuntimeError("the robot fell")
    with pytest.raises(ValueError, match="the recorder is finalized"):
        writer.add_frame(make_frame(1, 0))
    data = check(root, (1,))
    assert data.tasks == {0: TASKS[0]} and not (root / ".recording").exists()


@pytest.mark.parametrize(
    "feature, message",
    [
        ({"a/b": FEATURES["action"]}, "no slashes"),
        ({"action": {"dtype": "float32"}}, r"lacks \['shape'\]"),
        ({"action": {"dtype": "complex64", "shape": [7]}}, "came 'complex64'"),
        ({"action": {"dtype": "float32", "shape": []}}, r"and \[\]"),
        ({"index": {"dtype": "int32", "shape": [1]}}, "counted by the recorder"),
        (
            {"cam": {"dtype": "video", "shape": [3, 64, 32]}},
            r"\(height, width, 3\).*came \[3, 64, 32\]; put its ch",
        ),
        (
            {"cam": {"dtype": "image", "shape": [64, 32, 1]}},
            r"reshape\(64, 32, 1\), 3, axis=-1\).*Depth.*leave it",
        ),
    ],
)
def test_features_are_checked(tmp_path, feature, message):
    with pytest.raises(ValueError, match=message):
        LeRobotRecorder(tmp_path / "dataset", FPS, feature)
    assert not (tmp_path / "dataset").exists()


def test_numbers_above_zero_are_expected(tmp_path):
    with pytest.raises(ValueError, match=r"above 0, came \{'fps': 0, 'chunks_size': -1\}"):
        LeRobotRecorder(tmp_path / "dataset", 0, FEATURES, chunks_size=-1)


def test_the_hub_has_what_was_recorded(dataset, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with LeRobotRecorder(dataset, FPS, FEATURES, "toy") as writer:
        writer.add_frame(make_frame(3, 0))  # not saved: it stays here
        for _ in range(2):  # the tag moves with the second time
            address = writer.push_to_hub("somebody/dataset", private=True, tags=["toy"], license="mit")
        writer.discard_episode()
    assert address == f"{hub.url}/datasets/somebody/dataset"
    repo = hub.repos["dataset", "somebody/dataset"]
    assert repo.private and repo.tags == {"v3.0": repo.branches["main"]}
    assert sorted(repo.commits[repo.tags["v3.0"]]) == sorted(["README.md", *files(dataset)])
    card = DatasetCard(hub.read("somebody/dataset", "README.md").decode())
    assert card.data.tags == ["LeRobot", "toy"] and card.data.license == "mit"
    assert card.data.configs[0]["data_files"] == "data/*/*.parquet"
    assert TASKS[1] in card.text and "path=somebody/dataset" in card.text and '"total_frames": 55' in card.text
    check("somebody/dataset", LENGTHS, revision="v3.0")


def test_a_readme_of_the_folder_is_the_card(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    root = record(tmp_path / "dataset", (2,))
    (root / "README.md").write_text("# Mine\n")
    push_dataset(root, "somebody/mine", branch="next")
    assert hub.read("somebody/mine", "README.md", "next") == b"# Mine\n"
    repo = hub.repos["dataset", "somebody/mine"]
    assert repo.tags["v3.0"] == repo.branches["next"] and "meta/info.json" not in repo.commits[repo.branches["main"]]


def test_a_folder_of_other_things_is_no_place_for_a_recording(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"expected a LeRobot dataset or a new folder; it holds \['notes.txt'\]"):
        LeRobotRecorder(tmp_path, fps=10, features={"action": {"dtype": "float32", "shape": [2], "names": None}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]
