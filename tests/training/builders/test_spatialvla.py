"""SpatialVLA from a recipe with action tokens other than the grid's."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForDepthEstimation,
    DPTConfig,
    DPTForDepthEstimation,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hf_vla.actions.tokenizers.registry import ACTION_TOKENIZERS
from hf_vla.data.collator import VLACollator
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration
from hf_vla.policy import Policy
from hf_vla.training.builders.registry import build
from hf_vla.training.datasets import open_datasets
from hf_vla.training.run import train

METAWORLD = {
    "data__source": "scripts/data/metaworld_demos",
    "data__cameras": [{"name": "corner4"}],
    "data__eval_episodes": [1],
    "data__action__rotation": None,
    "data__action__gripper": {"index": 3, "open": -1.0, "closed": 1.0},
}
OPTIONS = {"uniform": {"n_bins": 64}, "fast": {"vocab_size": 256}}


def make(recipe):
    return build(recipe, open_datasets(recipe.data))


@pytest.mark.parametrize("name", sorted(ACTION_TOKENIZERS))
def test_actions_without_rotation(name, make_recipe, tmp_path):
    """Meta-World's four numbers, on a backbone without depth, with every action tokenizer."""
    tokens = {"model__action_tokenizer": {"type": name, **OPTIONS.get(name, {})}}
    if name == "gaussian_grid":
        tokens = {"model__grid": {"num_bins": [4, 8, 4]}}
    overrides = {"model__grid": None, "model__config": {"use_vision_zoe": False}, "data__chunk_tail": "hold", **tokens}
    train(make_recipe(tmp_path, **METAWORLD, **overrides, training__max_steps=2, training__save_strategy="no"))
    policy = Policy.from_pretrained(tmp_path)
    config, tokenizer = policy.model.config, policy.processor.action_codec.tokenizer
    assert not config.use_vision_zoe and not config.use_ego3d and tokenizer.type == name
    modes = ["quantile"] * 3 + ["zero_one" if name == "gaussian_grid" else "min_max"]
    assert policy.processor.action_config["normalization"]["mode"] == modes
    assert config.text_config.vocab_size == config.action_token_begin_idx + tokenizer.vocab_size
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    chunk = policy.predict_chunk({"observation.images.corner4": picture, "task": "open the door"})
    assert chunk.shape == (4, 4) and np.isfinite(chunk).all()


