import json
import re
import subprocess
import sys
from pathlib import Path

import demo
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModel

ROOT = Path(__file__).parents[2]
CHECKPOINTS = sorted((ROOT / "spaces" / "action_demo" / "checkpoints").glob("*/config.json"))
SHIPPED = [path.parent for path in CHECKPOINTS]
HIDE = "sys.modules |= dict.fromkeys(('gymnasium', 'metaworld', 'robosuite'))"  # whether they are installed or not
RUN = """
import runpy, sys
{hide}
sys.argv = {arguments}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_demo(output, name, hide=""):
    arguments = ["scripts/demo.py", "--model", name, "--output", str(output)]
    code = RUN.format(hide=hide, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tinyvla_predicts_a_held_out_frame_and_says_how_to_get_the_simulators(tmp_path):
    said = run_demo(tmp_path, "tinyvla", HIDE)
    frame = json.loads((SHIPPED[0].parent / "tinyvla_metaworld" / "frame.json").read_text())
    actions = np.array(frame["actions"])
    cells = [re.findall(r"(-?\d\.\d\d) \| (-?\d\.\d\d)", line) for line in said.splitlines()]
    recorded, predicted = np.array([row for row in cells if row], dtype=float).transpose(2, 0, 1)
    assert recorded == pytest.approx(actions, abs=0.0051)
    (error,) = re.findall(r"Mean absolute error (\d\.\d+)", said)
    assert float(error) == pytest.approx(np.abs(recorded - predicted).mean(), abs=0.006)
    # it has learnt: nearer to what was recorded than to stand still
    assert float(error) < np.abs(actions).mean()
    assert frame["task"] in said and "-e '.[sim]'" in said and (tmp_path / "prediction.png").is_file()
    assert not (tmp_path / "rollout.gif").exists()


def test_a_family_without_a_checkpoint_is_said_to_have_none(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = [folder.name for folder in SHIPPED]
    assert [demo.find_checkpoint(name).name for name in names] == names
    assert demo.find_checkpoint("tinyvla").name == "tinyvla_metaworld"
    with pytest.raises(
        SystemExit, match="No checkpoint of tiny is shipped; there are: .*tinyvla_metaworld.*train-demo"
    ):
        demo.find_checkpoint("tiny")


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_shipped_checkpoints_are_float16_on_disk_and_float32_at_work(folder):
    with safe_open(folder / "model.safetensors", "pt") as weights:
        stored = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118 (not a dictionary)
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    model = AutoModel.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert all(torch.equal(model.state_dict()[name], tensor.to(torch.float32)) for name, tensor in stored.items())
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 20e6
    assert not list(folder.rglob("*.bin"))


@pytest.mark.sim
@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.name)
def test_shipped_checkpoints_act_and_are_filmed(folder, tmp_path):
    said = run_demo(tmp_path, folder.name)
    ((success, steps, seconds),) = re.findall(r"(success after|no success in) (\d+) steps, ([\d.]+) s of", said)
    durations = []
    with Image.open(tmp_path / "rollout.gif") as film:
        assert film.size == (240, 240)
        for number in range(film.n_frames):
            film.seek(number)
            durations.append(film.info["duration"])
    assert sum(durations) / 1000 == pytest.approx(float(seconds), abs=0.15)  # as fast as the robot
    assert int(steps) > 0 and "seed 500000" in said
    assert (tmp_path / "rollout.gif").stat().st_size < 2**20
