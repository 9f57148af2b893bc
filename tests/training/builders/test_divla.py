"""DiVLA from a recipe: new, on a pretrained backbone, from a checkpoint, and for a new robot."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

import hf_vla  # noqa: F401
from hf_vla.actions.heads.registry import build_action_head
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction
from hf_vla.policy import Policy
from hf_vla.training.arguments import ModelArguments
from hf_vla.training.builders.divla import build_divla
from hf_vla.training.builders.registry import build
from hf_vla.training.datasets import open_datasets
from hf_vla.training.facts import data_facts
from hf_vla.training.run import train

CHECKPOINT = {"model__preset": None, "model__config": None}


def make(recipe):
    return build(recipe, open_datasets(recipe.data))


def save(parts, folder):
    for part in parts:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def divla(make_recipe, tmp_path_factory):
    """A saved, untrained tiny DiVLA."""
    torch.manual_seed(0)
    return save(make(make_recipe("unused", "divla_tiny")), tmp_path_factory.mktemp("divla"))


@pytest.fixture(scope="module")
def latent(make_recipe, tmp_path_factory):
    """A tiny DiVLA with latent actions after two steps."""
    folder = tmp_path_factory.mktemp("latent")
    train(make_recipe(folder, "divla_latent_tiny", training__max_steps=2, data__eval_episodes=[]))
    return folder


def test_a_new_model_is_for_the_datasets_robot(divla, make_recipe, tmp_path):
    config = AutoModel.from_pretrained(divla).config
    assert (config.action_dim, config.state_dim, config.chunk_size, config.max_reasoning_tokens) == (7, 8, 4, 64)
    assert config.latent_dim is None and config.embodiments is None
    options = {"model__config__num_kv_heads": 2}
    with pytest.raises(ValueError, match="DiVLAConfig has no 'num_kv_heads' that model.config could set"):
        make(make_recipe(tmp_path, "divla_tiny", **options))


def test_a_new_model_for_data_without_reasonings_says_nothing(make_recipe, tmp_path, demo_item, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        model, processor = make(make_recipe(tmp_path, "divla_tiny", data__reasoning=None))
    assert "No data.reasoning: the model will act without a word (max_reasoning_tokens 0)." in caplog.text
    policy = Policy(model, processor, seed=0)
    assert policy.predict_chunk(demo_item).shape == (4, 7) and not policy.reasoning
    caplog.clear()
    options = {"data__reasoning": None, "model__config__max_reasoning_tokens": 5}
    model, _ = make(make_recipe(tmp_path, "divla_tiny", **options))
    assert model.config.max_reasoning_tokens == 5
    assert "No data.reasoning, so what the model will say (up to 5 tokens) is not learnt." in caplog.text
    monkeypatch.setattr(LeRobotEpisodes, "texts", lambda self, name: np.full(len(self), " ", object))
    with caplog.at_level(logging.INFO):
        model, _ = make(make_recipe(tmp_path, "divla_tiny"))
    assert model.config.max_reasoning_tokens == 0
    assert "The column data.reasoning is blank: the model will act without a word" in caplog.text


def changed(folder, name, new):
    """Change entries of a saved configuration."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | new))
    return folder


def test_reasonings_must_be_texts_of_the_dataset_and_short_enough(make_recipe, tmp_path):
    with pytest.raises(ValueError, match="no text 'thought'.* set data.reasoning: null"):
        make(make_recipe(tmp_path, "divla_tiny", data__reasoning="thought"))
    longest = len("reach for the red cubeNext action:") + 1
    make(make_recipe(tmp_path, "divla_tiny", model__config__max_reasoning_tokens=longest))
    with pytest.raises(ValueError, match=f"may say 34 tokens, .* has {longest} .*'reach for.*tokens to {longest} or"):
        make(make_recipe(tmp_path, "divla_tiny", model__config__max_reasoning_tokens=34))


