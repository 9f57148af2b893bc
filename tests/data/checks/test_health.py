"""Real defects, made in copies of healthy datasets: each is found with file and episode, and nothing else is."""

import json
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_vla.data.checks.findings import KINDS, Findings
from hf_vla.data.checks.health import check_health
from hf_vla.data.checks.health_pictures import block_means
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.recorder import LeRobotRecorder
from hf_vla.data.recording.encoding import usual_priority

TOP, WRIST = "observation.images.top", "observation.images.wrist"
ROWS = "data/chunk-000/file-000.parquet"  # episodes 0 (25 rows), 1 (33) and 2 (20)
ALL_ROWS = "data/chunk-*/file-*.parquet"
FIRST_VIDEO, SECOND_VIDEO = (f"videos/{TOP}/chunk-000/file-00{number}.mp4" for number in (0, 1))  # episodes 0, 1; 2, 3


def found(root, **options):
    findings = check_health(root, **options).findings
    return [(finding.kind, finding.file, finding.episodes, finding.frame) for finding in findings]


def message(root, **options):
    (finding,) = check_health(root, **options).findings
    assert finding.mend == KINDS[finding.kind][1]
    return f"{finding.severity}: {finding.message}"


def set_rows(column, rows, value):
    values = column.to_pylist()
    for row in rows:
        values[row] = value(values[row])
    return pa.array(values, column.type)


def encode(path, pictures, fps=10, codec="libx264", options=None, **container_options):
    options = options or {"g": "2", "crf": "30"}
    with usual_priority(), av.open(str(path), "w", **container_options) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for picture in [*pictures, None]:
            frame = picture if picture is None else av.VideoFrame.from_ndarray(picture, "rgb24")
            container.mux(stream.encode(frame))


def decode(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["v21_video", "v30_images", "v30_video_av1", "robosuite_demos", "metaworld_demos"])
def test_healthy_datasets_have_no_findings(goldens, demos, name, quick):
    root = demos.parent / name if name.endswith("demos") else goldens / "lerobot" / "datasets" / name
    told = []
    health = check_health(root, quick=quick, progress=lambda *what: told.append(what))
    assert health.findings == [] and health.healthy
    assert len(health.found.rows.places) == sum(episode.length for episode in health.episodes)
    for kind in {what for what, _, _ in told}:
        ((_, total),) = {(what, total) for what, _, total in told if what == kind}
        assert sum(done for what, done, _ in told if what == kind) == total


