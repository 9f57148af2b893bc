from itertools import islice

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, Dataset, get_worker_info

from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.sampling import WindowSampler
from hf_vla.data.video import _Decoder

STARTS = np.cumsum([0, 40, 1, 133, 8, 90, 2, 64])
COUNT = int(STARTS[-1])
SETTINGS = [
    {},
    {"window": 1},
    {"window": 1000, "num_open": 1},
    {"batch_size": 4, "lanes": 3},
    {"batch_size": 7, "lanes": 6, "num_open": 5, "window": 10},
    {"batch_size": 50, "lanes": 16, "num_open": 64},
]
ROWS = {
    "all": None,
    "some": np.random.default_rng(0).permutation(COUNT)[:101],
    "one": [12],
    "none": np.array([], np.int64),
}


def batched(rows, size):
    rows = list(rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def episode(rows):
    return np.searchsorted(STARTS, rows, side="right") - 1


def lanes_of(order, lanes, batch_size):
    """The rows that each reading process gets."""
    batches = batched(order, batch_size)
    return [[row for batch in batches[lane::lanes] for row in batch] for lane in range(lanes)]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("epoch", [0, 3])
def test_every_row_comes_once_per_epoch(rows, setting, epoch):
    sampler = WindowSampler(STARTS, rows, **setting)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == sorted(range(COUNT) if rows is None else rows)
    assert len(sampler) == len(order)
    assert all(type(row) is int for row in order)


def test_the_order_is_of_the_seed_and_the_epoch():
    orders = []
    for seed in (0, 1):
        for epoch in (0, 1):
            sampler, again = (WindowSampler(STARTS, seed=seed) for _ in range(2))
            sampler.set_epoch(epoch)
            list(islice(again, 30))  # what was read before is of no matter
            again.set_epoch(epoch)
            orders.append(list(sampler))
            assert list(sampler) == list(again) == orders[-1]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("lanes", [1, 3])
def test_windows_are_read_forward_and_within_their_episode(lanes):
    window, num_open, batch_size = 16, 4, 5
    rows = np.delete(np.arange(COUNT), [70, 71, 72, 200])
    sampler = WindowSampler(STARTS, rows, window, num_open, lanes, batch_size)
    place = {int(row): position for position, row in enumerate(rows)}
    for lane in lanes_of(list(sampler), lanes, batch_size):
        readers, left = [], 0  # the last row of each window that is open; rows are followed to their window
        for row in lane:
            before = [last for last in readers if place[last] + 1 == place[row] and episode(last) == episode(row)]
            if before:
                readers.remove(before[0])
            else:
                left += 1
            readers.append(row)
            readers = readers[-2 * num_open :]  # by turns, in any order
        windows = len(lane) / window + len(STARTS) + num_open  # a last one per episode, and those cut at borders
        assert left <= windows


def test_windows_begin_elsewhere_in_every_epoch():
    sampler, firsts = WindowSampler([0, 1000], window=50, num_open=1), []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        order = np.array(list(sampler))
        begins = [order[0], *order[1:][np.diff(order) != 1]]
        assert len(begins) <= 21
        firsts.append(sorted(begin % 50 for begin in begins if begin))
    assert len({tuple(first) for first in firsts}) > 1


def test_a_batch_has_a_row_of_every_open_window():
    sampler = WindowSampler(np.arange(0, 20001, 250), window=32, num_open=16, batch_size=16)
    for batch in batched(sampler, 16)[:-1]:
        assert np.diff(sorted(batch)).min() > 0
    starts = np.arange(0, 20001, 10)  # episodes shorter than a window: neighbours in a batch would show
    batches = batched(WindowSampler(starts, num_open=16, batch_size=16), 16)
    distinct = np.mean([len({row // 10 for row in batch}) for batch in batches])
    assert distinct > 15.5


def test_batches_of_one_turn_are_made_up_anew():
    batches = batched(WindowSampler(np.arange(0, 16001, 500), window=500, num_open=16, batch_size=8), 8)
    episodes = [set(np.array(batch) // 500) for batch in batches]
    common = [len(one & other) for one, other in zip(episodes, episodes[2:], strict=False)]  # a turn apart
    assert np.mean(common) < 6  # 8 if the same eight windows stayed together


def test_the_order_of_rows_given_is_of_no_matter():
    rows = np.random.default_rng(0).permutation(COUNT)[:200]
    assert list(WindowSampler(STARTS, rows)) == list(WindowSampler(STARTS, np.sort(rows)))


def test_batches_are_as_mixed_as_random_ones_where_as_many_windows_are_open():
    starts = np.arange(0, 40001, 200)
    values = np.random.default_rng(0).normal(size=200)[np.arange(40000) // 200]

    def spread(**setting):
        order = np.array(list(WindowSampler(starts, batch_size=32, **setting)))
        return values[order].reshape(-1, 32).mean(1).var() / (values.var() / 32)

    assert 0.8 < spread(num_open=32) < 1.2
    assert 1.6 < spread(num_open=16) < 2.4


class RowsByWorker(Dataset):
    def __len__(self):
        return COUNT

    def __getitem__(self, row):
        return torch.tensor([row, get_worker_info().id if get_worker_info() else 0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_lanes_are_what_workers_and_processes_read(workers, processes):
    lanes, batch_size = max(workers, 1) * processes, 6
    sampler = WindowSampler(STARTS, lanes=lanes, batch_size=batch_size, num_open=3)
    expected = lanes_of(list(sampler), lanes, batch_size)
    for process in range(processes):
        loader = DataLoader(RowsByWorker(), batch_size, sampler=sampler, num_workers=workers)
        loader = prepare_data_loader(
            loader, num_processes=processes, process_index=process, put_on_device=False, even_batches=False
        )
        read = torch.cat(list(loader))
        for worker in range(max(workers, 1)):
            rows = read[read[:, 1] == worker, 0].tolist()
            assert rows == expected[process + processes * worker]


def test_a_prepared_loader_sets_the_epoch_and_skips_without_reading():
    sampler = WindowSampler(STARTS, batch_size=6)
    loader = prepare_data_loader(
        DataLoader(RowsByWorker(), 6, sampler=sampler), num_processes=1, process_index=0, put_on_device=False
    )
    epochs = [torch.cat(list(loader))[:, 0].tolist() for _ in range(2)]
    for epoch, order in enumerate(epochs):
        sampler.set_epoch(epoch)
        assert list(sampler) == order
    loader.set_epoch(0)
    rest = skip_first_batches(loader, 4)
    assert torch.cat(list(rest))[:, 0].tolist() == epochs[0][24:]


def test_rows_of_a_dataset_are_read_without_seeking(goldens, monkeypatch):
    dataset = LeRobotEpisodes(goldens / "lerobot" / "datasets" / "v30_video_av1")
    seeks, seek = [], _Decoder.seek
    monkeypatch.setattr(_Decoder, "seek", lambda self, seconds: (seeks.append(seconds), seek(self, seconds)))
    sampler = WindowSampler(dataset.episode_starts, num_open=4, window=16)
    for row in sampler:
        assert int(dataset[row]["index"]) == row
    windows = len(dataset) / 16 + len(dataset.episodes)
    assert len(seeks) <= 2 * 3 * windows  # two cameras; twice until a reader is known


@pytest.mark.parametrize("name", ["window", "num_open", "lanes", "batch_size"])
def test_numbers_that_are_not_positive_are_errors(name):
    with pytest.raises(ValueError, match=f"{name} should be at least 1, came 0"):
        WindowSampler(STARTS, **{name: 0})


@pytest.mark.parametrize("rows", [[3, 3], [-1], [COUNT], [0.5], [True, False]], ids=str)
def test_rows_that_are_not_rows_are_errors(rows):
    with pytest.raises(ValueError, match=f"distinct numbers of rows from 0 to {COUNT - 1}, came"):
        WindowSampler(STARTS, rows)
