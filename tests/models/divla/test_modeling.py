import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hf_vla.actions.heads.registry import ACTION_HEADS
from hf_vla.models.backbones import check_images
from hf_vla.models.divla.configuration_divla import DiVLAConfig
from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction
from hf_vla.models.divla.processing_divla import DiVLAProcessor

UNET = {"type": "conditional_unet1d", "down_dims": [8, 16], "diffusion_step_embed_dim": 16}
DIT = {"type": "dit", "hidden_size": 32, "depth": 1, "num_heads": 4}
DIFFUSION = {"type": "diffusion", "denoiser": UNET}
# small versions of the heads that are large by default
HEADS = {"diffusion": DIFFUSION, "flow_matching": {"type": "flow_matching", "denoiser": UNET}}
CHOICES = {name: HEADS.get(name, {"type": name}) for name in sorted(ACTION_HEADS)} | {
    "diffusion_dit": {"type": "diffusion", "denoiser": DIT},
    "flow_matching_dit": {"type": "flow_matching", "denoiser": DIT},
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("use_film", [True, False])
@pytest.mark.parametrize("name", CHOICES)
def test_every_head_trains_predicts_saves_and_loads(name, use_film, make_model, batch, prompt, tmp_path):
    model = make_model(head_config=CHOICES[name], use_film=use_film)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        output = model(**batch, generator=seeded())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append([output.loss.item(), output.diffusion_loss.item(), output.ntp_loss.item()])
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))
    output = model.predict_action(**prompt, generator=seeded())
    assert output.actions.shape == (2, 4, 3) and output.actions.dtype == torch.float32
    assert not output.actions.requires_grad and output.reasoning_ids.dtype == torch.long
    model.save_pretrained(tmp_path)
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        again = auto_class.from_pretrained(tmp_path)
        assert type(again) is DiVLAForActionPrediction and not again.training
        assert torch.equal(again.predict_action(**prompt, generator=seeded()).actions, output.actions)
        assert torch.equal(again(**batch, generator=seeded()).loss, model(**batch, generator=seeded()).loss)


@pytest.mark.parametrize("weight", [1.0, 0.25, 0.0])
def test_the_loss_is_a_weighted_sum(make_model, batch, weight):
    model = make_model(head_config=DIFFUSION, ntp_loss_weight=weight)
    output = model(**batch, generator=seeded())
    assert torch.equal(output.loss, output.diffusion_loss + weight * output.ntp_loss)
    assert output.ntp_loss > 0 and output.reconstruction_loss is None
    output.loss.backward()
    assert model.get_output_embeddings().weight.grad.any() == (weight > 0)


def test_the_head_s_loss_is_the_mean_over_the_samples(make_model, batch):
    model = make_model(head_config=DIFFUSION)
    output = model(**batch, generator=seeded())
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "labels")
    encoding = model.encode(**{name: batch[name] for name in names})
    assert torch.equal(output.hidden_states[0], encoding.hidden_states)
    targets = [batch[name] for name in ("actions", "action_mask", "state")]
    each = model.action_head.loss(*model.condition(encoding), *targets, generator=seeded())
    assert each.shape == (2,) and torch.equal(output.diffusion_loss, each.mean())


def test_the_reasoning_s_loss_is_the_mean_over_its_tokens(model, batch):
    output, labels = model(**batch), batch["labels"]
    logits = model.backbone.lm_head(output.hidden_states[0]).log_softmax(-1)
    likelihood = [
        -logits[row, place - 1, labels[row, place]]
        for row in range(2)
        for place in range(1, labels.shape[1])
        if labels[row, place] != -100
    ]
    assert len(likelihood) == len("reach for itNext action:") + len("liftNext action:") + 2
    torch.testing.assert_close(output.ntp_loss, sum(likelihood) / len(likelihood))


