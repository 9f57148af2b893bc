"""TinyVLA from a recipe: a preset, a new head on a pretrained vision-language model, or a checkpoint."""

import torch
from transformers import AutoModel

from hf_vla.models.published import NORMALIZATION, STATE_NORMALIZATION
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.modeling_tinyvla import TinyVLAForActionPrediction
from hf_vla.models.tinyvla.processing_tinyvla import TinyVLAProcessor
from hf_vla.training.arguments import ModelArguments
from hf_vla.training.builders.base import (
    check_sizes,
    config_overrides,
    continuous_dictionaries,
    keep_normalization,
    keep_sizes,
    load_backbone,
    load_checkpoint,
    refuse,
    refuse_reasoning,
)
from hf_vla.training.facts import DataFacts


def build_tinyvla(arguments: ModelArguments, facts: DataFacts):
    """Make or load a TinyVLA whose processor knows the dataset's statistics, robot and cameras.

    Args:
        arguments (`ModelArguments`): the recipe's section model.
        facts (`DataFacts`): of the data.

    Returns:
        `tuple`: model and processor.

    Raises:
        ValueError: the recipe asks for what TinyVLA has not, or the checkpoint is for another robot.
    """
    refuse(
        "tinyvla",
        "its actions are continuous, choose a head by model.config.head_config.",
        model__grid=arguments.grid,
        model__adapt_grid=arguments.adapt_grid,
        model__action_tokenizer=arguments.action_tokenizer,
        model__depth_model=arguments.depth_model,
        model__vision_model=arguments.vision_model,
        model__decoding=arguments.decoding,
    )
    refuse_reasoning("tinyvla", arguments, facts)
    dictionaries = continuous_dictionaries(facts, NORMALIZATION, STATE_NORMALIZATION)
    if arguments.path is not None:
        return _pretrained(arguments, facts, dictionaries)
    overrides = config_overrides(arguments, TinyVLAConfig, {**facts.sizes, "n_obs_steps": facts.n_obs_steps})
    _check_readout(overrides)
    make = _new if arguments.preset is not None else _new_head
    return make(arguments, overrides, dictionaries)


def _new(arguments: ModelArguments, overrides, dictionaries):
    """Untrained model whose vocabulary has room for the readout tokens."""
    num_readout_tokens = overrides.pop("num_readout_tokens", 0)
    config = TinyVLAConfig.from_preset(arguments.preset, **overrides)
    text_config = config.get_text_config()
    text_config.vocab_size = max(text_config.vocab_size, config.readout_token_id + num_readout_tokens)
    config.num_readout_tokens = num_readout_tokens
    model = TinyVLAForActionPrediction(config).to(getattr(torch, arguments.dtype))
    return model, TinyVLAProcessor.from_scratch(config, **dictionaries)


def _new_head(arguments: ModelArguments, overrides, dictionaries):
    """Pretrained vision-language model, or that of a TinyVLA, with an untrained head."""
    backbone, parts = load_backbone(arguments, AutoModel, TinyVLAForActionPrediction)
    first = parts.tokenizer.get_vocab().get("<readout000>", len(parts.tokenizer))
    size = first + overrides.get("num_readout_tokens", 0)
    if size > backbone.get_input_embeddings().num_embeddings:
        backbone.resize_token_embeddings(size, mean_resizing=False)
    config = TinyVLAConfig(**{"backbone_config": backbone.config, "readout_token_id": first, **overrides})
    model = TinyVLAForActionPrediction(config, backbone)
    return model, TinyVLAProcessor.from_backbone(parts, config, **dictionaries, prompt_config=arguments.prompt_config)


def _check_readout(overrides) -> None:
    """Say before the training, not in its first step, how many readout tokens a parallel head needs."""
    head = overrides.get("head_config") or {}
    needed = overrides["chunk_size"] * head.get("tokens_per_action", 1)
    if head.get("network") == "parallel" and overrides.get("num_readout_tokens", 0) != needed:
        raise ValueError(
            f"A parallel head reads head_config.tokens_per_action {head.get('tokens_per_action', 1)} readout tokens "
            f"for each of the data.chunk_size {overrides['chunk_size']} actions: set model.config.num_readout_tokens "
            f"to {needed}, came {overrides.get('num_readout_tokens', 0)}."
        )


def _pretrained(arguments: ModelArguments, facts: DataFacts, dictionaries):
    """Checkpoint that keeps its weights, prompt and normalisation, but speaks for our dataset."""
    model, pretrained = load_checkpoint(arguments)
    sizes = keep_sizes(dictionaries, pretrained, facts.sizes)
    if facts.takes_state:  # the head sees the states of all steps
        sizes["n_obs_steps"] = facts.n_obs_steps
    own = {name: getattr(model.config, name) for name in sizes}
    hint = "To give its vision-language model a new action head, name it as model.backbone."
    check_sizes(arguments.path, own, sizes, hint)
    model.config.n_obs_steps = facts.n_obs_steps
    keep_normalization(dictionaries, pretrained)
    return model, TinyVLAProcessor(
        pretrained.image_processor, pretrained.tokenizer, **dictionaries, prompt_config=pretrained.prompt_config
    )
