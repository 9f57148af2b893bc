import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, PI0Processor
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

from hf_vla.models.byte_tokenizer import byte_tokenizer
from hf_vla.models.outputs import VLAOutput
from hf_vla.models.pi0_vla.configuration_pi0_vla import PI0VLAConfig
from hf_vla.models.pi0_vla.processing_pi0_vla import PI0VLAProcessor

STATELESS = {"chunk_size": 4, "normalization": {"mode": "mean_std", "convention": "lerobot"}}


@pytest.fixture
def theirs(processor):
    """Transformers' own processor with our pictures (its image processor needs torchvision), tokens and statistics."""
    entry = processor.statistics["robot"]
    return PI0Processor(
        processor.image_processor,
        byte_tokenizer(0),
        state_mean=entry["state"]["mean"],
        state_std=entry["state"]["std"],
        actions_mean=entry["action"]["mean"],
        actions_std=entry["action"]["std"],
        chunk_size=4,
    )


def test_batch_is_that_of_transformers(processor, theirs, observation):
    actions = np.random.default_rng(3).normal(size=(2, 4, 7)).astype(np.float32)
    ours = processor(**observation, actions=actions)
    pictures = [[picture for picture in sample.values() if picture is not None] for sample in observation["images"]]
    wanted = theirs(
        images=pictures,
        text=observation["text"],
        state=observation["state"],
        actions=actions,
        padding="longest",
        padding_side="right",
    )
    assert torch.equal(ours["input_ids"], wanted["input_ids"])
    assert torch.equal(ours["attention_mask"], wanted["attention_mask"])
    for key, width in (("state", 5), ("actions", 7)):
        torch.testing.assert_close(ours[key], wanted[key][..., :width], atol=1e-6, rtol=0)
        assert not wanted[key][..., width:].any()
    assert ours["pixel_attention_mask"].tolist() == [[True, True], [False, True]]
    real = ours["pixel_values"][ours["pixel_attention_mask"]]
    assert torch.equal(real, wanted["pixel_values"][wanted["pixel_attention_mask"]])
    assert not ours["pixel_values"][~ours["pixel_attention_mask"]].any()


def test_pictures_keep_their_aspect_and_are_filled_up_with_grey(processor):
    wide = Image.new("RGB", (80, 60), (255, 255, 255))
    pixels = processor(images={"front": wide, "wrist": None}, text="go", state=np.zeros(5))["pixel_values"][0, 0]
    assert pixels.shape == (3, 56, 56)
    assert (pixels[:, :42] == 1).all() and (pixels[:, 42:] == 0).all()


def test_prompt_is_images_bos_text_newline(processor, inputs):
    row = inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()
    assert row[:32] == [processor.image_token_id] * 32
    assert processor.tokenizer.decode(row[32:]) == "<bos>lift the cube\n"


def test_base_image_processor_is_that_of_transformers():
    tokenizer = byte_tokenizer(0)
    config = PI0VLAConfig.from_preset("base")
    config.vlm_config.image_token_id = 259
    image_processor = PI0VLAProcessor.from_tokenizer(tokenizer, config, {}, {"chunk_size": 50}, {}).image_processor
    # transformers.PI0ImageProcessor, which cannot be imported without torchvision
    assert dict(image_processor.size) == {"max_height": 224, "max_width": 224}
    assert dict(image_processor.pad_size) == {"height": 224, "width": 224}
    assert (image_processor.image_seq_length, image_processor.resample) == (256, Image.Resampling.BICUBIC)
    assert list(image_processor.image_mean) == list(image_processor.image_std) == [0.5] * 3
    assert image_processor.do_pad and image_processor.do_resize and image_processor.do_normalize


