"""`hf-vla stats`: statistics, action grids and plots of datasets, from one pass over their numbers."""

import logging
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

MERGED = "merged"
WORTH_PROCESSES = 1_000_000  # rows; fewer are read before a second process has started


def stats(
    datasets: Annotated[
        list[str], typer.Argument(metavar="DATASET...", help="LeRobot datasets: folders, or names on the Hub.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write stats.json, grids.json and plots to a folder per dataset in this one.", file_okay=False
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns of numbers, 'a,b'; default: action and observation.state.")
    ] = None,
    episodes: Annotated[str | None, typer.Option(help="Episodes of every dataset, '0,3,10-20'; default: all.")] = None,
    chunk_size: Annotated[int, typer.Option(min=1, help="Actions of a chunk, which FAST is fitted to.")] = 16,
    end_effector: Annotated[
        bool,
        typer.Option(
            "--end-effector",
            help="The actions are an end effector's translation, rotation (or none) and gripper, in this order, which "
            "SpatialVLA's grid bins, though their names do not say so.",
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: the CPUs, where the datasets are large.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a dataset on the Hub.")] = None,
):
    """Compute statistics and action grids of datasets; no video is read."""
    import os

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from hf_vla.data.checks.scan import DatasetScan, merged_plan, plan_scan
    from hf_vla.data.checks.scan_processes import scan_datasets

    chosen = columns and [name.strip() for name in columns.split(",")]
    numbers = episodes and parse_numbers(episodes)
    folders = folder_names(datasets)
    plans = [plan_scan(dataset, chosen, numbers, revision, chunk_size) for dataset in datasets]
    rows = sum(plan.rows for plan in plans)
    if workers is None:
        workers = 1 if rows < WORTH_PROCESSES else min(os.cpu_count() or 1, sum(len(plan.files) for plan in plans))
    merged = DatasetScan(merged_plan(plans, MERGED)) if len(plans) > 1 else None
    reports = {}
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    with Progress(*bar, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("rows", total=rows)
        for scan in scan_datasets(plans, workers, lambda name, done: progress.advance(task, done)):
            if merged is not None:
                merged.merge(scan)
            # Said and written at once: a dataset's rows need not stay in memory while others are read.
            reports[scan.name] = report(scan, out and out / folders[scan.name], end_effector)
    if merged is not None and merged.columns:
        reports[MERGED] = report(merged, out and out / MERGED, end_effector)
    console = Console()
    for name in [*datasets, MERGED]:
        for part in reports.get(name, ()):
            console.print(part, highlight=False)
    for sentence in not_merged(plans):
        console.print(sentence, markup=False, highlight=False)
    if out is not None:
        console.print(f"Wrote {out}", markup=False, highlight=False)


def report(scan, folder, end_effector=False):
    """Fit the representations to a dataset; write files where there is a folder for them.

    Args:
        scan ([`~hf_vla.data.checks.scan.DatasetScan`]): of the dataset.
        folder (`Path`, *optional*): for stats.json, grids.json and the plots.
        end_effector (`bool`): see [`~hf_vla.data.checks.grids.fit_tokenizers`].

    Returns:
        `list`: what is to be printed of it.
    """
    from rich.markup import escape

    from hf_vla.actions.tokenizers.registry import build_action_tokenizer
    from hf_vla.cli.distributions import remarks, statistics_table
    from hf_vla.data import schema
    from hf_vla.data.checks.grids import fit_tokenizers

    parts = [f"[bold]{escape(scan.name)}[/]: {scan.num_episodes:,} episodes, {scan.num_rows:,} rows"]
    for key, column in scan.columns.items():
        if column.statistics.count:
            parts.append(statistics_table(key, column))
        parts += [f"[yellow]{escape(sentence)}[/]" for sentence in remarks(key, column)]
    grids = {}
    if schema.ACTION in scan.columns:
        with quiet("hf_vla.actions.normalization"):  # of constant dimensions, which the remarks are about
            grids, refused = fit_tokenizers(scan, end_effector)
            if folder is not None:
                write(scan, grids, folder)
        sizes = {name: build_action_tokenizer(entry["tokenizer"]).vocab_size for name, entry in grids.items()}
        parts += [f"{name}: fitted, {size:,} ids" for name, size in sizes.items()]
        parts += [f"[yellow]{name}: not fitted, {escape(reason)}[/]" for name, reason in refused.items()]
    elif folder is not None:
        write(scan, grids, folder)
    return [*parts, ""]


def write(scan, grids, folder):
    """Write LeRobot's stats.json, grids.json (representation -> entries of an action_config) and the plots.

    Args:
        scan ([`~hf_vla.data.checks.scan.DatasetScan`]): of a dataset.
        grids (`dict`): see [`~hf_vla.data.checks.grids.fit_tokenizers`].
        folder (`Path`): made where it is missing.
    """
    import json

    from hf_vla.actions.normalization import ActionNormalizer
    from hf_vla.actions.tokenizers.registry import build_action_tokenizer
    from hf_vla.cli.distributions import edges_in_robot_units, plot_column, plot_grid
    from hf_vla.data import schema

    folder.mkdir(parents=True, exist_ok=True)
    found = {key: column for key, column in scan.columns.items() if column.statistics.count}
    summaries = {key: column.statistics.summary() for key, column in found.items()}
    entries = {
        key: {name: values.tolist() for name, values in summary.items()} | {"count": [found[key].statistics.count]}
        for key, summary in summaries.items()
    }
    (folder / "stats.json").write_text(json.dumps(entries, indent=4))
    if grids:
        (folder / "grids.json").write_text(json.dumps(grids))
    for key, column in found.items():
        sample, summary, edges = column.sample.entries(), summaries[key], {}
        title = f"{scan.name}: {key}, {len(sample):,} of {column.statistics.count:,} rows"
        if key == schema.ACTION:
            edges = {name: edges_in_robot_units(entry, summary) for name, entry in grids.items()}
            edges = {name: parts for name, parts in edges.items() if any(map(len, parts))}
        plot_column(sample, column.names, summary, edges, title).savefig(folder / f"{key}.png")
        if key == schema.ACTION and "gaussian_grid" in grids:
            entry = grids["gaussian_grid"]
            normalized = ActionNormalizer(summary, **entry["normalization"]).normalize(sample)
            grid = build_action_tokenizer(entry["tokenizer"])
            plot_grid(grid, normalized, f"{title}, normalised").savefig(folder / "gaussian_grid.png")


def folder_names(datasets):
    """Name a folder for each dataset: of one on the Hub `owner__name`.

    Raises:
        ValueError: two would have the same.
    """
    names = {}
    for dataset in datasets:
        path = Path(dataset)
        name = path.resolve().name if path.is_dir() else "__".join(path.parts)
        if name in [MERGED, *names.values()]:
            raise ValueError(f"Expected every dataset once, none called {MERGED!r}: {dataset} is the second {name!r}.")
        names[dataset] = name
    return names


def parse_numbers(text):
    """Read `0,3,10-20` into a list of numbers.

    Raises:
        ValueError: something in it is no number and no range.
    """
    numbers = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise ValueError(f"Expected --episodes to be numbers and ranges like '0,3,10-20', came {text!r}.")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def not_merged(plans):
    """Say which columns are no part of the merged statistics, and why."""
    sentences = []
    for key in {key: None for plan in plans for key in plan.columns}:
        sizes = {plan.name: len(plan.columns.get(key, ())) for plan in plans}
        if len({*sizes.values()}) > 1:
            listed = ", ".join(f"{size or 'none'} in {name}" for name, size in sizes.items())
            sentences.append(f"{key} is not merged, since its dimensions differ: {listed}.")
    return sentences


@contextmanager
def quiet(name):
    """Keep a logger from speaking."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