def test_what_the_recorder_writes_is_healthy(tmp_path):
    generator = np.random.default_rng(0)
    features = {
        "action": {"dtype": "float32", "shape": [2], "names": ["x", "gripper"]},
        TOP: {"dtype": "video", "shape": [64, 64, 3], "names": ["height", "width", "channels"]},
    }
    with LeRobotRecorder(tmp_path / "new", fps=20, features=features) as recorder:
        for _ in range(2):
            for _ in range(12):
                picture = generator.integers(0, 256, (8, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
                recorder.add_frame({"action": generator.random(2, np.float32), TOP: picture, "task": "wave"})
            recorder.save_episode()
    assert found(tmp_path / "new") == []


@pytest.mark.parametrize(
    ("name", "lost", "expected"),
    [
        ("v30_video_av1", FIRST_VIDEO, [("missing file", FIRST_VIDEO, [0, 1], None)]),
        (
            "v30_video_av1",
            "data/chunk-000/file-001.parquet",
            [("missing file", "data/chunk-000/file-001.parquet", [3, 4], None)],
        ),
        ("v30_video_av1", "meta/stats.json", [("missing statistics", "meta/stats.json", [], None)]),
        ("v30_video_av1", "meta/tasks.parquet", [("missing file", "meta/tasks.parquet", [], None)]),
        ("v21_video", "meta/episodes.jsonl", [("missing file", "meta/episodes.jsonl", [], None)]),
        ("v21_video", "meta/episodes_stats.jsonl", [("missing statistics", "meta/episodes_stats.jsonl", [], None)]),
        (
            "v21_video",
            "data/chunk-001/episode_000003.parquet",
            [("missing file", "data/chunk-001/episode_000003.parquet", [3], None)],
        ),
        (
            "v21_video",
            f"videos/chunk-000/{WRIST}/episode_000001.mp4",
            [("missing file", f"videos/chunk-000/{WRIST}/episode_000001.mp4", [1], None)],
        ),
    ],
)
def test_missing_files_are_found(copy, name, lost, expected):
    root = copy(name)
    (root / lost).unlink()
    assert found(root) == expected
    if lost.endswith("mp4"):
        assert found(root, quick=True) == expected
        others = [episode for episode in range(5) if episode not in expected[0][2]]
        assert found(root, episodes=others) == []


def test_without_a_dataset_there_is_an_error(tmp_path, copy):
    with pytest.raises(FileNotFoundError, match="info.json is missing"):
        check_health(tmp_path)
    with pytest.raises(ValueError, match=r"expected episodes of its 6, came \[7\]"):
        check_health(copy(), episodes=[1, 7])


@pytest.mark.parametrize(
    ("name", "episodes"),
    [("meta/tasks.parquet", []), ("meta/stats.json", []), ("data/chunk-000/file-001.parquet", [3, 4])],
)
def test_files_cut_short_are_found(copy, name, episodes):
    root = copy()
    (root / name).write_bytes((root / name).read_bytes()[:100])
    assert found(root) == [("unreadable file", name, episodes, None)]


def test_rows_that_may_be_in_an_unreadable_file_are_not_said_to_be_missing(copy, rewrite):
    root, name = copy(), "data/chunk-000/file-001.parquet"
    (path,) = root.glob("meta/episodes/*/file-001.parquet")
    rewrite(path, "data/file_index", lambda column: pa.array([0] * len(column)))  # wrong for episodes 3 and 4
    (root / name).write_bytes((root / name).read_bytes()[:100])
    assert found(root) == [("unreadable file", name, [], None)]


def test_without_any_rows_every_file_of_them_is_missing(copy):
    root = copy("v30_images")
    shutil.rmtree(root / "data")
    files = [f"data/chunk-000/file-00{number}.parquet" for number in (0, 1)]
    assert found(root) == [("missing file", files[0], [0, 1, 2], None), ("missing file", files[1], [3], None)]


def test_a_broken_table_of_episodes_is_found(copy):
    root = copy("v21_video")
    table = root / "meta/episodes.jsonl"
    table.write_text(table.read_text()[:-20])
    assert found(root) == [("unreadable file", "meta/episodes.jsonl", [], None)]


def test_a_video_cut_short_is_found(copy):
    root = copy()
    path = root / SECOND_VIDEO
    encode(path, decode(path))
    assert found(root) == []
    path.write_bytes(path.read_bytes()[:-500])  # of its tables, which are at the end
    assert found(root) == found(root, quick=True) == [("truncated video", SECOND_VIDEO, [2, 3], None)]


REORDERED = {"x264-params": "bframes=3:b-adapt=0:scenecut=0"}


@pytest.mark.parametrize(
    ("codec", "options"), [("libsvtav1", {"g": "2"}), ("libx264", {"g": "2"}), ("libx264", REORDERED)]
)
def test_a_video_cut_short_behind_its_tables_is_found(copy, codec, options):
    root = copy()
    path = root / SECOND_VIDEO
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, picture.shape, np.uint8) for picture in decode(path)]
    encode(path, pictures, codec=codec, options=options, container_options={"movflags": "faststart"})
    assert found(root) == []
    size = path.stat().st_size * 2 // 3
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.pts is not None]
        lost = sorted(float(packet.pts * packet.time_base) for packet in packets if packet.pos + packet.size > size)
        reordered = [packet.pts for packet in packets] != sorted(packet.pts for packet in packets)
    assert reordered == (options == REORDERED)
    path.write_bytes(path.read_bytes()[:size])
    frame = round(10 * lost[0]) - 20  # episode 3 begins at 2 s
    assert found(root) == found(root, quick=True) == [("truncated video", SECOND_VIDEO, [3], frame)]
    assert f"{len(lost)} of the episode's 40 rows have no frame" in message(root)
    assert message(root).endswith(f"expected one at {lost[0]:.6f} s, but the file ends before it")
    dataset = LeRobotEpisodes(root, cameras=["top"])
    start = dataset.episode_starts[3]
    dataset[start]
    with pytest.raises(ValueError, match=f"episode 3, frame {frame}"):
        dataset[start + frame]


