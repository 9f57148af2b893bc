"""`hf-vla convert`: a published checkpoint in the layout of its own code becomes one of ours."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

# what is converted: the module whose `translate` reads it
CONVERTERS = {
    "divla": "hf_vla.models.divla.convert_divla",
    "tinyvla": "hf_vla.models.tinyvla.convert_tinyvla",
}


def convert(
    family: Annotated[str, typer.Argument(help=f"What the source is: {', '.join(CONVERTERS)}.")],
    source: Annotated[str, typer.Argument(help="Published checkpoint: a folder, or a name on the Hub.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write; must not hold files.", file_okay=False)],
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="JSON or safetensors file with action_min, action_max, qpos_mean and qpos_std.", dir_okay=False
        ),
    ] = None,
    camera: Annotated[
        list[str] | None, typer.Option(help="Name of a camera; once for each of several, in the prompt's order.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the source's precision.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint at DESTINATION.")] = False,
):
    """Convert a published checkpoint."""
    if family not in CONVERTERS:
        raise ValueError(f"Expected one of {sorted(CONVERTERS)} to convert, came {family!r}.")
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