def test_another_language_model(make_recipe, tmp_path):
    """It gets the vocabulary that the action tokens need."""
    text_config = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    text_config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    model, _ = make(make_recipe(tmp_path, "openvla", model__config__text_config=text_config))
    config = model.config.text_config
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("qwen2", 64, 260 + 256)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("openvla", {"model__grid": {}}, "give model.grid or model.action_tokenizer, not both"),
        ("openvla", {"model__preset": None, "model__path": "x", "model__config": None}, "keeps its own action token"),
        ("openvla", {"model__action_tokenizer": {"type": "unifrom"}}, "tokenizer 'unifrom'.*Did you mean 'uniform'"),
        ("openvla", {"model__action_tokenizer__bins": 8}, r"Unknown option\(s\) \['bins'\]"),
        ("openvla", {"model__action_tokenizer": {"type": "gaussian_grid"}}, "give model.grid, no model.action_token"),
        ("openvla", {"model__config": {"spatial_token_num": 7}}, "spatial_token_num follows from the data, 256 here"),
        ("fast", {"model__action_tokenizer__bpe": {}}, r"unknown \['bpe'\] of a 'fast' .*'vocab_size', 'scale'"),
        ("fast", {"model__action_tokenizer__vocab_size": 9}, "need an alphabet of 81 ids; got vocab_size 9"),
        ("fast", {"data__chunk_tail": "mask"}, "cannot be left out of it: set data.chunk_tail: hold"),
        ("rt1", {"model__action_tokenizer": {"type": "uniform"}}, "tinyvla takes no model.action_tokenizer"),
    ],
)
def test_tokens_that_do_not_fit(recipe, overrides, message, make_recipe, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(make_recipe(tmp_path, recipe, **overrides))


def test_a_checkpoint_keeps_its_tokens(make_recipe, tmp_path):
    train(make_recipe(tmp_path / "first", "fast", training__max_steps=1, training__save_strategy="no"))
    goes_on = {"model__preset": None, "model__config": None, "model__action_tokenizer": None}
    goes_on |= {"model__path": str(tmp_path / "first"), "training__max_steps": 1, "training__save_strategy": "no"}
    with pytest.raises(ValueError, match="emits 'fast' tokens, no grid's: leave model.adapt_grid out"):
        make(make_recipe(tmp_path / "second", "fast", **goes_on, model__adapt_grid=True))
    with pytest.raises(ValueError, match="set data.chunk_tail: hold"):
        make(make_recipe(tmp_path / "second", "fast", **goes_on, data__chunk_tail="mask"))
    train(make_recipe(tmp_path / "second", "fast", **goes_on))
    first, second = (AutoModel.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert second.action_tokenizer.to_dict() == first.action_tokenizer.to_dict()
    assert not torch.equal(first.spatial_embed_tokens.weight, second.spatial_embed_tokens.weight)


@pytest.mark.parametrize(("chunk_size", "tail"), [(1, "mask"), (4, "mask"), (4, "hold")])
def test_rt2_learns_where_episodes_end(make_recipe, tmp_path, chunk_size, tail):
    """Also where the chunk that ends with the episode has no padding, as of one action it never has."""
    recipe = make_recipe(tmp_path, "rt2", data__chunk_size=chunk_size)
    (opened,) = open_datasets(recipe.data)
    _, processor = build(recipe, [opened])
    collate = VLACollator(processor, "robosuite_demos", ["agentview"], hold_tail=tail == "hold")
    end = int(opened.episodes.episode_starts[1])
    labels = collate([opened.episodes[row] for row in (0, end - 4, end - 3, end - 1, end)])["labels"]
    flags = torch.stack([row[row != -100][:1] for row in labels]) if chunk_size == 1 else None
    begin = processor.action_token_begin
    if chunk_size == 1:
        assert (flags[:, 0] - begin).tolist() == [0, 0, 0, 1, 0]
        return
    rows = [row[row != -100] - begin for row in labels]
    ends = [[token for token in row[::8].tolist() if token >= 0] for row in rows]  # <eos> is below
    last = [1, 1, 1, 1] if tail == "hold" else [1]
    hold = [0, 0, 1, 1] if tail == "hold" else [0, 0, 1]
    assert ends == [[0] * 4, [0, 0, 0, 1], hold, last, [0] * 4]


def test_the_end_needs_a_window(make_recipe, tmp_path, demo_item):
    _, processor = make(make_recipe(tmp_path, "rt2"))
    item = demo_item | {"action": torch.zeros(1, 7), "action_is_pad": torch.zeros(1, dtype=torch.bool)}
    with pytest.raises(ValueError, match="delta_indices={'timestamp': range"):
        VLACollator(processor, "robosuite_demos", ["agentview"])([item])


@pytest.fixture(scope="module")
def zoe(tmp_path_factory):
    """A depth model with weights of its own, for larger pictures than the preset's."""
    config = SpatialVLAConfig.from_preset("tiny")
    config.vision_zoe_config.backbone_config.image_size = 128
    torch.manual_seed(1)
    folder, model = tmp_path_factory.mktemp("zoe"), SpatialVLAForConditionalGeneration(config).vision_zoe_model
    model.save_pretrained(folder)
    return folder


def test_a_depth_model_of_its_own_stays_as_it_is(zoe, make_recipe, tmp_path):
    options = {"model__depth_model": str(zoe), "training__max_steps": 1, "training__save_strategy": "no"}
    recipe = make_recipe(tmp_path, **options)
    weights = AutoModelForDepthEstimation.from_pretrained(zoe).state_dict()
    model, _ = make(recipe)
    assert model.config.zoe_image_size == 128
    train(recipe)
    for trained in (model, AutoModel.from_pretrained(tmp_path)):
        inside = trained.vision_zoe_model
        assert not inside.training and not any(parameter.requires_grad for parameter in inside.parameters())
        state = inside.state_dict()
        assert weights.keys() == state.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


def test_depth_models_that_are_no_use(zoe, make_recipe, tmp_path):
    def refused(message, error=ValueError, recipe="spatialvla_tiny", **overrides):
        with pytest.raises(error, match=message):
            make(make_recipe(tmp_path, recipe, model__depth_model=str(zoe), **overrides))

    refused("use_vision_zoe is false: leave model.depth_model out", model__config={"use_vision_zoe": False})
    refused("vision_zoe_config follows from the data", model__config={"vision_zoe_config": {}})
    refused("tinyvla takes no model.depth_model", recipe="rt1")
    another = {"model__preset": None, "model__grid": None, "model__path": "x"}
    refused("A checkpoint keeps its own depth model", **another)
    zoe = tmp_path / "zoe"
    refused("no such folder", FileNotFoundError)
    small = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 8}
    small |= {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
    DPTForDepthEstimation(DPTConfig(**small, is_hybrid=False)).save_pretrained(zoe)
    refused("Expected model.depth_model to be a whole ZoeDepth, .* is a dpt")


def test_a_depth_model_that_lacks_weights(zoe, make_recipe, tmp_path):
    weights = load_file(zoe / "model.safetensors")
    del weights["metric_head.conv2.weight"]
    (tmp_path / "config.json").write_bytes((zoe / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="zoedepth that lacks .'metric_head.conv2.weight'."):
        make(make_recipe(tmp_path / "out", model__depth_model=str(tmp_path)))


@pytest.mark.parametrize("pair", [False, True], ids=["vision", "vision and text"])
def test_a_vision_model_of_its_own(pair, make_recipe, tmp_path):
    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    seen = size | {"image_size": 96, "patch_size": 12}
    if pair:
        text = size | {"vocab_size": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        known = SiglipModel(SiglipConfig(text_config=text, vision_config=seen))
        vision = known.vision_model
    else:
        known = vision = SiglipVisionModel(SiglipVisionConfig(**seen))
    known.save_pretrained(tmp_path / "siglip")
    model, processor = make(make_recipe(tmp_path, model__vision_model=str(tmp_path / "siglip")))
    assert processor.image_processor.size["height"] == 96 and model.config.num_image_tokens == 64
    theirs = vision.state_dict()
    for name, weight in model.vision_tower.state_dict().items():
        assert torch.equal(weight, theirs[name])


def test_vision_models_that_are_no_use(zoe, make_recipe, tmp_path):
    def refused(message, error=ValueError, recipe="spatialvla_tiny", source=zoe, **overrides):
        with pytest.raises(error, match=message):
            make(make_recipe(tmp_path, recipe, model__vision_model=str(source), **overrides))

    refused("Expected model.vision_model to be a whole SigLIP, .* lacks .* of its weights")
    refused("no such folder", FileNotFoundError, source=tmp_path / "none")
    refused("tinyvla takes no model.vision_model", recipe="rt1")
    refused("A checkpoint keeps its own vision model", model__preset=None, model__grid=None, model__path="x")


@pytest.fixture(scope="module")
def in_order(make_recipe, tmp_path_factory):
    """A checkpoint that generates token by token."""
    folder = tmp_path_factory.mktemp("in_order")
    train(make_recipe(folder, training__max_steps=1, training__save_strategy="no"))
    return folder


def at_once(folder, **overrides):
    """Overrides for a recipe that lets a checkpoint decode by discrete diffusion."""
    new = {"model__preset": None, "model__grid": None, "model__config": None, "model__path": str(folder)}
    short = {"training__max_steps": 1, "training__save_strategy": "no"}
    return {**new, "model__decoding": "discrete_diffusion", **short, **overrides}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 4}])
def test_a_checkpoint_learns_to_decode_at_once(lora, in_order, make_recipe, tmp_path):
    recipe = make_recipe(tmp_path, **at_once(in_order, model__lora=lora))
    if lora is None:
        before, (model, _) = AutoModel.from_pretrained(in_order), make(recipe)
        state, parts = model.state_dict(), before.spatial_embed_tokens.weight.split(model.config.action_block_sizes)
        masks = torch.stack([part.mean(0) for part in parts])  # of translation, rotation, gripper
        torch.testing.assert_close(state.pop("action_mask_embedding.weight"), masks)
        assert all(torch.equal(value, state.pop(name)) for name, value in before.state_dict().items()) and not state
    train(recipe)
    policy = Policy.from_pretrained(tmp_path)
    loaded = SpatialVLAForConditionalGeneration.from_pretrained(tmp_path)  # of adapters, with the base's configuration
    assert loaded.config.decoding == policy.model.config.decoding == "discrete_diffusion"
    masks = (each.get_submodule("action_mask_embedding").state_dict() for each in (loaded, policy.model))
    assert all(torch.equal(one, other) for one, other in zip(*(each.values() for each in masks), strict=True))
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    chunk = policy.predict_chunk({"observation.images.agentview": picture, "task": "lift"})
    assert chunk.shape == (4, 7) and np.isfinite(chunk).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__decoding": "autoregressive"}, "'autoregressive' for one of 'autoregressive'"),
        ({"data__chunk_size": 1}, "num_decoding_steps of at most 3, the number of tokens of a chunk, got 4"),
        ({"model__quantization": "4bit", "model__lora": {}}, "in its full precision"),
        ({"model__path": None, "model__preset": "tiny", "model__grid": {}}, "a new model's is model.config.decoding"),
    ],
)
def test_decodings_that_are_no_use(overrides, message, in_order, make_recipe, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(make_recipe(tmp_path, **at_once(in_order, **overrides)))
