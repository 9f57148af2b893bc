"""A TinyVLA that sees several observations of two cameras; those from before the episode are masked."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModel, AutoProcessor

from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.processing_tinyvla import TinyVLAProcessor

STEPS = 3
TEXTS = ["push", "pick up the red cube"]
STATES = np.array([[[0.3, 1.0], [0.4, 1.1], [0.5, 1.2]], [[-0.2, 2.0], [-0.2, 2.0], [-0.1, 2.1]]])
IN_FRONT = {"template": "{images}{instruction}"}


@pytest.fixture(scope="module")
def build(make_config, backbones, robot):
    """Builds a processor for several observations of the robot with two cameras."""

    def build(backbone="llava_siglip", prompt_config=None, steps=STEPS, **options):
        statistics, action_config, cameras = robot.processor
        action_config = action_config | {"n_obs_steps": steps}
        if options.get("state_dim", 1) is None:
            action_config["state_normalization"] = None
        chosen, config = backbones[backbone], make_config(backbone, n_obs_steps=steps, **options)
        prompt_config = {**(chosen.prompt or {}), **(prompt_config or {})} or None
        return TinyVLAProcessor.from_backbone(
            chosen.processor, config, statistics, action_config, cameras, prompt_config
        )

    return build


@pytest.fixture
def histories():
    """Of two samples; before the second step of the second one, its episode had not begun."""
    rng = np.random.default_rng(0)
    sizes = {"front": (30, 40), "wrist": (28, 28)}
    first, second = (
        {name: list(rng.integers(0, 255, (STEPS, *size, 3), np.uint8)) for name, size in sizes.items()}
        for _ in range(2)
    )
    return [first, {name: [None, *pictures[1:]] for name, pictures in second.items()}]


def doubled(make_model, backbone="llava_siglip", **options):
    return make_model(backbone, n_obs_steps=STEPS, **options).double()


def test_one_of_a_batch_is_the_sample_alone(build, backbone, make_model, histories, chunks):
    model, processor = doubled(make_model, backbone), build(backbone)
    given = {"images": histories, "text": TEXTS, "state": STATES}
    batch, prompt = processor(**given, actions=chunks), processor(**given)
    assert batch["state"].shape == (2, STEPS, 2)
    together, losses = model.predict_action(**prompt).actions, []
    for index in range(2):
        alone = {name: values[index : index + 1] for name, values in given.items()}
        losses.append(model(**processor(**alone, actions=chunks[index])).loss)
        torch.testing.assert_close(model.predict_action(**processor(**alone)).actions[0], together[index])
    torch.testing.assert_close(model(**batch).loss, torch.stack(losses).mean())


def test_every_observation_counts_and_so_does_their_order(build, backbone, make_model, histories):
    model, processor = doubled(make_model, backbone), build(backbone)

    def act(pictures, state=STATES[0]):
        return model.predict_action(**processor(images=[pictures], text="push", state=state)).actions

    seen = histories[0]
    first, (old, middle, new) = act(seen), seen["wrist"]
    for wrist in ([middle, old, new], [255 - old, middle, new], [old, middle, 255 - new], [None, middle, new]):
        assert (act(seen | {"wrist": wrist}) - first).abs().max() > 1e-6
    assert (act(seen, STATES[0, [1, 0, 2]]) - first).abs().max() > 1e-6


def test_the_prompt_holds_the_steps_one_after_the_other(build, histories):
    """The oldest first, and of each step the cameras in their order."""
    processor = build()
    flat = {name: processor(images=histories, text="push", state=STATES)[name] for name in ("pixel_values",)}
    one = build(steps=1)
    pixels = iter(flat["pixel_values"])
    for sample in histories:
        for step in range(STEPS):
            pictures = {name: pictures[step] for name, pictures in sample.items()}
            if pictures["front"] is None:
                assert not any((next(pixels) > -1).any() for _ in range(2))
                continue
            for expected in one(images=[pictures], text="push", state=STATES[0, 0])["pixel_values"]:
                assert torch.equal(next(pixels), expected)
    with pytest.raises(StopIteration):
        next(pixels)


def test_states_stand_behind_each_other_the_oldest_first(build, make_model, histories):
    model, processor = make_model(n_obs_steps=STEPS), build()
    assert model.config.state_dim == 2 and model.action_head.state_dim == 2 * STEPS
    inputs, seen = processor(images=histories, text=TEXTS, state=STATES), []
    model.action_head.condition_encoder.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    model.predict_action(**inputs)
    expected = [processor.action_codec.encode_state(STATES[:, step]) for step in range(STEPS)]
    assert np.array_equal(seen[0], np.concatenate(expected, -1))


def test_pixels_of_a_masked_picture_change_nothing(build, make_model, histories, chunks):
    model, processor = doubled(make_model), build()
    prompt = processor(images=histories, text=TEXTS, state=STATES)
    batch = processor(images=histories, text=TEXTS, state=STATES, actions=chunks)
    actions, loss = model.predict_action(**prompt).actions, model(**batch).loss
    first_of_the_second = 2 * STEPS  # two cameras
    for inputs in (prompt, batch):
        inputs["pixel_values"][first_of_the_second : first_of_the_second + 2] = torch.randn(2, 3, 28, 28)
    assert torch.equal(model.predict_action(**prompt).actions, actions) and torch.equal(model(**batch).loss, loss)
    prompt["pixel_values"][first_of_the_second + 2] = torch.randn(3, 28, 28)
    assert not torch.equal(model.predict_action(**prompt).actions, actions)


def test_an_episodes_first_step_is_seen_as_without_a_history(build, make_model, histories):
    """Where pictures stand first and positions are relative (RoPE), what is masked in front of all is not there."""
    one, several = (make_model(n_obs_steps=steps, state_dim=None).double() for steps in (1, STEPS))
    now = {name: pictures[-1] for name, pictures in histories[0].items()}
    first = {name: [None] * (STEPS - 1) + [picture] for name, picture in now.items()}
    expected = one.predict_action(**build(prompt_config=IN_FRONT, steps=1, state_dim=None)(images=now, text="push"))
    output = several.predict_action(**build(prompt_config=IN_FRONT, state_dim=None)(images=first, text="push"))
    torch.testing.assert_close(output.actions, expected.actions)


def test_a_camera_that_is_missing_is_missing_at_every_step(build, histories):
    processor = build()
    rows = []
    for nothing in (None, [None] * STEPS):
        histories[0]["wrist"] = nothing
        rows.append(processor(images=histories, text=TEXTS, state=STATES))
    assert all(torch.equal(rows[0][name], value) for name, value in rows[1].items())


def test_a_training_step_and_what_is_saved(build, make_model, histories, chunks, tmp_path, few_steps):
    model, processor = make_model(n_obs_steps=STEPS), build()
    batch = processor(images=histories, text=TEXTS, state=STATES, actions=chunks)
    losses = few_steps(model, batch)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, prompt = AutoModel.from_pretrained(tmp_path), {"images": histories, "text": TEXTS, "state": STATES}
    assert again.config.n_obs_steps == STEPS and again.config.state_dim == 2
    expected = model.predict_action(**processor(**prompt)).actions
    assert torch.equal(again.predict_action(**AutoProcessor.from_pretrained(tmp_path)(**prompt)).actions, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"state": STATES[:, 0]},
            r"Expected a state of shape \(2, 3, S\), one row per sample and step, got \(1, 2, 2\)",
        ),
        ({"state": STATES[:, :2]}, r"Expected a state of shape \(2, 3, S\), .* got \(2, 2, 2\)"),
        ({"state": [STATES[0], STATES[1, :2]]}, r"Expected a state of shape \(2, 3, S\)"),
        ({"images": [{"front": np.zeros((8, 8, 3), np.uint8), "wrist": None}] * 2}, "3 observations: .* one ndarray"),
        ({"images": [{"front": [None] * 3, "wrist": None}] * 2}, r"at least one camera, got none for the samples \[0"),
        ({"images": [{"front": [None] * 4, "wrist": None}] * 2}, "expected a list of as many .* got 4 of them"),
    ],
)
def test_what_is_wrong_is_said(build, histories, change, message):
    with pytest.raises(ValueError, match=message):
        build()(**{"images": histories, "text": TEXTS, "state": STATES, **change})


def test_model_and_processor_must_see_equally_many(make_config, backbones, robot):
    statistics, action_config, cameras = robot.processor
    for seen, known in ((2, 3), (1, 2), (2, 1)):
        with pytest.raises(ValueError, match=f"Expected n_obs_steps of {known}, as the config says, got {seen}"):
            TinyVLAProcessor.from_backbone(
                backbones["llava_siglip"].processor,
                make_config(n_obs_steps=known),
                statistics,
                action_config | {"n_obs_steps": seen},
                cameras,
            )
    with pytest.raises(StrictDataclassClassValidationError, match="Expected n_obs_steps of 1 or more, got 0"):
        TinyVLAConfig.from_preset("tiny", n_obs_steps=0)
