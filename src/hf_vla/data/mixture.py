"""Several datasets as one, and the order in which a training draws from them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
from torch.utils.data import Dataset, Sampler

DATASET = "dataset"
BALANCES = ("size", "equal")


class Mixture(Dataset):
    """Datasets one behind the other; an item also says, under `dataset`, which of them it is from.

    Args:
        datasets (`Mapping[str, Dataset]`): by name, the unnorm_key of their statistics.
        weights (`Mapping[str, float]`, *optional*): above 0, by which [`MixtureSampler`] multiplies a dataset's share;
            1 by default.
        balance (`str`, defaults to `"size"`): `"size"`: shares are in proportion to the datasets' numbers of rows;
            `"equal"`: they are equal; before they are weighted.
        missing (`Mapping[str, Sequence[str]]`, *optional*): cameras that a dataset does not have, though others do;
            its items hold None for their pictures.

    Raises:
        ValueError: there are no datasets, one has no rows, or weights are not above 0 or of another dataset.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        weights: Mapping[str, float] | None = None,
        balance: str = "size",
        missing: Mapping[str, Sequence[str]] | None = None,
    ):
        self.datasets, weights = dict(datasets), {name: 1.0 for name in datasets} | dict(weights or {})
        if not self.datasets or (empty := [name for name, dataset in self.datasets.items() if not len(dataset)]):
            raise ValueError(f"Expected datasets with rows in them, came none of {empty if self.datasets else 'any'}.")
        if set(weights) != set(self.datasets) or not all(0 < weight < np.inf for weight in weights.values()):
            raise ValueError(f"Expected a weight above 0 for some of {list(self.datasets)}, came {weights}.")
        if balance not in BALANCES:
            raise ValueError(f"Expected a balance among {BALANCES}, came {balance!r}.")
        self.starts = np.cumsum([0, *map(len, self.datasets.values())])
        self._missing = {name: dict.fromkeys(cameras) for name, cameras in (missing or {}).items()}
        shares = np.array([weights[name] for name in self.datasets]) * (
            np.diff(self.starts) if balance == "size" else 1
        )
        self.shares = dict(zip(self.datasets, (shares / shares.sum()).tolist(), strict=True))

    @property
    def rows(self) -> dict[str, range]:
        """Rows of each dataset."""
        bounds = self.starts.tolist()
        return {name: range(*bounds[place : place + 2]) for place, name in enumerate(self.datasets)}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        place = int(np.searchsorted(self.starts, index, side="right")) - 1
        name = list(self.datasets)[place]
        return self.datasets[name][index - int(self.starts[place])] | self._missing.get(name, {}) | {DATASET: name}


class MixtureSampler(Sampler[int]):
    """Draws from a mixture's datasets according to their shares; an epoch has as many rows as the mixture.

    Every epoch takes the same number of rows of a dataset, its share of the epoch rounded, and goes on in it where the
    epoch before left off: all of its rows come once, in a new order each time, before one comes again. What is drawn
    is a pure function of seed and epoch: a run that is resumed, or divided among processes, draws the same.

    Args:
        mixture ([`Mixture`]): to draw from.
        seed (`int`): of the order.
        orders (`Sequence[Sampler]`, *optional*): of each dataset, its rows in an order that `set_epoch` changes, such
            as a [`~hf_vla.data.sampling.WindowSampler`]; any row after any other by default.
        lanes, batch_size (`int`): of such a sampler, which here has a `batch_size` of 1: a lane reads on in the
            windows that are its own.
    """

    def __init__(
        self,
        mixture: Mixture,
        seed: int = 0,
        orders: Sequence[Sampler] | None = None,
        lanes: int = 1,
        batch_size: int = 1,
    ):
        self.mixture, self.seed, self.epoch, self.lanes, self.batch_size = mixture, seed, 0, lanes, batch_size
        places = enumerate(mixture.datasets.values())
        self.orders = orders or [_Shuffled(len(dataset), (seed, place)) for place, dataset in places]
        self.counts = _rounded(np.array([*mixture.shares.values()]) * len(mixture), len(mixture))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is drawn next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.mixture)

    def __iter__(self) -> Iterator[int]:
        places = np.repeat(np.arange(len(self.counts)), self.counts)
        order = np.random.default_rng([self.seed, self.epoch]).permutation(places)
        lanes = np.arange(len(self)) // self.batch_size % self.lanes
        rows = np.empty(len(self), np.int64)
        for place, (start, count) in enumerate(zip(self.mixture.starts, self.counts.tolist(), strict=False)):
            drawn, own = self._drawn(place, self.epoch * count, count)
            taken = np.flatnonzero(order == place)
            rows[taken[_by_lane(lanes[taken])]] = start + drawn[_by_lane(own)]
        for part in np.array_split(rows, -(-len(rows) // 2**16)):
            yield from part.tolist()

    def _drawn(self, place: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows `first` to `first + count` of a dataset's endless order, epoch after epoch of it, and their lanes."""
        order, drawn = self.orders[place], np.empty(count, np.int64)
        lanes, done = np.empty(count, np.int64), 0
        while done < count:
            epoch, start = divmod(first + done, len(order))
            stop = min(len(order), start + count - done)
            order.set_epoch(epoch)
            drawn[done : done + stop - start] = np.fromiter(islice(order, start, stop), np.int64, stop - start)
            lanes[done : done + stop - start] = np.arange(start, stop) % self.lanes
            done += stop - start
        return drawn, lanes


class _Shuffled(Sampler[int]):
    def __init__(self, size: int, seed: tuple[int, ...]):
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng([*self.seed, self.epoch]).permutation(self.size))


def _by_lane(lanes: np.ndarray) -> np.ndarray:
    """Places in an order in which two lists of places, if their lanes are about as frequent, meet lane by lane."""
    return np.argsort(lanes, kind="stable")


def _rounded(amounts: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers of a given sum that are nearest to some amounts of it."""
    counts = np.floor(amounts).astype(np.int64)
    counts[np.argsort(counts - amounts, kind="stable")[: total - counts.sum()]] += 1
    return counts
