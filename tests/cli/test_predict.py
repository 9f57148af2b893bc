import re
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from hf_vla.actions.spec import CameraSpec
from hf_vla.cli import render
from hf_vla.cli.main import app
from hf_vla.cli.predict import parse_images, parse_numbers


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


def test_a_state_that_the_checkpoint_does_not_take_is_an_error(tiny_checkpoint, frame):
    result = predict("--model", tiny_checkpoint, "--image", frame, "--text", "x", "--state", "1 2 3")
    assert result.exit_code == 1 and "This checkpoint takes no state: leave --state out." in result.stderr


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


def test_a_file_and_the_folder_above_lead_to_the_checkpoint(tiny_checkpoint, frame, tmp_path):
    checkpoint = tmp_path / "model"
    checkpoint.symlink_to(tiny_checkpoint)
    for model, said in (
        (checkpoint / "config.json", "config.json: a file; expected the folder of a checkpoint, such as"),
        (tmp_path, "it has no config.json. Did you mean"),
    ):
        result = predict("--model", model, "--image", frame, "--text", "x")
        assert result.exit_code == 1 and f"{said} '{checkpoint}'" in " ".join(result.stderr.split())


@pytest.mark.parametrize("kind", ["text", "cut"])
def test_a_file_that_is_no_picture_is_said(tiny_checkpoint, frame, tmp_path, kind):
    path = tmp_path / f"{kind}.png"
    path.write_bytes(b"no picture" if kind == "text" else frame.read_bytes()[:-500])
    result = predict("--model", tiny_checkpoint, "--image", path, "--text", "x")
    assert result.exit_code == 1 and f"{kind}.png: expected a picture (PNG, JPEG, ...)" in result.stderr
    assert "Traceback" not in result.output


def test_missing_image_is_a_usage_error(tiny_checkpoint):
    result = predict("--model", tiny_checkpoint, "--image", "nothing.png", "--text", "x")
    assert result.exit_code == 2 and "nothing.png" in result.stderr


def test_hands_the_upright_picture_and_the_state_to_the_policy(tmp_path, monkeypatch):
    rotated = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[274] = 6  # the camera was held sideways
    Image.new("RGB", (40, 20)).save(rotated, exif=exif)
    observations = []

    def predict_chunk(observation, reasoning):
        observations.append(observation)
        return np.zeros((1, 2))

    specs = {"cameras": (CameraSpec("wrist", 8, 8),), "action_spec": None, "takes_state": True, "reasoning": None}
    policy = SimpleNamespace(**specs, unnorm_key="arm", predict_chunk=predict_chunk)
    monkeypatch.setattr("hf_vla.policy.Policy.from_pretrained", lambda *args, **options: policy)
    result = predict("--model", "m", "--image", rotated, "--text", "wave", "--state", "1, 2")
    assert result.exit_code == 0, result.output
    (observation,) = observations
    assert observation["observation.images.wrist"].size == (20, 40)
    assert observation["observation.state"] == [1.0, 2.0] and observation["task"] == "wave"


@pytest.fixture
def stereo(monkeypatch):
    """Stands in for the policy of a checkpoint with two cameras: keeps its options and observations."""
    seen = SimpleNamespace(observations=[])

    def predict_chunk(observation, reasoning):
        seen.observations.append(observation)
        return np.zeros((1, 2))

    cameras = (CameraSpec("front", 8, 8), CameraSpec("wrist", 8, 8))
    policy = SimpleNamespace(cameras=cameras, action_spec=None, takes_state=False, unnorm_key="arm")
    policy.predict_chunk, policy.reasoning = predict_chunk, None

    def from_pretrained(path, **options):
        seen.options = options
        return policy

    monkeypatch.setattr("hf_vla.policy.Policy.from_pretrained", from_pretrained)
    return seen


@pytest.fixture
def pictures(tmp_path):
    paths = {name: tmp_path / f"{name}.png" for name in ("front", "wrist")}
    for width, path in enumerate(paths.values(), 10):
        Image.new("RGB", (width, 20)).save(path)
    return paths


def test_several_cameras_by_name(stereo, pictures):
    images = [part for name, path in pictures.items() for part in ("--image", f"{name}={path}")]
    result = predict("--model", "m", *images, "--text", "wave", "--seed", "7")
    assert result.exit_code == 0, result.output
    (observation,) = stereo.observations
    sizes = {key: value.size for key, value in observation.items() if key != "task"}
    assert sizes == {"observation.images.front": (10, 20), "observation.images.wrist": (11, 20)}
    assert stereo.options["seed"] == 7


