"""A stream has every row once, whoever reads it, in an order that can be gone on with."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.streaming import LeRobotStream

TOP = "observation.images.top"


@pytest.fixture
def folder(goldens):
    return goldens / "lerobot" / "datasets" / "v30_video_av1"


@pytest.fixture
def dataset(folder):
    return LeRobotEpisodes(folder, cameras=[])


def rows(items):
    return [int(item["index"]) for item in items]


def loaded(stream, take=None, **options):
    """Rows as a DataLoader gives them, batch by batch; `take` batches of them."""
    loader = DataLoader(
        stream, batch_size=stream.batch_size, num_workers=stream.num_workers, collate_fn=rows, **options
    )
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == take:
            break
    return batches


def test_items_are_the_datasets_own_in_the_order_of_the_sampler(folder):
    dataset = LeRobotEpisodes(folder, {"action": [0.0, 0.1], TOP: [-0.1, 0.0]}, episodes=[1, 3])
    stream = LeRobotStream(dataset, window=8, num_open=3)
    assert isinstance(stream, IterableDataset) and len(stream) == len(dataset) == 73
    order = list(stream.sampler)
    assert order != sorted(order)
    for item, row in zip(stream, order, strict=True):
        expected = dataset[row]
        assert item.keys() == expected.keys() and torch.equal(item[TOP], expected[TOP])
        assert all(torch.equal(item[key], expected[key]) for key in item if key != "task")


@pytest.mark.parametrize("batch_size", [1, 4, 7])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_no_row_comes_twice_and_none_is_lost(dataset, batch_size, workers, world_size):
    shares = []
    for rank in range(world_size):
        settings = {"batch_size": batch_size, "num_workers": workers, "rank": rank, "world_size": world_size}
        stream = LeRobotStream(dataset, window=8, num_open=3, **settings)
        shares.append([row for batch in loaded(stream) for row in batch])
        assert len(shares[-1]) == len(stream)
    assert sorted(sum(shares, [])) == [*range(175)]
    assert max(map(len, shares)) - min(map(len, shares)) <= batch_size


def test_processes_and_workers_read_the_batches_of_one_order(dataset):
    """Batch b of the sampler's order is of process b % 2, and of its workers in turn."""
    settings = {"batch_size": 4, "num_workers": 2, "world_size": 2, "window": 8, "num_open": 3}
    streams = [LeRobotStream(dataset, rank=rank, **settings) for rank in range(2)]
    order = list(streams[0].sampler)
    batches = [order[first : first + 4] for first in range(0, len(order), 4)]
    for rank, stream in enumerate(streams):
        assert loaded(stream) == batches[rank::2]


def test_processes_have_equally_many_batches_if_the_last_are_left_out(dataset):
    settings = {"batch_size": 4, "world_size": 3, "drop_last": True}
    streams = [LeRobotStream(dataset, rank=rank, **settings) for rank in range(3)]
    shares = [rows(stream) for stream in streams]
    assert [*map(len, shares)] == [*map(len, streams)] == [56] * 3
    assert len(set(sum(shares, []))) == 168


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_differ_and_are_the_same_again(dataset, workers):
    stream = LeRobotStream(dataset, num_workers=workers, batch_size=4)
    loader = DataLoader(
        stream, batch_size=4, num_workers=workers, collate_fn=rows, persistent_workers=workers > 0
    )  # workers that stay hear of the epoch too
    passes = []
    for epoch in (0, 1, 0, 0):
        stream.set_epoch(epoch)
        passes.append([row for batch in loader for row in batch])
    assert passes[0] == passes[2] == passes[3] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1])
    other = LeRobotStream(dataset, num_workers=workers, batch_size=4, seed=1)
    assert [row for batch in loaded(other) for row in batch] != passes[0]


@pytest.mark.parametrize("taken", [0, 1, 10, 87, 175])
def test_a_stream_goes_on_exactly_where_it_was(dataset, taken):
    stream = LeRobotStream(dataset, window=8, num_open=3, batch_size=4)
    stream.set_epoch(2)
    whole = rows(stream)
    reader = iter(stream)
    assert rows(next(reader) for _ in range(taken)) == whole[:taken]
    state = json.loads(json.dumps(stream.state_dict()))
    assert state["items"] == taken
    again = LeRobotStream(LeRobotEpisodes(dataset.root, cameras=[]), window=8, num_open=3, batch_size=4)
    again.load_state_dict(state)
    assert again.epoch == 2 and again.state_dict() == state
    assert rows(again) == whole[taken:]
    assert rows(again) == whole  # the pass after it begins at the beginning
    again.load_state_dict(state)
    again.set_epoch(3)
    stream.set_epoch(3)
    assert rows(again) == rows(stream) != whole


@pytest.mark.parametrize("taken", [1, 3, 8])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loader_with_workers_goes_on_exactly_where_it_was(dataset, taken, world_size):
    settings = {"batch_size": 5, "num_workers": 2, "rank": world_size - 1, "world_size": world_size}
    whole = loaded(LeRobotStream(dataset, **settings))
    stream = LeRobotStream(dataset, **settings)
    with pytest.raises(ValueError, match="Workers read ahead: give the items"):
        stream.state_dict()
    assert loaded(stream, take=taken) == whole[:taken]
    again = LeRobotStream(dataset, **settings)
    again.load_state_dict(stream.state_dict(items=5 * taken))
    assert loaded(again) == whole[taken:]


