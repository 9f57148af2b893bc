import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_vla.cli.main import app

ROOT = Path(__file__).parents[2]
TINYVLA = ROOT / "spaces" / "action_demo" / "checkpoints" / "tinyvla_metaworld"


def doctor(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def doubtful(tmp_path_factory):
    """A checkpoint that leaves out the rate of its actions: a warning."""
    folder = tmp_path_factory.mktemp("doubtful") / "checkpoint"
    shutil.copytree(TINYVLA, folder, ignore=shutil.ignore_patterns("eval"))
    content = json.loads((folder / "processor_config.json").read_text())
    content["action_config"]["specs"]["push"]["action"]["control_hz"] = None
    (folder / "processor_config.json").write_text(json.dumps(content))
    return folder


def test_a_healthy_checkpoint_exits_with_0(tmp_path):
    result = doctor(TINYVLA, "--device", "cpu", "--out", tmp_path / "report", "--strict")
    assert result.exit_code == 0, result.output
    rows = [line.split()[:2] for line in result.stdout.splitlines() if line.startswith("  ") and line.strip()]
    assert ["looks", "pass"] in rows and ["listens", "pass"] in rows and not any("fail" in row for row in rows)
    assert result.stdout.splitlines()[-1].endswith("20 pass, 0 warn, 0 fail.")
    saved = json.loads((tmp_path / "report" / "doctor.json").read_text())
    assert saved["counts"] == {"pass": 20, "warn": 0, "fail": 0}
    assert "| looks | pass | With corner4 black" in (tmp_path / "report" / "report.md").read_text()


def test_a_warning_fails_with_strict_alone(doubtful):
    assert doctor(doubtful, "--device", "cpu").exit_code == 0
    result = doctor(doubtful, "--device", "cpu", "--strict")
    assert result.exit_code == 1 and "control_hz, the rate at which" in " ".join(result.stdout.split())


def test_scripts_get_json_and_1_for_a_failure(doubtful, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(doubtful, broken)
    (broken / "pytorch_model.bin").write_bytes(b"")
    result = doctor(broken, "--device", "cpu", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["counts"]["fail"] == 1 and found["lines"][0]["check"] == "files"
    assert found["lines"][0]["measured"] == {"files": ["pytorch_model.bin"]}


def test_what_is_not_there_is_one_sentence(tmp_path):
    result = doctor(tmp_path / "nowhere")
    assert result.exit_code == 1 and "no such folder" in result.stderr and "Traceback" not in result.output
    result = doctor(TINYVLA, "--episodes", "0")
    assert result.exit_code == 2 and "give --dataset" in result.output
    result = doctor(TINYVLA, "--device", "cuda:77")
    assert result.exit_code == 1 and not result.stdout and "Cannot use the device 'cuda:77'" in result.stderr


def test_a_name_on_the_hub(hub, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(TINYVLA, folder, ignore=shutil.ignore_patterns("eval"))
    (folder / "pytorch_model.bin").write_bytes(b"any code")
    hub.upload("someone/tinyvla", folder, kind="model")
    result = doctor("someone/tinyvla", "--device", "cpu", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 1 and found["counts"] == {"pass": 19, "warn": 0, "fail": 1}
    assert found["lines"][0]["measured"] == {"files": ["pytorch_model.bin"]}
    assert hub.fetched("*model.safetensors") and not hub.fetched("*pytorch_model.bin")  # seen, and left alone


def test_a_name_that_is_not_on_the_hub_is_one_sentence(hub):
    result = doctor("someone/nothing", "--device", "cpu")
    assert result.exit_code == 1 and not result.stdout
    assert "'someone/nothing' is not on the Hub, or it is private" in result.stderr and hub.url not in result.stderr


def test_offline_what_was_fetched_is_examined(hub, monkeypatch):
    from huggingface_hub import close_session, constants

    hub.upload("someone/tinyvla", TINYVLA, kind="model")
    assert doctor("someone/tinyvla", "--device", "cpu").exit_code == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    result = doctor("someone/tinyvla", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "the Hub could not be asked for the rest" in " ".join(result.stdout.split())
    result = doctor("someone/nothing", "--device", "cpu")
    assert result.exit_code == 1 and "HF_HUB_OFFLINE is set" in result.stderr
