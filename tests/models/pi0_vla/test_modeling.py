import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    PI0Config,
    PI0ForConditionalGeneration,
    PI0Model,
    Trainer,
    TrainingArguments,
)

from hf_vla.models.outputs import VLAOutput
from hf_vla.models.pi0_vla.configuration_pi0_vla import PI0VLAConfig
from hf_vla.models.pi0_vla.modeling_pi0_vla import PI0VLAForActionPrediction
from hf_vla.models.pi0_vla.processing_pi0_vla import PI0VLAProcessor
from hf_vla.policy import Policy


@pytest.fixture
def theirs(model):
    """Transformers' own model with the same weights."""
    config = PI0Config(**{**model.config.to_dict(), "architectures": None})
    other = PI0ForConditionalGeneration(config).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture
def wide(inputs):
    """What transformers' own model takes: the state in its full width."""
    return {**inputs, "state": torch.nn.functional.pad(inputs["state"], (0, 27))}


def rows(batch, index):
    """One sample of a batch, without its padding."""
    own = {key: value[index : index + 1] for key, value in batch.items()}
    length = int(own["attention_mask"].sum())
    return {**own, **{key: own[key][:, :length] for key in ("input_ids", "attention_mask")}}


def test_loss_and_velocity_are_those_of_transformers(model, theirs, batch, wide, noise):
    actions, timestep = batch["actions"], torch.tensor([0.3, 0.8])
    ours = model(**{**batch, "action_mask": torch.ones(2, 4, dtype=torch.bool)}, noise=noise, timestep=timestep)
    actions = torch.nn.functional.pad(actions, (0, 25))
    wanted = theirs(**wide, actions=actions, noise=noise, timestep=timestep)
    torch.testing.assert_close(ours.loss, wanted.loss, atol=1e-6, rtol=0)
    assert torch.equal(ours.logits, wanted.logits)
    without_mask = model(**{k: v for k, v in batch.items() if k != "action_mask"}, noise=noise, timestep=timestep)
    assert torch.equal(without_mask.loss, ours.loss)


def test_noise_and_times_are_drawn_as_published(model, batch):
    """Each sample has its own: standard normal noise, times of Beta(1.5, 1), whose mean is 0.6 and deviation 0.26."""
    drawn = []
    model.embed_action_time.register_forward_pre_hook(lambda _, arguments: drawn.append(arguments))
    batch["actions"].zero_()
    torch.manual_seed(0)
    model(**{key: value.repeat(500, *[1] * (value.ndim - 1)) for key, value in rows(batch, 0).items()})
    ((_, noised, times),) = drawn
    assert times.dtype == torch.float32 and 0.001 <= times.min() and times.max() <= 1.0
    assert abs(times.mean() - 0.6) < 0.05 and abs(times.std() - 0.26) < 0.03
    noise = noised[..., 7:] / times[:, None, None]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1.0) < 0.01
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("steps", [None, 1, 3])
def test_sampled_actions_are_those_of_transformers(model, theirs, inputs, wide, noise, steps):
    ours = model.predict_action(**inputs, noise=noise, num_inference_steps=steps).actions
    assert torch.equal(ours, theirs.sample_actions(**wide, noise=noise, num_steps=steps))


def test_time_goes_from_noise_at_1_to_actions_at_0(model, inputs, noise, monkeypatch):
    """An oracle whose velocity is noise - actions must be followed to the actions, and no further."""
    target, times = torch.randn(noise.shape, generator=torch.Generator().manual_seed(3)), []

    def oracle(self, timestep, past_key_values, **kwargs):
        times.append(timestep[0].item())
        return VLAOutput(logits=noise - target)

    monkeypatch.setattr(PI0VLAForActionPrediction, "forward", oracle)
    actions = model.predict_action(**inputs, noise=noise, num_inference_steps=4).actions
    torch.testing.assert_close(actions, target, atol=1e-6, rtol=0)
    assert times == [1.0, 0.75, 0.5, 0.25]


