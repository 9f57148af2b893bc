import json
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_vla.cli.eval import parse_cameras
from hf_vla.cli.main import app
from hf_vla.evaluation import probes

runner = CliRunner()


def invoke(*words):
    return runner.invoke(app, ["eval", *map(str, words)], env={"COLUMNS": "200"})


@pytest.fixture
def point(monkeypatch):
    pytest.importorskip("gymnasium")
    from hf_vla.evaluation.envs.registry import ENVS

    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "evaluation")
    monkeypatch.setitem(ENVS, "point", "point.PointTask")


@pytest.fixture(scope="module")
def checkpoint(sawyer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for part in sawyer("tinyvla"):
        part.save_pretrained(folder)
    return folder


def test_evaluates_reports_and_compares(point, checkpoint, tmp_path):
    words = (
        "--model",
        checkpoint,
        "--env",
        "point",
        "--tasks",
        "both",
        "--episodes",
        2,
        "--horizon",
        5,
        "--device",
        "cpu",
    )
    done = invoke(*words, "--out", tmp_path / "a", "--processes", 1, "--probe", "blank", "--n-action-steps", 2)
    assert done.exit_code == 0, done.output
    for text in ("left", "right", "95 % interval", "p95 ms", "probe: blank", "report.md"):
        assert text in done.output
    protocol = json.loads((tmp_path / "a" / "protocol.json").read_text())
    assert protocol["n_action_steps"] == 2 and protocol["checkpoint"] == str(checkpoint)
    report = (tmp_path / "a" / "report.md").read_text()
    assert "--device cpu --horizon 5 --batch-size 4 --n-action-steps 2 --probe blank" in report
    lines = [json.loads(line) for line in (tmp_path / "a" / "episodes.jsonl").read_text().splitlines()]
    assert sorted((each["probe"], each["task"], each["seed"]) for each in lines) == [
        (probe, task, seed) for probe in ("blank", "none") for task in ("left", "right") for seed in (0, 1)
    ]
    assert (tmp_path / "a" / "report.json").exists()
    again = invoke(*words, "--out", tmp_path / "a", "--ensemble", 0.01)
    assert again.exit_code == 1 and "differs in n_action_steps: then 2, now 1" in again.output
    assert invoke(*words, "--out", tmp_path / "b", "--processes", 1, "--ensemble", 0.01).exit_code == 0
    compared = invoke("--compare", tmp_path / "a", tmp_path / "b")
    assert compared.exit_code == 0 and "2" in compared.output, compared.output


def test_says_what_is_missing():
    done = invoke("--model", "x", "--tasks", "easy")
    assert done.exit_code == 2 and "Missing --env" in done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--compare", "a", "b", "--out", "y", "--card"), "no use for --out, --card"),
        (("--model", "x", "--open-loop", "y", "--card", "--probe", "blank"), "no use for --card, --probe"),
    ],
)
def test_says_what_has_no_use(checkpoint, words, said):
    words = [checkpoint if word == "x" and "--open-loop" in words else word for word in words]
    done = invoke(*words)
    assert done.exit_code == 2 and said in " ".join(done.output.replace("│", "").split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--probe", "blnk"), "Did you mean 'blank'"),
        (("--probe", "swap"), "select more than 'left'"),
        (("--open-loop", "nowhere"), "nowhere"),
    ],
)
def test_says_before_any_episode_what_cannot_be_run(point, checkpoint, tmp_path, words, said):
    plan = ("--model", checkpoint, "--env", "point", "--tasks", "one", "--out", tmp_path, "--device", "cpu")
    done = invoke(*plan, *words)
    assert done.exit_code == 1 and said in done.output and not list(tmp_path.iterdir())


def test_says_which_simulators_there_are(point, checkpoint):
    done = invoke("--model", checkpoint, "--env", "metawrold", "--tasks", "easy")
    assert done.exit_code == 1 and "Did you mean 'metaworld'" in done.output


def test_reads_cameras():
    assert parse_cameras(["front=corner4", "wrist=gripperPOV"]) == {"front": "corner4", "wrist": "gripperPOV"}
    for values in (["front"], ["=corner"], ["front="], ["front=a", "front=b"]):
        with pytest.raises(Exception, match="Expected ROLE=NAME"):
            parse_cameras(values)


def test_compares_with_recorded_actions(point, checkpoint, demos, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "probe_dataset", partial(probes.probe_dataset, frames=3))
    recorded = demos.parent / "metaworld_demos"
    common = ("--model", checkpoint, "--open-loop", recorded, "--device", "cpu", "--num-inference-steps", 2)
    done = invoke(*common, "--out", tmp_path / "alone")
    assert done.exit_code == 0 and "Variance explained" in done.output, done.output
    result = json.loads((tmp_path / "alone" / "open_loop.json").read_text())
    assert result["dimensions"] == ["x", "y", "z", "gripper"] and len(result["rmse"]) == 4
    assert [file.name for file in (tmp_path / "alone").iterdir()] == ["open_loop.json"]
    words = ("--env", "point", "--tasks", "one", "--episodes", 1, "--horizon", 2, "--processes", 1)
    done = invoke(*common, "--out", tmp_path, *words)
    assert done.exit_code == 0, done.output
    assert "Open loop" in (tmp_path / "report.md").read_text() and (tmp_path / "open_loop.json").exists()
    done = invoke(*common, "--tasks", "one")
    assert done.exit_code == 2 and "Missing --env" in done.output


@pytest.mark.parametrize(
    ("fault", "said"),
    [("missing", "pip install 'hf-vla[sim]'"), ("assets", "The point's assets"), ("egl", "apt-get install libegl1")],
)
def test_says_how_to_get_a_simulator(point, checkpoint, tmp_path, monkeypatch, fault, said):
    monkeypatch.setenv("POINT_FAULT", f"{fault} - -1 -1 -")
    done = invoke("--model", checkpoint, "--env", "point", "--tasks", "one", "--out", tmp_path, "--device", "cpu")
    assert done.exit_code == 1 and said in done.output and "Traceback" not in done.output


def test_ctrl_c_says_how_to_go_on(point, checkpoint, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_vla.evaluation.rollout._Rollout.run", interrupt)
    done = invoke("--model", checkpoint, "--env", "point", "--tasks", "one", "--out", tmp_path, "--device", "cpu")
    assert done.exit_code != 0 and "the same command goes on" in done.output
