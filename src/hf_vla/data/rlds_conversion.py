"""An RLDS dataset becomes a LeRobot dataset, episode by episode; interrupted, it goes on where it stopped."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_vla.data import schema
from hf_vla.data.oxe import DATASETS, oxe_dataset
from hf_vla.data.oxe_steps import OxeDataset, standardize, text
from hf_vla.data.reading.pictures import decoded
from hf_vla.data.recorder import LeRobotRecorder
from hf_vla.data.rlds import OBSERVATION, RldsEpisodes

JOURNAL = "meta/rlds.jsonl"
RAW, FAILURE = "raw", "it is marked as a failure"
STATE = OBSERVATION + "state"
GIVE_UP = 20  # so many damaged episodes and no sound one: the fault is not theirs
LANGUAGE = ("language_instruction", "observation/natural_language_instruction", "observation/language_instruction")


@dataclass
class Conversion:
    """What a conversion wrote, over all its runs.

    Args:
        episodes (`int`): episodes in the LeRobot dataset.
        left_out (`dict[int, str]`): number of an episode in the source -> why it was left out.
    """

    episodes: int = 0
    left_out: dict[int, str] = field(default_factory=dict)


def convert_rlds(
    source: str | Path,
    destination: str | Path,
    name: str | None = None,
    split: str = "train",
    fps: float | None = None,
    cameras: Sequence[str] | None = None,
    images: bool = False,
    on_episode: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write an RLDS dataset as a LeRobot dataset v3.0.

    Which episode of the source became which is written to `meta/rlds.jsonl`, before it is saved: run again with the
    same arguments, an interrupted conversion goes on behind the last saved episode. An episode without an instruction
    has an empty task. One that cannot be converted (damaged pictures, NaN, a marked failure) is left out, with its
    reason, and the conversion goes on.

    Args:
        source (`str` or `Path`): folder of TensorFlow Datasets, see [`~hf_vla.data.rlds.RldsEpisodes`].
        destination (`str` or `Path`): folder of the LeRobot dataset; new, or of an earlier run.
        name (`str`, *optional*): the entry of Open X-Embodiment's table to standardise by; by default the dataset's
            own name, if the table has it. `"raw"` takes `action` and `observation/state` as they are.
        split (`str`, defaults to `"train"`): as TensorFlow Datasets writes it.
        fps (`float`, *optional*): steps per second; by default the table's.
        cameras (`Sequence[str]`, *optional*): the cameras to keep; by default those of the table's roles, or all.
        images (`bool`, defaults to `False`): keep pictures as PNG in the parquet files, without loss, in place of
            videos.
        on_episode (callable, *optional*): called after each episode with the number of those done and of all.

    Raises:
        ValueError: an argument does not fit the dataset, or the destination holds another conversion.
    """
    episodes = RldsEpisodes(source, split)
    entry = _entry(name, episodes.name)
    wanted = _cameras(episodes, entry, cameras)
    if not len(episodes):
        raise ValueError(f"{episodes.folder}: the split {split!r} has no episodes.")
    rate = fps or (entry.fps if entry else None)
    if rate is None:
        raise ValueError(f"{episodes.folder}: nothing says how many steps {episodes.name!r} has a second; give fps.")
    features = _features(episodes, entry, wanted, "image" if images else "video")
    header = {
        "source": f"{episodes.name}/{episodes.version}",
        "split": split,
        "standardized": entry.name if entry else RAW,
    }
    with LeRobotRecorder(destination, rate, features, robot_type=entry.robot if entry else None) as recorder:
        with _Journal(recorder.root / JOURNAL, header, recorder.num_episodes) as journal:
            for number, episode in episodes.read(journal.next):
                try:
                    for frame in _frames(episode, entry, wanted, features):
                        recorder.add_frame(frame)
                except ValueError as error:
                    recorder.discard_episode()
                    journal.leave_out(number, str(error))
                    _check_not_all_damaged(episodes, recorder, journal)
                else:
                    journal.write({"episode": number, "becomes": recorder.num_episodes})
                    recorder.save_episode()
                if on_episode:
                    on_episode(number + 1, len(episodes))
            return Conversion(recorder.num_episodes, journal.left_out)


