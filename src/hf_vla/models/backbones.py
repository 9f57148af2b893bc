"""What image-text-to-text models of transformers want to know of a prompt beside its tokens and pictures."""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from hf_vla.models.base import VLAPreTrainedModel

# of the vision towers whose tokens can be counted
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
_TOKEN_TYPES = {"token_type_ids", "mm_token_type_ids"}
# fields of language models by which some backbones change what their language head returns
_LOGIT_CHANGES = ("logit_scale", "logits_scaling", "output_multiplier", "unpadded_vocab_size")
# what image processors of transformers say of pictures beside pixel_values
_IMAGE_INPUTS = {
    *("high_res_pixel_values", "pixel_attention_mask", "pixel_mask", "pixel_values_local"),
    *("image_grid_thw", "image_grids", "image_merge_sizes", "image_num_crops", "image_position_ids", "image_sizes"),
    *("image_token_pooling", "aspect_ratio_ids", "aspect_ratio_mask", "batch_num_images", "num_local_patches"),
    *("patches_grid", "spatial_shapes", "target_sizes"),
}


def backbone_inputs(backbone: PreTrainedModel) -> set[str]:
    """What a backbone's `forward` takes of pictures beside `pixel_values`; all else is for its callers to say."""
    return _parameters(backbone) & _IMAGE_INPUTS


def _parameters(backbone: PreTrainedModel) -> set[str]:
    return set(inspect.signature(backbone.forward).parameters)


class BackbonePreTrainedModel(VLAPreTrainedModel):
    """What models around any image-text-to-text model of transformers, their `backbone`, share."""

    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # Kinds of attention in the backbone, which refuses those that it does not support itself, when it is built.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module):
        """Leave the head as it was built: it initialises itself, and transformers' initialisation is another."""

    def get_input_embeddings(self):
        """The backbone's."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Replace the backbone's input embedding."""
        self.backbone.set_input_embeddings(value)

    def follow_backbone(self) -> None:
        """Move and cast all but the backbone as that is; it would itself lose the frequencies it keeps in float32."""
        for name, part in self.named_children():
            if name != "backbone":
                part.to(self.backbone.device, self.backbone.dtype)


