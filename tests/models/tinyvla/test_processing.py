import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

from hf_vla.actions.codec import ActionCodec
from hf_vla.models.byte_tokenizer import byte_tokenizer
from hf_vla.models.outputs import VLAOutput
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.processing_tinyvla import TinyVLAProcessor

IMAGE = 259  # id of the image token
CONFIGS = ("statistics", "action_config", "camera_config", "prompt_config")


@pytest.fixture(scope="module")
def processor(make_processor):
    return make_processor()


@pytest.fixture
def inputs(pictures):
    return {"images": pictures, "text": ["push", "pick up the red cube"], "state": np.array([[0.5, 3.0], [1.0, 1.0]])}


def rebuilt(processor, **changes):
    """The same processor with some of its parameters changed."""
    given = {name: getattr(processor, name) for name in ("image_processor", "tokenizer", *CONFIGS)}
    return TinyVLAProcessor(**given | changes)


def pythia_like(image_processor):
    tokenizer = byte_tokenizer(0)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    return SimpleNamespace(image_processor=image_processor, tokenizer=tokenizer)


@pytest.mark.parametrize("training", [True, False])
def test_published_prompt_in_training_and_inference(goldens, make_processor, training, chunks):
    """The published evaluation script forgets a blank and keeps those around the instruction."""
    vlm = pythia_like(LlavaImageProcessorPil())
    processor = make_processor("llava_clip", vlm)
    prompts = json.loads((goldens / "tinyvla_pipeline" / "prompts.json").read_text())["prompts"]
    for text, published in prompts.items():
        actions = {"actions": chunks[0]} if training else {}
        image = np.zeros((8, 8, 3), np.uint8)
        batch = processor(images={"front": image, "wrist": image}, text=text, state=[0.0, 0.0], **actions)
        decoded = processor.tokenizer.decode(batch["input_ids"][0])
        assert decoded.replace("<image>" * 32, "<image>") == published["train"]


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("shape", ["wide", "tall", "square"])
def test_published_image_preprocessing(goldens, make_processor, tower, shape):
    """Padded to a square with the mean colour, resized bicubically, normalised; to the last bit."""
    folder = goldens / "tinyvla_pipeline"
    arrays, entry = load_file(folder / "images.safetensors"), json.loads((folder / "images.json").read_text())
    constants = entry[f"{shape}_{tower}"]
    processor = make_processor(
        "llava_clip",
        pythia_like(
            LlavaImageProcessorPil(
                do_pad=True,
                do_center_crop=False,
                size={"height": 28, "width": 28},
                image_mean=constants["mean"],
                image_std=constants["std"],
            )
        ),
    )
    first, second = torch.from_numpy(arrays[f"{shape}_input_u8"])
    pixels = processor(images={"front": first, "wrist": second}, text="push", state=[0.0, 0.0])["pixel_values"]
    assert np.array_equal(pixels.numpy(), arrays[f"{shape}_{tower}_train"])


def test_published_normalisation(goldens, processor):
    """Actions min-max with a margin, states as z-scores whose std is 0.01 at least; padding excepted."""
    arrays = load_file(goldens / "tinyvla_pipeline" / "dataset.safetensors")
    info = json.loads((goldens / "tinyvla_pipeline" / "dataset.json").read_text())
    actions = np.concatenate([arrays["ep0_action"], arrays["ep1_action"]])
    statistics = {
        "action": {"min": actions.min(0), "max": actions.max(0)},
        "state": {"mean": arrays["stat_qpos_mean"], "std": arrays["stat_qpos_std"]},
    }
    codec = ActionCodec({"robot": statistics}, processor.action_config | {"chunk_size": 6})
    rows = [row for row in info["rows"] if row["kind"] == "diffusion"]
    for row in rows:
        episode, step = row["episode_and_start"]
        real = ~arrays[f"diffusion_{row['index']}_is_pad"]
        start = max(0, step - 1)
        chunk = np.zeros((6, 10))
        chunk[real] = arrays[f"ep{episode}_action"][start : start + real.sum()]
        published = arrays[f"diffusion_{row['index']}_action"]
        # Dimension 3 is constant: 0 in ours, float32's rounding divided by the margin in theirs.
        error = np.abs(codec.encode(chunk) - published)[real].max(0)
        assert error[3] < 1e-4 and np.delete(error, 3).max() < 2e-6
        np.testing.assert_allclose(codec.decode(published)[real], chunk[real], rtol=0, atol=2e-6)
        state = arrays[f"ep{episode}_qpos"][step]
        np.testing.assert_allclose(
            codec.encode_state(state), arrays[f"diffusion_{row['index']}_state"], rtol=0, atol=5e-7
        )
    assert len(rows) == 8


