"""How DiVLA's reasoning ends, and that the actions are the same whoever wrote it.

`teach` lets the language head write what a test is about: a weight that maps hidden states to the next tokens.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from hf_vla.actions.heads.networks.film import masked_mean

END, LIMIT = 1, 6
TEXTS = ["push", "pick up the red cube"]
STATE = np.array([[0.3, 1.0], [-0.2, 2.0]])
# two samples' reasonings without their end, and what a limit of 6 makes of them
CASES = {
    "one_ends_at_once": ([[], [70, 71, 72]], [[END] * 4, [70, 71, 72, END]]),
    "both_end_at_once": ([[], []], [[END], [END]]),
    "different_lengths": ([[70, 71, 72], [80]], [[70, 71, 72, END], [80, END, END, END]]),
    "as_long_as_may_be": ([[70, 71, 72, 73, 74], [80]], [[70, 71, 72, 73, 74, END], [80, *[END] * 5]]),
    "one_would_go_on": ([[70, 71, 72, 73, 74, 75, 76], [80]], [[70, 71, 72, 73, 74, END], [80, *[END] * 5]]),
    "both_would_go_on": ([list(range(70, 78)), list(range(80, 88))], [[*range(70, 75), END], [*range(80, 85), END]]),
}


@pytest.fixture
def prompt(prompt):
    return {name: value.double() if value.is_floating_point() else value for name, value in prompt.items()}


def without_state(prompt):
    return {name: value for name, value in prompt.items() if name != "state"}


def teach(model, prompt, reasonings):
    """Let the model write each sample's reasoning, and then the end token."""
    length = max(map(len, reasonings)) + 1
    ids = torch.tensor([[*each, *[END] * (length - len(each))] for each in reasonings])
    real = torch.tensor([[index <= len(each) for index in range(length)] for each in reasonings])
    tokens = torch.cat([prompt["input_ids"], ids], 1)
    mask = torch.cat([prompt["attention_mask"], real.long()], 1)
    start = prompt["input_ids"].shape[1]
    labels = torch.cat([torch.full_like(prompt["input_ids"], -100), ids.masked_fill(~real, -100)], 1)
    inputs = {**without_state(prompt), "input_ids": tokens, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        states = model.encode(**inputs).hidden_states[:, start - 1 : -1][real]
        head = model.get_output_embeddings()
        wanted = one_hot(ids[real], head.out_features).double()
        head.weight = torch.nn.Parameter(torch.linalg.lstsq(states, wanted).solution.T.contiguous())
    return model


@pytest.fixture
def taught(make_model, prompt):
    """Builds a model that writes two reasonings."""

    def make(reasonings, **options):
        return teach(make_model(max_reasoning_tokens=LIMIT, **options).double(), prompt, reasonings)

    return make


@pytest.mark.parametrize("use_film", [True, False])
@pytest.mark.parametrize("film_includes_end", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_every_end_gives_actions(name, film_includes_end, use_film, taught, prompt):
    reasonings, wanted = CASES[name]
    model = taught(reasonings, film_includes_end=film_includes_end, use_film=use_film)
    output = model.predict_action(**prompt)
    assert output.reasoning_ids.tolist() == wanted
    assert output.actions.isfinite().all() and output.actions.dtype == torch.float32
    again = model.predict_action(**prompt, reasoning_ids=output.reasoning_ids)
    torch.testing.assert_close(again.actions, output.actions, rtol=0, atol=1e-6)
    assert torch.equal(again.reasoning_ids, output.reasoning_ids)


@pytest.mark.parametrize("name", CASES)
def test_acts_on_the_hidden_states_of_training(name, taught, prompt):
    """Prompt, reasoning and end token, as they are behind the backbone when they are its input all at once."""
    model = taught(CASES[name][0])
    encoding, ids = model.reason(**without_state(prompt))
    kept = ids.cumsum(-1) * 0 + torch.arange(ids.shape[1]) <= (ids == END).int().argmax(-1, keepdim=True)
    labels = torch.cat([torch.full_like(prompt["input_ids"], -100), ids.masked_fill(~kept, -100)], 1)
    given = {
        "input_ids": torch.cat([prompt["input_ids"], ids], 1),
        "attention_mask": torch.cat([prompt["attention_mask"], kept.long()], 1),
    }
    trained = model.encode(**{**without_state(prompt), **given}, labels=labels)
    assert torch.equal(trained.mask, encoding.mask) and torch.equal(trained.is_reasoning, encoding.is_reasoning)
    assert torch.equal(encoding.is_reasoning.sum(-1), kept.sum(-1))  # with the end token, without what is behind it
    states = [each.hidden_states[each.mask] for each in (trained, encoding)]
    torch.testing.assert_close(*states, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.condition(trained), model.condition(encoding), rtol=0, atol=1e-9)


def test_the_published_evaluation_leaves_the_end_out(taught, prompt):
    model = taught([[], [70, 71]])
    encoding, _ = model.reason(**without_state(prompt))
    prompt_mask = encoding.mask & ~encoding.is_reasoning
    shorter = encoding.is_reasoning.clone()
    shorter[0, -3] = shorter[1, -1] = False  # [end, -, -] and [70, 71, end]
    wanted = model.film(encoding.hidden_states, prompt_mask, shorter)
    whole = model.predict_action(**prompt).actions
    model.config.film_includes_end = False
    actions = model.predict_action(**prompt).actions
    features = wanted[:, None], torch.ones(2, 1, dtype=torch.bool)
    torch.testing.assert_close(actions, model.action_head.sample(*features, prompt["state"]), rtol=0, atol=1e-6)
    assert ((actions - whole).abs().amax((1, 2)) > 1e-5).all()


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_the_limit_may_be_given(taught, prompt, limit):
    model = taught([[70, 71, 72], [80]])
    output = model.predict_action(**prompt, max_reasoning_tokens=limit)
    assert output.reasoning_ids.tolist() == [[[], []], [[END], [END]], [[70, END], [80, END]]][limit]
    model.config.max_reasoning_tokens = limit
    again = model.predict_action(**prompt)
    assert torch.equal(again.actions, output.actions) and torch.equal(again.reasoning_ids, output.reasoning_ids)


def test_without_a_reasoning_the_prompt_alone_acts(make_model, make_batch, prompt):
    """As in training on samples that have none."""
    model = make_model().double()
    actions = model.predict_action(**prompt, max_reasoning_tokens=0).actions
    encoding = model.encode(**without_state(prompt))
    assert not encoding.is_reasoning.any()
    features, mask = model.condition(encoding)
    neutral = [model.film.prompt_proj(*encoding[:2]), masked_mean(*encoding[:2])]
    torch.testing.assert_close(features[:, 0], sum(neutral), rtol=0, atol=1e-9)
    torch.testing.assert_close(model.action_head.sample(features, mask, prompt["state"]), actions, rtol=0, atol=1e-9)
    none = prompt["input_ids"][:, :0]
    assert torch.equal(model.predict_action(**prompt, reasoning_ids=none).actions, actions)
    assert (model.predict_action(**prompt).actions - actions).abs().max() > 1e-4


@pytest.mark.parametrize("reasoning", ["reach", "", ["reach for it", "lift"], ["lift", ""]])
def test_a_given_reasoning_is_acted_on(make_model, make_batch, processor, prompt, reasoning):
    """As labels from the processor, or as the ids of a model that says the same."""
    model = make_model(max_reasoning_tokens=40).double()
    given = make_batch(actions=None, reasoning=reasoning)
    output = model.predict_action(**{**given, "pixel_values": given["pixel_values"].double()})
    assert output.reasoning_ids is None and output.actions.isfinite().all()
    said = [row[row != -100] for row in given["labels"]]
    assert all(row[-1] == END for row in said)
    ids = torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=END)
    acted = model.predict_action(**prompt, reasoning_ids=ids)
    torch.testing.assert_close(acted.actions, output.actions, rtol=0, atol=1e-5)
    words = [reasoning] * 2 if isinstance(reasoning, str) else reasoning
    assert processor.decode_reasoning(acted) == words


@pytest.mark.parametrize("silent", [[1], [0, 1]])
@pytest.mark.parametrize("masked", [False, True])
def test_labels_of_some_samples_alone_are_refused(silent, masked, make_model, make_batch):
    """Alone, a sample without any would not act without a word, but reason."""
    model, given = make_model(), make_batch(actions=None)
    if masked:  # all that it says is padding
        given["attention_mask"][silent] &= given["labels"][silent] == -100
    else:
        given["labels"][silent] = -100
    with pytest.raises(ValueError, match="Expected labels with a reasoning for every sample, got some without"):
        model.predict_action(**given)
    given = make_batch(actions=None, reasoning=["lift", None])
    with pytest.raises(ValueError, match="or leave labels out and the model reasons itself"):
        model.predict_action(**given)


def test_labels_of_padding_are_not_read(model, make_batch):
    batch = make_batch()
    changed = {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, 70)}
    assert not torch.equal(changed["labels"], batch["labels"])
    wanted, got = model(**batch), model(**changed)
    assert torch.equal(got.ntp_loss, wanted.ntp_loss) and torch.equal(got.diffusion_loss, wanted.diffusion_loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda given: given["input_ids"].clone(),
            r"labels of -100 over the prompts, .* the first token in samples \[0, 1",
        ),
        (
            lambda given: given["labels"][:, :-1],
            r"labels as a tensor of shape \(2, \d+\) of torch.int64, got shape \(2, \d",
        ),
        (
            lambda given: given["labels"][:1],
            r"of shape \(2, \d+\) of torch.int64, got shape \(1, \d+\) of torch.int64",
        ),
        (lambda given: given["labels"].double(), r"got shape \(2, \d+\) of torch.float64"),
        (lambda given: given["labels"].tolist(), "labels as a tensor .* got a list"),
    ],
)
def test_labels_that_cannot_be_learnt(model, make_batch, make, message):
    given = make_batch()
    given["labels"] = make(given)
    with pytest.raises(ValueError, match=message):
        model(**given)
    del given["actions"], given["action_mask"]
    with pytest.raises(ValueError, match=message):
        model.predict_action(**given)