def test_padded_actions_need_not_be_finite(processor, observation):
    actions, mask = np.zeros((2, 4, 7)), np.ones((2, 4), bool)
    actions[1, 3], mask[1, 3] = np.nan, False
    batch = processor(**observation, actions=actions, action_mask=mask)
    assert batch["action_mask"].tolist() == mask.tolist()
    assert not batch["actions"][1, 3].any() and batch["actions"][1, 2].all()
    with pytest.raises(ValueError, match="finite actions, came nan"):
        processor(**observation, actions=actions)


def test_decoding_undoes_encoding_and_drops_what_is_beyond_the_robot(processor, observation):
    actions = np.random.default_rng(4).normal(size=(2, 4, 7)).astype(np.float32)
    encoded = processor(**observation, actions=actions)["actions"]
    wide = torch.nn.functional.pad(encoded, (0, 25), value=9.0)
    for keys in (None, "robot", ["robot", "robot"]):
        decoded = processor.decode_actions(VLAOutput(actions=wide), keys)
        np.testing.assert_allclose(decoded, actions, atol=1e-6)
        assert decoded.dtype == np.float32


def test_every_sample_is_decoded_with_its_own_statistics(config, processor):
    entry = processor.statistics["robot"]
    twice = {**entry, "action": {"mean": [0.0] * 7, "std": [2.0] * 7}}
    narrow = {**entry, "action": {"mean": [0.0] * 3, "std": [1.0] * 3}}
    statistics = {"robot": entry, "twice": twice, "narrow": narrow}
    several = PI0VLAProcessor.from_scratch(config, statistics, processor.action_config, processor.camera_config)
    output = VLAOutput(actions=torch.ones(2, 4, 32))
    first, second = several.decode_actions(output, ["robot", "twice"])
    np.testing.assert_allclose(first, np.broadcast_to([0.6] * 6 + [1.0], (4, 7)), rtol=1e-6)
    np.testing.assert_allclose(second, np.full((4, 7), 2.0), rtol=1e-6)
    assert several.decode_actions(output, ["narrow", "narrow"]).shape == (2, 4, 3)
    third, fourth = several.decode_actions(output, ["narrow", "twice"])
    assert (third[:, :3] == 1.0).all() and np.isnan(third[:, 3:]).all() and np.array_equal(fourth, second)


def test_robots_of_different_sizes_share_a_batch(config, processor, model, observation):
    """Each is padded to pi0's own width whoever else is there, so that it is what it is alone."""
    narrow = {"action": {"mean": [0.0] * 3, "std": [1.0] * 3}, "state": {"mean": [1.0] * 2, "std": [1.0] * 2}}
    cameras = {"default": processor.camera_config["robot"], "narrow": processor.camera_config["robot"][:1]}
    several = PI0VLAProcessor.from_scratch(
        config, processor.statistics | {"narrow": narrow}, processor.action_config, cameras
    )
    alone = PI0VLAProcessor.from_scratch(config, {"narrow": narrow}, processor.action_config, cameras)
    rng, (images, _) = np.random.default_rng(4), observation["images"]
    images = [images, {"front": images["front"], "wrist": None}]
    rows = {"state": [rng.normal(size=5), rng.normal(size=2)], "actions": [rng.normal(size=(4, n)) for n in (7, 3)]}
    batch = several(images=images, text="go", unnorm_key=["robot", "narrow"], **rows)
    assert batch["actions"].shape == (2, 4, 7) and not batch["actions"][1, :, 3:].any()
    assert batch["action_mask"].shape == (2, 4) and batch["pixel_attention_mask"].tolist() == [
        [True] * 2,
        [True, False],
    ]
    one = alone(images=images[1], text="go", **{name: values[1] for name, values in rows.items()})
    noise, time = torch.randn(1, 4, 32), torch.tensor([0.3])
    second = {name: value[1:] for name, value in batch.items() if name != "pixel_values"}
    second |= {"pixel_values": batch["pixel_values"][1:, :1], "pixel_attention_mask": one["pixel_attention_mask"]}
    second |= {name: second[name][:, : one["input_ids"].shape[1]] for name in ("input_ids", "attention_mask")}
    expected = model(**one, noise=noise, timestep=time).loss
    torch.testing.assert_close(model(**second, noise=noise, timestep=time).loss, expected)


