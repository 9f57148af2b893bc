"""Several datasets as one, and the order in which a training draws from them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
from torch.utils.data import Dataset, Sampler

DATASET = "dataset"
EPOCH = "epoch"
BALANCES = ("size", "equal")
BLOCK = 2**16  # rows that are mixed at a time


class Mixture(Dataset):
    """Datasets one behind the other; an item also says, under `dataset`, which of them it is from.

    Under `epoch` it has what `set_epoch` was called with last, as the dataloaders of `accelerate` do.

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
        self.epoch = 0
        self._missing = {name: dict.fromkeys(cameras) for name, cameras in (missing or {}).items()}
        shares = np.array([weights[name] for name in self.datasets]) * (
            np.diff(self.starts) if balance == "size" else 1
        )
        self.shares = dict(zip(self.datasets, (shares / shares.sum()).tolist(), strict=True))

    def set_epoch(self, epoch: int) -> None:
        """Choose what items have under `epoch`."""
        self.epoch = epoch

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
        item = self.datasets[name][index - int(self.starts[place])]
        return item | self._missing.get(name, {}) | {DATASET: name, EPOCH: self.epoch}


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

    Raises:
        ValueError: a dataset's share of an epoch is less than half a row.
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
        if never := [name for name, count in zip(mixture.datasets, self.counts, strict=True) if count == 0]:
            raise ValueError(f"Of {never} no row would be drawn: give them larger weights, or leave them out.")

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is drawn next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.mixture)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        ahead = [_Endless(order, self.epoch * count) for order, count in zip(self.orders, self.counts, strict=True)]
        blocks = -(-len(self) // BLOCK)
        for block in range(blocks):  # each with the shares of the whole
            counts = self.counts * (block + 1) // blocks - self.counts * block // blocks
            first = int((self.counts * block // blocks).sum())
            places = generator.permutation(np.repeat(np.arange(len(counts)), counts))
            lanes = (first + np.arange(len(places))) // self.batch_size % self.lanes
            rows = np.empty(len(places), np.int64)
            for place, count in enumerate(counts.tolist()):
                positions, drawn = ahead[place].take(count)
                wanted = np.flatnonzero(places == place)
                by_lane = wanted[_by_lane(lanes[wanted])], _by_lane(positions % self.lanes)
                rows[by_lane[0]] = self.mixture.starts[place] + drawn[by_lane[1]]
            yield from rows.tolist()


class _Shuffled(Sampler[int]):
    def __init__(self, size: int, seed: tuple[int, ...]):
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng([*self.seed, self.epoch]).permutation(self.size).tolist()


class _Endless:
    """A sampler's rows, epoch after epoch, from a place on."""

    def __init__(self, order: Sampler, first: int):
        self.order, (self.epoch, self.position) = order, divmod(int(first), len(order))
        self.rows = self._begin(self.position)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of the next rows in their epoch, and the rows."""
        positions, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            if self.position == len(self.order):
                self.epoch, self.position = self.epoch + 1, 0
                self.rows = self._begin()
            size = min(len(self.order) - self.position, count - done)
            part = slice(done, done + size)
            positions[part] = np.arange(self.position, self.position + size)
            rows[part] = np.fromiter(islice(self.rows, size), np.int64, size)
            self.position, done = self.position + size, done + size
        return positions, rows

    def _begin(self, first: int = 0) -> Iterator[int]:
        self.order.set_epoch(self.epoch)
        return islice(iter(self.order), first, None)


def _by_lane(lanes: np.ndarray) -> np.ndarray:
    """Places in an order in which two lists of places, if their lanes are about as frequent, meet lane by lane."""
    return np.argsort(lanes, kind="stable")


def _rounded(amounts: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers of a given sum that are nearest to some amounts of it."""
    counts = np.floor(amounts).astype(np.int64)
    counts[np.argsort(counts - amounts, kind="stable")[: total - counts.sum()]] += 1
    return counts
