import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer, transfer_embeddings
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration

TWO_HEADS = {
    "bin_configurations": [
        {"name": "nyu", "n_bins": 8, "min_depth": 0.001, "max_depth": 10.0},
        {"name": "kitti", "n_bins": 8, "min_depth": 0.001, "max_depth": 80.0},
    ],
    "num_patch_transformer_layers": 4,
    "patch_transformer_hidden_size": 128,  # fixed in transformers
    "patch_transformer_intermediate_size": 32,
    "patch_transformer_num_attention_heads": 2,
}
QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 1798,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def build(seed=0, **overrides):
    torch.manual_seed(seed)
    model = SpatialVLAForConditionalGeneration(SpatialVLAConfig.from_preset("tiny", **overrides)).eval()
    for parameter in model.parameters():  # a fresh network predicts one thing whatever it sees; make it listen
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2.0 * parameter[0].numel() ** -0.5)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module", params=["gemma2 untied", "gemma2 tied", "qwen2 tied"])
def any_model(request):
    """In float64: two ways to the same number then agree to the last digits, and a leak cannot pass for rounding."""
    gemma2 = SpatialVLAConfig.from_preset("tiny").text_config.to_dict()
    text_config = (
        QWEN2 if request.param == "qwen2 tied" else {**gemma2, "tie_word_embeddings": "untied" not in request.param}
    )
    return build(text_config=text_config).double()


def row(inputs, index):
    """One sample of a batch without its padding."""
    real = inputs["attention_mask"][index].bool()
    one = {key: value[index : index + 1] for key, value in inputs.items()}
    return {**one, "input_ids": one["input_ids"][:, real], "attention_mask": one["attention_mask"][:, real]}


def with_targets(inputs, config, pad=0):
    """The prompts unpadded on the left, an action chunk behind them, `pad` more pads on the right."""
    rows, labels = [], []
    for index in range(len(inputs["input_ids"])):
        prompt = row(inputs, index)["input_ids"][0].tolist()
        starts = [0, config.action_block_sizes[0], sum(config.action_block_sizes[:2])]
        chunk = [config.action_token_begin_idx + start for start in starts] * config.chunk_size + [1]
        rows.append(prompt + chunk)
        labels.append([-100] * len(prompt) + chunk)
    length = max(map(len, rows)) + pad
    return {
        "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows]),
        "labels": torch.tensor([ids + [-100] * (length - len(ids)) for ids in labels]),
        "pixel_values": inputs["pixel_values"],
        "intrinsics": inputs["intrinsics"],
    }


def test_the_published_size():
    with torch.device("meta"):
        model = SpatialVLAForConditionalGeneration(SpatialVLAConfig())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 4_027_854_731  # the published checkpoint: "4.03 B"
    assert model.spatial_embed_tokens.weight.shape == (8194, 2304)
    assert model.get_output_embeddings().weight.shape == (265347, 2304)
    assert len(model.config.vision_zoe_config.bin_configurations) == 2


def test_prediction_depends_on_image_and_text(model, tiny_inputs):
    first = model.predict_action(**tiny_inputs)
    dark = model.predict_action(**{**tiny_inputs, "pixel_values": torch.zeros_like(tiny_inputs["pixel_values"])})
    other = {**tiny_inputs, "input_ids": tiny_inputs["input_ids"].where(tiny_inputs["input_ids"] != 13, 14)}
    assert not torch.allclose(first.logits[:, 0, :1024], dark.logits[:, 0, :1024], atol=1e-3)
    assert not torch.allclose(first.logits[:, 0, :1024], model.predict_action(**other).logits[:, 0, :1024], atol=1e-3)


def test_batch_mates_and_padding_change_nothing(any_model, tiny_inputs):
    together = any_model.predict_action(**tiny_inputs)
    for index in range(2):
        alone = any_model.predict_action(**row(tiny_inputs, index))
        assert torch.equal(alone.action_ids[0], together.action_ids[index])
        torch.testing.assert_close(alone.logits[0], together.logits[index], atol=1e-5, rtol=0)