@pytest.mark.parametrize(("limit", "reasoning", "wanted"), [(0, "subtask", 35), (34, "subtask", 35), (34, None, 0)])
def test_a_checkpoint_says_what_it_learns_to_the_end_or_nothing(
    limit, reasoning, wanted, divla, make_recipe, tmp_path, caplog
):
    folder = changed(shutil.copytree(divla, tmp_path / "old"), "config.json", {"max_reasoning_tokens": limit})
    options = {**CHECKPOINT, "model__path": str(folder), "data__reasoning": reasoning}
    with caplog.at_level(logging.INFO):
        model, processor = make(make_recipe(tmp_path, "divla_tiny", **options))
    assert model.config.max_reasoning_tokens == wanted
    said = f"may say {limit} tokens, the data's longest reasoning has 35" if reasoning else "No data.reasoning"
    assert said in caplog.text
    saved = AutoModel.from_pretrained(save((model, processor), tmp_path / "new"))
    assert saved.config.max_reasoning_tokens == wanted


def test_what_only_held_out_episodes_say_is_not_taught(make_recipe, tmp_path):
    data = make_recipe(tmp_path, "divla_tiny").data
    (opened,) = open_datasets(data)
    texts = opened.episodes.texts("subtask")
    opened = replace(opened, train_rows=np.flatnonzero(texts == texts[0]))
    assert len(set(texts)) > 1 and data_facts(data, [opened]).reasonings == [texts[0]]


@pytest.mark.parametrize("source", ["preset", "backbone"])
def test_a_new_model_is_of_the_recipes_precision(source, qwen, make_recipe, tmp_path):
    recipe = make_recipe(tmp_path, "divla_latent_tiny")
    arguments = ModelArguments(
        "divla", **{source: "tiny" if source == "preset" else str(qwen)}, config=recipe.model.config, dtype="bfloat16"
    )
    model, _ = build_divla(arguments, data_facts(recipe.data, open_datasets(recipe.data)))
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}


def test_the_end_of_a_divlas_reasonings_stays_its_own_under_a_new_head(divla, make_recipe, tmp_path):
    """Not its tokenizer's."""
    folder = changed(shutil.copytree(divla, tmp_path / "other"), "config.json", {"end_token_id": 262})
    prompt = AutoProcessor.from_pretrained(divla).prompt_config | {"answer": "{reasoning}<|vision_end|>"}
    changed(folder, "processor_config.json", {"prompt_config": prompt})
    model, processor = make(make_recipe(tmp_path, "divla_tiny", **CHECKPOINT, model__backbone=str(folder)))
    assert model.config.end_token_id == processor.end_token_id == 262 != processor.tokenizer.eos_token_id


@pytest.mark.parametrize("source", ["qwen", "divla"])
def test_a_new_head_on_a_pretrained_backbone(source, make_recipe, tmp_path, demo_item, request, monkeypatch):
    folder, init = request.getfixturevalue(source), DiVLAForActionPrediction.__init__

    def built_once(self, config, backbone=None):
        assert backbone is not None or torch.empty(0).device.type == "meta"  # a second would take time and memory
        init(self, config, backbone)

    monkeypatch.setattr(DiVLAForActionPrediction, "__init__", built_once)
    options = {"model__preset": None, "model__backbone": str(folder), "data__chunk_size": 8}
    options["model__config"] = {"head_config": {"type": "regression"}, "max_reasoning_tokens": 40, "latent_dim": 9}
    model, processor = make(make_recipe(tmp_path, "divla_tiny", **options))
    assert {each.device.type for each in model.state_dict().values()} == {"cpu"}
    pretrained = AutoModelForImageTextToText.from_pretrained(folder)
    wanted = getattr(pretrained, "backbone", pretrained).state_dict()
    assert "lm_head.weight" in wanted and model.backbone.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in model.backbone.state_dict().items())
    assert processor.tokenizer.convert_ids_to_tokens(model.config.end_token_id) == (
        "<|im_end|>" if source == "qwen" else "<eos>"
    )
    if source == "divla":
        assert processor.prompt_config == AutoProcessor.from_pretrained(folder).prompt_config
    else:
        assert "<|im_start|>assistant\n" in processor.prompt_config["template"]
    save((model, processor), tmp_path)
    chunk = Policy(model, processor).predict_chunk(demo_item)
    assert chunk.shape == (8, 7)
    np.testing.assert_allclose(Policy.from_pretrained(tmp_path).predict_chunk(demo_item), chunk, atol=1e-5)