def test_one_sample_may_not_be_all_reasoning(model, make_batch):
    given = make_batch()
    given["labels"][1] = given["input_ids"][1]
    with pytest.raises(ValueError, match=r"got one for the first token in samples \[1\]"):
        model(**given)


def test_a_reasoning_is_given_once(model, make_batch, prompt):
    prompt = {name: value.float() if value.is_floating_point() else value for name, value in prompt.items()}
    ids = model.predict_action(**prompt).reasoning_ids
    labels = make_batch(actions=None)["labels"]
    given = {"labels": labels, "reasoning_ids": ids, "max_reasoning_tokens": 3}
    for left_out in given:
        both = {name: value for name, value in given.items() if name != left_out}
        with pytest.raises(ValueError, match=f"of the model's own, got {' and '.join(both)}: choose one"):
            model.predict_action(**prompt, **both)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda ids: ids[:1],
            r"reasoning_ids as a tensor of shape \(2, any length\) of .*, got shape \(1, \d\) of torch.int64",
        ),
        (lambda ids: ids[0], r"got shape \(\d,\) of torch.int64"),
        (lambda ids: ids.tolist(), "got a list"),
        (lambda ids: ids.float(), r"got shape \(2, \d\) of torch.float32"),
        (lambda ids: ids.masked_fill(ids == 1, 300), "reasoning_ids of 0 to 299, without the image token 260, got"),
        (lambda ids: ids.masked_fill(ids == 1, -100), "reasoning_ids of 0 to 299"),
        (lambda ids: torch.cat([ids * 0 + 260, ids], 1), "without the image token 260"),
        (lambda ids: ids[:, :-1], "Expected every reasoning to end with the token 1: give reasoning_ids as an"),
    ],
)
def test_reasonings_that_cannot_be_acted_on(model, prompt, change, message):
    prompt = {name: value.float() if value.is_floating_point() else value for name, value in prompt.items()}
    ids = model.predict_action(**prompt).reasoning_ids
    with pytest.raises(ValueError, match=message):
        model.predict_action(**prompt, reasoning_ids=change(ids))


