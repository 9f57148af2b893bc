"""TinyVLA's published checkpoints (`model_type` "llava_pythia") -> ours.

Source: the published code of https://huggingface.co/papers/2409.12514
"""

import re
from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from hf_vla.actions.normalization import TINYVLA_MARGIN
from hf_vla.actions.spec import CameraSpec
from hf_vla.models.conversion import Conversion, match_weights, one_dtype, read_json, read_weights
from hf_vla.models.processing import DEFAULT_CAMERAS
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.modeling_tinyvla import TinyVLAForActionPrediction
from hf_vla.models.tinyvla.processing_tinyvla import TinyVLAProcessor

EMBEDDING = "gpt_neox.embed_in.weight"
VISION, UNET = "gpt_neox.vision_tower.vision_model.", "embed_out."
PREFIXES = (
    (VISION, "backbone.vision_tower."),
    ("gpt_neox.mm_projector.0.", "backbone.multi_modal_projector.linear_1."),
    ("gpt_neox.mm_projector.2.", "backbone.multi_modal_projector.linear_2."),
    ("gpt_neox.", "backbone.language_model."),
    (UNET + "norm_after_pool.", "action_head.condition_encoder.norm."),
    (UNET + "combine.", "action_head.condition_encoder.combine."),
    (UNET, "action_head.denoiser."),
)
# SigLIP's pooling head, whose output nothing reads, and constants that older versions of transformers saved
DROPPED = (
    r"gpt_neox\.vision_tower\.vision_model\.(head\..*|embeddings\.position_ids)",
    r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)
TEXT_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act layer_norm_eps "
    "max_position_embeddings use_parallel_residual attention_bias attention_dropout hidden_dropout"
).split()
VISION_FIELDS = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act layer_norm_eps image_size "
    "patch_size num_channels"
).split()
IMAGE_TOKEN = "<image>"
UNNORM_KEY = "tinyvla"
CAMERA_SIZE = (320, 180)  # pixels of the published training images
NO_PROCESSOR = "There is no processor: the source has no tokenizer.json. Add GPT-NeoX's and convert again."
NO_STATISTICS = (
    "The processor has no statistics, so that it can neither normalise states nor decode actions: convert again with "
    "--statistics, a JSON file with action_min, action_max, qpos_mean and qpos_std of the published dataset_stats.pkl."
)
NO_CAMERAS = (
    "The processor takes one image. If the checkpoint has several cameras, name them: --camera left --camera right."
)


