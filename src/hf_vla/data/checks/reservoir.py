"""A uniform sample of bounded size, whose parts merge."""

from collections.abc import Callable

import numpy as np


class Reservoir:
    """A uniform sample of at most `size` entries, the same in whatever order and pieces they come.

    Every entry has drawn a number in [0, 1); those of the smallest numbers are kept, so that samples merge.

    Args:
        size (`int`): entries kept at most.
    """

    def __init__(self, size: int):
        self.size, self._numbers, self._entries = size, [], []
        self._limit, self._held = np.inf, 0  # numbers above the limit are not among the smallest

    def update(self, numbers: np.ndarray, entries: Callable[[np.ndarray], np.ndarray]) -> None:
        """Offer entries.

        Args:
            numbers (`np.ndarray` of shape `(n,)`): what each has drawn.
            entries (`Callable`): returns those of given places, `(k,)` -> `(k, ...)`; the others are never made.
        """
        places = np.flatnonzero(numbers < self._limit)
        if len(places) > self.size:
            places = places[np.argpartition(numbers[places], self.size - 1)[: self.size]]
        if len(places):
            self._add(numbers[places], entries(places))

    def merge(self, other: "Reservoir") -> None:
        """Add another sample's entries."""
        for numbers, entries in zip(other._numbers, other._entries, strict=True):
            self._add(numbers, entries)

    def entries(self) -> np.ndarray | None:
        """Return the sample, in the order of the numbers drawn: `(min(n, size), ...)`; None where nothing came."""
        if not self._numbers:
            return None
        self._trim()
        return self._entries[0][np.argsort(self._numbers[0])]

    def _add(self, numbers, entries):
        self._numbers.append(numbers)
        self._entries.append(entries)
        self._held += len(numbers)
        if self._held > 2 * self.size:
            self._trim()

    def _trim(self):
        numbers, entries = np.concatenate(self._numbers), np.concatenate(self._entries)
        if len(numbers) > self.size:
            kept = np.argpartition(numbers, self.size - 1)[: self.size]
            numbers, entries = numbers[kept], entries[kept]
        self._numbers, self._entries, self._held = [numbers], [entries], len(numbers)
        if self._held == self.size:
            self._limit = numbers.max()
