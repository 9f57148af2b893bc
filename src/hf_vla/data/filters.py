"""Which rows and episodes of a dataset are not worth learning from, and why."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hf_vla.data import schema
from hf_vla.data.lerobot import LeRobotEpisodes

REASONS = {
    "duplicate": "the episode has the actions and states of an earlier one",
    "idle": "nothing moves: taken out of the timeline, chunks go on behind it",
    "outlier": "the action is far outside of what is usual: no chunk with it is learnt",
    "jerk": "the action changes too suddenly: no chunk with it is learnt",
}


@dataclass(frozen=True)
class Filtered:
    """What the filters found in a dataset.

    Args:
        name (`str`): of the dataset.
        found (`dict[str, np.ndarray]`): reason, see `REASONS` -> bool of shape `(num_frames,)`.
        episodes, frames (`np.ndarray` of shape `(num_frames,)`): where each row is.
    """

    name: str
    found: dict[str, np.ndarray]
    episodes: np.ndarray
    frames: np.ndarray

    @property
    def taken_out(self) -> np.ndarray:
        """Rows that leave the timeline, `(num_frames,)`: the dataset goes on as if they had not been recorded."""
        return self.found["duplicate"] | self.found["idle"]

    @property
    def spoilt(self) -> np.ndarray:
        """Rows that stay, since motion would be missing without them, but are not to be learnt: `(num_frames,)`."""
        return self.found["outlier"] | self.found["jerk"]

    def report(self) -> dict:
        """Return, JSON-safe, for every reason how many rows there are, and which frames of which episodes."""
        dropped = {}
        for reason, rows in self.found.items():
            where = {int(episode): self._frames(rows & (self.episodes == episode)) for episode in self._episodes(rows)}
            dropped[reason] = {"means": REASONS[reason], "rows": int(rows.sum()), "episodes": where}
        return {"dataset": self.name, "rows": len(self.frames), "dropped": dropped}

    def lines(self) -> Iterator[str]:
        """Yield a sentence for every reason that applied."""
        for reason, rows in self.found.items():
            if rows.any():
                share, episodes = 100 * rows.mean(), self._episodes(rows)
                yield (
                    f"{self.name}: {reason}: {rows.sum()} rows ({share:.3g} %) of {len(episodes)} episodes, first in "
                    f"episode {self.episodes[rows][0]}, frame {self.frames[rows][0]}; {REASONS[reason]}."
                )

    def _episodes(self, rows):
        return np.unique(self.episodes[rows]).tolist()

    def _frames(self, rows) -> list[list[int]]:
        """Runs of frames, each as its first and last one."""
        frames = self.frames[rows]
        runs = np.split(frames, np.flatnonzero(np.diff(frames) != 1) + 1)
        return [[int(run[0]), int(run[-1])] for run in runs]


def find_flaws(
    dataset: LeRobotEpisodes,
    kind: str,
    gripper: int | None = None,
    judged: np.ndarray | None = None,
    idle: float | None = None,
    outliers: float | None = None,
    jerk: float | None = None,
    duplicates: bool = False,
) -> Filtered:
    """Find rows that a training had better leave out; without options none.

    Sizes are relative to each dimension's usual range, from its 1 % to its 99 % quantile; the gripper's is not judged.

    Args:
        dataset ([`~hf_vla.data.lerobot.LeRobotEpisodes`]): all of its rows, none taken out.
        kind (`str`): of the actions, see [`~hf_vla.actions.spec.ActionSpec`]; tells positions from motions.
        gripper (`int`, *optional*): its place among the dimensions.
        judged (`np.ndarray` of shape `(num_frames,)`, bool, *optional*): the rows in question, which also tell what is
            usual; all of them by default.
        idle (`float`, *optional*): a row is idle where no dimension moves by more than this share of its range, 0.01
            for example, and the gripper is told what the row before told it.
        outliers (`float`, *optional*): an action is an outlier where it lies outside of the usual range by more than
            this many ranges, 1.0 for example.
        jerk (`float`, *optional*): the third derivative of the position per step, in ranges, that is too much: 2.0 is
            an arm that reverses from full speed to full speed and back within two steps.
        duplicates (`bool`): of episodes with exactly the same actions and states, all but the first.

    Raises:
        ValueError: a threshold is negative.
    """
    for name, value in (("idle", idle), ("outliers", outliers), ("jerk", jerk)):
        if value is not None and not value >= 0:
            raise ValueError(f"Expected {name} of 0 or more, as a share of the actions' range, came {value}.")
    actions = dataset.column(schema.ACTION).astype(np.float64)
    grippers = [] if gripper is None else [gripper]
    body = np.delete(actions, grippers, axis=-1)
    judged = np.ones(len(body), bool) if judged is None else judged
    low, high = np.quantile(body[judged], [0.01, 0.99], axis=0)
    scale = np.where(high > low, high - low, 1.0)
    starts = dataset.episode_starts[:-1]
    is_motion = kind == "delta_ee"
    velocity = body / scale if is_motion else _differences(body / scale, starts)
    none = np.zeros(len(body), bool)
    found = {"duplicate": _duplicates(dataset) if duplicates else none}
    told = np.abs(_differences(actions[:, grippers], starts)).sum(-1) > 0
    still = np.abs(velocity).max(-1) <= (idle if idle is not None else -1)
    if not is_motion:
        still[starts] = False  # where an episode begins is not known to be where it was before
    found["idle"] = still & ~told
    beyond = np.maximum(low - body, body - high) / scale
    found["outlier"] = none if outliers is None else beyond.max(-1) > outliers
    third = _differences(_differences(velocity, starts), starts)
    # it needs the motion of three rows: an episode's first rows have none to compare with
    third[np.arange(len(body)) - np.repeat(starts, np.diff(dataset.episode_starts)) < (2 if is_motion else 3)] = 0
    found["jerk"] = none if jerk is None else np.abs(third).max(-1) > jerk
    found = {reason: rows & judged for reason, rows in found.items()}
    return Filtered(dataset.name, found, dataset.column("episode_index"), dataset.column("frame_index"))


def reaching(rows: np.ndarray, episode_starts: np.ndarray, chunk_size: int) -> np.ndarray:
    """Rows whose chunk of actions holds one of some rows, `(num_frames,)` bool.

    Args:
        rows (`np.ndarray` of shape `(num_frames,)`, bool): the ones to look for.
        episode_starts (`np.ndarray` of shape `(num_episodes + 1,)`): see `LeRobotEpisodes.episode_starts`.
        chunk_size (`int`): actions of one chunk, from the row's own on.
    """
    places, episode = np.arange(len(rows)), np.repeat(np.arange(len(episode_starts) - 1), np.diff(episode_starts))
    ahead = np.minimum(places[:, None] + np.arange(chunk_size), (episode_starts[1:] - 1)[episode][:, None])
    return rows[ahead].any(-1)


def _differences(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Change since the row before; 0 in the first of an episode."""
    changes = np.diff(values, axis=0, prepend=values[:1])
    changes[starts] = 0
    return changes


def _duplicates(dataset: LeRobotEpisodes) -> np.ndarray:
    columns = [dataset.column(key) for key in (schema.ACTION, schema.STATE) if key in dataset.features]
    rows, seen = np.zeros(len(dataset), bool), set()
    for start, stop in zip(dataset.episode_starts[:-1], dataset.episode_starts[1:], strict=True):
        content = b"".join(column[start:stop].tobytes() for column in columns)
        rows[start:stop] = content in seen
        seen.add(content)
    return rows
