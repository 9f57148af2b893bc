"""What holds for TinyVLA on every image-text-to-text model, see BACKBONES."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from hf_vla.models.backbones import num_image_tokens

TEXTS = ["push", "pick up the red cube"]
STATE = np.array([[0.3, 1.0], [-0.2, 2.0]])


def prompts(system, pictures, **arguments):
    return system.processor(images=pictures, text=TEXTS, state=STATE, **arguments)


def one(inputs, index, system):
    """A sample of a batch alone: images lie flat beside each other where they are not nested."""
    alone = {}
    for name, value in inputs.items():
        if len(value) == 2:
            alone[name] = value[index : index + 1]
        elif name == "image_grid_thw" or "image_grid_thw" not in inputs:
            alone[name] = value[2 * index : 2 * index + 2]
        else:
            alone[name] = value.split(inputs["image_grid_thw"].view(2, 2, 3).prod(-1).sum(-1).tolist())[index]
    length = int(alone["attention_mask"].nonzero()[-1, 1]) + 1
    return {
        name: value[:, :length] if name in ("input_ids", "attention_mask") else value for name, value in alone.items()
    }


def double(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def test_training_lowers_the_loss(system, pictures, chunks, few_steps):
    batch = prompts(system, pictures, actions=chunks)
    model = system.model.train()
    losses = few_steps(model, batch)
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]
    gradients = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    for part in ("vis", "layers.0", "action_head"):  # vision tower, first layers, head
        assert any(part in name for name in gradients)


def test_padding_and_batch_mates_change_nothing(system, pictures, chunks):
    model = system.model.double()
    inputs = double(prompts(system, pictures, actions=chunks))
    targets = {name: inputs.pop(name) for name in ("actions", "action_mask")}
    actions = model.predict_action(**inputs).actions
    losses = []
    for index in range(2):
        alone = one(inputs, index, system)
        torch.testing.assert_close(model.predict_action(**alone).actions[0], actions[index], rtol=0, atol=1e-6)
        features, mask = model.encode(**{name: value for name, value in inputs.items() if name != "state"})
        alone_features, _ = model.encode(**{name: value for name, value in alone.items() if name != "state"})
        torch.testing.assert_close(features[index][mask[index]], alone_features[0], rtol=0, atol=1e-9)
        losses.append(model(**alone, **{name: value[index : index + 1] for name, value in targets.items()}).loss)
    torch.testing.assert_close(model(**inputs, **targets).loss, torch.stack(losses).mean(), rtol=1e-6, atol=0)


def test_padding_in_front_is_as_padding_behind(system, pictures):
    model = system.model.double()
    inputs = double(prompts(system, pictures))
    wanted = model.predict_action(**inputs).actions
    lengths = inputs["attention_mask"].cumsum(-1).argmax(-1) + 1
    assert lengths.min() < lengths.max() == inputs["input_ids"].shape[1]
    shifts = (lengths.max() - lengths).tolist()
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.stack([row.roll(shift) for row, shift in zip(inputs[name], shifts, strict=True)])
    torch.testing.assert_close(model.predict_action(**inputs).actions, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("missing", ["front", "wrist"])
def test_nothing_sees_a_missing_camera(system, pictures, missing):
    model = system.model.double()
    present = double(prompts(system, pictures))
    partial = [pictures[0], {**pictures[1], missing: None}]
    if missing == "front":  # of the size in the camera's specification, as the picture is that stands for it
        assert pictures[1]["front"].shape == (30, 40, 3)
    inputs = double(prompts(system, partial))
    actions = model.predict_action(**inputs).actions
    whole = model.predict_action(**present).actions
    torch.testing.assert_close(actions[0], whole[0], rtol=0, atol=1e-9)
    assert (actions[1] - whole[1]).abs().max() > 1e-4
    other_pixels = model.predict_action(**{**inputs, "pixel_values": present["pixel_values"]}).actions
    torch.testing.assert_close(other_pixels, actions, rtol=0, atol=1e-9)
    black = [pictures[0], {**pictures[1], missing: np.zeros_like(pictures[1][missing])}]
    blind = model.predict_action(**double(prompts(system, black))).actions
    assert (actions[1] - blind[1]).abs().max() > 1e-4


def test_a_missing_camera_leaves_finite_gradients(system, pictures, chunks):
    partial = [{**pictures[0], "wrist": None}, {**pictures[1], "front": None}]
    system.model.train()(**prompts(system, partial, actions=chunks)).loss.backward()
    assert all(value.grad.isfinite().all() for value in system.model.parameters() if value.grad is not None)


def test_the_number_of_image_tokens_follows_from_the_configuration(system, pictures):
    inputs = prompts(system, pictures)
    count = {"llava_clip": 16, "llava_siglip": 16, "paligemma": 16, "qwen2_vl": None, "qwen2_5_vl": None}
    expected = count.get(system.name, 4)
    counted = num_image_tokens(system.model.config.backbone_config)
    assert counted == system.processor.prompt_config["image_seq_length"] == expected
    images = (inputs["input_ids"] == system.processor.image_token_id).sum(-1)
    if expected is None:
        expected = inputs["image_grid_thw"].prod(-1).view(2, 2).sum(-1) / 4 / 2
    assert torch.equal(images, torch.as_tensor(2 * expected).expand(2).long())


def test_every_input_is_an_array_of_numbers(system, pictures, chunks):
    """Whatever the image processor would rather return; the model reads every one."""
    for form, kind in (("np", np.ndarray), ("pt", torch.Tensor)):
        batch = prompts(system, pictures, actions=chunks, return_tensors=form)
        assert all(isinstance(value, kind) for value in batch.values())
    views = [[(Image.fromarray(view), True) for view in views.values()] for views in pictures]
    assert all(
        isinstance(each, np.ndarray)
        for each in system.processor.encode_prompts(views, TEXTS, [None] * len(TEXTS)).values()
    )


def test_an_image_of_gemma_and_qwen_is_told_from_the_words(system, pictures):
    """Gemma 3 marks images by 1 in token_type_ids, Qwen in mm_token_type_ids; PaliGemma marks the prompt by 0."""
    inputs, seen = prompts(system, pictures), []
    system.model.backbone.register_forward_pre_hook(
        lambda _module, _arguments, options: seen.append(options), with_kwargs=True
    )
    system.model.predict_action(**inputs)
    is_image = inputs["input_ids"] == system.model.config.image_token_id
    expected = {
        "paligemma": {"token_type_ids": torch.zeros_like(inputs["input_ids"])},
        "gemma3": {"token_type_ids": is_image.long()},
        "qwen2_vl": {"mm_token_type_ids": is_image.int()},
        "qwen2_5_vl": {"mm_token_type_ids": is_image.int()},
    }
    got = {name: value for name, value in seen[0].items() if name.endswith("token_type_ids")}
    assert got.keys() == expected.get(system.name, {}).keys()
    assert all(torch.equal(value, expected[system.name][name]) for name, value in got.items())


def test_misspelt_and_foreign_inputs_are_named(system, pictures, chunks):
    batch = prompts(system, pictures, actions=chunks)
    with pytest.raises(ValueError, match="forward takes no 'actions_mask'; did you mean 'action_mask'"):
        system.model(**batch, actions_mask=batch["action_mask"])
    with pytest.raises(ValueError, match="predict_action takes no 'actions'"):
        system.model.predict_action(**batch)
    with pytest.raises(ValueError, match="encode takes no 'depth', 'kwargs', 'use_cache'"):
        system.model.encode(batch["input_ids"], depth=1, kwargs=1, use_cache=True)
    assert system.model(**batch, inputs_embeds=None, return_dict=None, labels=None).loss.isfinite()  # from peft


def test_pictures_alone_are_handed_on(system, pictures, chunks):
    """What contradicts them, or the prompt's tokens, is refused even where the backbone would take it."""
    batch = prompts(system, pictures, actions=chunks)
    foreign = ["inputs_embeds", "position_ids", "token_type_ids", "mm_token_type_ids", "labels", "mm_encoder_outputs"]
    foreign += [
        "pixel_values_videos",
        "video_grid_thw",
        "second_per_grid_ts",
        "cache_position",
        "vision_feature_layer",
    ]
    for name in foreign:
        with pytest.raises(ValueError, match=f"forward takes no '{name}'"):
            system.model(**batch, **{name: torch.zeros(1)})


