from types import SimpleNamespace

import numpy as np
import pytest
import torch
import train_depth as script
from transformers import AutoModelForDepthEstimation

from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration


def test_a_few_steps_lower_the_error(monkeypatch):
    """A wall three metres away; nothing but the depth model is trained."""
    monkeypatch.setattr(script, "HELD_OUT", 2)
    monkeypatch.setattr(script, "BATCH_SIZE", 2)
    torch.manual_seed(0)
    model = SpatialVLAForConditionalGeneration(SpatialVLAConfig.from_preset("tiny")).eval()
    pictures = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), np.uint8)
    depths, others = np.full(pictures.shape[:3], 3.0), model.multi_modal_projector.linear.weight.clone()
    pixels, known = torch.from_numpy(pictures).permute(0, 3, 1, 2), torch.from_numpy(depths)
    before = script.held_out_error(model, pixels, known)
    script.train(model, pictures, depths, steps=40)
    assert script.held_out_error(model, pixels, known) < before - 0.01
    assert not any(parameter.requires_grad for parameter in model.vision_zoe_model.parameters())
    assert torch.equal(model.multi_modal_projector.linear.weight, others)


@pytest.mark.sim
def test_rendered_pairs_are_in_metres():
    options = SimpleNamespace(env="metaworld", tasks="drawer-close-v3", camera="corner4", size=32, episodes=2)
    pictures, depths = script.render(options)
    assert pictures.shape == (len(depths), 32, 32, 3) and pictures.dtype == np.uint8 and len(depths) > 10
    assert depths.shape[1:] == (32, 32) and 0.1 < depths.min() < depths.max() and np.median(depths) < 5
    assert len({picture.tobytes() for picture in pictures}) > len(pictures) // 2  # the arm moves


@pytest.mark.sim
def test_what_it_writes_is_a_depth_model(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "HELD_OUT", 4)
    options = ["--tasks", "drawer-close-v3", "--size", "32", "--episodes", "1", "--steps", "2"]
    script.main([*options, "--out", str(tmp_path / "zoe")])
    _, info = AutoModelForDepthEstimation.from_pretrained(tmp_path / "zoe", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
