"""hf_vla's checkpoints as LeRobot's policies, through all that LeRobot's train, eval and record commands call."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from hf_vla.data.collator import VLACollator
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.policy import Policy

CORNER, STATE = "observation.images.corner4", "observation.state"
SHIPPED = {
    "divla_metaworld": ("metaworld_demos", "corner4"),
    "spatialvla_metaworld": ("metaworld_demos", "corner4"),
    "spatialvla_robosuite": ("robosuite_demos", "wrist"),
    "tinyvla_metaworld": ("metaworld_demos", "corner4"),
}


@pytest.fixture(scope="session")
def checkpoints(demos):
    return demos.parents[2] / "spaces" / "action_demo" / "checkpoints"


def metadata(episodes):
    """What LeRobot knows of a dataset; its statistics are wild, since nobody may use them."""
    wild = {"mean": [1000.0], "std": [0.001], "min": [-1e6], "max": [1e6]}
    return SimpleNamespace(features=episodes.info.features, stats={"action": wild, STATE: wild, CORNER: wild})


class Robot:
    """A policy with its pipelines, as LeRobot's commands make them."""

    def __init__(self, lerobot, checkpoint, episodes, **options):
        meta = metadata(episodes)
        self.config = lerobot.factory.make_policy_config("hf_vla", checkpoint=str(checkpoint), device="cpu", **options)
        self.policy = lerobot.factory.make_policy(self.config, meta)
        self.before, self.behind = lerobot.factory.make_pre_post_processors(self.config, dataset_stats=meta.stats)

    def act(self, batch):
        with torch.inference_mode():
            return self.behind(self.policy.select_action(self.before(batch))).numpy()


@pytest.fixture
def metaworld(demos):
    return LeRobotEpisodes(demos.parent / "metaworld_demos", delta_indices={"action": range(16)})


def seen(items):
    """A batch as a vector of simulators gives it, after LeRobot's conversion."""
    keys = [key for key in items[0] if key.startswith("observation.")]
    return {key: torch.stack([item[key] for item in items]) for key in keys} | {
        "task": [item["task"] for item in items]
    }


def test_lerobot_finds_and_names_it(lerobot):
    assert lerobot.new == {"hf_vla"}
    kind = lerobot.factory.get_policy_class("hf_vla")
    assert kind.__name__ == "HfVlaPolicy" and kind.name == "hf_vla"
    assert kind.config_class is lerobot.config.get_choice_class("hf_vla")


@pytest.mark.parametrize("name", SHIPPED)
def test_record_gets_what_hf_vla_itself_says(lerobot, checkpoints, demos, name):
    """One robot, its pictures uint8 at first: to the last bit what the policy of this library answers."""
    dataset, camera = SHIPPED[name]
    episodes = LeRobotEpisodes(demos.parent / dataset)
    robot = Robot(lerobot, checkpoints / name, episodes, seed=0, n_action_steps=2)
    own = Policy.from_pretrained(checkpoints / name, seed=0, n_action_steps=2, device="cpu")
    for row in range(5):
        item = episodes[row]
        batch = {key: value for key, value in item.items() if key in (f"observation.images.{camera}", STATE, "task")}
        action = robot.act(batch)
        assert action.shape == (1, len(own.action_spec.names))
        np.testing.assert_array_equal(action[0], own.select_action(batch))


def test_training_sees_what_hf_vla_itself_sees(lerobot, checkpoints, metaworld):
    robot = Robot(lerobot, checkpoints / "tinyvla_metaworld", metaworld)
    end = metaworld.episode_starts[1]
    items = [metaworld[row] for row in (0, 30, end - 3, 500)]  # the third one's chunk goes on behind its episode
    batch = default_collate(items)
    assert batch["action_is_pad"].any() and robot.config.action_delta_indices == [*range(16)]
    through = robot.before(batch)
    for key in ("action", STATE, CORNER):
        torch.testing.assert_close(through[key], batch[key], rtol=0, atol=0)
    torch.manual_seed(0)
    loss, logged = robot.policy.forward(through)
    torch.manual_seed(0)
    own = robot.policy.model(**VLACollator(robot.policy.processor, "push", ["corner4"], True)(items)).loss
    assert loss.item() == own.item() == logged["loss"]


