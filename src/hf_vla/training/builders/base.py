"""What the builders of all families share."""

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

from hf_vla.models.base import VLAPreTrainedModel, check_folder
from hf_vla.training.arguments import ModelArguments
from hf_vla.training.facts import DataFacts
from hf_vla.training.optimization import quantization_config


def load_checkpoint(arguments: ModelArguments):
    """Load model and processor of `model.path`, a folder or Hub name, in the precision that the recipe wants."""
    path, quantized = arguments.path, {}
    if arguments.quantization is not None:
        quantized["quantization_config"] = quantization_config(arguments.quantization, arguments.dtype)
    # An adapter remembers its checkpoint by this name: a folder's must not depend on where one stands.
    path = str(Path(path).resolve()) if Path(path).is_dir() else path
    return AutoModel.from_pretrained(path, dtype=arguments.dtype, **quantized), AutoProcessor.from_pretrained(path)


def load_backbone(arguments: ModelArguments, auto_class, own_class):
    """Load the vision-language model that gets a new action head.

    Args:
        arguments (`ModelArguments`): holds `model.backbone` and `model.dtype`.
        auto_class (`type`): of transformers, that loads it.
        own_class (`type`): the family's model, whose backbone is taken out of it.

    Returns:
        `tuple`: the backbone, and what has its tokenizer and image processor; of a checkpoint of the family, its whole
        processor.

    Raises:
        ValueError: weights are missing, or it is a model of another family of this library.
    """
    source = arguments.backbone
    check_folder(source, f"model.backbone {source!r}")
    vlm, info = auto_class.from_pretrained(source, dtype=arguments.dtype, output_loading_info=True)
    if wrong := sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind]):
        raise ValueError(
            f"model.backbone {source!r} lacks {len(wrong)} weights of a {type(vlm).__name__}, or has them in another "
            f"shape, among them {wrong[:5]}; they would be random. Does config.json belong to it?"
        )
    if isinstance(vlm, own_class):
        return vlm.backbone, AutoProcessor.from_pretrained(source)
    if isinstance(vlm, VLAPreTrainedModel):
        raise ValueError(
            f"model.backbone {source!r} is a {vlm.config.model_type}: give a vision-language model of transformers, "
            f"or a {own_class.config_class.model_type}."
        )
    # its processor as a whole may want more than we have, for videos for example
    return vlm, SimpleNamespace(
        tokenizer=AutoTokenizer.from_pretrained(source), image_processor=AutoImageProcessor.from_pretrained(source)
    )


def check_sizes(path: str, sizes: dict[str, int | None], wanted: dict[str, int | None], hint: str) -> None:
    """Raise where a checkpoint is for another robot than the dataset's.

    Args:
        path (`str`): the checkpoint.
        sizes (`dict`): its own, see `DataFacts.sizes`.
        wanted (`dict`): the dataset's.
        hint (`str`): how to mend it.

    Raises:
        ValueError: sizes differ.
    """
    for name, value in wanted.items():
        if sizes[name] != value:
            raise ValueError(
                f"The checkpoint {path!r} has {name} {sizes[name]}, the recipe's data have {value}. {hint}"
            )


def continuous_dictionaries(
    facts: DataFacts, normalization: dict[str, Any], state_normalization: dict[str, Any]
) -> dict[str, dict]:
    """What the processor of a family that emits normalised actions is told: statistics, action_config, camera_config.

    Args:
        facts (`DataFacts`): of the data.
        normalization (`dict`), state_normalization (`dict`): see [`~hf_vla.actions.codec.ActionCodec`].
    """
    return {
        "statistics": facts.statistics,
        "action_config": {
            "chunk_size": facts.chunk_size,
            "n_obs_steps": facts.n_obs_steps,
            "normalization": normalization,
            "state_normalization": state_normalization if facts.takes_state else None,
            "tokenizer": None,
            "specs": facts.specs,
        },
        "camera_config": facts.cameras,
    }


def keep_sizes(dictionaries: dict[str, dict], pretrained, sizes: dict[str, int | None]) -> dict[str, int | None]:
    """Let robots that a checkpoint knows, smaller than its largest, be padded as they were in its own training.

    Args:
        dictionaries (`dict`): see `continuous_dictionaries`; changed in place.
        pretrained: the checkpoint's processor.
        sizes (`dict`): the data's, see `DataFacts.sizes`.

    Returns:
        `dict`: the sizes that the checkpoint has to have.
    """
    codec = pretrained.action_codec
    for key, entry in dictionaries["statistics"].items():
        known = codec.statistics.get(key, {}).get("action")
        if known is None or len(known["mean"]) != len(entry["action"]["mean"]):
            return sizes
    kept = {"action_dim": codec.action_dim, "state_dim": sizes["state_dim"] and codec.state_dim}
    dictionaries["action_config"] |= kept
    return sizes | kept


def keep_normalization(dictionaries: dict[str, dict], pretrained) -> None:
    """Let a checkpoint's weights see numbers normalised as they were in its own training.

    Args:
        dictionaries (`dict`): see `continuous_dictionaries`; changed in place.
        pretrained: the checkpoint's processor; a converted one may say nothing.
    """
    known, config = pretrained.action_config or {}, dictionaries["action_config"]
    for name in ("normalization", "state_normalization"):
        config[name] = config[name] and (known.get(name) or config[name])


def config_overrides(arguments: ModelArguments, config_class, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of a new model's configuration: the dataset's, and those of `model.config`.

    Args:
        arguments (`ModelArguments`): holds `model.config`.
        config_class (`type`): the family's configuration.
        given (`dict`): fields that the dataset decides.

    Raises:
        ValueError: `model.config` names no field of the configuration, or one that the dataset decides.
    """
    wanted = arguments.config or {}
    known = {field.name: field.type for field in fields(config_class)}
    for name, value in wanted.items():
        if name in given:
            raise ValueError(f"model.config.{name} follows from the data, {given[name]!r} here: leave it out.")
        if name not in known:
            close = get_close_matches(name, list(known), n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ValueError(f"{config_class.__name__} has no {name!r} that model.config could set{hint}")
        if float in (known[name], *get_args(known[name])) and type(value) is int:
            wanted = {**wanted, name: float(value)}
    return {**given, **wanted}


def refuse(family: str, reason: str, **values) -> None:
    """Raise a ValueError that names those of the recipe's values that are set though the family has no use for them.

    Args:
        family (`str`): model type.
        reason (`str`): what it takes instead.
        values: names in the recipe, `model__grid` for `model.grid`, with what they are set to.
    """
    if given := [name.replace("__", ".") for name, value in values.items() if value]:
        raise ValueError(f"{family} takes no {', '.join(given)}: {reason}")


def refuse_reasoning(family: str, arguments: ModelArguments, facts: DataFacts) -> None:
    """Raise where a recipe asks a family that says nothing, and knows one robot, for what only DiVLA has.

    Raises:
        ValueError: it does.
    """
    refuse(
        family,
        "that is for divla.",
        data__reasoning=facts.reasonings is not None,
        model__new_embodiment=arguments.new_embodiment,
        model__head_weights=arguments.head_weights,
    )
