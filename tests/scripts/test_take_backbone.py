from pathlib import Path

import pytest
import take_backbone
import torch
from transformers import AutoModelForImageTextToText

from hf_vla.training.builders.registry import build
from hf_vla.training.datasets import open_datasets
from hf_vla.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]


def make(name, **overrides):
    recipe = load_recipe(
        ROOT / "scripts" / "recipes" / f"{name}.yaml", {key.replace("__", "."): v for key, v in overrides.items()}
    )
    return build(recipe, open_datasets(recipe.data))


@pytest.fixture
def take(monkeypatch):
    monkeypatch.chdir(ROOT)
    return lambda source, out: take_backbone.main([str(source), str(out)])


def test_others_begin_with_what_a_tinyvla_sees(take, tmp_path):
    tinyvla = make("tinyvla_tiny")
    for part in tinyvla:
        part.save_pretrained(tmp_path / "tinyvla")
    backbone, out = tinyvla[0].backbone, tmp_path / "vlm"
    take(tmp_path / "tinyvla", out)
    assert AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)[1]["missing_keys"] == set()
    divla, processor = make("divla_tiny", model__preset=None, model__config=None, model__backbone=str(out))
    for name, weight in backbone.state_dict().items():
        assert torch.equal(divla.backbone.model.state_dict()[name], weight)
    words = divla.backbone.get_output_embeddings().weight
    assert torch.equal(words, backbone.get_input_embeddings().weight[: len(words)])
    assert processor.tokenizer("move left").input_ids == tinyvla[1].tokenizer("move left").input_ids
    pictures = torch.rand(2, 3, 96, 96)
    images = tinyvla[1].image_processor
    assert images.image_mean != [0.5, 0.5, 0.5]
    mean, std = (torch.tensor(each)[:, None, None] for each in (images.image_mean, images.image_std))
    spatialvla, _ = make("spatialvla_tiny", model__vision_model=str(out / "vision"))
    with torch.no_grad():
        wanted = backbone.vision_tower((pictures - mean) / std).last_hidden_state
        taken = spatialvla.vision_tower((pictures - 0.5) / 0.5).last_hidden_state
    torch.testing.assert_close(taken, wanted, rtol=1e-4, atol=1e-4)


def test_it_takes_from_a_tinyvla_alone(take, tmp_path):
    for part in make("spatialvla_tiny"):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="Expected a TinyVLA, .* is a spatialvla"):
        take(tmp_path / "other", tmp_path / "vlm")