def test_it_sees_the_present_alone(config, processor):
    arguments = (processor.statistics, processor.action_config | {"n_obs_steps": 3}, processor.camera_config)
    with pytest.raises(ValueError, match="A PI0VLAProcessor is of a model that sees one observation.*came 3"):
        PI0VLAProcessor.from_scratch(config, *arguments)


@pytest.mark.parametrize(("name", "what"), [("max_action_dim", "actions"), ("max_state_dim", "states")])
def test_robots_that_are_too_wide_are_refused(processor, name, what):
    config = PI0VLAConfig.from_preset("tiny", **{name: 4})
    arguments = (processor.statistics, processor.action_config, processor.camera_config)
    with pytest.raises(ValueError, match=f"This pi0 takes {what} of at most 4 numbers, those of 'robot' have [57]"):
        PI0VLAProcessor.from_scratch(config, *arguments)


def test_blanks_around_an_instruction_are_dropped_and_it_may_be_empty(processor, observation):
    """There are datasets without instructions."""
    plain, blank = (processor(**{**observation, "text": text})["input_ids"] for text in ("go", "  go\n"))
    assert torch.equal(plain, blank)
    empty = processor(**{**observation, "text": " "})["input_ids"]
    assert processor.tokenizer.decode(empty[0, 32:]) == "<bos>\n"


def test_pixels_do_not_depend_on_torchvision(processor, observation):
    """Transformers gives torchvision's backend to whoever has torchvision."""
    image_processor = SiglipImageProcessor(**processor.image_processor.to_dict())
    dictionaries = (processor.statistics, processor.action_config, processor.camera_config)
    other = PI0VLAProcessor(image_processor, processor.tokenizer, *dictionaries)
    assert torch.equal(other(**observation)["pixel_values"], processor(**observation)["pixel_values"])


def test_decoding_needs_actions_and_a_key_each(processor):
    with pytest.raises(ValueError, match="without `actions`"):
        processor.decode_actions(VLAOutput(loss=torch.zeros(())))
    with pytest.raises(ValueError, match="1 predictions and 2 unnorm_keys"):
        processor.decode_actions(VLAOutput(actions=torch.zeros(1, 4, 32)), ["robot", "robot"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "no images"),
        ({"text": None}, "no text"),
        ({"text": ["go"]}, "2 images, 1 texts"),
        ({"text": ["go", 3]}, "instruction in words, got 3"),
        ({"text": "go <image> there"}, "control tokens \\['<image>'\\]"),
        ({"state": None}, "needs the robot's state"),
        ({"state": np.zeros((2, 4))}, "states of shape \\(..., 5\\)"),
        ({"state": np.zeros((3, 5))}, "state of shape \\(2, S\\), one row per sample, got \\(3, 5\\)"),
        (
            {"images": [np.zeros((8, 8, 3), np.uint8)] * 2},
            "a dictionary with an image \\(or None\\) for \\['front', 'wrist'\\]",
        ),
        ({"images": [{"front": None}] * 2}, "\\['front', 'wrist'\\], got those of \\['front'\\]"),
        (
            {"images": [{"front": None, "wrist": None, "rear": np.zeros((8, 8, 3), np.uint8)}] * 2},
            "those of \\['front', 'wrist', 'rear'\\]",
        ),
        ({"images": [{"front": None, "wrist": None}] * 2}, "at least one camera, got none for the samples \\[0, 1\\]"),
        ({"depth": np.ones((8, 8))}, "takes no depth"),
        ({"intrinsics": np.eye(3)}, "takes no intrinsics"),
        ({"unnorm_key": "robt"}, "Did you mean 'robot'"),
        ({"actions": np.zeros((1, 4, 7))}, "actions of shape \\(2, T, D\\)"),
        ({"actions": np.zeros((2, 4, 7)), "action_mask": np.ones((2, 3))}, "an action_mask of shape \\(2, T\\)"),
    ],
)
def test_what_is_wrong_is_said(processor, observation, change, message):
    with pytest.raises(ValueError, match=message):
        processor(**{**observation, **change})


