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
    config_overrides,
    load_checkpoint,
    refuse,
    refuse_reasoning,
)
from hf_vla.training.facts import DataFacts

SHARED = ("chunk_size", "n_obs_steps")  # of processor and config; no weight depends on them


def build_spatialvla(arguments: ModelArguments, facts: DataFacts):
    """Make or load a SpatialVLA whose processor knows the dataset's statistics, grid, robot and camera.

    Args:
        arguments (`ModelArguments`): the recipe's section model.
        facts (`DataFacts`): of the data.

    Returns:
        `tuple`: model and processor.

    Raises:
        ValueError: the recipe asks for what SpatialVLA has not, or its grid does not fit the actions.
    """
    refuse("spatialvla", "give model.preset or model.path.", model__backbone=arguments.backbone)
    refuse_reasoning("spatialvla", arguments, facts)
    refuse("spatialvla", "it sees images and words alone.", data__state=facts.takes_state)
    names = next(iter(facts.cameras.values()))
    if len(names) != 1:
        names = [camera["name"] for camera in names]
        raise ValueError(f"spatialvla looks through one camera: choose one of {names} in data.cameras.")
    dictionaries = {
        "statistics": facts.statistics,
        "action_config": {
            "chunk_size": facts.chunk_size,
            "n_obs_steps": facts.n_obs_steps,
            "normalization": {"mode": _modes(facts), "clip": True, "convention": "spatialvla"},
            "tokenizer": None,
            "specs": facts.specs,
        },
        "camera_config": {key: cameras[0] for key, cameras in facts.cameras.items()},
    }
    codec = ActionCodec(dictionaries["statistics"], dictionaries["action_config"])
    normalized_actions = np.concatenate(
        [codec.normalizer(key).normalize(dataset.actions) for key, dataset in facts.datasets.items()]
    )
    make = _new if arguments.preset is not None else _pretrained
    model, processor = make(arguments, normalized_actions, dictionaries)
    for key, dataset in facts.datasets.items():
        if model.config.use_ego3d and dataset.cameras[0].intrinsics is None:
            raise ValueError(
                f"This model encodes 3-D positions: give fovy or intrinsics of the camera of {key!r} in data.cameras."
            )
    return model, processor


def _modes(facts: DataFacts) -> list[str]:
    """How each number is normalised; robots that share a grid share the numbers' places."""
    layouts = {}
    for key, dataset in facts.datasets.items():
        spec = dataset.action_spec
        if spec.gripper is None:
            raise ValueError(
                "SpatialVLA's grid ends in a gripper: give data.action.gripper with index, open and closed."
            )
        layouts[key] = (spec.kind, len(spec.names), spec.gripper.index)
    if len(set(layouts.values())) > 1:
        raise ValueError(
            "SpatialVLA's grid bins the actions of all datasets alike; these differ in their kind, their number of "
            f"dimensions or the place of the gripper: {layouts}. Leave out those that do not fit."
        )
    _, action_dim, gripper = next(iter(layouts.values()))
    return ["zero_one" if index == gripper else "quantile" for index in range(action_dim)]


def _new(arguments: ModelArguments, normalized_actions, dictionaries):
    """Untrained model whose vocabulary has room for the grid."""
    grid = _fit(normalized_actions, arguments.grid or GridArguments(), NUM_BINS)
    dictionaries["action_config"]["tokenizer"] = {"type": "gaussian_grid", **grid.to_dict()}
    preset = SpatialVLAConfig.from_preset(arguments.preset)
    given = {
        **{name: dictionaries["action_config"][name] for name in SHARED},
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
    model, pretrained = load_checkpoint(arguments)
    grid = source = pretrained.action_codec.tokenizer
    if arguments.adapt_grid:
        grid = _fit(normalized_actions, arguments.grid or GridArguments(), source.num_bins, source.use_spherical)
        model.adapt_spatial_embeddings(source, grid)
    dictionaries["action_config"]["tokenizer"] = {"type": "gaussian_grid", **grid.to_dict()}
    processor = type(pretrained)(pretrained.image_processor, pretrained.tokenizer, **dictionaries)
    for name in SHARED:
        own, wanted = getattr(model.config, name), dictionaries["action_config"][name]
        if arguments.lora is not None and wanted != own:
            raise ValueError(f"An adapter shares its checkpoint's config: expected data.{name} {own}, came {wanted}.")
        setattr(model.config, name, wanted)
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