def translate(
    folder: Path,
    statistics: dict[str, list[float]] | None = None,
    cameras: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Read a published checkpoint.

    Sizes come from config.json and, where that names none (the UNet's), from the weights. The time embedding is
    computed in bfloat16, as the published code does; losses mask padded actions, which the published ones do not.

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
    _expect(published, "model_type", "llava_pythia")
    _expect(published, "action_head_type", "droid_diffusion")
    weights = read_weights(folder)
    dropped = sorted(name for name in weights if any(re.fullmatch(pattern, name) for pattern in DROPPED))
    weights = one_dtype({name: tensor for name, tensor in weights.items() if name not in dropped}, dtype)
    vocab_size = _fields(published, ["vocab_size"])["vocab_size"]
    tokenizer = _tokenizer(folder, vocab_size)
    image_token_id = vocab_size if tokenizer is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = _config(published, weights, image_token_id)
    if EMBEDDING in weights and image_token_id >= vocab_size:  # nothing reads the image placeholder's embedding
        weights[EMBEDDING] = F.pad(weights[EMBEDDING], (0, 0, 0, image_token_id + 1 - vocab_size))
    with torch.device("meta"):
        model = TinyVLAForActionPrediction(config)
    weights = match_weights(weights, PREFIXES, model)
    torch.nn.Module.to(model, next(iter(weights.values())).dtype)
    conversion = Conversion(model, weights, dropped=dropped)
    if tokenizer is not None:
        conversion.processor = _processor(folder, config, tokenizer, statistics, cameras)
        conversion.notes = [note for note, told in ((NO_STATISTICS, statistics), (NO_CAMERAS, cameras)) if not told]
    elif statistics or cameras:
        raise ValueError(f"Statistics and cameras are kept by the processor. {NO_PROCESSOR}")
    else:
        conversion.notes = [NO_PROCESSOR]
    return conversion


def _expect(published, name, *expected):
    if published.get(name) not in expected:
        raise ValueError(
            f"Expected {name} {' or '.join(map(repr, expected))} in config.json, came {published.get(name)!r}: "
            "this converter knows no other."
        )


def _fields(published, names, place="config.json"):
    if missing := [name for name in names if name not in published]:
        raise ValueError(f"Expected {missing} in {place}; they are missing, and nothing else tells them.")
    return {name: published[name] for name in names}


def _config(published, weights, image_token_id):
    for name, *expected in (("concat", "token_cat", "None"), ("mm_use_im_start_end", False), ("rope_scaling", None)):
        if name in published:
            _expect(published, name, *expected)
    text = _fields(published, TEXT_FIELDS)
    rope = _fields(published, ["rotary_emb_base", "rotary_pct"])
    text["vocab_size"] = max(text["vocab_size"], image_token_id + 1)
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": rope["rotary_emb_base"],
        "partial_rotary_factor": rope["rotary_pct"],
    }
    head_config, action_dim, state_dim = _head_config(weights)
    for name, value in (("action_dim", action_dim), ("state_dim", state_dim)):
        if published.get(name, value) != value:
            raise ValueError(f"config.json says {name} {published[name]}, the weights say {value}.")
    return TinyVLAConfig(
        backbone_config={
            "model_type": "llava",
            **_vision_options(_fields(published, ["vision_config"])["vision_config"], weights),
            "text_config": {"model_type": "gpt_neox", **text},
            "image_token_index": image_token_id,
        },
        head_config=head_config,
        action_dim=action_dim,
        state_dim=state_dim,
        chunk_size=_fields(published, ["chunk_size"])["chunk_size"],
    )


def _vision_options(published, weights):
    """Llava's options that concern images; the model type is CLIP's in both kinds of config.json."""
    parts = _fields(published, ["vision_tower", "mm_projector"], "vision_config")
    _expect(parts["mm_projector"], "mm_projector_type", "mlp2x_gelu")
    tower = parts["vision_tower"]
    _expect(tower, "mm_vision_select_feature", "patch", "cls_patch")
    vision = _fields(tower, VISION_FIELDS, "vision_config.vision_tower")
    num_patches = (vision["image_size"] // vision["patch_size"]) ** 2
    if VISION + "embeddings.class_embedding" in weights:
        vision["model_type"] = "clip_vision_model"
        keeps_class = tower["mm_vision_select_feature"] == "cls_patch"
        strategy, length = ("full", num_patches + 1) if keeps_class else ("default", num_patches)
    else:  # no class token to leave out
        vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
        strategy, length = "full", num_patches
    return {
        "vision_config": vision,
        "vision_feature_layer": _fields(tower, ["mm_vision_select_layer"], "vision_tower")["mm_vision_select_layer"],
        "vision_feature_select_strategy": strategy,
        "image_seq_length": length,
    }


def _head_config(weights):
    """The head's options, action_dim and state_dim, from the shapes of the UNet's weights."""

    def shape(name):
        if UNET + name not in weights:
            raise ValueError(f"Expected the diffusion head's weight {UNET + name} in the source; it is missing.")
        return weights[UNET + name].shape

    levels = takewhile(
        lambda name: UNET + name in weights,
        (f"down_modules.{level}.0.blocks.0.block.0.weight" for level in count()),
    )
    feature_dim, joined_dim = shape("combine.weight")
    denoiser = {
        "type": "conditional_unet1d",
        "down_dims": [shape(name)[0] for name in levels],
        "diffusion_step_embed_dim": shape("diffusion_step_encoder.1.weight")[1],
        "kernel_size": shape("final_conv.0.block.0.weight")[2],
        "timestep_embedding_dtype": "bfloat16",
    }
    head_config = {"type": "diffusion", "denoiser": denoiser}
    return head_config, shape("final_conv.1.weight")[0], joined_dim - feature_dim


def _tokenizer(folder, vocab_size):
    """The source's tokenizer with the image placeholder, or None."""
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if len(tokenizer) > vocab_size:
        raise ValueError(f"The source's tokenizer has {len(tokenizer)} tokens, its config.json only {vocab_size}.")
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def _processor(folder, config, tokenizer, statistics, cameras):
    vision = config.backbone_config.vision_config
    mean, std = (
        (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        if vision.model_type == "clip_vision_model"
        else (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
    )
    if (folder / "preprocessor_config.json").is_file():
        images = read_json(folder / "preprocessor_config.json")
        mean, std = images.get("image_mean", mean), images.get("image_std", std)
    image_processor = LlavaImageProcessorPil(
        do_pad=True,
        do_center_crop=False,
        size={"height": vision.image_size, "width": vision.image_size},
        image_mean=list(mean),
        image_std=list(std),
    )
    action_config = {
        "chunk_size": config.chunk_size,
        "normalization": {"mode": "min_max", "clip": False, "convention": "tinyvla"},
        "state_normalization": {"mode": "mean_std", "clip": False, "convention": "tinyvla"},
    }
    specs = [CameraSpec(name, *CAMERA_SIZE).to_dict() for name in cameras]
    processor = TinyVLAProcessor.from_backbone(
        SimpleNamespace(image_processor=image_processor, tokenizer=tokenizer),
        config,
        None if statistics is None else {UNNORM_KEY: _statistics(statistics)},
        action_config,
        {DEFAULT_CAMERAS: specs} if specs else None,
    )
    if statistics is not None:
        codec = processor.action_codec
        sizes = codec.normalizer().action_dim, codec.state_normalizer().action_dim
        if sizes != (config.action_dim, config.state_dim):
            raise ValueError(
                f"Expected statistics of {config.action_dim} action and {config.state_dim} state dimensions, came "
                f"{sizes[0]} and {sizes[1]}."
            )
    return processor


def _statistics(published):
    entries = _fields(published, ["action_min", "action_max", "qpos_mean", "qpos_std"], "the statistics")
    # The published file holds the margin already, which our normalisation adds; a constant dimension has nothing else.
    low, high = np.asarray(entries["action_min"]) + TINYVLA_MARGIN, np.asarray(entries["action_max"]) - TINYVLA_MARGIN
    return {
        "action": {"min": np.minimum(low, high).tolist(), "max": np.maximum(low, high).tolist()},
        "state": {"mean": entries["qpos_mean"], "std": entries["qpos_std"]},
    }