def test_reasonings_that_would_be_too_long(model, prompt):
    prompt = {name: value.float() if value.is_floating_point() else value for name, value in prompt.items()}
    with pytest.raises(ValueError, match="Expected max_reasoning_tokens of 0 or more, got -1"):
        model.predict_action(**prompt, max_reasoning_tokens=-1)
    length = prompt["input_ids"].shape[1]
    room = 512 - length
    message = f"at most {length - 1} tokens, .* beside {room + 1} to be .*: set max_reasoning_tokens to {room} or less"
    with pytest.raises(ValueError, match=message):
        model.predict_action(**prompt, max_reasoning_tokens=room + 1)


def test_without_a_mask_every_token_is_real(model, prompt):
    """Left to itself, the second sample has no padding; its pictures are the last ones."""
    patches = prompt["image_grid_thw"].prod(-1)
    alone = {name: value[1:].float() if value.is_floating_point() else value[1:] for name, value in prompt.items()}
    alone["image_grid_thw"] = prompt["image_grid_thw"][2:]
    alone["pixel_values"] = prompt["pixel_values"][patches[:2].sum() :].float()
    assert alone["attention_mask"].all()
    wanted = model.predict_action(**alone)
    del alone["attention_mask"]
    for given in ({}, {"reasoning_ids": wanted.reasoning_ids}):
        torch.testing.assert_close(model.predict_action(**alone, **given).actions, wanted.actions, rtol=0, atol=1e-5)


