"""The manifest of a checkpoint: size and SHA-256 of its files, by which a damaged one is told from a good one."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Bring a folder's files to the disk, and write down what they are in `manifest.json`.

    The manifest comes last: a folder that has one was written to its end.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing and waiting for the disk both let other threads run
        digests = list(pool.map(_synced_digest, files))
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=2), encoding="utf-8")
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


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
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