def test_batch(processor, inputs, chunks):
    mask = np.array([[True] * 4, [True, True, False, False]])
    batch = processor(**inputs, actions=chunks, action_mask=mask)
    assert batch["pixel_values"].shape == (4, 3, 28, 28) and batch["pixel_values"].dtype == torch.float32
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert ((batch["input_ids"] == IMAGE).sum(-1) == 32).all()
    expected = 2 * (chunks - [-1.0001, -1e-4, -1e-4]) / [2.0002, 2.0002, 4.0002] - 1
    expected[1, 2:] = 0.0  # padded, in normalised units
    np.testing.assert_allclose(batch["actions"], expected, atol=1e-6)
    assert batch["actions"].dtype == torch.float32 and torch.equal(batch["action_mask"], torch.from_numpy(mask))
    torch.testing.assert_close(batch["state"], torch.tensor([[0.5, 1.0], [1.0, 0.0]]))


def test_one_of_a_batch_is_the_sample_alone(processor, inputs, chunks):
    together = processor(**inputs, actions=chunks)
    for index in range(2):
        alone = processor(**{name: value[index] for name, value in inputs.items()}, actions=chunks[index])
        length = alone["input_ids"].shape[1]
        assert torch.equal(alone["pixel_values"], together["pixel_values"][2 * index : 2 * index + 2])
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(together[name][index, :length], alone[name][0])
            assert not together[name][index, length:].any()
        for name in ("state", "actions", "action_mask"):
            assert torch.equal(together[name][index], alone[name][0])


def test_what_stands_at_a_padded_action_does_not_matter(processor, inputs, chunks):
    mask = np.array([True, True, False, False])
    sample = {name: value[0] for name, value in inputs.items()}
    first = processor(**sample, actions=chunks[0], action_mask=mask)
    chunks[0, 2:] = np.nan
    second = processor(**sample, actions=chunks[0], action_mask=mask)
    assert torch.equal(first["actions"], second["actions"])


