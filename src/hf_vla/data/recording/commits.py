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
    other. Interrupted before the note is there, nothing has changed; after it, the renames are decided: whatever is
    called next, `finish`, `commit` or `close`, begins by finishing them, and so does the next `FolderTransaction` of
    the folder. One process at a time can hold a folder; what is left of one that died is removed.

    Args:
        root (`Path`): the folder; it is made if need be.

    Raises:
        BlockingIOError: another process, or another object, holds the folder.
        OSError: renames that were noted cannot be finished; they stay noted.
    """

    def __init__(self, root: Path):
        self.root, self.work = root, root / WORK
        self.work.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.work / "lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise BlockingIOError(f"{root}: another recorder has the folder open; finalize it first.") from error
        try:
            self.finish()
            for path in self.work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
        except BaseException:
            self._lock.release()
            raise

    @property
    def is_open(self) -> bool:
        """Whether the folder is held."""
        return self._lock.is_locked

    def commit(self, files: list[tuple[Path, Path]]) -> None:
        """Put files into place: `(file aside, path in the folder)`, in the order of the renames.

        Raises:
            OSError: before the note, where the disk is full or the like; then nothing has changed. Or after it.
        """
        self.finish()
        for aside, place in files:
            _write_out(aside)
            (self.root / place).parent.mkdir(parents=True, exist_ok=True)
        note, journal = self.work / "commit.part", self.work / _JOURNAL
        names = [(aside.relative_to(self.work).as_posix(), place.as_posix()) for aside, place in files]
        note.write_text(json.dumps(names), encoding="utf-8")
        _write_out(note)
        os.replace(note, journal)
        _write_out(self.work)
        self.finish()

    def finish(self) -> None:
        """Make the renames that were noted and not made, if there are some.

        Raises:
            OSError: one of them is impossible; it stays noted.
        """
        if not is_unfinished(self.root):
            return
        journal = self.work / _JOURNAL
        places = []
        for aside, place in json.loads(journal.read_text(encoding="utf-8")):
            places.append(self.root / place)
            if (self.work / aside).exists():  # otherwise it was renamed before the interruption
                os.replace(self.work / aside, places[-1])
        for folder in {place.parent for place in places}:
            _write_out(folder)
        journal.unlink()
        _write_out(self.work)  # a note that came back with the power would take the next files aside for its own

    def close(self) -> None:
        """Remove the hidden folder and let others have the folder.

        Raises:
            OSError: noted renames cannot be finished. The hidden folder stays then; the folder is let go all the same.
        """
        if self.is_open:
            try:
                self.finish()
                shutil.rmtree(self.work)
            finally:
                self._lock.release()


def is_unfinished(root: Path) -> bool:
    """Whether renames are noted in a folder that were not made."""
    return (root / WORK / _JOURNAL).exists()


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
