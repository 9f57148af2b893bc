"""How sure a success rate is, and whether two of them differ."""

from collections.abc import Collection, Mapping, Sequence
from math import sqrt
from typing import NamedTuple

from scipy.stats import binomtest, norm

CONFIDENCE = 0.95
ALPHA = 1.0 - CONFIDENCE
Z = float(norm.ppf(1.0 - ALPHA / 2))  # 1.96


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval."""

    estimate: float
    low: float
    high: float


class PairedTest(NamedTuple):
    """Two runs of the same episodes.

    Args:
        pairs (`int`): episodes that both ran.
        only_a, only_b (`int`): those that one of them alone solved.
        difference (`Interval`): success of b minus success of a.
        p_value (`float`): two-sided, of both being equally good.
    """

    pairs: int
    only_a: int
    only_b: int
    difference: Interval
    p_value: float


def wilson(successes: int, trials: int) -> Interval:
    """Wilson's score interval of a success rate; it holds for few episodes, and for none or all solved.

    Args:
        successes (`int`), trials (`int`): how many of how many.

    Raises:
        ValueError: there are no trials, or more successes than trials.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"Expected one episode or more, and no more successes, came {successes} of {trials}.")
    return _score_interval(successes / trials, trials)


def mean_over_tasks(counts: Collection[tuple[int, int]]) -> Interval:
    """Mean of the success rates of several tasks, each counting alike.

    Its interval is Wilson's for as many episodes as would make the mean as sure were all tasks equally hard: all of
    them, where every task has the same number. Where such tasks are of different difficulty the mean is surer than
    that, so that the interval is rather too wide than too narrow. It speaks of other episodes of these tasks, not of
    other tasks.

    Args:
        counts (`Collection[tuple[int, int]]`): successes and trials of each task.

    Raises:
        ValueError: there is no task, or one without trials.
    """
    if not counts:
        raise ValueError("Expected one task or more, came none.")
    mean = sum(wilson(*count).estimate for count in counts) / len(counts)
    return _score_interval(mean, len(counts) ** 2 / sum(1 / trials for _, trials in counts))


def _score_interval(rate, trials):
    """Wilson's, of a number of trials that need not be whole."""
    spread = Z**2 / trials
    center = (rate + spread / 2) / (1 + spread)
    half = sqrt(rate * (1 - rate) * spread + spread**2 / 4) / (1 + spread)
    low, high = max(center - half, 0.0), min(center + half, 1.0)
    return Interval(rate, min(low, rate), max(high, rate))  # rounding must not put them on the wrong side


def paired_difference(both: int, only_a: int, only_b: int, neither: int) -> Interval:
    """How much more often b succeeds than a, in the same episodes.

    Args:
        both, only_a, only_b, neither (`int`): episodes, by who solved them.

    Raises:
        ValueError: there are no episodes.

    Source: method 10 of Newcombe 1998,
    https://doi.org/10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C
    """
    pairs = both + only_a + only_b + neither
    a, b = wilson(both + only_a, pairs), wilson(both + only_b, pairs)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    covariance = both * neither - only_a * only_b
    if covariance > 0:
        covariance = max(covariance - pairs / 2, 0)  # Newcombe's correction for continuity
    correlation = covariance / sqrt(margins) if margins else 0.0

    def distance(of_b, of_a):  # rounding must not make it the root of something below zero
        return sqrt(max(of_b**2 - 2 * correlation * of_b * of_a + of_a**2, 0.0))

    difference = (only_b - only_a) / pairs
    below = distance(b.estimate - b.low, a.high - a.estimate)
    return Interval(difference, difference - below, difference + distance(b.high - b.estimate, a.estimate - a.low))


def compare_pairs(outcomes: Sequence[tuple[bool, bool]]) -> PairedTest:
    """Compare two runs of the same episodes, by the exact test of McNemar.

    Args:
        outcomes (`Sequence[tuple[bool, bool]]`): success of a and of b, of every episode that both ran.

    Raises:
        ValueError: there are no episodes.

    Source: McNemar 1947, https://doi.org/10.1007/BF02295996
    """
    both, only_a, only_b, neither = (
        sum((bool(a), bool(b)) == cell for a, b in outcomes)
        for cell in ((True, True), (True, False), (False, True), (False, False))
    )
    discordant = only_a + only_b
    p_value = float(binomtest(only_a, discordant).pvalue) if discordant else 1.0
    return PairedTest(len(outcomes), only_a, only_b, paired_difference(both, only_a, only_b, neither), p_value)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Correct p-values for there being several: each stays comparable with 0.05.

    Args:
        p_values (`Mapping[str, float]`): name of each test -> its p-value.

    Returns:
        `dict[str, float]`: the same names, in the same order.

    Source: Holm 1979, https://www.jstor.org/stable/4615733
    """
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}
