"""Two evaluations of the same episodes: is one better?"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_vla.evaluation.intervals import ALPHA, Interval, PairedTest, compare_pairs, holm
from hf_vla.evaluation.records import EpisodeRecord, read_records

SAME = ("env", "tasks", "seed", "episodes", "horizon")  # what has to be equal for episodes to be the same
Episodes = dict[tuple[str, int], EpisodeRecord]  # (task, seed) -> record


def of_probe(records: Iterable[EpisodeRecord], probe: str) -> Episodes:
    """Select the episodes that were run under a probe, "none" for the score.

    Raises:
        ValueError: one stands there twice.
    """
    chosen: Episodes = {}
    for record in records:
        if record.probe == probe:
            key = record.task, record.seed
            if key in chosen:
                raise ValueError(f"Expected every episode once, came seed {record.seed} of {record.task} twice.")
            chosen[key] = record
    return chosen


def pair(a: Episodes, b: Episodes) -> tuple[dict[str, list[tuple[bool, bool]]], list[str]]:
    """Put together the episodes of equal task and seed.

    Returns:
        `tuple`: task -> success of a and of b in every episode that both ran; and the names of the episodes that only
        one of them ran.
    """
    outcomes: dict[str, list[tuple[bool, bool]]] = {}
    for task, seed in sorted(a.keys() & b.keys()):
        outcomes.setdefault(task, []).append((a[task, seed].success, b[task, seed].success))
    return outcomes, [f"{task}, seed {seed}" for task, seed in sorted(a.keys() ^ b.keys())]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give what mappings in mappings hold one name each: `{"versions": {"torch": "2.13.0"}}` -> `versions.torch`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_mapping = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{name}.") if is_mapping else {prefix + name: value}
    return flat


def percent(interval: Interval) -> str:
    """Write a rate with its interval, in percent."""
    estimate, low, high = (100 * value for value in interval)
    return f"{estimate:.1f} % ({low:.1f} to {high:.1f})"


def points(interval: Interval) -> str:
    """Write a difference of rates with its interval, in percentage points."""
    estimate, low, high = (100 * value for value in interval)
    return f"{estimate:+.1f} ({low:+.1f} to {high:+.1f})"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]], numbers: bool = True) -> str:
    """Lay out a Markdown table; the first column to the left, the others, where they hold numbers, to the right."""
    head = [*head]
    lines = [head, [":--", *["--:" if numbers else ":--"] * (len(head) - 1)], *rows]
    cells = ((" ".join(str(cell).split()).replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def compare(folder_a: str | Path, folder_b: str | Path) -> tuple[str, dict[str, Any]]:
    """Compare two evaluations, episode by episode of equal task and seed.

    Episodes that only one of them ran are named and left out. Probes are not compared.

    Args:
        folder_a, folder_b (`str` or `Path`): outputs of `hf-vla eval`.

    Returns:
        `tuple[str, dict]`: Markdown, and the same as JSON-safe data.

    Raises:
        FileNotFoundError, ValueError: a folder holds no evaluation, see
            [`~hf_vla.evaluation.records.read_records`]; they differ in environment, tasks, seeds or horizon, or have
            no episode in common.
    """
    (records_a, protocol_a), (records_b, protocol_b) = read_records(folder_a), read_records(folder_b)
    differs = _differences(protocol_a, protocol_b)
    if refused := {name: pair for name, pair in differs.items() if name.split(".")[0] in SAME}:
        told = "; ".join(f"{name}: {a!r} and {b!r}" for name, (a, b) in refused.items())
        raise ValueError(
            f"Expected evaluations of the same episodes, came {told}. Evaluate one of them anew as the other was."
        )
    outcomes, unpaired = pair(of_probe(records_a, "none"), of_probe(records_b, "none"))
    if not outcomes:
        raise ValueError(f"{folder_a} and {folder_b} have no episode in common; let them run on.")
    tasks = {task: compare_pairs(pairs) for task, pairs in outcomes.items()}
    corrected = holm({task: test.p_value for task, test in tasks.items()})
    data = {
        "a": str(folder_a),
        "b": str(folder_b),
        "overall": _as_data(sum(outcomes.values(), [])),
        "tasks": {task: _as_data(outcomes[task]) | {"p_holm": corrected[task]} for task in tasks},
        "unpaired": unpaired,
        "differs": differs,
    }
    data["significant"] = data["overall"]["p_value"] < ALPHA
    return _as_markdown(data), data


def verdict(test: PairedTest) -> str:
    """Say whether a difference is significant: "better", "worse" (b than a) or "same"."""
    if test.p_value >= ALPHA:
        return "same"
    return "better" if test.difference.estimate > 0 else "worse"


def _differences(a, b):
    a, b = (flatten({**protocol, "tasks": sorted(protocol["tasks"])}) for protocol in (a, b))
    return {name: [a.get(name), b.get(name)] for name in {**a, **b} if a.get(name) != b.get(name)}


def _as_data(outcomes):
    test = compare_pairs(outcomes)
    rates = {
        f"success_{side}": sum(pair[place] for pair in outcomes) / len(outcomes) for place, side in enumerate("ab")
    }
    return {**test._asdict(), "difference": test.difference._asdict(), **rates}


def _as_markdown(data):
    overall, tasks = data["overall"], data["tasks"]
    rows = [
        [
            task,
            test["pairs"],
            *(f"{100 * test[f'success_{side}']:.1f} %" for side in "ab"),
            points(Interval(**test["difference"])),
            f"{test['only_a']} / {test['only_b']}",
            f"{test['p_value']:.3g}",
            f"{test['p_holm']:.3g}" if "p_holm" in test else "",
        ]
        for task, test in [*tasks.items(), ("**all episodes**", overall)]
    ]
    head = ("Task", "Pairs", "A", "B", "B - A, points (95 %)", "Only A / only B", "p", "p (Holm)")
    parts = [
        "# Comparison",
        f"A: `{data['a']}`\nB: `{data['b']}`".replace("\n", "  \n"),
        _sentence(data),
        table(head, rows),
    ]
    found = [task for task, test in tasks.items() if test["p_holm"] < ALPHA]
    parts.append(f"Tasks that differ, corrected for there being {len(tasks)}: {', '.join(found) or 'none'}.")
    parts.append(
        "Episodes are paired by task and seed. p: exact McNemar test; p (Holm): corrected for the number of tasks; "
        "intervals: Newcombe's method 10. They speak of these two checkpoints in other episodes of these tasks, not "
        "of other tasks, nor of training anew."
    )
    if data["unpaired"]:
        parts.append(
            f"Left out, since only one of them ran them ({len(data['unpaired'])}): {'; '.join(data['unpaired'])}."
        )
    if data["differs"]:
        rows = ([f"`{name}`", *pair] for name, pair in data["differs"].items())
        parts += ["What else differs:", table(("", "A", "B"), rows, numbers=False)]
    return "\n\n".join(parts) + "\n"


def _sentence(data):
    overall = data["overall"]
    rates = f"{100 * overall['success_b']:.1f} % against {100 * overall['success_a']:.1f} %"
    difference = Interval(**overall["difference"])
    tested = f"{points(difference)} points, p = {overall['p_value']:.3g}, {overall['pairs']} pairs"
    if not data["significant"]:
        return f"**The difference between A and B is not significant**: B {rates} ({tested})."
    word = "better" if difference.estimate > 0 else "worse"
    return f"**B is significantly {word} than A**: {rates} ({tested})."