def test_spoilt_bytes_in_a_video_are_found(copy):
    root = copy()
    path = root / FIRST_VIDEO
    with av.open(str(path)) as container:
        entries = [(entry.pos, entry.size) for entry in container.streams.video[0].index_entries]
    data = bytearray(path.read_bytes())
    for position, size in entries[25 + 31 :]:  # the end of episode 1
        data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    assert found(root) == [("undecodable picture", FIRST_VIDEO, [1], 32)]
    assert found(root, quick=True) == found(root, episodes=[0, 2, 3]) == []


@pytest.mark.parametrize("options", [{"g": "2"}, REORDERED], ids=["in order", "reordered"])
def test_a_video_shorter_than_its_episodes_is_found(copy, options):
    root = copy()
    encode(root / SECOND_VIDEO, decode(root / SECOND_VIDEO)[:-5], options=options)
    assert found(root) == found(root, quick=True) == [("short video", SECOND_VIDEO, [3], 35)]
    assert "5 of the episode's 40 rows have no frame" in message(root)
    assert "expected one at 5.500000 s, came the last one at 5.400000 s" in message(root)


def test_frames_that_are_not_at_the_rows_times_are_found(copy, rewrite):
    root = copy()
    rewrite(root / ROWS, "timestamp", lambda column: set_rows(column, range(35, 58), lambda time: time + 0.03))
    videos = [FIRST_VIDEO, FIRST_VIDEO.replace("top", "wrist")]
    missing = [("missing frames", video, [1], 10) for video in videos]
    assert found(root) == [*missing, ("timestamps", ROWS, [1], 10)]
    texts = [finding.message for finding in check_health(root).findings]
    assert "23 of the episode's 33 rows have no frame within 0.0001 s: expected one at 3.530000 s" in texts[0]
    assert texts[2].endswith("1.000000 s within 0.0001 s, came 1.030000 s")


def test_times_are_judged_as_readers_judge_them(copy, rewrite):
    root = copy()
    rewrite(root / ROWS, "timestamp", lambda column: set_rows(column, [30], lambda time: time + 9e-5))
    assert found(root) == []
    rewrite(root / ROWS, "timestamp", lambda column: set_rows(column, [30], lambda time: time + 2e-5))
    assert [kind for kind, *_ in found(root)] == ["missing frames", "missing frames", "timestamps"]


def test_long_episodes_may_have_times_that_float32_rounds(write_dataset):
    def add_times(columns):
        columns["timestamp"] = (np.arange(60_000) / 10).astype(np.float32)

    root, columns = write_dataset([60_000], change=add_times)
    assert np.abs(columns["timestamp"] - np.arange(60_000) / 10).max() > 1e-4
    assert found(root) == [("missing statistics", "meta/stats.json", [], None)]


@pytest.mark.parametrize("name", ["v30_video_av1", "v21_video", "v30_images"])
def test_a_wrong_fps_is_found_once(copy, edit, name):
    root = copy(name)
    edit(root / "meta/info.json", lambda info: info | {"fps": 30})
    assert found(root) == [("fps", "meta/info.json", [], None)]
    assert message(root) == "error: expected the rows' 10 per second, as their timestamps say, came fps 30"


def test_a_video_of_another_rate_is_found(copy):
    root = copy()
    encode(root / FIRST_VIDEO, [picture for picture in decode(root / FIRST_VIDEO) for _ in range(2)], fps=20)
    assert found(root) == [("video rate", FIRST_VIDEO, [0, 1], None)]


@pytest.mark.parametrize(("codec", "options"), [("libx264", {"g": "2", "crf": "30"}), ("libsvtav1", {"g": "2"})])
def test_a_frozen_camera_is_found(copy, codec, options):
    root = copy()
    pictures = decode(root / FIRST_VIDEO)
    pictures[25:] = [pictures[25]] * 33
    encode(root / FIRST_VIDEO, pictures, codec=codec, options=options)
    assert found(root) == [("frozen camera", FIRST_VIDEO, [1], 0)]
    assert message(root).startswith("warning: 10 pictures spread over the episode are alike")
    assert found(root, quick=True) == []


def test_a_camera_that_sees_the_same_again_is_not_frozen(copy):
    root = copy()
    pictures = decode(root / FIRST_VIDEO)
    for row in (0, 11, 21, 32):  # the ones looked at first
        pictures[25 + row] = pictures[25]
    encode(root / FIRST_VIDEO, pictures)
    assert found(root) == []