def test_generate_agrees_with_predict_action(any_model, tiny_inputs):
    """Forbid what is outside the blocks and plain generate must choose the same tokens."""
    config = any_model.config
    output = any_model.predict_action(**tiny_inputs, chunk_size=2)
    prompt_length = tiny_inputs["input_ids"].shape[1]
    starts = torch.tensor([0, *config.action_block_sizes]).cumsum(0) + config.action_token_begin_idx

    def allowed(_, ids):
        block = (len(ids) - prompt_length) % 3
        return list(range(starts[block], starts[block + 1]))

    tokens = any_model.generate(
        **tiny_inputs, max_new_tokens=6, do_sample=False, prefix_allowed_tokens_fn=allowed, use_cache=True
    )
    assert torch.equal(tokens[:, prompt_length:] - config.action_token_begin_idx, output.action_ids)
    uncached = any_model.generate(
        **tiny_inputs, max_new_tokens=6, do_sample=False, prefix_allowed_tokens_fn=allowed, use_cache=False
    )
    assert torch.equal(uncached, tokens)


def test_prediction_and_forward_score_alike(any_model, tiny_inputs):
    scores = any_model(**tiny_inputs, logits_to_keep=1).logits
    assert scores.shape == (2, 1, 1798)
    first = any_model.predict_action(**tiny_inputs).logits[:, 0]
    begin, size = any_model.config.action_token_begin_idx, any_model.config.action_block_sizes[0]
    torch.testing.assert_close(first[:, :size].double(), scores[:, 0, begin : begin + size], atol=1e-5, rtol=0)


def test_a_tied_head_scores_action_tokens_with_their_spatial_embedding(any_model, tiny_inputs):
    output = any_model(**tiny_inputs, output_hidden_states=True)
    head = any_model.get_output_embeddings().weight.clone()
    if any_model.config.text_config.tie_word_embeddings:
        head[any_model.config.action_token_begin_idx :] = any_model.spatial_embed_tokens.weight
    expected = output.hidden_states[-1] @ head.T
    if any_model.config.text_config.model_type == "gemma2":
        expected = 30.0 * torch.tanh(expected / 30.0)
    torch.testing.assert_close(output.logits, expected)


