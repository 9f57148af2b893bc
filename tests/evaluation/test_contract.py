from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from hf_vla.actions.codec import ActionCodec
from hf_vla.actions.spec import ActionSpec, CameraSpec, GripperSpec, StateSpec
from hf_vla.data.oxe import oxe_dataset
from hf_vla.evaluation.contract import check_contract, convert_gripper, ends_differ, plan_cameras

ACTION = ActionSpec(
    ("x", "y", "z", "gripper"), "delta_ee", frame="world", control_hz=80.0, gripper=GripperSpec(3, -1, 1)
)
STATE = StateSpec(("x", "y", "z"), frame="world")
CAMERA = CameraSpec("corner4", 48, 48, ((41.6, 0.0, 24.0), (0.0, 41.6, 24.0), (0.0, 0.0, 1.0)))
SIMULATOR = SimpleNamespace(default_cameras={"corner4": (128, 128)})
SEEN = {"corner4": CAMERA}


def policy(action=ACTION, state=STATE, cameras=(CAMERA,), action_dim=4, state_dim=3, takes_state=True):
    """What the contract reads of a policy; the codec is real."""
    plain = {"mode": "identity", "clip": False, "convention": "lerobot"}
    statistics = {"arm": {"action": {"mean": [0.0] * action_dim}, "state": {"mean": [0.0] * state_dim}}}
    config = {"chunk_size": 4, "normalization": plain, "state_normalization": plain}
    processor = SimpleNamespace(action_codec=ActionCodec(statistics, config))
    said = {"action_spec": action, "state_spec": state, "cameras": cameras, "takes_state": takes_state}
    return SimpleNamespace(processor=processor, unnorm_key="arm", **said)


def check(own, mapping=None, specs=SEEN, **others):
    given = {"action_spec": ACTION, "state_spec": STATE, "camera_specs": specs, "name": "metaworld", **others}
    check_contract(own, plan_cameras(own, SIMULATOR, mapping), **given)


def test_what_is_alike_passes():
    check(policy())


@pytest.mark.parametrize(
    "own",
    [
        policy(action=replace(ACTION, control_hz=None)),
        policy(action=replace(ACTION, frame=None), state=replace(STATE, frame=None)),
        policy(action=replace(ACTION, gripper=GripperSpec(3, 1, -1))),
        policy(action=None, state=None),
        policy(state=StateSpec(("a",)), takes_state=False),
        policy(cameras=()),
        policy(cameras=(replace(CAMERA, intrinsics=None),)),
        policy(cameras=(replace(CAMERA, intrinsics=((42.6, 0.0, 23.5), (0.0, 42.6, 23.5), (0.0, 0.0, 1.0))),)),
        policy(cameras=(replace(CAMERA, name=None),)),
    ],
)
def test_what_a_checkpoint_leaves_open_is_no_difference(own):
    check(own)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (policy(action=replace(ACTION, control_hz=20.0)), "control_hz: the checkpoint 20.0, metaworld 80.0"),
        (policy(action=replace(ACTION, frame="base")), "frame: the checkpoint 'base', metaworld 'world'"),
        (policy(action=replace(ACTION, gripper=GripperSpec(2, -1, 1))), "gripper: the checkpoint GripperSpec"),
        (policy(action=replace(ACTION, gripper=None)), "gripper: the checkpoint None"),
        (policy(action=replace(ACTION, kind="joint")), "kind: the checkpoint 'joint', metaworld 'delta_ee'"),
        (policy(action=None, action_dim=7), "ActionSpec: the checkpoint, .* has 7 dimensions, metaworld has 4"),
        (policy(state=StateSpec(("x", "y"), frame="world")), r"StateSpec of the checkpoint .* names: the checkpoint"),
        (policy(state=None, state_dim=8), "StateSpec: the checkpoint, .* has 8 dimensions, metaworld has 3"),
        (
            policy(cameras=(replace(CAMERA, name="front"),)),
            r"no camera 'front', it has \['corner4'\].*--camera front=NAME",
        ),
        (policy(cameras=(replace(CAMERA, width=64),)), "64 x 48 pixels, those of 'corner4' 48 x 48"),
        (
            policy(cameras=(replace(CAMERA, intrinsics=((57.9, 0, 24), (0, 57.9, 24), (0, 0, 1))),)),
            r"differ by 16.3 pixels, \[\[57.9, .* --camera corner4=NAME",
        ),
    ],
)
def test_a_difference_is_named(own, message):
    with pytest.raises(ValueError, match=f"This checkpoint is not for metaworld:\n- .*{message}"):
        check(own)


