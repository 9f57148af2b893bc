"""TinyVLA's published checkpoints (`model_type` "llava_pythia") -> ours; what they were made from -> Llava.

Source: the published code of https://huggingface.co/papers/2409.12514
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor

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
from hf_vla.models.published import (
    add_processor,
    check_sizes,
    no_processor,
    source_tokenizer,
    unet_head,
)
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
LANGUAGE_HEAD = "embed_out.weight"
# What the published actions and states of these sizes are, Euler angles as DROID's; which end of the gripper is open
# is not known.
PUBLISHED_SIZES = (10, 7)
PUBLISHED_SPECS = {
    "action": ActionSpec(
        ("x", "y", "z", "r11", "r12", "r13", "r21", "r22", "r23", "gripper"), "absolute_ee", rotation="rot6d"
    ).to_dict(),
    "state": StateSpec(("x", "y", "z", "roll", "pitch", "yaw", "gripper"), rotation="euler_xyz").to_dict(),
}
UNNORM_KEY = "tinyvla"
CAMERA_SIZE = (320, 180)  # pixels of the published training images
NO_PROCESSOR = "There is no processor: the source has no tokenizer.json. Add GPT-NeoX's and convert again."
NO_ACTION_HEAD = (
    "This is a vision-language model without an action head, now a Llava: name it as model.backbone of a recipe."
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
    A pretrained vision-language model, whose `embed_out` is a language head, becomes a Llava without that.

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
    expect(published, "model_type", "llava_pythia")
    if "action_head_type" in published:
        expect(published, "action_head_type", "droid_diffusion")
    weights = read_weights(folder)
    if "action_head_type" not in published and LANGUAGE_HEAD in weights:
        return _language_model(folder, published, weights, bool(statistics or cameras), dtype)
    expect(published, "action_head_type", "droid_diffusion")
    tokenizer = _tokenizer(folder, published)
    config = _config(published, weights, tokenizer)
    with torch.device("meta"):
        model = TinyVLAForActionPrediction(config)
    conversion = _conversion(model, published, weights, PREFIXES, dtype)
    if tokenizer is None:
        no_processor(conversion, NO_PROCESSOR, statistics, cameras)
    else:
        vision = model.backbone.config.vision_config
        parts = SimpleNamespace(image_processor=_image_processor(folder, vision), tokenizer=tokenizer)
        add_processor(
            conversion,
            TinyVLAProcessor,
            parts,
            statistics=statistics,
            cameras=cameras,
            unnorm_key=UNNORM_KEY,
            specs=PUBLISHED_SPECS if (config.action_dim, config.state_dim) == PUBLISHED_SIZES else None,
            camera_size=CAMERA_SIZE,
        )
    return conversion


def _language_model(folder, published, weights, for_robots, dtype):
    """A vision-language model without its language head, which recipes can name as model.backbone."""
    tokenizer = _tokenizer(folder, published)
    if tokenizer is None or for_robots:
        raise ValueError(
            "This is a vision-language model without an action head: statistics and cameras are not its, and it needs "
            "its tokenizer.json, with which a recipe (model.backbone) makes a TinyVLA of it."
        )
    config = AutoConfig.for_model(**_backbone_config(published, weights, tokenizer))
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    prefixes = [(old, new.removeprefix("backbone.")) for old, new in PREFIXES if new.startswith("backbone.")]
    weights.pop(LANGUAGE_HEAD)
    conversion = _conversion(model, published, weights, prefixes, dtype)
    conversion.dropped = sorted([LANGUAGE_HEAD, *conversion.dropped])
    conversion.processor = LlavaProcessor(
        _image_processor(folder, config.vision_config),
        tokenizer,
        config.vision_config.patch_size,
        config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_config.model_type == "clip_vision_model"),
    )
    conversion.notes = [NO_ACTION_HEAD]
    return conversion


def _config(published, weights, tokenizer):
    backbone_config = _backbone_config(published, weights, tokenizer)
    head_config, action_dim, state_dim = unet_head(weights, UNET)
    sizes = {"action_dim": action_dim, "state_dim": state_dim}
    check_sizes(published, sizes)
    chunk_size = fields(published, ["chunk_size"])["chunk_size"]
    return build_config(
        TinyVLAConfig, backbone_config=backbone_config, head_config=head_config, chunk_size=chunk_size, **sizes
    )


def _conversion(model, published, weights, prefixes, dtype):
    weights, dropped = split_unused(weights, DROPPED)
    weights = one_dtype(weights, dtype)
    rows = model.config.get_text_config().vocab_size - published["vocab_size"]
    if EMBEDDING in weights:  # nothing reads the image placeholder's
        weights[EMBEDDING] = F.pad(weights[EMBEDDING], (0, 0, 0, rows))
    weights = match_weights(weights, prefixes, model)
    torch.nn.Module.to(model, next(iter(weights.values())).dtype)
    return Conversion(model, weights, dropped=dropped)


def _backbone_config(published, weights, tokenizer):
    for name, *expected in (("concat", "token_cat", "None"), ("mm_use_im_start_end", False), ("rope_scaling", None)):
        if name in published:
            expect(published, name, *expected)
    text = fields(published, TEXT_FIELDS)
    rope = fields(published, ["rotary_emb_base", "rotary_pct"])
    image_token_id = text["vocab_size"] if tokenizer is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text["vocab_size"] = max(text["vocab_size"], image_token_id + 1)
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": rope["rotary_emb_base"],
        "partial_rotary_factor": rope["rotary_pct"],
    }
    return {
        "model_type": "llava",
        **_vision_options(section(published, "vision_config"), weights),
        "text_config": {"model_type": "gpt_neox", **text},
        "image_token_index": image_token_id,
    }


def _vision_options(published, weights):
    """Llava's options that concern images; the model type is CLIP's in both kinds of config.json."""
    expect(section(published, "mm_projector", "vision_config"), "mm_projector_type", "mlp2x_gelu")
    tower = section(published, "vision_tower", "vision_config")
    expect(tower, "mm_vision_select_feature", "patch", "cls_patch")
    vision = fields(tower, VISION_FIELDS, "vision_config.vision_tower")
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
        "vision_feature_layer": fields(tower, ["mm_vision_select_layer"], "vision_tower")["mm_vision_select_layer"],
        "vision_feature_select_strategy": strategy,
        "image_seq_length": length,
    }


def _tokenizer(folder, published):
    """The source's tokenizer with the image placeholder, or None."""
    tokenizer = source_tokenizer(folder, fields(published, ["vocab_size"])["vocab_size"])
    if tokenizer is not None:
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def _image_processor(folder, vision):
    mean, std = (
        (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        if vision.model_type == "clip_vision_model"
        else (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
    )
    if (folder / "preprocessor_config.json").is_file():
        images = read_json(folder / "preprocessor_config.json")
        mean, std = images.get("image_mean", mean), images.get("image_std", std)
    return LlavaImageProcessorPil(
        do_pad=True,
        do_center_crop=False,
        size={"height": vision.image_size, "width": vision.image_size},
        image_mean=list(mean),
        image_std=list(std),
    )
