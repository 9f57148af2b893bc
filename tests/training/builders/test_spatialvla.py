"""SpatialVLA from a recipe with action tokens other than the grid's."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

from hf_vla.actions.tokenizers.registry import ACTION_TOKENIZERS
from hf_vla.data.collator import VLACollator
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