def test_images_stand_in_the_order_of_the_cameras(processor, inputs):
    """Whatever the order of the dictionary, and of the alphabet."""
    swapped = {**inputs, "images": [dict(reversed(views.items())) for views in inputs["images"]]}
    pixels = processor(**inputs)["pixel_values"]
    assert torch.equal(pixels, processor(**swapped)["pixel_values"])
    cameras = {"robot": processor.camera_config["robot"][::-1]}
    wrist_first = rebuilt(processor, camera_config=cameras)
    assert [camera.name for camera in wrist_first.camera_specs()] == ["wrist", "front"]
    for each in (inputs, swapped):
        assert torch.equal(wrist_first(**each)["pixel_values"], pixels[[1, 0, 3, 2]])
    for image, name in zip(pixels, ("front", "wrist"), strict=False):
        picture = processor.image_processor(inputs["images"][0][name], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(image, picture)


@pytest.mark.parametrize(("missing", "masked"), [("front", slice(0, 16)), ("wrist", slice(16, 32))])
def test_a_missing_camera_is_masked(processor, inputs, missing, masked):
    inputs["images"][1][missing] = None
    batch = processor(**inputs)
    positions = (batch["input_ids"][1] == IMAGE).nonzero()[:, 0]
    expected = (batch["input_ids"] != 0).long()
    expected[1, positions[masked]] = 0
    assert torch.equal(batch["attention_mask"], expected)
    black = batch["pixel_values"][2 + (missing == "wrist")]
    assert torch.equal(black, torch.full_like(black, -1.0))


@pytest.mark.parametrize("form", ["list", "array", "tensor"])
def test_one_camera_takes_bare_images(processor, pictures, form):
    single = rebuilt(processor, camera_config={"default": [{"name": "front", "width": 40, "height": 30}]})
    array = np.stack([picture["front"] for picture in pictures])
    images = {"list": list(array), "array": array, "tensor": torch.from_numpy(array).permute(0, 3, 1, 2)}[form]
    batch = single(images=images, text="push", state=np.zeros((2, 2)))
    named = single(images=[{"front": image} for image in array], text="push", state=np.zeros((2, 2)))
    assert torch.equal(batch["pixel_values"], named["pixel_values"]) and batch["pixel_values"].shape[0] == 2
    alone = single(images=Image.fromarray(array[0]), text="push", state=[0.0, 0.0])
    assert torch.equal(alone["pixel_values"], batch["pixel_values"][:1])
    undeclared = rebuilt(processor, camera_config=None)
    assert torch.equal(undeclared(images=array[0], text="push", state=[0.0, 0.0])["input_ids"], alone["input_ids"])
    assert undeclared.camera_specs("robot") == () and len(single.camera_specs("robot")) == 1


def test_every_dataset_has_its_cameras_and_statistics(processor, pictures):
    statistics = {
        "one": {"action": {"min": [0.0] * 3, "max": [1.0] * 3}, "state": {"mean": [0.0, 0.0], "std": [1.0, 1.0]}},
        "two": {"action": {"min": [0.0] * 3, "max": [2.0] * 3}, "state": {"mean": [1.0, 1.0], "std": [1.0, 1.0]}},
    }
    front, wrist = processor.camera_config["robot"]
    several = rebuilt(processor, statistics=statistics, camera_config={"default": [front, wrist], "two": [wrist]})
    assert [spec.name for spec in several.camera_specs("one")] == ["front", "wrist"]
    assert [spec.name for spec in several.camera_specs("two")] == ["wrist"]
    with pytest.raises(ValueError, match=r"Several datasets have action statistics; choose unnorm_key among"):
        several(images=pictures[0], text="push", state=[1.0, 1.0])
    images, states = [pictures[0], {"wrist": pictures[1]["wrist"]}], np.ones((2, 2))
    batch = several(images=images, text="push", state=states, unnorm_key=["one", "two"], actions=np.ones((2, 4, 3)))
    assert batch["pixel_values"].shape[0] == 3
    torch.testing.assert_close(batch["state"], torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(batch["actions"][:, 0, 0], torch.tensor([2 * 1.0001 / 1.0002 - 1, 0.0]))
    decoded = several.decode_actions(VLAOutput(actions=batch["actions"]), ["one", "two"])
    np.testing.assert_allclose(decoded, np.ones((2, 4, 3)), atol=1e-6)
    own = rebuilt(several, camera_config={"two": [wrist]})
    with pytest.raises(ValueError, match=r"No cameras for 'one'; this checkpoint knows those of \['two'\]"):
        own.camera_specs("one")


def test_save_and_load(processor, inputs, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is TinyVLAProcessor
    for name in CONFIGS:
        assert getattr(again, name) == getattr(processor, name)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["prompt_config"]["image_seq_length"] == 16 and saved["camera_config"]["robot"][1]["name"] == "wrist"
    first, second = processor(**inputs), again(**inputs)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_round_trip_in_robot_units(processor, inputs, chunks):
    batch = processor(**inputs, actions=chunks)
    decoded = processor.decode_actions(VLAOutput(actions=batch["actions"]))
    np.testing.assert_allclose(decoded, chunks, atol=1e-6)
    assert decoded.dtype == np.float32
    half = processor.decode_actions(VLAOutput(actions=batch["actions"].bfloat16()), "robot")
    np.testing.assert_allclose(half, chunks, atol=0.05)


def test_measurements_are_not_cast(processor, inputs, chunks):
    batch = processor(**inputs, actions=chunks)
    state, actions = batch["state"].clone(), batch["actions"].clone()
    batch = batch.to("cpu", torch.bfloat16)
    assert batch["pixel_values"].dtype == torch.bfloat16 and batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["state"], state) and torch.equal(batch["actions"], actions)


def test_numpy_output(processor, inputs, chunks):
    batch = processor(**inputs, actions=chunks, return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in batch.values())


def test_a_checkpoint_without_a_state(processor, inputs):
    stateless = rebuilt(processor, action_config=processor.action_config | {"state_normalization": None})
    with pytest.raises(ValueError, match="This checkpoint takes no state; leave `state` out"):
        stateless(**inputs)
    del inputs["state"]
    assert "state" not in stateless(**inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": None}, "Expected `images` and `text`, got no text"),
        ({"images": None}, "Expected `images` and `text`, got no images"),
        ({"text": ["a", "b", "c"]}, "Got 2 images, 3 texts and 2 unnorm_keys"),
        ({"state": None}, "This checkpoint needs the robot's state: give `state`"),
        ({"state": np.zeros(2)}, r"Expected a state of shape \(2, S\), one row per sample, got \(1, 2\)"),
        ({"state": np.zeros((2, 3))}, r"Expected states of shape \(..., 2\), came \(3,\)"),
        ({"state": np.full((2, 2), np.nan)}, "Expected finite states, came nan"),
        ({"state": [["0.1", "0.2"]] * 2}, "Expected a state of numbers, got <U3"),
        ({"state": [[0.1, None]] * 2}, "Expected a state of numbers, got object"),
        ({"images": [{"front": None, "wrist": None}] * 2}, r"at least one camera, got none for the samples \[0, 1\]"),
        ({"depth": np.zeros((4, 4))}, "This model takes no depth"),
        ({"intrinsics": np.eye(3)}, "This model takes no intrinsics"),
        ({"reasoning": "the cube is red"}, "This model takes no reasoning"),
        ({"text": "push <image>"}, r"got the control tokens \['<image>'\] in it: 'push <image>'"),
        ({"text": "push<eos>"}, r"control tokens \['<eos>'\] in it"),
        ({"text": 3}, "Expected `text` to be a text, or a list with one per sample, got 3"),
        ({"text": ["push", None]}, "Expected an instruction in words, got None"),
        ({"images": [], "text": []}, "Got 0 images"),
        ({"unnorm_key": "robo"}, r"No action statistics for 'robo'.*Did you mean 'robot'"),
        ({"actions": np.zeros((1, 4, 3))}, r"Expected actions of shape \(2, T, D\).*got \(1, 4, 3\)"),
        ({"actions": np.zeros((2, 5, 3))}, "chunk_size=4"),
        ({"actions": np.full((2, 4, 3), np.nan)}, "Expected finite actions"),
    ],
)
def test_bad_input(processor, inputs, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**inputs | arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda views: views.pop("wrist"), r"of the cameras \['front', 'wrist'\], got those of \['front'\]"),
        (lambda views: views.update(side=views["front"]), r"got those of \['front', 'wrist', 'side'\]"),
    ],
)
def test_undeclared_or_forgotten_cameras(processor, inputs, change, message):
    change(inputs["images"][1])
    with pytest.raises(ValueError, match=message):
        processor(**inputs)


