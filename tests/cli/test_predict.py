from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_vla.actions.spec import CameraSpec, StateSpec
from hf_vla.cli.main import app
from hf_vla.cli.predict import parse_numbers


@pytest.fixture(scope="module")
def frame(demo_item, tmp_path_factory):
    path = tmp_path_factory.mktemp("frame") / "frame.png"
    pixels = demo_item["observation.images.agentview"].permute(1, 2, 0).numpy()
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path)
    return path


def predict(*arguments):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], env={"COLUMNS": "120"})


def test_prints_a_table_and_writes_a_picture(tiny_checkpoint, frame, tmp_path):
    picture = tmp_path / "chunk.png"
    result = predict("--model", tiny_checkpoint, "--image", frame, "--text", "pick up the red cube", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in ("dx", "drz", "gripper", "robot units", "axis_angle", "20 Hz"))
    rows = [line for line in result.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == 4
    with Image.open(picture) as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 20)) > 100


def test_a_state_that_is_not_used_is_said_so(tiny_checkpoint, frame):
    given = predict("--model", tiny_checkpoint, "--image", frame, "--text", "x", "--state", "1 2 3")
    plain = predict("--model", tiny_checkpoint, "--image", frame, "--text", "x")
    assert "this checkpoint takes no state; --state was not used" in given.stdout
    assert "--state" not in plain.stdout and given.stdout.endswith(plain.stdout)


@pytest.mark.parametrize("plot", ["chunk.txt", "nowhere/chunk.png"])
def test_a_plot_that_cannot_be_written_is_said_first(frame, tmp_path, plot):
    result = predict("--model", "is not even loaded", "--image", frame, "--text", "x", "--plot", tmp_path / plot)
    assert result.exit_code == 1 and "Expected --plot to be a file" in result.stderr


def test_unknown_dataset_is_one_readable_sentence(tiny_checkpoint, frame):
    result = predict("--model", tiny_checkpoint, "--image", frame, "--text", "x", "--unnorm-key", "robosuit")
    assert result.exit_code == 1
    error = (
        "Error: No action statistics for 'robosuit'; this checkpoint knows ['robosuite']. Did you mean 'robosuite'?"
    )
    assert result.stderr.splitlines()[-1] == error and "Traceback" not in result.output


def test_missing_checkpoint_is_one_readable_error(frame, tmp_path):
    result = predict("--model", tmp_path / "nowhere", "--image", frame, "--text", "x")
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("Error:") and "nowhere" in error and "Traceback" not in result.output


def test_missing_image_is_a_usage_error(tiny_checkpoint):
    result = predict("--model", tiny_checkpoint, "--image", "nothing.png", "--text", "x")
    assert result.exit_code == 2 and "nothing.png" in result.stderr


def test_hands_the_upright_picture_and_the_state_to_the_policy(tmp_path, monkeypatch):
    rotated = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[274] = 6  # the camera was held sideways
    Image.new("RGB", (40, 20)).save(rotated, exif=exif)
    observations = []

    def predict_chunk(observation):
        observations.append(observation)
        return np.zeros((1, 2))

    specs = {"camera": CameraSpec("wrist", 8, 8), "action_spec": None, "state_spec": StateSpec(("a", "b"))}
    policy = SimpleNamespace(**specs, unnorm_key="arm", predict_chunk=predict_chunk)
    monkeypatch.setattr("hf_vla.policy.Policy.from_pretrained", lambda *args, **options: policy)
    result = predict("--model", "m", "--image", rotated, "--text", "wave", "--state", "1, 2")
    assert result.exit_code == 0, result.output
    (observation,) = observations
    assert observation["observation.images.wrist"].size == (20, 40)
    assert observation["observation.state"] == [1.0, 2.0] and observation["task"] == "wave"


def test_state_is_parsed():
    assert parse_numbers("0.1, -2  3e-1") == [0.1, -2.0, 0.3]
    with pytest.raises(ValueError, match="--state to be numbers like '0.1 0.2', came '1 two'"):
        parse_numbers("1 two")
