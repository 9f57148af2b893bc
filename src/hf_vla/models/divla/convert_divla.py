"""DiVLA's published checkpoints (`model_type` "qwen2_vla") -> ours.

Source: the published code of https://huggingface.co/papers/2412.03293
"""

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hf_vla.actions.heads.diffusion import SCHEDULER
from hf_vla.actions.spec import ActionSpec, StateSpec
from hf_vla.models.conversion import (
    Conversion,
    build_config,
    expect,
    fields,
    match_weights,
    one_dtype,
    read_json,
    read_weights,
    section,
    split_unused,
)
from hf_vla.models.divla.configuration_divla import DiVLAConfig
from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction
from hf_vla.models.divla.processing_divla import DiVLAProcessor
from hf_vla.models.published import (
    add_processor,
    check_sizes,
    no_processor,
    shape_of,
    source_tokenizer,
    unet_head,
)

HEAD, EMBEDDING, LANGUAGE_HEAD = "policy_head.", "model.embed_tokens.weight", "lm_head.weight"
PREFIXES = (
    ("visual.", "backbone.model.visual."),
    ("model.", "backbone.model.language_model."),
    ("lm_head.", "backbone.lm_head."),
    ("input_action_proj.mlps.", "film.prompt_proj."),
    ("reasoning_action_proj.mlps.", "film.reasoning_proj."),
    ("reasoning_film.scale_fc.", "film.film.scale."),
    ("reasoning_film.shift_fc.", "film.film.shift."),
    (HEAD + "norm_after_pool.", "action_head.condition_encoder.norm."),
    (HEAD + "combine.", "action_head.condition_encoder.combine."),
    (HEAD, "action_head.denoiser."),
)
# constants that older versions of transformers saved
DROPPED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"visual\.rotary_pos_emb\.inv_freq")
FILM = r"(input_action_proj|reasoning_action_proj|reasoning_film)\..*"
# Sizes that a published config.json always holds, then options and their defaults in the code that wrote it; of the
# vision tower it holds what differs from the defaults, sizes too.
TEXT_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
).split()
TEXT_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 80,
    "tie_word_embeddings": False,
}
VISION_DEFAULTS = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TOKEN_FIELDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
OPTIONAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What published actions and states of this size are: absolute joint positions of two ALOHA arms; which end of a
# gripper is open is not known.
_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
_NAMES = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _JOINTS)
PUBLISHED_SPECS = {"action": ActionSpec(_NAMES, "joint").to_dict(), "state": StateSpec(_NAMES).to_dict()}
UNNORM_KEY = "divla"
CAMERA_SIZE = (320, 240)  # pixels to which the published training resizes every picture, whatever its shape
PIXEL_LIMITS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
NO_PROCESSOR = (
    "There is no processor: the source has no tokenizer.json. Add Qwen2-VL's (with tokenizer_config.json and "
    "preprocessor_config.json) and convert again."
)


