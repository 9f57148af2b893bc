"""Changing several files of a folder so that an interruption can always be mended."""

import json
import os
import shutil
from pathlib import Path

import filelock

WORK = ".recording"
_JOURNAL = "commit.json"


class FolderTransaction:
    """Replaces files of a folder by others that were made aside, in the hidden folder `.recording` inside it.

    `commit` has the files written to the disk, writes down what goes where, and then renames one file after the
    other. Interrupted before the note is there, nothing has changed; after it, the next `FolderTransaction` of the
    folder finishes the renames. One process at a time can hold a folder; what is left of one that died is removed.

    Args:
        root (`Path`): the folder; it is made if need be.

    Raises:
        BlockingIOError: another process, or another object, holds the folder.
    """

    def __init__(self, root: Path):
        self.root, self.work = root, root / WORK
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.work / "lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise BlockingIOError(f"{root}: another recorder has the folder open; finalize it first.") from error
        self._rename_noted()
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    @property
    def is_open(self) -> bool:
        """Whether the folder is held."""
        return self._lock.is_locked

    def commit(self, files: list[tuple[Path, Path]]) -> None:
        """Put files into place: `(file aside, path in the folder)`, in the order of the renames.

        Raises:
            OSError: before the first rename where the disk is full or the like; then nothing has changed.
        """
        for aside, place in files:
            _write_out(aside)
            (self.root / place).parent.mkdir(parents=True, exist_ok=True)
        note, journal = self.work / "commit.part", self.work / _JOURNAL
        names = [(aside.relative_to(self.work).as_posix(), place.as_posix()) for aside, place in files]
        note.write_text(json.dumps(names), encoding="utf-8")
        _write_out(note)
        os.replace(note, journal)
        _write_out(self.work)
        self._rename_noted()

    def close(self) -> None:
        """Remove the hidden folder and let others have the folder."""
        if self.is_open:
            shutil.rmtree(self.work)
            self._lock.release()

    def _rename_noted(self):
        journal = self.work / _JOURNAL
        if not journal.exists():
            return
        places = []
        for aside, place in json.loads(journal.read_text(encoding="utf-8")):
            places.append(self.root / place)
            if (self.work / aside).exists():  # otherwise it was renamed before the interruption
                os.replace(self.work / aside, places[-1])
        for folder in {place.parent for place in places}:
            _write_out(folder)
        journal.unlink()


def write_json(path: Path, content: dict) -> Path:
    """Write a JSON file; arrays become lists."""
    text = json.dumps(content, indent=4, ensure_ascii=False, default=lambda value: value.tolist())
    path.write_text(text, encoding="utf-8")
    return path


def _write_out(path: Path):
    """Have a file's content, or a folder's names, on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only there can folders be opened
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