def test_the_language_head_sees_the_reasoning_alone(make_model, batch, make_batch):
    """The logits of all of a vocabulary for each token of a prompt, with its images, would fill the memory."""
    model, asked = make_model(), []
    model.get_output_embeddings().register_forward_hook(lambda _, __, output: asked.append(tuple(output.shape)))
    model(**batch)
    model(**make_batch(reasoning=["lift", None]))
    assert asked == [(len("reach for itliftNext action:Next action:") + 2, 300), (len("liftNext action:") + 1, 300)]


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("name", ["diffusion", "regression"])
def test_samples_without_a_reasoning_teach_the_head_alone(name, make_model, make_batch, labels):
    model = make_model(head_config=CHOICES[name]).train()
    batch = make_batch(reasoning=None)
    assert "labels" not in batch
    if labels:
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
    output = model(**batch, generator=seeded())
    assert output.ntp_loss == 0 and torch.equal(output.loss, output.diffusion_loss)
    output.loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    # 0 for what only a reasoning teaches, rather than None: distributed training waits for all of them
    assert all(value is not None and value.isfinite().all() for value in gradients.values())
    idle = {name for name, value in gradients.items() if not value.any() and "backbone.model" not in name}
    taught = ("film.reasoning_proj", "film.film", "backbone.lm_head")
    assert idle == {name for name in gradients if name.startswith(taught)}


def test_mixed_batches(make_model, make_batch):
    """A sample's loss is what it is alone, whether its mate has a reasoning or none."""
    model, batch = make_model().double(), make_batch(reasoning=[None, "lift"])
    batch["pixel_values"] = batch["pixel_values"].double()
    mixed = model(**batch)
    mixed.loss.backward()
    assert all(value.grad.isfinite().all() for value in model.parameters())
    spoken = model(**{**make_batch(reasoning="lift"), "pixel_values": batch["pixel_values"]})
    silent = model(**{**make_batch(reasoning=None), "pixel_values": batch["pixel_values"]})
    masks = [torch.tensor([[True] * 4, [False] * 4]), torch.tensor([[False] * 4, [True] * 4])]
    losses = [
        model(
            **{**make_batch(reasoning=reasoning), "pixel_values": batch["pixel_values"], "action_mask": mask}
        ).diffusion_loss
        for reasoning, mask in zip((None, "lift"), masks, strict=True)
    ]
    torch.testing.assert_close(mixed.diffusion_loss, sum(losses), rtol=1e-5, atol=0)
    assert abs(mixed.diffusion_loss - spoken.diffusion_loss) > 2e-5
    assert abs(mixed.diffusion_loss - silent.diffusion_loss) > 2e-5
    alone = make_batch(reasoning=["lift", "lift"])
    alone["labels"][0] = -100  # the same words, of which the first sample's teach nothing
    torch.testing.assert_close(
        mixed.ntp_loss, model(**{**alone, "pixel_values": batch["pixel_values"]}).ntp_loss, rtol=1e-5, atol=0
    )


def test_the_reasoning_changes_the_actions(model, make_batch):
    first, other = (
        model.predict_action(**make_batch(actions=None, reasoning=reasoning)).actions for reasoning in ("lift", "stop")
    )
    assert (first - other).abs().max() > 1e-4


def test_untrained_film_leaves_the_prompt_as_it_is(config, batch):
    """Its output is the projected prompt, and the mean of its hidden states beside it, whatever was said."""
    model = DiVLAForActionPrediction(config)
    assert not any(parameter.any() for parameter in model.film.film.parameters())
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "labels")
    encoding = model.encode(**{name: batch[name] for name in names})
    features, mask = model.condition(encoding)
    assert features.shape == (2, 1, 32) and mask.shape == (2, 1) and mask.all()
    for index in range(2):
        prompt = encoding.hidden_states[index][encoding.mask[index] & ~encoding.is_reasoning[index]]
        linear, gelu, last = model.film.prompt_proj
        mean = prompt.mean(0)
        torch.testing.assert_close(features[index, 0], last(gelu(linear(mean))) + mean)