def translate(
    folder: Path,
    statistics: dict[str, list[float]] | None = None,
    cameras: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Read a published checkpoint, with either of its action heads (UNet, ScaleDP).

    Sizes come from config.json, from the defaults of the code that wrote it, and (the head's) from the weights. The
    time embedding is computed in bfloat16, as the published code does. What the published evaluation does otherwise
    than its training is not kept: pictures are resized as in training, and the end of a generated reasoning counts
    (`film_includes_end=False` compares). Losses mask padded actions.

    Args:
        folder (`Path`): with config.json and safetensors; with tokenizer.json, there will be a processor.
        statistics (`dict`, *optional*): `action_min`, `action_max`, `qpos_mean`, `qpos_std`, a number per dimension.
        cameras (`Sequence[str]`): names in the order of the prompt; none for a single one without a name.
        dtype (`torch.dtype`, *optional*): of the converted weights; the source's by default.

    Returns:
        [`~hf_vla.models.conversion.Conversion`]

    Raises:
        ValueError: the checkpoint is of another kind, its weights do not fit its config.json, or the statistics do not
            fit its actions.
    """
    published = read_json(folder / "config.json")
    expect(published, "model_type", "qwen2_vla")
    backbone_config = _backbone_config(published)
    fields(published, ["policy_head_type"])
    expect(published, "policy_head_type", *HEADS)
    weights = read_weights(folder)
    tokenizer = source_tokenizer(folder, published["vocab_size"])
    config = _config(published, backbone_config, weights, tokenizer)
    with torch.device("meta"):
        model = DiVLAForActionPrediction(config)
    conversion = _conversion(model, weights, dtype)
    if tokenizer is None:
        no_processor(conversion, NO_PROCESSOR, statistics, cameras)
    else:
        images = _image_processor(folder, config.backbone_config.vision_config)
        add_processor(
            conversion,
            DiVLAProcessor,
            SimpleNamespace(image_processor=images, tokenizer=tokenizer),
            statistics=statistics,
            cameras=cameras,
            unnorm_key=UNNORM_KEY,
            specs=PUBLISHED_SPECS if config.action_dim == config.state_dim == len(_NAMES) else None,
            camera_size=CAMERA_SIZE,
            prompt_config={"image_size": [*CAMERA_SIZE]},
        )
    return conversion


def _config(published, backbone_config, weights, tokenizer):
    head_config, sizes = HEADS[published["policy_head_type"]](section(published, "policy_head_config"), weights)
    check_sizes(published, {name: sizes[name] for name in ("action_dim", "state_dim")})
    weight = published.get("llm_loss_weight", 1.0)
    return build_config(
        DiVLAConfig,
        backbone_config=backbone_config,
        head_config=head_config,
        use_film=published.get("using_film", "reasoning_film.scale_fc.weight" in weights),
        ntp_loss_weight=float(weight) if isinstance(weight, int) else weight,
        # the published evaluation's, and room for a prompt
        max_reasoning_tokens=min(256, backbone_config["text_config"]["max_position_embeddings"] // 2),
        end_token_id=_end_token_id(published, tokenizer),
        **sizes,
    )


def _end_token_id(published, tokenizer):
    """Of the token by which the published evaluation ends a reasoning."""
    if getattr(tokenizer, "eos_token_id", None) is not None:
        return tokenizer.eos_token_id
    end = fields(published, ["eos_token_id"])["eos_token_id"]
    if type(end) is not int:
        raise ValueError(
            f"Expected the id of one token as eos_token_id in config.json, came {end!r}: write that of the token "
            "which ends a reasoning, or add the source's tokenizer, whose end token counts."
        )
    return end


def _conversion(model, weights, dtype):
    tied = model.config.backbone_config.tie_word_embeddings
    unused = [*DROPPED, *([] if model.config.use_film else [FILM]), *([re.escape(LANGUAGE_HEAD)] if tied else [])]
    weights, dropped = split_unused(weights, unused)
    weights = one_dtype(weights, dtype)
    if tied and EMBEDDING in weights:
        weights[LANGUAGE_HEAD] = weights[EMBEDDING]
    weights = match_weights(weights, PREFIXES, model)
    torch.nn.Module.to(model, next(iter(weights.values())).dtype)
    return Conversion(model, weights, dropped=dropped)


def _backbone_config(published):
    text = fields(published, TEXT_FIELDS) | {key: published.get(key, value) for key, value in TEXT_DEFAULTS.items()}
    text |= {key: published.get(key) for key in OPTIONAL_TOKENS}
    scaling = section(published, "rope_scaling")
    expect(scaling, "type" if "type" in scaling else "rope_type", "default", "mrope", place="rope_scaling")
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": published.get("rope_theta", 1000000.0),
        **fields(scaling, ["mrope_section"], "rope_scaling"),
    }
    vision = section({"vision_config": {}} | published, "vision_config")
    return {
        "model_type": "qwen2_vl",
        "text_config": text,
        "vision_config": {key: vision.get(key, value) for key, value in VISION_DEFAULTS.items()},
        "tie_word_embeddings": text["tie_word_embeddings"],
        **fields(published, TOKEN_FIELDS),
    }


def _denoising(published, head_config, action_dim, state_dim):
    """The head's options that concern neither of its networks, and the model's sizes."""
    if (times := published.get("num_train_timesteps", 100)) != SCHEDULER["num_train_timesteps"]:
        head_config["scheduler"] = SCHEDULER | {"num_train_timesteps": times}
    sizes = {"action_dim": action_dim, "state_dim": state_dim}
    check_sizes(published, {"input_dim": action_dim, "state_dim": state_dim}, "policy_head_config")
    sizes["chunk_size"] = fields(published, ["prediction_horizon"], "policy_head_config")["prediction_horizon"]
    return head_config | {"num_inference_steps": published.get("num_inference_timesteps", 10)}, sizes


def _unet(published, weights):
    head_config, action_dim, state_dim = unet_head(weights, HEAD)
    if "n_groups" in published:
        head_config["denoiser"]["n_groups"] = published["n_groups"]
    return _denoising(published, head_config, action_dim, state_dim)


def _scale_dp(published, weights):
    for name, *expected in (("learn_sigma", False), ("time_as_cond", True), ("obs_as_cond", True)):
        if name in published:
            expect(published, name, *expected, place="policy_head_config")
    hidden_size, action_dim = shape_of(weights, HEAD + "x_embedder.weight")
    feature_dim, hidden_dim = shape_of(weights, HEAD + "combine.4.weight")
    depth = len({name.split(".")[2] for name in weights if name.startswith(HEAD + "blocks.")})
    head_config = {
        "type": "diffusion",
        "condition": {
            "norm": HEAD + "norm_after_pool.weight" in weights,
            "combine": "mlp",
            "hidden_dim": hidden_dim,
        },
        "denoiser": {
            "type": "dit",
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": fields(published, ["num_heads"], "policy_head_config")["num_heads"],
            "mlp_ratio": shape_of(weights, HEAD + "blocks.0.mlp.fc1.weight")[0] / hidden_size,
            "timestep_embedding_dtype": "bfloat16",
        },
    }
    state_dim = shape_of(weights, HEAD + "combine.0.weight")[1] - feature_dim
    return _denoising(published, head_config, action_dim, state_dim)


HEADS = {"unet_diffusion_policy": _unet, "scale_dp_policy": _scale_dp}


def _image_processor(folder, vision):
    path = folder / "preprocessor_config.json"
    images = read_json(path) if path.is_file() else {"min_pixels": 56 * 56}
    size = images.get("size")
    if isinstance(size, dict):  # older versions of transformers wrote other names
        images["size"] = {PIXEL_LIMITS.get(name, name): limit for name, limit in size.items()}
    sizes = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    return Qwen2VLImageProcessorPil.from_dict(images | sizes)