def test_generate_sees_the_image_once(model, tiny_inputs, monkeypatch):
    calls = []
    see = model.get_image_features
    monkeypatch.setattr(model, "get_image_features", lambda *inputs: calls.append(1) or see(*inputs))
    model.generate(**tiny_inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert len(calls) == 1


def test_the_loss_is_a_mean_that_no_trainer_may_rescale(model):
    assert model.accepts_loss_kwargs is False


def test_right_padding_is_visible_to_nobody(any_model, tiny_inputs):
    """The reference's training mask lets every token attend to the padding."""
    short, long = (any_model(**with_targets(tiny_inputs, any_model.config, pad)) for pad in (0, 7))
    torch.testing.assert_close(short.loss, long.loss, atol=1e-6, rtol=0)
    alone = [any_model(**with_targets(row(tiny_inputs, index), any_model.config)).loss for index in range(2)]
    torch.testing.assert_close(short.loss, torch.stack(alone).mean(), atol=1e-6, rtol=0)


def test_prompt_attends_to_itself_and_actions_to_their_past(model, tiny_inputs):
    batch = with_targets(row(tiny_inputs, 0), model.config)
    labels = batch.pop("labels")
    before = model(**batch).logits
    prompt = int((labels[0] == -100).sum())
    last_prompt_token = batch["input_ids"].clone()
    last_prompt_token[0, prompt - 1] = 99
    assert not torch.allclose(model(**{**batch, "input_ids": last_prompt_token}).logits[0, 0], before[0, 0])
    last_action = batch["input_ids"].clone()
    last_action[0, -2] += 1
    after = model(**{**batch, "input_ids": last_action}).logits
    assert torch.equal(after[0, :-2], before[0, :-2]) and not torch.equal(after[0, -2:], before[0, -2:])


def test_flash_attention_is_refused(tiny_config):
    """It would silently replace the prefix mask by a plain causal one."""
    with pytest.raises(ValueError, match="(?i)flash"):
        SpatialVLAForConditionalGeneration._from_config(
            copy.deepcopy(tiny_config), attn_implementation="flash_attention_2"
        )


def test_the_depth_model_stays_in_evaluation_mode_and_frozen(tiny_config):
    model = SpatialVLAForConditionalGeneration(tiny_config).train()
    assert model.training and model.language_model.training
    assert not any(module.training for module in model.vision_zoe_model.modules())
    assert not any(parameter.requires_grad for parameter in model.vision_zoe_model.parameters())
    assert model.multi_modal_projector.linear.weight.requires_grad


def test_two_depth_heads_do_not_vote_across_the_batch():
    zoe = {**SpatialVLAConfig.from_preset("tiny").vision_zoe_config.to_dict(), **TWO_HEADS}
    model = build(seed=3, vision_zoe_config=zoe)
    images = torch.stack(
        [torch.zeros(3, 84, 84), *torch.rand(4, 3, 84, 84, generator=torch.Generator().manual_seed(2))]
    )
    together = model.estimate_depth(images)
    alone = torch.cat([model.estimate_depth(image[None]) for image in images])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("image_size", [14, 28])
def test_images_smaller_than_the_depth_padding(image_size):
    vision = {**SpatialVLAConfig.from_preset("tiny").vision_config.to_dict(), "image_size": image_size}
    model = build(vision_config=vision)
    depth = model.estimate_depth(torch.rand(2, 3, image_size, image_size))
    assert depth.shape == (2, image_size, image_size) and torch.isfinite(depth).all()


def test_without_depth_model(tiny_inputs):
    model = build(use_vision_zoe=False)
    assert not hasattr(model, "position_embedding_3d")
    assert model.train().predict_action(**tiny_inputs).action_ids.shape == (2, 12)


def test_the_robots_own_depth(tiny_inputs):
    model = build(use_vision_zoe=False, use_ego3d=True)
    with pytest.raises(ValueError, match="no depth model: give `depth`"):
        model.predict_action(**tiny_inputs)
    near, far = (model.predict_action(**tiny_inputs, depth=torch.full((2, 84, 84), metres)) for metres in (0.4, 2.0))
    assert not torch.equal(near.logits, far.logits)
    with pytest.raises(ValueError, match=r"depth of shape \(2, 84, 84\).*got \(2, 42, 42\)"):
        model.predict_action(**tiny_inputs, depth=torch.ones(2, 42, 42))


def test_intrinsics_are_required(model, tiny_inputs):
    del tiny_inputs["intrinsics"]
    with pytest.raises(ValueError, match="needs `intrinsics`"):
        model.predict_action(**tiny_inputs)


def test_every_prompt_holds_its_own_image_tokens(model, tiny_inputs):
    """36 + 36 tokens may not be distributed as 35 + 37."""
    ids = tiny_inputs["input_ids"]
    ids[0, 0], ids[1, -1] = 5, model.config.image_token_index
    with pytest.raises(ValueError, match=r"Expected 36 image tokens.*got \[35, 37\]"):
        model.predict_action(**tiny_inputs)


def test_right_padded_prompts_are_refused(model, tiny_inputs):
    tiny_inputs["attention_mask"] = tiny_inputs["attention_mask"].flip(-1)
    with pytest.raises(ValueError, match="padded on the left"):
        model.predict_action(**tiny_inputs)


def test_sampling_is_repeatable_and_stays_in_the_blocks(model, tiny_inputs):
    def draw(seed, temperature=1.0):
        generator = torch.Generator().manual_seed(seed)
        return model.predict_action(
            **tiny_inputs, do_sample=True, generator=generator, temperature=temperature
        ).action_ids

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    starts = torch.tensor([0, *model.config.action_block_sizes]).cumsum(0)
    for seed in range(5):
        ids = draw(seed, temperature=100.0).view(2, -1, 3)
        assert ((starts[:-1] <= ids) & (ids < starts[1:])).all()
    greedy = model.predict_action(**tiny_inputs).action_ids
    assert torch.equal(draw(3, temperature=1e-6), greedy)
    with pytest.raises(ValueError, match="temperature above 0, got 0"):
        draw(1, temperature=0)


def test_grid_must_be_known():
    config = SpatialVLAConfig.from_preset("tiny", chunk_size=None)
    model = SpatialVLAForConditionalGeneration(config)
    with pytest.raises(
        ValueError, match=r"Expected a chunk_size of 1 or more and config.action_block_sizes, got None"
    ):
        model.predict_action(input_ids=torch.zeros(1, 1, dtype=torch.long), pixel_values=torch.zeros(1, 3, 84, 84))


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunks_hold_at_least_one_action(model, tiny_inputs, chunk_size):
    with pytest.raises(ValueError, match=f"Expected a chunk_size of 1 or more.*got {chunk_size}"):
        model.predict_action(**tiny_inputs, chunk_size=chunk_size)


def test_there_is_nothing_to_denoise(model, tiny_inputs):
    with pytest.raises(ValueError, match="leave num_inference_steps out"):
        model.predict_action(**tiny_inputs, num_inference_steps=10)


def test_scores_that_are_not_finite_choose_nothing(model, tiny_inputs):
    """argmax of NaN is 0: the lowest bins, a full-scale motion."""
    tiny_inputs["pixel_values"][1] = torch.nan
    for do_sample in (False, True):
        with pytest.raises(ValueError, match=r"scores of action token 0 are NaN or infinite for samples \[1\]"):
            model.predict_action(**tiny_inputs, do_sample=do_sample)


def test_no_prediction_without_a_cache(tiny_config, tiny_inputs):
    """Activation checkpointing drops the cache in training mode: each step would see a single token."""
    model = SpatialVLAForConditionalGeneration(tiny_config).train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model.predict_action(**tiny_inputs)
    assert model.eval().predict_action(**tiny_inputs).action_ids.shape == (2, 12)


@pytest.mark.parametrize("tied", [False, True])
def test_an_offloaded_head_predicts_the_same(tiny_config, tiny_inputs, tied):
    """Offloaded weights are placeholders without data; only accelerate's hooks bring them back."""
    text_config = {**tiny_config.text_config.to_dict(), "tie_word_embeddings": tied}
    model = build(text_config=text_config)
    expected = model.predict_action(**tiny_inputs)
    offloaded = cpu_offload(build(text_config=text_config), "cpu", offload_buffers=False)
    output = offloaded.predict_action(**tiny_inputs)
    assert torch.equal(output.action_ids, expected.action_ids) and torch.equal(output.logits, expected.logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_on_the_head_counts(tiny_config, tiny_inputs):
    adapted = get_peft_model(build(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False)).base_model.model
    begin, size = tiny_config.action_token_begin_idx, tiny_config.action_block_sizes[0]
    whole = adapted(**tiny_inputs, logits_to_keep=1).logits[:, 0, begin : begin + size]
    predicted = adapted.predict_action(**tiny_inputs).logits[:, 0, :size]
    torch.testing.assert_close(predicted, whole)
    assert not torch.allclose(predicted, build().predict_action(**tiny_inputs).logits[:, 0, :size], atol=1e-2)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"num_return_sequences": 2}]
)
def test_generate_in_other_ways(model, tiny_inputs, options):
    sample = {"do_sample": True} if "num_return_sequences" in options else {"do_sample": False}
    tiny_inputs["intrinsics"] = tiny_inputs["intrinsics"][0]
    tokens = model.generate(**tiny_inputs, **options, **sample, max_new_tokens=4)
    assert len(tokens) == 2 * options.get("num_return_sequences", 1)
    if "cache_implementation" in options:
        assert torch.equal(tokens, model.generate(**tiny_inputs, max_new_tokens=4, do_sample=False))


