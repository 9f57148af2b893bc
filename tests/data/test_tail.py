import numpy as np
import pytest
import torch

from hf_vla.actions.codec import ActionCodec
from hf_vla.actions.spec import ActionSpec, GripperSpec
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.tail import hold_tail

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
DELTA = ActionSpec(NAMES, "delta_ee", "euler_xyz", "base", 5.0, GripperSpec(6, 1.0, 0.0))
ABSOLUTE = ActionSpec(NAMES, "absolute_ee", "euler_xyz", "base", 5.0, GripperSpec(6, 1.0, 0.0))
JOINT = ActionSpec(tuple(f"joint_{i}" for i in range(7)), "joint")
REAL = np.arange(1, 29, dtype=np.float32).reshape(4, 7)


def test_a_delta_stops_and_keeps_the_gripper():
    held = hold_tail(REAL, np.array([False, False, True, True]), DELTA)
    np.testing.assert_array_equal(held[:2], REAL[:2])
    np.testing.assert_array_equal(held[2:], [[0, 0, 0, 0, 0, 0, 14]] * 2)
    assert held.dtype == np.float32


@pytest.mark.parametrize("spec", [ABSOLUTE, JOINT], ids=["absolute_ee", "joint"])
def test_a_pose_stays_the_last_real_one(spec):
    held = hold_tail(REAL, np.array([False, False, True, True]), spec)
    np.testing.assert_array_equal(held, REAL[[0, 1, 1, 1]])


@pytest.mark.parametrize("spec", [DELTA, ABSOLUTE], ids=["delta_ee", "absolute_ee"])
def test_before_the_start_the_first_real_action_counts(spec):
    held = hold_tail(REAL, np.array([True, False, False, True]), spec)
    pose = REAL[[1, 2], :6] if spec is ABSOLUTE else np.zeros((2, 6))
    np.testing.assert_array_equal(held[[0, 3], :6], pose)
    np.testing.assert_array_equal(held[[0, 3], 6], REAL[[1, 2], 6])


@pytest.mark.parametrize(
    ("rotation", "rest"),
    [("quaternion_wxyz", [1, 0, 0, 0]), ("rot6d", [1, 0, 0, 0, 1, 0]), ("matrix", [1, 0, 0, 0, 1, 0, 0, 0, 1])],
)
def test_no_rotation_is_the_identity_of_its_format(rotation, rest):
    names = (*"xyz", *(f"r{i}" for i in range(len(rest))), "gripper", "terminate")
    spec = ActionSpec(names, "delta_ee", rotation, gripper=GripperSpec(len(rest) + 3, 1.0, 0.0))
    actions = np.full((2, len(names)), 0.5)
    held = hold_tail(actions, np.array([False, True]), spec)
    np.testing.assert_array_equal(held[1], [0, 0, 0, *rest, 0.5, 0.5])  # what "terminate" means is not declared: kept


def test_the_gripper_need_not_be_last_and_a_rotation_need_not_be_there():
    spec = ActionSpec(("gripper", "dx", "dy", "dz"), "delta_ee", gripper=GripperSpec(0, 1.0, 0.0))
    held = hold_tail(np.ones((2, 4)), np.array([False, True]), spec)
    np.testing.assert_array_equal(held[1], [1, 0, 0, 0])


def test_tensors_come_back_as_tensors_and_nothing_is_changed_in_place():
    actions = torch.from_numpy(REAL.copy()).expand(3, 2, 4, 7).contiguous()
    is_pad = torch.zeros(3, 2, 4, dtype=torch.bool)
    is_pad[1, :, 2:] = True
    held = hold_tail(actions, is_pad, DELTA)
    assert isinstance(held, torch.Tensor) and held.dtype == torch.float32 and held.shape == actions.shape
    assert torch.equal(actions[1, 0], torch.from_numpy(REAL))
    assert torch.equal(held[0], actions[0]) and torch.equal(held[1, :, 2:, :6], torch.zeros(2, 2, 6))
    assert torch.equal(held[1, :, 2:, 6], torch.full((2, 2), 14.0))


def test_wrong_shapes_and_chunks_without_an_action_are_refused():
    with pytest.raises(ValueError, match=r"\(\.\.\., chunk_size, 7\).*came \(4, 6\) and \(4,\)"):
        hold_tail(REAL[:, :6], np.zeros(4, bool), DELTA)
    with pytest.raises(ValueError, match=r"came \(4, 7\) and \(3,\)"):
        hold_tail(REAL, np.zeros(3, bool), DELTA)
    with pytest.raises(ValueError, match="no position to hold"):
        hold_tail(REAL, np.ones(4, bool), ABSOLUTE)


def test_holding_survives_quantile_normalisation_and_mid_range_does_not():
    statistics = {
        "q01": [-0.02] * 6 + [0.0],
        "q99": [0.06] * 6 + [1.0],
        "min": [-0.1] * 6 + [0],
        "max": [0.1] * 6 + [1],
    }
    config = {"normalization": {"mode": ["quantile"] * 6 + ["zero_one"], "clip": True, "convention": "spatialvla"}}
    codec = ActionCodec({"bridge": {"action": statistics}}, {"chunk_size": 4, **config})
    actions = np.clip(REAL / 500, 0, 1).astype(np.float32)
    held = hold_tail(actions, np.array([False, False, True, True]), DELTA)
    decoded = codec.decode(codec.encode(held, "bridge"), "bridge")
    np.testing.assert_allclose(decoded[2:, :6], 0.0, atol=1e-7)
    middle = codec.encode(held, "bridge").copy()
    middle[2:, :6] = 0.0
    np.testing.assert_allclose(codec.decode(middle, "bridge")[2:, :6], 0.02, atol=1e-6)  # moves by 2 cm a step


def test_the_windows_of_a_dataset_hold_at_the_end_of_an_episode(demos):
    dataset = LeRobotEpisodes(demos, {"action": [step / 20 for step in range(4)]}, cameras=[])
    spec = ActionSpec(
        tuple(f"d{i}" for i in range(6)) + ("gripper",), "delta_ee", "axis_angle", gripper=GripperSpec(6, -1, 1)
    )
    item = dataset[int(dataset.episode_starts[1]) - 2]
    held = hold_tail(item["action"], item["action_is_pad"], spec)
    assert item["action_is_pad"].tolist() == [False, False, True, True]
    assert torch.equal(held[:2], item["action"][:2])
    assert torch.equal(held[2:, :6], torch.zeros(2, 6)) and torch.equal(held[2:, 6], item["action"][[1, 1], 6])
