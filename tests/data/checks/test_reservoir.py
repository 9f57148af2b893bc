import numpy as np
import pytest

from hf_vla.data.checks.reservoir import Reservoir


def filled(numbers, entries, size, pieces=1):
    reservoir = Reservoir(size)
    for part in np.array_split(np.arange(len(numbers)), pieces):
        reservoir.update(numbers[part], entries[part].__getitem__)
    return reservoir


@pytest.fixture
def stream():
    generator = np.random.default_rng(0)
    return generator.random(5000), np.arange(10_000).reshape(5000, 2)


def test_keeps_the_smallest_numbers_in_their_order(stream):
    numbers, entries = stream
    expected = entries[np.argsort(numbers)[:300]]
    for pieces in (1, 2, 70, 5000):
        np.testing.assert_array_equal(filled(numbers, entries, 300, pieces).entries(), expected)
    np.testing.assert_array_equal(filled(numbers, entries, 10**6, 3).entries(), entries[np.argsort(numbers)])


def test_merging_equals_one_stream(stream):
    numbers, entries = stream
    expected = filled(numbers, entries, 300).entries()
    cuts = np.split(np.arange(5000), [100, 2000, 2001])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        merged = Reservoir(300)
        for part in order:
            merged.merge(filled(numbers[cuts[part]], entries[cuts[part]], 300, 2))
        np.testing.assert_array_equal(merged.entries(), expected)
        merged.merge(Reservoir(300))
        np.testing.assert_array_equal(merged.entries(), expected)


def test_holds_twice_its_size_at_most_and_makes_no_entry_in_vain(stream):
    numbers, entries = stream
    reservoir = Reservoir(100)
    for part in np.array_split(np.arange(5000), 500):
        reservoir.update(numbers[part], entries[part].__getitem__)
        assert reservoir._held == sum(map(len, reservoir._entries)) <= 200
    asked = []
    reservoir.update(np.ones(5), lambda places: asked.append(places))
    assert asked == []


def test_nothing_came():
    assert Reservoir(3).entries() is None


def test_every_entry_is_as_likely_as_any_other():
    generator, counts = np.random.default_rng(1), np.zeros(50)
    for _ in range(2000):
        chosen = filled(generator.random(50), np.arange(50), 10, pieces=4).entries()
        counts[chosen] += 1
    # each is kept with probability 0.2: 400 of 2000 times, standard deviation 18
    assert np.abs(counts - 400).max() < 5 * 18