def test_one_camera_takes_plain_images(config, processor):
    image = np.zeros((60, 80, 3), np.uint8)
    for cameras in ({}, {"default": [{"name": None, "width": 80, "height": 60}]}):
        plain = PI0VLAProcessor.from_scratch(config, processor.statistics, STATELESS, cameras)
        inputs = plain(images=image, text="go")
        assert inputs["pixel_values"].shape == (1, 1, 3, 56, 56) and inputs["state"].tolist() == [[0.0]]
        with pytest.raises(ValueError, match="takes no state"):
            plain(images=image, text="go", state=np.zeros(5))


def test_datasets_of_a_batch_may_have_different_cameras(config, processor):
    two = {"a": processor.statistics["robot"], "b": processor.statistics["robot"]}
    front, rear = ({"name": name, "width": 8, "height": 8} for name in ("front", "rear"))
    mixed = PI0VLAProcessor.from_scratch(config, two, STATELESS, {"a": [front], "b": [front, rear]})
    image = np.full((8, 8, 3), 255, np.uint8)
    inputs = mixed(images=[image, {"front": None, "rear": image}], text="go", unnorm_key=["a", "b"])
    assert inputs["pixel_attention_mask"].tolist() == [[True, False], [False, True]]
    assert (inputs["pixel_values"] == 1).flatten(2).all(-1).tolist() == [[True, False], [False, True]]


def test_cameras_of_a_dataset_or_the_default(config, processor):
    two = {"a": processor.statistics["robot"], "b": processor.statistics["robot"]}
    front, rear = ({"name": name, "width": 8, "height": 8} for name in ("front", "rear"))
    several = PI0VLAProcessor.from_scratch(config, two, STATELESS, {"a": [front], "default": [rear, front]})
    assert [camera.name for camera in several.camera_specs("a")] == ["front"]
    assert [camera.name for camera in several.camera_specs("b")] == ["rear", "front"]
    with pytest.raises(ValueError, match="No action statistics for 'c'"):
        several.camera_specs("c")
    own = PI0VLAProcessor.from_scratch(config, two, STATELESS, {"a": [front]})
    with pytest.raises(ValueError, match="No cameras for 'b'; this checkpoint knows those of \\['a'\\]"):
        own.camera_specs("b")
    assert PI0VLAProcessor.from_scratch(config, two, STATELESS, {}).camera_specs("b") == ()


@pytest.mark.parametrize("names", [[], ["front", "front"], ["front", None]])
def test_cameras_have_different_names(config, processor, names):
    cameras = {"robot": [{"name": name, "width": 8, "height": 8} for name in names]}
    with pytest.raises(ValueError, match="Expected .*cameras.* in camera_config\\['robot'\\]"):
        PI0VLAProcessor.from_scratch(config, processor.statistics, STATELESS, cameras)


def test_tokenizer_has_the_image_token_of_the_config(processor):
    config = PI0VLAConfig.from_preset("tiny")
    config.vlm_config.image_token_id = 7
    with pytest.raises(ValueError, match="to have the id 7 of the config, got 259"):
        PI0VLAProcessor.from_scratch(config, processor.statistics, STATELESS, {})


def test_saved_and_loaded_it_is_the_same(processor, observation, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is PI0VLAProcessor
    assert loaded.camera_specs("robot") == processor.camera_specs("robot")
    actions = np.ones((2, 4, 7))
    first, second = (each(**observation, actions=actions) for each in (processor, loaded))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