def test_loss_is_a_mean_over_real_actions_then_over_samples(model, batch, noise):
    timestep = torch.tensor([0.5, 0.9])
    output = model(**batch, noise=noise, timestep=timestep)
    actions = torch.nn.functional.pad(batch["actions"], (0, 25))
    error = (noise - actions - output.logits) ** 2
    torch.testing.assert_close(output.loss, (error[0].mean() + error[1, :3].mean()) / 2)


def test_padded_actions_change_nothing(model, batch, noise):
    timestep = torch.tensor([0.5, 0.9])
    before = model(**batch, noise=noise, timestep=timestep)
    batch["actions"][1, 3] = 1e4
    after = model(**batch, noise=noise, timestep=timestep)
    assert torch.equal(before.loss, after.loss) and torch.equal(before.logits, after.logits)


def test_a_fully_padded_sample_costs_zero(model, batch, noise):
    timestep = torch.tensor([0.5, 0.9])
    batch["action_mask"][1] = False
    alone = {key: value[:1] for key, value in batch.items()}
    both = model(**batch, noise=noise, timestep=timestep).loss
    one = model(**alone, noise=noise[:1], timestep=timestep[:1]).loss
    torch.testing.assert_close(both, one / 2)


def test_dimensions_beyond_the_robot_are_learnt_to_be_zero(model, batch, noise):
    """As published: what sampling starts from noise in all dimensions must find its way in all of them."""
    output = model(**batch, noise=noise, timestep=torch.ones(2))
    (gradient,) = torch.autograd.grad(output.loss, output.logits)
    assert gradient[0, :, 7:].all()
    torch.testing.assert_close(gradient[0, :, 7:], (output.logits - noise)[0, :, 7:] * 2 / (2 * 4 * 32))


def test_batch_mates_and_padding_change_nothing(model, batch, inputs, noise):
    model.double()
    timestep = torch.tensor([0.5, 0.9])
    together = model.predict_action(**inputs, noise=noise).actions
    velocities = model(**batch, noise=noise, timestep=timestep).logits
    for index in range(2):
        alone = model.predict_action(**rows(inputs, index), noise=noise[index : index + 1]).actions[0]
        torch.testing.assert_close(alone, together[index], atol=1e-6, rtol=0)
        own = model(**rows(batch, index), noise=noise[index : index + 1], timestep=timestep[index : index + 1])
        torch.testing.assert_close(own.logits[0], velocities[index], atol=1e-10, rtol=0)


def test_padding_to_the_published_48_text_tokens_changes_nothing(model, inputs, noise):
    model.double()
    longer = {key: torch.nn.functional.pad(inputs[key], (0, 30)) for key in ("input_ids", "attention_mask")}
    together, padded = (model.predict_action(**{**inputs, **each}, noise=noise).actions for each in ({}, longer))
    torch.testing.assert_close(together, padded, atol=1e-6, rtol=0)


def test_a_missing_camera_is_as_if_there_were_none(model, processor, observation, noise):
    sample = {key: value[1] for key, value in observation.items()}  # lacks the front camera
    missing = processor(**sample)
    own = {**missing, "pixel_values": missing["pixel_values"][:, 1:], "pixel_attention_mask": torch.tensor([[True]])}
    first, second = (model.predict_action(**each, noise=noise[:1]).actions for each in (missing, own))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    missing["pixel_values"][:, 0] = 7.0
    third = model.predict_action(**missing, noise=noise[:1]).actions
    torch.testing.assert_close(first, third, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["images", "text", "state"])
def test_prediction_depends_on(name, model, processor, observation, inputs, noise):
    picture = np.zeros((60, 80, 3), np.uint8)
    other = {"images": [{"front": picture, "wrist": picture}] * 2, "text": "stop", "state": np.ones((2, 5))}
    first = model.predict_action(**inputs, noise=noise).actions
    changed = model.predict_action(**processor(**{**observation, name: other[name]}), noise=noise).actions
    assert ((first - changed).abs().flatten(1).amax(1) > 1e-4).all()