def test_a_step_changes_the_policy(lerobot, checkpoints, metaworld):
    robot = Robot(lerobot, checkpoints / "tinyvla_metaworld", metaworld, optimizer_lr=3e-4)
    optimizer = robot.config.get_optimizer_preset().build(robot.policy.get_optim_params())
    assert robot.config.get_scheduler_preset() is None and optimizer.param_groups[0]["lr"] == 3e-4
    batch = robot.before(default_collate([metaworld[row] for row in (20, 520, 1020, 1520)]))
    losses = []
    for _ in range(5):
        torch.manual_seed(0)
        loss, _ = robot.policy.train().forward(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_every_row_is_a_robot_of_its_own(lerobot, checkpoints, metaworld):
    options = {"seed": 3, "n_action_steps": 2}
    robot = Robot(lerobot, checkpoints / "tinyvla_metaworld", metaworld, **options)
    starts = (0, 500, 1500)
    alone = [
        Policy.from_pretrained(checkpoints / "tinyvla_metaworld", seed=3 + row, n_action_steps=2, device="cpu")
        for row in range(3)
    ]
    for _ in range(2):  # twice, since a reset starts all anew
        robot.policy.reset()
        for policy in alone:
            policy.reset()
        for step in range(5):
            items = [metaworld[start + step] for start in starts]
            if step == 3:
                items[1]["task"] = "open the window"  # in the midst of a chunk: predicts anew
            actions = robot.act(seen(items))
            expected = [policy.select_action(item) for policy, item in zip(alone, items, strict=True)]
            np.testing.assert_allclose(actions, expected, atol=1e-5)
    chunks = robot.policy.predict_action_chunk(robot.before(seen(items)))
    assert chunks.shape == (3, 16, 4)


def test_one_call_predicts_for_all_rows(lerobot, checkpoints, metaworld, monkeypatch):
    robot = Robot(lerobot, checkpoints / "tinyvla_metaworld", metaworld)
    sizes, predict = [], robot.policy.model.predict_action

    def counted(**inputs):
        sizes.append(len(inputs["input_ids"]))
        return predict(**inputs)

    monkeypatch.setattr(robot.policy.model, "predict_action", counted)
    items = [metaworld[0], metaworld[1], metaworld[2]]
    for _ in range(3):
        robot.act(seen(items))
    assert sizes == [3]


def test_saved_and_loaded_again_without_the_checkpoint(lerobot, checkpoints, metaworld, tmp_path):
    robot = Robot(lerobot, checkpoints / "tinyvla_metaworld", metaworld, seed=0)
    with torch.no_grad():
        for parameter in robot.policy.model.action_head.parameters():
            parameter.mul_(1.01)
    for part in (robot.policy, robot.before, robot.behind):
        part.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["type"] == "hf_vla" and saved["chunk_size"] == 16
    (tmp_path / "config.json").write_text(json.dumps({**saved, "checkpoint": "/nowhere/any/more"}))

    config = lerobot.config.from_pretrained(tmp_path)
    config.pretrained_path = tmp_path
    meta = metadata(metaworld)
    again = lerobot.factory.make_policy(config, meta)
    # what lerobot-train overrides when it goes on from a checkpoint
    stats = {"stats": meta.stats, "features": {**config.input_features, **config.output_features}}
    norm_map = {"norm_map": config.normalization_mapping}
    before, behind = lerobot.factory.make_pre_post_processors(
        config,
        tmp_path,
        preprocessor_overrides={"device_processor": {"device": "cpu"}, "normalizer_processor": stats | norm_map},
        postprocessor_overrides={"unnormalizer_processor": stats | norm_map},
    )
    batch = seen([metaworld[0], metaworld[900]])
    expected = robot.act(batch)
    np.testing.assert_array_equal(behind(again.select_action(before(batch))).numpy(), expected)
    # and the library itself reads the folder within
    own = Policy.from_pretrained(tmp_path / "hf_vla", seed=0, device="cpu")
    np.testing.assert_array_equal(own.select_action(metaworld[0]), expected[0])
    assert not (tmp_path / "model.safetensors").exists()


def test_a_plain_checkpoint_loads_as_a_policy(lerobot, checkpoints, metaworld):
    kind = lerobot.factory.get_policy_class("hf_vla")
    policy = kind.from_pretrained(checkpoints / "spatialvla_metaworld")
    assert not policy.training and policy.select_action(seen([metaworld[0]])).shape == (1, 4)


def test_nobody_can_have_lerobot_normalise(lerobot, checkpoints):
    with pytest.raises(TypeError, match="normalization_mapping"):
        lerobot.factory.make_policy_config("hf_vla", normalization_mapping={"ACTION": "MEAN_STD"})
    config = lerobot.factory.make_policy_config("hf_vla", checkpoint=str(checkpoints / "tinyvla_metaworld"))
    assert {*config.normalization_mapping.values()} == {"IDENTITY"}


def test_cameras_of_other_names(lerobot, checkpoints, metaworld):
    def renamed(key):
        return {key if name == CORNER else name: value for name, value in metaworld.info.features.items()}

    plain = Robot(lerobot, checkpoints / "tinyvla_metaworld", metaworld, seed=0)
    batch = seen([metaworld[0]])
    for mapped, key in (("top", "observation.images.top"), ("observation.image", "observation.image")):
        features = SimpleNamespace(info=SimpleNamespace(features=renamed(key)))
        robot = Robot(lerobot, checkpoints / "tinyvla_metaworld", features, seed=0, camera_map={"corner4": mapped})
        assert [*robot.config.input_features] == [key, STATE]
        other = {key if name == CORNER else name: value for name, value in batch.items()}
        np.testing.assert_array_equal(robot.act(other), plain.act(batch))
        with pytest.raises(ValueError, match=rf"needs \['{key}'\].*camera_map"):
            robot.act(batch)
        plain.policy.reset()
    with pytest.raises(ValueError, match=r"camera_map names \['front'\]; this checkpoint's cameras are \['corner4'\]"):
        Robot(lerobot, checkpoints / "tinyvla_metaworld", metaworld, camera_map={"front": "top"})


def test_several_observations_are_asked_for_and_remembered(lerobot, sawyer, metaworld, tmp_path):
    model, processor = sawyer("tinyvla", n_obs_steps=2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    robot = Robot(lerobot, tmp_path, metaworld, seed=0, n_action_steps=2)
    assert robot.config.n_obs_steps == 2 and robot.config.observation_delta_indices == [-1, 0]
    own = Policy.from_pretrained(tmp_path, seed=0, n_action_steps=2, device="cpu")
    for row in range(5):
        np.testing.assert_array_equal(robot.act(seen([metaworld[row]]))[0], own.select_action(metaworld[row]))
    windows = {"action": range(4), CORNER: [-1, 0], STATE: [-1, 0]}
    windowed = LeRobotEpisodes(metaworld.root, delta_indices=windows)
    items = [windowed[row] for row in (0, 5)]
    torch.manual_seed(0)
    loss, _ = robot.policy.forward(robot.before(default_collate(items)))
    torch.manual_seed(0)
    collate = VLACollator(robot.policy.processor, "metaworld", ["corner4"], True)
    assert loss.item() == robot.policy.model(**collate(items)).loss.item()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda batch: batch.pop("task"), "'task', a list with the instruction"),
        (lambda batch: batch.pop(STATE), r"needs \['observation.state'\]"),
        (lambda batch: batch.pop(CORNER), r"needs \['observation.images.corner4'\]"),
    ],
)
def test_what_is_missing_is_named(lerobot, checkpoints, metaworld, change, words):
    robot = Robot(lerobot, checkpoints / "tinyvla_metaworld", metaworld)
    batch = seen([metaworld[0]])
    change(batch)
    with pytest.raises(ValueError, match=words):
        robot.policy.select_action(batch)


