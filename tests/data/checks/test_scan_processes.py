import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from hf_vla.actions.statistics import QUANTILES
from hf_vla.data.checks import scan as scan_module
from hf_vla.data.checks.scan import plan_scan
from hf_vla.data.checks.scan_processes import scan_datasets


def by_name(plans, workers, progress=None):
    return {scan.name: scan for scan in scan_datasets(plans, workers, progress)}


def assert_equal(one, other):
    assert (one.num_rows, one.num_episodes) == (other.num_rows, other.num_episodes)
    for key, column in one.columns.items():
        twin = other.columns[key]
        assert (column.bad_rows, column.bad_places) == (twin.bad_rows, twin.bad_places)
        for name, values in column.statistics.summary().items():
            np.testing.assert_allclose(values, twin.statistics.summary()[name], rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(column.sample.entries(), twin.sample.entries())
    np.testing.assert_array_equal(one.windows.entries(), other.windows.entries())


def test_the_number_of_processes_changes_nothing(write_dataset):
    def spoil(columns):
        columns["action"][[3, 60, 140], 1] = np.nan

    plans = [plan_scan(write_dataset(*options, change=spoil)[0]) for options in (([50] * 6, 5), ([70, 80], 1))]
    told = []
    expected = by_name(plans, 1, lambda name, rows: told.append((name, rows)))
    assert [sum(rows for name, rows in told if name == plan.name) for plan in plans] == [300, 150]
    for workers in (2, 7):
        told.clear()
        found = by_name(plans, workers, lambda name, rows: told.append((name, rows)))
        assert [sum(rows for name, rows in told if name == plan.name) for plan in plans] == [300, 150]
        assert found.keys() == expected.keys()
        for name, scan in found.items():
            assert_equal(scan, expected[name])
    assert not multiprocessing.active_children()


def test_samples_that_leave_rows_out_are_the_same_too(write_dataset):
    size = scan_module.SAMPLE_ROWS
    plan = plan_scan(write_dataset([10_000] * 27, files=3)[0])
    (one,), (two,) = scan_datasets([plan], 1), scan_datasets([plan], 2)
    sample = one.columns["action"].sample.entries()
    assert plan.rows > size == len(sample) and len(one.windows.entries()) == scan_module.SAMPLE_WINDOWS
    assert_equal(one, two)
    rows = np.sort(sample[:, 0].astype(int))  # the rows' own numbers
    assert len(np.unique(rows)) == size
    # uniform: of each of 27 episodes 0.74 of the rows, give or take 44 (standard deviation)
    assert np.abs(np.bincount(rows // 10_000) - size / 27).max() < 5 * 44


@pytest.mark.slow
def test_sketches_of_several_processes_stay_within_their_error(write_dataset):
    root, columns = write_dataset([100_000] * 24, files=4)
    (found,) = scan_datasets([plan_scan(root, columns=["reward"])], 2)
    statistics, values = found.columns["reward"].statistics, np.sort(columns["reward"])
    assert statistics.count == 2_400_000 > statistics.max_exact_rows
    for name, rank in QUANTILES.items():
        # the stated error is 0.0004 at 99 %; five times that is never reached
        assert abs(np.searchsorted(values, statistics.summary()[name][0]) / len(values) - rank) < 2e-3


def test_a_dataset_is_done_when_every_process_has_handed_in_its_part(write_dataset):
    plan = plan_scan(write_dataset([50] * 2, files=2)[0])
    # while this one sleeps, both others come to the end of their file
    (found,) = scan_datasets([plan], 2, lambda name, rows: time.sleep(1.0))
    assert found.num_rows == 100


def test_a_process_that_dies_is_an_error_that_names_the_file(write_dataset):
    plan = plan_scan(write_dataset([50] * 6, files=6)[0])

    def kill(name, rows):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(ChildProcessError, match=r"process that read .*/file-00\d.parquet died with exit code -9; wh"):
        by_name([plan], 2, kill)
    assert not multiprocessing.active_children()


def test_errors_of_another_process_arrive_whole(write_dataset):
    plan = plan_scan(write_dataset([50] * 6, files=6)[0])
    plan.files[4].write_bytes(b"PAR1 and nothing more PAR1")
    with pytest.raises(ValueError, match=f"{plan.name}, {plan.files[4]}: "):
        by_name([plan], 2)
    assert not multiprocessing.active_children()


def test_a_dataset_that_lacks_rows_is_an_error(write_dataset):
    plan = plan_scan(write_dataset([50] * 4, files=4)[0])
    plan.lengths[3] += 1
    for workers in (1, 2):
        with pytest.raises(ValueError, match="gives episode 3 51 rows, the data files have 50 for it"):
            by_name([plan], workers)


def test_a_scan_that_is_given_up_leaves_no_process(write_dataset):
    plans = [plan_scan(write_dataset([50] * 6, files=6)[0]) for _ in range(2)]
    scans = scan_datasets(plans, 2)
    next(scans)
    scans.close()
    assert not multiprocessing.active_children()


def test_the_same_dataset_twice_is_an_error(write_dataset):
    plan = plan_scan(write_dataset([50])[0])
    with pytest.raises(ValueError, match="Expected every dataset once"):
        by_name([plan, plan], 1)
