"""`hf-vla convert`: a published checkpoint becomes one of ours, an RLDS dataset becomes a LeRobot dataset."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

# what is converted: the module whose `translate` reads it
CONVERTERS = {
    "divla": "hf_vla.models.divla.convert_divla",
    "tinyvla": "hf_vla.models.tinyvla.convert_tinyvla",
}
RLDS = "rlds"
SHOWN = 10  # episodes left out that are named, and how many there are besides


def convert(
    family: Annotated[
        str, typer.Argument(help=f"What the source is: a checkpoint of {', '.join(CONVERTERS)}; or {RLDS}, a dataset.")
    ],
    source: Annotated[
        str,
        typer.Argument(help="Checkpoint: a folder, or a name on the Hub. Dataset: its folder."),
    ],
    destination: Annotated[
        Path,
        typer.Argument(help="Folder to write; may hold no files, or a dataset to go on with.", file_okay=False),
    ],
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="JSON or safetensors file with action_min, action_max, qpos_mean and qpos_std.", dir_okay=False
        ),
    ] = None,
    camera: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a camera; once for each of several, in the prompt's order. Dataset: those to keep."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the source's precision.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint at DESTINATION.")] = False,
    name: Annotated[
        str | None,
        typer.Option(
            help="Dataset: its name in Open X-Embodiment, where it is called otherwise; 'raw' takes it as it is."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Dataset: train (the default), train[:100], all.")] = None,
    fps: Annotated[float | None, typer.Option(help="Dataset: steps a second, where they are not known.")] = None,
    images: Annotated[
        bool, typer.Option("--images", help="Dataset: keep pictures as PNG, without loss, in place of videos.")
    ] = False,
):
    """Convert a published checkpoint, or an RLDS dataset.

    A dataset's conversion that was interrupted goes on where it stopped when it is run again.
    """
    of_checkpoints = {"--statistics": statistics, "--dtype": dtype, "--overwrite": overwrite}
    of_datasets = {"--name": name, "--split": split, "--fps": fps, "--images": images}
    if family not in (*CONVERTERS, RLDS):
        raise ValueError(f"Expected one of {sorted([*CONVERTERS, RLDS])} to convert, came {family!r}.")
    if foreign := [option for option, value in (of_checkpoints if family == RLDS else of_datasets).items() if value]:
        raise ValueError(f"{', '.join(foreign)}: no option of `hf-vla convert {family}`.")
    if family == RLDS:
        _convert_dataset(source, destination, name, split or "train", fps, camera, images)
    else:
        _convert_checkpoint(family, source, destination, statistics, camera, dtype, overwrite)


def _convert_checkpoint(family, source, destination, statistics, camera, dtype, overwrite):
    from rich.console import Console
    from rich.markup import escape

    from hf_vla.models.conversion import convert_checkpoint

    console = Console()
    with console.status(f"Converting {escape(source)}"):
        translate = import_module(CONVERTERS[family]).translate
        done = convert_checkpoint(translate, source, destination, statistics, camera or (), dtype, overwrite)
    millions = sum(weight.numel() for weight in done.weights.values()) / 1e6
    precision = str(done.model.dtype).removeprefix("torch.")
    if done.dropped:
        console.print(f"Left out {len(done.dropped)} weights without use: {', '.join(done.dropped)}", highlight=False)
    for note in done.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}", highlight=False)
    console.print(
        f"Wrote {escape(str(destination))}: {len(done.weights)} weights, {millions:,.1f} million parameters in "
        f"{precision}, {'with' if done.processor else 'without'} a processor.",
        highlight=False,
    )


def _convert_dataset(source, destination, name, split, fps, camera, images):
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from hf_vla.data.rlds_conversion import convert_rlds

    console = Console()
    columns = (TextColumn("Converting"), BarColumn(), MofNCompleteColumn(), TextColumn("episodes"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=None)

        def advance(done, total):
            progress.update(bar, completed=done, total=total)

        done = convert_rlds(source, destination, name, split, fps, camera, images, advance)
    for number, reason in [*done.left_out.items()][:SHOWN]:
        console.print(f"[yellow]Left out[/] episode {number}: {escape(reason)}", highlight=False)
    if (more := len(done.left_out) - SHOWN) > 0:
        console.print(f"[yellow]Left out[/] {more} more: meta/rlds.jsonl names them", highlight=False)
    console.print(
        f"{escape(str(destination))} holds {done.episodes} episodes; {len(done.left_out)} left out.", highlight=False
    )
