import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import train_demo
from typer.testing import CliRunner

from hf_vla.cli.main import app

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("model", "title", "pictures"),
    [
        ("spatialvla", "tiny SpatialVLA", ["frame.png"]),
        pytest.param("tinyvla", "tiny TinyVLA", ["frame_agentview.png", "frame_wrist.png"], marks=pytest.mark.slow),
        ("divla", "tiny DiVLA", ["frame_agentview.png", "frame_wrist.png"]),
    ],
)
def test_demo_trains_saves_reloads_and_predicts(model, title, pictures, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "train_demo.py", "--model", model, "--output", tmp_path]
    command += ["--steps", "2", "--frames", "24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "24 frames" in done.stdout
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in done.stdout.splitlines() if "│" in line}
    ours, mean, last = (
        [float(cell) for cell in rows[name]] for name in (title, "mean action", "last action, repeated")
    )
    assert len(ours) == 4 and last[0] < mean[0]  # motions are smooth
    said = re.search(r"error is ([\d.]+) times the mean action's and\s+([\d.]+) times", done.stdout).groups()
    assert [float(ratio) for ratio in said] == pytest.approx([ours[0] / mean[0], ours[0] / last[0]], rel=0.02)
    for name in ("model/model.safetensors", "model/processor_config.json", "prediction.png", *pictures):
        assert (tmp_path / name).is_file()
    (said,) = [line for line in done.stdout.splitlines() if " predict --model " in line]
    result = CliRunner().invoke(app, shlex.split(said)[1:])
    assert result.exit_code == 0 and "gripper" in result.stdout, result.output
    speaks = model == "divla"
    counts = [done.stdout.count(text) for text in ("It says what was recorded on", "in words:")]
    assert counts == ([1, 2] if speaks else [0, 0]) and ("Reasoning: " in result.stdout) == speaks
    assert ("the same, words as recorded" in rows) == speaks


def test_words_are_compared_with_the_recorded_and_with_the_most_frequent_of_the_instruction(capsys):
    recorded = np.array(["reach", "lift", "lift", "reach", "drop", "lift", "lift", "drop"], dtype=object)
    tasks = np.array([0, 0, 0, 1, 1, 0, 0, 1])
    # trained on the first four rows: the most frequent words are "lift" with task 0, and "reach" with task 1
    train_demo.compare_words(["lift", "reach", "reach"], recorded, np.array([5, 6, 7]), range(4), tasks)
    said = " ".join(capsys.readouterr().out.split())
    assert "on 33% of these frames" in said and said.endswith("right on 67%.")