def test_pictures_must_be_handed_on(system, pictures, chunks):
    batch = prompts(system, pictures, actions=chunks)
    with pytest.raises(ValueError, match="Expected pixel_values, since the prompts have image tokens, got none"):
        system.model(**{**batch, "pixel_values": None})
    if "image_grid_thw" in batch:
        for grid, got in ((None, "none"), (batch["image_grid_thw"][1:], r"shape \(3, 3\)")):
            with pytest.raises(ValueError, match=f"image_grid_thw with a row for each of the 4 pictures .* got {got}"):
                system.model(**{**batch, "image_grid_thw": grid})


def test_cameras_are_told_apart(system, pictures):
    swapped = [{"front": picture["wrist"], "wrist": picture["front"]} for picture in pictures]
    actions, other = (system.model.predict_action(**prompts(system, views)).actions for views in (pictures, swapped))
    assert (actions - other).abs().max() > 1e-5


def test_save_and_load(system, pictures, tmp_path):
    system.model.save_pretrained(tmp_path)
    system.processor.save_pretrained(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(model) is type(system.model) and type(processor) is type(system.processor)
    inputs, again = (each(images=pictures, text=TEXTS, state=STATE) for each in (system.processor, processor))
    assert inputs.keys() == again.keys() and all(torch.equal(inputs[name], again[name]) for name in inputs)
    assert torch.equal(model.predict_action(**again).actions, system.model.predict_action(**inputs).actions)

    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    for inputs in (again, again.to("cpu", torch.bfloat16)):
        actions = half.predict_action(**inputs).actions
        assert actions.dtype == torch.float32 and actions.isfinite().all()


def test_gradient_checkpointing_changes_no_gradient(system, pictures, chunks):
    batch, model = prompts(system, pictures, actions=chunks), system.model.train()
    model(**batch).loss.backward()
    plain = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    model(**batch).loss.backward()
    for name, value in model.named_parameters():
        if name in plain:
            torch.testing.assert_close(value.grad, plain[name])


def test_the_prompt_of_paligemma_sees_itself_whole(system, pictures):
    """All others are causal: what comes later changes nothing before it."""
    inputs = prompts(system, pictures)
    del inputs["state"]
    features, _ = system.model.train().encode(**inputs)
    last = int(inputs["attention_mask"][1].nonzero()[-1])
    inputs["input_ids"][1, last] = 100
    changed, _ = system.model.encode(**inputs)
    same = (features[1] == changed[1]).all(-1)[: last + 1]
    assert not same.any() if system.name == "paligemma" else same[:last].all() and not same[last]


def test_readout_tokens_alone_reach_the_head(make_system, pictures):
    system = make_system(num_readout_tokens=2)
    inputs = prompts(system, pictures)
    del inputs["state"]
    features, mask = system.model.encode(**inputs)
    assert features.shape == (2, 2, 32) and mask.all() and mask.shape == (2, 2)
    assert not torch.equal(features[:, 0], features[:, 1])
