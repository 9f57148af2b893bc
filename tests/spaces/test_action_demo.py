"""The Space's parts, and its API and MCP tool as a running process."""

import ast
import asyncio
import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from urllib.parse import parse_qs

import httpx
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from hf_vla import Policy
from hf_vla.actions.spec import ActionSpec, CameraSpec, GripperSpec
from hf_vla.models.images import to_rgb

from .conftest import BAD, GOOD, SHIPPED, SPACE, scene

ROOT = SPACE.parents[1]
WORLD = ActionSpec(("x", "y", "z", "gripper"), "delta_ee", None, "world", 80.0, GripperSpec(3, -1.0, 1.0))


def example(checkpoint):
    frame = checkpoint.example
    return (
        {camera: to_rgb(Image.open(path)) for camera, path in checkpoint.pictures.items()},
        frame["task"],
        frame["state"],
    )


def policy_chunk(checkpoint, seed, pictures, task, state):
    policy = Policy(checkpoint.model, checkpoint.processor, checkpoint.key(), seed=seed)
    observation = {f"observation.images.{camera}": np.asarray(picture) for camera, picture in pictures.items()}
    if state is not None:
        observation["observation.state"] = np.array(state)
    return policy.predict_chunk(observation | {"task": task})


@pytest.mark.parametrize("name", GOOD)
def test_unusual_pictures_are_read_as_the_library_reads_them(good_pictures, name):
    from guards import read_picture

    picture = read_picture(good_pictures[name])
    assert picture.mode == "RGB"
    with Image.open(good_pictures[name]) as file:
        assert np.array_equal(np.asarray(picture), np.asarray(to_rgb(file)))
    wanted = scene().rotate(-90, expand=True) if name == "rotated.jpg" else scene()
    wanted = wanted.convert("L").convert("RGB") if name == "sixteen.png" else wanted
    assert picture.size == wanted.size
    loss = {"rotated.jpg": 12, "cmyk.jpg": 12, "animated.gif": 25, "palette.png": 25}.get(name, 0)
    assert np.abs(np.asarray(picture, float) - np.asarray(wanted, float)).mean() <= loss


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_refused_in_a_sentence(bad_pictures, name):
    from guards import Refused, read_picture

    with pytest.raises(Refused, match=re.escape(BAD[name])) as error:
        read_picture(bad_pictures[name])
    assert str(bad_pictures[name].parent) not in error.value.message and not error.value.print_exception


def test_a_large_file_is_not_even_opened(tmp_path):
    """Whatever way it came; uploads are bounded by gradio already."""
    from guards import Refused, read_picture

    scene().save(tmp_path / "large.png")
    with (tmp_path / "large.png").open("ab") as file:
        file.truncate(12_000_001)
    with pytest.raises(Refused, match="more than 12 megabytes"):
        read_picture(tmp_path / "large.png")


def test_a_bomb_is_refused_by_its_header(tmp_path, monkeypatch):
    """20,000 x 20,000 pixels in a few kilobytes, which Pillow itself refuses; and between its two bounds."""
    from guards import Refused, read_picture

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for side in (10_000, 20_000):
        Image.new("1", (side, side)).save(tmp_path / f"{side}.png")
    monkeypatch.undo()
    for side in (10_000, 20_000):
        with pytest.raises(Refused, match="larger than 24 megapixels"):
            read_picture(tmp_path / f"{side}.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [("1 2", "there are 2"), ("1 2 3 4", "there are 4"), ("", "there are 0"), ("1 two 3", "'two' is not a number"),
     ("1 nan 3", "'nan' is not finite"), ("1 1e999 3", "'1e999' is not finite")],
)  # fmt: skip
def test_a_state_is_checked(text, message):
    from guards import Refused, parse_state

    assert parse_state("1, 2.5 -3e-1", ["a", "b", "c"]) == [1.0, 2.5, -0.3]
    with pytest.raises(Refused, match=r"needs 3 numbers \(a, b, c\).*" + re.escape(message)):
        parse_state(text, ["a", "b", "c"])


