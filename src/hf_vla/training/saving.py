"""Folders that are complete or not there at all, and manifests, by which a damaged one is told from a good one.

What is written beside a folder's place is moved there as a whole. Everything happens in `_hf_vla_unfinished` within
the training's output folder: `saving` is being written, `replaced` is what a save takes the place of, `installing` is
complete and on its way, `deleting` is on its way out. A process may be killed at any moment; [`recover`] then finishes
what was complete, and removes the rest. The Trainer pushes no name that begins with an underscore to the Hub.
"""

import errno
import filecmp
import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_vla.training.summary import SUMMARY

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
UNFINISHED = "_hf_vla_unfinished"
# Without these no class of ours or of transformers finds what to load; in the order in which they come into place.
ENTRANCES = ("processor_config.json", "adapter_config.json", "config.json")


def staging_folder(root: Path) -> Path:
    """Make the empty folder in which something is saved for `root`."""
    staging = root / UNFINISHED / "saving"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish(staged: Path, place: Path, **facts) -> None:
    """Move a folder that was saved to its end to its place, and what was there before away.

    Args:
        staged (`Path`): in the staging folder.
        place (`Path`): where it shall be.
        facts: what else its manifest says, see [`write_manifest`].
    """
    write_manifest(staged, **facts)
    replaced = _set_aside(place, "replaced") if place.exists() else None
    try:
        os.replace(staged, place)
    except OSError:
        if replaced is not None:
            os.replace(replaced, place)
        raise
    sync_folder(place.parent)
    clear(place.parent, "saving", "replaced")


def remove(folder: Path) -> None:
    """Delete a checkpoint in such a way that a half-deleted one is never seen."""
    shutil.rmtree(_set_aside(folder, "deleting"), ignore_errors=True)


def _set_aside(folder, where):
    away = folder.parent / UNFINISHED / where / folder.name
    shutil.rmtree(away, ignore_errors=True)
    away.parent.mkdir(parents=True, exist_ok=True)
    os.replace(folder, away)
    return away


def install(staged: Path, root: Path) -> None:
    """Put the files of a model that was saved to its end into a folder that holds other things, too.

    Killed or failing in between, the folder holds the old model, or the new one, or none that loads until [`recover`]
    is called.
    """
    write_manifest(staged)
    (staged / MANIFEST).unlink()  # it has brought the files to the disk, and would go stale beside checkpoints
    moving = root / UNFINISHED / "installing"
    if moving.is_dir():  # of an attempt that failed
        _move_into(moving, root)
        clear(root, "installing")
    os.replace(staged, moving)
    sync_folder(moving.parent)
    _move_into(moving, root)
    clear(root, "saving", "installing")


def _move_into(moving, root):
    names = [path.relative_to(moving).as_posix() for path in moving.rglob("*") if path.is_file()]
    stale = _stale_weights(names, root)
    changed = [name for name in names if not _same(moving / name, root / name)]
    if len(stale) + sum(name != SUMMARY for name in changed) > 1:  # a mixture of old and new must not load
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
    for replaced in (work / "replaced").glob("*"):
        if not (root / replaced.name).exists():  # what should have replaced it is not complete
            os.replace(replaced, root / replaced.name)
    if (work / "installing").is_dir():
        _move_into(work / "installing", root)
        logger.warning("The model in %s was being replaced when its process was killed: it is the new one now.", root)
    shutil.rmtree(work, ignore_errors=True)


def clear(root: Path, *names: str) -> None:
    """Remove what is unfinished and called so; the rest is left to [`recover`]."""
    for name in names:
        shutil.rmtree(root / UNFINISHED / name, ignore_errors=True)
    with suppress(OSError):  # of a folder that is not empty
        (root / UNFINISHED).rmdir()


def write_manifest(folder: Path, **facts) -> None:
    """Bring a folder's files to the disk, and write down their size and SHA-256 in `manifest.json`.

    The manifest comes last: a folder that has one was written to its end.

    Args:
        folder (`Path`): everything in it is listed.
        facts: what else the manifest says, see [`read_facts`].
    """
    manifest = folder / MANIFEST
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != manifest)
    with ThreadPoolExecutor() as pool:  # hashing and waiting for the disk both let other threads run
        digests = list(pool.map(_synced_digest, files))
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    manifest.write_text(json.dumps({**facts, "files": entries}, indent=2), encoding="utf-8")
    _synced_digest(manifest)
    for place in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync_folder(place)


def find_flaw(folder: Path, checksums: bool = True) -> str | None:
    """Compare a folder with its manifest.

    Args:
        folder (`Path`): has a manifest.
        checksums (`bool`): also read all files; without it their sizes alone are compared, which takes no time.

    Returns:
        `str`: what is wrong with the first file that is not as it was written; None where all are.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        wanted = {folder / name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    for path, (size, _) in wanted.items():
        if not path.is_file():
            return f"its {path.relative_to(folder)} is missing"
        if path.stat().st_size != size:
            return f"its {path.relative_to(folder)} has {path.stat().st_size} bytes, {size} were written"
    if checksums:
        with ThreadPoolExecutor() as pool:
            for path, digest in zip(wanted, pool.map(_digest, wanted), strict=True):
                if digest != wanted[path][1]:
                    return f"its {path.relative_to(folder)} is not what was written: its SHA-256 is {digest}"
    return None


def read_facts(folder: Path) -> dict:
    """Return what a manifest says beside its files; nothing where there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {name: value for name, value in manifest.items() if name != "files"}
    except (OSError, ValueError, AttributeError):
        return {}


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems do so for folders by themselves
                raise
        finally:
            os.close(descriptor)


def _synced_digest(path):
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path):
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # of a failing disk
        return f"unknown ({error})"
