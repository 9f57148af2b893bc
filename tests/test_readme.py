"""What the README does with the shipped checkpoints works as it is printed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from hf_vla.cli.main import app
from hf_vla.evaluation.comparison import compare

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_first_snippets_predict():
    first, second, *_ = (code for language, code in BLOCKS if language == "python")
    shown = "\nassert actions.shape == (1, 16, 4) and action.shape == (4,), (actions.shape, action.shape)\n"
    done = subprocess.run([sys.executable, "-c", first + second + shown], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_first_command_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = (code for language, code in BLOCKS if language == "bash" and code.startswith("hf-vla predict"))
    words = shlex.split(command.replace("\\\n", "").replace("outputs/", f"{tmp_path}/"))
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "chunk.png").is_file()


def test_the_records_of_shipped_checkpoints_can_be_compared():
    folders = [
        ROOT / "spaces/action_demo/checkpoints" / f"{name}_metaworld" / "eval" for name in ("tinyvla", "spatialvla")
    ]
    text, data = compare(*folders)
    assert "560 pairs" in text and data
