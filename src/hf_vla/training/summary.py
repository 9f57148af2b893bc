"""What a model card tells of a training: `training.json`, which lies beside every model that a recipe trained.

It names no folder but by its last part, and no machine: it is made to be published.
"""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NotRequired, TypedDict, get_type_hints
from urllib.parse import urlsplit

import numpy as np
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id

from hf_vla.models.conversion import read_json

SUMMARY = "training.json"
MAX_INSTRUCTIONS = 100
SOURCES = ("path", "backbone", "vision_model", "depth_model", "head_weights")  # what a training begins with
DATA = (
    *("mixture", "chunk_size", "chunk_tail", "n_obs_steps", "balance", "reasoning", "filters", "chunks"),
    *("camera_dropout", "state_dropout"),
)
TRAINING = (
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "optim", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2", "max_grad_norm"),
    *("bf16", "fp16", "ema_decay", "seed", "load_best_model_at_end", "metric_for_best_model"),
)  # and whatever else of these sections is not told


class Source(TypedDict):
    """What a training began with, or learnt from."""

    name: str
    on_hub: bool


class Dataset(Source):
    """A dataset that a training learnt from."""

    held_out_episodes: int


class Summary(TypedDict):
    """What `training.json` holds."""

    started_from: dict[str, dict]
    datasets: dict[str, dict]
    instructions: list[str]
    num_instructions: int
    trainable_parameters: int | None
    recipe: dict
    steps: int
    best_of: NotRequired[int]
    action_error: float | int | None


def training_summary(recipe, datasets: Sequence, model) -> dict[str, Any]:
    """Say what is trained, on what, how and from what.

    Args:
        recipe ([`~hf_vla.training.recipe.Recipe`]): of the run.
        datasets (`Sequence[OpenDataset]`): what it learns from, opened.
        model (`nn.Module`): ready to be trained: what is frozen is frozen.

    Returns:
        `dict`: JSON-safe; "started_from", "datasets", "instructions" and their number, "trainable_parameters",
        "recipe".
    """
    instructions = sorted({text for opened in datasets for text in set(opened.episodes.texts("task")) if text})
    held_out = {
        each.arguments.unnorm_key: int(np.unique(each.episodes.column("episode_index")[each.eval_rows]).size)
        for each in datasets
    }
    return {
        "started_from": {
            name: source_of(value) for name in SOURCES if (value := getattr(recipe.model, name)) is not None
        },
        "datasets": {
            each.arguments.unnorm_key: {
                **source_of(each.arguments.source),
                "held_out_episodes": held_out[each.arguments.unnorm_key],
            }
            for each in datasets
        },
        "instructions": instructions[:MAX_INSTRUCTIONS],
        "num_instructions": len(instructions),
        "trainable_parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "recipe": short_recipe(recipe),
    }


def write_summary(summary: dict[str, Any], state, folder: str | Path) -> None:
    """Write `training.json`, with how far the training has come.

    Args:
        summary (`dict`): see [`training_summary`].
        state ([`~transformers.TrainerState`]): of the Trainer: steps, and the error of the last evaluation, if any. At
            the end of a training that loads its best checkpoint, "steps" and the error are that checkpoint's, and
            "best_of" says how many steps there were.
        folder (`str` or `Path`): gets the file.
    """
    progress = {"steps": state.global_step}
    evaluations = [entry for entry in state.log_history if "eval_action_error" in entry]
    loads_best = summary.get("recipe", {}).get("training", {}).get("load_best_model_at_end")
    has_ended = any("train_runtime" in entry for entry in state.log_history)  # until then it saves what it trains
    if loads_best and has_ended and state.best_model_checkpoint is not None:
        progress = {"steps": int(state.best_model_checkpoint.rpartition("-")[2]), "best_of": state.global_step}
        evaluations = [entry for entry in evaluations if entry["step"] == progress["steps"]]
    error = evaluations[-1]["eval_action_error"] if evaluations else None
    told = summary | progress | {"action_error": error}
    Path(folder, SUMMARY).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def read_summary(folder: str | Path) -> dict[str, Any] | None:
    """Return what `training.json` says; None where there is none.

    Raises:
        ValueError: it is broken; the text names the file and the entry.
    """
    path = Path(folder, SUMMARY)
    if not path.is_file():
        return None
    summary = read_checked(path, Summary)
    for section, schema in (("started_from", Source), ("datasets", Dataset)):
        for name, values in summary[section].items():
            check(path, values, schema, f"{section}.{name}.")
    return summary


