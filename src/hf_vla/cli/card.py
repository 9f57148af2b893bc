"""`hf-vla card`: the model card of a checkpoint, filled from the checkpoint itself."""

from pathlib import Path
from typing import Annotated

import typer


def card(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint; its README.md is written.")],
    repo_id: Annotated[
        str | None, typer.Option(help="owner/name under which the card's code loads it; default: the folder's name.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the weights, such as apache-2.0.")] = None,
    measure_latency: Annotated[
        bool, typer.Option("--measure-latency", help="Measure how long it takes to act, and keep it in latency.json.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="To measure on, such as cpu or cuda:0; default: the accelerator.")
    ] = None,
    unnorm_key: Annotated[
        str | None, typer.Option(help="Dataset whose robot acts as it is measured; default: the first.")
    ] = None,
):
    """Write the model card of a checkpoint, README.md, or refresh what is generated of it.

    What stands outside of the generated parts, and metadata that are there already, stay as they are.
    """
    from rich.console import Console

    from hf_vla.hub.card import write_card
    from hf_vla.hub.latency import measure_latency as measure
    from hf_vla.hub.latency import write_latency

    if not measure_latency and (device, unnorm_key) != (None, None):
        raise ValueError(
            "--device and --unnorm-key are to measure: give --measure-latency as well, or leave them out."
        )
    console = Console(highlight=False, soft_wrap=True)
    if measure_latency:
        measured = measure(checkpoint, device=device, unnorm_key=unnorm_key)
        console.print(f"Wrote {write_latency(measured, checkpoint)}", markup=False)
    console.print(f"Wrote {write_card(checkpoint, repo_id, license)}", markup=False)