def test_all_differences_stand_in_one_error():
    cameras = (replace(CAMERA, name="front"), replace(CAMERA, name="wrist"))
    own = policy(replace(ACTION, control_hz=20.0), StateSpec(("q",)), cameras)
    with pytest.raises(ValueError) as raised:
        check(own, refused="No camera of this scene is called 'wrist'; there are ['corner4'].")
    lines = str(raised.value).splitlines()
    assert [line[:9] for line in lines[1:]] == ["- ActionS", "- StateSp", "- Camera ", "- Camera "]
    assert "of this scene is called 'wrist'" in lines[3] and "--camera front=NAME" in lines[3]


def test_cameras_are_asked_for_by_the_simulators_name_and_called_by_the_checkpoints():
    front, wrist = replace(CAMERA, name="front", depth=True), CameraSpec("wrist", 64, 32)
    plan = plan_cameras(policy(cameras=(front, wrist)), SIMULATOR, {"front": "corner4"})
    assert plan.sizes == {"corner4": (48, 48), "wrist": (64, 32)} and plan.depth
    picture, depth = np.zeros((48, 48, 3)), np.ones((48, 48))
    observation = {"observation.images.corner4": picture, "observation.depth.corner4": depth, "task": "reach"}
    seen = plan.rename({**observation, "observation.images.wrist": picture, "observation.depth.wrist": depth})
    assert seen["observation.images.front"] is picture and seen["observation.depth.front"] is depth
    assert "observation.images.corner4" not in seen and seen["task"] == "reach" and len(seen) == 5


def test_a_checkpoint_without_cameras_looks_through_the_simulators_first():
    assert plan_cameras(policy(cameras=()), SIMULATOR).sizes == {"corner4": (128, 128)}
    plan = plan_cameras(policy(cameras=(CameraSpec(None, 32, 24),)), SIMULATOR, {"image": "topview"})
    assert plan.sizes == {"topview": (32, 24)} and plan.names == {"image": "topview"}


def test_a_mapping_that_fits_no_camera():
    with pytest.raises(ValueError, match=r"no camera 'fornt'; it has \['corner4'\]"):
        plan_cameras(policy(), SIMULATOR, {"fornt": "corner4"})
    two = policy(cameras=(CAMERA, CameraSpec("wrist", 64, 64)))
    with pytest.raises(ValueError, match="are 'corner4', which has one size only"):
        plan_cameras(two, SIMULATOR, {"wrist": "corner4"})


def test_a_gripper_opens_in_the_other_robots_numbers():
    other = replace(ACTION, gripper=GripperSpec(3, open=0.04, closed=0.0))
    actions = np.array([[[0.5, 0.1, -0.2, -1.0], [0.5, 0.1, -0.2, 1.0], [0.5, 0.1, -0.2, 0.0]]], np.float32)
    before = actions.copy()
    converted = convert_gripper(actions, ACTION, other)
    np.testing.assert_allclose(converted[0, :, 3], [0.04, 0.0, 0.02], atol=1e-8)
    assert np.array_equal(converted[..., :3], before[..., :3]) and converted.dtype == np.float32
    assert np.array_equal(actions, before), "what came was changed"
    np.testing.assert_allclose(convert_gripper(converted, other, ACTION), before, atol=1e-6)
    for own in (ACTION, None, replace(ACTION, gripper=None)):
        assert convert_gripper(actions, own, ACTION) is actions


def test_a_policy_of_bridge_drives_simplers_arm():
    pytest.importorskip("gymnasium")
    from hf_vla.evaluation.envs.simpler import SimplerTask

    bridge, arm = oxe_dataset("bridge_orig").rlds_action, SimplerTask.action_spec
    own = policy(action=bridge, state=None, action_dim=7, takes_state=False)
    check_contract(own, plan_cameras(own, SIMULATOR), arm, STATE, SEEN, "simpler")
    assert ends_differ(bridge, arm)
    grip = convert_gripper(np.array([[0.0] * 6 + [1.0], [0.0] * 6 + [0.0]]), bridge, arm)[:, 6]
    assert grip.tolist() == [1.0, -1.0]
