"""What holds for DiVLA on every image-text-to-text model, see BACKBONES."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModel, AutoProcessor

from hf_vla.models.divla.configuration_divla import DiVLAConfig
from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction

TEXTS = ["push", "pick up the red cube"]
REASONINGS = ["reach for it", "lift"]
STATE = np.array([[0.3, 1.0], [-0.2, 2.0]])
TARGETS = ("actions", "action_mask")


@pytest.fixture
def make_inputs(system, pictures, chunks):
    """Builds a batch in double precision: of both samples or of one alone, to act on or to learn from."""

    def make(index=slice(None), learn=False, views=None, reasoning=REASONINGS):
        chosen = range(2)[index] if isinstance(index, slice) else [index]

        def pick(values):
            return [values[each] for each in chosen]

        learnt = {"actions": np.stack(pick(chunks)), "reasoning": pick(reasoning)} if learn else {}
        batch = system.processor(
            images=pick(views or pictures), text=pick(TEXTS), state=np.stack(pick(STATE)), **learnt
        )
        return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}

    return make


def prompt_of(inputs):
    """What `encode` and `reason` take."""
    return {name: value for name, value in inputs.items() if name not in ("state", "labels", *TARGETS)}


def for_backbone(system, inputs):
    """A prompt as the backbone itself takes it, with the kinds of tokens that its own processor would give it."""
    prompt, is_image = prompt_of(inputs), inputs["input_ids"] == system.model.config.image_token_id
    spoken = inputs["labels"] != -100 if "labels" in inputs else torch.zeros_like(is_image)
    types = {
        "paligemma": {"token_type_ids": spoken.long()},
        "gemma3": {"token_type_ids": is_image.long()},
        "qwen2_vl": {"mm_token_type_ids": is_image.int()},
        "qwen2_5_vl": {"mm_token_type_ids": is_image.int()},
    }
    return prompt | types.get(system.name, {})


def talkative(model):
    """In double precision, with a language head that says more than one word: untrained ones repeat themselves."""
    torch.manual_seed(0)
    head = model.double().get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    return model


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def test_training_lowers_the_loss(system, pictures, chunks):
    batch = system.processor(images=pictures, text=TEXTS, state=STATE, actions=chunks, reasoning=REASONINGS)
    model = system.model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        output = model(**batch)
        assert output.diffusion_loss > 0 and output.ntp_loss > 0 and output.reconstruction_loss is None
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0]
    gradients = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    head = next(name for name, value in model.named_parameters() if value is model.get_output_embeddings().weight)
    for part in ("vis", "layers.0", head, "film.prompt_proj", "film.reasoning_proj", "film.film", "action_head"):
        assert any(part in name for name in gradients), part


def test_reasons_as_transformers_generates(system, make_inputs):
    model = talkative(system.model)
    for index in (slice(None), 0, 1):
        inputs = make_inputs(index)
        _, ids = model.reason(**prompt_of(inputs), max_reasoning_tokens=7)
        wanted = model.backbone.generate(
            **for_backbone(system, inputs), do_sample=False, max_new_tokens=6, eos_token_id=1, pad_token_id=1
        )
        assert len(ids.unique()) > 2 or index != slice(None)  # or the comparison would say little
        assert torch.equal(ids[:, :-1], wanted[:, inputs["input_ids"].shape[1] :]) and (ids[:, -1] == 1).all()


def test_the_reasoning_loss_is_that_of_transformers(system, make_inputs):
    model = system.model.double()
    for index in range(2):
        inputs = make_inputs(index, learn=True)
        wanted = model.backbone(**for_backbone(system, inputs), labels=inputs["labels"]).loss
        torch.testing.assert_close(model(**inputs).ntp_loss.double(), wanted.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("missing", [None, "front", "wrist"])
def test_the_cache_changes_nothing(system, make_inputs, pictures, missing):
    """The hidden states of a reasoning that was generated are those of training on it, as are the next tokens."""
    model = talkative(system.model)
    inputs = prompt_of(make_inputs(views=[pictures[0], {**pictures[1], missing: None}] if missing else None))
    encoding, ids = model.reason(**inputs)
    mask = torch.ones_like(inputs["input_ids"])
    for length in range(ids.shape[1] + 1):
        rest = ids[:, :length]
        again = model.encode(
            **inputs
            | {
                "input_ids": torch.cat([inputs["input_ids"], rest], 1),
                "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(rest)], 1),
                "labels": torch.cat([mask * -100, rest], 1),
            }
        )
        if length < ids.shape[1] - 1:
            logits = model.get_output_embeddings()(again.hidden_states[:, -1])
            assert torch.equal(logits.argmax(-1), ids[:, length])
    assert torch.equal(again.mask, encoding.mask) and torch.equal(again.is_reasoning, encoding.is_reasoning)
    close(again.hidden_states[again.mask], encoding.hidden_states[encoding.mask])
    close(model.condition(again)[0], model.condition(encoding)[0])


def test_padding_and_batch_mates_change_nothing(system, make_inputs):
    model = system.model.double()
    together, learnt = model.predict_action(**make_inputs()), model(**make_inputs(learn=True))
    diffusion, ntp, counts = [], [], []
    for index in range(2):
        alone = model.predict_action(**make_inputs(index))
        torch.testing.assert_close(alone.actions[0], together.actions[index], rtol=0, atol=1e-6)
        assert torch.equal(alone.reasoning_ids[0], together.reasoning_ids[index])
        inputs = make_inputs(index, learn=True)
        output = model(**inputs)
        diffusion.append(output.diffusion_loss)
        counts.append((inputs["labels"] != -100).sum())
        ntp.append(output.ntp_loss * counts[-1])
    assert counts[0] != counts[1]
    torch.testing.assert_close(learnt.diffusion_loss, sum(diffusion) / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(learnt.ntp_loss, sum(ntp) / sum(counts), rtol=1e-6, atol=0)


def test_padding_behind_is_as_padding_in_front(system, make_inputs):
    model = system.model.double()
    inputs, learnt = make_inputs(), make_inputs(learn=True)
    wanted, loss = model.predict_action(**inputs), model(**learnt)
    for batch in (inputs, learnt):
        padding = (batch["attention_mask"].cumsum(-1) == 0).sum(-1).tolist()
        assert max(padding) > 0
        for name in {"input_ids", "attention_mask", "labels"} & batch.keys():
            batch[name] = torch.stack([row.roll(-shift) for row, shift in zip(batch[name], padding, strict=True)])
    got, again = model.predict_action(**inputs), model(**learnt)
    assert torch.equal(got.reasoning_ids, wanted.reasoning_ids)
    torch.testing.assert_close(got.actions, wanted.actions, rtol=0, atol=1e-6)
    torch.testing.assert_close([again.ntp_loss, again.loss], [loss.ntp_loss, loss.loss], rtol=1e-6, atol=0)
    acted = model.predict_action(**inputs, reasoning_ids=wanted.reasoning_ids)
    torch.testing.assert_close(acted.actions, wanted.actions, rtol=0, atol=1e-6)


@pytest.mark.parametrize("missing", ["front", "wrist"])
def test_nothing_sees_a_missing_camera(system, make_inputs, pictures, missing):
    model = system.model.double()
    present, inputs = make_inputs(), make_inputs(views=[pictures[0], {**pictures[1], missing: None}])
    got, whole = model.predict_action(**inputs), model.predict_action(**present)
    torch.testing.assert_close(got.actions[0], whole.actions[0], rtol=0, atol=1e-9)
    assert (got.actions[1] - whole.actions[1]).abs().max() > 1e-5
    other = model.predict_action(**{**inputs, "pixel_values": present["pixel_values"]})
    assert torch.equal(other.reasoning_ids, got.reasoning_ids)
    torch.testing.assert_close(other.actions, got.actions, rtol=0, atol=1e-9)


def test_save_and_load(system, pictures, tmp_path):
    model, processor = system.model, system.processor
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(model) and type(reader) is type(processor)
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert tied == (system.name in ("gemma3", "internvl", "paligemma"))
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    inputs, read = (each(images=pictures, text=TEXTS, state=STATE) for each in (processor, reader))
    wanted, got = model.predict_action(**inputs), again.predict_action(**read)
    assert torch.equal(got.actions, wanted.actions) and torch.equal(got.reasoning_ids, wanted.reasoning_ids)


@pytest.mark.parametrize("missing", [None, "front", "wrist"])
def test_tokens_are_counted_as_in_a_prompt_that_holds_them(system, make_inputs, pictures, missing):
    """Each token's place in a reasoning is the one which the backbone, asked for all at once, would give it."""
    model, places = system.model.double(), []
    inputs = prompt_of(make_inputs(views=[pictures[0], {**pictures[1], missing: None}] if missing else None))
    base = model.backbone.base_model
    base.register_forward_pre_hook(lambda _, __, options: places.append(options["position_ids"]), with_kwargs=True)
    _, ids = model.reason(**inputs)
    tokens = torch.cat([inputs["input_ids"], ids], 1)
    is_image = tokens == model.config.image_token_id
    in_prompt = torch.cat([inputs["attention_mask"].bool(), ids >= 0], 1) | is_image
    wanted = (in_prompt.cumsum(-1) - 1 + (system.name == "paligemma"))[None]
    if "image_grid_thw" in inputs:
        grids, mask = inputs["image_grid_thw"], in_prompt.long()
        wanted, _ = base.get_rope_index(tokens, is_image.int(), image_grid_thw=grids, attention_mask=mask)
        assert (wanted[:, :, -1] < in_prompt.sum(-1) - 1).all()  # a picture takes fewer places than it has tokens
    got = torch.cat(places, -1).view(wanted.shape)
    assert torch.equal(got[:, in_prompt], wanted[:, in_prompt])


