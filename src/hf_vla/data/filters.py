"""Which rows and episodes of a dataset are not worth learning from, and why."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from hf_vla.data import schema
from hf_vla.data.lerobot import LeRobotEpisodes

REASONS = {
    "duplicate": "the episode has the actions and states of an earlier or a held-out one: it is removed",
    "idle": "nothing moves: the rows are removed, chunks go on behind them",
    "outlier": "the action is far outside of what is usual: no chunk with it is learnt",
    "jerk": "the action changes too suddenly: no chunk with it is learnt",
}


@dataclass(frozen=True)
class DropReport:
    """What the filters drop of a dataset.

    Args:
        name (`str`): of the dataset.
        dropped (`dict[str, np.ndarray]`): reason, see `REASONS` -> bool of shape `(num_frames,)`.
        episodes, frames (`np.ndarray` of shape `(num_frames,)`): where each row is.
    """

    name: str
    dropped: dict[str, np.ndarray]
    episodes: np.ndarray
    frames: np.ndarray

    @property
    def removed(self) -> np.ndarray:
        """Rows that leave the timeline, `(num_frames,)`: the dataset goes on as if they had not been recorded."""
        return self.dropped["duplicate"] | self.dropped["idle"]

    @property
    def excluded(self) -> np.ndarray:
        """Rows that stay, since motion would be missing without them, but are not to be learnt: `(num_frames,)`."""
        return self.dropped["outlier"] | self.dropped["jerk"]

    def to_dict(self) -> dict:
        """Return, JSON-safe, for every reason how many rows there are, and which frames of which episodes.

        Frames are listed in runs, each as its first and last one.
        """
        dropped = {
            reason: {"means": REASONS[reason], "rows": int(rows.sum()), "episodes": self._runs(rows)}
            for reason, rows in self.dropped.items()
        }
        return {"dataset": self.name, "rows": len(self.frames), "dropped": dropped}

    def lines(self) -> Iterator[str]:
        """Yield a sentence for every reason that applied."""
        for reason, rows in self.dropped.items():
            if rows.any():
                first, episodes = rows.argmax(), len(np.unique(self.episodes[rows]))
                yield (
                    f"{self.name}: {reason}: {rows.sum()} rows ({100 * rows.mean():.3g} %) of {episodes} episodes, "
                    f"first in episode {self.episodes[first]}, frame {self.frames[first]}; {REASONS[reason]}."
                )

    def _runs(self, rows: np.ndarray) -> dict[int, list[list[int]]]:
        episodes, frames = self.episodes[rows], self.frames[rows]
        begins = np.flatnonzero((np.diff(episodes, prepend=-1) != 0) | (np.diff(frames, prepend=-2) != 1))
        ends = np.append(begins[1:], len(frames))[: len(begins)] - 1
        runs = {}
        for episode, first, last in zip(episodes[begins], frames[begins], frames[ends], strict=True):
            runs.setdefault(int(episode), []).append([int(first), int(last)])
        return runs


def find_dropped(
    dataset: LeRobotEpisodes,
    kind: str,
    gripper: int | None = None,
    held_out: Collection[int] = (),
    idle: float | None = None,
    idle_seconds: float = 0.5,
    outliers: float | None = None,
    jerk: float | None = None,
    duplicates: bool = False,
) -> DropReport:
    """Find rows that a training had better leave out; without options none.

    Every dimension is measured by its usual range, between its 1 % and 99 % quantiles over the rows to train on (by 1,
    so in robot units, where these are equal). The gripper is not measured.

    Behind removed idle rows, windows of observations hold the rows before these. A policy removes nothing: with
    `n_obs_steps` above 1 it sees the last steps of the rest there.

    Args:
        dataset ([`~hf_vla.data.lerobot.LeRobotEpisodes`]): all of its rows, none removed.
        kind (`str`): of the actions, see [`~hf_vla.actions.spec.ActionSpec`]; tells positions from motions.
        gripper (`int`, *optional*): its place among the dimensions.
        held_out (`Collection[int]`): episodes that are not trained on: nothing of them is dropped, nor usual.
        idle (`float`, *optional*): a row is idle where every dimension is still within this share of its range, 0.01
            for example, of the last row that was not, and the gripper is where it was. Slow motion adds up, and so
            do the motions of `"delta_ee"`, to positions.
        idle_seconds (`float`, defaults to 0.5): the shortest rest, of idle rows alone, that is removed. A motion that
            leaves `idle` within this time, 2 % of the range per second at `idle=0.01`, stays as it is. 0 removes
            single rows too, and so thins a motion that is slower than `idle` per row.
        outliers (`float`, *optional*): an action is an outlier where it lies outside of the usual range by more than
            this many ranges, 1.0 for example.
        jerk (`float`, *optional*): change of the acceleration within a step, in ranges of the velocity, that is too
            much: 2.0 is an arm that reverses from full speed to full speed and back within two steps.
        duplicates (`bool`): of episodes with exactly the same actions and states, all but the first, and all where one
            is held out.

    Raises:
        ValueError: a threshold is negative, or no episode is to train on.
    """
    limits = {"idle": idle, "idle_seconds": idle_seconds, "outliers": outliers, "jerk": jerk}
    for name, value in limits.items():
        if value is not None and not value >= 0:
            raise ValueError(f"Expected {name} of 0 or more, came {value}.")
    episodes, starts = dataset.column("episode_index"), dataset.episode_starts
    train = ~np.isin(episodes, [*held_out])
    if not train.any():
        raise ValueError(f"{dataset.name}: expected an episode to train on, all of them are held out.")
    actions = dataset.column(schema.ACTION).astype(np.float64)
    grippers = [] if gripper is None else [gripper]
    body, is_motion = np.delete(actions, grippers, axis=-1), kind == "delta_ee"
    dropped = {reason: np.zeros(len(body), bool) for reason in REASONS}
    if duplicates:
        dropped["duplicate"] = _duplicates(dataset, held_out)
    if idle is not None:
        gripper_moves = (_differences(actions[:, grippers], starts) != 0).any(-1)
        position, origin = _positions(body, is_motion, starts, train)
        dropped["idle"] = _rests(position, origin, gripper_moves, starts, idle, np.rint(idle_seconds * dataset.fps))
    if outliers is not None:
        low, high, size = _usual(body[train])
        dropped["outlier"] = (np.maximum(low - body, body - high) / size).max(-1, initial=0) > outliers
    if jerk is not None:
        dropped["jerk"] = _jerks(body, is_motion, starts, train) > jerk
    dropped = {reason: rows & train for reason, rows in dropped.items()}
    return DropReport(dataset.name, dropped, episodes, dataset.column("frame_index"))


def chunks_with(rows: np.ndarray, episode_starts: np.ndarray, chunk_size: int) -> np.ndarray:
    """Rows whose chunk of actions holds one of some rows, `(num_frames,)` bool.

    Args:
        rows (`np.ndarray` of shape `(num_frames,)`, bool): the ones to look for.
        episode_starts (`np.ndarray` of shape `(num_episodes + 1,)`): see `LeRobotEpisodes.episode_starts`.
        chunk_size (`int`): actions of one chunk, from the row's own on.
    """
    before = np.append(0, np.cumsum(rows))
    episode_ends = np.repeat(episode_starts[1:], np.diff(episode_starts))
    chunk_ends = np.minimum(np.arange(len(rows)) + chunk_size, episode_ends)
    return before[chunk_ends] > before[:-1]


def _usual(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Usual range of every dimension: its ends, and its size."""
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    return low, high, np.where(high > low, high - low, 1.0)


