import numpy as np
import pytest
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader, Subset

from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.mixture import Mixture, MixtureSampler
from hf_vla.data.sampling import WindowSampler


@pytest.fixture(scope="module")
def rows(demos):
    """Rows of a real dataset, without pictures."""
    dataset = LeRobotEpisodes(demos, cameras=[])
    return lambda start, stop: Subset(dataset, range(start, stop))


def drawn(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


def counts(mixture, rows):
    return np.histogram(rows, mixture.starts)[0].tolist()


def test_items_say_where_they_are_from(rows):
    mixture = Mixture({"a": rows(0, 3), "b": rows(10, 14)}, missing={"b": ["observation.images.wrist"]})
    items = [mixture[index] for index in range(-7, 7)]
    assert [item["dataset"] for item in items] == [*"aaabbbb"] * 2
    assert [int(item["index"]) for item in items] == [0, 1, 2, 10, 11, 12, 13] * 2
    assert items[3]["observation.images.wrist"] is None and "observation.images.wrist" not in items[0]
    with pytest.raises(IndexError, match="row 7 of 7"):
        mixture[7]


@pytest.mark.parametrize(
    ("weights", "balance", "wanted"),
    [
        ({}, "size", [10, 30]),
        ({}, "equal", [20, 20]),
        ({"a": 3.0}, "size", [20, 20]),
        ({"a": 1.0, "b": 3.0}, "equal", [10, 30]),
        ({"a": 0.02}, "equal", [1, 39]),
        ({"b": 2.0}, "equal", [13, 27]),
    ],
)
def test_an_epoch_has_the_shares_that_were_asked_for(rows, weights, balance, wanted):
    mixture = Mixture({"a": rows(0, 10), "b": rows(10, 40)}, weights, balance)
    sampler = MixtureSampler(mixture, seed=3)
    for epoch in range(3):
        assert counts(mixture, drawn(sampler, epoch)) == wanted
    assert sum(mixture.shares.values()) == pytest.approx(1) and len(sampler) == 40


def test_no_row_comes_again_before_all_others_came(rows):
    mixture = Mixture({"a": rows(0, 10), "b": rows(10, 40)}, balance="equal")
    sampler = MixtureSampler(mixture, seed=0)
    stream = [row for epoch in range(6) for row in drawn(sampler, epoch)]
    for first, stop in ((0, 10), (10, 40)):
        own = [row for row in stream if first <= row < stop]
        passes = [own[start : start + stop - first] for start in range(0, len(own), stop - first)]
        assert all(sorted(each) == list(range(first, stop)) for each in passes)
        assert len(passes) == 120 // (stop - first) and passes[0] != passes[1]


def test_the_order_is_a_function_of_seed_and_epoch(rows):
    mixture = Mixture({"a": rows(0, 10), "b": rows(10, 40)}, {"a": 2.0})
    sampler = MixtureSampler(mixture, seed=1)
    first, second = drawn(sampler, 0), drawn(sampler, 1)
    assert drawn(sampler, 0) == first != second
    assert drawn(MixtureSampler(mixture, seed=1), 1) == second
    assert drawn(MixtureSampler(mixture, seed=2), 1) != second
    loader = DataLoader(mixture, sampler=sampler, batch_size=None, num_workers=1)
    sampler.set_epoch(1)
    assert [int(item["index"]) for item in loader] == second  # rows of the dataset are those of the mixture here


def test_rows_of_the_datasets_are_mixed_through_an_epoch(rows):
    mixture = Mixture({"a": rows(0, 100), "b": rows(100, 400)})
    order = np.array(drawn(MixtureSampler(mixture, seed=0), 0))
    shares = [(part < 100).mean() for part in np.array_split(order, 4)]
    assert 0.1 < min(shares) and max(shares) < 0.4


@pytest.mark.parametrize("lanes", [1, 4])
def test_windows_of_a_weighted_dataset_are_read_on_lane_by_lane(rows, lanes):
    mixture = Mixture({"a": rows(0, 600), "b": rows(600, 1000)}, {"a": 1.0, "b": 2.0}, "equal")
    sizes = [600, 400]
    orders = [WindowSampler(np.array([0, size]), num_open=4, lanes=lanes, seed=0) for size in sizes]
    sampler = MixtureSampler(mixture, 0, orders, lanes, batch_size=8)
    epochs = [drawn(sampler, epoch) for epoch in range(3)]
    assert [counts(mixture, epoch) for epoch in epochs] == [[333, 667]] * 3 and epochs[0] != epochs[1]
    stream = np.concatenate(epochs)
    own = stream[stream >= 600]
    times = np.bincount(own - 600)
    assert times.min() == 5 and times.max() == 6 and times.sum() == 2001  # 3 epochs of 667 rows
    for lane in range(lanes):
        read = [
            row for epoch in epochs for first in range(lane * 8, 1000, lanes * 8) for row in epoch[first : first + 8]
        ]
        forward = sum(row - 1 in read[max(0, place - 24) : place] for place, row in enumerate(read))
        assert forward / len(read) > 0.85


def test_a_dataset_that_would_never_be_drawn(rows):
    mixture = Mixture({"a": rows(0, 10), "b": rows(10, 40)}, {"a": 0.001}, "equal")
    with pytest.raises(ValueError, match=r"Of \['a'\] no row would be drawn: give them larger weights"):
        MixtureSampler(mixture)


def test_items_say_their_epoch_also_in_workers(rows):
    mixture = Mixture({"a": rows(0, 4)})
    loader = DataLoaderShard(mixture, batch_size=None, num_workers=1)
    for epoch in (0, 3):
        loader.set_epoch(epoch)
        assert [item["epoch"] for item in loader] == [epoch] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": {}}, "Expected datasets with rows in them, came none of any"),
        ({"datasets": {"a": []}}, r"Expected datasets with rows in them, came none of \['a'\]"),
        ({"weights": {"c": 1.0}}, r"Expected a weight above 0 for some of \['a', 'b'\], came .*'c': 1.0"),
        ({"weights": {"a": 0.0}}, "Expected a weight above 0 for some of"),
        ({"weights": {"a": float("nan")}}, "Expected a weight above 0 for some of"),
        ({"balance": "rows"}, r"Expected a balance among \('size', 'equal'\), came 'rows'"),
    ],
)
def test_what_is_no_mixture(rows, options, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**{"datasets": {"a": rows(0, 2), "b": rows(2, 4)}} | options)