def test_what_is_no_backbone_is_an_error(qwen, vlm, make_recipe, tmp_path):
    folder = shutil.copytree(qwen, tmp_path / "qwen")
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if "merger.mlp.0.weight" in name)]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    options = {**CHECKPOINT, "model__backbone": str(folder)}
    with pytest.raises(ValueError, match="model.backbone .* lacks 1 weights of a Qwen2VLFor.*merger.mlp.0.weight"):
        make(make_recipe(tmp_path, "divla_tiny", **options))
    tinyvla = save(make(make_recipe(tmp_path, "tinyvla_tiny")), tmp_path / "tinyvla")
    options["model__backbone"] = str(tinyvla)
    with pytest.raises(ValueError, match="is a tinyvla: give a vision-language model of transformers, or a divla"):
        make(make_recipe(tmp_path, "divla_tiny", **options))


def test_a_checkpoint_goes_on_with_its_weights_and_prompt_for_new_data(divla, make_recipe, tmp_path):
    options = {**CHECKPOINT, "model__family": None, "model__path": str(divla)}
    model, processor = make(make_recipe(tmp_path, "divla_tiny", **options, data__unnorm_key="mine"))
    saved = AutoModel.from_pretrained(divla).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert processor.action_codec.keys == ["mine"]
    assert processor.prompt_config == AutoProcessor.from_pretrained(divla).prompt_config
    with pytest.raises(ValueError, match=r"has chunk_size 4, the recipe's data have 8. .* name it as model.backbone"):
        make(make_recipe(tmp_path, "divla_tiny", **options, data__chunk_size=8))


def test_robots_are_named_like_their_datasets(latent, make_recipe, tmp_path):
    model, processor = AutoModel.from_pretrained(latent), AutoProcessor.from_pretrained(latent)
    assert model.config.embodiments == {"robosuite_demos": {"action_dim": 7, "state_dim": 8}}
    assert processor.embodiments == {"robosuite_demos": "robosuite_demos"}
    _, processor = make(make_recipe(tmp_path, "divla_latent_tiny", data__unnorm_key="demos.v2"))
    assert processor.embodiments == {"demos.v2": "demos_v2"}
    options = {**CHECKPOINT, "model__path": str(latent), "data__unnorm_key": "mine"}  # the same robot, other data
    _, processor = make(make_recipe(tmp_path, "divla_latent_tiny", **options))
    assert processor.embodiments == {"mine": "robosuite_demos"} and processor.action_codec.keys == ["mine"]
    model, _ = make(make_recipe(tmp_path, "divla_latent_tiny", **options, data__reasoning=None))
    assert model.config.max_reasoning_tokens == 0  # no other robot acts under words
    options = {"model__config__embodiments": {"x": {"action_dim": 7, "state_dim": 8}}}
    with pytest.raises(ValueError, match="model.config.embodiments follows from the data"):
        make(make_recipe(tmp_path, "divla_latent_tiny", **options))


METAWORLD = {
    "data__source": "scripts/data/metaworld_demos",
    "data__cameras": [{"name": "corner4"}],
    "data__state": {},
    "data__action": {"kind": "delta_ee", "frame": "base", "gripper": {"index": 3, "open": -1.0, "closed": 1.0}},
    "data__reasoning": None,
    "data__eval_episodes": [],
}


