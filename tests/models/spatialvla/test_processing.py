import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer
from hf_vla.models.byte_tokenizer import byte_tokenizer
from hf_vla.models.outputs import VLAOutput
from hf_vla.models.spatialvla.processing_spatialvla import SpatialVLAProcessor

PARTS = ("tokenizer", "statistics", "action_config", "camera_config")


@pytest.fixture(scope="module")
def tiny_processor(tiny_config):
    rng = np.random.default_rng(0)
    grid = GaussianGridTokenizer.fit(rng.normal(0, 0.3, (500, 7)).clip(-1, 1), num_bins=(8, 16, 8, 8, 8, 8))
    low, high = [-0.05] * 3 + [-0.5] * 3 + [-1.0], [0.05] * 3 + [0.5] * 3 + [1.0]
    one = {"q01": low, "q99": high, "min": low, "max": high}
    two = {key: [2 * number for number in value] for key, value in one.items()}
    mode = ["quantile"] * 6 + ["zero_one"]
    camera = {"name": "front", "width": 640, "height": 480, "intrinsics": [[600, 0, 320], [0, 600, 240], [0, 0, 1]]}
    return SpatialVLAProcessor.from_scratch(
        tiny_config,
        statistics={"small": {"action": one}, "large": {"action": two}},
        action_config={
            "chunk_size": 4,
            "normalization": {"mode": mode, "clip": True, "convention": "spatialvla"},
            "tokenizer": {"type": "gaussian_grid", **grid.to_dict()},
        },
        camera_config={"small": camera, "default": {**camera, "width": 320}},
    )


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8))


@pytest.fixture
def chunk():
    actions = np.random.default_rng(2).uniform(-0.04, 0.04, (4, 7))
    actions[:, 6] = [-1, 1, 1, -1]
    return actions


def edit_published(published, folder, **changes):
    """Copy a published checkpoint's processor with some entries of its configuration changed."""
    shutil.copytree(published.path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def published_processor(published):
    return SpatialVLAProcessor.from_pretrained(published.path)


@pytest.fixture(scope="module")
def images(published):
    return [Image.open(published.folder / f"raw_image_{i}.png") for i in range(len(published.case["prompts"]))]


def test_published_prompt_batch(published, published_processor, images):
    keys = published.case["unnorm_keys"]
    batch = published_processor(images=images, text=published.case["prompts"], unnorm_key=keys)
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[name], published.inputs[f"infer.{name}"]), name
    torch.testing.assert_close(batch["intrinsics"][0], published.inputs["infer.intrinsic"], atol=1e-4, rtol=0)


def test_published_training_batch(published, published_processor, images):
    """The recorded targets are normalised: turn them to robot units first, as our processor takes them."""
    keys = published.case["unnorm_keys"]
    normalized = published.inputs["train.actions"].double().clip(-1, 1).numpy()
    codec = published_processor.action_codec
    actions = [codec.normalizer(key).unnormalize(chunk) for key, chunk in zip(keys, normalized, strict=True)]
    prompts = [prompt.lower() for prompt in published.case["prompts"]]
    batch = published_processor(images=images, text=prompts, actions=np.stack(actions), unnorm_key=keys)
    for name in ("input_ids", "attention_mask", "labels", "token_type_ids", "pixel_values"):
        assert torch.equal(batch[name], published.inputs[f"train.{name}"].to(batch[name].dtype)), name
    torch.testing.assert_close(batch["intrinsics"], published.inputs["train.intrinsic"], atol=1e-4, rtol=0)


def test_published_recorded_tokens_decode_to_the_recorded_actions(published, published_processor):
    keys = published.case["decode_unnorm_keys"]
    actions = published_processor.decode_actions(published.outputs["gen.token_ids"], keys, clip_ids=True)
    for index, chunk in enumerate(actions):
        np.testing.assert_allclose(chunk, published.outputs[f"gen.actions_{index}"], atol=1e-6)


def test_published_recorded_tokens_outside_their_block_raise(published, published_processor):
    with pytest.raises(ValueError, match="block"):
        published_processor.decode_actions(published.outputs["gen.token_ids"], published.case["decode_unnorm_keys"])


def test_published_too_few_tokens_raise(published, published_processor):
    """The reference pads them with zeros without a word."""
    with pytest.raises(ValueError, match="2"):
        published_processor.decode_actions(published.inputs["decode_short.token_ids"], "toy/1.0.0")


def test_published_actions_have_names(published_processor):
    spec, state = published_processor.action_codec.specs("toy/1.0.0")
    assert (
        spec.names == ("x", "y", "z", "roll", "pitch", "yaw", "gripper") and spec.kind == "delta_ee" and state is None
    )


