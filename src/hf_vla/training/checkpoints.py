"""Which checkpoint a run goes on from, and whether it may."""

import json
import logging
from dataclasses import fields
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_vla.training.saving import MANIFEST, clear, find_flaw, read_facts, recover, remove

logger = logging.getLogger(__name__)


class CheckedCheckpoint(str):
    """Folder of a checkpoint that was found to be whole, which takes long where it is large: once is enough."""


def checkpoint_to_resume(arguments, wanted: bool | str | None = None) -> CheckedCheckpoint | None:
    """Find the checkpoint that a training goes on from; None to start anew.

    First, what a killed process has left unfinished in `output_dir` is finished or removed.

    Args:
        arguments (`VLATrainingArguments`): of the run.
        wanted (`bool` or `str`, *optional*): a folder; or True for the newest checkpoint whose files are as they were
            written, with a warning for those that are not, and None where no save was ever finished;
            `arguments.resume_from_checkpoint` by default.

    Raises:
        ValueError: the folder named is no complete checkpoint, or none of several is; a file that exact resuming needs
            is missing; other processes or rows a step learnt it; not all processes see it.
    """
    root = Path(arguments.output_dir)
    wanted = arguments.resume_from_checkpoint if wanted is None else wanted
    if isinstance(wanted, CheckedCheckpoint):
        return wanted
    if arguments.should_save:
        recover(root)
    if not wanted:
        if arguments.should_save and (earlier := _newest_first(root)):
            logger.warning("%s holds %s of an earlier run, beside which this one begins anew.", root, earlier[0].name)
        return None
    # the main process's view, once it has tidied up
    folders = broadcast_object_list([_newest_first(root) if wanted is True else [Path(wanted)]])[0]
    seen = gather_object([[folder.is_dir() for folder in folders]])
    if any(other != seen[0] for other in seen):
        raise ValueError(
            f"Not all processes see the checkpoints {[str(folder) for folder in folders]}: training.output_dir must "
            "be a folder that all nodes share."
        )
    damaged = []
    for folder in folders:
        flaws = gather_object([_flaw(folder, arguments)])
        unfinished, flaw = next((found for found in flaws if found is not None), (False, None))
        if flaw is None:
            if arguments.should_save:
                logger.info("Going on from %s.", folder)
            return CheckedCheckpoint(folder)
        if wanted is not True:
            raise ValueError(f"{folder} {flaw}. Restore it, or resume from another checkpoint.")
        logger.warning("%s %s and is passed over.", folder, flaw)
        damaged += [] if unfinished else [f"{folder} {flaw}"]
    if damaged:
        raise ValueError(
            f"No checkpoint is left to go on from: {'; '.join(damaged)}. Restore one, or delete them to start anew; "
            "weights that are no adapter also start a new run, as model.path."
        )
    if wanted is True:
        logger.warning("No complete checkpoint in %s: the training starts anew.", root)
    return None


def last_good(root: Path) -> str:
    """Say which checkpoint a training in this folder can go on from."""
    for folder in _newest_first(root):
        if _own_flaw(folder, checksums=False) is None:
            return f"The last good checkpoint is {folder}; training.resume_from_checkpoint: true goes on from it."
    return f"No checkpoint is in {root} yet."


def rotate(root: Path, limit: int, kept: list) -> None:
    """Delete the oldest checkpoints beyond a limit, but none of `kept`."""
    kept = {Path(folder).resolve() for folder in kept if folder is not None}
    folders = _newest_first(root)
    others = [folder for folder in folders if folder.resolve() not in kept]
    for folder in others[max(limit - (len(folders) - len(others)), 0) :]:
        remove(folder)
    clear(root, "deleting")


