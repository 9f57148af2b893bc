"""DiVLA from a recipe: a preset, a new head on a pretrained vision-language model, a checkpoint, or a new robot."""

import logging

import torch
from transformers import AutoModelForImageTextToText

from hf_vla.actions.heads.networks.film import ReasoningFiLM
from hf_vla.actions.heads.networks.latent import Embodiment
from hf_vla.actions.heads.registry import build_action_head
from hf_vla.models.divla.configuration_divla import EMBODIMENT_FIELDS, DiVLAConfig
from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction
from hf_vla.models.divla.processing_divla import DiVLAProcessor
from hf_vla.models.divla.scale_dp import load_scale_dp
from hf_vla.training.arguments import ModelArguments
from hf_vla.training.builders.base import (
    DatasetFacts,
    check_sizes,
    config_overrides,
    continuous_dictionaries,
    keep_normalization,
    load_backbone,
    load_checkpoint,
    refuse,
)
from hf_vla.training.builders.tinyvla import NORMALIZATION, STATE_NORMALIZATION  # published for both

logger = logging.getLogger(__name__)

SHARED = "Robots share the chunk size, and whether there is a state: choose data.chunk_size and data.state so."
NEW_ROBOT = "To teach a checkpoint with latent actions a new robot, set model.new_embodiment: true."
NEW_HEAD = "To give its vision-language model a new action head, name it as model.backbone."


def build_divla(arguments: ModelArguments, facts: DatasetFacts):
    """Make or load a DiVLA whose processor knows the dataset's statistics, robot and cameras.

    Args:
        arguments (`ModelArguments`): the recipe's section model.
        facts (`DatasetFacts`): of the dataset.

    Returns:
        `tuple`: model and processor.

    Raises:
        ValueError: the recipe asks for what DiVLA has not, the checkpoint is for another robot, or the dataset's
            reasonings are longer than the model's may be.
    """
    refuse(
        "divla",
        "its actions are continuous, choose a head by model.config.head_config.",
        model__grid=arguments.grid,
        model__adapt_grid=arguments.adapt_grid,
    )
    dictionaries = continuous_dictionaries(facts, NORMALIZATION, STATE_NORMALIZATION)
    make = _new if arguments.preset is not None else _new_head if arguments.backbone is not None else _pretrained
    model, processor = make(arguments, facts, dictionaries)
    if arguments.head_weights:
        fresh = load_scale_dp(model.action_head, arguments.head_weights).fresh
        logger.info("The action head starts from %s, but for %s.", arguments.head_weights, fresh)
    _check_reasonings(facts, model.config, processor, is_new=arguments.path is None)
    return model, processor


def embodiment_name(unnorm_key: str) -> str:
    """Name of a dataset's robot: that of the dataset, without the points that a weight's name cannot hold."""
    return unnorm_key.replace(".", "_")


def _overrides(arguments: ModelArguments, facts: DatasetFacts, dictionaries):
    """Fields of a new model's configuration; with latents, the dictionaries learn the dataset's robot."""
    given, wanted = dict(facts.sizes), arguments.config or {}
    if wanted.get("latent_dim") is not None:
        name = embodiment_name(facts.unnorm_key)
        given["embodiments"] = {name: {size: given[size] for size in EMBODIMENT_FIELDS}}
        dictionaries["embodiments"] = {facts.unnorm_key: name}
    overrides = config_overrides(arguments, DiVLAConfig, given)
    if not facts.reasonings and "max_reasoning_tokens" not in wanted:
        logger.info("No data.reasoning: the model will act without a word (max_reasoning_tokens 0).")
        overrides["max_reasoning_tokens"] = 0
    return overrides


def _new(arguments: ModelArguments, facts: DatasetFacts, dictionaries):
    """Untrained model."""
    config = DiVLAConfig.from_preset(arguments.preset, **_overrides(arguments, facts, dictionaries))
    model = DiVLAForActionPrediction(config).to(getattr(torch, arguments.dtype))
    return model, DiVLAProcessor.from_scratch(config, **dictionaries)


def _new_head(arguments: ModelArguments, facts: DatasetFacts, dictionaries):
    """Pretrained vision-language model, or that of a DiVLA, with untrained FiLM, head and robot."""
    overrides = _overrides(arguments, facts, dictionaries)
    backbone, parts = load_backbone(arguments, AutoModelForImageTextToText, DiVLAForActionPrediction)
    end = parts.end_token_id if isinstance(parts, DiVLAProcessor) else parts.tokenizer.eos_token_id
    config = DiVLAConfig(**{"backbone_config": backbone.config, "end_token_id": end, **overrides})
    with torch.device("meta"):  # a second backbone would take time and memory
        model = DiVLAForActionPrediction(config)
    hidden_size, latent_dim, state_dim = config.get_text_config().hidden_size, config.latent_dim, config.state_dim
    model.film = ReasoningFiLM(hidden_size) if config.use_film else None
    model.action_head = build_action_head(
        config.head_config, hidden_size, latent_dim or config.action_dim, config.chunk_size, state_dim
    )
    for name, sizes in (config.embodiments or {}).items():
        model.embodiments[name] = Embodiment(**sizes, latent_dim=latent_dim, shared_state_dim=state_dim)
    model.backbone = backbone
    model.to(getattr(torch, arguments.dtype))
    return model, DiVLAProcessor.from_backbone(parts, config, **dictionaries, prompt_config=arguments.prompt_config)