def test_the_prompt_of_paligemma_sees_itself_whole(system, make_inputs):
    """In training as in generation; all others are causal, and a reasoning is causal everywhere."""
    model = system.model.double()
    inputs = make_inputs(1, learn=True)
    prompt = prompt_of(make_inputs(1))
    length = prompt["input_ids"].shape[1]
    trained = model.train().encode(**prompt_of(inputs), labels=inputs["labels"]).hidden_states
    generated, _ = model.eval().reason(**prompt, max_reasoning_tokens=1)
    close(generated.hidden_states[:, :length], trained[:, :length])
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, -1] = 100
    other = model.encode(**prompt_of(changed), labels=inputs["labels"]).hidden_states
    assert torch.equal(other[:, :-1], trained[:, :-1]) and not torch.equal(other[:, -1], trained[:, -1])
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, length - 1] = 100
    other = model.encode(**prompt_of(changed), labels=inputs["labels"]).hidden_states
    same = (other == trained)[0].all(-1)[: length - 1]
    assert not same.any() if system.name == "paligemma" else same.all()


def test_pictures_must_be_handed_on(system, make_inputs):
    model, inputs = system.model.double(), make_inputs(learn=True)
    for method in (model, model.encode, model.reason, model.predict_action):
        given = inputs if method == model else prompt_of(inputs)
        with pytest.raises(ValueError, match="Expected pixel_values, since the prompts have image tokens, got none"):
            method(**{**given, "pixel_values": None})


