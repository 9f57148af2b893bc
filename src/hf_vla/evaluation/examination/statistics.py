"""Checks of the recorded statistics, by which every action is scaled: an error here scales a real arm's motion."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from hf_vla.actions.normalization import MODES
from hf_vla.actions.rotations import rotation_shape
from hf_vla.actions.spec import ActionSpec, StateSpec
from hf_vla.actions.values import is_constant
from hf_vla.evaluation.examination.patient import FAIL, PASS, WARN, Patient, Verdict

ORDER = ("min", "q01", "q10", "q50", "q90", "q99", "max")
NAMES = (*ORDER, "mean", "std")
FEW = 1000  # rows, below which quantiles of one in a hundred rest on fewer than ten of them
ROUNDING = 1e-3  # of the range, by which statistics that were stored in other precisions may disagree
# If 98 of 100 values are one number, the variance is at most 0.02 ranges squared (each of the others a range away).
MOST_STD_OF_ONE_VALUE = math.sqrt(0.02)
METRES, WILD_METRES = 1.0, 100.0  # a step of a metre is too long, and normalised commands end at 1; 100: millimetres


def statistics_sane(patient: Patient) -> Iterator[Verdict]:
    """Statistics could be of some data: finite, in order, with a spread that fits the range, of enough rows.

    Impossible ones fail: no data have them. What data can have but a robot hardly does is a warning: a constant
    dimension, few rows, numbers too large for the declared units.
    """
    codec, found = patient.processor.action_codec, False
    if not codec.keys:
        yield Verdict(
            FAIL,
            "No statistics at all: actions cannot be brought into robot units. Compute them with `hf-vla stats` and "
            "give them to the processor.",
        )
        return
    for key in codec.keys:
        specs = dict(zip(("action", "state"), codec.specs(key), strict=True))
        for what in ("action", "state") if codec.takes_state else ("action",):
            name = f"{what} statistics of {key!r}"
            if what not in codec.statistics[key]:
                yield Verdict(FAIL, f"There are no {name}, but the checkpoint needs them; compute them anew.")
                found = True
                continue
            normalizer = codec.normalizer if what == "action" else codec.state_normalizer
            for level, problem in _problems(codec.statistics[key][what], specs[what], lambda: normalizer(key)):  # noqa: B023
                found = True
                yield Verdict(level, f"{name[0].upper()}{name[1:]}: {problem}")
    if not found:
        counts = [codec.statistics[key]["action"].get("count") for key in codec.keys]
        rows = " and ".join(f"{int(np.ravel(count)[0]):,}" for count in counts if count is not None)
        yield Verdict(
            PASS,
            f"Statistics of {len(codec.keys)} dataset(s) are finite, ordered and consistent"
            + (f"; of {rows} rows." if rows else "."),
        )


def frame_inside(patient: Patient) -> Iterator[Verdict]:
    """The recorded frame beside the checkpoint lies inside the statistics' range, give or take a tenth of it.

    It may be held out of training, so it may lie a little outside; actions and states exchanged, or in other units, do
    not.
    """
    frame = patient.frame or {}
    recorded = {what: frame.get(name) for what, name in (("action", "actions"), ("state", "state"))}
    if all(values is None for values in recorded.values()):
        yield Verdict(PASS, "No recorded frame (frame.json) of this robot beside the checkpoint to compare with.")
        return
    outside, known = [], patient.processor.action_codec.statistics[patient.key]
    for what, values in recorded.items():
        statistics = known.get(what) or {}
        if values is None or "min" not in statistics or "max" not in statistics:
            continue
        low, high = np.array(statistics["min"]), np.array(statistics["max"])
        values = np.array(values, np.float64).reshape(-1, len(low))
        beyond = np.maximum(low - values.min(axis=0), values.max(axis=0) - high) / np.maximum(high - low, 1e-12)
        if (beyond > 0.1).any():
            outside.append(f"{what} dimension(s) {_which(beyond > 0.1)} by up to {beyond.max():.2g} ranges")
    if outside:
        yield Verdict(
            FAIL,
            f"The recorded frame beside the checkpoint lies outside its statistics: {'; '.join(outside)}. They are of "
            "another robot, in other units, or exchanged.",
        )
    else:
        yield Verdict(PASS, "The recorded frame beside the checkpoint lies inside its statistics.")


def _problems(
    statistics: dict[str, Any], spec: ActionSpec | StateSpec | None, normalizer
) -> Iterator[tuple[str, str]]:
    """Levels and sentences on one set of statistics."""
    arrays = {name: np.asarray(statistics[name], np.float64) for name in NAMES if statistics.get(name) is not None}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len({*shapes.values()}) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        yield FAIL, f"expected one number per dimension and statistic, came shapes {shapes}; compute them anew."
        return
    if spec is not None and {*shapes.values()} != {(len(spec.names),)}:
        yield FAIL, f"they have {next(iter(shapes.values()))[0]} dimensions, the spec names {len(spec.names)}."
        return
    names = spec.names if spec is not None else [str(place) for place in range(len(next(iter(arrays.values()))))]
    impossible = [*_impossible(arrays, names)]
    yield from ((FAIL, f"{each}; no data have such statistics, compute them anew.") for each in impossible)
    if impossible:
        return
    try:
        modes = normalizer()
    except ValueError as error:
        yield FAIL, str(error)
        return
    yield from _unlikely(arrays, names, modes)
    yield from _units(arrays, spec)
    count = statistics.get("count")
    if count is None:
        yield WARN, "they do not say of how many rows they are (count)."
    elif np.ravel(count)[0] < FEW:
        yield WARN, f"they are of {int(np.ravel(count)[0])} rows, fewer than {FEW}: quantiles are guesses."


def _impossible(arrays: dict[str, np.ndarray], names) -> Iterator[str]:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            yield f"{name} of {_which(~np.isfinite(array), names)} is not finite"
            return
    ordered = [name for name in ORDER if name in arrays]
    for low, high in zip(ordered, ordered[1:], strict=False):
        slack = 1e-6 * np.maximum(1.0, np.abs(arrays[high]))
        if (wrong := arrays[low] > arrays[high] + slack).any():
            yield f"{low} lies above {high} in {_which(wrong, names)}"
    if len(ordered) < 2:
        return
    bottom, top = arrays[ordered[0]], arrays[ordered[-1]]
    extremes = ordered[0] == "min" and ordered[-1] == "max"
    span = top - bottom
    if extremes and "mean" in arrays:
        slack = ROUNDING * span + 1e-6
        if (wrong := (arrays["mean"] < bottom - slack) | (arrays["mean"] > top + slack)).any():
            yield f"mean lies outside min..max in {_which(wrong, names)}"
    if "std" not in arrays:
        return
    std, constant = arrays["std"], is_constant(bottom, top)
    if (wrong := (std < 0) | ((std == 0) & ~constant)).any():
        yield f"std is 0 or less in {_which(wrong, names)}, which varies"
    if extremes and (wrong := std > (0.5 + ROUNDING) * span + 1e-6).any():
        yield f"std is more than half of max - min in {_which(wrong, names)}"
    if extremes and {"q01", "q99"} <= arrays.keys():
        one_value = is_constant(arrays["q01"], arrays["q99"])
        if (wrong := one_value & (std > (MOST_STD_OF_ONE_VALUE + ROUNDING) * span + 1e-6)).any():
            deviation, whole = _numbers(std[wrong]), _numbers(span[wrong])
            yield f"q01 equals q99 in {_which(wrong, names)}, but std is {deviation} in a range of {whole}"


def _unlikely(arrays: dict[str, np.ndarray], names, normalizer) -> Iterator[tuple[str, str]]:
    if normalizer.constant.any():
        yield (
            WARN,
            f"{_which(normalizer.constant, names)} is constant (or nearly, for its normalisation): the policy can "
            "never move it. Right where the demonstrations never did.",
        )
    quantiles = [name for name, own in MODES.items() if own[0][:1] in (("q01",), ("q10",))]
    if {"q01", "q99", "mean"} <= arrays.keys() and {*normalizer.mode} & {*quantiles}:
        skewed = (arrays["mean"] < arrays["q01"]) | (arrays["mean"] > arrays["q99"])
        if (skewed & ~normalizer.constant).any():
            yield (
                WARN,
                f"the mean of {_which(skewed, names)} lies outside q01..q99: rare values far away, which the "
                "normalisation cuts off.",
            )


def _units(arrays: dict[str, np.ndarray], spec: ActionSpec | StateSpec | None) -> Iterator[tuple[str, str]]:
    """Ranges that the declared units do not have: rotations by their format, steps of the hand as metres."""
    low, high = (arrays.get(name, arrays.get(other)) for name, other in (("min", "q01"), ("max", "q99")))
    if spec is None or low is None or high is None:
        return
    largest, kind = np.maximum(np.abs(low), np.abs(high)), getattr(spec, "kind", None)
    if spec.rotation is not None:
        size = math.prod(rotation_shape(spec.rotation))
        turning = largest[3 : 3 + size]
        most = 2 * math.pi if size == 3 else 1.0  # the others are no angles, but numbers of vectors of length 1
        if (wild := turning > most * 1.01).any():
            yield (
                FAIL,
                f"{_which(wild, spec.names[3:])} reaches {turning.max():.3g}, but a rotation as {spec.rotation} at "
                f"most {most:.3g}: degrees in place of radians? Compute them from data in the declared format.",
            )
    if kind == "delta_ee" and (step := largest[:3].max()) > METRES * 1.01:
        yield (
            FAIL if step > WILD_METRES else WARN,
            f"a step of the hand reaches {step:.3g}, more than a metre, or than a full command of 1: are they "
            "millimetres? See that the robot takes the same unit.",
        )
    if kind == "joint" and (angle := largest.max()) > 2 * math.pi:
        yield (
            WARN,
            f"joints reach {angle:.3g}, so they are no radians; see that the robot takes the same unit (degrees, "
            "per cent).",
        )


def _which(wrong: np.ndarray, names=None) -> str:
    places = np.flatnonzero(wrong).tolist()
    return ", ".join(str(place) if names is None else names[place] for place in places)


def _numbers(values: np.ndarray) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