@pytest.mark.parametrize("value", [None, "4", 1.5, float("nan"), float("inf"), -1, 17, True])
def test_whole_numbers_are_checked(value):
    from guards import Refused, parse_whole

    assert parse_whole(4.0, "It", 0, 16) == 4
    with pytest.raises(Refused, match="It has to be"):
        parse_whole(value, "It", 0, 16)


def test_what_nobody_foresaw_tells_nothing(caplog):
    from guards import Refused, sentences

    @sentences
    def broken():
        raise KeyError("/a/secret/path")

    with pytest.raises(Refused) as error:
        broken()
    assert "secret" not in error.value.message and "secret" in caplog.text


def test_motions_add_up():
    from geometry import end_effector_path

    chunk = np.array([[1.0, 0, 0, 9], [1, 2, 0, 9], [0, 0, -3, 9]])
    path, reason = end_effector_path(np.stack([chunk, -chunk]), WORLD)
    assert reason is None
    assert path[0].tolist() == [[0, 0, 0], [1, 0, 0], [2, 2, 0], [2, 2, -3]] and (path[1] == -path[0]).all()
    positions = ActionSpec(("x", "y", "z"), "absolute_ee")
    assert end_effector_path(chunk[:, :3], positions)[0].tolist() == chunk[:, :3].tolist()


@pytest.mark.parametrize(
    ("spec", "message"),
    [(None, "does not say what its numbers mean"), (ActionSpec(("a", "b", "c"), "joint"), "joint values"),
     (ActionSpec(("x", "y", "z"), "delta_ee", frame="gripper"), "axes of the gripper, which turn"),
     (ActionSpec(("x", "y"), "delta_ee"), "fewer than three")],
)  # fmt: skip
def test_where_there_is_no_path_a_sentence_says_why(spec, message):
    from geometry import end_effector_path

    path, reason = end_effector_path(np.zeros((2, 2 if spec and len(spec.names) == 2 else 3)), spec)
    assert path is None and message in reason and reason.endswith(".")


def test_a_pinhole_camera_by_hand():
    """At (1, 2, 3), looking along the world's +x; its x is the world's -y, its y the world's -z."""
    from geometry import project

    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]]), (1, 2, 3)
    intrinsics = [[100, 0, 50], [0, 200, 40], [0, 0, 1]]
    pixels = project([[3, 2, 3], [3, 1, 3], [3, 2, 4], [0, 2, 3]], intrinsics, pose)
    assert pixels[:3].tolist() == [[50, 40], [100, 40], [50, -60]] and np.isnan(pixels[3]).all()


def test_the_example_s_path_begins_at_the_hand(served):
    """The gripper's fingers, blue-white, are at (58, 28) of the picture; nothing else there is."""
    from plots import picture_path

    for name in SHIPPED[:3]:
        checkpoint = served[name]
        (picture,), _, _ = (list(part.values()) if isinstance(part, dict) else part for part in example(checkpoint))
        camera, samples = checkpoint.cameras()["corner4"], np.zeros((2, 3, 4))
        samples[1, :, 2] = 1
        pixels, _ = picture_path(samples, WORLD, camera, checkpoint.example["scene"], True, picture.size)
        red, _, blue = np.asarray(picture, float)[tuple(pixels[0, 0].astype(int)[::-1])]
        assert np.allclose(pixels[0], [58.1, 28.2], atol=0.1) and blue > red + 40
        assert pixels[1, -1, 1] < pixels[1, 0, 1] - 1  # up in the world is up in the picture
        double, _ = picture_path(samples, WORLD, camera, checkpoint.example["scene"], True, (192, 192))
        assert np.allclose(double, 2 * pixels)


