"""Folders that are complete or not there at all: what is written beside them is moved into place as a whole.

Everything happens in `_hf_vla_unfinished` within the training's output folder: `saving` is being written, `installing`
is complete and on its way, `deleting` is on its way out. A process may be killed at any moment; [`recover`] then
finishes what was complete, and removes the rest. The Trainer pushes no name that begins with an underscore to the Hub.
"""

import filecmp
import logging
import os
import shutil
from pathlib import Path

from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_vla.training.manifest import MANIFEST, find_flaw, sync_folder, write_manifest

logger = logging.getLogger(__name__)

UNFINISHED = "_hf_vla_unfinished"
# Without these no class of ours or of transformers finds what to load; in the order in which they come into place.
ENTRANCES = ("processor_config.json", "adapter_config.json", "config.json")


def staging_folder(root: Path) -> Path:
    """Make the empty folder in which something is saved for `root`."""
    staging = root / UNFINISHED / "saving"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish(staged: Path, place: Path) -> None:
    """Move a folder that was saved to its end to its place, and what was there before away."""
    write_manifest(staged)
    if place.exists():
        _set_aside(place)
    os.replace(staged, place)
    sync_folder(place.parent)
    clear(place.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint in such a way that a half-deleted one is never seen."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def _set_aside(folder):
    away = folder.parent / UNFINISHED / "deleting" / folder.name
    shutil.rmtree(away, ignore_errors=True)
    away.parent.mkdir(parents=True, exist_ok=True)
    os.replace(folder, away)
    return away


def install(staged: Path, root: Path) -> None:
    """Put the files of a model that was saved to its end into a folder that holds other things, too.

    Killed in between, the folder holds the old model, or the new one, or none that loads until [`recover`] is called.
    """
    write_manifest(staged)
    (staged / MANIFEST).unlink()  # it has brought the files to the disk, and would go stale beside checkpoints
    moving = root / UNFINISHED / "installing"
    shutil.rmtree(moving, ignore_errors=True)
    os.replace(staged, moving)
    sync_folder(moving.parent)
    _move_into(moving, root)
    clear(root)


def _move_into(moving, root):
    names = [path.relative_to(moving).as_posix() for path in moving.rglob("*") if path.is_file()]
    stale = _stale_weights(names, root)
    changed = [name for name in names if not _same(moving / name, root / name)]
    if len(stale) + sum(name != TRAINING_ARGS_NAME for name in changed) > 1:  # a mixture of old and new must not load
        stale = [name for name in ENTRANCES if name in names] + stale
        changed = names
    for name in stale:
        (root / name).unlink(missing_ok=True)
    for name in sorted(changed, key=lambda name: ENTRANCES.index(name) if name in ENTRANCES else -1):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(moving / name, root / name)
    sync_folder(root)


def _same(path, other):
    return other.is_file() and filecmp.cmp(path, other, shallow=False)


def _stale_weights(names, root):
    """An earlier model's weights that would be loaded beside or instead of those of a whole new one."""
    if not any(name.startswith("model") and name.endswith(".safetensors") for name in names):
        return []
    old = [*root.glob("model*.safetensors"), *root.glob("model*.safetensors.index.json"), *root.glob("adapter_*")]
    return [path.name for path in old if path.is_file() and path.name not in names]


def recover(root: Path) -> None:
    """Finish or undo what a killed process has left unfinished in an output folder; nothing else is touched."""
    work = root / UNFINISHED
    if not work.is_dir():
        return
    for staged in (work / "saving").glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        place = root / staged.name
        if (staged / MANIFEST).is_file() and not place.exists() and find_flaw(staged) is None:
            os.replace(staged, place)
            logger.warning("%s was complete when its process was killed, and is now in its place.", place)
    if (work / "installing").is_dir():
        _move_into(work / "installing", root)
        logger.warning("The model in %s was being replaced when its process was killed: it is the new one now.", root)
    clear(root)


def clear(root: Path) -> None:
    """Remove what is unfinished."""
    shutil.rmtree(root / UNFINISHED, ignore_errors=True)
