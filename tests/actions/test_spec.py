import dataclasses
import json

import numpy as np
import pytest

from hf_vla.actions.spec import ActionSpec, CameraSpec, GripperSpec, StateSpec

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
ACTION = ActionSpec(NAMES, "delta_ee", "euler_xyz", "base", 20.0, GripperSpec(6, open=-1.0, closed=1.0))
STATE = StateSpec(NAMES, rotation="quaternion_wxyz", frame="base")
CAMERA = CameraSpec("top", 640, 480, [[600, 0, 320], [0, 610, 240], [0, 0, 1]], depth=True)


@pytest.mark.parametrize(
    "spec", [ACTION, ActionSpec(("j1", "j2"), "joint"), STATE, CAMERA, CameraSpec(None, 8, 4), ACTION.gripper]
)
def test_json_round_trip(spec):
    assert type(spec).from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    hash(spec)


def test_json_layout():
    assert ACTION.to_dict() == {
        "names": list(NAMES),
        "kind": "delta_ee",
        "rotation": "euler_xyz",
        "frame": "base",
        "control_hz": 20.0,
        "gripper": {"index": 6, "open": -1.0, "closed": 1.0},
    }
    assert CAMERA.to_dict()["intrinsics"] == [[600, 0, 320], [0, 610, 240], [0, 0, 1]]


def test_from_dict_is_strict():
    with pytest.raises(ValueError, match=r"ActionSpec has no field \['hz'\]; it knows \['names', 'kind'"):
        ActionSpec.from_dict(ACTION.to_dict() | {"hz": 5})
    with pytest.raises(ValueError, match=r"ActionSpec needs \['kind'\]; came only \['names'\]"):
        ActionSpec.from_dict({"names": ["x"]})
    with pytest.raises(ValueError, match=r"GripperSpec needs \['index', 'open', 'closed'\]"):
        ActionSpec.from_dict(ACTION.to_dict() | {"gripper": {}})
    with pytest.raises(ValueError, match="Expected a dictionary for StateSpec, came list"):
        StateSpec.from_dict(["x"])


def test_check_names_both_sides_and_every_differing_field():
    ACTION.check(dataclasses.replace(ACTION))
    other = dataclasses.replace(ACTION, control_hz=5.0, gripper=GripperSpec(6, open=1.0, closed=-1.0))
    with pytest.raises(ValueError) as error:
        ACTION.check(other, "the checkpoint", "the dataset")
    text = str(error.value)
    assert "ActionSpec of the checkpoint and of the dataset differ" in text
    assert "control_hz: the checkpoint 20.0, the dataset 5.0" in text
    assert "open=-1.0" in text and "open=1.0" in text
    assert "names" not in text and "rotation" not in text
    with pytest.raises(ValueError, match="this is ActionSpec, the other is StateSpec"):
        ACTION.check(STATE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ()}, "Expected one name per dimension"),
        ({"names": "xyz"}, "Expected one name per dimension, came 'xyz'"),
        ({"names": ("x", 1)}, "Expected one name per dimension"),
        ({"names": ("x", "y", "x", "a", "b", "c", "d")}, r"must differ, \['x'\] came more than once"),
        ({"kind": "delta"}, r"among \['delta_ee', 'absolute_ee', 'joint'\], came 'delta'"),
        ({"rotation": "euler"}, "Unknown rotation format 'euler'"),
        ({"kind": "joint"}, "Joint actions have no rotation format, came 'euler_xyz'"),
        ({"control_hz": 0}, "control_hz above 0, came 0"),
        ({"control_hz": float("nan")}, "control_hz above 0, came nan"),
        ({"names": NAMES[:6]}, "Gripper index 6 is outside the 6 action dimensions"),
    ],
)
def test_invalid_action_specs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ACTION, **changes)


def test_invalid_gripper_and_state_are_refused():
    with pytest.raises(ValueError, match="gripper index of 0 or more, came -1"):
        GripperSpec(-1, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"gripper index of 0 or more, came True \(bool\)"):
        GripperSpec(True, 0.0, 1.0)
    with pytest.raises(ValueError, match="came open=True and closed=0.0"):
        GripperSpec(0, True, 0.0)
    with pytest.raises(ValueError, match=r"two different, finite gripper ends, came open=1.0 and closed=1.0"):
        GripperSpec(0, 1.0, 1.0)
    with pytest.raises(ValueError, match="came open=nan"):
        GripperSpec(0, float("nan"), 1.0)
    with pytest.raises(ValueError, match="came more than once"):
        StateSpec(("x", "x"))
    with pytest.raises(ValueError, match="Unknown rotation format 'rpy'"):
        StateSpec(("x",), rotation="rpy")
    with pytest.raises(ValueError, match="take 6 numbers; the state has 4: .*'g'.* Leave rotation out"):
        StateSpec(("x", "y", "z", "g"), rotation="axis_angle")
    assert StateSpec(tuple("xyzrpw"), rotation="axis_angle").rotation == "axis_angle"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "camera width in pixels of 1 or more, came 0"),
        ({"height": -3}, "camera height in pixels of 1 or more, came -3"),
        ({"height": 480.5}, r"camera height in pixels of 1 or more, came 480.5 \(float\)"),
        ({"width": True}, r"camera width in pixels of 1 or more, came True \(bool\)"),
        ({"intrinsics": [[1, 0], [0, 1]]}, r"Expected 3 x 3 intrinsics, came shape \(2, 2\)"),
        ({"intrinsics": [[1, 0], [0]]}, r"Expected 3 x 3 intrinsics, came \[\[1, 0\], \[0\]\]"),
        ({"intrinsics": np.zeros((3, 3))}, "positive focal lengths"),
        ({"intrinsics": [[1, 0, float("inf")], [0, 1, 0], [0, 0, 1]]}, "Expected finite intrinsics"),
    ],
)
def test_invalid_cameras_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CAMERA, **changes)


def test_integers_of_numpy_are_integers():
    size = np.array([[8, 4]])
    camera, gripper = CameraSpec(None, size.shape[1], *size[0, 1:]), GripperSpec(np.uint8(3), 0.0, 1.0)
    assert camera.to_dict() | {"gripper": gripper.to_dict()} == json.loads(
        json.dumps(camera.to_dict() | {"gripper": gripper.to_dict()})
    )
    assert (type(camera.height), type(gripper.index)) == (int, int)


def test_scaled_camera_projects_to_the_scaled_pixel():
    scaled = CAMERA.scaled(224, 120)
    assert (scaled.width, scaled.height, scaled.name, scaled.depth) == (224, 120, "top", True)
    point = np.array([0.1, -0.2, 0.9])
    pixel, pixel_scaled = (np.asarray(camera.intrinsics) @ point / point[2] for camera in (CAMERA, scaled))
    np.testing.assert_allclose(pixel_scaled, pixel * [224 / 640, 120 / 480, 1])
    assert CameraSpec(None, 8, 4).scaled(2, 2) == CameraSpec(None, 2, 2)


def test_a_rotation_needs_room():
    names = ("x", "y", "z", "a", "b", "c", "gripper")
    with pytest.raises(
        ValueError, match="a rotation as 'quaternion_xyzw' and the gripper take 8 numbers; the action has 7"
    ):
        ActionSpec(names, "delta_ee", "quaternion_xyzw", gripper=GripperSpec(6, 0.0, 1.0))
    assert ActionSpec(names, "delta_ee", "quaternion_xyzw").gripper is None
