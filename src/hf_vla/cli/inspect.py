"""`hf-vla inspect`: what is in a dataset, and what is wrong with it."""

from typing import Annotated

import typer

SHOWN_TASKS = 5
SHOWN_RANGES = 8
COLORS = {"error": "red", "warning": "yellow", "note": "blue"}


def inspect(
    dataset: Annotated[str, typer.Argument(help="LeRobot dataset: a folder, or a name on the Hub.")],
    episodes: Annotated[str | None, typer.Option(help="Episodes to check, '0,3,10-20'; default: all.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Decode no picture; of a dataset on the Hub, fetch no video.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a dataset on the Hub.")] = None,
):
    """Show what is in a dataset, and check its health; exit code 1 where it has errors.

    Read are all rows without their pictures, the tables of every video's container, and four pictures of every episode
    and camera.
    """
    import json

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from hf_vla.cli.stats import parse_numbers
    from hf_vla.data.checks.health import check_health

    numbers = episodes and parse_numbers(episodes)
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal, tasks = Console(stderr=True), {}
    with Progress(*bar, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:

        def advance(what, done, total):
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.advance(tasks[what], done)

        health = check_health(dataset, revision, numbers, quick, advance)
    content = contents(health)
    if as_json:
        counts = {f"{severity}s": health.counts[severity] for severity in COLORS}
        findings = [finding.to_dict() for finding in health.findings]
        typer.echo(json.dumps({"contents": content, "findings": findings, **counts, "decoded": not quick}, indent=2))
    else:
        console = Console()
        for part in [*contents_parts(content), *findings_parts(health), summary(health, quick)]:
            console.print(part, highlight=False, soft_wrap=isinstance(part, str))
    if not health.healthy:
        raise typer.Exit(1)


def contents(health):
    """Say what is in a dataset, JSON-safe.

    Args:
        health ([`~hf_vla.data.checks.health.Health`]): of the dataset; of the episodes that were checked.

    Returns:
        `dict`
    """
    import numpy as np

    info, lengths = health.info, [episode.length for episode in health.episodes]
    rows = sum(lengths)
    files = [path.stat().st_size for path in health.root.rglob("*") if path.is_file()]
    cameras = {key: info.features[key] for key in info.camera_keys}
    others = {key: feature for key, feature in info.features.items() if key not in cameras}
    return {
        "name": health.name,
        "revision": health.revision,
        "folder": str(health.root),
        "version": info.codebase_version,
        "robot": info.robot_type,
        "fps": info.fps,
        "episodes": len(lengths),
        "rows": rows,
        "hours": rows / info.fps / 3600,
        "episode_lengths": lengths and {"min": min(lengths), "median": float(np.median(lengths)), "max": max(lengths)},
        "bytes": sum(files),
        "cameras": {
            key: {
                "dtype": feature["dtype"],
                "shape": feature["shape"],
                "codec": (feature.get("info") or feature.get("video_info") or {}).get("video.codec"),
            }
            for key, feature in cameras.items()
        },
        "columns": {
            key: {"dtype": feature["dtype"], "shape": feature["shape"], "names": feature.get("names")}
            for key, feature in others.items()
        },
        "texts": {column: count_texts(health, column) for column in health.texts or {}},
    }


def count_texts(health, column):
    """Count the texts that rows give by number, JSON-safe.

    Args:
        health ([`~hf_vla.data.checks.health.Health`]): of the dataset.
        column (`str`): of the numbers.

    Returns:
        `dict`: the file, how many texts there are, used and empty ones, and the most frequent ones with their rows.
    """
    import numpy as np

    file, texts = health.texts[column]
    numbers, counts = np.unique(health.found.rows.columns.get(column, ()), return_counts=True)
    used = {int(number): int(count) for number, count in zip(numbers, counts, strict=True) if number in texts}
    most = sorted(used, key=used.get, reverse=True)[:SHOWN_TASKS]
    return {
        "file": file,
        "texts": len(texts),
        "used": len(used),
        "empty": sum(not (text or "").strip() for text in texts.values()),
        "most_frequent": [{"text": texts[number], "rows": used[number]} for number in most],
    }


def contents_parts(content):
    """Lay out the contents of a dataset for human eyes.

    Args:
        content (`dict`): see `contents`.

    Returns:
        `list`: of texts and tables.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from hf_vla.data import schema

    revision = f" at {content['revision']}" if content["revision"] else ""
    parts = [
        f"[bold]{escape(content['name'])}[/]{revision}: LeRobot {content['version']}, "
        f"robot {escape(str(content['robot'] or 'not named'))}, {content['fps']:g} fps, "
        f"{content['bytes'] / 1e6:,.1f} MB in {escape(content['folder'])}"
    ]
    if lengths := content["episode_lengths"]:
        parts.append(
            f"{content['episodes']:,} episodes of {lengths['min']} to {lengths['max']} rows (median "
            f"{lengths['median']:g}), {content['rows']:,} rows, {content['hours']:.3g} hours"
        )
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("column", "dtype", "shape", "names"):
        table.add_column(name, overflow="fold", no_wrap=name == "column")
    for key, column in {**content["cameras"], **content["columns"]}.items():
        shape = " x ".join(map(str, column["shape"]))
        names = ", ".join(map(str, schema.flat_names(column.get("names")))) if "names" in column else column["codec"]
        table.add_row(*map(escape, (key, column["dtype"], shape, names or "")))
    parts.append(table)
    for column, counted in content["texts"].items():
        empty = f", {counted['empty']} of them empty" if counted["empty"] else ""
        parts.append(f"{escape(column)}: {counted['texts']:,} texts{empty}, {counted['used']:,} used")
        parts += [f"  {entry['rows']:>9,} rows: {escape(repr(entry['text']))}" for entry in counted["most_frequent"]]
    return parts


def findings_parts(health):
    """Say what is wrong with a dataset, for human eyes.

    Args:
        health ([`~hf_vla.data.checks.health.Health`]): of the dataset.

    Returns:
        `list[str]`: a text for every finding.
    """
    from rich.markup import escape

    parts = []
    for finding in health.findings:
        place = f", episode {ranges(finding.episodes)}" if finding.episodes else ""
        if finding.frame is not None:
            place += f", {'first in ' if len(finding.episodes) > 1 else ''}frame {finding.frame}"
        color = COLORS[finding.severity]
        parts.append(f"[{color}]{finding.severity}: {finding.kind}[/]: {escape(finding.file)}{place}")
        parts.append(f"    {escape(finding.message)}; {escape(finding.mend)}.")
    return parts


def summary(health, quick):
    """Return one sentence on a dataset's health."""
    from rich.markup import escape

    counts = ", ".join(f"{health.counts[severity]} {severity}(s)" for severity in COLORS)
    looked = "; no picture was decoded" if quick else ""
    return f"{escape(health.name)}: {len(health.episodes):,} episodes checked, {counts}{looked}."


def ranges(numbers):
    """Write numbers as `--episodes` takes them: `0,3,10-20`; many of them cut short."""
    import numpy as np

    numbers = np.unique(numbers)
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    more = f",... ({len(numbers)} in all)" if len(texts) > SHOWN_RANGES else ""
    return ",".join(texts[:SHOWN_RANGES]) + more
