"""A policy remembers what its checkpoint sees of the past: the same that training showed it."""

import numpy as np
import pytest
import torch

from hf_vla.actions.spec import CameraSpec
from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer
from hf_vla.data.collator import VLACollator
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration
from hf_vla.models.spatialvla.processing_spatialvla import SpatialVLAProcessor
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.modeling_tinyvla import TinyVLAForActionPrediction
from hf_vla.models.tinyvla.processing_tinyvla import TinyVLAProcessor
from hf_vla.policy import Policy

CHUNK, STEPS = 4, 3
CAMERAS = [CameraSpec(name, 96, 96, [[100, 0, 48], [0, 100, 48], [0, 0, 1]]) for name in ("agentview", "wrist")]
LIMITS = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "min": [-1.0] * 7, "max": [1.0] * 7}


def tinyvla(statistics, state_dim):
    config = TinyVLAConfig.from_preset(
        "tiny",
        head_config={"type": "regression"},
        action_dim=7,
        state_dim=state_dim,
        chunk_size=CHUNK,
        n_obs_steps=STEPS,
    )
    plain = {"mode": "min_max", "clip": False, "convention": "tinyvla"}
    action_config = {"chunk_size": CHUNK, "n_obs_steps": STEPS, "normalization": plain, "state_normalization": plain}
    cameras = {"demos": [camera.to_dict() for camera in CAMERAS]}
    torch.manual_seed(0)
    return TinyVLAForActionPrediction(config), TinyVLAProcessor.from_scratch(
        config, {"demos": statistics}, action_config, cameras
    )


def spatialvla(statistics, state_dim):
    config = SpatialVLAConfig.from_preset("tiny", chunk_size=CHUNK, n_obs_steps=STEPS)
    grid = GaussianGridTokenizer(num_bins=(8, 16, 8, 8, 8, 8), distribution="uniform")
    action_config = {
        "chunk_size": CHUNK,
        "n_obs_steps": STEPS,
        "normalization": {"mode": ["quantile"] * 6 + ["zero_one"], "clip": True, "convention": "spatialvla"},
        "tokenizer": {"type": "gaussian_grid", **grid.to_dict()},
    }
    torch.manual_seed(0)
    return SpatialVLAForConditionalGeneration(config), SpatialVLAProcessor.from_scratch(
        config, {"demos": {"action": LIMITS}}, action_config, {"demos": CAMERAS[0].to_dict()}
    )


FAMILIES = {"tinyvla": (tinyvla, [camera.name for camera in CAMERAS]), "spatialvla": (spatialvla, ["agentview"])}


@pytest.fixture(scope="module")
def episodes(demos):
    """With the frames and states of the last steps, as a recipe of n_obs_steps reads them."""
    fps = LeRobotEpisodes(demos, cameras=[]).fps
    past = [(step - STEPS + 1) / fps for step in range(STEPS)]
    deltas = {f"observation.images.{camera.name}": past for camera in CAMERAS} | {"observation.state": past}
    return LeRobotEpisodes(demos, deltas | {"action": [step / fps for step in range(CHUNK)]})


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def system(request, episodes):
    """Model, processor, collator and a list of what the model was given."""
    build, cameras = FAMILIES[request.param]
    states = episodes.column("observation.state")
    statistics = {"action": LIMITS, "state": {"min": states.min(0), "max": states.max(0)}}
    statistics["state"] = {name: values.tolist() for name, values in statistics["state"].items()}
    model, processor = build(statistics, states.shape[-1])
    collator = VLACollator(processor, "demos", cameras, with_state=processor.action_codec.takes_state)
    return model.eval(), processor, collator


