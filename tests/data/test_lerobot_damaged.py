"""Datasets with something missing, doubled or spoilt: an error that names the place, never a wrong row."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_vla.data.lerobot import LeRobotEpisodes

WRIST = "observation.images.wrist"


def encoded(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


WHOLE = encoded(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))


@pytest.mark.parametrize("key", ["action", "observation.state"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_errors_that_name_the_place(copy, key, value, rewrite):
    root = copy()

    def spoil(column):
        rows = column.to_pylist()
        rows[35 - 25 + 25][2] = value  # the file begins with episode 0 (25 rows); episode 1, frame 10
        return pa.array(rows, column.type)

    rewrite(root / "data/chunk-000/file-000.parquet", key, spoil)
    with pytest.raises(ValueError, match=rf"v30_video_av1: '{key}' is NaN or infinite .* episode 1, frame 10"):
        LeRobotEpisodes(root)
    assert len(LeRobotEpisodes(root, episodes=[0, 2])) == 45


@pytest.mark.parametrize("version", ["v1.6", "v3.1", None])
def test_other_versions_are_errors_that_name_them(copy, version, edit):
    root = copy()
    edit(root / "meta/info.json", lambda info: info | {"codebase_version": version})
    with pytest.raises(ValueError, match=rf"version v2.0 or v2.1 or v3.0, came {version!r}"):
        LeRobotEpisodes(root)


@pytest.mark.parametrize("name", ["meta/info.json", "meta/tasks.parquet", "meta/stats.json", "data", "meta/episodes"])
def test_missing_files_are_named(copy, name):
    root = copy()
    shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        LeRobotEpisodes(root).statistics  # noqa: B018


def test_a_missing_video_is_named_with_the_frame_that_needs_it(copy):
    root = copy()
    (root / f"videos/{WRIST}/chunk-000/file-001.mp4").unlink()
    dataset = LeRobotEpisodes(root)
    assert dataset[0][WRIST].shape == (3, 72, 72)
    with pytest.raises(FileNotFoundError, match=r"episode 2, frame 3, .*wrist: .*file-001.mp4: no such file"):
        dataset[61]


def test_missing_entries_rows_and_columns_are_errors(copy, edit):
    root = copy()
    edit(root / "meta/info.json", lambda info: info | {"video_path": None})
    with pytest.raises(ValueError, match=r"info.json: \['video_path'\] missing"):
        LeRobotEpisodes(root)
    shutil.rmtree(root)
    root = copy()
    pq.write_table(
        pq.read_table(root / "data/chunk-000/file-001.parquet")[:50], root / "data/chunk-000/file-001.parquet"
    )
    with pytest.raises(ValueError, match="gives episode 4 21 rows, the data files have 10 for it"):
        LeRobotEpisodes(root)
    shutil.rmtree(root)
    root = copy()
    feature = {"effort": {"dtype": "float32", "shape": [7]}}
    edit(root / "meta/info.json", lambda info: info | {"features": info["features"] | feature})
    with pytest.raises(ValueError, match=r"declares the columns \['effort'\], the file has .*'action'"):
        LeRobotEpisodes(root)
    shutil.rmtree(root)
    root = copy()
    edit(root / "meta/info.json", lambda info: json.loads(json.dumps(info).replace("[7]", "[6]")))
    with pytest.raises(
        ValueError, match=r"file-000.parquet: column '.*' should hold 78 rows of shape \(6,\), but holds 546 values"
    ):
        LeRobotEpisodes(root)


@pytest.mark.parametrize(("episode", "length"), [(4, 21), (5, 36)])  # in the middle and at the end
def test_rows_written_twice_are_errors(copy, episode, length):
    root = copy()
    for path in root.glob("data/*/*.parquet"):
        table = pq.read_table(path)
        again = [row for row, number in enumerate(table["episode_index"].to_pylist()) if number == episode]
        pq.write_table(pa.concat_tables([table, table.take(pa.array(again[-3:], pa.int64()))]), path)
    message = f"gives episode {episode} {length} rows, the data files have {length + 3} for it; .* or written twice"
    with pytest.raises(ValueError, match=message):
        LeRobotEpisodes(root)


@pytest.mark.parametrize(
    ("column", "row", "value", "place"),
    [
        ("index", 30, 29, "index 29, episode 1, frame 5,"),
        ("index", 30, 54, "index 31, episode 1, frame 6,"),
        ("frame_index", 30, 6, "index 30, episode 1, frame 6,"),
        ("frame_index", 0, -1, "index 0, episode 0, frame -1,"),
        ("index", 30, -1, "index -1, episode 1, frame 5,"),
    ],
)
def test_rows_out_of_order_are_errors(copy, column, row, value, place, rewrite):
    root = copy()
    rewrite(
        root / "data/chunk-000/file-000.parquet",
        column,
        lambda old: pa.array(np.where(np.arange(len(old)) == row, value, np.asarray(old))),
    )
    with pytest.raises(ValueError, match=f"v30_video_av1: the row of {place} does not follow the one before it"):
        LeRobotEpisodes(root)


def test_rows_of_two_episodes_in_each_others_place_are_errors(copy, rewrite):
    root = copy()
    swap = {5: 30, 30: 5}  # frame 5 of episodes 0 and 1
    rewrite(
        root / "data/chunk-000/file-000.parquet",
        "index",
        lambda old: pa.array([swap.get(index, index) for index in old.to_pylist()]),
    )
    with pytest.raises(ValueError, match="the row of index 5, episode 1, frame 5, does not follow the one before it"):
        LeRobotEpisodes(root)


@pytest.mark.parametrize("task", [-1, 3])
def test_a_task_that_is_not_there_is_an_error_that_names_the_row(copy, task, rewrite):
    root = copy()
    rewrite(
        root / "data/chunk-000/file-000.parquet",
        "task_index",
        lambda old: pa.array(np.where(np.arange(len(old)) == 30, task, np.asarray(old))),
    )
    message = rf"v30_video_av1: task_index {task} of episode 1, frame 5 is none of the dataset's 3 task\(s\); add"
    with pytest.raises(ValueError, match=message):
        LeRobotEpisodes(root)
    assert len(LeRobotEpisodes(root, episodes=[0, 2])) == 45


def test_tasks_may_be_empty_but_not_missing(copy):
    root = copy("v21_video")
    path = root / "meta/tasks.jsonl"
    tasks = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(task | {"task": ""}) for task in tasks))
    assert LeRobotEpisodes(root, cameras=[])[0]["task"] == ""
    path.write_text("\n".join(json.dumps(task) for task in tasks if task["task_index"] != 0))
    message = rf"task_index 0 of episode \d, frame 0 is none of the dataset's {len(tasks) - 1} task"
    with pytest.raises(ValueError, match=message):
        LeRobotEpisodes(root)


@pytest.mark.parametrize("mark", ["\u2028", "\u0085"])
def test_a_task_may_hold_what_ends_a_line_of_text(copy, mark):
    root = copy("v21_video")
    path = root / "meta/tasks.jsonl"
    tasks = [json.loads(line) | {"task": f"first{mark}then"} for line in path.read_text().splitlines()]
    path.write_bytes("\r\n".join(json.dumps(task, ensure_ascii=False) for task in tasks).encode())
    assert LeRobotEpisodes(root, cameras=[])[-1]["task"] == f"first{mark}then"


def renamed(old, new):
    return lambda text: text.replace(f'"{old}"', f'"{new}"', 1)


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("v30_video_av1", "meta/info.json", lambda text: text[:300], r"info.json: cannot be read as JSON .* complete"),
        ("v30_video_av1", "meta/info.json", lambda text: f"[{text}]", r"info.json: expected an object with entries, "),
        ("v30_video_av1", "meta/info.json", renamed("dtype", "type"), "a dtype and a shape of"),
        ("v30_video_av1", "meta/info.json", renamed("shape", "size"), "a dtype and a shape of"),
        (
            "v21_video",
            "meta/info.json",
            lambda text: text.replace("{episode_chunk", "{chunk_index"),
            r"info.json: expected data_path to be a template of episode_chunk and episode_index, as v2.1 has it, came",
        ),
        (
            "v30_video_av1",
            "meta/info.json",
            lambda text: text.replace("{video_key}", "{camera}"),
            r"info.json: expected video_path to be a template of chunk_index and file_index, as v3.0 has it, came",
        ),
        ("v21_video", "meta/episodes.jsonl", lambda text: "\n", "one episode or more in the table of episodes, came"),
        ("v21_video", "meta/episodes.jsonl", lambda text: text[:-20], r"jsonl, line 5: cannot be read as JSON"),
        (
            "v21_video",
            "meta/episodes.jsonl",
            renamed("length", "size"),
            r"jsonl, line 1: expected an object with episode_index, length, came \{'episode_index': 0, ",
        ),
        ("v21_video", "meta/tasks.jsonl", renamed("task", "text"), "line 1: .* task_index, task,"),
        (
            "v21_video",
            "meta/episodes_stats.jsonl",
            renamed("mean", "average"),
            r"meta/episodes_stats.jsonl: expected mean, std, count, min and max .* \(KeyError\('mean'\)\)",
        ),
        ("v30_video_av1", "meta/stats.json", lambda text: text[:-3], r"meta/stats.json: cannot be read as JSON"),
    ],
)
def test_damaged_tables_are_errors_that_name_the_file(copy, name, file, change, message):
    root = copy(name)
    text = (root / file).read_text()
    assert change(text) != text
    (root / file).write_text(change(text))
    with pytest.raises(ValueError, match=message):
        LeRobotEpisodes(root).statistics  # noqa: B018


def test_an_episode_may_lack_the_statistics_of_a_column(copy):
    """As LeRobot's own merging allows."""
    root = copy("v21_video")
    expected = LeRobotEpisodes(root, cameras=[]).statistics
    path = root / "meta/episodes_stats.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[0]["stats"]["action"]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = LeRobotEpisodes(root, cameras=[]).statistics
    assert found.keys() == expected.keys()
    assert found["action"]["count"] == expected["action"]["count"] - rows[0]["stats"]["observation.state"]["count"][0]
    np.testing.assert_array_equal(found["observation.state"]["mean"], expected["observation.state"]["mean"])


