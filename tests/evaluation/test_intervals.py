from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import binomtest

from hf_vla.evaluation.intervals import (
    Interval,
    compare_pairs,
    holm,
    mean_over_tasks,
    paired_difference,
    wilson,
)


def pairs(both, only_a, only_b, neither):
    return [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither


# Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I, method 3
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_of_the_literature(successes, trials, low, high):
    interval = wilson(successes, trials)
    assert interval == pytest.approx((successes / trials, low, high), abs=5e-5)


@pytest.mark.parametrize("trials", [1, 2, 7, 20, 500])
def test_wilson_is_scipy_s(trials):
    for successes in {0, 1, trials // 3, trials - 1, trials}:
        ends = binomtest(successes, trials).proportion_ci(0.95, "wilson")
        rate, low, high = wilson(successes, trials)
        assert (low, high) == pytest.approx((ends.low, ends.high), abs=1e-12) and 0 <= low <= rate <= high <= 1


@pytest.mark.parametrize("count", [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_rate(count):
    with pytest.raises(ValueError, match=f"came {count[0]} of {count[1]}"):
        wilson(*count)


def test_mean_over_tasks_of_equal_size_is_that_of_all_episodes():
    assert mean_over_tasks([(20, 20), (3, 20), (11, 20)]) == pytest.approx(wilson(34, 60))


def test_mean_over_tasks_counts_every_task_alike():
    mean = mean_over_tasks([(1, 1), (0, 99)])
    assert mean.estimate == 0.5
    assert mean.high - mean.low > wilson(50, 100).high - wilson(50, 100).low  # one task is hardly known
    assert mean[1:] == pytest.approx(wilson(2, 4)[1:], abs=0.01)  # 4 / (1 + 1/99) episodes


@pytest.mark.parametrize("rates", [[0.98] * 10, [0.5] * 10, [0.9] * 5 + [0.2] * 5])
def test_mean_over_tasks_covers_the_truth(rates):
    successes = np.random.default_rng(0).binomial(20, rates, (1000, len(rates)))
    intervals = [mean_over_tasks([(int(count), 20) for count in row]) for row in successes]
    assert np.mean([low <= np.mean(rates) <= high for _, low, high in intervals]) > 0.92


def test_mean_over_tasks_needs_tasks():
    with pytest.raises(ValueError, match="one task or more"):
        mean_over_tasks([])


# Fagerland, Lydersen and Laake 2014, https://doi.org/10.1002/sim.6148 (airway hyper-responsiveness; before - after);
# Altman et al., Statistics with Confidence, 2000, table 6.2, where the two are correlated
@pytest.mark.parametrize(("cells", "low", "high"), [((1, 7, 1, 12), -0.507, -0.026), ((14, 0, 5, 22), 0.011, 0.226)])
def test_paired_difference_of_the_literature(cells, low, high):
    both, only_a, only_b, neither = cells
    estimate = (only_b - only_a) / sum(cells)
    assert paired_difference(*cells) == pytest.approx((estimate, low, high), abs=6e-4)
    mirrored = paired_difference(both, only_b, only_a, neither)
    assert mirrored == pytest.approx((-estimate, -high, -low), abs=6e-4)


@pytest.mark.parametrize("cells", [(20, 0, 0, 0), (0, 0, 0, 20), (0, 20, 0, 0), (1, 0, 0, 0), (9, 0, 0, 11)])
def test_paired_difference_of_extremes_is_an_interval(cells):
    estimate, low, high = paired_difference(*cells)
    assert -1 <= low <= estimate <= high <= 1 and high > low


def test_more_pairs_are_surer():
    widths = [high - low for _, low, high in (paired_difference(6 * n, n, 2 * n, n) for n in (1, 4, 16))]
    assert all(narrower < wider for wider, narrower in pairwise(widths))


def test_mcnemar_of_the_literature():
    test = compare_pairs(pairs(1, 1, 7, 12))  # Fagerland et al. 2013, https://doi.org/10.1186/1471-2288-13-91
    assert test.p_value == pytest.approx(0.0703, abs=5e-5)
    assert (test.pairs, test.only_a, test.only_b) == (21, 1, 7)
    assert test.difference == paired_difference(1, 1, 7, 12)


def test_runs_that_agree_do_not_differ():
    test = compare_pairs(pairs(12, 0, 0, 8))
    assert test.p_value == 1.0 and test.difference.estimate == 0.0


def test_no_pairs_cannot_be_compared():
    with pytest.raises(ValueError, match="one episode or more"):
        compare_pairs([])


def test_holm():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert [*corrected] == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_an_interval_names_its_parts():
    assert Interval(0.5, 0.1, 0.9)._asdict() == {"estimate": 0.5, "low": 0.1, "high": 0.9}
