"""Examples beside checkpoints, which anybody may have written."""

import json
import os

import pytest
from PIL import Image

from hf_vla.evaluation.example import read_example

WHOLE = {"task": "open it", "dataset": "push", "images": {"front": "front.png"}, "state": [0, 0.5], "actions": [[1]]}


@pytest.fixture
def checkpoint(tmp_path):
    """Folder of a checkpoint of which only the example is there."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in (folder / "front.png", tmp_path / "secret.png"):
        Image.new("RGB", (8, 8)).save(path)
    (folder / "frame.json").write_text(json.dumps(WHOLE))
    return folder


def test_pictures_become_paths_and_what_is_missing_none(checkpoint):
    path = str(checkpoint / "front.png")
    assert read_example(checkpoint) == WHOLE | {"images": {"front": path}, "scene": None}
    (checkpoint / "frame.json").write_text(json.dumps({name: WHOLE[name] for name in ("task", "images")}))
    nothing = dict.fromkeys(("dataset", "state", "actions", "scene"))
    assert read_example(checkpoint) == {"task": "open it", "images": {"front": path}} | nothing
    (checkpoint / "frame.json").unlink()
    assert read_example(checkpoint) is None


@pytest.mark.parametrize("name", ["../secret.png", "{}/secret.png", "..", ".", "", "pipe", "folder", "absent.png"])
def test_only_pictures_beside_it_are_shown(checkpoint, name):
    os.mkfifo(checkpoint / "pipe")
    (checkpoint / "folder").mkdir()
    images = {"front": name.format(checkpoint.parent)}
    (checkpoint / "frame.json").write_text(json.dumps(WHOLE | {"images": images}))
    with pytest.raises(ValueError, match=r"frame\.json: expected a picture beside it for the camera 'front', came '"):
        read_example(checkpoint)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([WHOLE], "Expected a JSON object in .*frame.json, came list"),
        ({"images": {"front": "front.png"}}, "frame.json: expected task, which it lacks"),
        (WHOLE | {"task": 3}, "frame.json: .*task"),
        (WHOLE | {"images": {}}, "frame.json: expected a picture of at least one camera"),
        (WHOLE | {"images": {"front": 3}}, "frame.json: .*images"),
        (WHOLE | {"state": "0 0.5"}, "frame.json: .*state"),
        (WHOLE | {"actions": [1.0]}, "frame.json: .*actions"),
    ],
)
def test_what_is_broken_is_named(checkpoint, content, words):
    (checkpoint / "frame.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        read_example(checkpoint)
