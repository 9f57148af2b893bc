"""The probes on recorded frames of Meta-World, with real models that look, and some that do not."""

import copy
import json
import zlib

import numpy as np
import pytest
import torch

from hf_vla.actions.spec import ActionSpec, CameraSpec
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.evaluation.probes import PROBES, ProbeContext, probe_dataset
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.modeling_tinyvla import TinyVLAForActionPrediction
from hf_vla.models.tinyvla.processing_tinyvla import TinyVLAProcessor
from hf_vla.policy import Policy

TASKS = ("close the door", "open the door", "press the button", "reach the goal")
FRONT, WRIST = "observation.images.front", "observation.images.wrist"


@pytest.fixture
def observation():
    generator = np.random.default_rng(0)
    pictures = {key: generator.integers(0, 256, (8, 6, 3), np.uint8) for key in (FRONT, WRIST)}
    depth = generator.random((8, 6)).astype(np.float32)
    return {**pictures, "observation.depth.front": depth, "observation.state": np.ones(3), "task": TASKS[1]}


def context(seed=0, step=0, instructions=TASKS):
    return ProbeContext(seed, step, instructions)


@pytest.mark.parametrize("name", sorted(PROBES))
def test_probes_change_a_copy_and_keep_its_form(name, observation):
    before = copy.deepcopy(observation)
    changed = PROBES[name](observation, context())
    again = PROBES[name](observation, context())
    assert changed.keys() == observation.keys() and not all(
        np.array_equal(changed[key], before[key]) for key in before
    )
    for key, value in before.items():
        assert np.array_equal(observation[key], value) and np.array_equal(changed[key], again[key])
        if key != "task":
            assert (changed[key].shape, changed[key].dtype) == (value.shape, value.dtype)
    assert changed["observation.state"] is observation["observation.state"]


@pytest.mark.parametrize("name", ["blank", "noise"])
def test_a_missing_picture_stays_missing(name, observation):
    assert PROBES[name]({**observation, WRIST: None}, context())[WRIST] is None


def test_blank_leaves_nothing_to_see(observation):
    changed = PROBES["blank"](observation, context())
    assert not changed[FRONT].any() and not changed[WRIST].any()
    assert changed["observation.depth.front"] == pytest.approx(observation["observation.depth.front"].mean())
    assert changed["task"] == observation["task"]


def test_swap_gives_every_task_the_instruction_of_another(observation):
    swapped = [PROBES["swap"]({**observation, "task": task}, context())["task"] for task in TASKS]
    assert sorted(swapped) == sorted(TASKS) and all(a != b for a, b in zip(swapped, TASKS, strict=True))
    assert swapped[0] == TASKS[2]  # half the selection away, not the door's other task
    shuffled = context(instructions=TASKS[::-1] + TASKS)
    assert PROBES["swap"]({**observation, "task": TASKS[0]}, shuffled)["task"] == swapped[0]


def test_swap_needs_another_instruction(observation):
    with pytest.raises(ValueError, match="only 'open the door'; select more"):
        PROBES["swap"](observation, context(instructions=(TASKS[1], TASKS[1])))


def test_noise_is_as_large_as_said_and_drawn_by_seed_and_step():
    gray = {FRONT: np.full((96, 96, 3), 128, np.uint8), "task": "reach"}
    noisy = PROBES["noise"](gray, context())[FRONT]
    assert (noisy / 255.0).std() == pytest.approx(0.1, rel=0.02) and noisy.mean() == pytest.approx(128, abs=1)
    assert not np.array_equal(noisy, PROBES["noise"](gray, context(seed=1))[FRONT])
    assert not np.array_equal(noisy, PROBES["noise"](gray, context(step=1))[FRONT])
    assert PROBES["noise"]({**gray, FRONT: np.full((9, 9, 3), 255, np.uint8)}, context())[FRONT].min() > 100  # no wrap


@pytest.fixture(scope="module")
def episodes(demos):
    """Two tasks of the embedded Meta-World demonstrations."""
    return LeRobotEpisodes(demos.parent / "metaworld_demos", episodes=[0, 1, 12], delta_indices={"action": range(4)})


REGRESSION = {"type": "regression"}  # starts from no noise
DIFFUSION = {"type": "diffusion", "denoiser": {"type": "conditional_unet1d", "down_dims": [16, 32]}}


def policy_of(kind=Policy, head=REGRESSION, blind=False, seed=None, n_obs_steps=1):
    """An untrained tiny TinyVLA, whose weights are large enough for every input to matter."""
    config = TinyVLAConfig.from_preset(
        "tiny", head_config=head, action_dim=4, state_dim=4, chunk_size=4, n_obs_steps=n_obs_steps
    )
    torch.manual_seed(0)
    model = TinyVLAForActionPrediction(config)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if blind and "projector" in name:  # whatever is seen arrives as the same numbers
                parameter.zero_()
            elif parameter.ndim > 1:
                parameter.mul_(3.0)
    plain = {"mode": "min_max", "clip": True, "convention": "lerobot"}
    limits = {"min": [-1.0] * 4, "max": [1.0] * 4}
    action_config = {
        "chunk_size": 4,
        "normalization": plain,
        "state_normalization": plain,
        "specs": {"metaworld": {"action": ActionSpec(("x", "y", "z", "gripper"), "delta_ee").to_dict()}},
        "n_obs_steps": n_obs_steps,
    }
    cameras = {"metaworld": [CameraSpec("corner4", 96, 96).to_dict()]}
    statistics = {"metaworld": {"action": limits, "state": limits}}
    return kind(model, TinyVLAProcessor.from_scratch(config, statistics, action_config, cameras), seed=seed)