def test_published_save_and_load(published, published_processor, images, tmp_path):
    published_processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    for name in ("statistics", "action_config", "camera_config"):
        assert getattr(again, name) == getattr(published_processor, name)
    prompts, keys = published.case["prompts"], published.case["unnorm_keys"]
    first, second = (each(images=images, text=prompts, unnorm_key=keys) for each in (published_processor, again))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_published_min_sigma_survives_saving(published, tmp_path):
    """The reference writes 0 again whatever was read."""
    edit_published(published, tmp_path / "published", min_sigma=0.5)
    SpatialVLAProcessor.from_pretrained(tmp_path / "published").save_pretrained(tmp_path / "ours")
    assert SpatialVLAProcessor.from_pretrained(tmp_path / "ours").action_codec.tokenizer.min_sigma == 0.5


def test_published_several_frames_are_refused(published, tmp_path):
    edit_published(published, tmp_path / "published", num_obs_steps=2)
    with pytest.raises(ValueError, match="sees one frame, got num_obs_steps=2"):
        SpatialVLAProcessor.from_pretrained(tmp_path / "published")


def test_one_of_a_batch_is_the_sample_alone(tiny_processor, image, chunk):
    texts, keys = ["push", "pick up the red cube"], ["small", "large"]
    together = tiny_processor(images=[image, image], text=texts, actions=[chunk, 2 * chunk], unnorm_key=keys)
    for index in range(2):
        alone = tiny_processor(images=image, text=texts[index], actions=(index + 1) * chunk, unnorm_key=keys[index])
        length = alone["input_ids"].shape[1]
        for name in ("input_ids", "labels", "token_type_ids", "attention_mask"):
            assert torch.equal(together[name][index, :length], alone[name][0])
        assert (
            not together["attention_mask"][index, length:].any() and (together["labels"][index, length:] == -100).all()
        )
    # twice the motion of a robot with twice the range is the same chunk of tokens
    first, second = (together["labels"][index][together["labels"][index] != -100] for index in range(2))
    assert torch.equal(first, second) and len(first) == 13


def test_training_and_inference_share_the_prompt(tiny_processor, image, chunk):
    text = "Pick up the RED cube"
    prompt = tiny_processor(images=image, text=text, unnorm_key="small")["input_ids"][0]
    train = tiny_processor(images=image, text=text, actions=chunk, unnorm_key="small")
    assert torch.equal(train["input_ids"][0, : len(prompt)], prompt)
    assert torch.equal(train["token_type_ids"][0], (torch.arange(len(prompt) + 13) >= len(prompt)).long())


def test_round_trip_in_robot_units(tiny_processor, image, chunk):
    batch = tiny_processor(images=image, text="push", actions=chunk, unnorm_key="small")
    tokens = batch["labels"][batch["labels"] != -100][None]
    output = VLAOutput(action_ids=tokens[:, :-1] - tiny_processor.action_token_begin)
    decoded = tiny_processor.decode_actions(output, "small")
    assert decoded.dtype == np.float32 and decoded.shape == (1, 4, 7)
    assert np.array_equal(decoded[0, :, 6], chunk[:, 6])
    assert np.abs(decoded[0, :, :6] - chunk[:, :6]).max() < 0.3
    assert np.array_equal(tiny_processor.decode_actions(tokens, "small"), decoded)  # ids of generate, <eos> behind
    assert np.array_equal(tiny_processor.decode_actions(output, ["small"]), decoded)
    np.testing.assert_allclose(tiny_processor.decode_actions(output, "large"), 2 * decoded, atol=1e-6)


def test_padded_actions_get_no_label(tiny_processor, image, chunk):
    mask = np.array([True, True, False, False])
    whole = tiny_processor(images=image, text="push", actions=chunk, unnorm_key="small")["labels"][0]
    chunk[2:] = np.nan
    padded = tiny_processor(images=image, text="push", actions=chunk, action_mask=mask, unnorm_key="small")["labels"][
        0
    ]
    assert torch.equal(padded[:-7], whole[:-7]) and (padded[-7:] == -100).all() and (whole[-7:] != -100).all()


@pytest.mark.parametrize("form", ["list", "array", "tensor"])
def test_batches_of_images(tiny_processor, image, form):
    array = np.asarray(image)
    images = {
        "list": [image, image],
        "array": np.stack([array, array]),
        "tensor": torch.from_numpy(np.stack([array, array])).permute(0, 3, 1, 2),
    }[form]
    batch = tiny_processor(images=images, text="push", unnorm_key="small")
    assert batch["pixel_values"].shape == (2, 3, 84, 84) and batch["input_ids"].shape[0] == 2
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    assert 0 <= batch["pixel_values"].min() and batch["pixel_values"].max() <= 1


def test_numpy_output(tiny_processor, image):
    batch = tiny_processor(images=image, text="push", unnorm_key="small", return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in batch.values())


