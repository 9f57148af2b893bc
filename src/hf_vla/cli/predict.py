"""`hf-vla predict`: the action chunk for one image and one instruction, as a table and a picture."""

from pathlib import Path
from typing import Annotated

import typer


def predict(
    model: Annotated[str, typer.Option(help="Checkpoint: a folder, or a name on the Hub.")],
    image: Annotated[Path, typer.Option(help="Picture from the checkpoint's camera.", exists=True, dir_okay=False)],
    text: Annotated[str, typer.Option(help='Instruction, such as "pick up the red cube".')],
    state: Annotated[
        str | None, typer.Option(help="The robot's state, '0.1 0.2 ...', where the checkpoint needs it.")
    ] = None,
    unnorm_key: Annotated[
        str | None, typer.Option(help="Dataset whose robot acts, where the checkpoint knows several.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the chunk to this file.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; default: the accelerator.")] = None,
):
    """Predict the robot actions for an image and an instruction."""
    from PIL import Image, ImageOps
    from rich.console import Console

    from hf_vla.cli.render import chunk_table, plot_chunk
    from hf_vla.policy import IMAGES, STATE, TASK, Policy

    suffixes = (".png", ".jpg", ".pdf", ".svg")
    if plot is not None and (plot.suffix not in suffixes or not plot.absolute().parent.is_dir()):
        raise ValueError(f"Expected --plot to be a file {suffixes} in an existing folder, came {str(plot)!r}.")
    with Image.open(image) as file:
        picture = ImageOps.exif_transpose(file)
    policy = Policy.from_pretrained(model, unnorm_key=unnorm_key, device=device)
    camera = policy.camera.name if policy.camera and policy.camera.name else "image"
    observation = {IMAGES + camera: picture, TASK: text}
    if state is not None:
        observation[STATE] = parse_numbers(state)
    chunk = policy.predict_chunk(observation)
    console = Console()
    if state is not None and policy.state_spec is None:
        console.print("[yellow]Note:[/] this checkpoint takes no state; --state was not used.")
    console.print(chunk_table(chunk, policy.action_spec, title=f"{text} ({policy.unnorm_key})"))
    if plot is not None:
        plot_chunk(chunk, policy.action_spec, picture, title=text).savefig(plot)
        console.print(f"Wrote {plot}", highlight=False)


def parse_numbers(text):
    """Read numbers parted by spaces or commas.

    Raises:
        ValueError: something in it is not a number.
    """
    try:
        return [float(number) for number in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"Expected --state to be numbers like '0.1 0.2', came {text!r}.") from None
