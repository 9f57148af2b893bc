from types import SimpleNamespace

import numpy as np
import pytest

from hf_vla.training.data_arguments import CameraArguments
from hf_vla.training.facts import camera_spec, column_names


def dataset(key, **feature):
    return SimpleNamespace(name="mine", features={key: feature})


@pytest.mark.parametrize(
    ("names", "shape"),
    [
        (["height", "width", "channels"], [48, 96, 3]),
        (["channels", "height", "width"], [3, 48, 96]),
        (["width", "height", "channel"], [96, 48, 3]),
        (None, [48, 96, 3]),
    ],
)
def test_a_camera_is_as_high_and_wide_as_the_names_say(names, shape):
    pictures = dataset("observation.images.wrist", names=names, shape=shape)
    spec = camera_spec(CameraArguments("wrist", fovy=60.0), pictures)
    assert (spec.name, spec.height, spec.width) == ("wrist", 48, 96)
    focal = 24 / np.tan(np.radians(30))  # of the vertical field of view
    np.testing.assert_allclose(spec.intrinsics, [[focal, 0, 48], [0, focal, 24], [0, 0, 1]])


@pytest.mark.parametrize(
    ("names", "shape"),
    [
        (None, [3, 48, 96]),
        (["height", "width", "channels"], [48, 96, 4]),
        (["height", "width"], [48, 96]),
        (["rows", "columns", "channels"], [48, 96, 3]),
        (["height", "width", "channels"], [48, 96]),
    ],
)
def test_pictures_of_another_layout_are_an_error(names, shape):
    with pytest.raises(ValueError, match="mine: expected pictures of height, width and 3 channels"):
        camera_spec(CameraArguments("wrist"), dataset("observation.images.wrist", names=names, shape=shape))


@pytest.mark.parametrize(
    "names",
    [
        ["x", "y", "g"],
        {"motors": ["x", "y", "g"]},
        {"arm": ["x", "y"], "hand": ["g"]},
        {"y": 1, "x": 0, "g": 2},
        {"arm": {"y": 1, "x": 0}, "hand": {"g": 0}},
        [["x", "y", "g"]],
    ],
)
def test_names_are_read_however_they_are_written(names):
    assert column_names(dataset("action", names=names, shape=[3]), "action", "action") == ("x", "y", "g")


def test_many_places_are_numbers_not_words():
    names = {f"joint{place}": place for place in reversed(range(12))}
    wanted = tuple(f"joint{place}" for place in range(12))
    assert column_names(dataset("action", names=names, shape=[12]), "action", "action") == wanted


@pytest.mark.parametrize("names", [None, [], {}])
def test_numbers_without_names_are_counted(names):
    column = dataset("observation.state", names=names, shape=[2])
    assert column_names(column, "observation.state", "state") == ("state_0", "state_1")


@pytest.mark.parametrize(
    "names", [["x", "y"], {"motors": ["x"]}, {"x": 0, "y": 1, "g": 3}, [1, 2, 3], ["x", "y", "x"]]
)
def test_names_that_are_not_one_per_number_are_an_error(names):
    with pytest.raises(ValueError, match="mine: expected 3 different names of the column 'action', one per number"):
        column_names(dataset("action", names=names, shape=[3]), "action", "action")
