import json
import logging
import re
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from hf_vla.actions.statistics import QUANTILES, ActionStatistics
from hf_vla.actions.values import is_constant


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return rng.normal(size=(5000, 3)) * [1.0, 1e-3, 50.0] + [0.0, 1e4, -7.0]


def gathered(*pieces, **kwargs):
    statistics = ActionStatistics(**kwargs)
    for piece in pieces:
        statistics.update(piece)
    return statistics


def assert_equals_numpy(statistics, rows):
    summary = statistics.summary()
    assert statistics.count == len(rows)
    np.testing.assert_allclose(summary["mean"], rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(summary["std"], rows.std(axis=0), rtol=1e-9)
    np.testing.assert_array_equal(summary["min"], rows.min(axis=0))
    np.testing.assert_array_equal(summary["max"], rows.max(axis=0))
    for name, rank in QUANTILES.items():
        np.testing.assert_allclose(summary[name], np.quantile(rows, rank, axis=0), rtol=1e-14)


def test_streaming_equals_numpy_on_all_rows(rows):
    statistics = gathered(rows[:1], rows[1:4000].reshape(31, 129, 3), rows[4000:], np.empty((0, 3)))
    assert_equals_numpy(statistics, rows)


def test_merging_in_any_order_equals_numpy(rows):
    parts = [rows[:7], rows[7:3000], rows[3000:]]
    for order in ([0, 1, 2], [2, 0, 1]):
        merged = ActionStatistics()
        for part in order:
            assert merged.merge(gathered(parts[part])) is merged
        assert_equals_numpy(merged, rows)
    other = gathered(parts[1])
    gathered(parts[0]).merge(other).update(parts[2])
    assert_equals_numpy(other, parts[1])  # the merged side is left alone


def test_updates_copy_the_callers_rows(rows):
    buffer = rows[:100].copy()
    statistics = gathered(buffer)
    buffer[:] = 0
    assert_equals_numpy(statistics, rows[:100])


def test_arrays_given_and_taken_are_the_callers_own(rows):
    gathered_ones = gathered(rows)
    written = gathered_ones.to_dict()
    given = gathered_ones.summary()
    read = ActionStatistics.from_dict(given | {"count": len(rows)})
    for values in (*given.values(), *read.summary().values()):
        values += 1.0
    assert gathered_ones.to_dict() == read.to_dict() == written


@pytest.mark.parametrize("how", ["streamed", "sketch + sketch", "exact + sketch", "sketch + exact", "exact + exact"])
def test_beyond_the_limit_a_sketch_stays_within_its_rank_error(how):
    rows = np.random.default_rng(1).lognormal(size=(60_000, 2))
    limits = {
        "streamed": None,
        "sketch + sketch": (1000, 1000),
        "exact + sketch": (40_000, 1000),
        "sketch + exact": (1000, 40_000),
        "exact + exact": (40_000, 40_000),
    }[how]
    if limits is None:
        statistics = gathered(*np.array_split(rows, 7), max_exact_rows=20_000)
    else:
        halves = (gathered(half, max_exact_rows=limit) for half, limit in zip(np.split(rows, 2), limits, strict=True))
        statistics = next(halves).merge(next(halves))
    summary = statistics.summary()
    np.testing.assert_allclose(summary["mean"], rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_array_equal(summary["max"], rows.max(axis=0))
    assert statistics._rows == []  # memory is bounded
    for name, rank in QUANTILES.items():
        true_rank = (rows <= summary[name]).mean(axis=0)
        np.testing.assert_allclose(true_rank, rank, atol=2e-3)  # five times the stated 99 % bound: never flaky
    assert not np.array_equal(summary["q50"], np.quantile(rows, 0.5, axis=0))


def test_json_round_trip(rows):
    written = json.loads(json.dumps(gathered(rows).to_dict()))
    assert list(written) == ["mean", "std", "min", "max", *QUANTILES, "count"]
    assert written["count"] == 5000
    assert ActionStatistics.from_dict(written).to_dict() == written


@pytest.mark.parametrize("name", ["v30_video_av1", "v30_images", "v21_video"])
def test_reads_lerobots_stats(goldens, name):
    entries = json.loads((goldens / "lerobot" / "expected" / name / "stats.json").read_text())
    for key in ("action", "observation.state"):
        statistics = ActionStatistics.from_dict(entries[key])
        assert statistics.count == entries[key]["count"][0]
        assert statistics.to_dict() | {"count": [statistics.count]} == entries[key]
        assert ("q01" in statistics.summary()) == (name != "v21_video")
        assert not statistics.constant.any()
    with pytest.raises(ValueError, match=r"Expected statistics of one shape \(action_dim,\)"):
        ActionStatistics.from_dict(entries["observation.images.top"])


def test_constant_dimensions_are_flagged_and_logged(caplog):
    rows = np.random.default_rng(2).normal(size=(1000, 4))
    rows[:, 1] = 0.3
    rows[:, 2] = 0.0
    rows[5, 2] = 1.0  # q01 == q99, though not constant
    statistics = gathered(rows[:500], rows[500:])
    np.testing.assert_array_equal(statistics.constant, [False, True, True, False])
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        written = statistics.to_dict()
    assert "Action dimensions [1, 2] are constant" in caplog.text
    np.testing.assert_array_equal(ActionStatistics.from_dict(written).constant, statistics.constant)


def test_constant_means_equal_up_to_rounding():
    low, high = np.array([0.0, 1000.0, 0.0, 1000.0]), np.array([1e-10, 1000.000001, 1e-6, 1000.01])
    np.testing.assert_array_equal(is_constant(low, high), [True, True, False, False])


def test_bad_rows_are_refused():
    statistics = gathered(np.zeros((2, 3)))
    for bad in (np.nan, np.inf, -np.inf):
        rows = np.zeros((4, 2, 3))
        rows[2, 1, 2] = bad
        with pytest.raises(ValueError, match=f"Expected finite actions, came {bad} at row 5, dimension 2"):
            statistics.update(rows)
    with pytest.raises(ValueError, match="Expected 3 action dimensions like the rows before, came 4"):
        statistics.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="Expected 3 action dimensions like the rows before, came 2"):
        statistics.merge(gathered(np.zeros((1, 2))))
    with pytest.raises(ValueError, match="came a single number"):
        statistics.update(1.0)
    with pytest.raises(ValueError, match=r"at most 1e\+100 in magnitude, came 1e\+300; repair them"):
        statistics.update([[0.0, -1e300, 0.0]])
    statistics.update(np.full((1, 3), 1e100))
    assert np.isfinite(statistics.summary()["std"]).all()
    assert statistics.count == 3  # a refused update leaves no trace
    with pytest.raises(ValueError, match="at least one row of actions"):
        ActionStatistics().to_dict()


def test_bad_files_are_refused(rows):
    good = gathered(rows).to_dict()
    with pytest.raises(ValueError, match=r"Statistics need \['std', 'count'\]"):
        ActionStatistics.from_dict({name: good[name] for name in ("mean", "min", "max")})
    with pytest.raises(ValueError, match=r"Unknown statistics \['q05'\]; known are \['mean'"):
        ActionStatistics.from_dict(good | {"q05": [0, 0, 0]})
    with pytest.raises(ValueError, match=r"one shape \(action_dim,\).*'max': \(2,\)"):
        ActionStatistics.from_dict(good | {"max": [0, 0]})
    with pytest.raises(ValueError, match="Expected finite statistics 'std', came nan at row 0, dimension 1"):
        ActionStatistics.from_dict(good | {"std": [0, np.nan, 0]})
    with pytest.raises(ValueError, match=r"Expected std >= 0, came \[1, -1, 1\]; compute the statistics anew"):
        ActionStatistics.from_dict(good | {"std": [1, -1, 1]})
    for low, high in (("min", "max"), ("q01", "q99"), ("q10", "q90")):
        with pytest.raises(ValueError, match=rf"Expected {low} <= {high}, came {low}=\[0, 9, 0\], {high}=\[1, 1, 1\]"):
            ActionStatistics.from_dict(good | {low: [0, 9, 0], high: [1, 1, 1]})
    for count in (-3, 0, 2.5, float("nan"), True, [3, 3], "3"):
        with pytest.raises(ValueError, match=f"count of 1 or more, came {re.escape(repr(count))}; compute"):
            ActionStatistics.from_dict(good | {"count": count})
    assert ActionStatistics.from_dict(good | {"count": 3.0}).count == 3


def test_statistics_that_were_read_cannot_go_on(rows):
    read = ActionStatistics.from_dict(gathered(rows).to_dict())
    for go_on in (lambda: read.update(rows), lambda: read.merge(gathered(rows)), lambda: gathered(rows).merge(read)):
        with pytest.raises(ValueError, match="read from a file, where the rows are gone"):
            go_on()


@pytest.mark.parametrize("limit", [10**6, 1000])
def test_another_process_can_go_on(rows, limit):
    statistics = gathered(rows[:3000], max_exact_rows=limit)
    received = ForkingPickler.loads(ForkingPickler.dumps(statistics))
    for name, values in statistics.summary().items():
        np.testing.assert_array_equal(received.summary()[name], values)
    received.update(rows[3000:])
    assert received.count == 5000 and statistics.count == 3000
    if limit > 5000:
        assert_equals_numpy(received, rows)
    assert gathered(rows[3000:]).merge(received).count == 7000


def test_float32_rows_are_kept_as_they_are_and_counted_in_float64(rows):
    rows = rows.astype(np.float32)
    statistics = gathered(rows[:2000], rows[2000:])
    assert sum(piece.nbytes for piece in statistics._rows) == rows.nbytes
    assert_equals_numpy(statistics, rows.astype(np.float64))
    assert {values.dtype for values in statistics.summary().values()} == {np.dtype(np.float64)}
