"""DiVLA from a recipe: a preset, a new head on a pretrained vision-language model, a checkpoint, or a new robot."""

import logging

import torch
from transformers import AutoModelForImageTextToText

from hf_vla.models.divla.configuration_divla import EMBODIMENT_FIELDS, DiVLAConfig
from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction
from hf_vla.models.divla.processing_divla import DiVLAProcessor
from hf_vla.models.divla.scale_dp import load_scale_dp
from hf_vla.models.published import NORMALIZATION, STATE_NORMALIZATION
from hf_vla.training.arguments import ModelArguments
from hf_vla.training.builders.base import (
    check_sizes,
    config_overrides,
    continuous_dictionaries,
    keep_normalization,
    load_backbone,
    load_checkpoint,
    refuse,
)
from hf_vla.training.facts import DataFacts

logger = logging.getLogger(__name__)

SHARED = "Robots share the chunk size, and whether there is a state: choose data.chunk_size and data.state so."
NEW_ROBOT = "To teach a checkpoint with latent actions a new robot, set model.new_embodiment: true."
OTHER_NAME = "The checkpoint knows a robot of this name; name another one by another data.unnorm_key."
NEW_HEAD = "To give its vision-language model a new action head, name it as model.backbone."


def build_divla(arguments: ModelArguments, facts: DataFacts):
    """Make or load a DiVLA whose processor knows the dataset's statistics, robot and cameras.

    `max_reasoning_tokens` follow the data, where the recipe does not say them: enough for the longest text, or 0
    where there is nothing to say. Only before a robot that is trained alone (`model.new_embodiment`) the model speaks
    as it did: its language is frozen, texts would teach it nothing, and the robot learns under what the model says by
    itself, as it will act, see [`~hf_vla.training.trainer.VLATrainer`].

    Args:
        arguments (`ModelArguments`): the recipe's section model.
        facts (`DataFacts`): of the data.

    Returns:
        `tuple`: model and processor.

    Raises:
        ValueError: the recipe asks for what DiVLA has not, the checkpoint is for another robot, the dataset's
            reasonings are longer than the recipe lets the model's be, or nothing is to be said by a checkpoint whose
            other robots act under its words.
    """
    refuse(
        "divla",
        "its actions are continuous, choose a head by model.config.head_config.",
        model__grid=arguments.grid,
        model__adapt_grid=arguments.adapt_grid,
        model__action_tokenizer=arguments.action_tokenizer,
        model__depth_model=arguments.depth_model,
        model__vision_model=arguments.vision_model,
        model__decoding=arguments.decoding,
    )
    if arguments.new_embodiment:
        refuse(
            "divla",
            "with model.new_embodiment the language is frozen, and the robot learns under what the model says by "
            "itself.",
            data__reasoning=facts.reasonings is not None,
        )
    refuse("divla", "it sees the present alone.", data__n_obs_steps=facts.n_obs_steps > 1)
    dictionaries = continuous_dictionaries(facts, NORMALIZATION, STATE_NORMALIZATION)
    if (arguments.config or {}).get("latent_dim") is not None:
        key = facts.only("a batch is for one robot where actions are latent")
        dictionaries["embodiments"] = {key: embodiment_name(key)}
    makers = {"preset": _new, "backbone": _new_head, "path": _pretrained}
    make = next(maker for source, maker in makers.items() if getattr(arguments, source) is not None)
    model, processor = make(arguments, facts, dictionaries)
    if arguments.head_weights:
        fresh = load_scale_dp(model.action_head, arguments.head_weights).fresh
        logger.info("The action head starts from %s, but for %s.", arguments.head_weights, fresh)
    if not arguments.new_embodiment:
        _fit_reasonings(arguments, facts, model.config, processor)
    elif model.config.max_reasoning_tokens > 0:
        logger.info("The robot learns under what the frozen model says, as it will act: each step waits for that.")
    return model, processor


def embodiment_name(unnorm_key: str) -> str:
    """Name of a dataset's robot: that of the dataset, without the points that a weight's name cannot hold."""
    return unnorm_key.replace(".", "_")


def _overrides(arguments: ModelArguments, facts: DataFacts, dictionaries):
    """Fields of a new model's configuration."""
    given = dict(facts.sizes)
    if "embodiments" in dictionaries:
        sizes = {size: given[size] for size in EMBODIMENT_FIELDS}
        given["embodiments"] = {name: sizes for name in dictionaries["embodiments"].values()}
    return config_overrides(arguments, DiVLAConfig, given)


def _new(arguments: ModelArguments, facts: DataFacts, dictionaries):
    """Untrained model."""
    config = DiVLAConfig.from_preset(arguments.preset, **_overrides(arguments, facts, dictionaries))
    model = DiVLAForActionPrediction(config).to(getattr(torch, arguments.dtype))
    return model, DiVLAProcessor.from_scratch(config, **dictionaries)


