"""SpatialVLA that fills in all tokens of a chunk in a few passes, with grids and with uniform bins."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModel, AutoProcessor

from hf_vla.actions.tokenizers.gaussian_grid import NUM_BINS, GaussianGridTokenizer
from hf_vla.actions.tokenizers.uniform import UniformTokenizer
from hf_vla.models.spatialvla.action_tokens import token_fields
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.masked_decoding import decode, random_mask, replace
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration
from hf_vla.models.spatialvla.processing_spatialvla import SpatialVLAProcessor
from hf_vla.policy import Policy
from hf_vla.training.lora import add_lora
from hf_vla.training.optimization import freeze_backbone, parameter_groups

CHUNK_SIZE = 3
TOKENIZERS = ("gaussian_grid", "uniform", "rt2")
BACKBONES = {
    "gemma2": {"num_hidden_layers": 2, "sliding_window": 8},  # much shorter than the prompt
    "gemma2 tied": {"num_hidden_layers": 2, "tie_word_embeddings": True},
    "qwen2 tied": {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


def make_tokenizer(name):
    if name == "gaussian_grid":
        actions = np.random.default_rng(0).uniform(-1, 1, (500, 7))
        return GaussianGridTokenizer.fit(actions, [bins // 2 for bins in NUM_BINS])
    return UniformTokenizer(7, terminate=name == "rt2")


def make(name="gaussian_grid", backbone="gemma2", spread=2.0, **fields):
    """Model and processor of a robot whose actions are in [-1, 1]; `spread` makes a fresh network listen."""
    tokenizer = make_tokenizer(name)
    text_config = {**SpatialVLAConfig.from_preset("tiny").text_config.to_dict(), "layer_types": None}
    if backbone == "qwen2 tied":
        text_config = {}
    config = SpatialVLAConfig.from_preset(
        "tiny",
        use_vision_zoe=False,
        text_config={**text_config, **BACKBONES[backbone], "vocab_size": 260 + tokenizer.vocab_size},
        **{"chunk_size": CHUNK_SIZE, "decoding": "discrete_diffusion", **token_fields(tokenizer), **fields},
    )
    torch.manual_seed(0)
    model = SpatialVLAForConditionalGeneration(config).eval()
    if spread is not None:
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=spread * parameter[0].numel() ** -0.5)
    mode = ["min_max"] * 6 + ["zero_one" if name == "gaussian_grid" else "min_max"]
    limits = {"min": [-1.0] * 7, "max": [1.0] * 7}
    action_config = {
        "chunk_size": CHUNK_SIZE,
        "normalization": {"mode": mode, "clip": True, "convention": "spatialvla"},
        "tokenizer": {**tokenizer.to_dict(), "type": tokenizer.type},
    }
    return model, SpatialVLAProcessor.from_scratch(config, {"robot": {"action": limits}}, action_config, {})


@pytest.fixture(
    scope="module",
    params=[(name, "gemma2") for name in TOKENIZERS] + [("gaussian_grid", "gemma2 tied"), ("uniform", "qwen2 tied")],
    ids=" ".join,
)
def pair(request):
    """In float64: two ways to the same number then agree to the last digits, and a leak cannot pass for rounding."""
    model, processor = make(*request.param)
    return model.requires_grad_(False).double(), processor


@pytest.fixture(scope="module")
def model_and_processor():
    return make()


def pictures(count=2):
    return list(np.random.default_rng(1).integers(0, 255, (count, 48, 64, 3), np.uint8))


def prompts(processor, texts=("push", "pick up the red cube")):
    return processor(images=pictures(len(texts)), text=list(texts))


def training_batch(processor, texts=("push", "pick up the red cube"), real=None):
    actions = np.random.default_rng(2).uniform(-1, 1, (len(texts), CHUNK_SIZE, 7))
    real = np.ones((len(texts), CHUNK_SIZE), bool) if real is None else real
    more = {}
    if processor.action_codec.terminates:
        more["terminate"] = np.zeros((len(texts), CHUNK_SIZE), bool)
    return processor(images=pictures(len(texts)), text=list(texts), actions=actions, action_mask=real, **more)


def seeded_loss(model, batch, seed=0):
    torch.manual_seed(seed)
    return model(**batch).loss


def count_passes(model, **inputs):
    """Lengths of what the language model is shown, pass for pass."""
    lengths = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    output = model.predict_action(**inputs)
    handle.remove()
    return output, lengths


@pytest.mark.parametrize("num_steps", [None, 1, 2, 6])
def test_fewer_passes_than_tokens_and_the_prompt_is_seen_once(pair, num_steps):
    model, processor = pair
    inputs = prompts(processor)
    output, lengths = count_passes(model, **inputs, num_inference_steps=num_steps)
    num_tokens, passes = output.action_ids.shape[1], num_steps or model.config.num_decoding_steps
    assert passes < num_tokens == len(model.config.action_ranges(CHUNK_SIZE))
    assert lengths == [inputs["input_ids"].shape[1] + num_tokens] + [num_tokens] * (passes - 1)
    assert processor.decode_actions(output).shape == (2, CHUNK_SIZE, 7)


def test_as_many_passes_as_the_autoregressive_model_needs_more(pair):
    model, processor = pair
    output, lengths = count_passes(model, **prompts(processor))
    autoregressive = SpatialVLAForConditionalGeneration(
        SpatialVLAConfig.from_dict({**model.config.to_dict(), "decoding": "autoregressive"})
    ).eval()
    _, one_by_one = count_passes(autoregressive, **prompts(processor))
    assert len(one_by_one) == output.action_ids.shape[1] > 2 * len(lengths)


def test_the_cache_changes_nothing(pair):
    """Every pass over the whole sequence, each sample alone and unpadded, gives the same chunk and scores."""
    model, processor = pair
    inputs = prompts(processor)
    together = model.predict_action(**inputs, num_inference_steps=4)
    begin, ranges = model.config.action_token_begin_idx, torch.tensor(model.config.action_ranges(CHUNK_SIZE))
    for index in range(2):
        real = inputs["attention_mask"][index].bool()
        features = model.get_image_features(inputs["pixel_values"][index : index + 1].double())
        prompt = model.embed_inputs(inputs["input_ids"][index : index + 1, real], features)

        def predict(ids, masked, prompt=prompt):
            actions = model.hide_actions(model.embed_inputs(ids + begin), masked, torch.arange(ids.shape[1]))
            blocks = torch.arange(prompt.shape[1] + ids.shape[1])[None] >= prompt.shape[1]
            hidden = model._decode(torch.cat([prompt, actions], 1), None, blocks.long()).last_hidden_state
            return model._head(hidden[:, prompt.shape[1] :])[..., begin : begin + model.config.spatial_token_num]

        ids, scores = decode(predict, ranges, 1, 4)
        assert torch.equal(together.action_ids[index], ids[0])
        # Gemma2's norms and softmax round to float32 in every precision
        torch.testing.assert_close(together.logits[index], scores[0], atol=3e-5, rtol=0)


def test_batch_mates_change_no_sample_that_is_drawn(pair):
    model, processor = pair

    def draw(texts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        inputs = processor(images=pictures(2)[: len(texts)], text=texts)
        return model.predict_action(**inputs, do_sample=True, temperature=5.0, generator=generators).action_ids

    together = draw(["push", "pick up the red cube"], [3, 4])
    assert torch.equal(draw(["push"], [3])[0], together[0])
    assert not torch.equal(draw(["push"], [5])[0], together[0])
    low, stop = torch.tensor(model.config.action_ranges(CHUNK_SIZE)).T
    assert ((together >= low) & (together < stop)).all()


def test_actions_see_each_other_and_the_prompt_sees_none(pair):
    model, processor = pair
    batch = training_batch(processor, texts=["push"])
    batch.pop("labels")
    is_action = model._is_action(batch["input_ids"])[0]
    before = model(**batch).logits[0]
    for place in (is_action.nonzero()[0, 0], is_action.nonzero()[-1, 0]):
        ids = batch["input_ids"].clone()
        ids[0, place] += 1
        after = model(**{**batch, "input_ids": ids}).logits[0]
        changed = (after != before).any(-1)
        assert changed[is_action].all() and not changed[: is_action.nonzero()[0, 0]].any()
    ids = batch["input_ids"].clone()
    ids[0, int(is_action.nonzero()[0, 0]) - 1] += 1  # the prompt's last
    assert (model(**{**batch, "input_ids": ids}).logits[0] != before)[is_action].any(-1).all()


def test_the_loss_is_that_of_the_masked_positions(pair):
    """By hand: each sample alone and unpadded, its own mean, over the action ids, no shift."""
    model, processor = pair
    real = np.array([[True, True, False], [True, True, True]])
    batch = training_batch(processor, real=real)
    loss = seeded_loss(model, batch, seed=5)
    num_tokens, begin = len(model.config.action_ranges(CHUNK_SIZE)), model.config.action_token_begin_idx
    mask_real = torch.tensor(np.repeat(real, num_tokens // CHUNK_SIZE, axis=1))
    torch.manual_seed(5)
    masked = random_mask(mask_real)
    losses = []
    for index in range(2):
        ids, is_action = batch["input_ids"][index], model._is_action(batch["input_ids"])[index]
        prompt, actions = ids[: is_action.nonzero()[0, 0]], ids[is_action]
        features = model.get_image_features(batch["pixel_values"][index : index + 1].double())
        embeds = [
            model.embed_inputs(prompt[None], features),
            model.hide_actions(model.embed_inputs(actions[None]), masked[index][None], torch.arange(num_tokens)),
        ]
        blocks = torch.cat([torch.zeros(1, len(prompt)), torch.ones(1, num_tokens)], 1).long()
        hidden = model._decode(torch.cat(embeds, 1), None, blocks).last_hidden_state[0, len(prompt) :]
        logits = model._head(hidden)[:, begin : begin + model.config.spatial_token_num]
        each = torch.nn.functional.cross_entropy(logits, actions - begin, reduction="none")
        losses.append(each[masked[index] & mask_real[index]].mean())
    torch.testing.assert_close(loss, torch.stack(losses).mean().to(loss), atol=1e-5, rtol=0)


def test_padded_actions_end_token_and_right_padding_change_no_loss(pair):
    model, processor = pair
    real = np.array([[True, False, False], [True, True, True]])
    batch = training_batch(processor, real=real)
    expected = seeded_loss(model, batch)
    ids, is_action = batch["input_ids"].clone(), model._is_action(batch["input_ids"])
    padded = is_action & (batch["labels"] == -100)
    begin, count = model.config.action_token_begin_idx, model.config.spatial_token_num
    ids[padded] = begin + (ids[padded] - begin + 1) % count
    assert padded.any() and torch.equal(seeded_loss(model, {**batch, "input_ids": ids}), expected)
    ends = batch["token_type_ids"].bool() & ~is_action
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(ends, 65)}
    assert ends.sum() == 2 and torch.equal(seeded_loss(model, other), expected)
    pad = {name: torch.nn.functional.pad(batch[name], (0, 5)) for name in ("attention_mask", "token_type_ids")}
    pad |= {"input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5))}
    pad |= {"labels": torch.nn.functional.pad(batch["labels"], (0, 5), value=-100)}
    torch.testing.assert_close(seeded_loss(model, {**batch, **pad}), expected, atol=1e-6, rtol=0)


def test_the_loss_draws_from_torchs_generator(model_and_processor):
    model, processor = model_and_processor
    batch = training_batch(processor)
    assert torch.equal(seeded_loss(model, batch, 1), seeded_loss(model, batch, 1))
    assert not torch.equal(seeded_loss(model, batch, 1), seeded_loss(model, batch, 2))


def test_a_sample_without_real_actions_costs_nothing(model_and_processor):
    model, processor = model_and_processor
    real = np.array([[True] * 3, [False] * 3])
    both = seeded_loss(model, training_batch(processor, real=real))
    batch = training_batch(processor, real=real)
    batch["pixel_values"][1] = 0.5
    assert torch.equal(seeded_loss(model, batch), both)
    with pytest.raises(ValueError, match="no action is real"):
        seeded_loss(model, training_batch(processor, real=np.zeros((2, 3), bool)))


def test_masked_tokens_are_what_it_sees(model_and_processor):
    """Ids under a mask change nothing; the mask's own embedding does, in the units of the others, one a place."""
    model, processor = model_and_processor
    embeds = model.embed_inputs(torch.full((1, 6), model.config.action_token_begin_idx))
    masked = torch.tensor([[True, False, False, True, False, True]])
    hidden = model.hide_actions(embeds, masked, torch.arange(6))
    assert torch.equal(hidden[~masked], embeds[~masked])
    translation, _, gripper = model.action_mask_embedding.weight * model.config.text_config.hidden_size**0.5
    torch.testing.assert_close(hidden[masked], torch.stack([translation, translation, gripper]))
    assert not torch.equal(translation, gripper)


