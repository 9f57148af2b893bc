"""What an evaluation found, for human eyes (Markdown and a picture) and for programs (JSON)."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla.evaluation.comparison import flatten, of_probe, pair, percent, points, table, verdict
from hf_vla.evaluation.intervals import Interval, compare_pairs, mean_over_tasks, wilson
from hf_vla.evaluation.probes import PROBES
from hf_vla.evaluation.records import read_records, write_whole

MARKDOWN, DATA, PICTURE = "report.md", "report.json", "report.png"
OPEN_LOOP = "open_loop.json"


def write_report(folder: str | Path) -> Path:
    """Write report.md, report.json and report.png beside an evaluation's records.

    Args:
        folder (`str` or `Path`): output of `hf-vla eval`; it may still run. What
            [`~hf_vla.evaluation.probes.probe_dataset`] found is reported too where it stands in open_loop.json.

    Returns:
        `Path`: report.md.

    Raises:
        FileNotFoundError, ValueError: the folder holds no evaluation, see
            [`~hf_vla.evaluation.records.read_records`], or no episode yet.
    """
    from hf_vla.evaluation.plots import plot_success

    folder = Path(folder)
    report = summarize(*read_records(folder))
    if (folder / OPEN_LOOP).is_file():
        report["open_loop"] = json.loads((folder / OPEN_LOOP).read_text(encoding="utf-8"))
    write_whole(folder / DATA, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    plot_success(report, title(report)).savefig(folder / PICTURE, dpi=120)
    write_whole(folder / MARKDOWN, _as_markdown(report))
    return folder / MARKDOWN


def summarize(records, protocol: dict[str, Any]) -> dict[str, Any]:
    """Condense records.

    Args:
        records (`list[EpisodeRecord]`), protocol (`dict`): see [`~hf_vla.evaluation.records.read_records`].

    Returns:
        `dict`, JSON-safe: rates are between 0 and 1, with "estimate", "low" and "high".

    Raises:
        ValueError: there is no episode without a probe, one stands there twice, or a probe is unknown.
    """
    score = of_probe(records, "none")
    if not score:
        raise ValueError("Expected one episode without a probe, came none: there is nothing to report yet.")
    names = [task for task in protocol["tasks"] if any(task == other for other, _ in score)]
    tasks = {name: _rates([record for (task, _), record in score.items() if task == name]) for name in names}
    latencies = [latency for record in score.values() for latency in record.latency_ms]
    return {
        "overall": {
            **_rates(score.values()),
            "expected": len(protocol["tasks"]) * protocol["episodes"],
            "mean_over_tasks": mean_over_tasks([(t["successes"], t["episodes"]) for t in tasks.values()])._asdict(),
        },
        "tasks": tasks,
        "probes": {name: _probed(score, of_probe(records, name)) for name in _probes_of(records)},
        "latency_ms": _latency(latencies),
        "seconds_per_episode": float(np.median([record.wall_s for record in score.values()])),
        "restarted": [f"{r.task}, seed {r.seed}: {r.restarts}" for r in records if r.restarts],
        "protocol": protocol,
    }


def title(report: dict[str, Any]) -> str:
    """Name an evaluation: its simulator, and the tasks as they were asked for."""
    protocol = report["protocol"]
    return f"{protocol['env']}: {protocol.get('selection') or ', '.join(protocol['tasks'])}"


def headline(report: dict[str, Any]) -> str:
    """Say the result in a sentence, and how much of it there is."""
    overall, tasks = report["overall"], len(report["tasks"])
    over = f"mean over {tasks} tasks, " if tasks > 1 else ""
    sentence = (
        f"**Success {percent(Interval(**overall['mean_over_tasks']))}**, {over}{overall['episodes']} episodes; in "
        "brackets the 95 % confidence interval."
    )
    if overall["episodes"] < overall["expected"]:
        sentence += (
            f"\n\n**Not finished: {overall['episodes']} of {overall['expected']} episodes.** Those that succeed end "
            "earlier and are recorded first, so that these numbers flatter."
        )
    return sentence


def results_table(report: dict[str, Any]) -> str:
    """Lay out success by task, with the mean over tasks and all episodes together."""
    overall = report["overall"]
    rows = [[f"`{name}`", *_cells(task, task["success"])] for name, task in report["tasks"].items()]
    if len(rows) > 1:
        rows.append(["**mean over tasks**", *_cells(overall, overall["mean_over_tasks"])])
        if len({task["episodes"] for task in report["tasks"].values()}) > 1:  # else they are the same numbers
            rows.append(["all episodes together", *_cells(overall, overall["success"])])
    return table(("Task", "Success (95 % interval)", "Solved", "Mean steps of successes"), rows)


def probe_sections(report: dict[str, Any]) -> list[str]:
    """Say what probes found, beside the score."""
    sections = []
    if probes := report["probes"]:
        rows = [
            [
                "none: the score",
                percent(Interval(**report["overall"]["success"])),
                report["overall"]["episodes"],
                "",
                "",
            ]
        ]
        rows += [
            [
                f"`{name}`",
                percent(Interval(**probe["success"])),
                probe["episodes"],
                points(Interval(**probe["difference"])),
                f"{probe['p_value']:.3g}",
            ]
            for name, probe in probes.items()
        ]
        head = ("Probe", "Success, all episodes", "Episodes", "Difference, points", "p")
        sections += ["## Probes", table(head, rows), "\n".join(f"- {_reading(*each)}" for each in probes.items())]
        sections.append(
            "Differences are those of episodes of the same task and seed; p: exact McNemar test of each probe alone."
        )
        if len(report["tasks"]) > 1:
            sections.append(_probes_by_task(report))
    if "open_loop" in report:
        sections += ["## Open loop", open_loop_section(report["open_loop"])]
    return sections


def _probes_by_task(report):
    columns = [report["tasks"], *(probe["tasks"] for probe in report["probes"].values())]
    rows = [
        [f"`{task}`", *(_solved(column[task]) if task in column else "-" for column in columns)]
        for task in report["tasks"]
    ]
    return table(("Solved, by task", "none", *(f"`{name}`" for name in report["probes"])), rows)


def open_loop_section(result: dict[str, Any]) -> str:
    """Lay out what [`~hf_vla.evaluation.probes.probe_dataset`] found, as Markdown."""
    changes = result["changes"]
    head = ("Dimension", "RMSE", "Variance explained", "Spread", *(f"Change under {name}" for name in changes))
    columns = [result["dimensions"], result["rmse"], result["variance_explained"], result["spread"]]
    columns += [change["rmse"] for change in changes.values()]
    rows = [[f"`{name}`", *(_number(value) for value in values)] for name, *values in zip(*columns, strict=True)]
    relative = ", ".join(f"{name} {_number(change['relative'])}" for name, change in changes.items())
    return "\n\n".join(
        [
            f"{result['frames']} recorded frames of {result['episodes']} episodes of `{result['dataset']}`, in robot "
            "units. RMSE and variance explained compare predictions with the recorded actions; spread is the standard "
            "deviation of predictions from frame to frame.",
            table(head, rows),
            f"Change of the predicted actions, in spreads: {relative}. 0: what was changed is ignored; 1.4: as much "
            "as between two frames taken at random.",
        ]
    )


def protocol_section(report: dict[str, Any]) -> str:
    """Lay out everything that decides the results, and the command that repeats them."""
    protocol = report["protocol"]
    seeds = f"{protocol['seed']} to {protocol['seed'] + protocol['episodes'] - 1} of each task"
    shown = {name: value for name, value in protocol.items() if name not in ("command", "seed", "episodes")}
    rows = [["`seeds`", seeds], *([f"`{name}`", _text(value)] for name, value in flatten(shown).items())]
    parts = [table(("", ""), rows, numbers=False)]
    if command := protocol.get("command"):
        command += "".join(f" --probe {name}" for name in report["probes"])
        parts.append(f"To repeat it:\n\n```bash\n{command}\n```")
    return "\n\n".join(parts)


def _rates(records):
    successes = sum(record.success for record in records)
    steps = [record.steps for record in records if record.success]
    return {
        "episodes": len(records),
        "successes": successes,
        "success": wilson(successes, len(records))._asdict(),
        "mean_steps_of_successes": float(np.mean(steps)) if steps else None,
    }


def _probes_of(records):
    used = {record.probe for record in records} - {"none"}
    if unknown := sorted(used - PROBES.keys()):
        raise ValueError(f"No probe is called {', '.join(unknown)}; there are {sorted(PROBES)}.")
    return [name for name in PROBES if name in used]


def _probed(score, probed):
    outcomes, unpaired = pair(score, probed)
    if not outcomes:
        raise ValueError("Expected a probe to run episodes of the score, came none; let the evaluation run on.")
    test = compare_pairs(sum(outcomes.values(), []))
    paired = {**test._asdict(), "difference": test.difference._asdict(), "verdict": verdict(test)}
    tasks = {task: _rates([r for (other, _), r in probed.items() if other == task]) for task in outcomes}
    return {**_rates(probed.values()), **paired, "tasks": tasks, "unpaired": unpaired}


def _latency(latencies):
    if not latencies:
        return None
    p50, p95 = np.percentile(latencies, (50, 95))
    return {"p50": float(p50), "p95": float(p95), "calls": len(latencies)}


def _cells(rates, success):
    steps = rates["mean_steps_of_successes"]
    return percent(Interval(**success)), _solved(rates), _number(steps, ".1f")


def _solved(rates):
    return f"{rates['successes']} of {rates['episodes']}"


def _number(value, form=".3g"):
    return "-" if value is None else f"{value:{form}}"


def _text(value):
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def _reading(name, probe):
    texts = {"worse": PROBES[name].lower, "same": PROBES[name].same, "better": "It succeeds more often so."}
    missing = f" Left out of the difference: {'; '.join(probe['unpaired'])}." if probe["unpaired"] else ""
    rate = f"{100 * probe['success']['estimate']:.1f} %"
    return f"Success {PROBES[name].shown}: {rate}. {texts[probe['verdict']]}{missing}"


def _as_markdown(report):
    latency, restarted = report["latency_ms"], report["restarted"]
    machine = flatten({name: report["protocol"][name] for name in ("machine", "device") if name in report["protocol"]})
    timing = f"An episode took {report['seconds_per_episode']:.1f} s (median), waiting for others included."
    if latency:
        timing = (
            f"From observation to actions: p50 {latency['p50']:.1f} ms, p95 {latency['p95']:.1f} ms "
            f"({latency['calls']} calls, counted once for every episode in the batch). {timing}"
        )
    parts = [
        f"# Evaluation on {title(report)}",
        headline(report),
        results_table(report),
        f"![Success by task]({PICTURE})",
        "Intervals are Wilson's; that of the mean over tasks is what it would be were all tasks equally hard, and so "
        "rather too wide, where every task has the same number of episodes. They speak of other episodes of these "
        "tasks, not of other tasks, nor of training anew.",
        *probe_sections(report),
        "## Time",
        f"{timing} Machine: {', '.join(map(str, machine.values())) or 'not said'}.",
        f"Episodes begun anew, since the simulator crashed or hung: {'; '.join(restarted) or 'none'}.",
        "## Protocol",
        protocol_section(report),
    ]
    return "\n\n".join(parts) + "\n"