def _newest_first(root):
    """Checkpoints by the time at which they were saved: after going back to an earlier one, its steps count again."""
    steps = {folder: folder.name.rpartition("-")[2] for folder in root.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    times = {  # of another tool's, or an older version's, the folder's own
        folder: (read_facts(folder).get("time", folder.stat().st_mtime), int(step))
        for folder, step in steps.items()
        if step.isdigit()
    }
    return sorted(times, key=times.get, reverse=True)


def _flaw(folder, arguments):
    """What is wrong with a checkpoint, as this process sees it; whether its save was never finished."""
    found = _own_flaw(folder, checksums=arguments.should_save)  # one process reads for all
    if found is not None:
        return found
    check_same_layout(folder, arguments)
    rng = "rng_state.pth" if arguments.world_size == 1 else f"rng_state_{arguments.process_index}.pth"
    # Sharded optimizers (FSDP, DeepSpeed) have other names, and checks of their own.
    needed = (rng,) if arguments.sharded else ("optimizer.pt", "scheduler.pt", rng)
    if missing := [name for name in needed if not (folder / name).is_file()]:
        return False, f"lacks {missing}: resuming would go on with fresh ones"
    return None


def _own_flaw(folder, checksums):
    if not folder.is_dir():
        return True, "is no folder"
    if (folder / MANIFEST).is_file():
        flaw = find_flaw(folder, checksums)
        return None if flaw is None else (False, f"is damaged: {flaw}")
    try:  # of another tool, which writes this file last
        complete = "global_step" in json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        complete = False
    if complete:
        return None
    return True, (
        f"is no complete checkpoint (killed in mid-save?): it has no {MANIFEST}, and its {TRAINER_STATE_NAME} is "
        "missing or broken"
    )


def layout(arguments) -> dict[str, int]:
    """How the rows of a step are dealt out, for a checkpoint's manifest; no number of rows where the Trainer finds it.

    Each process goes on with random numbers, and with rows, of its own.
    """
    rows = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    found = {} if arguments.auto_find_batch_size else {"rows_per_step": rows}
    return {"num_processes": arguments.world_size} | found


def check_same_layout(checkpoint: Path, arguments) -> None:
    """Check that as many processes go on from a checkpoint as saved it, with as many rows a step.

    Raises:
        ValueError: they are more or fewer.
    """
    saved, given = read_facts(checkpoint), layout(arguments)
    differing = [name for name in given if saved.get(name, given[name]) != given[name]]
    if differing:
        both = "; ".join(f"{name.replace('_', ' ')} was {saved[name]}, is {given[name]}" for name in differing)
        raise ValueError(
            f"Rows would come twice or never, if this run went on from {checkpoint}: {both}. Resume with as many as "
            "then, or start a new run from its weights, as model.path."
        )


def check_same_robot(checkpoint: str, processor) -> None:
    """Check that a checkpoint's weights learnt the tokens and units of the processor they would go on with.

    Raises:
        ValueError: specs, statistics, grid, chunk size, camera, prompt or the names of robots differ.
    """
    saved = AutoProcessor.from_pretrained(checkpoint)
    names = {"side": f"the checkpoint {checkpoint}", "other_side": "the recipe"}
    for key in set(saved.action_codec.keys) & set(processor.action_codec.keys):
        both = [(*each.action_codec.specs(key), *each.camera_specs(key)) for each in (saved, processor)]
        for spec, other in zip(*both, strict=False):
            if spec is not None and other is not None:
                spec.check(other, **names)
    for name in ("statistics", "action_config", "camera_config", "prompt_config", "embodiments"):
        if getattr(saved, name, None) != json.loads(json.dumps(getattr(processor, name, None))):
            raise ValueError(
                f"The recipe gives another {name} than {checkpoint} was trained with, so its weights would mean other "
                "actions. Resume with the dataset, split, grid, chunk size and prompt of that run, or start a new run."
            )


def check_same_model(checkpoint: str, config) -> None:
    """Check that a checkpoint's weights are those of the model that would go on with them.

    Raises:
        ValueError: a field of the family's own differs.
    """
    inherited = {field.name for field in fields(PreTrainedConfig)} | set(config.sub_configs)
    both = [json.loads(each.to_json_string(False)) for each in (AutoConfig.from_pretrained(checkpoint), config)]
    for name in (field.name for field in fields(config) if field.name not in inherited):
        saved, given = (each.get(name) for each in both)
        if saved != given:
            raise ValueError(
                f"The recipe gives the model {name} {given!r}, {checkpoint} was trained with {saved!r}: resume with "
                "the model and data of that run, or start a new run."
            )