def test_a_path_is_not_drawn_where_the_camera_is_not_known(served):
    from plots import picture_path

    scene_of = served["tinyvla_metaworld"].example["scene"]
    camera = CameraSpec("corner4", 96, 96, [[83.0, 0, 48], [0, 83.0, 48], [0, 0, 1]])
    samples = np.zeros((1, 3, 4))
    for arguments, message in (
        ((camera, scene_of, False), "where camera and hand were when this picture was taken is not known"),
        ((camera, served["spatialvla_robosuite"].example["scene"], True), "is not known"),
        ((camera, None, True), "is not known"),
        ((CameraSpec("corner4", 96, 96), scene_of, True), "does not know the camera's intrinsics"),
        ((None, scene_of, True), "does not know the camera's intrinsics"),
        ((camera, {**scene_of, "start": [9.0, 9.0, 9.0]}, True), "behind the camera"),
    ):
        pixels, reason = picture_path(samples, WORLD, *arguments, (96, 96))
        assert pixels is None and message in reason


@pytest.mark.parametrize("name", SHIPPED)
def test_samples_are_those_of_the_policy(served, name):
    checkpoint, seed = served[name], 5
    pictures, task, state = example(checkpoint)
    prediction = checkpoint.run(pictures, task, state, seed=seed, num_samples=3)
    assert np.array_equal(prediction.samples[0], policy_chunk(checkpoint, seed, pictures, task, state))
    assert len({chunk.tobytes() for chunk in prediction.samples}) == 3
    if checkpoint.denoises:
        for number in (1, 2):
            further = policy_chunk(checkpoint, seed + number, pictures, task, state)
            np.testing.assert_allclose(prediction.samples[number], further, atol=1e-5)
    again = checkpoint.run(pictures, task, state, seed=seed, num_samples=2)
    assert np.array_equal(again.samples, prediction.samples[:2])


@pytest.mark.parametrize("name", ["tinyvla_metaworld", "divla_metaworld"])
def test_denoising_ends_in_the_sample(served, name):
    checkpoint = served[name]
    pictures, task, state = example(checkpoint)
    prediction = checkpoint.run(pictures, task, state, num_inference_steps=4)
    assert prediction.denoising.shape == (4, *prediction.samples.shape[1:])
    assert np.array_equal(prediction.denoising[-1], prediction.samples[0])
    rough = np.abs(np.diff(prediction.denoising, axis=1)).mean((1, 2))
    assert rough[0] > 2 * rough[-1]  # noise is not smooth
    policy = Policy(checkpoint.model, checkpoint.processor, seed=0, num_inference_steps=4)
    observation = {"observation.images.corner4": np.asarray(pictures["corner4"]), "task": task}
    chunk = policy.predict_chunk(observation | {"observation.state": np.array(state)})
    assert np.array_equal(prediction.samples[0], chunk) and prediction.reasoning == policy.reasoning