def _pretrained(arguments: ModelArguments, facts: DatasetFacts, dictionaries):
    """Checkpoint that keeps its weights, prompt and normalisation, but speaks for our dataset."""
    model, pretrained = load_checkpoint(arguments.path, arguments.dtype)
    keep_normalization(dictionaries, pretrained)
    own, wanted, hint = {name: getattr(model.config, name) for name in facts.sizes}, facts.sizes, NEW_HEAD
    if arguments.new_embodiment:
        wanted, hint = {"chunk_size": facts.chunk_size}, SHARED
        if own["state_dim"] is None or facts.state_spec is None:
            wanted["state_dim"] = facts.sizes["state_dim"]
    elif model.config.embodiments:
        name, hint = _known_robot(model.config, pretrained, facts.unnorm_key), NEW_ROBOT
        own |= model.config.embodiments[name]
        dictionaries["embodiments"] = {facts.unnorm_key: name}
    check_sizes(arguments.path, own, wanted, hint)
    if arguments.new_embodiment:
        _add_robot(model, pretrained, facts, dictionaries)
    return model, DiVLAProcessor(
        pretrained.image_processor, pretrained.tokenizer, **dictionaries, prompt_config=pretrained.prompt_config
    )


def _known_robot(config: DiVLAConfig, pretrained: DiVLAProcessor, unnorm_key: str) -> str:
    """The embodiment that the checkpoint has for a dataset: what it knows it by, one of its name, or the only one."""
    known = config.embodiments
    name = (pretrained.embodiments or {}).get(unnorm_key, embodiment_name(unnorm_key))
    if name not in known and len(known) > 1:
        raise ValueError(
            f"None of the checkpoint's embodiments {sorted(known)} is known to be of the dataset {unnorm_key!r}: set "
            f"data.unnorm_key to a name that it knows. {NEW_ROBOT}"
        )
    return name if name in known else next(iter(known))


def _add_robot(model, pretrained: DiVLAProcessor, facts: DatasetFacts, dictionaries) -> None:
    """Add a dataset's robot to a model, to train it alone; what the checkpoint knows of the others stays known."""
    key, known = facts.unnorm_key, pretrained.action_codec.keys
    if key in known:
        raise ValueError(
            f"The checkpoint knows a dataset {key!r} already: name yours by another data.unnorm_key, or leave "
            "model.new_embodiment out to go on with that robot."
        )
    name = embodiment_name(key)
    old = {each: _known_robot(model.config, pretrained, each) for each in known} if model.config.embodiments else {}
    model.add_embodiment(name, facts.sizes["action_dim"], facts.sizes["state_dim"])
    model.train_embodiment(name)
    config = dictionaries["action_config"]
    config["specs"] = ((pretrained.action_config or {}).get("specs") or {}) | config["specs"]
    for each in ("statistics", "camera_config"):
        dictionaries[each] = (getattr(pretrained, each) or {}) | dictionaries[each]
    dictionaries["embodiments"] = old | {key: name}


def _check_reasonings(facts: DatasetFacts, config: DiVLAConfig, processor: DiVLAProcessor, is_new: bool) -> None:
    """Say before the training, not after it, that the model would not finish what it learns to say."""
    limit = config.max_reasoning_tokens
    if not facts.reasonings:
        if limit > 0:
            logger.warning("data.reasoning names nothing to say, but the model says up to %d tokens.", limit)
        return
    answer = processor.prompt_config["answer"]
    answers = [answer.replace("{reasoning}", text.strip()) for text in facts.reasonings]
    lengths = [len(ids) for ids in processor.tokenizer(answers, add_special_tokens=False)["input_ids"]]
    if (longest := max(lengths, default=0)) > limit:
        message = (
            f"The model may say {limit} tokens, the data's longest reasoning has {longest} with its end: "
            f"{answers[lengths.index(longest)]!r}"
        )
        if is_new:
            raise ValueError(f"{message}. Set model.config.max_reasoning_tokens to {longest} or more.")
        logger.warning("%s. In predictions it will be cut short.", message)