def test_the_state_of_a_robot_that_declares_none_is_zero(config, model, processor, observation, inputs, noise):
    action_config = processor.action_config | {"state_normalization": None}
    stateless = PI0VLAProcessor.from_scratch(config, processor.statistics, action_config, processor.camera_config)
    blind = stateless(images=observation["images"], text=observation["text"])
    inputs["state"] = torch.zeros_like(inputs["state"])
    first, second = (model.predict_action(**each, noise=noise).actions for each in (blind, inputs))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["input_ids", "pixel_values", "attention_mask", "pixel_attention_mask", "state"])
def test_nothing_is_made_up_for_what_is_missing(model, batch, inputs, name):
    del batch[name], inputs[name]
    for call, arguments in ((model, batch), (model.predict_action, inputs)):
        with pytest.raises(ValueError, match=f"from the processor, got no {name}\\."):
            call(**arguments)


def test_actions_are_needed_to_train(model, inputs, noise):
    with pytest.raises(ValueError, match="Expected `actions` to learn from; to predict some, call predict_action"):
        model(**inputs, noise=noise, timestep=torch.ones(2))


def test_misspelt_and_foreign_inputs_are_named(model, batch, inputs):
    with pytest.raises(ValueError, match="forward takes no 'actions_mask'; did you mean 'action_mask'"):
        model(**batch, actions_mask=batch["action_mask"])
    with pytest.raises(ValueError, match="predict_action takes no 'num_inference_step'; did you mean 'num_inference_"):
        model.predict_action(**inputs, num_inference_step=3)
    assert model(**batch, inputs_embeds=None, return_dict=None).loss.isfinite()  # as wrappers of peft's pass them


def test_generator_makes_training_repeatable(model, batch):
    drawn = []
    model.embed_action_time.register_forward_pre_hook(lambda _, arguments: drawn.append(arguments[1:]))
    losses = [model(**batch, generator=torch.Generator().manual_seed(seed)).loss for seed in (5, 5, 6)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    for first, again, other in zip(*drawn, strict=True):  # noised actions and times
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_generator_makes_predictions_repeatable(model, inputs):
    draw = [
        model.predict_action(**inputs, generator=torch.Generator().manual_seed(seed)).actions for seed in (5, 5, 6)
    ]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_a_vlm_config_with_a_precision_of_its_own(config, inputs):
    """As published ones have; the model's is the one that was asked for, in every part."""
    parts = {name: getattr(config, name).to_dict() | {"dtype": "bfloat16"} for name in ("vlm_config", "dit_config")}
    model = PI0VLAForActionPrediction(PI0VLAConfig.from_preset("tiny", **parts))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.predict_action(**inputs).actions.isfinite().all()


def test_bfloat16_samples_stay_float32(model, batch, inputs, noise):
    wanted = model.predict_action(**inputs, noise=noise).actions
    model.to(torch.bfloat16)
    actions = model.predict_action(**inputs, noise=noise).actions
    assert actions.dtype == torch.float32 and not torch.equal(actions, actions.bfloat16().float())
    assert (actions - wanted).abs().max() < 0.1
    loss = model(**batch).loss
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps of 1 or more, got 0"),
        ({"noise": torch.zeros(2, 4, 7)}, "noise of shape \\(2, 4, 32\\), got \\(2, 4, 7\\)"),
        ({"state": torch.zeros(2, 33)}, "state of at most 32 dimensions, got 33"),
        ({"state": torch.full((2, 5), torch.nan)}, "samples \\[0, 1\\] are NaN or infinite"),
    ],
)
def test_bad_input_of_a_prediction_is_named(model, inputs, change, message):
    with pytest.raises(ValueError, match=message):
        model.predict_action(**{**inputs, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": torch.zeros(2, 3, 7)}, "shape \\(batch_size, 4, action_dim\\)"),
        ({"action_mask": torch.ones(2, 3, dtype=torch.bool)}, "and their action_mask, got .*\\(2, 3\\)"),
        ({"actions": torch.zeros(2, 4, 33)}, "actions of at most 32 dimensions, got 33"),
    ],
)
def test_bad_targets_are_named(model, batch, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**batch, **change})


