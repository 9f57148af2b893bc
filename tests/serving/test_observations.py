"""What robots call what they see, and what a policy is given."""

import numpy as np
import pytest

from hf_vla.actions.spec import CameraSpec
from hf_vla.policy import Policy
from hf_vla.serving.observations import check_rename, describe_needs, parse_rename, take_fields, translate

IMAGE = np.zeros((48, 48, 3), np.uint8)
WRIST = np.ones((48, 48, 3), np.uint8)
STATE = np.arange(4.0)
OURS = {"observation.images.corner4": IMAGE, "observation.state": STATE, "task": "push"}


@pytest.fixture(scope="module")
def policy(sawyer):
    return Policy(*sawyer("tinyvla"))


@pytest.fixture(scope="module")
def two_cameras(sawyer):
    policy = Policy(*sawyer("tinyvla"))
    policy.cameras = [CameraSpec(name, 48, 48) for name in ("front", "wrist")]
    return policy


@pytest.mark.parametrize(
    "message",
    [
        OURS,
        {"observation/image": IMAGE, "observation/state": STATE, "prompt": "push"},
        {"observation/corner4_image": IMAGE, "observation/state": STATE, "prompt": "push"},
        {"images": {"corner4": IMAGE}, "state": STATE, "prompt": "push"},
        {"image": {"corner4": IMAGE}, "state": [0, 1, 2.0, 3], "prompt": "push"},
        {"observation": {"images": {"corner4": IMAGE}, "state": STATE}, "task": "push"},
    ],
)
def test_names_that_can_be_meant(message, policy):
    seen = translate(message, policy, {})
    assert seen.keys() == OURS.keys() and seen["task"] == "push"
    assert seen["observation.images.corner4"] is IMAGE
    np.testing.assert_array_equal(seen["observation.state"], STATE)
    assert seen["observation.state"].dtype == np.float32


def test_two_cameras_are_told_apart(two_cameras):
    message = {"observation/front_image": IMAGE, "observation/wrist_image": WRIST, "prompt": ""}
    seen = translate(message, two_cameras, {})
    assert seen["observation.images.front"] is IMAGE and seen["observation.images.wrist"] is WRIST
    with pytest.raises(ValueError, match="Nothing of this checkpoint is called 'observation.image'"):
        translate({"observation/image": IMAGE, "observation/wrist_image": WRIST}, two_cameras, {})
    rename = parse_rename({"observation/image": "observation.images.front"})
    seen = translate({"observation/image": IMAGE, "observation/wrist_image": WRIST}, two_cameras, rename)
    assert seen["observation.images.front"] is IMAGE and seen["observation.images.wrist"] is WRIST


def test_what_is_renamed_has_to_be_there(policy, sawyer):
    check_rename({"cam": "observation.images.corner4", "x": "", "q": "observation.state"}, [policy])
    for ours in ("observation.images.front", "observation.depth.front"):
        with pytest.raises(ValueError, match="'cam' cannot be renamed to .* no camera 'front', only corner4"):
            check_rename({"cam": ours}, [policy, policy])
    nameless = Policy(*sawyer("tinyvla"))
    nameless.cameras = []
    check_rename({"cam": "observation.images.front"}, [policy, nameless])


def test_a_checkpoint_that_names_no_camera_takes_any_one(policy, sawyer):
    nameless = Policy(*sawyer("tinyvla"))
    nameless.cameras = []
    for key in ("observation/image", "images/left", "observation.images.left"):
        (name,) = translate({key: IMAGE}, nameless, {})
        assert name.startswith("observation.images.")


def test_channels_first_are_turned_where_that_is_certain(policy):
    picture = np.random.default_rng(0).integers(0, 256, (48, 50, 3), np.uint8)
    seen = translate({"images": {"corner4": picture.transpose(2, 0, 1)}}, policy, {})
    np.testing.assert_array_equal(seen["observation.images.corner4"], picture)
    narrow = np.zeros((3, 48, 3), np.uint8)
    assert translate({"image": narrow}, policy, {}, any_aspect=True)["observation.images.corner4"] is narrow


def test_pictures_of_another_shape_are_taken_if_that_is_meant(policy, two_cameras, sawyer):
    wide, larger = np.zeros((48, 64, 3), np.uint8), np.zeros((200, 207, 3), np.uint8)
    assert translate({"image": wide}, policy, {}, any_aspect=True)["observation.images.corner4"] is wide
    assert translate({"image": larger}, policy, {})["observation.images.corner4"] is larger
    with pytest.raises(ValueError, match="Expected 'observation.images.wrist' in the shape of 48 x 48"):
        translate({"front": IMAGE, "wrist": wide}, two_cameras, {})
    nameless = Policy(*sawyer("tinyvla"))
    nameless.cameras = [CameraSpec(None, 48, 48)]
    with pytest.raises(ValueError, match="Expected 'observation.images.image' in the shape of 48 x 48"):
        translate({"image": wide}, nameless, {})


