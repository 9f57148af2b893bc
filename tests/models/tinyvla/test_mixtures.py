"""A TinyVLA of two robots: the second has fewer joints, a smaller state and one camera less."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from hf_vla.models.outputs import VLAOutput
from hf_vla.models.tinyvla.processing_tinyvla import TinyVLAProcessor
from hf_vla.policy import Policy

UNET = {"type": "conditional_unet1d", "down_dims": [8, 16], "diffusion_step_embed_dim": 16}
DIFFUSION = {"type": "diffusion", "denoiser": UNET}
SMALL = {"action": {"min": [-2.0, 1.0], "max": [2.0, 3.0]}, "state": {"mean": [0.5], "std": [2.0]}}
KEYS = ["robot", "small"]


@pytest.fixture
def make(make_model, make_processor, make_config, robot, backbones):
    """Builds a model and its processor for the robots that are named."""

    def make(backbone="llava_siglip", keys=KEYS, sizes=None, **options):
        statistics, action_config, cameras = robot.processor
        statistics = {key: entry for key, entry in {**statistics, "small": SMALL}.items() if key in keys}
        cameras = {"robot": cameras["robot"], "small": cameras["robot"][:1]}
        chosen = backbones[backbone]
        processor = TinyVLAProcessor.from_backbone(
            chosen.processor,
            make_config(backbone, **options),
            statistics,
            action_config | (sizes or {}),
            {key: cameras[key] for key in keys},
            chosen.prompt,
        )
        return SimpleNamespace(model=make_model(backbone, **options).double(), processor=processor)

    return make


@pytest.fixture
def samples(pictures, chunks):
    """One of each robot."""
    small = {"images": {"front": pictures[1]["front"]}, "text": "push", "state": np.array([0.7])}
    robot = {"images": pictures[0], "text": "pick up the red cube", "state": np.array([0.3, 1.0])}
    return [{**robot, "actions": chunks[0]}, {**small, "actions": chunks[1, :, :2] + 1.0}]


def batch_of(processor, samples, keys=KEYS, **options):
    given = {name: [sample[name] for sample in samples] for name in samples[0]}
    return dict(processor(**given, unnorm_key=keys, **options))


def without_actions(samples):
    return [{name: value for name, value in sample.items() if name != "actions"} for sample in samples]


def test_one_of_a_batch_is_the_sample_alone(make, backbone, samples):
    system = make(backbone)
    together = batch_of(system.processor, samples)
    assert together["actions"].shape == (2, 4, 3) and together["action_mask"].shape == (2, 4, 3)
    assert not together["actions"][1, :, 2].any() and not together["state"][1, 1:].any()
    assert together["action_mask"].all((0, 1)).tolist() == [True, True, False]
    prompts = batch_of(system.processor, without_actions(samples))
    actions, losses = system.model.predict_action(**prompts).actions, []
    for index, key in enumerate(KEYS):
        alone = samples[index : index + 1]
        losses.append(system.model(**batch_of(system.processor, alone, [key])).loss)
        prompt = batch_of(system.processor, without_actions(alone), [key])
        torch.testing.assert_close(system.model.predict_action(**prompt).actions[0], actions[index])
    torch.testing.assert_close(system.model(**together).loss, torch.stack(losses).mean())
    assert not actions[1, :, 2].any() and actions[0].all()


@pytest.mark.parametrize("head", [{"type": "regression"}, DIFFUSION])
def test_what_a_robot_has_not_teaches_nothing(make, samples, head):
    system = make(head_config=head)
    batch = batch_of(system.processor, samples)

    def loss(**changes):
        return system.model(**batch | changes, generator=torch.Generator().manual_seed(0)).loss

    expected = loss()
    batch["actions"][1, :, 2] = torch.nan
    assert torch.equal(loss(), expected)
    batch["actions"][1, :, 1] += 0.1
    assert not torch.equal(loss(), expected)


def test_a_camera_that_a_robot_has_not_may_be_given_as_none(make, samples):
    processor = make().processor
    plain = batch_of(processor, samples)
    samples[1]["images"] = {"wrist": None, **samples[1]["images"]}
    given = batch_of(processor, samples)
    assert plain.keys() == given.keys() and all(torch.equal(given[name], plain[name]) for name in plain)
    samples[1]["images"]["wrist"] = samples[1]["images"]["front"]
    with pytest.raises(ValueError, match=r"images of the cameras \['front'\], got those of \['wrist', 'front'\]"):
        batch_of(processor, samples)


def test_each_robot_gets_its_own_numbers_back(make, samples):
    processor = make().processor
    encoded = batch_of(processor, samples)["actions"]
    decoded = processor.decode_actions(VLAOutput(actions=encoded), KEYS)
    assert decoded.shape == (2, 4, 3) and np.isnan(decoded[1, :, 2]).all()
    np.testing.assert_allclose(decoded[0], samples[0]["actions"], atol=1e-4)
    np.testing.assert_allclose(decoded[1, :, :2], samples[1]["actions"], atol=1e-4)
    assert processor.decode_actions(VLAOutput(actions=encoded), "small").shape == (2, 4, 2)


def test_batches_have_one_layout_whoever_is_in_them(make, samples):
    processor = make().processor
    mask = batch_of(processor, samples[:1], KEYS[:1])["action_mask"]
    assert mask.shape == (1, 4, 3) and mask.all()
    padded = batch_of(processor, samples, action_mask=np.arange(4) < [[4], [1]])["action_mask"]
    assert padded[1].tolist() == [[True, True, False]] + [[False] * 3] * 3
    alone = make(keys=["robot"]).processor
    assert batch_of(alone, samples[:1], KEYS[:1])["action_mask"].shape == (1, 4)
    assert "action_mask" not in batch_of(alone, without_actions(samples[:1]), KEYS[:1])


def test_a_smaller_robot_acts_by_a_larger_checkpoint(make, samples, tmp_path):
    sizes = {"action_dim": 3, "state_dim": 2}
    system = make(keys=["small"], sizes=sizes)
    system.processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert {name: again.action_config[name] for name in sizes} == sizes
    policy = Policy(system.model, again)
    observation = {"observation.images.front": samples[1]["images"]["front"], "task": "push"}
    observation["observation.state"] = samples[1]["state"]
    action = policy.select_action(observation)
    assert action.shape == (2,) and action.dtype == np.float32
    both = Policy(system.model, make().processor, "small").select_action(observation)
    np.testing.assert_array_equal(action, both)
    for missing in sizes:
        few = {name: size for name, size in sizes.items() if name != missing}
        message = rf"{missing} of 'small' of .*, as the config says, .* To pad it, set action_config\['{missing}'\] to"
        with pytest.raises(ValueError, match=message):
            make(keys=["small"], sizes=few)
    with pytest.raises(ValueError, match="Expected an action_dim of 'robot' of 2, as the config says, got 3 .*ics.$"):
        make(action_dim=2)
    with pytest.raises(ValueError, match="statistics of 'robot' have 3 dimensions, but this model's actions hold"):
        make(sizes={"action_dim": 2}, action_dim=2)
