"""Reading published checkpoints; what all converters share is in tests/models/test_conversion.py."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoProcessor, PreTrainedTokenizerFast

import hf_vla  # noqa: F401
from hf_vla.models.conversion import convert_checkpoint, rename
from hf_vla.models.divla.convert_divla import PREFIXES, translate
from hf_vla.models.outputs import VLAOutput

ONE, TWO = "unet_b1", "unet_b2_leftpad"
STATISTICS = {
    "action_min": [-1.0] * 13 + [0.0],
    "action_max": [1.0] * 13 + [0.5],
    "qpos_mean": [0.5] * 14,
    "qpos_std": [2.0] * 13 + [1e-6],
    "action_mean": [0.0] * 14,
}
EMBEDDING, LANGUAGE_HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def source(goldens, tmp_path):
    """Write a published checkpoint, changed."""

    def make(case=ONE, config=None, weights=None, tokenizer=False):
        published = goldens / "divla" / case / "checkpoint"
        folder = tmp_path / "source"
        folder.mkdir()
        (folder / "config.json").write_text(
            json.dumps(merged(json.loads((published / "config.json").read_text()), config))
        )
        tensors = load_file(published / "model.safetensors") | (weights or {})
        save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
        if tokenizer:
            word_tokenizer().save_pretrained(folder)
        return folder

    return make


def merged(config, changes):
    """Nested changes; None deletes."""
    for name, value in (changes or {}).items():
        if isinstance(value, dict) and isinstance(config.get(name), dict):
            merged(config[name], value)
        elif value is None:
            del config[name]
        else:
            config[name] = value
    return config


def word_tokenizer():
    """A few words, and the special tokens where the recorded config.json has them; stands for Qwen2-VL's."""
    words = ["<unk>", "Next", "action:", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", *map("word{}".format, range(90))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("Next", "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    tokenizer.add_special_tokens([AddedToken(word) for word in words if word.startswith("<|")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<unk>"
    )


@pytest.mark.parametrize("case", [ONE, TWO])
def test_every_weight_is_used(goldens, case):
    published = load_file(goldens / "divla" / case / "checkpoint" / "model.safetensors")
    conversion = translate(goldens / "divla" / case / "checkpoint")
    assert conversion.dropped == []
    kept = {rename(name, PREFIXES): tensor for name, tensor in published.items()}
    if case == ONE:  # tied
        kept[rename(LANGUAGE_HEAD, PREFIXES)] = published[EMBEDDING]
    assert kept.keys() == conversion.weights.keys()
    assert all(torch.equal(kept[name], conversion.weights[name]) for name in kept)


@pytest.mark.parametrize(("case", "action_dim", "state_dim", "weight"), [(ONE, 14, 14, 1.0), (TWO, 10, 7, 0.5)])
def test_sizes_come_from_config_and_weights(goldens, case, action_dim, state_dim, weight):
    config = translate(goldens / "divla" / case / "checkpoint").model.config
    assert (config.action_dim, config.state_dim, config.chunk_size) == (action_dim, state_dim, 16)
    assert (config.ntp_loss_weight, config.end_token_id, config.max_reasoning_tokens) == (weight, 5, 128)
    assert config.use_film and config.film_includes_end
    denoiser = {"type": "conditional_unet1d", "kernel_size": 5, "n_groups": 8, "timestep_embedding_dtype": "bfloat16"}
    denoiser |= {"down_dims": [16, 32, 48], "diffusion_step_embed_dim": 32}
    assert config.head_config == {"type": "diffusion", "num_inference_steps": 10, "denoiser": denoiser}
    text, vision = config.get_text_config(), config.backbone_config.vision_config
    assert (text.rms_norm_eps, text.rope_parameters["mrope_section"]) == (1e-6, [2, 3, 3])
    assert (vision.depth, vision.embed_dim, vision.patch_size, vision.spatial_merge_size) == (2, 32, 14, 2)
    assert config.image_token_id == 8 and config.backbone_config.vision_start_token_id == 6


def test_what_config_json_leaves_out_is_as_in_the_code_that_wrote_it(source):
    """The vision tower's entry holds what differs from the 7B model's."""
    folder = source(config={"vision_config": None, "rms_norm_eps": None, "rope_theta": None})
    with pytest.raises(ValueError, match=r"visual.blocks.0.attn.proj.bias \(32,\) instead of \(1280,\)") as error:
        translate(folder)
    assert "'visual.blocks.31.norm2.weight'" in str(error.value)  # 32 blocks
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    config = translate(folder).model.config.get_text_config()
    assert config.rms_norm_eps == 1e-5 and config.rope_parameters["rope_theta"] == 1e6


def test_options_that_no_weight_tells_are_carried_over(source):
    text = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "relu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,
        "attention_dropout": 0.1,
    }
    vision = {"num_heads": 4, "hidden_act": "gelu"}
    head = {"num_inference_timesteps": 5, "num_train_timesteps": 50, "n_groups": 4, "prediction_horizon": 12}
    rope = {"rope_theta": 500.0, "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    changes = text | rope | {"vision_config": vision, "policy_head_config": head}
    config = translate(source(config=changes)).model.config
    for part, expected in ((config.get_text_config(), text), (config.backbone_config.vision_config, vision)):
        assert {name: getattr(part, name) for name in expected} == expected
    expected = {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [4, 6, 6]}
    assert config.get_text_config().rope_parameters == expected
    assert config.chunk_size == 12 and config.head_config["num_inference_steps"] == 5
    assert config.head_config["denoiser"]["n_groups"] == 4
    assert config.head_config["scheduler"]["num_train_timesteps"] == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_vl"}, "Expected model_type 'qwen2_vla' in config.json, came 'qwen2_vl'"),
        ({"policy_head_type": "act"}, "Expected policy_head_type 'unet_diffusion_policy' or 'scale_dp_policy' in"),
        ({"policy_head_type": None}, r"Expected \['policy_head_type'\] in config.json; they are missing, and nothing"),
        ({"num_attention_heads": None, "vocab_size": None}, r"Expected \['vocab_size', 'num_attention_heads'\] in"),
        ({"image_token_id": None}, r"Expected \['image_token_id'\] in config.json"),
        ({"rope_scaling": None}, r"Expected \['rope_scaling'\] in config.json"),
        ({"rope_scaling": {"mrope_section": None}}, r"Expected \['mrope_section'\] in rope_scaling"),
        ({"rope_scaling": {"type": "yarn"}}, "Expected type 'default' or 'mrope' in rope_scaling, came 'yarn'"),
        ({"rope_scaling": "mrope"}, "Expected rope_scaling in config.json to hold fields of its own, came 'mrope'"),
        ({"vision_config": [2]}, r"Expected vision_config in config.json to hold fields of its own, came \[2\]"),
        ({"policy_head_config": "{}"}, "Expected policy_head_config in config.json to hold fields .*, came '{}'"),
        ({"eos_token_id": None}, r"Expected \['eos_token_id'\] in config.json"),
        ({"eos_token_id": [1, 2]}, r"the id of one token as eos_token_id .*, came \[1, 2\]: .* source's tokenizer"),
        ({"llm_loss_weight": "much"}, "usual types and values in config.json, came another.*'ntp_loss_weight'"),
        ({"hidden_act": 3}, "usual types and values in config.json, came another.*'hidden_act'"),
        ({"policy_head_config": {"prediction_horizon": None}}, r"\['prediction_horizon'\] in policy_head_config"),
        ({"policy_head_config": {"input_dim": 9}}, "policy_head_config says input_dim 9, the weights say 14"),
        ({"action_dim": 10}, "config.json says action_dim 10, the weights say 14"),
        ({"state_dim": 9}, "config.json says state_dim 9, the weights say 14"),
        ({"num_hidden_layers": 3}, r"Missing: \['model.layers.2.input_layernorm.weight'"),
        ({"tie_word_embeddings": False}, r"Missing: \['lm_head.weight'\]. Left over: \[\]"),
    ],
)
def test_what_this_converter_does_not_know_is_refused(source, changes, message):
    folder = source(config=changes)
    with pytest.raises(ValueError, match=message):
        translate(folder)