def test_without_film_the_head_sees_prompt_and_reasoning(make_model, make_batch, batch):
    model = make_model(use_film=False)
    assert model.film is None
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "labels")
    encoding = model.encode(**{name: batch[name] for name in names})
    features, mask = model.condition(encoding)
    assert torch.equal(features, encoding.hidden_states) and torch.equal(mask, batch["attention_mask"].bool())
    assert torch.equal(encoding.is_reasoning, batch["labels"] != -100)


def test_noise_generator_and_steps_reach_the_head(make_model, prompt):
    model = make_model(head_config=DIFFUSION)
    first, again, other = (model.predict_action(**prompt, generator=seeded(seed)).actions for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    noise = torch.randn(2, 4, 3, generator=seeded())
    assert torch.equal(model.predict_action(**prompt, noise=noise).actions, first)
    assert not torch.equal(model.predict_action(**prompt, noise=noise, num_inference_steps=5).actions, first)


def test_padded_actions_do_not_enter_the_loss(make_model, batch):
    model = make_model(head_config=DIFFUSION)
    batch["action_mask"][:, 2:] = False
    loss = model(**batch, generator=seeded()).diffusion_loss
    batch["actions"][:, 2:] = 7.0
    assert torch.equal(model(**batch, generator=seeded()).diffusion_loss, loss)
    del batch["action_mask"]
    assert model(**batch, generator=seeded()).diffusion_loss > 1.5 * loss


def test_without_a_state(make_model, batch, prompt):
    model = make_model(state_dim=None)
    for inputs in (batch, prompt):
        with pytest.raises(ValueError, match=r"Expected a state of None numbers"):
            (model if "actions" in inputs else model.predict_action)(**inputs)
        del inputs["state"]
    assert model(**batch).loss.isfinite() and model.predict_action(**prompt).actions.isfinite().all()
    with pytest.raises(ValueError, match="Expected a state of 2 numbers"):
        make_model().predict_action(**prompt)


def test_misspelt_and_foreign_inputs_are_named(model, batch, prompt):
    with pytest.raises(ValueError, match="forward takes no 'actions_mask'; did you mean 'action_mask'"):
        model(**batch, actions_mask=batch["action_mask"])
    with pytest.raises(ValueError, match="predict_action takes no 'actions'"):
        model.predict_action(**batch)
    with pytest.raises(ValueError, match="reason takes no 'labels', 'state'"):
        model.reason(**prompt, labels=batch["labels"])
    # counted by the model itself
    with pytest.raises(ValueError, match="encode takes no 'mm_token_type_ids', 'position_ids', 'use_cache'"):
        model.encode(batch["input_ids"], position_ids=1, mm_token_type_ids=1, use_cache=True)
    # what contradicts the prompts' tokens and pictures
    for name in ("inputs_embeds", "pixel_values_videos", "video_grid_thw", "mm_encoder_outputs", "cache_position"):
        with pytest.raises(ValueError, match=f"predict_action takes no '{name}'"):
            model.predict_action(**prompt, **{name: torch.zeros(1)})
    assert model(**batch, inputs_embeds=None, return_dict=None).loss.isfinite()  # from peft


def test_actions_are_needed_to_train(model, prompt):
    with pytest.raises(ValueError, match="Expected `actions` to learn from; to predict some, call predict_action"):
        model(**prompt)


def test_pictures_must_be_handed_on(model, batch, prompt):
    sizes = batch["image_grid_thw"]
    for method, inputs in ((model, batch), (model.predict_action, prompt)):
        with pytest.raises(ValueError, match="Expected pixel_values, since the prompts have image tokens, got none"):
            method(**{**inputs, "pixel_values": None})
        for grid, got in ((None, "none"), (sizes[:3], r"shape \(3, 3\)"), (sizes[0], r"shape \(3,\)")):
            with pytest.raises(ValueError, match=f"image_grid_thw with a row for each of the 4 pictures .* got {got}"):
                method(**{**inputs, "image_grid_thw": grid})


@pytest.mark.parametrize("is_image", [[[1, 1, 0, 1, 0]], [[1, 0], [1, 1]], [[0, 1], [1, 0]]])
def test_pictures_are_counted_wherever_they_stand(model, is_image):
    is_image, pixels = torch.tensor(is_image).bool(), torch.zeros(1)
    check_images(model.backbone.base_model, is_image, pixels, {"image_grid_thw": torch.ones(2, 3)})
    for count in (1, 3):
        with pytest.raises(ValueError, match=rf"each of the 2 pictures .* got shape \({count}, 3\)"):
            check_images(model.backbone.base_model, is_image, pixels, {"image_grid_thw": torch.ones(count, 3)})


def test_prompts_without_pictures_need_none(make_model):
    """Such as a processor's whose template holds no images."""
    model, ids = make_model(state_dim=None), torch.tensor([[70, 71, 72]])
    assert model.predict_action(ids).actions.isfinite().all()


@pytest.mark.parametrize("where", ["pixel_values", "state"])
def test_predictions_that_are_not_finite_raise(model, prompt, where):
    prompt[where][-1] = torch.nan
    with pytest.raises(ValueError, match=r"The predicted actions of samples \[1\] are NaN or infinite"):
        model.predict_action(**prompt)


def test_prompts_longer_than_the_backbones_positions_are_refused(make_model, backbones, batch):
    length, backbone = batch["input_ids"].shape[1], backbones["qwen2_vl"].config
    for most in (length - 1, length):
        text_config = {**backbone["text_config"], "max_position_embeddings": most}
        model = make_model(backbone_config={**backbone, "text_config": text_config})
        if most == length:
            assert model(**batch).loss.isfinite()
        else:
            with pytest.raises(ValueError, match=f"prompts of at most {most} tokens.* got {length}"):
                model(**batch)


def test_gradient_checkpointing_changes_no_gradient(make_model, batch):
    model = make_model(head_config=DIFFUSION).train()
    model(**batch, generator=seeded()).loss.backward()
    plain = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    model(**batch, generator=seeded()).loss.backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, plain[name])


