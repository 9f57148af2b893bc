"""SpatialVLA from a recipe: its action tokenizer is fitted to the dataset, or kept from the checkpoint."""

import inspect
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForDepthEstimation, SiglipVisionModel

from hf_vla.actions.codec import ActionCodec
from hf_vla.actions.tokenizers.base import ActionTokenizer, FixedLengthTokenizer
from hf_vla.actions.tokenizers.gaussian_grid import NUM_BINS, GaussianGridTokenizer
from hf_vla.actions.tokenizers.registry import ACTION_TOKENIZERS, build_action_tokenizer
from hf_vla.models.base import check_folder
from hf_vla.models.spatialvla.action_tokens import token_fields
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration
from hf_vla.models.spatialvla.processing_spatialvla import SpatialVLAProcessor
from hf_vla.training.arguments import GridArguments, ModelArguments
from hf_vla.training.builders.base import (
    config_overrides,
    load_checkpoint,
    refuse,
    refuse_reasoning,
)
from hf_vla.training.facts import DataFacts

SHARED = ("chunk_size", "n_obs_steps")  # of processor and config; no weight depends on them


def build_spatialvla(arguments: ModelArguments, facts: DataFacts):
    """Make or load a SpatialVLA whose processor knows the dataset's statistics, action tokens, robot and camera.

    Args:
        arguments (`ModelArguments`): the recipe's section model.
        facts (`DataFacts`): of the data.

    Returns:
        `tuple`: model and processor.

    Raises:
        ValueError: the recipe asks for what SpatialVLA has not, or its action tokenizer does not fit the actions.
    """
    refuse("spatialvla", "give model.preset or model.path.", model__backbone=arguments.backbone)
    refuse_reasoning("spatialvla", arguments, facts)
    refuse("spatialvla", "it sees images and words alone.", data__state=facts.takes_state)
    names = next(iter(facts.cameras.values()))
    if len(names) != 1:
        names = [camera["name"] for camera in names]
        raise ValueError(f"spatialvla looks through one camera: choose one of {names} in data.cameras.")
    make = _new if arguments.preset is not None else _pretrained
    model, processor = make(arguments, facts)
    if not (facts.holds_tail or isinstance(processor.action_codec.tokenizer, FixedLengthTokenizer)):
        raise ValueError(
            "These action tokens stand for a chunk as a whole, and what lies behind an episode's end cannot be left "
            "out of it: set data.chunk_tail: hold."
        )
    for key, dataset in facts.datasets.items():
        if model.config.use_ego3d and dataset.cameras[0].intrinsics is None:
            raise ValueError(
                f"This model encodes 3-D positions: give fovy or intrinsics of the camera of {key!r} in data.cameras."
            )
    return model, processor


def _new(arguments: ModelArguments, facts: DataFacts):
    """Untrained model whose vocabulary has room for the action tokens."""
    wanted = arguments.action_tokenizer
    if wanted is None or wanted.get("type") == GaussianGridTokenizer.type:
        if wanted is not None:
            raise ValueError("The adaptive grid has a section of its own: give model.grid, no model.action_tokenizer.")
        dictionaries = _dictionaries(facts, on_grid=True)
        tokenizer = _fit_grid(_normalized(facts, dictionaries, "actions"), arguments.grid or GridArguments(), NUM_BINS)
    else:
        dictionaries = _dictionaries(facts, on_grid=False)
        tokenizer = _make_tokenizer(wanted, _normalized(facts, dictionaries, "chunks"))
    dictionaries["action_config"]["tokenizer"] = tokenizer.to_dict() | {"type": tokenizer.type}
    given = {**{name: dictionaries["action_config"][name] for name in SHARED}, **token_fields(tokenizer)}
    depth_model = None if arguments.depth_model is None else _load_depth_model(arguments)
    vision_model = None if arguments.vision_model is None else _load_vision_model(arguments)
    if depth_model is not None:
        given["vision_zoe_config"] = depth_model.config
    if vision_model is not None:
        given["vision_config"] = vision_model.config
    overrides = config_overrides(arguments, SpatialVLAConfig, given)
    if depth_model is not None:  # it shall see pictures as large as those that it was trained on
        overrides.setdefault("zoe_image_size", depth_model.config.backbone_config.image_size)
    preset = SpatialVLAConfig.from_preset(arguments.preset)
    text_config = overrides.get("text_config") or preset.text_config.to_dict()
    overrides["text_config"] = text_config | {"vocab_size": preset.action_token_begin_idx + tokenizer.vocab_size}
    config = SpatialVLAConfig.from_preset(arguments.preset, **overrides)
    model = SpatialVLAForConditionalGeneration(config)
    if depth_model is not None:
        model.vision_zoe_model.load_state_dict(depth_model.state_dict())
    if vision_model is not None:
        model.vision_tower.load_state_dict(vision_model.state_dict())
    model.to(getattr(torch, arguments.dtype))
    model.set_action_tokenizer(tokenizer, facts.chunk_size)
    return model, SpatialVLAProcessor.from_scratch(config, **dictionaries)