def test_a_camera_may_stand_still_where_the_robot_does(copy, rewrite):
    root = copy("v30_images")
    rewrite(root / ROWS, TOP, lambda column: set_rows(column, range(24, 44), lambda _: column[24].as_py()))
    assert found(root) == [("frozen camera", ROWS, [1], 0)]
    rewrite(root / ROWS, "action", lambda column: set_rows(column, range(24, 44), lambda _: column[24].as_py()))
    assert "frozen camera" not in [kind for kind, *_ in found(root)]


def test_black_pictures_are_found(copy):
    root = copy()
    pictures = decode(root / SECOND_VIDEO)
    for row in (39, *range(50, 60)):  # of episode 3 the middle and the end
        pictures[row] = np.zeros_like(pictures[row])
    encode(root / SECOND_VIDEO, pictures)
    assert found(root) == [("blank picture", SECOND_VIDEO, [3], 39)]
    assert "came a single colour, [0. 0. 0.] in RGB" in message(root)


def test_pictures_of_another_size_are_found(copy, edit):
    root = copy()
    encode(root / FIRST_VIDEO, [picture[::2, ::2] for picture in decode(root / FIRST_VIDEO)])
    assert found(root) == found(root, quick=True) == [("picture size", FIRST_VIDEO, [0, 1], None)]
    assert message(root).endswith("as in meta/info.json, came 54 x 54")


@pytest.mark.parametrize("data", [b"no picture", b"", None])
def test_images_that_do_not_decode_are_found(copy, rewrite, data):
    root, second = copy("v30_images"), "data/chunk-000/file-001.parquet"  # of episode 3
    for path, row in ((ROWS, 24), (second, 20)):
        rewrite(root / path, WRIST, lambda column, row=row: set_rows(column, [row], lambda _: {"bytes": data}))
    assert found(root) == [("undecodable picture", ROWS, [1], 0), ("undecodable picture", second, [3], 20)]
    assert found(root, quick=True) == found(root, episodes=[0, 2]) == []