@pytest.mark.parametrize("name", sorted(ACTION_HEADS))
def test_built_under_bfloat16_as_default(name, make_model, batch, prompt):
    """The published scheduler keeps its alphas in the default precision and ends in NaN."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = make_model(head_config=CHOICES[name])
        assert model.dtype == torch.bfloat16
        output, acted = model(**batch, generator=seeded()), model.predict_action(**prompt)
    finally:
        torch.set_default_dtype(before)
    assert output.loss.dtype == output.ntp_loss.dtype == output.diffusion_loss.dtype == torch.float32
    assert output.loss.isfinite() and acted.actions.dtype == torch.float32 and acted.actions.isfinite().all()


@pytest.mark.parametrize("cast", [True, False])
def test_bfloat16_weights(make_model, batch, prompt, tmp_path, cast):
    model = make_model(head_config=DIFFUSION)
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    if cast:
        batch, prompt = (inputs.to("cpu", torch.bfloat16) for inputs in (batch, prompt))
    loss = half(**batch, generator=seeded()).loss
    torch.testing.assert_close(loss, model(**batch, generator=seeded()).loss, rtol=0.01, atol=0)
    loss.backward()
    assert all(value.grad.isfinite().all() for value in half.parameters())
    actions = half.predict_action(**prompt).actions
    assert actions.dtype == torch.float32 and actions.isfinite().all()


def test_the_head_keeps_its_own_initialisation(make_model):
    """Transformers would draw convolutions from N(0, 0.02) and undo the zeros of adaLN."""
    convolution = make_model(head_config=DIFFUSION).action_head.denoiser.final_conv[-1].weight
    bound = convolution[0].numel() ** -0.5  # PyTorch's default is uniform up to it
    assert 0.8 * bound < convolution.abs().max() <= bound
    head = make_model(head_config=CHOICES["diffusion_dit"]).action_head
    assert any(not parameter.any() for name, parameter in head.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(model, make_config, prompt, implementation):
    other = AutoModel.from_config(make_config(), attn_implementation=implementation).eval()
    assert other.backbone.model.language_model.config._attn_implementation == implementation
    other.load_state_dict(model.state_dict())
    wanted, got = model.predict_action(**prompt), other.predict_action(**prompt)
    assert torch.equal(got.reasoning_ids, wanted.reasoning_ids)
    torch.testing.assert_close(got.actions, wanted.actions)


@pytest.mark.parametrize("backbone", ["qwen2_vl", "paligemma"])  # without and with a head that is the embedding
def test_what_trainers_and_accelerate_ask_for(backbone, make_model):
    model = make_model(backbone)
    assert model.accepts_loss_kwargs is False and model._no_split_modules
    assert model.get_input_embeddings() is model.backbone.get_input_embeddings()
    model.resize_token_embeddings(310)
    assert model.get_input_embeddings().num_embeddings == 310 == model.config.get_text_config().vocab_size
    assert model.get_output_embeddings().weight.shape == (310, 32)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (backbone == "paligemma")
    assert get_checkpoint_conversion_mapping("divla") is not None


@pytest.mark.parametrize("name", ["action_head.denoiser.final_conv.1.bias", "film.film.scale.weight"])
def test_a_missing_weight_is_an_error(make_model, tmp_path, name):
    make_model(head_config=DIFFUSION).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of DiVLAForActionPrediction"):
        AutoModel.from_pretrained(tmp_path)


def test_a_missing_language_head_is_an_error_unless_it_is_the_embedding(make_model, tmp_path):
    for backbone, found in (("qwen2_vl", True), ("paligemma", False)):
        make_model(backbone).save_pretrained(tmp_path / backbone)
        path = tmp_path / backbone / "model.safetensors"
        weights = load_file(path)
        assert (weights.pop("backbone.lm_head.weight", None) is not None) == found
        save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of .*'backbone.lm_head.weight'"):
        AutoModel.from_pretrained(tmp_path / "qwen2_vl")
    AutoModel.from_pretrained(tmp_path / "paligemma")


def _exchange(mlp):
    """A layer that transformers has never seen."""
    mlp.down_proj = torch.nn.Linear(*mlp.down_proj.weight.shape[::-1], bias=False, dtype=torch.bfloat16)


@pytest.mark.parametrize("latent_dim", [None, 4])
@pytest.mark.parametrize("name", ["qwen2_vl", "paligemma"])  # without and with a head that is the embedding
def test_built_around_a_pretrained_backbone(name, latent_dim, make_model, make_config, robot, tmp_path):
    make_model(name).backbone.save_pretrained(tmp_path / "vlm")
    load = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    backbone = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm", **load)
    backbone.resize_token_embeddings(310, mean_resizing=False)
    _exchange(backbone.base_model.language_model.layers[0].mlp)
    before = {key: value.clone() for key, value in (*backbone.state_dict().items(), *backbone.named_buffers())}
    options = {"head_config": DIFFUSION, "end_token_id": 1, "max_reasoning_tokens": 3, "latent_dim": latent_dim}
    config = DiVLAConfig(backbone_config=backbone.config, **robot.sizes, **options)
    model = DiVLAForActionPrediction(config, backbone).eval()
    assert model.backbone is backbone and {value.dtype for value in model.parameters()} == {torch.bfloat16}
    after = dict((*backbone.state_dict().items(), *backbone.named_buffers()))
    assert after.keys() == before.keys()
    assert all(value.dtype == before[key].dtype and torch.equal(value, before[key]) for key, value in after.items())
    assert torch.float32 in {value.dtype for value in backbone.buffers()}  # frequencies, which bfloat16 would shift
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name == "paligemma")
    for part in (backbone.config, backbone.config.text_config, backbone.config.vision_config):
        assert part._attn_implementation == "eager"

    # as one that is built and loaded as a whole
    other = AutoModel.from_config(make_config(name, backbone_config=backbone.config.to_dict(), **options))
    assert model.state_dict().keys() == other.state_dict().keys()
    model.save_pretrained(tmp_path / "divla")
    again = AutoModel.from_pretrained(tmp_path / "divla", attn_implementation="eager")
    assert again.dtype == torch.bfloat16 and again.config.get_text_config().vocab_size == 310
    inputs = {"input_ids": torch.tensor([[70, 71, 72]]), "state": torch.zeros(1, 2)}
    wanted, got = (each.predict_action(**inputs, generator=seeded()) for each in (model, again))
    assert torch.equal(got.actions, wanted.actions) and torch.equal(got.reasoning_ids, wanted.reasoning_ids)


def test_a_backbone_of_another_configuration_is_refused(config, backbones):
    other = DiVLAConfig(backbone_config=backbones["qwen2_vl"].config, end_token_id=1)
    backbone = AutoModelForImageTextToText.from_config(other.backbone_config)
    with pytest.raises(ValueError, match=r"of this Qwen2VL.* build it as DiVLAConfig\(backbone_config=back"):
        DiVLAForActionPrediction(config, backbone)
    other = DiVLAConfig(backbone_config=backbone.base_model.config, end_token_id=1)
    with pytest.raises(ValueError, match="has no language head of its own behind a base model"):
        DiVLAForActionPrediction(other, backbone.base_model)


def test_every_part_of_a_loss_is_a_field(make_model, batch):
    """The trainer logs what is called a loss; with the weight, the parts are the whole."""
    model = make_model(head_config=DIFFUSION, latent_dim=4, ntp_loss_weight=0.25)
    model.add_embodiment("robot", 3)
    with torch.no_grad():
        model.embodiments["robot"].decoder.map.mul_(0.5)
    for frozen in (False, True):
        if frozen:
            model.train_embodiment("robot")
        output = model(**batch, embodiment="robot", generator=seeded())
        parts = {name: part for name, part in output.items() if name.endswith("_loss")}
        assert ("volume_loss" in parts) == frozen and len(parts) == 3 + frozen
        total = sum((0.25 if name == "ntp_loss" else 1.0) * part for name, part in parts.items())
        torch.testing.assert_close(output.loss, total, rtol=1e-6, atol=0)
    assert output.volume_loss > 0.01


def test_a_batch_is_of_one_robot(make_model, batch):
    model = make_model(latent_dim=4)
    with pytest.raises(ValueError, match=r"of one embodiment for the batch, got \['default', 'default'\]"):
        model(**batch, embodiment=["default", "default"])


def test_the_tiny_preset_works(pictures, chunks):
    config = DiVLAConfig.from_preset("tiny", action_dim=3, state_dim=None, chunk_size=4, max_reasoning_tokens=3)
    statistics = {"robot": {"action": {"min": [0.0] * 3, "max": [1.0] * 3}}}
    action_config = {"chunk_size": 4, "normalization": {"mode": "min_max", "convention": "tinyvla"}}
    cameras = {"robot": [{"name": name, "width": 28, "height": 28} for name in ("front", "wrist")]}
    processor = DiVLAProcessor.from_scratch(config, statistics, action_config, cameras)
    model = DiVLAForActionPrediction(config)
    output = model.predict_action(**processor(images=pictures, text="push"))
    assert processor.decode_actions(output).shape == (2, 4, 3) and len(processor.decode_reasoning(output)) == 2
    assert model(**processor(images=pictures, text="push", actions=chunks, reasoning="lift")).loss.isfinite()
