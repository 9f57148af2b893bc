"""Reading published checkpoints; what all converters share is in tests/models/test_conversion.py."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

import hf_vla  # noqa: F401
from hf_vla.models.conversion import INDEX, convert_checkpoint, rename
from hf_vla.models.outputs import VLAOutput
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.convert_tinyvla import PREFIXES, translate
from hf_vla.models.tinyvla.processing_tinyvla import TinyVLAProcessor

CLIP, SIGLIP = "clip_2cam_a", "siglip_2cam"
STATISTICS = {
    "action_min": [-1.0] * 9 + [0.0],
    "action_max": [1.0] * 9 + [0.5],
    "qpos_mean": [0.5] * 7,
    "qpos_std": [2.0] * 6 + [1e-6],
    "action_mean": [0.0] * 10,
}
EMBEDDING = "gpt_neox.embed_in.weight"


@pytest.fixture
def source(goldens, tmp_path):
    """Write a published checkpoint, changed."""

    def make(case=CLIP, config=None, weights=None, tokens=None):
        published = goldens / "tinyvla" / case / "checkpoint"
        folder = tmp_path / "source"
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps(merged(json.loads((published / "config.json").read_text()), config))
        )
        tensors = load_file(published / "model.safetensors") | (weights or {})
        save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
        if tokens is not None:
            word_tokenizer(tokens).save_pretrained(folder)
        return folder

    return make


def merged(config, changes):
    """Nested changes; None deletes."""
    for name, value in (changes or {}).items():
        if isinstance(value, dict):
            merged(config[name], value)
        elif value is None:
            del config[name]
        else:
            config[name] = value
    return config


def word_tokenizer(count):
    """A few words; stands for GPT-NeoX's tokenizer."""
    words = ["<|endoftext|>", "<|padding|>", "<unk>", *(f"word{index}" for index in range(count - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": words[0], "pad_token": words[1], "unk_token": words[2]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("case", [CLIP, SIGLIP])
def test_every_weight_is_used_or_named_as_dropped(goldens, case):
    published = load_file(goldens / "tinyvla" / case / "checkpoint" / "model.safetensors")
    conversion = translate(goldens / "tinyvla" / case / "checkpoint")
    head = [name for name in published if name.startswith("gpt_neox.vision_tower.vision_model.head.")]
    assert conversion.dropped == sorted(head) and len(head) == (11 if case == SIGLIP else 0)
    kept = {rename(name, PREFIXES): tensor for name, tensor in published.items() if name not in head}
    assert kept.keys() == conversion.weights.keys()
    grown = rename(EMBEDDING, PREFIXES)
    assert all(torch.equal(kept[name], conversion.weights[name]) for name in kept if name != grown)
    assert torch.equal(conversion.weights[grown][:-1], kept[grown]) and not conversion.weights[grown][-1].any()


@pytest.mark.parametrize("case", [CLIP, SIGLIP])
def test_sizes_come_from_config_and_weights(goldens, case):
    published = json.loads((goldens / "tinyvla" / case / "checkpoint" / "config.json").read_text())
    config = translate(goldens / "tinyvla" / case / "checkpoint").model.config
    assert (config.action_dim, config.state_dim, config.chunk_size) == (10, 7, 16)
    unet = {"type": "conditional_unet1d", "kernel_size": 5, "timestep_embedding_dtype": "bfloat16"}
    assert config.head_config == {"type": "diffusion", "denoiser": unet | published["golden_unet"]}
    backbone = config.backbone_config
    assert (backbone.text_config.vocab_size, config.image_token_id) == (97, 96)
    assert backbone.text_config.rope_parameters["partial_rotary_factor"] == 0.25
    assert backbone.vision_config.model_type == f"{case.split('_')[0]}_vision_model"
    assert backbone.image_seq_length == {CLIP: 9, SIGLIP: 4}[case]
    assert backbone.vision_feature_layer == -2
    assert backbone.vision_feature_select_strategy == {CLIP: "default", SIGLIP: "full"}[case]


def test_another_size_of_state_is_seen_in_the_weights(source):
    folder = source(config={"state_dim": 3}, weights={"embed_out.combine.weight": torch.ones(48, 48 + 3)})
    assert translate(folder).model.config.state_dim == 3


def test_options_that_no_weight_tells_are_carried_over(source):
    text = {
        "num_attention_heads": 6,
        "hidden_act": "relu",
        "layer_norm_eps": 1e-3,
        "max_position_embeddings": 64,
        "use_parallel_residual": False,
        "attention_dropout": 0.1,
        "hidden_dropout": 0.2,
    }
    vision = {"num_attention_heads": 8, "hidden_act": "gelu", "layer_norm_eps": 1e-2}
    rope = {"rotary_pct": 0.5, "rotary_emb_base": 500}
    changes = text | rope | {"vision_config": {"vision_tower": vision | {"mm_vision_select_layer": -1}}}
    backbone = translate(source(config=changes)).model.config.backbone_config
    for config, expected in ((backbone.text_config, text), (backbone.vision_config, vision)):
        assert {name: getattr(config, name) for name in expected} == expected
    expected = {"rope_type": "default", "rope_theta": 500, "partial_rotary_factor": 0.5}
    assert backbone.text_config.rope_parameters == expected
    assert backbone.vision_feature_layer == -1


def test_constants_of_older_versions_are_dropped(source):
    constants = {
        "gpt_neox.vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None],
        "gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
    }
    assert translate(source(weights=constants)).dropped == sorted(constants)


def test_missing_left_over_and_other_weights_are_listed(source):
    lost, other = "gpt_neox.mm_projector.2.bias", "embed_out.mid_modules.0.blocks.0.block.0.bias"
    changes = {lost: None, other: torch.zeros(3), "lm_head.weight": torch.zeros(2), EMBEDDING: torch.zeros(5, 48)}
    with pytest.raises(ValueError, match="do not fit its config.json") as error:
        translate(source(weights=changes))
    assert f"Missing: ['{lost}']. Left over: ['lm_head.weight']." in str(error.value)
    assert f"{other} (3,) instead of (48,)" in str(error.value)
    assert f"{EMBEDDING} (6, 48) instead of (97, 48)" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_head_type": "act"}, "Expected action_head_type 'droid_diffusion' in config.json, came 'act'"),
        ({"action_head_type": None}, "Expected action_head_type 'droid_diffusion' in config.json, came None"),
        ({"model_type": "llava"}, "Expected model_type 'llava_pythia' in config.json, came 'llava'"),
        ({"concat": "channel_cat"}, "Expected concat 'token_cat' or 'None'"),
        ({"mm_use_im_start_end": True}, "Expected mm_use_im_start_end False"),
        ({"rope_scaling": {"type": "linear"}}, "Expected rope_scaling None"),
        ({"action_dim": 14}, "config.json says action_dim 14, the weights say 10"),
        ({"state_dim": 9}, "config.json says state_dim 9, the weights say 7"),
        ({"num_attention_heads": None, "rotary_pct": None}, r"Expected \['num_attention_heads'\] in config.json"),
        ({"rotary_pct": None}, r"Expected \['rotary_pct'\]"),
        ({"chunk_size": None}, r"Expected \['chunk_size'\]"),
        ({"vision_config": None}, r"Expected \['vision_config'\]"),
        ({"vision_config": {"mm_projector": {"mm_projector_type": "linear"}}}, "mm_projector_type 'mlp2x_gelu'"),
        (
            {"vision_config": {"vision_tower": {"mm_vision_select_feature": "cls"}}},
            "Expected mm_vision_select_feature",
        ),
        ({"vision_config": {"vision_tower": {"image_size": None}}}, r"\['image_size'\] in vision_config.vision_tower"),
        ({"num_hidden_layers": 3}, r"Missing: \['gpt_neox.layers.2.attention"),
    ],
)
def test_what_this_converter_does_not_know_is_refused(source, changes, message):
    folder = source()
    config = json.loads((folder / "config.json").read_text())
    if "rope_scaling" in changes:
        config["rope_scaling"] = {}
    (folder / "config.json").write_text(json.dumps(merged(config, changes)))
    with pytest.raises(ValueError, match=message):
        translate(folder)


def test_a_checkpoint_without_the_diffusion_head_is_refused(source, goldens):
    weights = load_file(goldens / "tinyvla" / CLIP / "checkpoint" / "model.safetensors")
    head = {name: None for name in weights if name.startswith("embed_out.")}
    with pytest.raises(ValueError, match="Expected the diffusion head's weight embed_out.combine.weight"):
        translate(source(weights=head))


def test_class_tokens_are_kept_where_the_source_says_so(source):
    folder = source(config={"vision_config": {"vision_tower": {"mm_vision_select_feature": "cls_patch"}}})
    backbone = translate(folder).model.config.backbone_config
    assert (backbone.vision_feature_select_strategy, backbone.image_seq_length) == ("full", 10)


@pytest.mark.parametrize(("stored", "chosen"), [("bfloat16", None), ("float32", "bfloat16"), ("float16", "float32")])
def test_precision_is_the_sources_or_the_chosen_one(source, tmp_path, stored, chosen):
    folder = source()
    weights = {name: t.to(getattr(torch, stored)) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    convert_checkpoint(translate, folder, tmp_path / "converted", dtype=chosen)
    model = AutoModel.from_pretrained(tmp_path / "converted")
    expected = getattr(torch, chosen or stored)
    assert {parameter.dtype for parameter in model.parameters()} == {model.dtype} == {expected}
    name = "embed_out.final_conv.1.weight"
    assert torch.equal(model.state_dict()[rename(name, PREFIXES)], weights[name].to(expected))


def test_shards_give_the_same_checkpoint(source, tmp_path):
    folder = source()
    convert_checkpoint(translate, folder, tmp_path / "whole")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(weights)}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in weights.items() if places[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    convert_checkpoint(translate, folder, tmp_path / "shards")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "shards"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def converted(source, tmp_path):
    """Convert a checkpoint with a tokenizer of 60 words for a vocabulary of 96."""

    def make(statistics=STATISTICS, cameras=("left", "right"), **options):
        folder = source(tokens=60, **options)
        path = None if statistics is None else tmp_path / "stats.json"
        if path is not None:
            path.write_text(json.dumps(statistics))
        return convert_checkpoint(translate, folder, tmp_path / "converted", path, cameras), tmp_path / "converted"

    return make


def test_the_image_placeholder_takes_the_tokenizers_next_id(converted):
    conversion, path = converted()
    assert conversion.model.config.image_token_id == 60
    assert len(conversion.weights[rename(EMBEDDING, PREFIXES)]) == 96
    assert AutoProcessor.from_pretrained(path).image_token_id == 60


@pytest.mark.parametrize("case", [CLIP, SIGLIP])
def test_model_and_processor_predict_in_robot_units(converted, case):
    conversion, path = converted(case=case)
    assert conversion.notes == []
    model, processor = AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
    assert [camera.name for camera in processor.camera_specs()] == ["left", "right"]
    size = conversion.model.config.backbone_config.vision_config.image_size
    grey = np.full((20, 30, 3), 200, np.uint8)
    inputs = processor(images=[{"left": grey, "right": None}], text="word3 word4", state=[[2.5] * 6 + [0.51]])
    assert inputs["pixel_values"].shape == (2, 3, size, size)
    torch.testing.assert_close(inputs["state"], torch.tensor([[1.0] * 6 + [1.0]]))  # a std of at least 0.01
    mean, std = (0.48145466, 0.26862954) if case == CLIP else (0.5, 0.5)
    column = inputs["pixel_values"][0, 0, :, size // 2]
    assert column[size // 2].item() == pytest.approx((200 / 255 - mean) / std, abs=1e-5)
    assert abs(column[0]) < 0.02 and abs(column[-1]) < 0.02  # made square with the mean colour
    actions = processor.decode_actions(model.predict_action(**inputs, noise=torch.zeros(1, 16, 10)))
    assert actions.shape == (1, 16, 10) and np.isfinite(actions).all()
    # The published statistics hold the margin of 1e-4 already.
    for end, expected in ((-1.0, STATISTICS["action_min"]), (1.0, STATISTICS["action_max"])):
        decoded = processor.decode_actions(VLAOutput(actions=torch.full((1, 16, 10), end)))
        np.testing.assert_allclose(decoded[0, 0], expected, atol=1e-6)


def test_published_actions_and_states_are_declared(converted, goldens):
    """rot6d's columns are the first two rows of a rotation matrix, as ours."""
    _, path = converted()
    action, state = AutoProcessor.from_pretrained(path).action_codec.specs()
    assert (action.kind, action.rotation, action.gripper) == ("absolute_ee", "rot6d", None)
    assert action.names[:3] == state.names[:3] == ("x", "y", "z") and action.names[-1] == state.names[-1] == "gripper"
    assert (len(action.names), len(state.names), state.rotation) == (10, 7, "euler_xyz")


def test_other_sizes_are_not_declared(source):
    folder = source(tokens=60, config={"state_dim": 3}, weights={"embed_out.combine.weight": torch.ones(48, 48 + 3)})
    processor = translate(folder, STATISTICS | {"qpos_mean": [0.0] * 3, "qpos_std": [1.0] * 3}).processor
    assert processor.action_codec.specs() == (None, None)


@pytest.fixture
def language_model(source, goldens):
    """What TinyVLA was made from: the same model with a language head and no actions."""

    def make(tokens=60, case=CLIP):
        published = load_file(goldens / "tinyvla" / case / "checkpoint" / "model.safetensors")
        head = {name: None for name in published if name.startswith("embed_out.")}
        return source(
            case,
            {"action_head_type": None, "chunk_size": None},
            {**head, "embed_out.weight": torch.ones(96, 48)},
            tokens,
        )

    return make


@pytest.mark.parametrize("case", [CLIP, SIGLIP])
def test_a_vision_language_model_without_an_action_head_becomes_a_llava(language_model, goldens, tmp_path, case):
    conversion = convert_checkpoint(translate, language_model(case=case), tmp_path / "llava")
    assert "embed_out.weight" in conversion.dropped and "model.backbone" in conversion.notes[0]
    model, info = AutoModel.from_pretrained(tmp_path / "llava", output_loading_info=True)
    assert type(model).__name__ == "LlavaModel" and not info["missing_keys"] and not info["unexpected_keys"]
    whole = translate(goldens / "tinyvla" / case / "checkpoint").weights
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole[f"backbone.{name}"][: len(tensor)])
    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    text = processor(images=Image.new("RGB", (8, 8)), text="<image> word3", return_tensors="pt")
    assert model(**text).last_hidden_state.isfinite().all()
    parts = SimpleNamespace(
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "llava"),
        image_processor=AutoImageProcessor.from_pretrained(tmp_path / "llava"),
    )
    config = TinyVLAConfig(backbone_config=model.config)
    new = TinyVLAProcessor.from_backbone(parts, config, None, {"chunk_size": 16}, None)
    count = {CLIP: 9, SIGLIP: 4}[case]
    assert (new.image_token_id, new.prompt_config["image_seq_length"]) == (60, count)
    assert new.image_processor.do_pad and not new.image_processor.do_center_crop


def test_a_vision_language_model_needs_its_tokenizer_and_no_statistics(language_model):
    folder = language_model(tokens=None)
    with pytest.raises(ValueError, match="model without an action head: statistics and cameras are not its, and it"):
        translate(folder)
    word_tokenizer(60).save_pretrained(folder)
    with pytest.raises(ValueError, match="statistics and cameras are not its"):
        translate(folder, STATISTICS)


def test_pixels_are_normalised_as_the_source_says(source):
    folder = source(tokens=60)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [2.0] * 3}))
    pixels = translate(folder).processor.image_processor
    assert (list(pixels.image_mean), list(pixels.image_std)) == ([0.1] * 3, [2.0] * 3)


