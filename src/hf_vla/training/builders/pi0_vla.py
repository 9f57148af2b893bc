"""pi0 from a recipe: a preset, or a checkpoint of transformers' model in our clothes."""

import torch

from hf_vla.models.pi0_vla.configuration_pi0_vla import PI0VLAConfig
from hf_vla.models.pi0_vla.modeling_pi0_vla import PI0VLAForActionPrediction
from hf_vla.models.pi0_vla.processing_pi0_vla import PI0VLAProcessor
from hf_vla.training.arguments import ModelArguments
from hf_vla.training.builders.base import (
    config_overrides,
    continuous_dictionaries,
    keep_normalization,
    load_checkpoint,
    refuse,
    refuse_reasoning,
)
from hf_vla.training.facts import DataFacts

NORMALIZATION = {"mode": "mean_std", "clip": False, "convention": "lerobot"}  # as published, actions and state alike


def build_pi0_vla(arguments: ModelArguments, facts: DataFacts):
    """Make or load a pi0 whose processor knows the dataset's statistics, robot and cameras.

    Args:
        arguments (`ModelArguments`): the recipe's section model.
        facts (`DataFacts`): of the data.

    Returns:
        `tuple`: model and processor.

    Raises:
        ValueError: the recipe asks for what pi0 has not, or actions or states are too wide for it.
    """
    refuse(
        "pi0_vla",
        "give model.preset or model.path.",
        model__grid=arguments.grid,
        model__adapt_grid=arguments.adapt_grid,
        model__action_tokenizer=arguments.action_tokenizer,
        model__depth_model=arguments.depth_model,
        model__vision_model=arguments.vision_model,
        model__decoding=arguments.decoding,
        model__backbone=arguments.backbone,
    )
    refuse_reasoning("pi0_vla", arguments, facts)
    refuse("pi0_vla", "it sees the present alone.", data__n_obs_steps=facts.n_obs_steps > 1)
    dictionaries = continuous_dictionaries(facts, NORMALIZATION, NORMALIZATION)
    if arguments.path is None:
        overrides = config_overrides(arguments, PI0VLAConfig, {"chunk_size": facts.chunk_size})
        config = PI0VLAConfig.from_preset(arguments.preset, **overrides)
        model = PI0VLAForActionPrediction(config).to(getattr(torch, arguments.dtype))
        processor = PI0VLAProcessor.from_scratch(config, **dictionaries)
    else:
        model, pretrained = load_checkpoint(arguments)
        keep_normalization(dictionaries, pretrained)
        processor = PI0VLAProcessor(pretrained.image_processor, pretrained.tokenizer, **dictionaries)
        model.config.chunk_size = facts.chunk_size  # nothing in the weights depends on it
    processor.check_sizes(model.config)
    return model, processor
