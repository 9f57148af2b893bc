import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

import hf_vla  # noqa: F401
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.hub.export import export_remote_code
from hf_vla.models.remote_code import auto_map
from hf_vla.models.tinyvla.modeling_tinyvla import TinyVLAForActionPrediction
from hf_vla.policy import Policy
from hf_vla.training.builders.registry import build
from hf_vla.training.datasets import open_datasets
from hf_vla.training.run import train

GRID = {"model__grid": {"num_bins": [4, 4, 4]}}
BACKBONE = {"model__preset": None, "model__grid": None, "model__backbone": "x"}
CAMERAS = {"data__cameras": [{"name": "wrist"}, {"name": "agentview"}]}


def make(recipe):
    return build(recipe, open_datasets(recipe.data))


@pytest.fixture(scope="module")
def tinyvla(make_recipe, tmp_path_factory):
    """A saved tiny TinyVLA after two steps."""
    folder = tmp_path_factory.mktemp("tinyvla")
    train(make_recipe(folder, "tinyvla_tiny", training__max_steps=2))
    return folder


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("spatialvla_tiny", {"model__family": "octo"}, r"'octo'; there are \['divla', 'pi0_vla', .*'tinyvla'\]"),
        ("spatialvla_tiny", BACKBONE, "spatialvla takes no model.backbone: give model.preset or model.path"),
        ("spatialvla_tiny", {"data__state": {}}, "spatialvla takes no data.state: it sees images and words alone"),
        (
            "spatialvla_tiny",
            CAMERAS,
            r"looks through one camera: choose one of \['wrist', 'agentview'\] in data.cameras",
        ),
        ("spatialvla_tiny", {"model__config": {"n_frqs": 3}}, "has no 'n_frqs' .* could set; did you mean n_freqs"),
        ("tinyvla_tiny", GRID, "tinyvla takes no model.grid: its actions are continuous"),
        (
            "tinyvla_tiny",
            {"model__config": {"chunk_size": 3}},
            "model.config.chunk_size follows from the data, 4 here",
        ),
        ("tinyvla_tiny", {"model__config": {"heads": {}}}, "TinyVLAConfig has no 'heads' that model.config could set"),
        ("tinyvla_tiny", {"model__config": {"head_config": {"type": "difusion"}}}, "No action head 'difusion'"),
        ("tinyvla_tiny", {"data__action__gripper": {"index": 6, "open": 0.0, "closed": 1.0}}, "goes from -1 to 1"),
        ("tinyvla_tiny", {"data__state": {"rotation": "eulr"}}, "eulr"),
        ("spatialvla_tiny", {"data__reasoning": "subtask"}, "spatialvla takes no data.reasoning: that is for divla"),
        ("tinyvla_tiny", {"data__reasoning": "subtask"}, "tinyvla takes no data.reasoning: that is for divla"),
        (
            "tinyvla_tiny",
            {"model__config": None, "model__preset": None, "model__path": "/no/x"},
            "model.path '/no/x': no",
        ),
        ("tinyvla_tiny", {**BACKBONE, "model__backbone": "a/b/c"}, "model.backbone 'a/b/c': no such folder"),
        ("tinyvla_tiny", {**BACKBONE, "model__backbone": "scripts"}, "'scripts': no checkpoint in this folder"),
        (
            "tinyvla_tiny",
            {**BACKBONE, "model__backbone": "scripts/recipe"},
            "model.backbone 'scripts/recipe': no such folder. Did you mean 'scripts/recipes'?",
        ),
        ("pi0_vla_tiny", {"model__head_weights": "x"}, "pi0_vla takes no model.head_weights: that is for divla"),
        ("divla_tiny", GRID, "divla takes no model.grid: its actions are continuous"),
        ("openvla_oft", {"data__chunk_size": 4}, "set model.config.num_readout_tokens to 28, came 56"),
        ("openvla_oft", {"model__config__num_readout_tokens": 8}, "num_readout_tokens to 56, came 8"),
    ],
)
def test_what_a_family_cannot_do_is_an_error_that_names_it(make_recipe, tmp_path, recipe, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(make_recipe(tmp_path, recipe, **overrides))


def test_a_whole_number_is_a_number(make_recipe, tmp_path):
    model, _ = make(make_recipe(tmp_path, "divla_tiny", model__config__ntp_loss_weight=2))
    assert model.config.ntp_loss_weight == 2.0


def test_a_checkpoint_of_another_family_is_an_error(tinyvla, make_recipe, tmp_path):
    overrides = {"model__preset": None, "model__grid": None, "model__path": str(tinyvla)}
    with pytest.raises(ValueError, match="is a tinyvla, model.family says spatialvla: leave that out"):
        make(make_recipe(tmp_path, **overrides))


def test_a_dataset_without_a_state_is_an_error(make_recipe, demos, tmp_path):
    copy = shutil.copytree(demos, tmp_path / "robosuite_demos")
    info = json.loads((copy / "meta" / "info.json").read_text())
    del info["features"]["observation.state"]
    (copy / "meta" / "info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="has no column 'observation.state', which data.state is about"):
        make(make_recipe(tmp_path / "run", "tinyvla_tiny", data__source=str(copy)))


def test_the_state_is_normalised_by_the_training_episodes(tinyvla, demos):
    kept = [episode for episode in range(22) if episode not in (3, 7)]
    states = LeRobotEpisodes(demos, episodes=kept, cameras=[]).column("observation.state").astype(np.float64)
    processor = AutoProcessor.from_pretrained(tinyvla)
    entry = processor.statistics["robosuite_demos"]["state"]
    np.testing.assert_allclose(entry["mean"], states.mean(0), rtol=1e-9)
    np.testing.assert_allclose(entry["std"], states.std(0), rtol=1e-9)
    wanted = (states[:9] - states.mean(0)) / states.std(0).clip(0.01)
    np.testing.assert_allclose(processor.action_codec.encode_state(states[:9]), wanted, rtol=1e-5, atol=1e-6)
    _, spec = processor.action_codec.specs()
    assert (spec.names[0], spec.rotation, spec.frame, len(spec.names)) == ("x", "axis_angle", "world", 8)


def test_actions_are_normalised_as_published(tinyvla, demos):
    kept = [episode for episode in range(22) if episode not in (3, 7)]
    actions = LeRobotEpisodes(demos, episodes=kept, cameras=[]).column("action").astype(np.float64)
    low, high = actions.min(0) - 1e-4, actions.max(0) + 1e-4
    codec = AutoProcessor.from_pretrained(tinyvla).action_codec
    np.testing.assert_allclose(codec.encode(actions[:4]), 2 * (actions[:4] - low) / (high - low) - 1, atol=1e-6)


@pytest.mark.parametrize("names", [["agentview", "wrist"], ["wrist", "agentview"]])
def test_cameras_enter_in_the_recipes_order(make_recipe, tmp_path, demo_item, names):
    cameras = [{"name": name, "fovy": 60} for name in names]
    _, processor = make(make_recipe(tmp_path, "tinyvla_tiny", data__cameras=cameras))
    specs = processor.camera_specs()
    assert [spec.name for spec in specs] == names
    focal = 48 / np.tan(np.radians(30))
    np.testing.assert_allclose(specs[0].intrinsics, [[focal, 0, 48], [0, focal, 48], [0, 0, 1]])
    images = {name: demo_item[f"observation.images.{name}"] for name in names}
    both = processor(images=images, text="x", state=demo_item["observation.state"])["pixel_values"]
    _, alone = make(make_recipe(tmp_path, "tinyvla_tiny", data__cameras=cameras[:1]))
    first = alone(images=images[names[0]], text="x", state=demo_item["observation.state"])["pixel_values"]
    assert torch.equal(both[:1], first)


def test_a_checkpoint_goes_on_with_its_weights_for_new_data(tinyvla, make_recipe, tmp_path):
    overrides = {"model__preset": None, "model__family": None, "model__config": None, "model__path": str(tinyvla)}
    model, processor = make(make_recipe(tmp_path, "tinyvla_tiny", **overrides, data__unnorm_key="mine"))
    saved = load_file(tinyvla / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert processor.action_codec.keys == ["mine"]
    assert processor.prompt_config == AutoProcessor.from_pretrained(tinyvla).prompt_config
    with pytest.raises(ValueError, match=r"has chunk_size 4, the recipe's data have 8. .* name it as model.backbone"):
        make(make_recipe(tmp_path, "tinyvla_tiny", **overrides, data__chunk_size=8))
    with pytest.raises(ValueError, match=r"has state_dim 8, the recipe's data have None"):
        make(make_recipe(tmp_path, "tinyvla_tiny", **overrides, data__state=None))


@pytest.mark.parametrize("family", ["divla", "pi0_vla", "tinyvla"])
def test_a_checkpoint_keeps_its_normalisation(family, make_recipe, tmp_path):
    folder, recipe = tmp_path / "checkpoint", f"{family}_tiny"
    for part in make(make_recipe(tmp_path, recipe)):
        part.save_pretrained(folder)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    own = {"mode": "quantile", "clip": True, "convention": "lerobot"}
    config["action_config"] |= {"normalization": own, "state_normalization": {**own, "clip": False}}
    path.write_text(json.dumps(config))
    overrides = {"model__preset": None, "model__config": None, "model__path": str(folder)}
    _, processor = make(make_recipe(tmp_path, recipe, **overrides, data__unnorm_key="mine"))
    assert processor.action_config["normalization"] == own
    assert processor.action_config["state_normalization"] == {**own, "clip": False}
    if family == "pi0_vla":  # which also goes on without a state
        _, processor = make(make_recipe(tmp_path, recipe, **overrides, data__state=None))
        assert processor.action_config["state_normalization"] is None


def test_a_backbone_that_lacks_weights_is_an_error(vlm, make_recipe, tmp_path):
    folder = shutil.copytree(vlm, tmp_path / "vlm")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "projector" in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    overrides = {"model__preset": None, "model__config": None, "model__backbone": str(folder)}
    with pytest.raises(ValueError, match="model.backbone .* lacks 1 weights of a LlavaModel.*multi_modal_projector"):
        make(make_recipe(tmp_path, "tinyvla_tiny", **overrides))


def test_a_pretrained_backbone_is_built_once(vlm, small_head, make_recipe, tmp_path, monkeypatch):
    given, init = [], TinyVLAForActionPrediction.__init__
    monkeypatch.setattr(
        TinyVLAForActionPrediction,
        "__init__",
        lambda self, config, backbone=None: given.append(backbone) or init(self, config, backbone),
    )
    overrides = {"model__preset": None, "model__config": small_head, "model__backbone": str(vlm)}
    model, _ = make(make_recipe(tmp_path, "tinyvla_tiny", **overrides))
    assert given == [model.backbone] and {each.device.type for each in model.state_dict().values()} == {"cpu"}


def test_another_family_is_no_backbone(tiny_checkpoint, make_recipe, tmp_path):
    overrides = {"model__preset": None, "model__config": None, "model__backbone": str(tiny_checkpoint)}
    with pytest.raises(ValueError, match="model.backbone .* is a spatialvla: give a vision-language model"):
        make(make_recipe(tmp_path, "tinyvla_tiny", **overrides))


def test_a_tinyvla_keeps_its_prompt_under_a_new_head(tinyvla, make_recipe, tmp_path):
    overrides = {"model__preset": None, "model__config": None, "model__backbone": str(tinyvla)}
    _, processor = make(make_recipe(tmp_path, "tinyvla_tiny", **overrides))
    assert processor.prompt_config == AutoProcessor.from_pretrained(tinyvla).prompt_config


def test_a_recipe_may_give_the_prompt_of_its_backbone(vlm, make_recipe, tmp_path):
    prompt = {"template": "{images} Now {instruction}!"}
    overrides = {"model__preset": None, "model__config": None, "model__prompt_config": prompt}
    _, processor = make(make_recipe(tmp_path, "tinyvla_tiny", **overrides, model__backbone=str(vlm)))
    assert processor.prompt_config["template"] == prompt["template"]
    with pytest.raises(ValueError, match="model.prompt_config is the prompt of a model.backbone"):
        make_recipe(tmp_path, "tinyvla_tiny", model__prompt_config=prompt)


@pytest.mark.parametrize("source", ["vlm", "tinyvla"])
def test_a_new_head_on_a_pretrained_backbone(source, tinyvla, make_recipe, tmp_path, demo_item, request):
    folder = request.getfixturevalue(source)
    head = {"type": "regression", "network": "parallel", "tokens_per_action": 2}
    overrides = {"model__preset": None, "model__backbone": str(folder), "data__chunk_size": 8}
    overrides["model__config"] = {"num_readout_tokens": 16, "head_config": head}
    model, processor = make(make_recipe(tmp_path, "tinyvla_tiny", **overrides))
    pretrained = AutoModel.from_pretrained(folder)
    wanted = getattr(pretrained, "backbone", pretrained).state_dict()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value[: len(wanted[name])] if value.ndim else value, wanted[name]), name
    assert model.config.readout_token_id == 260 and model.get_input_embeddings().num_embeddings >= 276
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    chunk = Policy(model, processor).predict_chunk(demo_item)
    assert chunk.shape == (8, 7)
    np.testing.assert_allclose(Policy.from_pretrained(tmp_path).predict_chunk(demo_item), chunk, atol=1e-5)


def test_the_vocabulary_of_a_preset_grows_with_the_readout_tokens(make_recipe, tmp_path):
    model, _ = make(make_recipe(tmp_path, "tinyvla_tiny", model__config={"num_readout_tokens": 100}))
    assert model.get_input_embeddings().num_embeddings == 360


def test_a_new_processor_stays_with_the_code_of_its_model(make_recipe, tiny_checkpoint, tmp_path):
    """A checkpoint that loads without this library is trained further: so does what comes out."""
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    export_remote_code(source)
    options = {"model__preset": None, "model__grid": None, "model__path": str(source)}
    recipe = make_recipe(tmp_path / "run", **options)
    model, processor = make(recipe)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    for name in ("config.json", "processor_config.json"):
        assert json.loads((tmp_path / "saved" / name).read_text())["auto_map"] == auto_map("spatialvla")
    assert all((tmp_path / "saved" / path.name).exists() for path in source.glob("*.py"))
