import json
import sys

import pytest
from typer.testing import CliRunner

from hf_vla.cli.main import app
from hf_vla.cli.record import sizes
from hf_vla.data.lerobot import LeRobotEpisodes

WAYS = ("--env", "two_ways", "--tasks", "all")


def run(*arguments):
    return CliRunner().invoke(app, ["record", *map(str, arguments)], env={"COLUMNS": "200"})


def test_help_needs_no_simulator():
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"--{name}" in result.output for name in ("env", "tasks", "noise", "processes", "push-to-hub"))


def test_records_and_says_what(tmp_path):
    options = ("--episodes", 3, "--noise", 0.3, "--horizon", 37, "--seed", 1_000_003, "--size", "96x64")
    result = run(*WAYS, "--out", tmp_path / "[new]", *options)
    assert result.exit_code == 0, result.output
    assert "3/3 episodes, 50% success" in result.stdout
    assert ["reach-behind", "3", "3", "50%"] in [line.replace("│", " ").split() for line in result.stdout.splitlines()]
    assert result.stdout.splitlines()[-1] == f"Wrote {tmp_path}/[new]: 3 episodes."
    log = json.loads((tmp_path / "[new]" / "meta" / "recording.json").read_text())
    assert log["plan"] == {
        "env": "two_ways",
        "tasks": ["reach-behind"],
        "episodes": 3,
        "cameras": {"top": [96, 64]},
        "rendering": "fast",
        "noise": 0.3,
        "noise_steps": 1,
        "first_seed": 1_000_003,
        "horizon": 37,
    }
    dataset = LeRobotEpisodes(tmp_path / "[new]")
    assert dataset[0]["observation.images.top"].shape == (3, 64, 96) and dataset.fps == 10


def test_a_task_that_is_given_up_is_an_error_after_the_table(tmp_path):
    result = run(*WAYS, "--out", tmp_path, "--episodes", 1, "--horizon", 2, "--push-to-hub", "nobody/nothing")
    assert result.exit_code == 1
    assert "reach-behind, given up │        0 │       20 │      0%" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("Error: Gave up reach-behind after 20 failures in a row")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--env", "metawrld", "--tasks", "mt10"), "No simulator is called 'metawrld'"),
        (("--env", "metaworld", "--tasks", "mt11"), "No task or split of metaworld is called 'mt11'"),
        ((*WAYS, "--seed", 7), "Expected a first seed of 1,000,000 or more, came 7: evaluations use the seeds below"),
        ((*WAYS, "--seed", 0), "Expected a first seed of 1,000,000 or more, came 0"),
        ((*WAYS, "--size", "12by8"), "Expected --size to be pixels like 128 or 320x240, came '12by8'."),
        ((*WAYS, "--cameras", "side"), "No camera of two_ways is called 'side'"),
        ((*WAYS, "--noise", 2), "Expected noise in [0, 1]"),
        ((*WAYS, "--rendering", "none"), "Expected a rendering among"),
        ((*WAYS, "--horizon", 0), "Expected horizon to be 1 or more, came 0."),
    ],
)
def test_errors_are_one_readable_sentence_and_leave_nothing(options, message, tmp_path):
    result = run(*options, "--out", tmp_path / "new")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {message}") and result.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_simulator_that_is_not_installed_is_one_readable_sentence(tmp_path, monkeypatch):
    for module in ("metaworld", "metaworld.env_dict"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not
    result = run("--env", "metaworld", "--tasks", "reach-v3", "--out", tmp_path / "new")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: The simulator 'metaworld' needs metaworld")
    assert "pip install 'hf-vla[sim]'" in result.stderr and not (tmp_path / "new").exists()


def test_sizes_of_cameras():
    default = {"front": (640, 480), "wrist": (96, 96)}
    assert sizes(default, None, None) == default
    assert sizes(default, None, "128") == {"front": (128, 128), "wrist": (128, 128)}
    assert sizes(default, "wrist, top", None) == {"wrist": (96, 96), "top": (640, 480)}
    assert sizes(default, "top", "320x240") == {"top": (320, 240)}
    for wrong in ("", "0", "128x", "1x2x3", "-5", "96.0"):
        with pytest.raises(ValueError, match="Expected --size to be pixels"):
            sizes(default, None, wrong)