class Interrupted(IterableDataset):
    """In a worker: reads some rows, takes the state, and reads the rest by another stream that loads it."""

    def __init__(self, stream, other):
        self.stream, self.other = stream, other

    def __iter__(self):
        reader = iter(self.stream)
        for _ in range(13):
            yield next(reader)
        self.other.load_state_dict(self.stream.state_dict())
        yield from self.other


@pytest.mark.parametrize("skipped", [0, 12])
def test_a_workers_own_state_is_of_its_own_share(dataset, skipped):
    streams = [LeRobotStream(dataset, batch_size=4, num_workers=2) for _ in range(3)]
    options = {"batch_size": 4, "num_workers": 2, "collate_fn": rows}
    whole = loaded(streams[0])
    streams[1].load_state_dict(streams[1].state_dict(items=skipped))
    assert [*DataLoader(Interrupted(*streams[1:]), **options)] == whole[skipped // 4 :]


def test_states_of_another_order_are_errors(dataset):
    state = LeRobotStream(dataset, window=8).state_dict()
    with pytest.raises(ValueError, match=r"a stream with {'window': 16}, came one of {'window': 8}: its order"):
        LeRobotStream(dataset, window=16).load_state_dict(state)
    others = [
        (dataset, {"world_size": 2}),
        (dataset, {"seed": 1}),
        (dataset, {"rows": np.arange(100)}),
        (dataset.keep(np.arange(175) != 30), {"rows": np.arange(174)}),
    ]
    for other, settings in others:
        with pytest.raises(ValueError, match="its order is another"):
            LeRobotStream(other, window=8, **settings).load_state_dict(state)
    with pytest.raises(ValueError, match="came that of one of its workers"):
        LeRobotStream(dataset, window=8).load_state_dict(state | {"own_items": 3})


def test_wrong_numbers_are_errors(dataset):
    with pytest.raises(ValueError, match="came rank 2 of 2"):
        LeRobotStream(dataset, rank=2, world_size=2)
    with pytest.raises(ValueError, match="the DataLoader to have the 2 workers .*, came 0; give num_workers to both"):
        next(iter(LeRobotStream(dataset, num_workers=2)))
    with pytest.raises(ValueError, match="num_open should be at least 1"):
        LeRobotStream(dataset, num_open=0)


def test_rows_that_are_held_out_do_not_come(dataset):
    kept = np.flatnonzero(dataset.column("episode_index") != 2)
    assert sorted(rows(LeRobotStream(dataset, kept, window=8))) == kept.tolist()


def code(picture):
    """Read the number that every recorded frame carries: rows of four cells, white is 1."""
    _, height, width = picture.shape
    bits = (picture[:, height // 8 :: height // 4, width // 8 :: width // 4][:, :4, :4].mean(0) > 0.5).int()
    episode, frame = bits[0].tolist(), bits[1:3].flatten().tolist()
    return int("".join(map(str, episode)), 2), int("".join(map(str, frame)), 2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["v30_video_av1", "v30_images", "v21_video"])
def test_a_stream_from_the_hub_has_the_right_frames(hub, folder, name, workers):
    """What LeRobot's own stream gets wrong: where an episode begins in its file, `episodes`, the next one's frames."""
    hub.upload("somebody/blocks", folder.parent / name)
    deltas = {TOP: [-0.1, 0.0, 0.1, 0.2]}
    dataset = LeRobotEpisodes("somebody/blocks", deltas, episodes=[1, 3], cameras=["top"], streaming=True)
    lengths = {episode.index: episode.length for episode in dataset.episodes}
    stream = LeRobotStream(dataset, window=8, num_open=3, num_workers=workers)
    seen = []
    for item in DataLoader(stream, batch_size=None, num_workers=workers):
        episode, frame = int(item["episode_index"]), int(item["frame_index"])
        last = lengths[episode] - 1
        window = [(episode, min(max(frame + step, 0), last)) for step in (-1, 0, 1, 2)]
        assert [code(picture) for picture in item[TOP]] == window
        assert item[f"{TOP}_is_pad"].tolist() == [frame == 0, False, frame > last - 1, frame > last - 2]
        seen.append((episode, frame))
    assert sorted(seen) == [(episode, frame) for episode in (1, 3) for frame in range(lengths[episode])]


def test_a_stream_fetches_a_block_of_a_video_once(hub, folder):
    hub.upload("somebody/blocks", folder)
    stream = LeRobotStream(LeRobotEpisodes("somebody/blocks", streaming=True), window=8)
    videos = sum(path.stat().st_size for path in folder.rglob("*.mp4"))
    rows(stream)
    rows(stream)
    assert len(hub.fetched("*.mp4")) == 6
    assert hub.sent("*.mp4") == videos  # in two passes, by several decoders