def _frames(episode: dict, entry: OxeDataset | None, cameras: Sequence[str], features: dict) -> Iterator[dict]:
    """The frames of an episode, their pictures decoded one by one."""
    steps = _raw_steps(episode) if entry is None else standardize(entry, episode)
    if steps is None:
        raise ValueError(FAILURE)
    first = entry.first if entry else 0
    for step in range(len(steps[schema.ACTION])):
        frame = {key: steps[key][step] for key in (schema.ACTION, schema.STATE) if key in features}
        for camera in cameras:
            encoded = episode[OBSERVATION + camera][first + step]
            frame[schema.camera_key(camera)] = decoded(encoded, entry is not None and camera in entry.bgr)
        yield frame | {schema.TASK: steps[schema.TASK]}


def _raw_steps(episode: dict) -> dict:
    language = next((key for key in LANGUAGE if key in episode), None)
    steps = {schema.ACTION: episode[schema.ACTION], schema.TASK: text(episode[language]) if language else ""}
    return steps | ({schema.STATE: episode[STATE]} if STATE in episode else {})


def _entry(name: str | None, own_name: str) -> OxeDataset | None:
    if name == RAW:
        return None
    if name is not None:
        return oxe_dataset(name)
    try:
        return oxe_dataset(own_name)
    except ValueError:
        return None


def _cameras(episodes: RldsEpisodes, entry: OxeDataset | None, cameras: Sequence[str] | None) -> list[str]:
    wanted = cameras if cameras else entry.cameras.values() if entry else episodes.cameras
    if missing := sorted(set(wanted) - set(episodes.cameras)):
        raise ValueError(f"{episodes.folder}: no camera {missing}; it has {episodes.cameras}.")
    return [*dict.fromkeys(wanted)]


def _features(episodes: RldsEpisodes, entry: OxeDataset | None, cameras: Sequence[str], dtype: str) -> dict[str, dict]:
    """LeRobot's features of what is written."""
    own, features = episodes.features, {}
    for camera in cameras:
        shape = own[OBSERVATION + camera]["shape"]
        if None in shape:  # known from the pictures alone
            _, episode = next(episodes.read())
            shape = decoded(episode[OBSERVATION + camera][0]).shape
        features[schema.camera_key(camera)] = {"dtype": dtype, "shape": [*shape], "names": ["height", "width", "rgb"]}
    if entry is not None:
        names = {schema.ACTION: entry.rlds_action.names}
        names |= {schema.STATE: entry.rlds_state.names} if entry.rlds_state else {}
        return features | {
            key: {"dtype": "float32", "shape": [len(each)], "names": [*each]} for key, each in names.items()
        }
    for key, path in ((schema.STATE, STATE), (schema.ACTION, schema.ACTION)):
        if path in own and len(own[path]["shape"]) == 1 and own[path]["dtype"].startswith("float"):
            features[key] = own[path] | {"names": None}
    if schema.ACTION not in features:
        parts = [key for key in own if key.startswith(schema.ACTION)]
        raise ValueError(
            f"{episodes.folder}: expected one vector 'action' to take as it is, came {parts}. Name an entry of the "
            f"table that says what they mean, one of {sorted(DATASETS)}, or write one."
        )
    return features


def _check_not_all_damaged(episodes, recorder, journal):
    damaged = {number: reason for number, reason in journal.left_out.items() if reason != FAILURE}
    if not recorder.num_episodes and len(damaged) >= GIVE_UP:
        number, reason = next(iter(damaged.items()))
        raise ValueError(f"{episodes.place(number)} and {len(damaged) - 1} more cannot be converted: {reason}")


class _Journal:
    """Which episode of the source became which: one line each, written before the episode is saved.

    A line whose episode the recorder does not have was written just before the conversion was killed: it is dropped,
    and the episode done again.
    """

    def __init__(self, path: Path, header: dict[str, Any], saved: int):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        entries = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be torn
        found, entries = (entries[0], entries[1:]) if entries else (header, [])
        if found != header or (saved and not entries):
            came = f"a conversion of {found}" if lines else "episodes of another source"
            raise ValueError(f"{path.parents[1]} holds {came}, this is one of {header}; choose another folder.")
        entries = [entry for entry in entries if entry.get("becomes", -1) < saved]
        self.left_out = {entry["episode"]: entry["left_out"] for entry in entries if "left_out" in entry}
        self.next = entries[-1]["episode"] + 1 if entries else 0
        aside = path.with_suffix(".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text("".join(f"{json.dumps(entry)}\n" for entry in [header, *entries]), encoding="utf-8")
        os.replace(aside, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, entry: dict) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def leave_out(self, number: int, reason: str) -> None:
        self.left_out[number] = reason
        self.write({"episode": number, "left_out": reason})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