def test_intrinsics_scale_with_the_image(tiny_processor, image):
    camera = tiny_processor(images=image, text="push", unnorm_key="small")["intrinsics"][0]
    expected = torch.tensor([[600 * 84 / 640, 0, 42], [0, 600 * 84 / 480, 42], [0, 0, 1]])
    torch.testing.assert_close(camera, expected)
    default = tiny_processor(images=image, text="push", unnorm_key="large")["intrinsics"][0]
    torch.testing.assert_close(default[0, 0], torch.tensor(600 * 84 / 320))
    given = tiny_processor(images=image, text="push", intrinsics=[[64, 0, 32], [0, 48, 24], [0, 0, 1]])["intrinsics"][
        0
    ]
    torch.testing.assert_close(given, torch.tensor([[84.0, 0, 42], [0, 84, 42], [0, 0, 1]]))


def test_depth_is_resized_to_the_image(tiny_processor, image):
    depth = np.full((24, 32), 0.7)
    depth[:, 16:] = 1.3
    resized = tiny_processor(images=image, text="push", depth=depth)["depth"]
    assert resized.shape == (1, 84, 84) and resized.dtype == torch.float32
    assert torch.equal(resized.unique(), torch.tensor([0.7, 1.3]))
    assert (resized[0, :, :42] == 0.7).all()


@pytest.mark.parametrize("training", [False, True])
def test_an_image_placeholder_in_front_is_understood(tiny_processor, image, chunk, training):
    targets = {"actions": chunk, "unnorm_key": "small"} if training else {}
    plain, marked = (tiny_processor(images=image, text=text, **targets) for text in ("push", "<image>push"))
    assert torch.equal(plain["input_ids"], marked["input_ids"]) and ("labels" in plain) == training