def test_bare_images_cannot_be_told_apart(processor, inputs):
    inputs["images"] = [views["front"] for views in inputs["images"]]
    with pytest.raises(ValueError, match=r"give a dictionary with an image \(or None\) for \['front', 'wrist'\]"):
        processor(**inputs)


CAMERA = {"name": "front", "width": 40, "height": 30}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"camera_config": {"robot": CAMERA}}, r"Expected a list of cameras in camera_config\['robot'\]"),
        ({"camera_config": {"robot": []}}, "Expected a list of cameras"),
        ({"camera_config": {"robot": [CAMERA, CAMERA]}}, r"different names .*got \['front', 'front'\]"),
        ({"camera_config": {"robot": [CAMERA, CAMERA | {"name": None}]}}, "different names"),
        ({"camera_config": {"robot": [CAMERA | {"depth": True}]}}, "This model takes no depth"),
        ({"prompt_config": None}, r"Expected a prompt_config with \['template'"),
        ({"prompt_config": {"template": "{images}{instruction}", "image_token": "<image>"}}, "image_seq_length"),
        (
            {"prompt_config": {"template": "{images}", "image_token": "<image>", "image_seq_length": 16}},
            r"Expected \{instruction\} once in prompt_config\['template'\]",
        ),
        (
            {"prompt_config": {"template": "{images}{instruction}", "image_token": "<img>", "image_seq_length": 16}},
            "Expected <img> of prompt_config.'image_token'. to be one token",
        ),
    ],
)
def test_bad_configuration(processor, changes, message):
    with pytest.raises(ValueError, match=message):
        rebuilt(processor, **changes)


def test_unknown_keys_and_action_tokens_are_refused(processor):
    with pytest.raises(ValueError, match=r"Unknown keys \['imgae_prefix'\] in prompt_config"):
        rebuilt(processor, prompt_config=processor.prompt_config | {"imgae_prefix": ""})
    tokens = {"tokenizer": {"type": "uniform", "n_bins": 8, "action_dim": 3}}
    with pytest.raises(ValueError, match="This model predicts continuous actions"):
        rebuilt(processor, action_config=processor.action_config | tokens)


