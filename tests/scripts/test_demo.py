import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_vla.cli.main import app

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("model", "title", "pictures"),
    [
        ("spatialvla", "tiny SpatialVLA", ["frame.png"]),
        ("tinyvla", "tiny TinyVLA", ["frame_agentview.png", "frame_wrist.png"]),
    ],
)
def test_demo_trains_saves_reloads_and_predicts(model, title, pictures, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "demo.py", "--model", model, "--steps", "2", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
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
