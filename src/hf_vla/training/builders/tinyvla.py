"""TinyVLA from a recipe: a preset, a new head on a pretrained vision-language model, or a checkpoint."""

from types import SimpleNamespace

import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.modeling_tinyvla import TinyVLAForActionPrediction
from hf_vla.models.tinyvla.processing_tinyvla import TinyVLAProcessor
from hf_vla.training.arguments import ModelArguments
from hf_vla.training.builders.base import (
    DatasetFacts,
    config_overrides,
    continuous_dictionaries,
    load_checkpoint,
    refuse,
)

# as published
NORMALIZATION = {"mode": "min_max", "clip": False, "convention": "tinyvla"}
STATE_NORMALIZATION = {"mode": "mean_std", "clip": False, "convention": "tinyvla"}


def build_tinyvla(arguments: ModelArguments, facts: DatasetFacts):
    """Make or load a TinyVLA whose processor knows the dataset's statistics, robot and cameras.

    Args:
        arguments (`ModelArguments`): the recipe's section model.
        facts (`DatasetFacts`): of the dataset.

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
    )
    sizes = {
        "action_dim": len(facts.action_spec.names),
        "state_dim": None if facts.state_spec is None else len(facts.state_spec.names),
        "chunk_size": facts.chunk_size,
    }
    dictionaries = continuous_dictionaries(facts, NORMALIZATION, STATE_NORMALIZATION)
    if arguments.path is not None:
        return _pretrained(arguments, sizes, dictionaries)
    overrides = config_overrides(arguments, TinyVLAConfig, sizes)
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
    vlm = AutoModel.from_pretrained(arguments.backbone, dtype=arguments.dtype)
    backbone = vlm.backbone if isinstance(vlm, TinyVLAForActionPrediction) else vlm
    # Its processor as a whole may want more than we have, for videos for example.
    tokenizer = AutoTokenizer.from_pretrained(arguments.backbone)
    parts = SimpleNamespace(
        tokenizer=tokenizer, image_processor=AutoImageProcessor.from_pretrained(arguments.backbone)
    )
    first = tokenizer.get_vocab().get("<readout000>", len(tokenizer))
    size = first + overrides.get("num_readout_tokens", 0)
    if size > backbone.get_input_embeddings().num_embeddings:
        backbone.resize_token_embeddings(size, mean_resizing=False)
    config = TinyVLAConfig(**{"backbone_config": backbone.config, "readout_token_id": first, **overrides})
    model = TinyVLAForActionPrediction(config).to(getattr(torch, arguments.dtype))
    model.backbone = backbone
    return model, TinyVLAProcessor.from_backbone(parts, config, **dictionaries)


def _pretrained(arguments: ModelArguments, sizes, dictionaries):
    """Checkpoint that keeps its weights, prompt and normalisation, but speaks for our dataset."""
    model, pretrained = load_checkpoint(arguments.path, arguments.dtype)
    for name, wanted in sizes.items():
        if getattr(model.config, name) != wanted:
            raise ValueError(
                f"The checkpoint {arguments.path!r} has {name} {getattr(model.config, name)}, the recipe's data have "
                f"{wanted}. To give its vision-language model a new action head, name it as model.backbone."
            )
    known = pretrained.action_config or {}  # a converted checkpoint may say nothing
    for name in ("normalization", "state_normalization"):
        dictionaries["action_config"][name] = known.get(name) or dictionaries["action_config"][name]
    return model, TinyVLAProcessor(
        pretrained.image_processor, pretrained.tokenizer, **dictionaries, prompt_config=pretrained.prompt_config
    )