def test_undecodable_output(processor):
    with pytest.raises(ValueError, match="got a VLAOutput without `actions`"):
        processor.decode_actions(VLAOutput(action_ids=torch.zeros(1, 12)))
    with pytest.raises(ValueError, match="Got 2 predictions and 1 unnorm_keys"):
        processor.decode_actions(VLAOutput(actions=torch.zeros(2, 4, 3)), ["robot"])


def test_an_instruction_cannot_fill_the_template(processor, inputs):
    first = processor(**inputs | {"text": "{images}"})
    assert ((first["input_ids"] == IMAGE).sum(-1) == 32).all()


def test_readout_tokens_end_the_prompt(make_processor, inputs):
    processor = make_processor(num_readout_tokens=3)
    batch = processor(**inputs)
    ids = batch["input_ids"]
    assert ids[1, -3:].tolist() == [260, 261, 262] and batch["attention_mask"][1, -3:].all()
    assert processor.prompt_config["readout"] == "<readout000><readout001><readout002>"
    with pytest.raises(ValueError, match=r"control tokens \['<readout001>'\]"):
        processor(**inputs | {"text": "push <readout001>"})
    again = make_processor(vlm=processor, num_readout_tokens=1)  # a new head on a TinyVLA's backbone
    assert again(**inputs)["input_ids"][1].tolist() == ids[1, :-2].tolist()
    with pytest.raises(ValueError, match="Expected <readout000> to have the id 270.*tokenizer's length, 260"):
        make_processor(num_readout_tokens=1, readout_token_id=270)


def test_a_backbone_needs_its_prompt_and_its_image_token(make_processor, make_config, processor):
    config = make_config()
    config.backbone_config.model_type = "llava_next"
    arguments = (config, processor.statistics, processor.action_config, processor.camera_config)
    vlm = pythia_like(processor.image_processor)
    with pytest.raises(
        ValueError, match=r"No prompt is known for a backbone 'llava_next' with.* only for \['idefics3'"
    ):
        TinyVLAProcessor.from_backbone(vlm, *arguments)
    prompt = {"template": "{bos}{images}{instruction}{eos}"}
    with pytest.raises(ValueError, match=r"of a 'llava_next' does not tell how many tokens.*'image_seq_length'"):
        TinyVLAProcessor.from_backbone(vlm, *arguments, prompt)
    custom = TinyVLAProcessor.from_backbone(vlm, *arguments, {**prompt, "image_seq_length": 7})
    assert custom.prompt_config["template"] == "<bos>{images}{instruction}<|endoftext|>"
    assert custom.prompt_config["image_seq_length"] == 7
    again = TinyVLAProcessor.from_backbone(custom, *arguments)
    assert again.prompt_config == custom.prompt_config
    with pytest.raises(ValueError, match="Expected the image token '<image>' in prompt_config.*got '<img>'"):
        TinyVLAProcessor.from_backbone(vlm, *arguments, {**prompt, "image_token": "<img>"})
    config = make_config(
        backbone_config=config.backbone_config.to_dict() | {"model_type": "llava", "image_token_index": 258}
    )
    with pytest.raises(ValueError, match="Expected an added token for images with the config's id 258"):
        TinyVLAProcessor.from_backbone(vlm, config, *arguments[1:])


def test_a_llavas_prompt_is_known_for_pythia_alone(make_config, processor):
    llama = {**make_config().get_text_config().to_dict(), "model_type": "llama"}
    backbone = make_config().backbone_config.to_dict() | {"text_config": llama}
    arguments = (make_config(backbone_config=backbone), *(getattr(processor, name) for name in CONFIGS[:3]))
    with pytest.raises(ValueError, match="'llava' with a language model 'llama', only for .*Llava with GPT-NeoX"):
        TinyVLAProcessor.from_backbone(pythia_like(processor.image_processor), *arguments)


@pytest.mark.parametrize(
    ("backbone", "start"), [("idefics3", "<|begin_of_text|>User:<fake"), ("smolvlm", "<|im_start|>User:<fake")]
)
def test_prompts_of_idefics_and_smolvlm(make_processor, inputs, backbone, start):
    processor = make_processor(backbone)
    decoded = processor.tokenizer.decode(processor(**inputs)["input_ids"][1])
    assert decoded.startswith(start) and decoded.endswith("pick up the red cube<end_of_utterance>\nAssistant:")


