import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_vla.actions.codec import ActionCodec
from hf_vla.actions.statistics import ActionStatistics
from hf_vla.cli.main import app
from hf_vla.cli.stats import folder_names, parse_numbers
from hf_vla.data.lerobot import LeRobotEpisodes


def stats(*arguments):
    return CliRunner().invoke(app, ["stats", *map(str, arguments)], env={"COLUMNS": "2000"})


@pytest.fixture
def datasets(goldens):
    return goldens / "lerobot" / "datasets"


def test_shows_every_dimension_and_writes_what_a_checkpoint_needs(datasets, tmp_path):
    root = datasets / "v30_video_av1"
    result = stats(root, "--out", tmp_path / "out", "--chunk-size", 4)
    assert result.exit_code == 0, result.output
    dataset = LeRobotEpisodes(root)
    actions = dataset.column("action")
    assert f"{root}: {dataset.num_episodes} episodes, {len(dataset)} rows" in result.stdout
    row = next(line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["pitch"])
    low, high = np.quantile(actions[:, 4].astype(float), [0.01, 0.99])
    mean, std = actions[:, 4].mean(dtype=float), actions[:, 4].std(dtype=float)
    expected = (actions[:, 4].min(), low, mean, std, high, actions[:, 4].max())
    assert row[1:] == [f"{value:.4g}" for value in expected]
    for line in ("uniform: fitted, 256 ids", "gaussian_grid: fitted, 8,194 ids", f"Wrote {tmp_path}/out"):
        assert line in result.stdout.splitlines()

    folder = tmp_path / "out" / "v30_video_av1"
    names = ["action.png", "gaussian_grid.png", "grids.json", "observation.state.png", "stats.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    written = json.loads((folder / "stats.json").read_text())
    lerobot = json.loads((root / "meta/stats.json").read_text())
    for key in ("action", "observation.state"):
        assert written[key].keys() >= {"min", "max", "mean", "std", "count", "q01", "q99"}
        np.testing.assert_allclose(written[key]["mean"], lerobot[key]["mean"], rtol=1e-5, atol=1e-6)
        assert written[key]["count"] == lerobot[key]["count"]
        assert ActionStatistics.from_dict(written[key]).count == len(dataset)
    grids = json.loads((folder / "grids.json").read_text())
    for entry in grids.values():
        codec = ActionCodec({"mine": written}, {"chunk_size": 4, **entry})
        assert codec.decode(codec.encode(actions[None, :4], "mine"), "mine").shape == (1, 4, 7)
    for path in folder.glob("*.png"):
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").resize((200, 200)).getcolors(40_000)) > 50  # something is drawn


def test_datasets_of_one_robot_are_merged(datasets, tmp_path):
    roots = [datasets / "v30_video_av1", datasets / "v21_video"]
    result = stats(*roots, "--out", tmp_path, "--workers", 2, "--columns", "action")
    assert result.exit_code == 0, result.output
    actions = np.concatenate([LeRobotEpisodes(root).column("action") for root in roots]).astype(float)
    assert f"merged: 11 episodes, {len(actions)} rows" in result.stdout
    written = json.loads((tmp_path / "merged" / "stats.json").read_text())["action"]
    np.testing.assert_allclose(written["q99"], np.quantile(actions, 0.99, axis=0))
    np.testing.assert_allclose(written["mean"], actions.mean(0), rtol=1e-12, atol=1e-15)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "v21_video", "v30_video_av1"]
    order = [result.stdout.index(f"{name}: ") for name in (*roots, "merged")]
    assert order == sorted(order)


def test_other_dimensions_are_not_merged_and_that_is_said(datasets, tmp_path, monkeypatch):
    demos = datasets.parents[3] / "scripts" / "data" / "metaworld_demos"
    root = datasets / "v30_images"
    result = stats(root, demos, "--columns", "action")
    assert result.exit_code == 0, result.output
    assert f"action is not merged, since its dimensions differ: 7 in {root}, 4 in {demos}." in result.stdout
    assert "merged:" not in result.stdout and "observation.state" not in result.stdout