@pytest.mark.parametrize("name", ["spatialvla_metaworld", "spatialvla_robosuite"])
def test_tokens_directions_and_depth_are_the_model_s(served, name):
    checkpoint = served[name]
    pictures, task, _ = example(checkpoint)
    prediction = checkpoint.run(pictures, task)
    (camera,) = pictures
    inputs = checkpoint.processor(images=[pictures[camera]], text=[task], unnorm_key=checkpoint.key())
    output = checkpoint.model.predict_action(**inputs)
    chances = output.logits[0].softmax(-1).numpy()
    for place, token in enumerate(prediction.tokens):
        assert token["id"] == output.action_ids[0, place] == chances[place].argmax() == token["candidates"][0][0]
        assert token["probability"] == pytest.approx(chances[place].max(), abs=1e-6)
    size = len(checkpoint.codec.tokenizer.blocks)
    assert [token["action"] for token in prediction.tokens] == np.repeat(np.arange(8), size).tolist()
    n_theta, n_phi, n_r = checkpoint.codec.tokenizer.num_bins[:3]
    directions = np.zeros((8, n_theta, n_phi))
    for each in range(n_theta * n_phi * n_r):  # ids of translations come first
        directions[:, each // n_r // n_phi, each // n_r % n_phi] += chances[::size, each]
    assert np.allclose(prediction.directions, directions, atol=1e-5) and np.allclose(directions.sum((1, 2)), 1)
    assert (prediction.depth is None) == (name == "spatialvla_robosuite")
    if prediction.depth is not None:
        with torch.no_grad():
            expected = checkpoint.model.estimate_depth(inputs["pixel_values"])[0]
        assert np.array_equal(prediction.depth, expected.numpy()) and prediction.depth.min() > 0


def test_the_marked_direction_is_where_the_chosen_action_goes(served):
    """The cell that is drawn in red, by its angles, against the decoded action."""
    checkpoint = served["spatialvla_metaworld"]
    pictures, task, _ = example(checkpoint)
    prediction, tokenizer = checkpoint.run(pictures, task), checkpoint.codec.tokenizer
    for action, token in enumerate(each for each in prediction.tokens if each["block"] == "translation"):
        row, column = divmod(token["id"] // tokenizer.num_bins[2], tokenizer.num_bins[1])
        theta, phi = (np.mean(tokenizer.edges[name][[place, place + 1]]) for name, place in
                      (("theta", row), ("phi", column)))  # fmt: skip
        normalised = tokenizer.decode(np.array([each["id"] for each in prediction.tokens]))[action, :3]
        direction = [np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)]
        length = np.linalg.norm(normalised)
        assert np.abs(normalised).max() == 1 or np.allclose(normalised / length, direction, atol=1e-9)


def test_what_takes_too_long_is_stopped(served, monkeypatch):
    import predict

    monkeypatch.setattr(predict, "MAX_SECONDS", -1)
    for name in ("tinyvla_metaworld", "spatialvla_metaworld"):
        pictures, task, state = example(served[name])
        with pytest.raises(ValueError, match="takes longer than"):
            served[name].run(pictures, task, state, num_samples=2)


def test_a_missing_picture_is_said(served):
    for pictures in ({}, {"corner4": None}):
        with pytest.raises(ValueError, match="Give a picture"):
            served["tinyvla_metaworld"].run(pictures, "x", [0.0] * 4)


def test_the_default_state_is_the_example_s_to_the_last_bit_of_float32(served):
    from guards import parse_state

    checkpoint = served["tinyvla_metaworld"]
    numbers = parse_state(checkpoint.default_state(), ["x", "y", "z", "gripper"])
    assert np.array_equal(np.float32(numbers), np.float32(checkpoint.example["state"]))
    assert served["spatialvla_metaworld"].default_state() == ""


def recorded(checkpoint, **more):
    from texts import record

    pictures, task, state = example(checkpoint)
    asked = {"model": checkpoint.name, "dataset": checkpoint.key(), "instruction": task, "state": state, **more}
    prediction = checkpoint.run(pictures, task, state, num_samples=2)
    return prediction, record(checkpoint, prediction, asked)


def test_files_hold_what_the_table_shows(served):
    from texts import table, to_csv

    prediction, record = recorded(served["spatialvla_robosuite"])
    headers, rows = table(prediction.samples[0], record["names"], 20.0)
    assert headers == ["step", "seconds", "dx", "dy", "dz", "drx", "dry", "drz", "gripper"]
    assert [row[1] for row in rows[:3]] == ["0.000", "0.050", "0.100"]
    lines = list(csv.DictReader(io.StringIO(to_csv(record))))
    assert len(lines) == 16 and {line["sample"] for line in lines} == {"0", "1"}
    for row, line in zip(rows, lines, strict=False):
        assert row[2:] == [f"{float(line[name]):+.4f}" for name in record["names"]]
    assert np.array_equal(np.float32(json.loads(json.dumps(record))["actions"]), prediction.samples[0])


def test_words_of_strangers_and_models_are_no_html(served):
    from predict import Prediction
    from texts import summary, to_html

    text = "<script>alert(1)</script>"
    prediction = Prediction(np.zeros((1, 2, 4)), 0.1, "cpu", reasoning=text, notes=[text])
    assert "<script" not in summary(served["divla_metaworld"], prediction, WORLD) + to_html([text], [[text]])


def test_the_meaning_has_names_units_and_ranges(served):
    from texts import meaning

    words = meaning(served["spatialvla_robosuite"], "robosuite_lift")
    for each in (
        "8 actions",
        "1/20 s",
        "dx, dy, dz",
        "axes of the world",
        "5 cm",
        "0.5 rad",
        "+1 is closed",
        "+0.614",
    ):
        assert each in words


def test_a_link_brings_everything_back():
    from texts import query

    link = query(model="a b", instruction="50 % & more?", state="1 2", steps=None)
    assert parse_qs(link[1:]) == {"model": ["a b"], "instruction": ["50 % & more?"], "state": ["1 2"]}


@pytest.fixture
def own_checkpoint(tmp_path):
    """A folder that nobody else uses, with an example."""
    kept = shutil.ignore_patterns("eval")
    return shutil.copytree(SPACE / "checkpoints" / "tinyvla_metaworld", tmp_path / "tinyvla_metaworld", ignore=kept)


def test_a_checkpoint_on_the_hub_brings_its_example(own_checkpoint, hub):
    from predict import Checkpoint

    hub.upload("somebody/robot", own_checkpoint, kind="model")
    pulled, local = Checkpoint("somebody/robot", "cpu"), Checkpoint(str(own_checkpoint), "cpu")
    assert pulled.example | {"images": None} == local.example | {"images": None}
    assert pulled.instructions == local.instructions != []
    assert pulled.is_example({name: to_rgb(Image.open(path)) for name, path in local.pictures.items()})
    for name in ("frame.json", "training.json"):
        (own_checkpoint / name).unlink()
    hub.upload("somebody/plain", own_checkpoint, kind="model")
    plain = Checkpoint("somebody/plain", "cpu")
    assert (plain.example, plain.pictures, plain.instructions) == (None, {}, [])


def test_an_example_may_lack_what_the_model_can_do_without(own_checkpoint):
    import predict

    frame = json.loads((own_checkpoint / "frame.json").read_text())
    short = {name: frame[name] for name in ("task", "images")}
    (own_checkpoint / "frame.json").write_text(json.dumps(short))
    before = dict(predict.CHECKPOINTS)
    try:
        predict.load([str(own_checkpoint)], warm_up=True)
        (checkpoint,) = predict.CHECKPOINTS.values()
        mean = checkpoint.codec.statistics["push"]["state"]["mean"]
        assert [float(each) for each in checkpoint.default_state().split()] == pytest.approx(mean)
    finally:
        predict.CHECKPOINTS.clear()
        predict.CHECKPOINTS.update(before)
    (own_checkpoint / "frame.json").write_text(json.dumps(short | {"images": {"top": "frame_corner4.png"}}))
    with pytest.raises(ValueError, match=r"shows \['top'\]; it looks through \['corner4'\]"):
        predict.Checkpoint(str(own_checkpoint), "cpu")


def test_examples_are_not_deleted_with_old_uploads(served):
    from app import build
    from gradio.route_utils import delete_files_created_by_app

    async def with_a_loop():  # else gradio would leave some behind
        return build()

    page = asyncio.run(with_a_loop())
    (place,) = (each for each in page.blocks.values() if getattr(each, "elem_id", None) == "picture0")
    examples = [path for checkpoint in served.values() for path in checkpoint.pictures.values()]
    copies = [Path(place.move_resource_to_block_cache(path)) for path in examples]
    delete_files_created_by_app(page, None)
    assert len(set(copies)) == 2 and all(copy.is_file() for copy in copies)  # three show the same scene


@pytest.fixture(scope="module")
def two_cameras(tmp_path_factory):
    """A checkpoint of two cameras and without an example, as a user may have one."""
    folder = tmp_path_factory.mktemp("own") / "two_cameras"
    shutil.copytree(
        SPACE / "checkpoints" / "tinyvla_metaworld", folder, ignore=shutil.ignore_patterns("frame*", "eval")
    )
    file = folder / "processor_config.json"
    config = json.loads(file.read_text())
    (camera,) = config["camera_config"]["push"]
    config["camera_config"]["push"] = [camera, {**camera, "name": "second"}]
    file.write_text(json.dumps(config))
    return folder


def test_a_checkpoint_of_one_s_own_with_two_cameras(two_cameras, served):
    import app
    import predict

    before = dict(served)
    try:
        predict.load([str(two_cameras)], warm_up=True)
        (checkpoint,) = predict.CHECKPOINTS.values()

        async def build():  # without a loop that runs, gradio would leave some behind
            return app.build()

        page = asyncio.run(build())
        parameters = page.get_api_info()["named_endpoints"]["/predict"]["parameters"]
        assert [each["component"] for each in parameters].count("Image") == 2
        one, two = scene(), scene(64, 64)
        state = [float(number) for number in checkpoint.default_state().split()]
        assert state == pytest.approx(checkpoint.codec.statistics["push"]["state"]["mean"])
        both = checkpoint.run({"corner4": one, "second": two}, "x", state).samples[0]
        expected = policy_chunk(checkpoint, 0, {"corner4": one, "second": two}, "x", state)
        assert np.array_equal(both, expected)
        alone = checkpoint.run({"corner4": one}, "x", state).samples[0]
        assert not np.array_equal(alone, both)
    finally:
        served.clear()
        served.update(before)


@pytest.fixture
def connect(server):
    """Makes clients of the API, each of a session of its own."""
    from gradio_client import Client

    clients = []

    def make():
        clients.append(Client(server.url, verbose=False))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def test_the_api_answers_as_the_policy(connect, served):
    from gradio_client import handle_file

    api = connect()
    (endpoint,) = api.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert endpoint == "/predict"
    for name in SHIPPED:
        checkpoint = served[name]
        _, task, state = example(checkpoint)
        (path,), (camera,) = checkpoint.pictures.values(), checkpoint.pictures
        answer = api.predict(
            image=handle_file(path), instruction=task, model=name, seed=3, state=checkpoint.default_state(),
            api_name="/predict",
        )  # fmt: skip
        expected = policy_chunk(checkpoint, 3, {camera: to_rgb(Image.open(path))}, task, state)
        assert np.array_equal(np.float32(answer["actions"]), expected)
        assert answer["dataset"] == checkpoint.key() and answer["spec"]["names"] == answer["names"]
        assert (answer["reasoning"] is not None) == (name == "divla_metaworld")


def test_the_api_fails_in_sentences(server, connect, bad_pictures, good_pictures):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    api, good = connect(), handle_file(good_pictures["plain.png"])
    right = {"image": good, "instruction": "x", "state": "0 0 0 0"}
    for change, message in (
        ({"image": None}, "Give a picture"),
        ({"image": handle_file(bad_pictures["text.png"])}, "cannot be read as a picture"),
        ({"image": handle_file("https://127.0.0.1:9/picture.png")}, "Send the picture itself, not its address"),
        ({"instruction": " "}, "Write an instruction"),
        ({"instruction": "x" * 501}, "500 are the most"),
        ({"model": "none"}, "There is no model 'none' here"),
        ({"dataset": "pusch"}, "Did you mean 'push'"),
        ({"state": "1"}, "needs 4 numbers (x, y, z, gripper)"),
        ({"model": "spatialvla_metaworld"}, "leave the state out"),
        ({"num_samples": 17}, "from 1 to 16; 17 is not"),
        ({"num_inference_steps": 101}, "from 0 to 100; 101 is not"),
        ({"seed": -1}, "The seed has to be"),
    ):
        with pytest.raises(AppError, match=re.escape(message)):
            api.predict(**right | change, api_name="/predict")
    assert "Traceback" not in server.log.read_text()


def test_files_of_the_server_are_no_pictures_to_ask_for(server):
    stolen = {"path": str(SPACE / "app.py"), "meta": {"_type": "gradio.FileData"}}
    call = f"{server.url}/gradio_api/call/predict"
    event = httpx.post(call, json={"data": [stolen, "x", "tinyvla_metaworld", "", "0 0 0 0", 0, 1, 0]}).json()[
        "event_id"
    ]
    answer = httpx.get(f"{call}/{event}", timeout=60).text
    assert "event: error" in answer and "cannot be read" not in answer  # it was not even opened


def test_an_upload_that_was_deleted_is_asked_for_again(server, served, good_pictures):
    """The app has gradio empty its folder for uploads; a page that was left open may still have the picture."""
    from form import change_model

    logged = len(server.log.read_text())
    with good_pictures["plain.png"].open("rb") as file:
        (path,) = httpx.post(f"{server.url}/gradio_api/upload", files={"files": file}).json()
    assert Path(path).is_relative_to(server.uploads)
    Path(path).unlink()
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}
    call, data = f"{server.url}/gradio_api/call/predict", [image, "x", "tinyvla_metaworld", "", "0 0 0 0", 0, 1, 0]
    event = httpx.post(call, json={"data": data}).json()["event_id"]
    assert "no longer here: uploads are deleted after half an hour" in httpx.get(f"{call}/{event}", timeout=60).text
    change_model("tinyvla_metaworld", "x", path)
    assert "Traceback" not in server.log.read_text()[logged:]


