"""What an evaluation leaves behind: a line for each episode, and the protocol under which all of them were run.

`episodes.jsonl` holds a JSON object a line, in the order in which the episodes ended; `protocol.json` beside it holds
everything that decides the results.
"""

import gzip
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import filelock

EPISODES, PROTOCOL = "episodes.jsonl", "protocol.json"
NAMES = ("checkpoint", "selection", "command")  # what the same things were called; other entries say what they are


@dataclass(frozen=True)
class EpisodeRecord:
    """How one episode went.

    Args:
        task (`str`): the simulator's name of it.
        instruction (`str`): what the policy was told.
        seed (`int`): decides the initial state and the policy's random numbers.
        success (`bool`): whether the task was solved before the horizon.
        steps (`int`): control steps taken.
        predictions (`int`): chunks predicted for it.
        latency_ms (`list[float]`): wall time of every model call in which this episode took part, from the
            observation to the actions. What a simulator takes is not in it.
        wall_s (`float`): from its first observation to its end, waiting for other episodes included.
        restarts (`int`): how often the simulator crashed or hung, so that the episode was begun anew.
        probe (`str`): name of the probe under which it was run, "none" without.
    """

    task: str
    instruction: str
    seed: int
    success: bool
    steps: int
    predictions: int
    latency_ms: list[float]
    wall_s: float
    restarts: int = 0
    probe: str = "none"

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Read a line of `episodes.jsonl`.

        Raises:
            ValueError: it is no JSON object with these fields.
        """
        values = json.loads(line)
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError(f"expected an object with {sorted(names)}")
        return cls(**values)


class RecordWriter:
    """Appends records to a folder; what stands there is safe from a kill and a power failure.

    Args:
        folder (`Path`): made if need be; one writer at a time.
        protocol (`dict`): JSON-safe; of all records in the folder.

    Attributes:
        records (`list[EpisodeRecord]`): those that stand there already.

    Raises:
        BlockingIOError: another writer has the folder open.
        ValueError: the folder holds records of another protocol; the text names what differs.
    """

    def __init__(self, folder: Path, protocol: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise BlockingIOError(f"{folder}: another evaluation is writing here; give it its own folder.") from error
        try:
            if (folder / PROTOCOL).exists():
                self.records, before = read_records(folder)
                _check_same(folder, before, protocol)
            else:
                self.records = []
                write_whole(folder / PROTOCOL, json.dumps(protocol, indent=2, ensure_ascii=False) + "\n")
            self._file = (folder / EPISODES).open("ab")
            self._file.truncate(len(_whole_lines(folder / EPISODES)))
        except BaseException:
            self._lock.release()
            raise

    def add(self, record: EpisodeRecord) -> None:
        """Write a record to the disk."""
        self._file.write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)

    def close(self) -> None:
        """Let others write."""
        try:
            self._file.close()
        finally:  # on a full disk, too
            self._lock.release()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_records(folder: str | Path) -> tuple[list[EpisodeRecord], dict[str, Any]]:
    """Read what an evaluation left, also while it runs or after it was killed.

    Args:
        folder (`str` or `Path`): the output folder, or the `eval` of a shipped checkpoint, whose records are zipped.

    Returns:
        `tuple`: records in the order in which they were written, without a last line that was cut off; the protocol.

    Raises:
        FileNotFoundError: there is no evaluation in the folder.
        ValueError: a line is no record; the text names it.
    """
    folder = Path(folder)
    if not (folder / PROTOCOL).is_file():
        raise FileNotFoundError(f"{folder}: no evaluation in this folder, it has no {PROTOCOL}.")
    protocol, records = json.loads((folder / PROTOCOL).read_text(encoding="utf-8")), []
    zipped = folder / f"{EPISODES}.gz"
    content = gzip.decompress(zipped.read_bytes()) if zipped.is_file() else _whole_lines(folder / EPISODES)
    for number, line in enumerate(content.decode().splitlines(), 1):
        try:
            records.append(EpisodeRecord.from_line(line))
        except ValueError as error:
            raise ValueError(f"{folder / EPISODES}: line {number} is no record ({error}); remove it.") from error
    return records, protocol


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that there is never half of it."""
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _check_same(folder, before, now):
    now = json.loads(json.dumps(now))
    different = [
        f"{name}: then {before.get(name)!r}, now {now.get(name)!r}"
        for name in {**before, **now}
        if name not in NAMES and before.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(
            f"{folder} holds the episodes of another protocol; it differs in {'; '.join(different)}. Give another "
            "folder, or remove this one."
        )