def test_generate_goes_on_behind_an_action_token(any_model, tiny_inputs):
    """An action token in front is no part of the prompt either: the prompt may not see it."""
    actions = (
        any_model.predict_action(**tiny_inputs, chunk_size=1).action_ids + any_model.config.action_token_begin_idx
    )
    ids = torch.cat([tiny_inputs["input_ids"], actions[:, :2]], dim=-1)
    mask = torch.nn.functional.pad(tiny_inputs["attention_mask"], (0, 2), value=1)
    inputs = {**tiny_inputs, "input_ids": ids, "attention_mask": mask}
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    logits = any_model.generate(**inputs, **options).logits[0]
    torch.testing.assert_close(logits.double(), any_model(**inputs).logits[:, -1], atol=1e-5, rtol=0)


def test_a_generated_image_token_is_a_token_like_any_other(model, tiny_inputs):
    image = model.config.image_token_index
    tokens = model.generate(**tiny_inputs, max_new_tokens=3, prefix_allowed_tokens_fn=lambda *_: [image])
    assert (tokens[:, -3:] == image).all()


def test_generated_text_is_no_part_of_the_prompt(any_model, tiny_inputs):
    """Without a cache everything is seen again at every step."""
    with torch.no_grad():
        ids = [80, 77, any_model.config.action_token_begin_idx]
        force = {
            "prefix_allowed_tokens_fn": lambda _, seen: [ids[(len(seen) - tiny_inputs["input_ids"].shape[1]) % 3]]
        }
        options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        cached, uncached = (
            any_model.generate(**tiny_inputs, **force, **options, use_cache=use_cache) for use_cache in (True, False)
        )
    torch.testing.assert_close(torch.stack(uncached.logits), torch.stack(cached.logits), atol=1e-5, rtol=0)