@pytest.mark.parametrize("name", ["policy_head_config", "rope_scaling"])
def test_a_field_that_is_null_holds_no_fields(source, name):
    folder = source()
    config = json.loads((folder / "config.json").read_text()) | {name: None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"Expected {name} in config.json to hold fields of its own, came None"):
        translate(folder)


def test_a_whole_number_weighs_the_reasoning(source):
    assert translate(source(config={"llm_loss_weight": 1})).model.config.ntp_loss_weight == 1.0


def test_missing_left_over_and_other_weights_are_listed(source):
    lost, other = "reasoning_film.scale_fc.bias", "policy_head.mid_modules.0.blocks.0.block.0.bias"
    changes = {lost: None, other: torch.zeros(3), "gt_film.weight": torch.zeros(2), EMBEDDING: torch.zeros(5, 64)}
    with pytest.raises(ValueError, match="do not fit its config.json") as error:
        translate(source(weights=changes))
    assert f"Missing: ['{lost}']. Left over: ['gt_film.weight']." in str(error.value)
    assert f"{other} (3,) instead of (48,)" in str(error.value)
    assert f"{EMBEDDING} (5, 64) instead of (160, 64)" in str(error.value)


def test_a_checkpoint_without_its_head_is_refused(source, goldens):
    weights = load_file(goldens / "divla" / ONE / "checkpoint" / "model.safetensors")
    head = {name: None for name in weights if name.startswith("policy_head.")}
    with pytest.raises(ValueError, match="Expected the diffusion head's weight policy_head.combine.weight"):
        translate(source(weights=head))