def test_another_robot_is_refused(lerobot, checkpoints, demos):
    with pytest.raises(ValueError, match="predicts 16 actions of 4 numbers, expected were 16 of 7"):
        Robot(lerobot, checkpoints / "tinyvla_metaworld", LeRobotEpisodes(demos))


def test_nothing_to_start_from(lerobot, metaworld):
    config = lerobot.factory.make_policy_config("hf_vla")
    with pytest.raises(ValueError, match="give --policy.checkpoint"):
        lerobot.factory.make_policy(config, metadata(metaworld))
    with pytest.raises(ValueError, match="give --policy.checkpoint"):
        config.action_delta_indices  # noqa: B018


def test_options_without_a_meaning_are_refused(lerobot, checkpoints, metaworld):
    robot = Robot(lerobot, checkpoints / "tinyvla_metaworld", metaworld)
    batch = seen([metaworld[0]])
    with pytest.raises(ValueError, match="takes no \\['noise'\\]"):
        robot.policy.select_action(batch, noise=torch.zeros(1))
    with pytest.raises(ValueError, match="reduction 'mean', came 'none'"):
        robot.policy.forward(batch, reduction="none")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_refused(lerobot, checkpoints, metaworld, tmp_path):
    from transformers import AutoModel, AutoProcessor

    from hf_vla.training.lora import add_lora

    add_lora(AutoModel.from_pretrained(checkpoints / "tinyvla_metaworld"), r=2).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(checkpoints / "tinyvla_metaworld").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an adapter: merge it"):
        Robot(lerobot, tmp_path, metaworld)


def test_the_readme_names_no_option_that_is_none(lerobot, checkpoints):
    readme = (checkpoints.parents[2] / "lerobot_policy_hf_vla" / "README.md").read_text()
    options = {*re.findall(r"--policy\.(\w+)", readme)}
    known = vars(lerobot.factory.make_policy_config("hf_vla")).keys() | {"type", "path"}
    assert options and options <= known