def test_the_switch_keeps_all_weights():
    """Masks begin where the tokens that may stand in their place are."""
    for name, backbone, spatial in (("gaussian_grid", "gemma2", True), ("rt2", "qwen2 tied", False)):
        model, processor = make(name, backbone, decoding="autoregressive", use_spatial_token=spatial)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.diffuse_actions()
        after = model.state_dict()
        masks = after.pop("action_mask_embedding.weight")
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
        rows = model.spatial_embed_tokens.weight if spatial else model.get_input_embeddings().weight[260:]
        first, stop = model.config.action_ranges(1)[-1]
        assert len(masks) == len(model.config.action_ranges(1)) and model.action_mask_embedding.weight.requires_grad
        torch.testing.assert_close(masks[-1], rows[first:stop].mean(0))
        output, lengths = count_passes(model, **prompts(processor))
        assert len(lengths) == 4 and processor.decode_actions(output).shape == (2, CHUNK_SIZE, 7)
        with pytest.raises(ValueError, match="decodes by discrete diffusion already"):
            model.diffuse_actions()


def test_gradients_reach_the_mask_and_what_is_under_it_only_by_the_head(model_and_processor):
    model, processor = make()
    batch = training_batch(processor, texts=["push"], real=np.array([[True, False, False]]))
    seeded_loss(model.train(), batch).backward()
    assert model.action_mask_embedding.weight.grad.abs().sum() > 0
    padded = batch["input_ids"][0][model._is_action(batch["input_ids"])[0]][3:] - model.config.action_token_begin_idx
    seen = model.spatial_embed_tokens.weight.grad.abs().sum(-1)
    assert (seen[padded] == 0).all()