@pytest.mark.parametrize("name", ["template", "image_prefix", "image_suffix"])
def test_tokens_of_the_prompt_must_be_tokens(processor, name):
    prompt = processor.prompt_config | {name: processor.prompt_config.get(name, "") + "<|im_start|>"}
    with pytest.raises(ValueError, match=rf"Expected <\|im_start\|> of prompt_config\['{name}'\] to be one token"):
        rebuilt(processor, prompt_config=prompt)
    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    tokenizer.add_tokens(["<image>", "<eos>"], special_tokens=True)
    with pytest.raises(ValueError, match="to be one token, but the tokenizer does not know it"):
        rebuilt(processor, tokenizer=tokenizer, prompt_config=prompt)
    tokenizer.add_tokens(["<|im_start|>"])
    assert rebuilt(processor, tokenizer=tokenizer, prompt_config=prompt).prompt_config == prompt


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 5}, "a chunk_size of 5, as the config says, got 4"),
        ({"action_dim": 7}, "an action_dim of 'robot' of 7, as the config says, got 3"),
        ({"state_dim": 9}, "a state_dim of 'robot' of 9, as the config says, got 2"),
        ({"state_dim": None}, "a state_dim of 'robot' of None, as the config says, got 2"),
    ],
)
def test_actions_and_states_are_of_the_models_sizes(make_processor, change, message):
    with pytest.raises(ValueError, match=message):
        make_processor(**change)


def test_pictures_are_taken_whole(make_processor):
    for backbone, name in (
        ("smolvlm", "do_image_splitting"),
        ("idefics2", "do_image_splitting"),
        ("internvl", "crop_to_patches"),
        ("gemma3", "do_pan_and_scan"),
    ):
        assert getattr(make_processor(backbone).image_processor, name) is False
    # not enlarged first for pieces that nobody cuts
    assert dict(make_processor("smolvlm").image_processor.size) == {"longest_edge": 28}
    assert dict(make_processor("idefics2").image_processor.size) == {"shortest_edge": 28, "longest_edge": 28}


def test_pixels_do_not_depend_on_torchvision(processor, inputs):
    """Transformers gives torchvision's backend to whoever has torchvision."""
    options = processor.image_processor.to_dict()
    other = rebuilt(processor, image_processor=SiglipImageProcessor(**options))
    assert type(other.image_processor) is type(processor.image_processor)
    assert torch.equal(other(**inputs)["pixel_values"], processor(**inputs)["pixel_values"])


def test_an_instruction_may_be_empty(processor, inputs):
    """There are datasets without instructions."""
    empty, blank = (processor(**inputs | {"text": text})["input_ids"] for text in ("", " \n"))
    assert (
        torch.equal(empty, blank) and empty.shape[1] == processor(**inputs | {"text": "a"})["input_ids"].shape[1] - 1
    )


def test_the_vision_language_models_own_processor_stays_as_it_was(make_processor):
    processor = make_processor("smolvlm", num_readout_tokens=1)
    vlm = SimpleNamespace(image_processor=processor.image_processor, tokenizer=processor.tokenizer)
    length, size = len(vlm.tokenizer), dict(vlm.image_processor.size)
    vlm.image_processor.do_image_splitting = True
    again = make_processor("smolvlm", vlm, num_readout_tokens=3)
    assert len(vlm.tokenizer) == length and vlm.image_processor.do_image_splitting
    assert dict(vlm.image_processor.size) == size and len(again.tokenizer) == length + 2
    assert not again.image_processor.do_image_splitting  # one picture a camera


def test_from_scratch(processor, inputs):
    config = TinyVLAConfig.from_preset("tiny", action_dim=3, state_dim=2, chunk_size=4, num_readout_tokens=2)
    dictionaries = (processor.statistics, processor.action_config, processor.camera_config)
    scratch = TinyVLAProcessor.from_scratch(config, *dictionaries)
    batch = scratch(**inputs)
    assert batch["pixel_values"].shape == (4, 3, 84, 84)
    assert batch["pixel_values"][0, :, 0].abs().max() < 0.02  # the mean colour, above a wide image
    assert ((batch["input_ids"] == config.image_token_id).sum(-1) == 72).all()
    assert batch["input_ids"][1, -2:].tolist() == list(config.readout_token_ids)
    with pytest.raises(
        ValueError, match="an added token for images with the config's id 50277, but the tokenizer has None"
    ):
        TinyVLAProcessor.from_scratch(TinyVLAConfig.from_preset("s"), *dictionaries)
    with pytest.raises(ValueError, match="'qwen2_vl': build its processor with from_backbone"):
        TinyVLAProcessor.from_scratch(TinyVLAConfig(backbone_config={"model_type": "qwen2_vl"}), *dictionaries)
