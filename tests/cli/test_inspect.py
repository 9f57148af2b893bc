import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hf_vla.cli.inspect import ranges
from hf_vla.cli.main import app
from hf_vla.cli.stats import parse_numbers

WRIST = "observation.images.wrist"


def inspect(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def copy(goldens, tmp_path):
    def make(name="v30_video_av1"):
        return shutil.copytree(goldens / "lerobot" / "datasets" / name, tmp_path / "[odd]")

    return make


def test_shows_what_is_in_a_dataset(demos):
    result = inspect(demos)
    assert result.exit_code == 0, result.output
    size = sum(path.stat().st_size for path in demos.rglob("*") if path.is_file()) / 1e6
    lines = [line.strip() for line in result.stdout.splitlines()]
    for line in (
        f"{demos}: LeRobot v3.0, robot panda, 20 fps, {size:,.1f} MB in {demos}",
        "22 episodes of 33 to 136 rows (median 68), 1,584 rows, 0.022 hours",
        "task_index: 3 texts, 3 used",
        "281 rows: 'pick up the red cube'",
        "subtask_index: 12 texts, 12 used",
        f"{demos}: 22 episodes checked, 0 error(s), 0 warning(s), 0 note(s).",
    ):
        assert line in lines
    rows = [line.split(maxsplit=4) for line in lines]
    assert ["action", "float32", "7", "dx,", "dy, dz, drx, dry, drz, gripper"] in rows
    assert [WRIST, "video", "96", "x", "96 x 3   av1"] in rows
    assert not result.stderr


def test_json_holds_the_same(demos):
    result = inspect(demos, "--json", "--episodes", "0,3-4", "--quick")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    contents = report.pop("contents")
    assert report == {"findings": [], "errors": 0, "warnings": 0, "notes": 0, "decoded": False}
    lengths = pq.read_table(demos / "meta/episodes", columns=["episode_index", "length"]).to_pylist()
    lengths = [row["length"] for row in lengths if row["episode_index"] in (0, 3, 4)]
    spread = {"min": min(lengths), "median": float(np.median(lengths)), "max": max(lengths)}
    assert contents["episodes"] == 3 and contents["rows"] == sum(lengths) and contents["episode_lengths"] == spread
    assert contents["cameras"][WRIST] == {"dtype": "video", "shape": [96, 96, 3], "codec": "av1"}
    assert contents["columns"]["action"]["names"][-1] == "gripper" and "action" not in contents["cameras"]
    assert contents["texts"]["task_index"]["texts"] == 3 and contents["revision"] is None
    assert sum(entry["rows"] for entry in contents["texts"]["task_index"]["most_frequent"]) == sum(lengths)


def test_errors_have_file_episode_and_frame_and_exit_code_1(copy):
    root = copy()
    (root / f"videos/{WRIST}/chunk-000/file-001.mp4").unlink()
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    actions = np.stack(table["action"].to_pylist()).astype(np.float32)
    actions[[30, 60], 2] = np.nan
    pq.write_table(table.set_column(table.column_names.index("action"), "action", [list(actions)]), path)
    result = inspect(root)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert f"error: missing file: videos/{WRIST}/chunk-000/file-001.mp4, episode 2-3" in lines
    place = lines.index("error: not finite: data/chunk-000/file-000.parquet, episode 1-2, first in frame 5")
    assert lines[place + 1].startswith(
        "    'action' is NaN or infinite in 2 row(s) of the file; leave the episodes out"
    )
    assert lines[-1] == f"{root}: 6 episodes checked, 2 error(s), 0 warning(s), 0 note(s)."
    assert inspect(root, "--episodes", "0,4-5").exit_code == 0
    report = json.loads(inspect(root, "--json").stdout)
    assert report["errors"] == 2 and [each["kind"] for each in report["findings"]] == ["not finite", "missing file"]
    assert report["findings"][0]["episodes"] == [1, 2] and report["findings"][0]["frame"] == 5


def test_warnings_alone_leave_the_exit_code_0(copy):
    root = copy("v30_images")
    path = root / "data/chunk-000/file-001.parquet"
    table = pq.read_table(path)
    place = table.column_names.index(WRIST)
    still = pa.array([table[WRIST][0].as_py()] * len(table), table[WRIST].type)
    pq.write_table(table.set_column(place, WRIST, still), path)
    result = inspect(root)
    assert result.exit_code == 0
    assert "warning: frozen camera: data/chunk-000/file-001.parquet, episode 3, frame 0" in result.stdout
    assert "1 warning(s)" in result.stdout
    quick = inspect(root, "--quick")
    assert quick.stdout.endswith("0 error(s), 0 warning(s), 0 note(s); no picture was decoded.\n")


def test_empty_tasks_are_counted(copy):
    root = copy("v21_video")
    path = root / "meta/tasks.jsonl"
    tasks = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(task | {"task": "  "} if task["task_index"] else task) for task in tasks))
    result = inspect(root)
    assert result.exit_code == 0 and "task_index: 3 texts, 2 of them empty, 3 used" in result.stdout


def test_tasks_that_are_not_there_are_not_counted(copy):
    root = copy()
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    tasks = pa.array([7 if row == 30 else task for row, task in enumerate(table["task_index"].to_pylist())])
    pq.write_table(table.set_column(table.column_names.index("task_index"), "task_index", tasks), path)
    result = inspect(root, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    (finding,) = report["findings"]
    assert (finding["kind"], finding["episodes"], finding["frame"]) == ("unknown text", [1], 5)
    counted = report["contents"]["texts"]["task_index"]
    assert counted["used"] == 3 and sum(entry["rows"] for entry in counted["most_frequent"]) == 174


def test_a_dataset_whose_episodes_cannot_be_read_is_shown_all_the_same(copy):
    root = copy("v21_video")
    (root / "meta/episodes.jsonl").unlink()
    result = inspect(root)
    assert result.exit_code == 1
    assert "LeRobot v2.1" in result.stdout and "error: missing file: meta/episodes.jsonl" in result.stdout
    assert json.loads(inspect(root, "--json").stdout)["contents"]["episodes"] == 0


def test_what_is_no_dataset_is_one_readable_sentence(tmp_path, demos):
    wrong = {
        (tmp_path,): f"{tmp_path}/meta/info.json is missing",
        (tmp_path / "lost",): f"{tmp_path}/lost: no such folder",
        (demos, "--episodes", "99"): f"{demos}: expected episodes of its 22, came [99].",
        (demos, "--episodes", "x"): "Expected --episodes to be numbers and ranges",
    }
    for arguments, message in wrong.items():
        result = inspect(*arguments)
        assert result.exit_code == 1 and result.stderr.startswith(f"Error: {message}")


def test_ranges_are_what_episodes_takes():
    assert ranges([3, 1, 2, 7, 9, 10]) == "1-3,7,9-10"
    assert parse_numbers(ranges([3, 1, 2, 7])) == [1, 2, 3, 7]
    assert ranges(range(0, 40, 2)) == "0,2,4,6,8,10,12,14,... (20 in all)"