def _differences(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Change since the row before; 0 in the first of an episode."""
    changes = np.diff(values, axis=0, prepend=values[:1])
    changes[starts[:-1]] = 0
    return changes


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum over the rows of an episode up to each."""
    sums, first = np.cumsum(values, axis=0), starts[:-1]
    return sums - np.repeat(sums[first] - values[first], np.diff(starts), axis=0)


def _positions(body, is_motion: bool, starts, train) -> tuple[np.ndarray, np.ndarray]:
    """Positions of all rows `(n, D)`, and those before each episode's first one `(num_episodes, D)`, in ranges."""
    low, high, size = _usual(body[train])
    if not is_motion:
        return body / size, np.full((len(starts) - 1, body.shape[-1]), np.inf)  # not known: nobody is close to it
    usual = _sums(np.clip(body, low, high), starts)  # an outlier would move all of its episode behind it
    return _sums(body, starts) / _usual(usual[train])[2], np.zeros((len(starts) - 1, body.shape[-1]))


def _rests(position, origin, gripper_moves, starts, reach: float, least: float) -> np.ndarray:
    """Rows within `reach` of the last row before them that is not, `least` or more of them in a row: `(n,)` bool.

    Args:
        position, origin (`np.ndarray`): see `_positions`; `origin` is used up.
        gripper_moves (`np.ndarray` of shape `(n,)`, bool): rows that end a rest in any case.
        starts (`np.ndarray` of shape `(num_episodes + 1,)`): of the episodes, which are gone through side by side.
    """
    still, lengths = np.zeros(len(position), bool), np.diff(starts)
    for step in range(lengths.max()):
        (episodes,) = np.nonzero(lengths > step)
        rows = starts[episodes] + step
        near = np.abs(position[rows] - origin[episodes]).max(-1, initial=0) <= reach
        still[rows] = near & ~gripper_moves[rows]
        moved = ~still[rows]
        origin[episodes[moved]] = position[rows[moved]]
    begins = ~still
    begins[starts[:-1]] = True
    rest = np.cumsum(begins) - 1
    return still & (np.bincount(rest, still) >= least)[rest]


def _jerks(body, is_motion: bool, starts, train) -> np.ndarray:
    """Largest change of the acceleration since the row before, in ranges of the velocity: `(n,)`."""
    velocity = body if is_motion else _differences(body, starts)
    frames = np.arange(len(body)) - np.repeat(starts[:-1], np.diff(starts))
    first = 0 if is_motion else 1  # row whose velocity is known
    known = train & (frames >= first)
    size = _usual(velocity[known])[2] if known.any() else 1.0
    change = _differences(_differences(velocity / size, starts), starts)
    change[frames < first + 2] = 0  # it needs the velocities of three rows
    return np.abs(change).max(-1, initial=0)


def _duplicates(dataset: LeRobotEpisodes, held_out: Collection[int]) -> np.ndarray:
    """Rows of episodes that equal an earlier or a held-out one, the held-out ones themselves among them."""
    columns = [dataset.column(key) for key in (schema.ACTION, schema.STATE) if key in dataset.features]
    digests = []
    for start, stop in zip(dataset.episode_starts[:-1], dataset.episode_starts[1:], strict=True):
        digest = sha256()
        for column in columns:
            digest.update(column[start:stop].tobytes())
        digests.append(digest.digest())
    episodes = zip(dataset.episodes, digests, strict=True)
    seen, repeated = {digest for episode, digest in episodes if episode.index in held_out}, []
    for digest in digests:
        repeated.append(digest in seen)
        seen.add(digest)
    return np.repeat(repeated, np.diff(dataset.episode_starts))