def test_a_new_robot_is_trained_alone_and_the_old_one_acts_as_before(latent, make_recipe, tmp_path, demo_item):
    options = {**METAWORLD, **CHECKPOINT, "model__path": str(latent), "training__learning_rate": 1e-2}
    with pytest.raises(ValueError, match="has action_dim 7, the recipe's data have 4. .* model.new_embodiment: true"):
        make(make_recipe(tmp_path, "divla_latent_tiny", **options))
    options["model__new_embodiment"] = True
    steps = {"training__max_steps": 4, "training__save_steps": 2, "training__logging_steps": 1}
    train(make_recipe(tmp_path, "divla_latent_tiny", **options, **steps))
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    parts = ("diffusion_loss", "ntp_loss", "reconstruction_loss", "volume_loss")
    losses = [(entry["loss"], sum(entry[name] for name in parts)) for entry in log if "loss" in entry]
    assert len(losses) == 4 and log[2]["volume_loss"] != 0
    assert all(loss == pytest.approx(total, rel=1e-5) for loss, total in losses)
    before, after = (load_file(folder / "model.safetensors") for folder in (latent, tmp_path))
    assert {name for name in after if not name.startswith("embodiments.metaworld_demos")} == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    untrained = [name for name in after if name.endswith("couplings.0.2.weight") and not after[name].any()]
    assert untrained == ["embodiments.robosuite_demos.decoder.couplings.0.2.weight"]

    wanted = Policy.from_pretrained(latent, seed=0).predict_chunk(demo_item)
    old = Policy.from_pretrained(tmp_path, unnorm_key="robosuite_demos", seed=0)
    np.testing.assert_allclose(old.predict_chunk(demo_item), wanted, atol=1e-5)
    observation = {"observation.images.corner4": np.zeros((96, 96, 3), np.uint8), "task": "reach"}
    new = Policy.from_pretrained(tmp_path, unnorm_key="metaworld_demos")
    size = len(new.state_spec.names)
    assert new.predict_chunk(observation | {"observation.state": np.zeros(size)}).shape == (4, 4)

    known = AutoProcessor.from_pretrained(tmp_path)
    both = {"robosuite_demos", "metaworld_demos"}
    for entries in (known.statistics, known.camera_config, known.action_config["specs"], known.embodiments):
        assert entries.keys() == both
    assert known.action_codec.specs("robosuite_demos")[0].rotation == "axis_angle"

    # resumed, and gone on with, as the robot that it is now known as
    again = tmp_path / "again"
    options |= {"training__max_steps": 4, "training__save_strategy": "no"}
    checkpoint = str(tmp_path / "checkpoint-2")
    train(make_recipe(again, "divla_latent_tiny", **options, training__resume_from_checkpoint=checkpoint))
    resumed = load_file(again / "model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in after.items())
    options |= {"model__path": str(tmp_path), "model__new_embodiment": False}
    with pytest.raises(ValueError, match="No data.reasoning, .*'robosuite_demos'. act under what it says: give data"):
        make(make_recipe(again, "divla_latent_tiny", **options))
    changed(tmp_path, "config.json", {"max_reasoning_tokens": 0})
    model, processor = make(make_recipe(again, "divla_latent_tiny", **options))
    for name in ("statistics", "camera_config", "action_config", "embodiments"):
        assert getattr(processor, name) == getattr(known, name)  # of the other robot, too
    assert len(model.embodiments) == 2 and all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"None of the checkpoint's embodiments \['metaworld_demos', 'robosuite_de"):
        make(make_recipe(again, "divla_latent_tiny", **options, data__unnorm_key="third"))

    # what the checkpoint knows a dataset's robot by counts, not how the dataset is called
    other = shutil.copytree(tmp_path, tmp_path / "other", ignore=shutil.ignore_patterns("other", "again", "check*"))
    options |= {"model__path": str(other), "data__unnorm_key": "robosuite_demos"}
    swapped = {"robosuite_demos": "metaworld_demos", "metaworld_demos": "robosuite_demos"}
    changed(other, "processor_config.json", {"embodiments": swapped})
    model, processor = make(make_recipe(again, "divla_latent_tiny", **options))
    assert processor.embodiments == swapped and processor.action_codec.normalizer("robosuite_demos").action_dim == 4


