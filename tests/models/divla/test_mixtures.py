"""Robots of different sizes in one DiVLA: padded in a shared space of actions, of their own sizes behind latents."""

import numpy as np
import pytest
import torch

from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction
from hf_vla.models.divla.processing_divla import DiVLAProcessor

SMALL = {"action": {"min": [-2.0, 1.0], "max": [2.0, 3.0]}, "state": {"mean": [0.5], "std": [2.0]}}
UNET = {"type": "conditional_unet1d", "down_dims": [16, 32], "diffusion_step_embed_dim": 16}
EMBODIMENTS = {"arm": {"action_dim": 3, "state_dim": 2}, "hand": {"action_dim": 2, "state_dim": 1}}


@pytest.fixture
def make_pair(make_config, make_model, backbones, robot):
    """Builds a model and a processor that knows a second, smaller robot."""

    def make(names=None, **options) -> tuple[DiVLAForActionPrediction, DiVLAProcessor]:
        statistics, action_config, cameras = robot.processor
        processor = DiVLAProcessor.from_backbone(
            backbones["qwen2_vl"].processor,
            make_config(**options),
            statistics | {"small": SMALL},
            action_config,
            cameras | {"small": cameras["robot"]},
            embodiments=names,
        )
        return make_model(**options).double(), processor

    return make


@pytest.fixture
def samples(pictures, chunks):
    """One of each robot, as the processor takes them."""
    texts = {"text": "push", "reasoning": "lift"}
    first = {"images": pictures[0], "state": np.array([0.3, 1.0]), "actions": chunks[0], **texts}
    return [first, first | {"state": np.array([0.7]), "actions": chunks[1, :, :2] + 1.0}]


def batch_of(processor, samples, *keys):
    given = {name: [sample[name] for sample in samples] for name in samples[0]}
    return dict(processor(**given, unnorm_key=list(keys)))


def prompt(batch):
    return {name: value for name, value in batch.items() if name != "actions"}


def test_one_of_a_batch_is_the_sample_alone(make_pair, samples):
    model, processor = make_pair()
    together = batch_of(processor, samples, "robot", "small")
    assert together["action_mask"].all((0, 1)).tolist() == [True, True, False]
    alone = [batch_of(processor, [sample], key) for sample, key in zip(samples, ("robot", "small"), strict=True)]
    losses = torch.stack([model(**batch).diffusion_loss for batch in alone])
    torch.testing.assert_close(model(**together).diffusion_loss, losses.mean())
    actions = model.predict_action(**prompt(together)).actions
    for batch, chunk in zip(alone, actions, strict=True):
        torch.testing.assert_close(model.predict_action(**prompt(batch)).actions[0], chunk)
    assert actions[0].all() and not actions[1, :, 2].any()


def test_what_a_robot_has_not_teaches_nothing(make_pair, samples):
    model, processor = make_pair(head_config={"type": "diffusion", "denoiser": UNET})
    batch = batch_of(processor, samples, "robot", "small")
    changed = batch["actions"].clone()
    changed[1, :, 2] = torch.nan
    expected, value = (
        model(**batch | {"actions": actions}, generator=torch.Generator().manual_seed(0)).loss
        for actions in (batch["actions"], changed)
    )
    assert torch.equal(value, expected)


def test_behind_latents_every_robot_has_its_own_sizes(make_pair, samples):
    model, processor = make_pair({"robot": "arm", "small": "hand"}, latent_dim=6, embodiments=EMBODIMENTS)
    for sample, key, action_dim in zip(samples, ("robot", "small"), (3, 2), strict=True):
        batch = batch_of(processor, [sample], key)
        assert batch["actions"].shape == (1, 4, action_dim) and batch["state"].shape == (1, action_dim - 1)
        assert batch["action_mask"].shape == (1, 4) and model(**batch).loss.isfinite()
        output = model.predict_action(**prompt(batch))
        assert processor.decode_actions(output, key).shape == (1, 4, action_dim)
        wide = batch["action_mask"][..., None].expand(-1, -1, action_dim)
        for call, inputs in ((model, batch), (model.predict_action, prompt(batch))):
            with pytest.raises(ValueError, match=r"action_mask of shape \(batch_size, chunk_size\), since each embod"):
                call(**inputs | {"action_mask": wide})


def test_it_sees_the_present_alone(make_config, backbones, robot):
    statistics, action_config, cameras = robot.processor
    with pytest.raises(ValueError, match="A DiVLAProcessor is of a model that sees one observation.*came 2"):
        DiVLAProcessor.from_backbone(
            backbones["qwen2_vl"].processor, make_config(), statistics, action_config | {"n_obs_steps": 2}, cameras
        )