def test_without_statistics_nothing_is_decoded(converted):
    conversion, path = converted(statistics=None, cameras=())
    assert len(conversion.notes) == 2
    assert "The processor has no statistics" in conversion.notes[0] and "--statistics" in conversion.notes[0]
    assert "The processor takes one image" in conversion.notes[1] and "--camera left" in conversion.notes[1]
    processor = AutoProcessor.from_pretrained(path)
    with pytest.raises(ValueError, match="no action statistics"):
        processor.decode_actions(VLAOutput(actions=torch.zeros(1, 16, 10)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_min": None}, r"Expected \['action_min'\] in the statistics"),
        (
            {"action_min": [0.0] * 14, "action_max": [1.0] * 14},
            "Action statistics of 'tinyvla' have 14 dimensions, the action spec has 10",
        ),
        (
            {"qpos_mean": [0.0] * 6, "qpos_std": [1.0] * 6},
            "State statistics of 'tinyvla' have 6 dimensions, the state spec has 7",
        ),
        ({"qpos_std": [float("nan")] * 7}, "finite"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(source, changes, message):
    with pytest.raises(ValueError, match=message):
        translate(source(tokens=60), merged(dict(STATISTICS), changes))


def test_without_a_tokenizer_there_is_no_processor_to_configure(source):
    folder = source()
    conversion = translate(folder)
    assert conversion.processor is None
    (note,) = conversion.notes
    assert "There is no processor: the source has no tokenizer.json" in note
    for options in ({"statistics": STATISTICS}, {"cameras": ["left"]}):
        with pytest.raises(ValueError, match="Statistics and cameras are kept by the processor. There is no"):
            translate(folder, **options)


def test_a_tokenizer_that_the_embedding_cannot_serve_is_refused(source):
    with pytest.raises(ValueError, match="tokenizer has 97 tokens, its config.json only 96"):
        translate(source(tokens=97))


def test_a_tokenizer_that_cannot_be_read_is_refused(source):
    folder = source(tokens=60)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="Expected a tokenizer in .*tokenizer.json and the files beside it, came"):
        translate(folder)


def test_a_tokenizer_that_fills_the_vocabulary_makes_it_grow(source):
    conversion = translate(source(tokens=96))
    assert conversion.model.config.image_token_id == 96
    assert len(conversion.weights[rename(EMBEDDING, PREFIXES)]) == 97