def _load_depth_model(arguments: ModelArguments):
    """The recipe's depth model.

    Raises:
        ValueError: weights are missing, it is no ZoeDepth, or the recipe does without.
    """
    if (arguments.config or {}).get("use_vision_zoe") is False:
        raise ValueError("model.config.use_vision_zoe is false: leave model.depth_model out, or that.")
    check_folder(arguments.depth_model, f"model.depth_model {arguments.depth_model!r}")
    model, info = AutoModelForDepthEstimation.from_pretrained(arguments.depth_model, output_loading_info=True)
    if model.config.model_type != "zoedepth" or info["missing_keys"]:
        raise ValueError(
            f"Expected model.depth_model to be a whole ZoeDepth, {arguments.depth_model!r} is a "
            f"{model.config.model_type} that lacks {sorted(info['missing_keys'])[:5]}."
        )
    return model


def _load_vision_model(arguments: ModelArguments):
    """The recipe's vision model, or that of the pair of text and vision that it is.

    Raises:
        ValueError: weights are missing, as of all that are no SigLIP.
    """
    source = arguments.vision_model
    check_folder(source, f"model.vision_model {source!r}")
    model, info = SiglipVisionModel.from_pretrained(source, vision_use_head=False, output_loading_info=True)
    if wrong := sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind]):
        raise ValueError(
            f"Expected model.vision_model to be a whole SigLIP, {source!r} lacks {len(wrong)} of its weights, or has "
            f"them in another shape, among them {wrong[:5]}."
        )
    return model


def _pretrained(arguments: ModelArguments, facts: DataFacts):
    """Checkpoint that keeps its weights, tokens and, unless it is adapted, its grid, but speaks for our dataset.

    Its text embedding stays frozen, as published.
    """
    model, pretrained = load_checkpoint(arguments)
    tokenizer = source = pretrained.action_codec.tokenizer
    on_grid = isinstance(source, GaussianGridTokenizer)
    dictionaries = _dictionaries(facts, on_grid)
    if arguments.adapt_grid:
        if not on_grid:
            raise ValueError(f"This checkpoint emits {source.type!r} tokens, no grid's: leave model.adapt_grid out.")
        actions = _normalized(facts, dictionaries, "actions")
        tokenizer = _fit_grid(actions, arguments.grid or GridArguments(), source.num_bins, source.use_spherical)
        model.adapt_spatial_embeddings(source, tokenizer)
    if arguments.decoding is not None:
        if arguments.decoding != "discrete_diffusion" or model.config.decoding == arguments.decoding:
            raise ValueError(
                "A checkpoint that generates token by token can learn model.decoding 'discrete_diffusion', came "
                f"{arguments.decoding!r} for one of {model.config.decoding!r}: leave it out, or name another."
            )
        model.diffuse_actions()
    dictionaries["action_config"]["tokenizer"] = tokenizer.to_dict() | {"type": tokenizer.type}
    processor = type(pretrained)(pretrained.image_processor, pretrained.tokenizer, **dictionaries)
    for name in SHARED:
        own, wanted = getattr(model.config, name), dictionaries["action_config"][name]
        if arguments.lora is not None and wanted != own:
            raise ValueError(f"An adapter shares its checkpoint's config: expected data.{name} {own}, came {wanted}.")
        setattr(model.config, name, wanted)
    model.config.validate_architecture()  # fewer actions may have fewer tokens than discrete diffusion has passes
    if model.config.use_spatial_token:
        model.get_input_embeddings().requires_grad_(False)
    return model, processor