@pytest.mark.parametrize(
    ("known_as", "key"), [("robosuite_demos", "robosuite_demos"), ("mine", "mine"), ("mine", "robosuite_demos")]
)
def test_a_known_robot_goes_on_alone(known_as, key, latent, make_recipe, tmp_path, caplog):
    """Known by the name of its dataset, or by its own."""
    options = {**CHECKPOINT, "model__path": str(latent), "data__unnorm_key": known_as}
    folder = save(make(make_recipe(tmp_path, "divla_latent_tiny", **options)), tmp_path / "old")
    options |= {"model__path": str(folder), "data__unnorm_key": key}
    options |= {"model__new_embodiment": True, "data__reasoning": None}
    with caplog.at_level(logging.INFO):
        model, processor = make(make_recipe(tmp_path, "divla_latent_tiny", **options, data__eval_episodes=[3]))
    assert "knows this robot as 'robosuite_demos': it is trained further, alone." in caplog.text
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("embodiments.robosuite_demos.") for name in trained)
    assert list(model.embodiments) == ["robosuite_demos"] and model.config.max_reasoning_tokens == 64
    assert processor.embodiments == {key: "robosuite_demos"}
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items() if name in saved)
    before = AutoProcessor.from_pretrained(latent)
    assert processor.action_config["normalization"] == before.action_config["normalization"]
    assert processor.statistics.keys() == {key}  # of the dataset of now
    assert processor.statistics[key] != before.statistics["robosuite_demos"]


def test_frames_without_a_text_are_counted(make_recipe, tmp_path, caplog, monkeypatch):
    make(make_recipe(tmp_path, "divla_tiny"))
    assert "have no text" not in caplog.text
    texts = LeRobotEpisodes.texts

    def partly(self, name):
        column = texts(self, name).copy()
        column[::4], column[1::4] = None, " "
        return column

    monkeypatch.setattr(LeRobotEpisodes, "texts", partly)
    data = make_recipe(tmp_path, "divla_tiny").data
    (opened,) = open_datasets(data)
    opened = replace(opened, train_rows=np.arange(2, 10))  # of them 8 and 4, 9 and 5 have none
    assert data_facts(data, [opened]).without_text == 0.5
    make(make_recipe(tmp_path, "divla_tiny", data__eval_episodes=[]))
    (message,) = (record.getMessage() for record in caplog.records if "no text" in record.getMessage())
    assert message.startswith("50 % of the frames have no text: their actions are learnt without words, but")


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("divla", {"data__unnorm_key": "mine"}, "denoises the actions of one robot"),
        ("latent", {"data__reasoning": "subtask"}, "divla takes no data.reasoning: .* the language is frozen"),
        ("divla", {}, "denoises the actions of one robot"),
        (
            "latent",
            METAWORLD | {"data__unnorm_key": "robosuite_demos"},
            "have 4. The checkpoint knows a robot of",
        ),
        ("latent", {"data__unnorm_key": "x", "data__chunk_size": 2}, "has chunk_size 4, .* have 2. Robots share"),
        ("latent", {"data__unnorm_key": "x", "data__state": None}, "has state_dim 8, .* have None. Robots share"),
    ],
)
def test_a_new_robot_that_the_checkpoint_cannot_learn(source, overrides, message, make_recipe, tmp_path, request):
    options = {**CHECKPOINT, "model__path": str(request.getfixturevalue(source)), "model__new_embodiment": True}
    options |= {"data__reasoning": None, **overrides}
    with pytest.raises(ValueError, match=message):
        make(make_recipe(tmp_path, "divla_tiny", **options))


def test_a_head_starts_from_published_weights(make_recipe, tmp_path, caplog):
    denoiser = {"type": "dit", "depth": 2, "hidden_size": 16, "num_heads": 2}
    config = {"type": "diffusion", "condition": {"norm": False, "combine": "mlp"}, "denoiser": denoiser}
    torch.manual_seed(1)
    published = build_action_head(config, 24, 14, 50, 14).denoiser.state_dict()
    save_file({f"policy_head.{name}": value for name, value in published.items()}, tmp_path / "model.safetensors")
    options = {"model__config": {"head_config": config}, "model__head_weights": str(tmp_path)}
    with caplog.at_level(logging.INFO):
        model, _ = make(make_recipe(tmp_path / "run", "divla_tiny", **options))
    own = model.action_head.state_dict()
    assert torch.equal(own["denoiser.blocks.1.attn.qkv.weight"], published["blocks.1.attn.qkv.weight"])
    assert torch.equal(own["denoiser.pos_embed"], published["pos_embed"][:, :4])
    assert "The action head starts from" in caplog.text and "denoiser.x_embedder.weight" in caplog.text