@pytest.mark.parametrize("key", ["action", "observation.state"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_found(copy, rewrite, key, value):
    root = copy()
    rewrite(root / ROWS, key, lambda column: set_rows(column, range(30, 78), lambda row: [*row[:3], value, *row[4:]]))
    assert found(root) == [("not finite", ROWS, [1, 2], 5)]
    assert message(root) == f"error: {key!r} is NaN or infinite in 48 row(s) of the file"
    assert found(root, episodes=[0, 3]) == []


def freeze_dimension(root, rewrite, edit, values):
    for path in root.glob("data/*/*.parquet"):
        frames = pq.read_table(path)["frame_index"].to_pylist()
        rewrite(
            path,
            "action",
            lambda column, frames=frames: pa.array(
                [[*row[:6], values(frame)] for row, frame in zip(column.to_pylist(), frames, strict=True)], column.type
            ),
        )
    actions = LeRobotEpisodes(root, cameras=[]).column("action")[:, 6]
    stats = {"mean": actions.mean(), "std": actions.std(), "min": actions.min(), "max": actions.max()}

    def change(written):
        for name, value in stats.items():
            written["action"][name][6] = float(value)
        return written

    edit(root / "meta/stats.json", change)


def test_dimensions_that_do_not_vary_are_found(copy, rewrite, edit):
    root = copy()
    freeze_dimension(root, rewrite, edit, lambda frame: 0.5)
    assert found(root) == [("still gripper", ALL_ROWS, [], None)]
    assert message(root) == "warning: dimension 6 of 'action' (gripper) is always 0.5"

    def rename(info):
        info["features"]["action"]["names"][6] = "seventh"
        return info

    edit(root / "meta/info.json", rename)
    assert found(root) == [("constant dimension", ALL_ROWS, [], None)]


def test_dimensions_that_hardly_vary_are_found(copy, rewrite, edit):
    root = copy()
    freeze_dimension(root, rewrite, edit, lambda frame: 1.0 if frame == 39 else 0.0)  # one of 175 rows
    assert found(root) == [("still gripper", ALL_ROWS, [], None)]
    assert "is, but for fewer than 1 % of the rows on either side, 0" in message(root)


@pytest.mark.parametrize("statistic", ["mean", "std", "min", "max"])
@pytest.mark.parametrize(
    "change", [lambda values: [*values[:2], values[2] + 0.5, *values[3:]], lambda values: values[:5]]
)
def test_wrong_statistics_are_found(copy, edit, statistic, change):
    root = copy()
    edit(
        root / "meta/stats.json",
        lambda stats: stats | {"action": stats["action"] | {statistic: change(stats["action"][statistic])}},
    )
    assert found(root) == [("wrong statistics", "meta/stats.json", [], None)]
    assert f"expected {statistic} of 'action'" in message(root)
    assert found(root, episodes=[0, 1, 2]) == []  # they are of the whole


def test_statistics_without_a_column_are_found(copy, edit):
    root = copy()
    edit(root / "meta/stats.json", lambda stats: {key: stats[key] for key in stats if key != "action"})
    assert found(root) == [("missing statistics", "meta/stats.json", [], None)]


def test_wrong_statistics_of_an_episode_are_found(copy):
    root = copy("v21_video")
    path = root / "meta/episodes_stats.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["stats"]["action"]["max"][0] += 5.0
    path.write_text("\n".join(map(json.dumps, lines)))
    assert found(root) == [("wrong statistics", "meta/episodes_stats.jsonl", [], None)]


def test_repeated_rows_are_found(copy):
    root = copy()
    table = pq.read_table(root / ROWS)
    pq.write_table(pa.concat_tables([table, table[40:43]]), root / ROWS)
    assert found(root) == [("repeated rows", ROWS, [1], 15)]
    assert message(root) == "error: expected 33 rows once each, came 36, 3 of them again"
    pq.write_table(table, root / ROWS)
    shutil.copy(root / ROWS, root / "data/chunk-000/file-009.parquet")
    assert found(root) == [("repeated rows", ROWS, [0, 1, 2], 0)]


def test_missing_and_unknown_rows_are_found(copy, rewrite):
    root = copy()
    (path,) = root.glob("meta/episodes/*/file-000.parquet")
    rewrite(path, "length", lambda column: set_rows(column, [1], lambda length: length - 3))
    assert found(root, episodes=[0, 1]) == [("row count", ROWS, [1], 33)]
    rewrite(path, "length", lambda column: set_rows(column, [1], lambda length: length + 3))
    table = pq.read_table(root / ROWS)
    pq.write_table(pa.concat_tables([table[:30], table[33:]]), root / ROWS)
    assert found(root) == [("row count", ROWS, [1], 5)]
    assert message(root) == "error: expected 33 rows, as the table of episodes says, came 30"
    pq.write_table(table[25:], root / ROWS)
    assert found(root) == [("row count", ROWS, [0], None)]
    pq.write_table(table, root / ROWS)
    table = pq.read_table(path)
    pq.write_table(table.filter(pa.compute.not_equal(table["episode_index"], 1)), path)
    assert found(root) == [("row count", ROWS, [1], None), *2 * [("totals", "meta/info.json", [], None)]]


@pytest.mark.parametrize(
    ("column", "row", "value", "episode", "frame"),
    [("frame_index", 30, 6, 1, 5), ("index", 30, 29, 1, 5), ("index", 25, 24, 1, 0), ("index", 0, -1, 0, 0)],
)
def test_rows_out_of_order_are_found(copy, rewrite, column, row, value, episode, frame):
    root = copy()
    rewrite(root / ROWS, column, lambda values: set_rows(values, [row], lambda _: value))
    kinds = [each for each in found(root) if each[0] != "timestamps"]  # frame_index / fps is no longer the time
    assert kinds == [("row order", ROWS, [episode], frame)]


def test_tasks_out_of_the_table_are_found(copy, rewrite):
    root = copy()
    rewrite(root / ROWS, "task_index", lambda column: set_rows(column, [30, 31, 60], lambda _: 7))
    assert found(root) == [("unknown text", ROWS, [1, 2], 5)]
    assert message(root) == "error: expected task_index to be of the 3 texts of meta/tasks.parquet, came 7"


def test_subtasks_and_annotations_out_of_their_tables_are_found(copy, add):
    root = copy()
    pq.write_table(pa.table({"subtask_index": [0, 1], "subtask": ["reach", "lift"]}), root / "meta/subtasks.parquet")
    add(root, "subtask_index", "int64", lambda rows: pa.array([[None, -1, 0, 1][row % 4] for row in rows]))
    annotations = {"annotation": {"human.validity": {"original_key": "validity"}}}
    (root / "meta/modality.json").write_text(json.dumps(annotations))
    add(root, "validity", "int64", lambda rows: pa.array([3 if row == 70 else 1 for row in rows]))
    assert found(root) == [("unknown text", ROWS, [2], 12)]
    assert "expected validity to be of the 3 texts of meta/tasks.parquet, came 3" in message(root)
    pq.write_table(pa.table({"subtask_index": [0], "subtask": ["reach"]}), root / "meta/subtasks.parquet")
    assert len(found(root)) == 4  # of the three files of rows as well


def test_columns_that_are_not_as_declared_are_found(copy, edit, rewrite):
    root = copy()
    rewrite(root / ROWS, "action", lambda column: pa.array([row[:6] for row in column.to_pylist()]))
    assert found(root) == [("column", ROWS, [], None)]
    assert message(root).startswith("error: column 'action' should hold 78 rows of shape (7,)")
    rewrite(root / ROWS, "index", lambda column: pa.array([None, *column.to_pylist()[1:]]))
    assert ("column", ROWS, [], None) in found(root)
    feature = {"effort": {"dtype": "float32", "shape": [7]}}
    edit(root / "meta/info.json", lambda info: info | {"features": info["features"] | feature})
    assert sum(kind == "column" for kind, *_ in found(root)) == 5  # effort in each of three files


def test_wrong_totals_are_found(copy, edit):
    root = copy()
    edit(root / "meta/info.json", lambda info: info | {"total_frames": 170})
    assert found(root) == [("totals", "meta/info.json", [], None)]
    assert message(root) == "warning: expected total_frames to be 175, as in the table of episodes, came 170"


def test_the_converters_wrong_file_number_is_a_note(copy, rewrite):
    root = copy()
    (path,) = root.glob("meta/episodes/*/file-001.parquet")  # of episodes 3 to 5
    rewrite(path, "data/file_index", lambda column: pa.array([9] * len(column)))
    health = check_health(root)
    kinds = {(finding.severity, finding.kind, tuple(finding.episodes)) for finding in health.findings}
    assert kinds == {("note", "file number", (3, 4)), ("note", "file number", (5,))} and health.healthy
    assert len(LeRobotEpisodes(root)) == 175


def test_all_is_found_at_once_the_worst_first(copy, rewrite, edit):
    root = copy()
    (root / SECOND_VIDEO).unlink()
    edit(root / "meta/info.json", lambda info: info | {"total_frames": 170})
    rewrite(root / ROWS, "action", lambda column: set_rows(column, [30], lambda row: [np.nan] * 7))
    (path,) = root.glob("meta/episodes/*/file-001.parquet")  # of episodes 3 to 5
    rewrite(path, "data/file_index", lambda column: pa.array([9] * len(column)))
    health = check_health(root)
    severities = [finding.severity for finding in health.findings]
    assert severities == ["error", "error", "warning", "note", "note"] and not health.healthy
    assert health.counts == {"error": 2, "warning": 1, "note": 2}
    entry = health.findings[0].to_dict()
    assert json.loads(json.dumps(entry)) == entry and entry["severity"] == "error" and entry["mend"]


def test_findings_of_a_kind_in_one_file_are_one(tmp_path):
    findings = Findings(tmp_path)
    for episode, frame in ((3, 7), (3, 9), (4, 0)):
        findings.add("not finite", tmp_path / "a/b", f"frame {frame}", np.int64(episode), np.int64(frame))
    (finding,) = findings
    assert (finding.file, finding.message, finding.episodes, finding.frame) == ("a/b", "frame 7", [3, 4], 7)
    with pytest.raises(ValueError, match="Expected a kind of"):
        findings.add("odd", "a", "b")


def test_block_means():
    picture = np.arange(20 * 17 * 3, dtype=np.uint8).reshape(20, 17, 3)
    means = block_means(picture)
    assert means.shape == (2, 2, 3)
    np.testing.assert_allclose(means[1, 0], picture[8:16, :8].mean((0, 1)), rtol=1e-6)
    assert block_means(picture[:3, :5]).shape == (1, 1, 3)


def test_of_the_hub_videos_are_fetched_only_to_be_looked_at(goldens, hub):
    commit = hub.upload("somebody/blocks", goldens / "lerobot" / "datasets" / "v30_video_av1")
    health = check_health("somebody/blocks", quick=True)
    assert health.findings == [] and health.revision == commit
    assert not hub.fetched("videos/*") and len(hub.fetched("data/*")) == 3
    assert check_health("somebody/blocks", episodes=[0]).findings == []
    assert sorted(hub.fetched("videos/*")) == sorted(f"videos/{key}/chunk-000/file-000.mp4" for key in (TOP, WRIST))
