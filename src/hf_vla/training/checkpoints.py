"""Which checkpoint a run goes on from, and whether it may."""

import json
import logging
from dataclasses import fields
from pathlib import Path

from transformers import AutoConfig, AutoProcessor, PreTrainedConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


def checkpoint_to_resume(arguments) -> str | None:
    """Find the checkpoint that `arguments.resume_from_checkpoint` asks for; None to start anew.

    The Trainer writes `trainer_state.json` last, so a folder without it was killed in mid-save: it is passed over with
    a warning. A complete one that lacks its optimizer would go on with a fresh one: that is an error.

    Raises:
        ValueError: the folder named is no complete checkpoint, or a file that exact resuming needs is missing.
    """
    wanted = arguments.resume_from_checkpoint
    if not wanted:
        return None
    if wanted is True:
        folders = Path(arguments.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        steps = {int(step): folder for folder in folders if (step := folder.name.rpartition("-")[2]).isdigit()}
        checkpoint = None
        for _, folder in sorted(steps.items(), reverse=True):
            if _is_complete(folder):
                checkpoint = folder
                break
            logger.warning("%s was not saved completely (killed in mid-save?) and is passed over.", folder)
        if checkpoint is None:
            logger.warning("No complete checkpoint in %s: the training starts anew.", arguments.output_dir)
            return None
    else:
        checkpoint = Path(wanted)
        if not _is_complete(checkpoint):
            raise ValueError(f"{checkpoint} is no complete checkpoint: its trainer_state.json is missing or broken.")
    rng = "rng_state.pth" if arguments.world_size == 1 else f"rng_state_{arguments.process_index}.pth"
    # Sharded optimizers (FSDP, DeepSpeed) have other names, and checks of their own.
    sharded = arguments.fsdp or arguments.deepspeed
    missing = [name for name in ("optimizer.pt", "scheduler.pt", rng) if not (checkpoint / name).is_file()]
    if missing and not sharded:
        raise ValueError(
            f"{checkpoint} lacks {missing}: resuming would go on with fresh ones. Restore them, or resume from "
            "another checkpoint; weights that are no adapter also start a new run, as model.path."
        )
    return str(checkpoint)


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


def _is_complete(checkpoint: Path) -> bool:
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