def test_no_prompt_is_cut(tiny_processor, image, chunk):
    text = "push " * 400
    batch = tiny_processor(images=image, text=text, actions=chunk, unnorm_key="small")
    assert batch["input_ids"].shape[1] == 36 + 1 + len(text) + 1 + 13
    assert tiny_processor.tokenizer.decode(batch["input_ids"][0, 37:-13]) == text + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": None}, "Expected `images` and `text`, got no text"),
        ({"images": None}, "Expected `images` and `text`, got no images"),
        ({"text": ["a", "b", "c"]}, "Got 1 images, 3 texts and 1 unnorm_keys"),
        ({"state": np.zeros(8)}, "SpatialVLA takes no state"),
        ({"reasoning": "the cube is red"}, "SpatialVLA takes no reasoning"),
        ({"text": "push <ACTION00001>"}, r"control tokens \['<ACTION00001>'\] in it: 'push <ACTION00001>'"),
        ({"text": "push <image>"}, r"control tokens \['<image>'\] in it"),
        ({"text": "push<eos>"}, r"control tokens \['<eos>'\] in it"),
        ({"text": [None]}, "Expected an instruction in words, got None"),
        ({"images": [], "text": []}, "Got 0 images"),
        ({"unnorm_key": "smal", "intrinsics": np.eye(3)}, "No action statistics for 'smal'"),
        ({"intrinsics": np.ones(3)}, r"Expected intrinsics of shape \(3, 3\) or \(1, 3, 3\), got \(3,\)"),
        ({"depth": np.ones((4, 4), np.uint16)}, "are these millimetres"),
        ({"unnorm_key": "smal"}, r"No action statistics for 'smal'; .*\['large', 'small'\].*Did you mean 'small'"),
        ({"depth": np.zeros((4, 4))}, "Expected a depth above 0 metres in every pixel"),
        ({"depth": np.ones((2, 4, 4))}, r"Expected depth of shape \(1, height, width\) in metres, got \(2, 4, 4\)"),
        ({"actions": np.zeros((4, 7))}, r"Several datasets have action statistics; .*\['large', 'small'\]"),
        ({"actions": np.zeros((3, 7)), "unnorm_key": "small"}, r"chunk_size=4"),
        (
            {"actions": np.zeros((2, 4, 7)), "unnorm_key": "small"},
            r"Expected actions of shape \(1, T, D\).*\(2, 4, 7\)",
        ),
        ({"actions": np.full((4, 7), np.nan), "unnorm_key": "small"}, "Expected finite actions"),
        (
            {"actions": np.zeros((4, 7)), "action_mask": [True]},
            r"action_mask of shape \(1, T\), got \(1, 4, 7\) and \(1, 1\)",
        ),
        ({"intrinsics": np.zeros((3, 3))}, "positive focal lengths"),
    ],
)
def test_bad_input(tiny_processor, image, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor(**{"images": image, "text": "push", **arguments})


@pytest.mark.parametrize(
    ("output", "key", "message"),
    [
        (VLAOutput(logits=torch.zeros(1)), "small", "without `action_ids`"),
        (VLAOutput(action_ids=torch.zeros(1, 12, dtype=torch.long)), None, r"Several datasets .*\['large', 'small'\]"),
        (VLAOutput(action_ids=torch.zeros(1, 12, dtype=torch.long)), "small", r"ids\[0, 1\] is 0.*rotation block"),
        (VLAOutput(action_ids=torch.zeros(1, 11, dtype=torch.long)), "small", "11"),
        (VLAOutput(action_ids=torch.zeros(2, 12, dtype=torch.long)), ["small"], "Got 2 predictions and 1 unnorm_keys"),
        (torch.tensor([[1] * 12]), "small", r"ids\[0, 0\]"),
        (torch.tensor([[260, 1284, 1796, 1], [260, 1284, 1, 0]]), "small", r"one length, got \[3, 2\]"),
    ],
)
def test_undecodable_output(tiny_processor, output, key, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor.decode_actions(output, key)


def test_tokenizer_must_hold_every_action_token(tiny_processor):
    with pytest.raises(ValueError, match="no token '<ACTION01537>'"):
        SpatialVLAProcessor(
            tiny_processor.image_processor,
            byte_tokenizer(100),
            tiny_processor.statistics,
            tiny_processor.action_config,
        )


def test_pixels_do_not_depend_on_torchvision(tiny_processor, image):
    """Transformers gives torchvision's backend to whoever has torchvision."""
    image_processor = SiglipImageProcessor(**tiny_processor.image_processor.to_dict())
    other = SpatialVLAProcessor(image_processor, *(getattr(tiny_processor, name) for name in PARTS))
    first, second = (each(images=image, text="push", unnorm_key="small") for each in (tiny_processor, other))
    assert torch.equal(first["pixel_values"], second["pixel_values"])


def test_an_instruction_may_be_empty(tiny_processor, image):
    """There are datasets without instructions."""
    ids = tiny_processor(images=image, text="", unnorm_key="small")["input_ids"][0]
    assert tiny_processor.tokenizer.decode(ids).endswith("<image><bos>\n")


def test_no_camera_and_no_default(tiny_processor, image):
    cameras = {"small": tiny_processor.camera_config["small"]}
    arguments = (tiny_processor.image_processor, tiny_processor.tokenizer, tiny_processor.statistics)
    processor = SpatialVLAProcessor(*arguments, tiny_processor.action_config, cameras)
    with pytest.raises(ValueError, match=r"No cameras for 'large'; this checkpoint knows those of \['small'\]"):
        processor(images=image, text="push", unnorm_key="large")
    without = SpatialVLAProcessor(*arguments, tiny_processor.action_config)
    assert "intrinsics" not in without(images=image, text="push", unnorm_key="large")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensors_of_any_precision(tiny_processor, image, chunk, dtype):
    inputs = {"actions": torch.tensor(chunk), "depth": torch.ones(4, 4), "intrinsics": torch.eye(3)}
    inputs = {key: value.to(dtype).requires_grad_() for key, value in inputs.items()}
    batch = tiny_processor(images=image, text="push", unnorm_key="small", **inputs)
    assert batch["depth"].dtype == batch["intrinsics"].dtype == torch.float32
    listed = tiny_processor(images=[image], text="push", unnorm_key="small", actions=[inputs["actions"]])
    assert torch.equal(listed["labels"], batch["labels"])


def test_geometry_is_not_cast(tiny_processor, image):
    batch = tiny_processor(images=image, text="push", unnorm_key="small", depth=np.full((4, 4), 0.777))
    intrinsics, depth = batch["intrinsics"].clone(), batch["depth"].clone()
    batch = batch.to("cpu", torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.bfloat16 and batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["intrinsics"], intrinsics) and torch.equal(batch["depth"], depth)
    assert {**batch}.keys() >= {"pixel_values", "intrinsics", "depth", "input_ids", "attention_mask"}


@pytest.mark.parametrize("wrong", [{"do_normalize": True}, {"do_rescale": False}])
def test_pixels_are_rescaled_here_and_normalised_in_the_model(tiny_processor, wrong):
    image_processor = type(tiny_processor.image_processor)(**{**tiny_processor.image_processor.to_dict(), **wrong})
    with pytest.raises(ValueError, match=r"rescales to \[0, 1\] and leaves normalising to the model"):
        SpatialVLAProcessor(image_processor, tiny_processor.tokenizer)


def test_clipping_needs_a_whole_chunk(tiny_processor):
    with pytest.raises(ValueError, match="Expected 12 action tokens, got 3"):
        tiny_processor.decode_actions(torch.tensor([[260, 261, 262]]), "small", clip_ids=True)