def test_pickles_are_refused(source):
    folder = source()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Pickled weights"):
        translate(folder)


def test_weights_without_use_are_dropped(source):
    """Constants of older versions, and the language head of a model whose embedding is that, too."""
    unused = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "visual.rotary_pos_emb.inv_freq": torch.ones(4),
        LANGUAGE_HEAD: torch.ones(160, 64),
    }
    conversion = translate(source(weights=unused))
    assert conversion.dropped == sorted(unused)
    ours = conversion.weights[rename(LANGUAGE_HEAD, PREFIXES)]
    assert torch.equal(ours, conversion.weights[rename(EMBEDDING, PREFIXES)]) and not (ours == 1).all()


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_head_is_saved_once_if_it_is_the_embedding(goldens, tmp_path, tied):
    convert_checkpoint(translate, goldens / "divla" / (ONE if tied else TWO) / "checkpoint", tmp_path / "converted")
    model, info = AutoModel.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    names = load_file(tmp_path / "converted" / "model.safetensors").keys()
    assert (rename(LANGUAGE_HEAD, PREFIXES) in names) != tied


def film_weights(goldens, *prefixes):
    weights = load_file(goldens / "divla" / ONE / "checkpoint" / "model.safetensors")
    return [name for name in weights if name.startswith(prefixes)]


def test_a_model_without_film_keeps_nothing_of_it(source, goldens):
    """The published code builds the prompt's projection nevertheless."""
    film = dict.fromkeys(film_weights(goldens, "reasoning_"))
    conversion = translate(source(config={"using_film": False}, weights=film))
    assert conversion.dropped == sorted(film_weights(goldens, "input_action_proj."))
    assert not conversion.model.config.use_film and conversion.model.film is None


SCALE_DP_CONFIG = {"num_heads": 4, "input_dim": 14, "state_dim": 14, "prediction_horizon": 16, "learn_sigma": False}
SCALE_DP_CONFIG |= {"num_train_timesteps": 100, "num_inference_timesteps": 10, "time_as_cond": True}