def test_tasks_out_of_order_are_an_error(copy):
    """LeRobot reads a task by its row, whatever number the row gives."""
    root = copy()
    path = root / "meta/tasks.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([2, 1, 0]), path)
    with pytest.raises(ValueError, match=r"in the order of their task_index, came \[2, 1, 0\]; sort them"):
        LeRobotEpisodes(root)
    pq.write_table(table.drop_columns("task_index"), path)
    assert LeRobotEpisodes(root, cameras=[]).tasks[0] == "pick up the red block"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded(np.full((8, 8), 40_000, np.uint16)), "expected 8 bits per channel, came mode 'I;16'; see `cameras`"),
        (WHOLE[: len(WHOLE) // 2], "truncated"),
        (WHOLE[:36] + b"\0" + WHOLE[37:], "broken PNG"),
        (b"no picture", "cannot identify image file"),
        (b"", "the picture has no bytes"),
        (None, "the picture has no bytes"),
    ],
    ids=["16-bit", "cut", "changed", "text", "empty", "missing"],
)
def test_pictures_that_cannot_be_read_are_errors_that_name_the_place(copy, data, message, rewrite):
    root = copy("v30_images")
    dataset = LeRobotEpisodes(root)
    row = int(dataset.episode_starts[1]) + 3
    key = dataset.camera_keys[0]
    path = root / "data/chunk-000/file-000.parquet"

    def spoil(column):
        pictures = column.to_pylist()
        pictures[row]["bytes"] = data
        return pa.array(pictures, column.type)

    rewrite(path, key, spoil)
    place = f"v30_images, episode 1, frame 3, {key}: .*{message}"
    with pytest.raises(ValueError, match=place):
        LeRobotEpisodes(root)[row]
    with pytest.raises(ValueError, match=place):  # of the frame itself, not of the row whose window holds it
        LeRobotEpisodes(root, {key: [0.0, 1 / dataset.fps]})[row - 1]
    assert LeRobotEpisodes(root)[row + 1][key].shape[0] == 3


def test_grey_pictures_have_three_channels(copy, rewrite):
    root = copy("v30_images")
    key = LeRobotEpisodes(root).camera_keys[0]
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    path = root / "data/chunk-000/file-000.parquet"
    rewrite(path, key, lambda column: pa.array([{"bytes": encoded(grey), "path": None}] * len(column), column.type))
    np.testing.assert_array_equal((LeRobotEpisodes(root)[0][key] * 255).round(), np.stack([grey] * 3))


def test_a_source_that_is_neither_folder_nor_name_is_an_error(tmp_path):
    for source in (tmp_path / "nothing", str(tmp_path / "nothing"), "./a/b", "nothing"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            LeRobotEpisodes(source)