def test_embedded_inputs_must_say_where_the_actions_begin(model, tiny_inputs):
    batch = with_targets(tiny_inputs, model.config)
    expected = model(**batch).loss
    features = model.get_image_features(batch.pop("pixel_values"), batch.pop("intrinsics"))
    embeds = model.embed_inputs(batch.pop("input_ids"), features)
    with pytest.raises(ValueError, match="Expected `token_type_ids` beside `inputs_embeds` and `labels`"):
        model(inputs_embeds=embeds, **batch)
    types = (batch["labels"] != -100).long()
    torch.testing.assert_close(model(inputs_embeds=embeds, token_type_ids=types, **batch).loss, expected)


def test_image_tokens_need_an_image(model, tiny_inputs):
    del tiny_inputs["pixel_values"]
    with pytest.raises(ValueError, match="Expected `pixel_values` for the image tokens"):
        model(**tiny_inputs)


def test_positions_count_real_tokens_from_one(model, tiny_inputs):
    seen = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    model.predict_action(**tiny_inputs, chunk_size=1)
    handle.remove()
    mask = tiny_inputs["attention_mask"]
    assert torch.equal(seen[0][mask.bool()], torch.cat([torch.arange(1, row.sum() + 1) for row in mask]))
    lengths = mask.sum(-1, keepdim=True)
    assert torch.equal(seen[1], lengths + 1) and torch.equal(seen[2], lengths + 2) and len(seen) == 3


def test_a_larger_vocabulary(tiny_config, tiny_inputs):
    model = build()
    expected = model.predict_action(**tiny_inputs)
    model.resize_token_embeddings(1900)
    assert model.get_output_embeddings().weight.shape[0] == 1900
    assert torch.equal(model.predict_action(**tiny_inputs).action_ids, expected.action_ids)


def test_loss_needs_a_real_action(model, tiny_inputs):
    batch = with_targets(tiny_inputs, model.config)
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="no action is real"):
        model(**batch)


def test_missing_weights_are_an_error(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("multi_modal_projector.linear.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of SpatialVLAFor.*multi_modal_projector.linear.weight"):
        SpatialVLAForConditionalGeneration.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_an_error(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["multi_modal_projector.linear.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="mismatch"):
        SpatialVLAForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="in another shape, among them .*multi_modal_projector.linear.weight"):
        SpatialVLAForConditionalGeneration.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_spatial_embeddings_follow_a_new_grid(tiny_config):
    model = SpatialVLAForConditionalGeneration(tiny_config)
    bins, rng = (8, 16, 8, 8, 8, 8), np.random.default_rng(0)
    source, target = (GaussianGridTokenizer.fit(rng.normal(0, s, (500, 7)), num_bins=bins) for s in (0.2, 0.5))
    before = model.spatial_embed_tokens.weight.detach().clone()
    model.adapt_spatial_embeddings(source, source)
    torch.testing.assert_close(model.spatial_embed_tokens.weight, before, atol=1e-6, rtol=0)
    model.adapt_spatial_embeddings(source, target)
    expected = transfer_embeddings(before.numpy(), source, target)
    assert np.abs(model.spatial_embed_tokens.weight.detach().numpy() - expected).max() < 1e-5
    assert not torch.allclose(model.spatial_embed_tokens.weight, before)
    with pytest.raises(ValueError, match=r"two grids of 1538 ids with the same bins, got .* and \[4, 8, 4, 4, 4, 4\]"):
        model.adapt_spatial_embeddings(source, GaussianGridTokenizer.fit(rng.normal(0, 1, (9, 7)), (4, 8, 4, 4, 4, 4)))
    with pytest.raises(ValueError, match="use_spatial_token=False"):
        build(use_spatial_token=False).adapt_spatial_embeddings(source, target)


def test_bfloat16(tiny_inputs):
    model = build().to(torch.bfloat16)
    output = model.predict_action(**tiny_inputs)
    assert output.logits.dtype == torch.float32 and not output.logits.isnan().any()
    assert torch.isfinite(model(**with_targets(tiny_inputs, model.config)).loss)


def test_gradient_checkpointing_changes_no_gradient(tiny_config, tiny_inputs):
    def gradient(checkpointing):
        torch.manual_seed(0)
        model = SpatialVLAForConditionalGeneration(tiny_config).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**with_targets(tiny_inputs, tiny_config)).loss.backward()
        return model.vision_tower.embeddings.patch_embedding.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))