@pytest.fixture
def with_scale_dp(source, goldens):
    """A published checkpoint with the recorded ScaleDP, made to stand behind 64 features."""
    expert = load_file(goldens / "scaledp" / "scaledp_a" / "weights.safetensors")

    def make(config=None, norm=False):
        generator = torch.Generator().manual_seed(0)
        head = {f"policy_head.{name}": tensor for name, tensor in expert.items()}
        shapes = {"combine.0.weight": (64, 78), "combine.4.weight": (64, 64), "combine.4.bias": (64,)}
        shapes |= {"cond_obs_emb.weight": (64, 64)}
        shapes |= {"norm_after_pool.weight": (64,), "norm_after_pool.bias": (64,)} if norm else {}
        head |= {f"policy_head.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        changes = {"policy_head_type": "scale_dp_policy", "policy_head_config": SCALE_DP_CONFIG | (config or {})}
        return source(config=changes, weights=dict.fromkeys(film_weights(goldens, "policy_head.")) | head), head

    return make


@pytest.mark.parametrize("norm", [False, True])
def test_scale_dp_is_the_other_published_head(with_scale_dp, tmp_path, norm):
    folder, head = with_scale_dp(norm=norm)
    conversion = convert_checkpoint(translate, folder, tmp_path / "converted")
    model = AutoModel.from_pretrained(tmp_path / "converted").eval()
    assert model.config.head_config == {
        "type": "diffusion",
        "num_inference_steps": 10,
        "condition": {"norm": norm, "combine": "mlp", "hidden_dim": 64},
        "denoiser": {
            "type": "dit",
            "hidden_size": 64,
            "depth": 2,
            "num_heads": 4,
            "mlp_ratio": 4.0,
            "timestep_embedding_dtype": "bfloat16",
        },
    }
    assert (model.config.action_dim, model.config.state_dim, model.config.chunk_size) == (14, 14, 16)
    assert conversion.dropped == []
    weights = model.state_dict()
    assert sum(name.startswith("action_head.") for name in weights) == len(head)
    assert all(torch.equal(weights[rename(name, PREFIXES)], tensor) for name, tensor in head.items())
    assert model.predict_action(torch.tensor([[1, 2]]), state=torch.zeros(1, 14)).actions.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn_sigma": True}, "Expected learn_sigma False in policy_head_config, came True"),
        ({"time_as_cond": False}, "Expected time_as_cond True in policy_head_config"),
        ({"state_dim": 7}, "policy_head_config says state_dim 7, the weights say 14"),
    ],
)
def test_other_scale_dps_are_refused(with_scale_dp, changes, message):
    with pytest.raises(ValueError, match=message):
        translate(with_scale_dp(changes)[0])


def test_the_number_of_heads_is_in_no_weight(with_scale_dp):
    folder, _ = with_scale_dp()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(merged(config, {"policy_head_config": {"num_heads": None}})))
    with pytest.raises(ValueError, match=r"Expected \['num_heads'\] in policy_head_config"):
        translate(folder)


@pytest.fixture
def converted(source, tmp_path):
    """Convert a checkpoint with a tokenizer."""

    def make(statistics=STATISTICS, cameras=("left", "right"), images=None, **options):
        folder = source(tokenizer=True, **options)
        if images is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(images))
        path = None if statistics is None else tmp_path / "stats.json"
        if path is not None:
            path.write_text(json.dumps(statistics))
        return convert_checkpoint(translate, folder, tmp_path / "converted", path, cameras), tmp_path / "converted"

    return make