def test_activation_checkpointing_is_refused(model):
    """It turns off the cache that the action expert reads; transformers' own model fails at its first step."""
    with pytest.raises(ValueError, match="not support"):
        model.activation_checkpointing_enable()


def test_a_checkpoint_of_transformers_loads(model, theirs, inputs, noise, tmp_path):
    wanted = model.predict_action(**inputs, noise=noise).actions
    for name, original in (("lerobot", True), ("own", False)):  # LeRobot's names of the weights, transformers' own
        theirs.save_pretrained(tmp_path / name, save_original_format=original)
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == "pi0"
        loaded = PI0VLAForActionPrediction.from_pretrained(tmp_path / name)
        assert loaded.config.model_type == "pi0_vla"
        assert torch.equal(loaded.predict_action(**inputs, noise=noise).actions, wanted)


def test_a_checkpoint_that_lacks_weights_is_refused(theirs, tmp_path):
    theirs.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks 10 weights of PI0VLAForActionPrediction"):
        PI0VLAForActionPrediction.from_pretrained(tmp_path)


def test_auto_classes_still_give_transformers_own_for_pi0(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is PI0Config
    assert type(AutoModel.from_pretrained(tmp_path)) is PI0Model
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is PI0ForConditionalGeneration


def test_policy_drives_a_saved_checkpoint(model, processor, observation, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is PI0VLAForActionPrediction
    policy = Policy.from_pretrained(tmp_path, device="cpu")
    sample = observation["images"][0]
    seen = {f"observation.images.{name}": picture for name, picture in sample.items()}
    seen |= {"observation.state": observation["state"][0], "task": "lift the cube"}
    torch.manual_seed(0)
    action = policy.select_action(seen)
    torch.manual_seed(0)
    inputs = processor(images=sample, text="lift the cube", state=observation["state"][0])
    wanted = processor.decode_actions(model.predict_action(**inputs))[0, 0]
    np.testing.assert_array_equal(action, wanted)
    assert action.shape == (7,)
    blind = policy.select_action({**seen, "observation.images.wrist": None, "task": "lift the lemon"})
    assert np.isfinite(blind).all()


def test_trainer_lowers_the_loss(batch, tmp_path):
    torch.manual_seed(0)
    model = PI0VLAForActionPrediction(PI0VLAConfig.from_preset("tiny", max_action_dim=8))
    samples = [{key: value[index] for key, value in batch.items()} for index in range(2)] * 4
    options = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "lr_scheduler_type": "constant"}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10, "use_cpu": True}
    arguments = TrainingArguments(tmp_path, max_steps=40, remove_unused_columns=False, **options, **quiet)
    trainer = Trainer(model, arguments, train_dataset=samples)
    assert not trainer.model_accepts_loss_kwargs
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_masks_of_single_numbers(model, batch, noise):
    """All of them real is what a mask of whole actions says; what is not real is not seen."""
    options = {"noise": noise, "timestep": torch.tensor([0.3, 0.8])}
    whole = batch["action_mask"]
    batch["action_mask"] = whole[..., None].repeat(1, 1, 7)
    torch.testing.assert_close(model(**batch, **options).loss, model(**batch | {"action_mask": whole}, **options).loss)
    batch["action_mask"][1, :, 5:] = False
    expected = model(**batch, **options).loss
    batch["actions"][1, :, 5:] = torch.nan
    assert torch.equal(model(**batch, **options).loss, expected)
    batch["actions"][1, :, 4] += 0.1
    assert not torch.equal(model(**batch, **options).loss, expected)
    with pytest.raises(ValueError, match=r"and their action_mask, got \(2, 4, 7\) and \(2, 4, 3\)"):
        model(**batch | {"action_mask": batch["action_mask"][..., :3]}, **options)
