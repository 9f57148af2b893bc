"""The recipe of a run beside its checkpoints: whoever goes on from one goes on with the same."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import yaml

RECIPE = "recipe.yaml"
NOT_WRITTEN = ("hub_token", "resume_from_checkpoint", "local_rank")
# What else may differ where a run goes on: how long it is, and what its weights do not depend on.
MAY_CHANGE = {
    *("data.mixture_root", "data.streaming", "data.frame_cache", "data.frame_cache_gb"),
    *("training.output_dir", "training.max_steps", "training.num_train_epochs", "training.estimate_memory"),
    *("training.report_to", "training.run_name", "training.project", "training.disable_tqdm", "training.debug"),
    *("training.push_to_hub", "training.ignore_data_skip", "training.restore_callback_states_from_checkpoint"),
    *("training.per_device_eval_batch_size", "training.prediction_loss_only", "training.batch_eval_metrics"),
    *("training.include_for_metrics", "training.include_num_input_tokens_seen", "training.skip_memory_metrics"),
    *("training.bf16_full_eval", "training.fp16_full_eval", "training.torch_empty_cache_steps", "training.use_cpu"),
    *("training.do_train", "training.do_eval", "training.do_predict", "training.enable_jit_checkpoint"),
    *("training.load_best_model_at_end", "training.dataloader_num_workers", "training.dataloader_pin_memory"),
    *("training.dataloader_persistent_workers", "training.dataloader_prefetch_factor"),
    *("training.dataloader_multiprocessing_context", "training.per_device_train_batch_size"),
    *("training.gradient_accumulation_steps",),  # the rows of a step are compared by `check_same_layout`
}
FAMILIES_THAT_MAY = tuple(
    f"training.{family}_"
    for family in ("activation", "ddp", "eval", "gradient_checkpointing", "hub", "log", "logging", "save", "trackio")
) + ("training.gradient_checkpointing",)
SOURCE = re.compile(r"data\.(datasets\.\d+\.)?source")  # a dataset may move: its statistics are compared
# A WindowSampler's order depends on them.
OF_WINDOWS = ("training.dataloader_num_workers", "training.per_device_train_batch_size")


def resolved(arguments, recipe=None) -> dict:
    """Return all values of a recipe, as [`~hf_vla.training.recipe.load_recipe`] would read them from a file.

    Args:
        arguments (`TrainingArguments`): its section training.
        recipe (`Recipe`, *optional*): the other sections, where the run has one.
    """
    sections = {}
    if recipe is not None:
        sections = {"model": asdict(recipe.model), "data": asdict(recipe.data)}
        if recipe.data.source is not None or recipe.data.mixture is not None:
            del sections["data"]["datasets"]  # which are made of these
    training = {name: value for name, value in arguments.to_dict().items() if name not in NOT_WRITTEN}
    return json.loads(json.dumps(sections | {"training": training}, default=str))


def write_recipe(recipe: dict, folder: str | Path) -> None:
    """Write it into a folder."""
    Path(folder, RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def check_same_recipe(checkpoint: str | Path, recipe: dict) -> None:
    """Check that a run would go on from a checkpoint with the recipe that it began with.

    Checkpoints without a `recipe.yaml`, of another tool for example, are not checked.

    Args:
        checkpoint (`str` or `Path`): folder.
        recipe (`dict`): see [`resolved`].

    Raises:
        ValueError: values differ that may not; see `MAY_CHANGE` for those that may.
    """
    path = Path(checkpoint, RECIPE)
    if not path.is_file():
        return
    began = yaml.safe_load(path.read_text(encoding="utf-8"))
    saved, given = _flat(began), _flat(recipe)
    by_rows = recipe.get("data", {}).get("shuffle") == "rows"
    differing = [
        f"{name} was {saved.get(name, 'not given')!r}, is {given.get(name, 'not given')!r}"
        for name in saved | given
        if saved.get(name) != given.get(name)
        and _in_both(name, began, recipe)
        and (not _may_change(name) or (name in OF_WINDOWS and not by_rows))
    ]
    if differing:
        raise ValueError(
            f"The recipe is not the one that {checkpoint} was trained with: {'; '.join(differing)}. Resume with what "
            "it was, or start a new run from these weights, as model.path. What is logged, evaluated and saved, and "
            "how long the training is, may differ."
        )


def _flat(values, name=""):
    """{dotted name: value}, with the places of lists of sections, as overrides name them."""
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        values = dict(enumerate(values))
    if not isinstance(values, dict) or not values:
        return {name: values}
    inner = (_flat(value, f"{name}.{key}" if name else str(key)) for key, value in values.items())
    return {key: value for part in inner for key, value in part.items()}


def _in_both(name, recipe, other):
    """Whether both have the section; of training, the value too: each version of transformers has others."""
    section, _, rest = name.partition(".")
    first = rest.partition(".")[0]
    return all(section in each and (section != "training" or first in each[section]) for each in (recipe, other))


def _may_change(name):
    return name in MAY_CHANGE or name.startswith(FAMILIES_THAT_MAY) or SOURCE.fullmatch(name) is not None