def test_nothing_is_remembered(make_model, make_batch, prompt):
    """Qwen2-VL keeps an offset of its positions from one call to the next."""
    model = make_model().double()
    other = make_batch(of=None, actions=None, reasoning=None, text=["a much longer instruction", ""])
    other = {name: value.double() if value.is_floating_point() else value for name, value in other.items()}
    learnt = make_batch(text="push")
    wanted = model.predict_action(**prompt)
    for disturb in (
        lambda: model.predict_action(**other),
        lambda: model(**{**learnt, "pixel_values": learnt["pixel_values"].double()}),
        lambda: model.predict_action(**other, max_reasoning_tokens=0),
    ):
        disturb()
        got = model.predict_action(**prompt)
        assert torch.equal(got.actions, wanted.actions) and torch.equal(got.reasoning_ids, wanted.reasoning_ids)
    assert model.backbone.base_model.rope_deltas is None


def test_a_token_costs_one_step_of_the_backbone(taught, prompt):
    """One run over the prompt; then for each token one vector of logits and one token through the backbone."""
    model = taught([[70, 71, 72], [80]])
    fed, asked, masks, seen = [], [], [], []
    base = model.backbone.base_model

    def record(_module, arguments, options):
        fed.append(options["inputs_embeds"].shape[1])
        masks.append(options["attention_mask"].shape)

    base.language_model.register_forward_pre_hook(record, with_kwargs=True)
    base.visual.register_forward_pre_hook(lambda *_: seen.append(1))
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].shape))
    model.predict_action(**prompt)
    length = prompt["input_ids"].shape[1]
    assert fed == [length, 1, 1, 1, 1] and asked == [(2, 32)] * 4 and len(seen) == 1
    assert masks == [(2, length + index) for index in range(5)]


def test_no_pictures_are_said(make_model, prompt):
    """Whoever acts under the same words once more would have to show them."""
    model = make_model().double()
    image, head = model.config.image_token_id, model.get_output_embeddings()
    with torch.no_grad():
        last = model.encode(**without_state(prompt)).hidden_states[:, -1]
        head.weight.zero_()
        head.weight[image] = last.sum(0)
        assert (head(last).argmax(-1) == image).all()
    output = model.predict_action(**prompt)
    assert not (output.reasoning_ids == image).any()
    again = model.predict_action(**prompt, reasoning_ids=output.reasoning_ids)
    torch.testing.assert_close(again.actions, output.actions, rtol=0, atol=1e-6)


def test_activation_checkpointing_keeps_no_past(make_model, prompt):
    model = make_model().double().train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=r"with activation checkpointing, call eval\(\) first"):
        model.predict_action(**prompt)
    trained = model.eval().predict_action(**prompt)
    assert torch.equal(trained.actions, make_model().double().predict_action(**prompt).actions)


def test_a_missing_camera_may_stand_in_front_of_the_reasoning(make_model, make_processor, pictures, chunks):
    """What nothing sees does not say the first word either, in training or when it acts."""
    model = make_model("llava_siglip").double()
    processor = make_processor("llava_siglip", prompt_config={"template": "{bos}{instruction}{images}"})
    views = [{**view, "wrist": None} for view in pictures]
    given = processor(images=views, text=TEXTS, state=STATE, actions=chunks, reasoning="lift")
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    acted = processor(images=views, text=TEXTS, state=STATE)
    acted = {name: value.double() if value.is_floating_point() else value for name, value in acted.items()}
    assert not acted["attention_mask"][:, -1].any()
    loss, output = model(**given).loss, model.predict_action(**acted)
    for batch in (given, acted):
        batch["pixel_values"] = batch["pixel_values"].clone().unflatten(0, (2, 2))
        batch["pixel_values"][:, 1] = 0.3
        batch["pixel_values"] = batch["pixel_values"].flatten(0, 1)
    torch.testing.assert_close(model(**given).loss, loss, rtol=1e-9, atol=0)
    again = model.predict_action(**acted)
    assert torch.equal(again.reasoning_ids, output.reasoning_ids)
    torch.testing.assert_close(again.actions, output.actions, rtol=0, atol=1e-9)


def test_actions_may_be_learnt_under_the_models_own_words(model, make_batch):
    """What it says is acted under, as in a prediction, and not learnt."""
    batch = make_batch(reasoning=None)
    spoken = model.train().with_own_words(**batch)
    assert model.training and not model.eval().training
    output = model(**spoken)
    prompts = {name: batch[name] for name in batch.keys() - {"actions", "action_mask"}}
    predicted = model.predict_action(**prompts)
    assert torch.equal(spoken["reasoning_ids"], predicted.reasoning_ids)
    error = (predicted.actions - batch["actions"]).square().mean()
    assert output.ntp_loss == 0
    torch.testing.assert_close([output.loss, output.diffusion_loss], [error, error])
    with pytest.raises(ValueError, match="as labels to learn or as reasoning_ids, got both"):
        model(**make_batch(), reasoning_ids=spoken["reasoning_ids"])


def test_words_are_for_the_processor(model, prompt):
    with pytest.raises(ValueError, match="A reasoning in words is for the processor"):
        model.predict_action(**prompt, reasoning="lift")
