import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_demo_trains_saves_reloads_and_predicts(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "demo.py", "--steps", "2", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in done.stdout.splitlines() if "│" in line}
    model, mean, last = (
        [float(cell) for cell in rows[name]] for name in ("tiny SpatialVLA", "mean action", "last action, repeated")
    )
    assert len(model) == 4 and last[0] < mean[0]  # motions are smooth
    said = re.search(r"error is ([\d.]+) times the mean action's and\s+([\d.]+) times", done.stdout).groups()
    assert [float(ratio) for ratio in said] == pytest.approx([model[0] / mean[0], model[0] / last[0]], rel=0.02)
    for name in ("model/model.safetensors", "model/processor_config.json", "frame.png", "prediction.png"):
        assert (tmp_path / name).is_file()