def pretrained_backbone(backbone: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone whose weights stay as they are when a model is built around it.

    Args:
        backbone (`PreTrainedModel`): it.
        config (`PreTrainedConfig`): of the model.

    Raises:
        ValueError: `config.backbone_config` is another's.
    """
    if config.backbone_config is not backbone.config:
        raise ValueError(
            f"Expected the configuration of this {type(backbone).__name__}: build it as "
            f"{type(config).__name__}(backbone_config=backbone.config, ...)."
        )
    for module in backbone.modules():
        module._is_hf_initialized = True  # else a layer that was exchanged would be drawn anew
    return backbone


def check_images(
    backbone: PreTrainedModel,
    is_image: torch.Tensor,
    pixel_values: torch.Tensor | None,
    others: dict[str, Any],
) -> None:
    """Raise where prompts have pictures that were not handed on.

    Args:
        backbone, is_image: see [`token_types`].
        pixel_values (`torch.Tensor`): the pictures.
        others (`dict`): see [`token_positions`].

    Raises:
        ValueError: `pixel_values` are missing or, where the backbone needs it, a row of `image_grid_thw`.
    """
    hint = "hand on everything that the processor returns, for the same samples"
    if not is_image.any():
        return
    if pixel_values is None:
        raise ValueError(f"Expected pixel_values, since the prompts have image tokens, got none: {hint}.")
    if hasattr(backbone, "get_rope_index"):
        grid = others.get("image_grid_thw")
        count = int(is_image[:, 0].sum() + (is_image[:, 1:] & ~is_image[:, :-1]).sum())
        if grid is None or grid.shape != (count, 3):
            got = "none" if grid is None else f"shape {tuple(grid.shape)}"
            raise ValueError(
                f"Expected image_grid_thw with a row for each of the {count} pictures in the prompts, got {got}: "
                f"{hint}."
            )


class PromptTooLong(ValueError):
    """An instruction, with the pictures, has more tokens than the backbone has positions for."""


def check_length(text_config, length: int, num_new_tokens: int = 0) -> None:
    """Raise where a prompt, and what is to come behind it, is longer than the backbone has positions for.

    Raises:
        PromptTooLong: it is.
    """
    longest = getattr(text_config, "max_position_embeddings", None)
    if longest is not None and length + num_new_tokens > longest:
        room = f" beside {num_new_tokens} to be generated" if num_new_tokens else ""
        mend = (
            f"set max_reasoning_tokens to {longest - length} or less, " if num_new_tokens and length <= longest else ""
        )
        raise PromptTooLong(
            f"Expected prompts of at most {longest - num_new_tokens} tokens, for which the backbone has positions"
            f"{room}, got {length}: {mend}shorten the instruction, or take fewer cameras or n_obs_steps."
        )


def check_generation(model: PreTrainedModel) -> None:
    """Raise where a model's base model and language head are not all that it takes to generate tokens, one by one.

    Args:
        model (`PreTrainedModel`): an image-text-to-text model with its language head.

    Raises:
        ValueError: they are not; the text says why.
    """
    if obstacle := _obstacle(model):
        name = model.config.model_type
        raise ValueError(f"Expected a backbone that can be made to reason, as Qwen2-VL can, but {name!r} {obstacle}.")


def _obstacle(model: PreTrainedModel) -> str | None:
    base = model.base_model
    if base is model or model.get_output_embeddings() is None:
        return "has no language head of its own behind a base model"
    names = _parameters(base)
    if model.config.is_encoder_decoder or not {"past_key_values", "position_ids"} <= names:
        return "is an encoder with a decoder, or takes no position_ids"
    if strange := sorted(name for name in names - _TOKEN_TYPES if "token_type" in name):
        return f"wants to know {strange} of its tokens"
    count = getattr(base, "get_rope_index", None)
    if count is not None and not {"mm_token_type_ids", "image_grid_thw"} <= set(inspect.signature(count).parameters):
        return "counts positions in a way of its own"
    text_config = model.config.get_text_config()
    changes = {name: getattr(text_config, name, None) for name in _LOGIT_CHANGES}
    if changes := {name: value for name, value in changes.items() if value not in (None, 1.0)}:
        return f"may change its logits by {changes}; set that to 1 or None in text_config, if it does not"
    return None


def token_types(
    backbone: PreTrainedModel, input_ids: torch.Tensor, is_image: torch.Tensor, is_answer: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Kinds of tokens, under the names by which the backbone takes them.

    Args:
        backbone (`PreTrainedModel`): without a language head.
        input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`): the tokens.
        is_image (`torch.Tensor` of shape `(batch_size, sequence_length)`, bool): True where a token is an image's.
        is_answer (`torch.Tensor` of shape `(batch_size, sequence_length)`, bool, *optional*): True where the model
            itself speaks; nowhere by default.

    Returns:
        `dict[str, torch.Tensor]` of shape `(batch_size, sequence_length)` each.
    """
    names, types = _parameters(backbone), {}
    if "token_type_ids" in names:
        # PaliGemma: 0 is the prompt, which attends to itself in both directions; others: 1 is an image.
        prefix = backbone.config.model_type == "paligemma"
        answer = torch.zeros_like(input_ids) if is_answer is None else is_answer.long()
        types["token_type_ids"] = answer if prefix else is_image.long()
    if "mm_token_type_ids" in names:
        types["mm_token_type_ids"] = is_image.int()
    return types


def token_positions(
    backbone: PreTrainedModel,
    input_ids: torch.Tensor,
    in_prompt: torch.Tensor,
    is_image: torch.Tensor,
    others: dict[str, Any],
) -> torch.Tensor:
    """Count the tokens' places as the backbone does, wherever padding stands.

    Args:
        backbone, input_ids, is_image: see [`token_types`].
        in_prompt (`torch.Tensor` of shape `(batch_size, sequence_length)`, bool): False for padding; a missing camera
            keeps its place.
        others (`dict`): the backbone's other inputs, of which `image_grid_thw` tells where an image's tokens are.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length)`, or `(3, batch_size, sequence_length)` for M-RoPE.

    Raises:
        ValueError: the backbone takes none.
    """
    if "position_ids" not in _parameters(backbone):
        raise ValueError("Expected prompts padded on the right, got padding at the beginning of a prompt.")
    if "image_grid_thw" in others and hasattr(backbone, "get_rope_index"):
        # Left to itself, the backbone would drop the tokens of a missing camera, but not the camera's grid.
        positions, _ = backbone.get_rope_index(
            input_ids,
            mm_token_type_ids=is_image.int(),
            image_grid_thw=others["image_grid_thw"],
            attention_mask=in_prompt.long(),
        )
        return positions
    first = 1 if backbone.config.model_type == "paligemma" else 0
    return (in_prompt.long().cumsum(-1) - 1).clamp(min=0) + first


def num_image_tokens(backbone: PreTrainedConfig) -> int | None:
    """Tokens of one image; None where they depend on its size, and the image processor counts them (Qwen2-VL).

    Args:
        backbone (`PreTrainedConfig`): an image-text-to-text model's.

    Raises:
        ValueError: the backbone's configuration does not tell.
    """
    vision = getattr(backbone, "vision_config", None)
    if hasattr(vision, "spatial_merge_size"):
        return None
    if hasattr(backbone, "perceiver_config"):
        return backbone.perceiver_config.resampler_n_latents
    if hasattr(backbone, "mm_tokens_per_image"):
        return backbone.mm_tokens_per_image
    rows, columns = _patches(vision)
    if factor := getattr(backbone, "scale_factor", None) or getattr(backbone, "downsample_factor", None):
        return (rows // factor) * (columns // factor)
    if ratio := getattr(backbone, "downsample_ratio", None):
        return int(rows * ratio) * int(columns * ratio)
    if backbone.model_type == "paligemma":
        return rows * columns
    if backbone.model_type in ("llava", "vipllava") and vision.model_type in _CLASS_TOKENS:
        # all but the first, be it a class token or not
        left_out = getattr(backbone, "vision_feature_select_strategy", "default") == "default"
        return rows * columns + _CLASS_TOKENS[vision.model_type] - left_out
    raise ValueError(
        f"The configuration of a {backbone.model_type!r} does not tell how many tokens an image takes, or they "
        "depend on its size: give prompt_config['image_seq_length'], if it is the same for all of your images."
    )


def _patches(vision: PreTrainedConfig | None) -> tuple[int, int]:
    """Rows and columns; (0, 0) where there are none."""
    sizes = [getattr(vision, name, None) for name in ("image_size", "patch_size")]
    if None in sizes:
        return 0, 0
    (height, width), (rows, columns) = (size if isinstance(size, (list, tuple)) else (size, size) for size in sizes)
    return height // rows, width // columns