def _dictionaries(facts: DataFacts, on_grid: bool) -> dict[str, dict]:
    """What the processor is told, but for the action tokenizer."""
    return {
        "statistics": facts.statistics,
        "action_config": {
            "chunk_size": facts.chunk_size,
            "n_obs_steps": facts.n_obs_steps,
            "normalization": {"mode": _modes(facts, on_grid), "clip": True, "convention": "spatialvla"},
            "tokenizer": None,
            "specs": facts.specs,
        },
        "camera_config": {key: cameras[0] for key, cameras in facts.cameras.items()},
    }


def _modes(facts: DataFacts, on_grid: bool) -> list[str]:
    """How each number is normalised; robots that share action tokens share the numbers' places.

    q01..q99, as SpatialVLA, OpenVLA and FAST do; a gripper, which may be closed in fewer rows than that, min..max.
    """
    layouts = {}
    for key, dataset in facts.datasets.items():
        spec = dataset.action_spec
        if on_grid and spec.gripper is None:
            raise ValueError(
                "SpatialVLA's grid ends in a gripper: give data.action.gripper with index, open and closed."
            )
        layouts[key] = (spec.kind, len(spec.names), spec.gripper and spec.gripper.index)
    if len(set(layouts.values())) > 1:
        raise ValueError(
            "A SpatialVLA's tokens stand for the actions of all datasets alike; these differ in their kind, their "
            f"number of dimensions or the place of the gripper: {layouts}. Leave out those that do not fit."
        )
    _, action_dim, gripper = next(iter(layouts.values()))
    own = "zero_one" if on_grid else "min_max"
    return [own if index == gripper else "quantile" for index in range(action_dim)]


def _normalized(facts: DataFacts, dictionaries: dict[str, dict], what: str) -> np.ndarray:
    """The datasets' "actions" or "chunks", one behind the other."""
    codec = ActionCodec(dictionaries["statistics"], dictionaries["action_config"])
    parts = [codec.normalizer(key).normalize(getattr(dataset, what)) for key, dataset in facts.datasets.items()]
    return np.concatenate(parts)


def _make_tokenizer(options: dict[str, Any], chunks: np.ndarray) -> ActionTokenizer:
    """Action tokenizer of a recipe: fitted to normalised chunks where its kind is, else of its options alone."""
    kind = ACTION_TOKENIZERS.get(options.get("type"))
    if not hasattr(kind, "fit"):
        return build_action_tokenizer({"action_dim": chunks.shape[-1], **options})
    options = {name: value for name, value in options.items() if name != "type"}
    known = list(inspect.signature(kind.fit).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"model.action_tokenizer: unknown {unknown} of a {kind.type!r} tokenizer that is fitted to the dataset; "
            f"there are {known}."
        )
    return kind.fit(chunks, **options)


def _fit_grid(normalized_actions: np.ndarray, grid: GridArguments, num_bins, use_spherical: bool = True):
    num_bins, action_dim = grid.num_bins or num_bins, normalized_actions.shape[-1]
    if action_dim not in (4, 7) or len(num_bins) + 1 != action_dim:
        raise ValueError(
            "SpatialVLA's grid bins 7 numbers (translation, rotation, gripper) with six model.grid.num_bins, or 4 "
            f"(translation, gripper) with three; the dataset's actions have {action_dim}, model.grid.num_bins "
            f"{list(num_bins)}."
        )
    return GaussianGridTokenizer.fit(normalized_actions, num_bins, grid.distribution, grid.min_sigma, use_spherical)