@pytest.mark.parametrize("cap", [None, 0.5])
def test_capped_logits(make_model, make_processor, backbones, pictures, chunks, cap):
    """Of PaliGemma 2: the reasoning loss knows them."""
    config = backbones["paligemma"].config
    text_config = {**config["text_config"], "model_type": "gemma2", "final_logit_softcapping": cap}
    model = make_model("paligemma", backbone_config={**config, "text_config": text_config})
    processor = make_processor("paligemma")
    batch = processor(images=pictures[0], text="push", state=STATE[0], actions=chunks[0], reasoning="reach")
    types = {"token_type_ids": (batch["labels"] != -100).long()}
    wanted = model.backbone(**prompt_of(batch), **types, labels=batch["labels"]).loss
    torch.testing.assert_close(model(**batch).ntp_loss, wanted)


SMALL = {part: {"num_hidden_layers": 1} for part in ("text_config", "vision_config")}


# what some image-text-to-text models have of their own, for which the loop over tokens has no place
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama4", SMALL, "'llama4' has no language head of its own behind a base model"),
        ("florence2", {"image_token_id": 7}, "'florence2' is an encoder with a decoder, or takes no position_ids"),
        ("ernie4_5_vl_moe", {}, r"wants to know \['moe_mm_token_type_ids'\] of its tokens"),
        ("qwen2_5_omni_thinker", {}, "'qwen2_5_omni_thinker' counts positions in a way of its own"),
        (
            "cohere2_vision",
            {},
            r"may change its logits by \{'logit_scale': 0.0625\}; set that to 1 or None",
        ),
    ],
)
def test_backbones_that_cannot_be_served_are_refused(name, options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        DiVLAForActionPrediction(DiVLAConfig(backbone_config={"model_type": name, **options}, end_token_id=1))


def test_backbones_without_an_image_token_are_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="configuration has an image_token_id.* 'blip'"):
        DiVLAConfig(backbone_config={"model_type": "blip"})
