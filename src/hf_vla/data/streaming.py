"""Rows of a LeRobot dataset as a stream: shuffled by windows, divided among processes and workers, resumed exactly."""

import math
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import distributed
from torch.utils.data import IterableDataset, get_worker_info

from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.sampling import WindowSampler


class LeRobotStream(IterableDataset):
    """Items of a dataset, the same as by their numbers, in the order of a [`~hf_vla.data.sampling.WindowSampler`].

    Windows of consecutive rows come in random order and are read several at a time: files are read forwards, which is
    what videos and remote files are fast at. An epoch has every row once; its order depends on the seed and the epoch
    (see `set_epoch`) alone. Batch number b of an epoch is of process `b % world_size`, and the batches of a process
    are of its workers in turn, which is how a `DataLoader` of the same `batch_size` and `num_workers` puts them
    together again; give it to the model as it is, without `accelerator.prepare`, which would divide it once more.

    From a server that answers after 30 ms, two cameras of 128x128 pixels cost 0.07 requests and 18 kB an item (they
    take 8.6 kB in their files), at 0.7 to 1 times the speed of files on disk; rows at random cost 0.5 requests.

    Args:
        dataset ([`~hf_vla.data.lerobot.LeRobotEpisodes`]): usually opened with `streaming=True`.
        rows (`Sequence[int]`, *optional*): those to read; all of them by default.
        window (`int`, defaults to 32): consecutive rows that are read in order.
        num_open (`int`, defaults to 16): windows that are read side by side.
        batch_size (`int`, defaults to 1): that of the `DataLoader`.
        seed (`int`, defaults to 0): of the order.
        num_workers (`int`, defaults to 0): that of the `DataLoader`.
        rank (`int`, *optional*): number of this process; by default as `torch.distributed` has it, or 0.
        world_size (`int`, *optional*): number of processes; likewise, or 1.
        drop_last (`bool`, defaults to `False`): leave out an epoch's last rows, so that all processes have the same
            number of whole batches.

    Raises:
        ValueError: a size below 1, a rank that is none of the processes', or rows that are none of the dataset's.
    """

    def __init__(
        self,
        dataset: LeRobotEpisodes,
        rows: Sequence[int] | None = None,
        window: int = 32,
        num_open: int = 16,
        batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        drop_last: bool = False,
    ):
        several = distributed.is_available() and distributed.is_initialized()
        self.rank = rank if rank is not None else distributed.get_rank() if several else 0
        self.world_size = world_size if world_size is not None else distributed.get_world_size() if several else 1
        if not 0 <= self.rank < self.world_size or batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"Expected a rank in [0, world_size), batch_size of 1 or more and num_workers of 0 or more, came rank "
                f"{self.rank} of {self.world_size}, batch_size {batch_size} and num_workers {num_workers}."
            )
        self.dataset, self.batch_size, self.num_workers, self.drop_last = dataset, batch_size, num_workers, drop_last
        lanes = self.world_size * max(num_workers, 1)
        self.sampler = WindowSampler(dataset.episode_starts, rows, window, num_open, lanes, batch_size, seed)
        checksum = zlib.crc32(dataset.episode_starts, zlib.crc32(self.sampler.rows))
        which = {"revision": dataset.revision, "rows": len(self.sampler), "checksum_of_rows": checksum}
        order = {"window": window, "num_open": num_open, "batch_size": batch_size, "seed": seed}
        shares = {"num_workers": num_workers, "world_size": self.world_size, "drop_last": drop_last}
        self._settings = which | order | shares
        # Epoch, and where to begin in which epoch: shared with workers that stay from one epoch to the next.
        self._shared = torch.tensor([0, -1, 0]).share_memory_()
        self._own_start = (-1, 0, 0)
        self._base, self._done = 0, 0  # items of the process that were skipped, and items read since by this worker

    @property
    def epoch(self) -> int:
        """The epoch that is read, or read next."""
        return int(self._shared[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is read next; without it, every pass is the same."""
        if epoch != self.epoch:
            self._shared[0], self._base, self._done = epoch, 0, 0

    def __len__(self) -> int:
        """Number of items of an epoch in this process."""
        batches, rest = divmod(len(self.sampler), self.batch_size)
        if self.drop_last:
            return batches // self.world_size * self.batch_size
        own, more = divmod(batches, self.world_size)
        return (own + (self.rank < more)) * self.batch_size + rest * (self.rank == more)

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        if count != max(self.num_workers, 1):
            raise ValueError(
                f"Expected the DataLoader to have the {self.num_workers} workers that the stream was made for, came "
                f"{count if worker else 0}; give num_workers to both."
            )
        self._base, self._done = self._begin()
        return self._items(number, count)

    def _items(self, number: int, count: int) -> Iterator[dict]:
        first, to_skip = self._base // self.batch_size, self._done
        for place, batch in enumerate(self._batches()):
            if place < first or (place - first) % count != number:
                continue
            if place == first:
                batch = batch[self._base % self.batch_size :]
            skip = min(to_skip, len(batch))
            to_skip -= skip
            for row in batch[skip:]:
                self._done += 1
                yield self.dataset[row]

    def state_dict(self, items: int | None = None) -> dict:
        """Return where the stream is, to go on from there; of JSON's types.

        Args:
            items (`int`, *optional*): items of this epoch that have come; of a `DataLoader` with workers, which read
                ahead, only who receives them knows. By default as many as were read.

        Raises:
            ValueError: there are workers, and `items` is not given.
        """
        if get_worker_info() is not None:  # asked by a loader that keeps a state of every worker
            return self._settings | {"epoch": self.epoch, "items": self._base, "own_items": self._done}
        if items is None and self.num_workers:
            raise ValueError("Workers read ahead: give the items that have come from the DataLoader in this epoch.")
        items = self._base + self._done if items is None else items
        return self._settings | {"epoch": self.epoch, "items": items, "own_items": 0}

    def load_state_dict(self, state: dict) -> None:
        """Go on where a stream of the same settings was; the next pass over it begins there.

        Raises:
            ValueError: the state is of a stream of other settings, whose order is another.
        """
        if other := {key: state.get(key) for key, value in self._settings.items() if state.get(key) != value}:
            mine = {key: self._settings[key] for key in other}
            raise ValueError(f"Expected the state of a stream with {mine}, came one of {other}: its order is another.")
        if state["own_items"] and get_worker_info() is None:
            raise ValueError("Expected the state of a process, came that of one of its workers.")
        self.set_epoch(state["epoch"])
        self._base, self._done = state["items"], state["own_items"]
        if get_worker_info() is None:
            self._shared[1:] = torch.tensor([state["epoch"], state["items"]])
        else:
            self._own_start = (state["epoch"], state["items"], state["own_items"])

    def _begin(self) -> tuple[int, int]:
        """Return how many of the process's items to skip, and then how many of this worker's."""
        epoch, items, own = self._own_start
        self._own_start = (-1, 0, 0)
        if epoch == self.epoch:
            return items, own
        epoch, items = self._shared[1:].tolist()
        if get_worker_info() is None:
            self._shared[1:] = torch.tensor([-1, 0])
        return (items, 0) if epoch == self.epoch else (0, 0)

    def _batches(self) -> Iterator[list[int]]:
        """Rows of this process's batches."""
        self.sampler.set_epoch(self.epoch)
        rows = iter(self.sampler)
        rounds = len(self.sampler) / (self.batch_size * self.world_size)
        for number in range((math.floor(rounds) if self.drop_last else math.ceil(rounds)) * self.world_size):
            batch = list(islice(rows, self.batch_size))
            if number % self.world_size == self.rank and batch:
                yield batch