def test_columns_and_episodes_are_chosen(datasets):
    root = datasets / "v30_images"
    result = stats(root, "--columns", "observation.state", "--episodes", "0,2-3")
    rows = len(LeRobotEpisodes(root, episodes=[0, 2, 3]))
    assert f"{root}: 3 episodes, {rows} rows" in result.stdout and f"observation.state, {rows} rows" in result.stdout
    assert "action" not in result.stdout


def test_bad_rows_and_constant_dimensions_are_said(datasets, tmp_path):
    root = shutil.copytree(datasets / "v30_images", tmp_path / "[odd]")
    for path in sorted(root.glob("data/*/*.parquet"), reverse=True):
        table = pq.read_table(path)
        actions = np.stack(table["action"].to_pylist()).astype(np.float32)
        actions[:, 2] = 0.125
        actions[7, 0] = np.nan if path.name == "file-000.parquet" else 0.0
        place = table.column_names.index("action")
        pq.write_table(table.set_column(place, "action", [list(actions)]), path)
    episode, frame = (table[key][7].as_py() for key in ("episode_index", "frame_index"))
    result = stats(root)
    assert result.exit_code == 0, result.output
    assert f"1 row(s) of action are NaN or infinite and left out here; training refuses them: episode {episode} " in (
        result.stdout
    )
    assert f"frame {frame}." in result.stdout
    assert "Dimension 2 of action (z) is constant at 0.125 (never varies)" in result.stdout
    assert result.stderr == ""  # nothing is said twice


def test_errors_are_one_readable_sentence(datasets, tmp_path):
    root = datasets / "v30_images"
    twin = shutil.copytree(root, tmp_path / "v30_images")
    wrong = {
        (tmp_path / "lost",): f"{tmp_path}/lost: no such folder",
        (root, "--columns", "lost"): f"{root}: expected a row of numbers under 'lost', came no column; there are ",
        (root, "--episodes", "3-x"): "Expected --episodes to be numbers and ranges like '0,3,10-20', came '3-x'.",
        (root, "--episodes", "99"): f"{root}: expected episodes of its 4, 0 to 3, came [99].",
        (root, "--revision", "main"): f"{root}: revision 'main' is of a dataset on the Hub",
        (root, root): "Expected every dataset once",
        (root, twin): "Expected every dataset once",
    }
    for arguments, message in wrong.items():
        result = stats(*arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: {message}") and "Traceback" not in result.output


def test_numbers_and_folders():
    assert parse_numbers("0, 3,10-12,5-5") == [0, 3, 10, 11, 12, 5]
    for text in ("", "1,", "-3", "4-2", "1-2-3", "a"):
        with pytest.raises(ValueError, match="Expected --episodes"):
            parse_numbers(text)
    assert folder_names(["lerobot/pusht"]) == {"lerobot/pusht": "lerobot__pusht"}


def test_help_answers_without_the_library():
    code = (
        "import sys; from typer.testing import CliRunner; from hf_vla.cli.main import app\n"
        "assert CliRunner().invoke(app, ['stats', '--help']).exit_code == 0\n"
        "sys.exit(str([name for name in ('torch', 'pyarrow', 'matplotlib', 'transformers') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_actions_without_names_have_a_grid_where_they_are_said_to_be_an_end_effectors(datasets, tmp_path):
    root = tmp_path / "unnamed"
    shutil.copytree(datasets / "v30_video_av1", root, ignore=shutil.ignore_patterns("videos"))
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"]["names"] = None
    (root / "meta/info.json").write_text(json.dumps(info))
    result = stats(root)
    assert "gaussian_grid: not fitted, the grid bins an end effector's translation" in result.stdout
    assert "gaussian_grid: fitted, 8,194 ids" in stats(root, "--end-effector").stdout
