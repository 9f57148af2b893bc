"""A SpatialVLA that sees several frames; the oldest may be from before the episode, and are then nowhere seen."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration
from hf_vla.models.spatialvla.processing_spatialvla import SpatialVLAProcessor

TEXTS = ["push", "pick up the red cube"]
STEPS = 3


def make_processor(steps):
    limits = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "min": [-1.0] * 7, "max": [1.0] * 7}
    grid = GaussianGridTokenizer(num_bins=(8, 16, 8, 8, 8, 8), distribution="uniform")
    camera = {"name": "front", "width": 64, "height": 48, "intrinsics": [[60, 0, 32], [0, 60, 24], [0, 0, 1]]}
    action_config = {
        "chunk_size": 2,
        "n_obs_steps": steps,
        "normalization": {"mode": ["quantile"] * 6 + ["zero_one"], "clip": True, "convention": "spatialvla"},
        "tokenizer": {"type": "gaussian_grid", **grid.to_dict()},
    }
    config = SpatialVLAConfig.from_preset("tiny", chunk_size=2, n_obs_steps=steps)
    return SpatialVLAProcessor.from_scratch(config, {"arm": {"action": limits}}, action_config, {"arm": camera})


def make_model(steps, **options):
    """In float64, where a leak cannot pass for rounding; with weights for which every input matters."""
    torch.manual_seed(0)
    config = SpatialVLAConfig.from_preset("tiny", chunk_size=2, n_obs_steps=steps, **options)
    model = SpatialVLAForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2.0 * parameter[0].numel() ** -0.5)
    return model.double().requires_grad_(False)


@pytest.fixture(scope="module")
def processor():
    return make_processor(STEPS)


@pytest.fixture(scope="module")
def model():
    return make_model(STEPS)


@pytest.fixture
def frames():
    return list(np.random.default_rng(1).integers(0, 255, (2 * STEPS, 48, 64, 3), np.uint8))


@pytest.fixture
def images(frames):
    """Of two samples; the second is the first of its episode but one."""
    return [frames[:STEPS], [None, *frames[STEPS + 1 :]]]


@pytest.fixture
def chunks():
    actions = np.random.default_rng(2).uniform(-0.9, 0.9, (2, 2, 7))
    actions[..., 6] = 1.0
    return actions


def logits(model, inputs):
    return model.predict_action(**inputs).logits[:, 0, : model.config.action_block_sizes[0]]


def test_shapes_and_masks(processor, images, chunks):
    for options in ({}, {"actions": chunks}):
        batch = processor(images=images, text=TEXTS, **options)
        assert batch["pixel_values"].shape == (2, STEPS, 3, 84, 84) and batch["intrinsics"].shape == (2, STEPS, 3, 3)
        is_image = batch["input_ids"] == 259
        assert is_image.sum(-1).tolist() == [36 * STEPS] * 2
        first, second = (mask[image] for mask, image in zip(batch["attention_mask"], is_image, strict=True))
        assert first.all() and not second[:36].any() and second[36:].all()
        padding = batch["input_ids"] == 0
        assert batch["attention_mask"][~is_image & ~padding].all() and not batch["attention_mask"][padding].any()


@pytest.mark.parametrize("ego3d", [True, False])
def test_an_episodes_first_step_is_seen_as_without_a_history(frames, ego3d):
    """Positions count real tokens alone, so that nothing tells of the frames that are not there."""
    options = {"use_ego3d": ego3d, "use_vision_zoe": ego3d}
    several, one = make_model(STEPS, **options), make_model(1, **options)
    one.load_state_dict(several.state_dict())
    expected = one.predict_action(**make_processor(1)(images=frames[:2], text=TEXTS))
    first = [[None] * (STEPS - 1) + [frame] for frame in frames[:2]]
    output = several.predict_action(**make_processor(STEPS)(images=first, text=TEXTS))
    torch.testing.assert_close(output.logits, expected.logits)
    assert torch.equal(output.action_ids, expected.action_ids)


def test_pixels_of_a_masked_frame_change_nothing(model, processor, images, chunks):
    prompt, batch = processor(images=images, text=TEXTS), processor(images=images, text=TEXTS, actions=chunks)
    scores, loss = logits(model, prompt), model(**batch).loss
    for inputs in (prompt, batch):
        inputs["pixel_values"][1, 0] = torch.rand(3, 84, 84)
        inputs["intrinsics"][1, 0, 0, 0] = 7.0
    assert torch.equal(logits(model, prompt), scores) and torch.equal(model(**batch).loss, loss)
    for inputs in (prompt, batch):
        inputs["pixel_values"][1, 1] = torch.rand(3, 84, 84)
    assert not torch.equal(logits(model, prompt), scores) and not torch.equal(model(**batch).loss, loss)


def test_every_frame_counts_and_so_does_their_order(model, processor, frames):
    def score(*images):
        return logits(model, processor(images=[list(images)], text="push"))

    first = score(*frames[:3])
    for other in ((frames[1], frames[0], frames[2]), (frames[3], *frames[1:3]), (*frames[:2], frames[3])):
        assert (score(*other) - first).abs().max() > 1e-3


def test_one_of_a_batch_is_the_sample_alone(model, processor, images, chunks):
    prompts, batch = processor(images=images, text=TEXTS), processor(images=images, text=TEXTS, actions=chunks)
    together, losses = model.predict_action(**prompts), []
    for index in range(2):
        alone = {"images": images[index : index + 1], "text": TEXTS[index]}
        output = model.predict_action(**processor(**alone))
        torch.testing.assert_close(output.logits[0], together.logits[index], atol=1e-5, rtol=0)
        assert torch.equal(output.action_ids[0], together.action_ids[index])
        losses.append(model(**processor(**alone, actions=chunks[index])).loss)
    torch.testing.assert_close(model(**batch).loss, torch.stack(losses).mean())


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_agrees_with_predict_action(model, processor, images, use_cache):
    inputs = processor(images=images, text=TEXTS)
    length, begin = inputs["input_ids"].shape[1], model.config.action_token_begin_idx
    starts = torch.tensor([0, *model.config.action_block_sizes]).cumsum(0) + begin

    def allowed(_, ids):
        block = (len(ids) - length) % 3
        return list(range(starts[block], starts[block + 1]))

    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache}
    tokens = model.generate(**inputs, **options, prefix_allowed_tokens_fn=allowed)
    assert torch.equal(tokens[:, length:] - begin, model.predict_action(**inputs).action_ids)


def test_every_frame_has_its_own_place_in_space(processor, images):
    model = make_model(STEPS, use_vision_zoe=False, use_ego3d=True)
    depth = [[np.full((4, 4), metres) for metres in row] for row in ([0.5, 1.5, 2.5], [0.0, 0.7, 1.0])]
    depth[1][0] = None
    inputs = processor(images=images, text=TEXTS, depth=depth)
    assert inputs["depth"].shape == (2, STEPS, 84, 84)
    assert inputs["depth"][:, :, 0, 0].tolist() == [[0.5, 1.5, 2.5], [1.0, pytest.approx(0.7), 1.0]]
    scores = logits(model, inputs)
    features = model.get_image_features(*(inputs[name] for name in ("pixel_values", "intrinsics", "depth")))
    assert features.shape == (2, STEPS * 36, 128)
    for step in range(STEPS):
        frame = [inputs[name][:, step] for name in ("pixel_values", "intrinsics", "depth")]
        torch.testing.assert_close(model._frame_features(*frame), features[:, 36 * step : 36 * (step + 1)])
        for name in ("intrinsics", "depth"):
            changed = inputs[name].clone()
            changed[0, step] = changed[0, step] * torch.tensor([[2.0], [1.0], [1.0]]) if name == "intrinsics" else 3.0
            assert not torch.allclose(logits(model, {**inputs, name: changed})[0], scores[0])
    one_camera = {**inputs, "intrinsics": inputs["intrinsics"][0, 0]}
    torch.testing.assert_close(logits(model, one_camera), scores)
    each_its_own = {**inputs, "intrinsics": inputs["intrinsics"][:, 0]}
    torch.testing.assert_close(logits(model, each_its_own), scores)


def test_given_intrinsics_are_those_of_every_frame(processor, images):
    matrix = np.array([[64.0, 0, 32], [0, 48, 24], [0, 0, 1]])
    each = np.broadcast_to(matrix, (2, STEPS, 3, 3)).copy()
    each[0, 1, 0, 0] = 32.0
    for given in (matrix, each[:, 0], each):
        got = processor(images=images, text=TEXTS, intrinsics=given)["intrinsics"]
        assert got.shape == (2, STEPS, 3, 3) and got[1, :, 0, 0].tolist() == [84.0] * 3
        assert got[0, 1, 0, 0] == (42.0 if given is each else 84.0)


def test_a_training_step_and_what_is_saved(processor, images, chunks, tmp_path, few_steps):
    config = SpatialVLAConfig.from_preset("tiny", chunk_size=2, n_obs_steps=STEPS)
    model = SpatialVLAForConditionalGeneration(config).train()
    batch = processor(images=images, text=TEXTS, actions=chunks)
    losses = few_steps(model, batch)
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = SpatialVLAForConditionalGeneration.from_pretrained(tmp_path)
    prompt = SpatialVLAProcessor.from_pretrained(tmp_path)(images=images, text=TEXTS)
    assert again.config.n_obs_steps == STEPS and torch.equal(again(**batch).loss, model(**batch).loss)
    expected = model.predict_action(**processor(images=images, text=TEXTS))
    assert torch.equal(again.predict_action(**prompt).logits, expected.logits)


def test_model_and_processor_must_see_equally_many(model, processor, frames, images):
    with pytest.raises(ValueError, match=r"Expected 3 frames of every sample.* got 1, pixel_values of shape \(2, 3,"):
        model.predict_action(**make_processor(1)(images=frames[:2], text="push"))
    with pytest.raises(ValueError, match="Expected 1 frames of every sample.* got 3"):
        make_model(1).predict_action(**processor(images=images, text="push"))
    with pytest.raises(StrictDataclassClassValidationError, match="Expected n_obs_steps of 1 or more, got 0"):
        SpatialVLAConfig.from_preset("tiny", n_obs_steps=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": [np.zeros((8, 8, 3), np.uint8)] * 2},
            "3 observations: expected a list of as many .* one ndarray",
        ),
        ({"images": [[np.zeros((8, 8, 3), np.uint8)] * 2] * 2}, "the oldest first and None .*, got 2 of them"),
        ({"images": [[np.zeros((8, 8, 3), np.uint8)] * 2 + [None]] * 2}, "a picture of the present for every sample"),
        ({"images": [None, None]}, "a picture of the present for every sample, got None"),
        ({"depth": np.ones((2, 4, 4))}, r"depth of shape \(2, 3, height, width\) in metres, got \(2, 4, 4\)"),
        ({"intrinsics": np.ones((3, 3, 3))}, r"\(3, 3\) or \(2, 3, 3\) or \(2, 3, 3, 3\), got \(3, 3, 3\)"),
    ],
)
def test_what_is_wrong_is_said(processor, images, change, message):
    with pytest.raises(ValueError, match=message):
        processor(**{"images": images, "text": TEXTS, **change})


def test_a_grid_of_another_size_is_refused_by_name(processor):
    names = [f"joint_{index}" for index in range(8)]
    spec = {"names": names, "kind": "delta_ee"}
    limits = {"q01": [-1.0] * 8, "q99": [1.0] * 8}
    config = processor.action_config | {"specs": {"wide": {"action": spec}}}
    with pytest.raises(
        ValueError, match="action tokens stand for 7 numbers of every robot alike, the actions of 'wide' have 8"
    ):
        SpatialVLAProcessor(
            processor.image_processor,
            processor.tokenizer,
            processor.statistics | {"wide": {"action": limits}},
            config,
            {"default": processor.camera_config["arm"]},
        )
