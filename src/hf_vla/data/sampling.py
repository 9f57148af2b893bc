"""The order in which rows are read: shuffled, and yet forward within the videos."""

from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
from torch.utils.data import Sampler

TURNS = 64  # rows of each open window that are ordered at once


class WindowSampler(Sampler[int]):
    """Every row once per epoch, in shuffled windows of consecutive rows, some of which are read side by side.

    A row read at random costs a video the decoding of a key frame and of what follows it; rows in order do not. Here
    each episode is cut into windows, at places that differ between epochs, and the windows are shuffled; `num_open` of
    them at a time give their rows in order, by turns: a row of each, then the next of each. A window never leaves its
    episode, and rows that are not among `rows` (held out, idle) are jumped over and never given.

    A batch holds rows of `num_open` windows, so with `num_open` as large as the batch it is as well mixed as a random
    one: the mean of a value that is constant within an episode varies 0.98 times as much from batch to batch as with
    random batches; with half as many windows 1.8, with an eighth 6.6 times (200 episodes of 250 rows). But one window
    serves `window` turns, so batches close in time resemble each other, up to `window` of them.

    The order is a function of `seed` and the epoch alone, so a run that is continued goes on where it stopped: indices
    are skipped, nothing is read.

    Args:
        episode_starts (`np.ndarray` of shape `(num_episodes + 1,)`): first row of every episode, and the number of
            rows.
        rows (`np.ndarray`, *optional*): the rows to give, in any order; all of them by default.
        window (`int`, defaults to 32): rows per window.
        num_open (`int`, defaults to 16): windows read side by side in a lane; at most `VideoFrames`' decoders, 32.
        lanes (`int`, defaults to 1): processes that read: the workers of a `DataLoader` (1 if it has none) times the
            processes of `accelerate`. Batch `b` is of lane `b % lanes`, just as these hand batches out, and each lane
            reads windows of its own.
        batch_size (`int`, defaults to 1): rows per batch, as given to the `DataLoader`.
        seed (`int` or `tuple[int, ...]`, defaults to 0): seed of the order.

    Raises:
        ValueError: a number that is not positive, or `rows` that are not among the episodes' rows or not distinct.
    """

    def __init__(
        self,
        episode_starts: np.ndarray,
        rows: np.ndarray | None = None,
        window: int = 32,
        num_open: int = 16,
        lanes: int = 1,
        batch_size: int = 1,
        seed: int | tuple[int, ...] = 0,
    ):
        counts = {"window": window, "num_open": num_open, "lanes": lanes, "batch_size": batch_size}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} should be at least 1, came {value}.")
        self.episode_starts = np.asarray(episode_starts)
        self.rows = self._checked(rows)
        self.window, self.num_open, self.lanes, self.batch_size = window, num_open, lanes, batch_size
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int):
        """Choose the epoch, each of which has an order of its own; prepared dataloaders of `accelerate` call this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([*np.atleast_1d(self.seed), self.epoch])
        first, last = self._windows(generator)
        starts = np.cumsum(last - first) - (last - first)
        # Positions in the row of all windows, one after the other: each lane has a part of it, for all its batches.
        batches = np.arange(-(-len(self) // self.batch_size))
        sizes = np.minimum(self.batch_size, len(self) - batches * self.batch_size)
        counts = np.bincount(batches % self.lanes, sizes, minlength=self.lanes).astype(np.int64)
        borders = np.cumsum([0, *counts])
        lanes = [
            self._lane(first - starts, starts, *part, generator)
            for part, generator in zip(pairwise(borders), generator.spawn(self.lanes), strict=True)
        ]
        for batch in batches:
            yield from islice(lanes[batch % self.lanes], self.batch_size)

    def _windows(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return where windows begin and end among the rows, shuffled."""
        edges = np.unique(np.searchsorted(self.rows, self.episode_starts))
        begins, lengths = edges[:-1], np.diff(edges)
        ahead = generator.integers(self.window, size=len(begins))  # an episode's first window starts before it
        counts = -(-(lengths + ahead) // self.window)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        first = np.repeat(begins, counts) + np.maximum(number * self.window - np.repeat(ahead, counts), 0)
        last = np.append(first[1:], len(self.rows))
        order = generator.permutation(len(first))
        return first[order], last[order]

    def _lane(self, shift, starts, begin: int, end: int, generator: np.random.Generator) -> Iterator[int]:
        """Go through `num_open` equal parts of a lane at once: a row of each, in any order, and so on."""
        parts = begin + (end - begin) * np.arange(self.num_open + 1) // self.num_open
        for turn in range(0, np.diff(parts).max(), TURNS):
            positions = parts[:-1, None] + np.arange(turn, turn + TURNS)
            positions = np.where(positions < parts[1:, None], positions, -1)
            positions = generator.permuted(positions, axis=0).T.ravel()
            positions = positions[positions >= 0]
            window = starts.searchsorted(positions, side="right") - 1
            yield from self.rows[positions + shift[window]].tolist()

    def _checked(self, rows: np.ndarray | None) -> np.ndarray:
        count = int(self.episode_starts[-1])
        if rows is None:
            return np.arange(count)
        rows = np.asarray(rows)
        unique = np.unique(rows)
        inside = len(rows) == 0 or 0 <= unique[0] <= unique[-1] < count
        if rows.dtype.kind not in "iu" or len(unique) < len(rows) or not inside:
            raise ValueError(
                f"rows should be distinct numbers of rows from 0 to {count - 1}, came {len(rows)} of them, "
                f"{len(unique)} distinct, of type {rows.dtype}, from {unique[:1]} to {unique[-1:]}."
            )
        return unique
