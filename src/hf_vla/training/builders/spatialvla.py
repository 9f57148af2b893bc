"""SpatialVLA from a recipe: its action grid is fitted to the dataset, or kept from the checkpoint."""

import numpy as np
import torch

from hf_vla.actions.codec import ActionCodec
from hf_vla.actions.tokenizers.gaussian_grid import NUM_BINS, GaussianGridTokenizer
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration
from hf_vla.models.spatialvla.processing_spatialvla import SpatialVLAProcessor
from hf_vla.training.arguments import GridArguments, ModelArguments
from hf_vla.training.builders.base import (
    DatasetFacts,
    config_overrides,
    load_checkpoint,
    refuse,
    refuse_reasoning,
)


def build_spatialvla(arguments: ModelArguments, facts: DatasetFacts):
    """Make or load a SpatialVLA whose processor knows the dataset's statistics, grid, robot and camera.

    Args:
        arguments (`ModelArguments`): the recipe's section model.
        facts (`DatasetFacts`): of the dataset.

    Returns:
        `tuple`: model and processor.

    Raises:
        ValueError: the recipe asks for what SpatialVLA has not, or its grid does not fit the actions.
    """
    spec = facts.action_spec
    refuse("spatialvla", "give model.preset or model.path.", model__backbone=arguments.backbone)
    refuse_reasoning("spatialvla", arguments, facts)
    refuse("spatialvla", "it sees images and words alone.", data__state=facts.state_spec)
    if len(facts.cameras) != 1:
        names = [camera.name for camera in facts.cameras]
        raise ValueError(f"spatialvla looks through one camera: choose one of {names} in data.cameras.")
    if spec.gripper is None:
        raise ValueError("SpatialVLA's grid ends in a gripper: give data.action.gripper with index, open and closed.")
    modes = ["quantile"] * len(spec.names)
    modes[spec.gripper.index] = "zero_one"
    dictionaries = {
        "statistics": {facts.unnorm_key: facts.statistics},
        "action_config": {
            "chunk_size": facts.chunk_size,
            "normalization": {"mode": modes, "clip": True, "convention": "spatialvla"},
            "tokenizer": None,
            "specs": {facts.unnorm_key: facts.specs},
        },
        "camera_config": {facts.unnorm_key: facts.cameras[0].to_dict()},
    }
    codec = ActionCodec(dictionaries["statistics"], dictionaries["action_config"])
    normalized_actions = codec.normalizer(facts.unnorm_key).normalize(facts.actions)
    make = _new if arguments.preset is not None else _pretrained
    model, processor = make(arguments, normalized_actions, dictionaries)
    if model.config.use_ego3d and facts.cameras[0].intrinsics is None:
        raise ValueError("This model encodes 3-D positions: give fovy or intrinsics of the camera in data.cameras.")
    return model, processor


def _new(arguments: ModelArguments, normalized_actions, dictionaries):
    """Untrained model whose vocabulary has room for the grid."""
    grid = _fit(normalized_actions, arguments.grid or GridArguments(), NUM_BINS)
    dictionaries["action_config"]["tokenizer"] = {"type": "gaussian_grid", **grid.to_dict()}
    preset = SpatialVLAConfig.from_preset(arguments.preset)
    given = {
        "chunk_size": dictionaries["action_config"]["chunk_size"],
        "spatial_token_num": grid.vocab_size,
        "action_block_sizes": [end - start for _, start, end in grid.blocks],
        "text_config": preset.text_config.to_dict() | {"vocab_size": preset.action_token_begin_idx + grid.vocab_size},
    }
    config = SpatialVLAConfig.from_preset(arguments.preset, **config_overrides(arguments, SpatialVLAConfig, given))
    model = SpatialVLAForConditionalGeneration(config).to(getattr(torch, arguments.dtype))
    return model, SpatialVLAProcessor.from_scratch(config, **dictionaries)


def _pretrained(arguments: ModelArguments, normalized_actions, dictionaries):
    """Checkpoint that keeps its weights, tokenizer and, unless it is adapted, its grid, but speaks for our dataset.

    Its text embedding stays frozen, as published.
    """
    model, pretrained = load_checkpoint(arguments.path, arguments.dtype)
    grid = source = pretrained.action_codec.tokenizer
    if arguments.adapt_grid:
        grid = _fit(normalized_actions, arguments.grid or GridArguments(), source.num_bins, source.use_spherical)
        model.adapt_spatial_embeddings(source, grid)
    dictionaries["action_config"]["tokenizer"] = {"type": "gaussian_grid", **grid.to_dict()}
    chunk_size = dictionaries["action_config"]["chunk_size"]
    processor = type(pretrained)(pretrained.image_processor, pretrained.tokenizer, **dictionaries)
    if arguments.lora is not None and chunk_size != model.config.chunk_size:
        raise ValueError(
            f"An adapter shares its checkpoint's config: expected data.chunk_size {model.config.chunk_size}, came "
            f"{chunk_size}."
        )
    model.config.chunk_size = chunk_size
    if model.config.use_spatial_token:
        model.get_input_embeddings().requires_grad_(False)
    return model, processor


def _fit(normalized_actions: np.ndarray, grid: GridArguments, num_bins, use_spherical: bool = True):
    num_bins, action_dim = grid.num_bins or num_bins, normalized_actions.shape[-1]
    if action_dim not in (4, 7) or len(num_bins) + 1 != action_dim:
        raise ValueError(
            "SpatialVLA's grid bins 7 numbers (translation, rotation, gripper) with six model.grid.num_bins, or 4 "
            f"(translation, gripper) with three; the dataset's actions have {action_dim}, model.grid.num_bins "
            f"{list(num_bins)}."
        )
    return GaussianGridTokenizer.fit(normalized_actions, num_bins, grid.distribution, grid.min_sigma, use_spherical)