def test_model_and_processor_reason_and_act_in_robot_units(converted):
    conversion, path = converted()
    assert conversion.notes == []
    model, processor = AutoModel.from_pretrained(path), AutoProcessor.from_pretrained(path)
    assert [(camera.name, camera.width, camera.height) for camera in processor.camera_specs()] == [
        ("left", 320, 240),
        ("right", 320, 240),
    ]
    grey = np.full((56, 84, 3), 200, np.uint8)
    observed = {"images": [{"left": grey, "right": grey}], "text": "word3 word4", "state": [[2.5] * 13 + [0.51]]}
    inputs = processor(**observed, reasoning="word5")
    torch.testing.assert_close(inputs["state"], torch.ones(1, 14))  # a std of at least 0.01
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    images = "<|vision_start|>" + " <|image_pad|>" * 99 + " <|vision_end|>"
    assert "".join(text.split()).count("".join(images.split())) == 2
    assert text.endswith("word5 Next action: <|im_end|>")
    assert (inputs["labels"][0] != -100).sum() == 4
    inputs = processor(**observed)
    output = model.predict_action(**inputs, noise=torch.zeros(1, 16, 14), max_reasoning_tokens=4)
    assert len(processor.decode_reasoning(output)) == 1
    actions = processor.decode_actions(output)
    assert actions.shape == (1, 16, 14) and np.isfinite(actions).all()
    # The published statistics hold the margin of 1e-4 already.
    for end, expected in ((-1.0, STATISTICS["action_min"]), (1.0, STATISTICS["action_max"])):
        decoded = processor.decode_actions(VLAOutput(actions=torch.full((1, 16, 14), end)))
        np.testing.assert_allclose(decoded[0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("published", [3, [3, 4], None])
def test_the_tokenizers_end_ends_a_reasoning(converted, published):
    conversion, _ = converted(config={"eos_token_id": published})
    assert conversion.model.config.end_token_id == conversion.processor.end_token_id == 5


@pytest.mark.parametrize(
    "limits",
    [
        {"min_pixels": 3136, "max_pixels": 12845056},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"min_pixels": 3136, "max_pixels": 12845056, "size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        {"size": {"min_pixels": 3136, "max_pixels": 12845056}},
        None,
    ],
)
def test_every_picture_has_the_size_of_the_published_training(converted, limits):
    """Trained on 320 x 240 whatever the camera gave, the published code evaluates on that as it is."""
    colours = {"image_mean": [0.1] * 3, "image_std": [2.0] * 3}
    _, path = converted(images=None if limits is None else limits | colours)
    processor = AutoProcessor.from_pretrained(path)
    assert processor.prompt_config["image_size"] == [320, 240]
    right = np.zeros((240, 320, 3), np.uint8)
    for height, width in ((240, 320), (480, 640), (720, 1280), (100, 50), (0, 0)):
        left = np.full((height, width, 3), 255, np.uint8) if height else None  # missing
        batch = processor(images={"left": left, "right": right}, text="", state=np.zeros(14))
        assert batch["image_grid_thw"].tolist() == [[1, 252 // 14, 308 // 14]] * 2
        assert (batch["input_ids"] == processor.image_token_id).sum() == 2 * 99
    if limits is not None:
        white = processor(images={"left": 255 - right, "right": right}, text="", state=np.zeros(14))["pixel_values"]
        assert white[0, 0].item() == pytest.approx(0.9 / 2.0)


def test_a_single_camera_needs_no_name(converted):
    conversion, path = converted(cameras=())
    (note,) = conversion.notes
    assert "The processor takes one image" in note
    batch = AutoProcessor.from_pretrained(path)(images=np.zeros((9, 9, 3), np.uint8), text="", state=np.zeros(14))
    assert batch["image_grid_thw"].tolist() == [[1, 18, 22]]


def test_published_actions_and_states_are_declared(converted):
    _, path = converted()
    action, state = AutoProcessor.from_pretrained(path).action_codec.specs()
    assert (action.kind, action.gripper, len(action.names)) == ("joint", None, 14)
    assert action.names == state.names and action.names[6::7] == ("left_gripper", "right_gripper")


def test_other_sizes_are_not_declared(converted):
    statistics = {"action_min": [-1.0] * 10, "action_max": [1.0] * 10, "qpos_mean": [0.0] * 7, "qpos_std": [1.0] * 7}
    conversion, _ = converted(statistics, case=TWO)
    assert conversion.processor.action_codec.specs() == (None, None)


def test_without_a_tokenizer_or_statistics_the_converter_says_so(source):
    folder = source()
    conversion = translate(folder)
    assert conversion.processor is None and "There is no processor: the source has no tokenizer" in conversion.notes[0]
    with pytest.raises(ValueError, match="Statistics and cameras are kept by the processor. There is no"):
        translate(folder, STATISTICS)
    word_tokenizer().save_pretrained(folder)
    notes = translate(folder).notes
    assert "The processor has no statistics" in notes[0] and "The processor takes one image" in notes[1]


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"added_tokens": []}', '{"version": "1.0", "model": {}}'])
def test_a_tokenizer_that_cannot_be_read_is_refused(source, content):
    folder = source(tokenizer=True)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="Expected a tokenizer in .*tokenizer.json and the files beside it, came"):
        translate(folder)


def test_statistics_of_another_robot_are_refused(source):
    with pytest.raises(ValueError, match="action_dim of"):
        translate(source(TWO, tokenizer=True), STATISTICS)
