"""What can be wrong with a dataset, how bad it is, and how to mend it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

ERROR, WARNING, NOTE = "error", "warning", "note"
_AGAIN = "fetch the file again, or convert or record the dataset again"
_LEAVE_OUT = "leave the episodes out of the training, or mend the rows"
_STATISTICS = "compute them anew, for example with `hf-vla stats DATASET --out FOLDER`"
_ONE_VALUE = "it teaches nothing and cannot be scaled: mask the dimension, or see whether it was recorded"

# kind -> (severity, how to mend it). An error keeps a training from reading the dataset or teaches what was not
# recorded; a warning may be meant; a note says that readers cope with it.
KINDS = {
    "missing file": (ERROR, _AGAIN),
    "unreadable file": (ERROR, _AGAIN),
    "truncated video": (ERROR, _AGAIN),
    "short video": (ERROR, _AGAIN),
    "missing frames": (ERROR, "write the rows' timestamps, or the video, anew"),
    "undecodable picture": (ERROR, _AGAIN),
    "column": (ERROR, "write the column as meta/info.json declares it, or declare it as it is"),
    "row count": (ERROR, _AGAIN),
    "repeated rows": (ERROR, "take the repeated rows out, or convert the dataset again"),
    "row order": (ERROR, "number `index` over the whole dataset, `frame_index` from 0 in every episode"),
    "unknown text": (ERROR, "add the text to its table in meta, or leave the episodes out"),
    "not finite": (ERROR, _LEAVE_OUT),
    "fps": (ERROR, "correct fps in meta/info.json, or write the timestamps anew"),
    "missing statistics": (ERROR, _STATISTICS),
    "wrong statistics": (ERROR, _STATISTICS),
    "timestamps": (WARNING, "write the timestamps as frame_index / fps; windows over time count rows, not seconds"),
    "video rate": (WARNING, "see whether the video or fps in meta/info.json is right"),
    "picture size": (WARNING, "correct the shape in meta/info.json"),
    "frozen camera": (WARNING, "watch these episodes; leave them out where the camera hung"),
    "blank picture": (WARNING, "watch these episodes; leave them out where the camera saw nothing"),
    "constant dimension": (WARNING, _ONE_VALUE),
    "still gripper": (WARNING, "see whether the gripper was recorded; no policy learns to use it from these"),
    "totals": (WARNING, "correct meta/info.json; LeRobot reads its totals"),
    "file number": (NOTE, "LeRobot's converter of 0.4 writes it so; hf_vla and LeRobot find the rows by their index"),
}


@dataclass
class Finding:
    """Something that is wrong, in one file, perhaps in several episodes.

    Args:
        kind (`str`): see `KINDS`.
        file (`str`): its path in the dataset, or a pattern that several fit.
        message (`str`): what was expected and what came; of the first episode, where there are several.
        episodes (`list[int]`): in which it was found; empty where it is of none or of all.
        frame (`int`, *optional*): of the first episode, the first frame.
    """

    kind: str
    file: str
    message: str
    episodes: list[int] = field(default_factory=list)
    frame: int | None = None

    @property
    def severity(self) -> str:
        """Return "error", "warning" or "note"."""
        return KINDS[self.kind][0]

    @property
    def mend(self) -> str:
        """Return what can be done about it."""
        return KINDS[self.kind][1]

    def to_dict(self) -> dict:
        """Return it JSON-safe."""
        return {"severity": self.severity, **asdict(self), "mend": self.mend}


class Findings:
    """Collects findings; the same one in further episodes of a file is one finding.

    Args:
        root (`Path`): the dataset's folder, which files are named from.
    """

    def __init__(self, root: Path):
        self.root = root
        self._found: dict[tuple, Finding] = {}
        self._places: set[tuple] = set()

    def __iter__(self):
        return iter(self._found.values())

    def add(
        self,
        kind: str,
        file: Path | str,
        message: str,
        episode: int | None = None,
        frame: int | None = None,
        subject: str = "",
    ) -> None:
        """Note that something is wrong.

        Args:
            kind (`str`): see `KINDS`.
            file (`Path` or `str`): where.
            message (`str`): what was expected and what came.
            episode (`int`, *optional*): in which episode.
            frame (`int`, *optional*): at which of its frames.
            subject (`str`): what tells it from other findings of the kind in the file, such as the column.
        """
        file = file.relative_to(self.root).as_posix() if isinstance(file, Path) else file
        if kind not in KINDS:
            raise ValueError(f"Expected a kind of {sorted(KINDS)}, came {kind!r}.")
        new = Finding(kind, file, message, frame=None if frame is None else int(frame))
        found = self._found.setdefault((kind, file, subject), new)
        if episode is not None and (place := (kind, file, subject, int(episode))) not in self._places:
            self._places.add(place)
            found.episodes.append(int(episode))

    def update(self, other: "Findings") -> None:
        """Take over the findings of another part of the check."""
        self._found |= other._found