def observe(episodes, row):
    """What a robot sees at a row: the last of each window."""
    item = episodes[row]
    windows = ("observation.images.agentview", "observation.images.wrist", "observation.state")
    observation = {name: item[name][-1] for name in windows}
    for name in windows[:2]:
        observation[name] = (observation[name].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    return {**observation, "observation.state": observation["observation.state"].numpy(), "task": item["task"]}


def recorded(policy, monkeypatch):
    """The model's inputs, one dictionary for each prediction."""
    calls, predict = [], policy.model.predict_action

    def record(**inputs):
        calls.append(inputs)
        return predict(**inputs)

    monkeypatch.setattr(policy.model, "predict_action", record)
    return calls


def assert_same(inputs, expected):
    assert inputs.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(inputs[name], value), name


def test_it_sees_what_training_showed(system, episodes, monkeypatch):
    """From an episode's first row on, whether a chunk is being executed or not; then from the next episode's."""
    model, processor, collator = system
    policy = Policy(model, processor, n_action_steps=2)
    calls = recorded(policy, monkeypatch)
    for start in episodes.episode_starts[:2]:
        policy.reset()
        for row in range(start, start + 6):
            policy.select_action(observe(episodes, row))
    rows = [start + step for start in episodes.episode_starts[:2] for step in (0, 2, 4)]
    assert len(calls) == len(rows)
    for inputs, row in zip(calls, rows, strict=True):
        assert_same(inputs, collator.prompts([episodes[int(row)]])["inputs"])
    masked = [int((inputs["attention_mask"] == 0).sum()) for inputs in calls[:3]]
    assert masked[0] > masked[1] == masked[2] == 0 or masked[0] > masked[1] > masked[2] == 0


def test_every_prediction_counts_too_and_once(system, episodes, monkeypatch):
    model, processor, collator = system
    policy = Policy(model, processor, ensemble_coefficient=0.01)
    calls = recorded(policy, monkeypatch)
    policy.predict_chunk(observe(episodes, 0))
    policy.select_action(observe(episodes, 1))
    policy.select_action(observe(episodes, 2))
    policy.predict_chunk(observe(episodes, 3))
    for row, inputs in enumerate(calls):
        assert_same(inputs, collator.prompts([episodes[row]])["inputs"])


def test_another_instruction_is_another_episode(system, episodes, monkeypatch):
    model, processor, collator = system
    policy = Policy(model, processor)
    calls = recorded(policy, monkeypatch)
    policy.select_action({**observe(episodes, 5), "task": "wave"})
    policy.select_action(observe(episodes, 0))
    assert_same(calls[1], collator.prompts([episodes[0]])["inputs"])
    policy.predict_chunk({**observe(episodes, 5), "task": "wave"})
    policy.predict_chunk(observe(episodes, 0))
    assert_same(calls[3], calls[1])


def test_observations_that_are_refused_count_for_nothing(system, episodes, monkeypatch):
    model, processor, collator = system
    policy = Policy(model, processor, n_action_steps=3)
    calls = recorded(policy, monkeypatch)
    for row in range(3):
        good = observe(episodes, row)
        for bad in ({"observation.images.agentview": np.zeros((4, 4), np.int64)}, {"task": 3}):
            with pytest.raises(ValueError):
                policy.select_action(good | bad)
        with pytest.raises(ValueError):
            policy.predict_chunk(good | {"observation.images.agentview": np.full((4, 4, 3), np.nan)})
        policy.select_action(good)
    policy.select_action(observe(episodes, 3))
    assert_same(calls[-1], collator.prompts([episodes[3]])["inputs"])


def test_it_keeps_copies_and_no_more_than_it_needs(system, episodes, monkeypatch):
    """A simulator draws its next picture into the same memory."""
    model, processor, collator = system
    policy = Policy(model, processor)
    calls = recorded(policy, monkeypatch)
    memory = observe(episodes, 0)
    for row in range(5):
        for name, value in observe(episodes, row).items():
            if isinstance(value, np.ndarray):
                memory[name][...] = value
        policy.select_action(memory)
    assert len(policy._past) == STEPS - 1
    assert_same(calls[1], collator.prompts([episodes[4]])["inputs"])
    policy.reset()
    assert not policy._past


def test_a_camera_that_is_out_of_order_for_a_while(episodes, monkeypatch):
    model, processor = tinyvla({"action": LIMITS, "state": LIMITS}, 7)
    policy = Policy(model, processor, n_action_steps=1)
    calls = recorded(policy, monkeypatch)
    state = {"observation.state": np.zeros(7)}
    for row in range(4):
        missing = {"observation.images.wrist": None} if row in (1, 2) else {}
        policy.select_action(observe(episodes, row) | state | missing)
    counts = [int((inputs["attention_mask"] == 0).sum()) for inputs in calls]
    tokens = counts[0] // 4
    assert counts == [4 * tokens, 3 * tokens, 2 * tokens, 2 * tokens]


def test_depth_has_a_history_too(episodes, monkeypatch):
    config = SpatialVLAConfig.from_preset(
        "tiny", chunk_size=CHUNK, n_obs_steps=STEPS, use_vision_zoe=False, use_ego3d=True
    )
    _, processor = spatialvla(None, None)
    camera = CAMERAS[0].to_dict() | {"depth": True}
    processor = SpatialVLAProcessor.from_scratch(
        config, processor.statistics, processor.action_config, {"demos": camera}
    )
    policy = Policy(SpatialVLAForConditionalGeneration(config), processor, n_action_steps=1)
    calls = recorded(policy, monkeypatch)
    depth = np.empty((96, 96))
    for row in range(4):
        depth[...] = row + 1.0
        policy.select_action(observe(episodes, row) | {"observation.depth.agentview": depth})
    assert [inputs["depth"][0, :, 0, 0].tolist() for inputs in calls] == [[1, 1, 1], [2, 1, 2], [1, 2, 3], [2, 3, 4]]