class Deaf(Policy):
    """Hears the same words, whatever it is told."""

    def predict_chunk(self, observation, reasoning=None):
        return super().predict_chunk({**observation, "task": "reach"}, reasoning)


def test_a_policy_that_looks_and_listens_changes(episodes):
    result = probe_dataset(policy_of(), episodes, frames=6)
    assert (result["frames"], result["episodes"]) == (6, 3) and result["dimensions"] == ["x", "y", "z", "gripper"]
    for name in PROBES:
        assert result["changes"][name]["relative"] > 0.01, name
        assert all(moved > 0 for moved in result["changes"][name]["rmse"])
    assert json.loads(json.dumps(result)) == result


def test_a_policy_that_ignores_its_pictures_does_not_change(episodes):
    policy = policy_of(blind=True)
    changes = probe_dataset(policy, episodes, frames=6)["changes"]
    assert changes["blank"] == {"rmse": [0.0] * 4, "relative": 0.0} == changes["noise"]
    assert changes["swap"]["relative"] > 0.01


def test_a_policy_that_ignores_its_instruction_does_not_change(episodes):
    changes = probe_dataset(policy_of(Deaf), episodes, frames=6)["changes"]
    assert changes["swap"] == {"rmse": [0.0] * 4, "relative": 0.0} and changes["blank"]["relative"] > 0.01


class Constant(Policy):
    """Always predicts one action."""

    def predict_chunk(self, observation, reasoning=None):
        return np.tile(np.float32([0.1, 0.2, 0.3, 0.7]), (4, 1))


def test_a_policy_that_never_varies_has_no_relative_change(episodes):
    result = probe_dataset(policy_of(Constant), episodes, frames=30)
    assert {change["relative"] for change in result["changes"].values()} == {None}


class Dice(Policy):
    """Throws dice for every picture, higher ones for later actions."""

    def predict_chunk(self, observation, reasoning=None):
        rng = np.random.default_rng(zlib.crc32(observation["observation.images.corner4"].tobytes()))
        return rng.standard_normal((4, 4)) * [[0.01], [0.1], [1.0], [3.0]]


def test_a_prediction_for_another_frame_is_the_root_of_two_spreads_away(episodes):
    changes = probe_dataset(policy_of(Dice), episodes, frames=60)["changes"]
    assert changes["noise"]["relative"] == pytest.approx(np.sqrt(2), rel=0.1)


class Replay(Policy):
    """Knows what was recorded, and errs by 0.5 in x; behind the episode's end it predicts anything."""

    def predict_chunk(self, observation, reasoning=None):
        chunk = observation["action"].numpy() + np.float32([0.5, 0.0, 0.0, 0.0])
        chunk[observation["action_is_pad"].numpy()] = 9.0
        return chunk


def test_errors_are_those_of_the_real_actions(episodes):
    episodes = LeRobotEpisodes(episodes.root, episodes=[0], delta_indices={"action": range(4)})
    result = probe_dataset(policy_of(Replay), episodes, frames=len(episodes))
    items = [episodes[row] for row in range(len(episodes))]
    actions = torch.cat([item["action"][~item["action_is_pad"]] for item in items]).double().numpy()
    assert len(actions) < 4 * len(items) and result["frames"] == len(items)
    assert result["rmse"] == pytest.approx([0.5, 0.0, 0.0, 0.0])
    assert result["variance_explained"][:3] == pytest.approx([1 - 0.25 / actions[:, 0].var(), 1.0, 1.0])


def test_noise_of_the_model_itself_is_no_change(episodes):
    policies = [policy_of(head=DIFFUSION, blind=True, seed=seed) for seed in (None, 0)]
    state = torch.random.get_rng_state()
    for policy in policies:
        assert probe_dataset(policy, episodes, frames=2)["changes"]["blank"]["relative"] == 0.0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_earlier_observations_are_changed_as_well(episodes):
    policy = policy_of(blind=True, n_obs_steps=2)
    seen = []
    predict = policy.predict_chunk
    policy.predict_chunk = lambda observation: seen.append(observation) or predict(observation)
    assert probe_dataset(policy, episodes, frames=2)["changes"]["blank"]["relative"] == 0.0
    frames = [int(observation["frame_index"]) for observation in seen]
    last = int(episodes[len(episodes) - 1]["frame_index"])
    assert frames == [0] * (1 + len(PROBES)) + [last - 1, last] * (1 + len(PROBES))
    assert not any(observation["observation.images.corner4"].any() for observation in seen[6:8])


def test_one_instruction_is_not_swapped(episodes, monkeypatch):
    monkeypatch.setattr(episodes, "tasks", {0: "reach"})
    assert [*probe_dataset(policy_of(), episodes, frames=1)["changes"]] == ["blank", "noise"]


def test_actions_need_a_window(demos):
    bare = LeRobotEpisodes(demos.parent / "metaworld_demos", episodes=[0])
    with pytest.raises(ValueError, match=r"delta_indices=\{'action': range\(4\)\}"):
        probe_dataset(policy_of(), bare)


def test_another_robot_is_refused(demos):
    cameras = {"camera_map": {"corner4": "agentview"}, "cameras": ["corner4"]}
    other = LeRobotEpisodes(demos, episodes=[0], delta_indices={"action": range(4)}, **cameras)
    with pytest.raises(ValueError, match="4 numbers per action, came 7"):
        probe_dataset(policy_of(Constant), other, frames=1)