def _new_head(arguments: ModelArguments, facts: DataFacts, dictionaries):
    """Pretrained vision-language model, or that of a DiVLA, with untrained FiLM, head and robot."""
    overrides = _overrides(arguments, facts, dictionaries)
    backbone, parts = load_backbone(arguments, AutoModelForImageTextToText, DiVLAForActionPrediction)
    end = parts.end_token_id if isinstance(parts, DiVLAProcessor) else parts.tokenizer.eos_token_id
    config = DiVLAConfig(**{"backbone_config": backbone.config, "end_token_id": end, **overrides})
    model = DiVLAForActionPrediction(config, backbone)
    return model, DiVLAProcessor.from_backbone(parts, config, **dictionaries, prompt_config=arguments.prompt_config)


def _pretrained(arguments: ModelArguments, facts: DataFacts, dictionaries):
    """Checkpoint that keeps its weights, prompt and normalisation, but speaks for our dataset."""
    model, pretrained = load_checkpoint(arguments)
    keep_normalization(dictionaries, pretrained)
    own, wanted, hint = {name: getattr(model.config, name) for name in facts.sizes}, facts.sizes, NEW_HEAD
    known, robot = model.config.embodiments or {}, None
    robots = {key: _known_robot(model.config, pretrained, key) for key in pretrained.action_codec.keys if known}
    is_new = False
    if known or arguments.new_embodiment:
        key = facts.only("a batch is for one robot where actions are latent")
        name = embodiment_name(key)
        is_new = arguments.new_embodiment and key not in robots and name not in known
    if is_new:
        wanted, hint = {"chunk_size": facts.chunk_size}, SHARED
        if own["state_dim"] is None or not facts.takes_state:
            wanted["state_dim"] = facts.sizes["state_dim"]
    elif known:
        robot = _known_robot(model.config, pretrained, key)
        own |= known[robot]
        hint = OTHER_NAME if arguments.new_embodiment else NEW_ROBOT
    check_sizes(arguments.path, own, wanted, hint)
    if is_new:
        robot = name
        model.add_embodiment(robot, facts.sizes["action_dim"], facts.sizes["state_dim"])
    if arguments.new_embodiment:
        if not is_new:
            logger.info("The checkpoint knows this robot as %r: it is trained further, alone.", robot)
        model.train_embodiment(robot)
    if robot is not None:
        _keep_others(pretrained, robots, key, robot, dictionaries)
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


def _keep_others(pretrained: DiVLAProcessor, robots: dict[str, str], unnorm_key: str, name: str, dictionaries):
    """Keep what a checkpoint knows of its other robots; what it knew of this one is of another training."""
    gone = {key for key, robot in robots.items() if robot == name}
    config = dictionaries["action_config"]
    known = {each: getattr(pretrained, each) or {} for each in ("statistics", "camera_config")}
    known["specs"] = (pretrained.action_config or {}).get("specs") or {}
    for each, entries in known.items():
        place = config if each == "specs" else dictionaries
        place[each] = {key: entry for key, entry in entries.items() if key not in gone} | place[each]
    others = {key: robot for key, robot in robots.items() if key not in gone}
    dictionaries["embodiments"] = others | {unnorm_key: name}


def _fit_reasonings(arguments: ModelArguments, facts: DataFacts, config: DiVLAConfig, processor) -> None:
    """Let a model that learns to speak say what the data teach to its end, and nothing where they teach nothing.

    What the recipe says of it is kept.

    Raises:
        ValueError: the recipe's max_reasoning_tokens are too few, or other robots act under the words that would be
            taken away.
    """
    limit, wanted = config.max_reasoning_tokens, (arguments.config or {}).get("max_reasoning_tokens")
    answers = [
        processor.prompt_config["answer"].replace("{reasoning}", text.strip()) for text in facts.reasonings or []
    ]
    if not answers:
        reason = "No data.reasoning" if facts.reasonings is None else "The column data.reasoning is blank"
        if wanted:
            logger.warning("%s, so what the model will say (up to %d tokens) is not learnt.", reason, limit)
        elif limit > 0:
            if len(config.embodiments or {}) > 1:
                raise ValueError(
                    f"{reason}, so this checkpoint would act without a word, but its embodiments "
                    f"{sorted(config.embodiments)} act under what it says: give data.reasoning, or set "
                    "model.new_embodiment: true to train this robot alone."
                )
            logger.info("%s: the model will act without a word (max_reasoning_tokens 0).", reason)
            config.max_reasoning_tokens = 0
        return
    if facts.without_text > 0:
        logger.warning(
            "%.3g %% of the frames have no text: their actions are learnt without words, but the model speaks there, "
            "too.",
            100 * facts.without_text,
        )
    lengths = [len(ids) for ids in processor.tokenizer(answers, add_special_tokens=False)["input_ids"]]
    if (longest := max(lengths)) <= limit:
        return
    message = (
        f"The model may say {limit} tokens, the data's longest reasoning has {longest} with its end: "
        f"{answers[lengths.index(longest)]!r}"
    )
    if wanted is not None:
        raise ValueError(f"{message}. Set model.config.max_reasoning_tokens to {longest} or more.")
    logger.info("%s. From now on it may say as many.", message)
    config.max_reasoning_tokens = longest