def test_everybody_gets_his_own_answer(connect, good_pictures):
    from gradio_client import handle_file

    states, answers = [f"{number / 10} 0.6 0.2 0.5" for number in range(6)], {}

    def ask(state, api):
        picture = handle_file(good_pictures["plain.png"])
        answers[state] = api.predict(image=picture, instruction="Open a drawer", state=state, api_name="/predict")

    threads = [threading.Thread(target=ask, args=(state, connect())) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [answers[state]["state"][0] for state in states] == pytest.approx([number / 10 for number in range(6)])
    assert len({json.dumps(answer["actions"]) for answer in answers.values()}) == 6


def test_the_mcp_tool_is_listed_and_answers(server, served):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    checkpoint = served["spatialvla_metaworld"]
    pictures, task, _ = example(checkpoint)
    path = checkpoint.pictures["corner4"]

    async def ask():
        async with (
            streamable_http_client(f"{server.url}/gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = (await session.list_tools()).tools
            picture = f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
            given = {"image": picture, "instruction": task, "model": "spatialvla_metaworld"}
            return tools, await session.call_tool(tools[0].name, given)

    (tool,), answer = asyncio.run(ask())
    assert tool.name.endswith("predict") and "chunk of robot actions" in tool.description
    assert "Open a drawer" in tool.inputSchema["properties"]["instruction"]["description"]
    assert not answer.isError, answer.content
    expected = policy_chunk(checkpoint, 0, pictures, task, None)
    assert np.array_equal(np.float32(ast.literal_eval(answer.content[0].text)["actions"]), expected)


def test_a_missing_checkpoint_is_said(tmp_path):
    from typer.testing import CliRunner

    from hf_vla.cli.main import app

    done = CliRunner().invoke(app, ["space", "--model", str(tmp_path)])
    assert done.exit_code == 1 and "no checkpoint in this folder" in done.stderr


def test_a_port_that_is_taken_is_said(server):
    port = server.url.rpartition(":")[2]
    command = [Path(sys.executable).parent / "hf-vla", "space", "--port", port]
    command += ["--model", SPACE / "checkpoints" / "tinyvla_metaworld"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"The port {port} of 127.0.0.1 cannot be listened at" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_model_was_not_trained_for_is_said(served):
    from texts import meaning

    checkpoint = served["tinyvla_metaworld"]
    picture = Image.open(checkpoint.pictures["corner4"])
    ask, state = checkpoint.example["task"], checkpoint.example["state"]

    def notes(picture=picture, instruction=ask, state=state):
        return checkpoint.run({"corner4": picture}, instruction, state).notes

    assert notes() == notes(instruction=f" {ask.upper()}") == []
    (words,) = notes(instruction="Peel a banana")
    assert words.startswith("It was not trained with this instruction: it knows 28")
    (shape,) = notes(picture=picture.resize((300, 100)))
    assert "has 300 x 100 pixels, the camera 96 x 96" in shape
    (units,) = notes(state=[1000 * value for value in state])
    assert "are the units right?" in units
    assert "- Unplug a peg sideways" in meaning(checkpoint, "push")


def test_the_front_matter_is_a_space_s_and_names_what_is_there():
    text = (SPACE / "README.md").read_text()
    matter = yaml.safe_load(text.split("---")[1])
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert matter["sdk"] == "gradio" and matter["sdk_version"] == pins["gradio"]
    assert (SPACE / matter["app_file"]).is_file() and matter["license"] == "apache-2.0"
    assert len(matter["short_description"]) <= 60 and "robotics" in matter["tags"]
    for name in SHIPPED:
        assert name in text


def test_the_requirements_are_the_package_s():
    """The Space has a copy of the package, which nobody installs there: what that needs, it asks for itself."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    given = {line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()}
    assert given >= {*wanted["dependencies"], *wanted["optional-dependencies"]["space"]}


def test_the_app_s_files_import_this_project_by_name_alone():
    own = {path.stem for path in SPACE.glob("*.py")}
    for path in SPACE.glob("*.py"):
        for name in re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE):
            root = name.split(".")[0]
            assert root not in ("scripts", "tests") and (root != "spaces" or name == "spaces")
        assert len(path.read_text().splitlines()) <= 400
    assert "app" in own and not list(Path(SPACE).glob("*.pyi"))


def test_a_wheel_has_all_of_the_app_s_files():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    everything = build["wheel"]["force-include"].items()
    included = {source: target for source, target in everything if source.startswith("spaces/")}
    assert {*included} == {f"spaces/action_demo/{path.name}" for path in SPACE.glob("*.py")}
    assert all(target == f"hf_vla/{source}" for source, target in included.items())
    assert "spaces/action_demo/*.py" in build["sdist"]["include"]  # from which wheels are built, too


def test_the_readme_s_snippet_answers(server):
    (code,) = re.findall(r"```python\n(.*?)```", (SPACE / "README.md").read_text(), re.DOTALL)
    code = code.replace("http://127.0.0.1:7860", server.url) + "\nprint(len(answer['actions']), answer['names'])\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("16 ['x', 'y', 'z', 'gripper']\n"), done.stderr


@pytest.mark.slow
def test_a_space_of_its_own_starts_with_the_copied_package(tmp_path):
    """As the Hub runs it: app.py beside a copy of hf_vla, nothing installed; here as far as the page is built."""
    left_out = shutil.ignore_patterns("eval", "__pycache__")
    shutil.copytree(SPACE, tmp_path / "space", ignore=left_out)
    shutil.copytree(ROOT / "src" / "hf_vla", tmp_path / "space" / "hf_vla", ignore=left_out)
    code = "import app, hf_vla; app.load(app.shipped(), True); app.build(); print(hf_vla.__file__, *app.CHECKPOINTS)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    options = {"cwd": tmp_path / "space", "env": environment, "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.stdout.split() == [str(tmp_path / "space" / "hf_vla" / "__init__.py"), *SHIPPED], done.stderr


def test_zero_gpu_gets_its_decorator_before_torch(tmp_path):
    """A stand-in for the package that only ZeroGPU has, which says what was imported when, and what was decorated."""
    (tmp_path / "spaces.py").write_text(
        "import sys\n"
        "early = not {'torch', 'gradio', 'transformers'} & set(sys.modules)\n"
        "decorated = []\n"
        "def GPU(duration):\n"
        "    return lambda function: decorated.append((function.__name__, duration)) or function\n"
    )
    code = "import app, spaces; print(spaces.early, spaces.decorated, app.run.__name__); "
    code += f"app.load([{str(SPACE / 'checkpoints' / 'tinyvla_metaworld')!r}], False); print(app.build().delete_cache)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(SPACE), str(ROOT / "src")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    # of uploads those that are older than half an hour are deleted, every five minutes
    assert done.stdout == "True [('run', 60)] run\n(300, 1800)\n", done.stderr