def read_checked(path: Path, schema: type) -> dict[str, Any]:
    """Read a JSON object that has the entries of a `TypedDict`; others may be there, too.

    Raises:
        ValueError: one is missing, of another type or no text; the error names the file and the entry.
    """
    values = read_json(path)
    check(path, values, schema)
    return values


def check(path: Path, values: dict[str, Any], schema: Any, within: str = "") -> None:
    """Check what was read; see [`read_checked`].

    Args:
        path (`Path`): where it was read.
        values (`dict`): some of that.
        schema (`type`): a `TypedDict`.
        within (`str`): of which entry the values are.
    """
    known = {name: values[name] for name in get_type_hints(schema) if name in values}
    if missing := sorted(schema.__required_keys__ - known.keys()):
        raise ValueError(f"{path}: expected {within}{missing[0]}, which it lacks; add it, or remove the file.")
    try:
        validate_typed_dict(schema, known)
    except StrictDataclassError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: {within and f'in {within[:-1]}: '}{said}; mend it, or remove the file.") from error
    for name, value in known.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            raise ValueError(f"{path}: {within}{name} is no text ({error}); mend it, or remove the file.") from error


def is_hub_name(name: str) -> bool:
    """Whether this is `owner/name`, as the Hub's repositories are called."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def source_of(source: str) -> dict[str, Any]:
    """Name a source, and say whether the Hub has it; of a folder or a URL only the last part is named."""
    if not Path(source).exists() and is_hub_name(source):
        return {"name": source, "on_hub": True}
    url = urlsplit(source)
    path = url.path if url.scheme else str(Path(source).resolve())
    return {"name": Path(path).name or url.hostname or source, "on_hub": False}


def short_recipe(recipe) -> dict[str, Any]:
    """Return what a recipe sets of model, data and training, as plain values; folders by their names.

    Args:
        recipe ([`~hf_vla.training.recipe.Recipe`]).

    Returns:
        `dict`: JSON-safe, of three sections. It shows what was done; to repeat it, the sources are to be filled in.
    """
    model = chosen(recipe.model)
    model |= {name: source_of(model[name])["name"] for name in SOURCES if name in model}
    data = {name: value for name, value in chosen(recipe.data).items() if name in DATA}
    data["datasets"] = [
        {"source": source_of(each.source)["name"]}
        | {name: value for name, value in chosen(each).items() if name in ("unnorm_key", "state", "weight")}
        for each in recipe.data.datasets
    ]
    defaults = {each.name: each.default for each in fields(recipe.training)}
    always = ("max_steps", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "seed")
    training = {
        name: plain(value)
        for name in TRAINING
        if (value := getattr(recipe.training, name)) is not None and (name in always or value != defaults[name])
    }
    return {"model": model, "data": data, "training": training}


def chosen(section) -> dict[str, Any]:
    """Return what a section of a recipe sets, as plain values."""
    defaults = {each.name: each.default for each in fields(section) if each.init}
    values = {name: getattr(section, name) for name in defaults}
    return {name: plain(value) for name, value in values.items() if value is not None and value != defaults[name]}


def plain(value):
    """Return a value as JSON has it."""
    if is_dataclass(value):
        return chosen(value)
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value.value if isinstance(value, Enum) else value