@pytest.mark.parametrize(
    ("names", "code", "message"),
    [
        (["front"], 0, ""),  # the policy says what is missing
        (["", "wrist"], 2, "Of several pictures, name each once"),
        (["wrist", "wrist"], 2, "Of several pictures, name each once"),
        (["side"], 1, "This checkpoint has no camera side, only front, wrist."),
        ([""], 1, "looks through the cameras ['front', 'wrist']: give --image NAME=FILE for each."),
    ],
)
def test_names_of_pictures(stereo, pictures, names, code, message):
    path = pictures["front"]
    images = [part for name in names for part in ("--image", f"{name}={path}" if name else path)]
    result = predict("--model", "m", *images, "--text", "wave")
    assert result.exit_code == code and message in " ".join(result.stderr.replace("│", "").split())


def test_a_name_without_a_file_is_a_missing_camera(stereo, pictures):
    images = ["--image", "front=", "--image", f"wrist={pictures['wrist']}"]
    result = predict("--model", "m", *images, "--text", "wave")
    assert result.exit_code == 0, result.output
    (observation,) = stereo.observations
    assert observation["observation.images.front"] is None
    assert observation["observation.images.wrist"].size == (11, 20)
    with pytest.raises(typer.BadParameter, match="File 'front' does not exist"):
        parse_images(["front"])
    with pytest.raises(typer.BadParameter, match="name each once"):
        parse_images(["front=", "front="])
    for nothing in ("", "="):
        with pytest.raises(typer.BadParameter, match="does not exist"):
            parse_images([nothing])


def test_a_file_name_may_hold_an_equals_sign(tmp_path):
    path = tmp_path / "a=b.png"
    path.touch()
    assert parse_images([str(path)]) == {None: str(path)}
    assert parse_images([f"front={path}"]) == {"front": str(path)}


def test_state_is_parsed():
    assert parse_numbers("0.1, -2  3e-1") == [0.1, -2.0, 0.3]
    with pytest.raises(ValueError, match="--state to be numbers like '0.1 0.2', came '1 two'"):
        parse_numbers("1 two")


def test_prints_the_reasoning_above_the_table(reasoning_checkpoint, pictures, tmp_path, monkeypatch):
    titles, images = [], [part for name in ("agentview", "wrist") for part in ("--image", f"{name}=")]
    images[1] += str(pictures["front"])
    arguments = ["--model", reasoning_checkpoint, *images, "--text", "wave", "--plot", tmp_path / "chunk.png"]
    plot = render.plot_chunk
    monkeypatch.setattr(render, "plot_chunk", lambda *args, title: titles.append(title) or plot(*args, title="wave"))
    own = predict(*arguments)
    assert own.exit_code == 0, own.output
    first, *rest = own.stdout.splitlines()
    assert re.fullmatch("Reasoning: '.+'", first) and any("wave" in line for line in rest)
    assert titles == [f"wave\n{first.removeprefix('Reasoning: ')}"]
    given = predict(*arguments, "--reasoning", "lift [bold]\x1b[2J$x$")
    assert given.exit_code == 0, given.output
    assert given.stdout.splitlines()[0] == r"Reasoning: 'lift [bold]\x1b[2J$x$'"  # the terminal is not cleared
    assert table_rows(given) != table_rows(own) and len(table_rows(own)) == 4
    short, silent = (predict(*arguments, "--max-reasoning-tokens", limit) for limit in (2, 0))
    assert short.exit_code == silent.exit_code == 0, short.output + silent.output
    words = short.stdout.splitlines()[0].removesuffix("'")
    assert words != first.removesuffix("'") and first.startswith(words)
    assert "Reasoning" not in silent.stdout and table_rows(silent) not in (table_rows(own), table_rows(short))
    assert titles[-1] == "wave"


def table_rows(result):
    return [line for line in result.stdout.splitlines() if line.startswith("│")]


def test_a_reasoning_for_a_family_that_says_nothing_is_an_error(tiny_checkpoint, frame):
    result = predict("--model", tiny_checkpoint, "--image", frame, "--text", "x", "--reasoning", "lift")
    assert result.exit_code == 1 and "This model does not reason: leave reasoning out" in result.stderr


def test_other_families_print_no_reasoning(tiny_checkpoint, frame):
    assert "Reasoning" not in predict("--model", tiny_checkpoint, "--image", frame, "--text", "x").stdout
