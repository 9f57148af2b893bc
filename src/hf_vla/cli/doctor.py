"""`hf-vla doctor`: examines a checkpoint before a robot moves."""

from pathlib import Path
from typing import Annotated

import typer

COLORS = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def doctor(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint or adapter: a folder, or a name on the Hub.")],
    dataset: Annotated[
        str | None, typer.Option(help="LeRobot dataset of the robot: a folder, or a name on the Hub.")
    ] = None,
    episodes: Annotated[
        str | None, typer.Option(help="Of the dataset, '0,3,10-20', best held out of training; default: all.")
    ] = None,
    camera: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NAME", help="The checkpoint's name of a camera = the dataset's; repeatable."),
    ] = None,
    unnorm_key: Annotated[
        str | None, typer.Option(help="Dataset whose robot acts, where the checkpoint knows several.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for report.md, doctor.json and plots.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; default: the accelerator.")] = None,
):
    """Examine a checkpoint: does it look and listen, are its numbers sane, does it fit the robot's data?

    Exit code 0: nothing failed. 1: something did, or could not be examined. Warnings fail with --strict alone.
    """
    import json

    from rich.console import Console

    from hf_vla.cli.eval import parse_cameras
    from hf_vla.cli.stats import parse_numbers
    from hf_vla.evaluation.doctor import examine

    if dataset is None and (episodes or camera):
        raise typer.BadParameter("--episodes and --camera are of a dataset: give --dataset.")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    terminal = Console(stderr=True)
    with terminal.status("Examining") as status:
        found = examine(
            checkpoint,
            dataset,
            unnorm_key,
            parse_cameras(camera or []),
            episodes and parse_numbers(episodes),
            device,
            out,
            progress=lambda check: status.update(f"Examining: {check}"),
        )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        console = Console()
        console.print(table(found))
        console.print(found.summary(), markup=False, highlight=False, soft_wrap=True)
    if out is not None:
        (out / "doctor.json").write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
        (out / "report.md").write_text(found.to_markdown(), encoding="utf-8")
        terminal.print(f"Wrote {out / 'report.md'}", markup=False, highlight=False, soft_wrap=True)
    if not found.healthy(strict):
        raise typer.Exit(1)


def table(found):
    """Lay out an [`~hf_vla.evaluation.doctor.Examination`], a row for every line."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    rows = Table(box=box.SIMPLE, show_header=False, padding=(0, 1))
    for column in ("check", "level", "found"):
        rows.add_column(column, no_wrap=column != "found", overflow="fold")
    for line in found.lines:
        level = line.verdict.level
        rows.add_row(escape(line.check), f"[{COLORS[level]}]{level}[/]", escape(line.verdict.message))
    return rows