def test_a_missing_picture_is_none(policy):
    assert translate({"observation.images.corner4": None}, policy, {}) == {"observation.images.corner4": None}


def test_renamed_to_nothing_is_not_looked_at(policy):
    rename = parse_rename({"observation/wrist_image": "", "timestamp": ""})
    seen = translate({**OURS, "observation/wrist_image": WRIST, "timestamp": 3.0}, policy, rename)
    assert seen.keys() == OURS.keys()


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            {"observation/wrist_image": WRIST},
            r"'observation.wrist_image'. It needs 'observation.images.corner4' \(48, ",
        ),
        ({"x" * 500: 1}, r"called 'x{77}\.\.\.'"),
        ({"prompt": "push", "task": "pull"}, "Both 'prompt' and 'task' are 'task'"),
        ({"image": IMAGE, "images": {"corner4": IMAGE}}, "are 'observation.images.corner4': send one"),
        ({"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}, "at most 4 maps"),
        ({"task": 3}, "'task' to be a text, came int"),
        ({"task": None}, "'task' to be a text, came NoneType"),
        ({"task": "x" * 5000}, "at most 4096 characters, came 5000"),
        ({"image": IMAGE.reshape(48, 3, 48)}, r"its channels last, came \(48, 3, 48\)"),
        ({"image": IMAGE.astype(np.float32).transpose(2, 0, 1)}, r"uint8 \(H, W, 3\), came float32"),
        (
            {"image": np.zeros((48, 64, 3), np.uint8)},
            "in the shape of 48 x 48, .* came 48 x 64, which would be squashed",
        ),
        ({"image": np.zeros((3, 64, 48), np.uint8)}, "came 64 x 48, which"),
        ({"image": np.zeros((1, 3000, 3), np.uint8)}, "came 1 x 3000, .* --any-aspect"),
        ({"image": IMAGE.astype(np.float32)}, r"uint8 \(H, W, 3\), came float32"),
        ({"image": IMAGE[..., 0]}, "uint8 .* came uint8 .48, 48."),
        ({"image": IMAGE[:0]}, r"came uint8 \(0, 48, 3\)"),
        ({"image": IMAGE[..., :2]}, r"came \(48, 48, 2\)"),
        ({"image": "front.png"}, "as an array of uint8 .* came str"),
        ({"image": [[0]]}, "as an array of uint8 .* came list"),
        ({"state": "home"}, "array of numbers, came str"),
        ({"state": ["a"]}, "came a list of other things"),
        ({"state": [True]}, "came a list of other things"),
        ({"state": np.zeros((1, 4))}, r"one row of numbers, came float64 \(1, 4\)"),
        ({"state": np.zeros(4, bool)}, "one row of numbers, came bool"),
        ({"state": np.zeros(5000)}, r"one row of numbers, came float64 \(5000,\)"),
        ({"depth": {"corner4": np.zeros((4, 4, 1), np.float32)}}, "floating-point numbers .* came float32"),
        ({"depth": {"other": np.zeros((4, 4), np.float32)}}, "Nothing of this checkpoint is called 'depth.other'"),
    ],
)
def test_what_means_nothing_is_an_error(message, said, policy):
    with pytest.raises(ValueError, match=said):
        translate(message, policy, {})


def test_what_overflows_is_left_to_the_policy(policy):
    seen = translate({**OURS, "observation.state": np.full(4, 1e300)}, policy, {})
    with pytest.raises(ValueError, match="4 finite numbers"):
        policy.check(seen)


def test_needs_are_said_in_a_sentence(policy):
    assert describe_needs(policy) == (
        "It needs 'observation.images.corner4' (48, 48, 3) uint8, 'observation.state' (4 numbers: x, y, z, gripper) "
        "and 'task' (a text)."
    )


def test_fields_are_taken_out():
    message = {**OURS, "reset": True, "adapter": None, "reasoning": "first the cap"}
    assert take_fields(message) == {"reset": True, "reasoning": "first the cap"}
    assert message.keys() == OURS.keys()
    for wrong in ({"reset": 1}, {"adapter": True}, {"predict": "no"}, {"reasoning": ["a"]}, {"reasoning": "x" * 5000}):
        with pytest.raises(ValueError, match=f"Expected {next(iter(wrong))!r}"):
            take_fields(wrong)


def test_names_of_ours_are_checked():
    with pytest.raises(ValueError, match="came 'front'"):
        parse_rename({"observation/image": "front"})