def test_gradient_checkpointing_changes_no_gradient():
    def gradient(checkpointing):
        model, processor = make(spread=None)
        if checkpointing:
            model.train().activation_checkpointing_enable()
        seeded_loss(model, training_batch(processor)).backward()
        return model.vision_tower.embeddings.patch_embedding.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_remasking_is_used():
    model, processor = make("uniform")
    inputs = prompts(processor)
    plain = model.predict_action(**inputs)
    model.config.remask_threshold = 1.0
    doubtful, lengths = count_passes(model, **inputs)
    model.config.remask_threshold, model.config.remask_drop = 0.0, 0.0
    dropped = model.predict_action(**inputs)
    assert len(lengths) == 4
    assert not torch.equal(doubtful.logits, plain.logits) and not torch.equal(dropped.logits, plain.logits)


def test_what_it_does_not_do(model_and_processor):
    model, processor = model_and_processor
    inputs = prompts(processor)
    with pytest.raises(ValueError, match="decodes by discrete diffusion.*call predict_action"):
        model.generate(**inputs)
    with pytest.raises(ValueError, match="Expected 1 to 9 decoding passes.*got 10"):
        model.predict_action(**inputs, num_inference_steps=10)
    with pytest.raises(ValueError, match="Expected 1 to 3 decoding passes.*got 4"):
        model.predict_action(**inputs, chunk_size=1)
    batch = training_batch(processor)
    embeds = model.embed_inputs(batch.pop("input_ids"), model.get_image_features(batch.pop("pixel_values")))
    with pytest.raises(ValueError, match="give `input_ids` with `labels`, no embeddings"):
        model(inputs_embeds=embeds, **batch)
    batch = training_batch(processor)
    batch["input_ids"][1, -2] = 65
    with pytest.raises(ValueError, match=r"equally many action tokens in every sample, got \[9, 8\]"):
        model(**batch)
    inputs["pixel_values"][1] = torch.nan
    with pytest.raises(ValueError, match=r"scores of a decoding pass are NaN or infinite for samples \[1\]"):
        model.predict_action(**inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoding": "diffusion"}, "decoding in .'autoregressive', 'discrete_diffusion'., got 'diffusion'"),
        ({"num_decoding_steps": 13}, "num_decoding_steps of at most 12, the number of tokens of a chunk, got 13"),
        ({"num_decoding_steps": 0}, "num_decoding_steps of 1 or more, got 0"),
        ({"remask_threshold": 2.0}, "remask_threshold in .0, 1., a probability, got 2.0"),
        ({"remask_drop": -1.0}, "remask_drop in .0, 1., a probability, got -1.0"),
        ({"replace_rate": 1.5}, "replace_rate in .0, 1., a probability, got 1.5"),
        ({"remask_drop": 0.5}, "replace_rate above 0, such as 0.1, beside remask_threshold or remask_drop, got 0"),
        ({"action_block_sizes": None}, "needs action_block_sizes or action_token_ranges, got neither"),
        ({"action_token_ranges": [], "action_block_sizes": None}, "differs from chunk to chunk, as with FAST"),
    ],
)
def test_configurations_that_are_no_use(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        SpatialVLAConfig.from_preset("tiny", **{"decoding": "discrete_diffusion", **fields})


def test_saved_and_loaded_it_predicts_the_same(tmp_path):
    model, processor = make(num_decoding_steps=3, remask_threshold=0.25, replace_rate=0.1)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert (again.config.decoding, again.config.num_decoding_steps) == ("discrete_diffusion", 3)
    assert again.config.remask_threshold == 0.25
    assert torch.equal(again.action_mask_embedding.weight, model.action_mask_embedding.weight)
    expected = model.predict_action(**prompts(processor))
    assert torch.equal(again.predict_action(**prompts(its_processor)).action_ids, expected.action_ids)

    observation = {"observation.images.front": pictures(1)[0], "task": "push"}
    policy = Policy.from_pretrained(tmp_path, seed=0, num_inference_steps=2)
    chunk = policy.predict_chunk(observation)
    assert chunk.shape == (CHUNK_SIZE, 7)
    output = model.predict_action(**prompts(processor, texts=["push"]), num_inference_steps=2)
    assert np.array_equal(chunk, processor.decode_actions(output)[0])


def test_another_decodings_checkpoint_lacks_the_mask(tmp_path):
    model, _ = make(decoding="autoregressive")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks 1 weights of SpatialVLAFor.*action_mask_embedding.weight"):
        SpatialVLAForConditionalGeneration.from_pretrained(tmp_path, decoding="discrete_diffusion")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_the_mask_is_trained_with_adapters_and_with_the_head_alone(tmp_path):
    model, processor = make()
    freeze_backbone(model)
    assert "action_mask_embedding.weight" in parameter_groups(model)["embeddings"]
    adapted = add_lora(make()[0])
    name = "base_model.model.action_mask_embedding.modules_to_save.default.weight"
    mask = dict(adapted.named_parameters())[name]
    assert mask.requires_grad and name in parameter_groups(adapted)["embeddings"]
    loss = seeded_loss(adapted.train(), training_batch(processor))
    loss.backward()
    assert mask.grad.abs().sum() > 0
    torch.nn.init.normal_(mask)
    with torch.no_grad():
        other = adapted.base_model.model.eval().predict_action(**prompts(processor)).logits
    assert not torch.equal(other, make()[0].predict_action(**prompts(processor)).logits)


def learn(model, batch, steps=100):
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
        schedule.step()


def test_it_learns_which_visible_tokens_are_wrong():
    """Planted errors are doubted, what is right is not: re-masking tells them apart by the probability."""
    model, processor = make("uniform", spread=None, replace_rate=0.1)
    batch = training_batch(processor)
    learn(model, batch, steps=200)
    is_action, begin = model._is_action(batch["input_ids"]), model.config.action_token_begin_idx
    right = batch["input_ids"][is_action] - begin
    planted = torch.arange(len(right)) % 7 == 0
    shown = torch.where(planted, (right + 97) % 256, right)
    prompt = {name: value for name, value in batch.items() if name != "labels"}
    prompt["input_ids"] = prompt["input_ids"].masked_scatter(is_action, shown + begin)
    with torch.no_grad():
        scores = model.eval()(**prompt).logits[is_action][:, begin : begin + 256].float()
    probability = scores.softmax(-1)[torch.arange(len(shown)), shown]
    assert probability[planted].max() < 0.05
    assert probability[~planted].min() > 0.5


def test_replaced_tokens_are_permitted_ones_and_as_many_as_wanted():
    ids, visible = torch.zeros(400, 3, dtype=torch.long), torch.tensor([True, True, False]).expand(400, 3)
    torch.manual_seed(0)
    replaced = replace(ids, visible, torch.tensor([[10, 20], [30, 40], [50, 60]]), 0.25)
    assert (replaced[:, 2] == 0).all()
    for place, first in ((0, 10), (1, 30)):
        changed = replaced[:, place] != 0
        assert set(replaced[changed, place].tolist()) == set(range(first, first + 10))
        assert changed.float().mean() == pytest.approx(0.25, abs=0.07)
    assert torch.equal(replace(ids, visible, torch.tensor([[10, 20]] * 3), 0.0), ids)


def test_it_learns_a_batch():
    """Two pictures, two chunks: what was learnt is decoded in fewer passes than tokens."""
    model, processor = make(spread=None)
    batch = training_batch(processor)
    learn(model, batch)
    output = model.eval().predict_action(**prompts(processor))
    is_action = model._is_action(batch["input_ids"])
    wanted = batch["input_ids"][is_action].view(2, -1) - model.config.action_token_begin_idx
    assert (output.action_ids == wanted).float().mean() > 0.9
