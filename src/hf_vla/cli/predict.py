"""`hf-vla predict`: the action chunk for one image and one instruction, as a table and a picture."""

from pathlib import Path
from typing import Annotated

import typer


def predict(
    model: Annotated[str, typer.Option(help="Checkpoint: a folder, or a name on the Hub.")],
    image: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]FILE",
            help="Picture from the checkpoint's camera; of several, NAME=FILE for each, NAME= for a missing one.",
        ),
    ],
    text: Annotated[str, typer.Option(help='Instruction, such as "pick up the red cube".')],
    state: Annotated[
        str | None, typer.Option(help="The robot's state, '0.1 0.2 ...', where the checkpoint needs it.")
    ] = None,
    unnorm_key: Annotated[
        str | None, typer.Option(help="Dataset whose robot acts, where the checkpoint knows several.")
    ] = None,
    reasoning: Annotated[
        str | None, typer.Option(help="What to act under, instead of the model's own reasoning in words.")
    ] = None,
    max_reasoning_tokens: Annotated[
        int | None, typer.Option(help="Longest reasoning of the model's own; 0: act without words.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the chunk to this file.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a checkpoint on the Hub.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes heads that draw noise repeatable.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; default: the accelerator.")] = None,
):
    """Predict the robot actions for an image and an instruction."""
    from textwrap import fill

    from rich.console import Console
    from rich.markup import escape

    from hf_vla.cli.render import chunk_table, plot_chunk
    from hf_vla.policy import IMAGES, STATE, TASK, Policy

    suffixes = (".png", ".jpg", ".pdf", ".svg")
    if plot is not None and (plot.suffix not in suffixes or not plot.absolute().parent.is_dir()):
        raise ValueError(f"Expected --plot to be a file {suffixes} in an existing folder, came {str(plot)!r}.")
    files = parse_images(image)
    options = {
        "unnorm_key": unnorm_key,
        "revision": revision,
        "seed": seed,
        "max_reasoning_tokens": max_reasoning_tokens,
    }
    policy = Policy.from_pretrained(model, device=device, **options)
    observation = {TASK: text}
    for camera, path in name_cameras(files, policy.cameras).items():
        observation[IMAGES + camera] = path and open_upright(path)
    if state is not None:
        if not policy.takes_state:
            raise ValueError("This checkpoint takes no state: leave --state out.")
        observation[STATE] = parse_numbers(state)
    elif policy.takes_state:
        names = "" if policy.state_spec is None else f" ({' '.join(policy.state_spec.names)})"
        raise ValueError(f"This checkpoint needs the robot's state: give --state 'NUMBER NUMBER ...'{names}.")
    chunk = policy.predict_chunk(observation, reasoning)
    console, title = Console(), text
    if policy.reasoning is not None:  # quoted, since a model may say anything: nothing, or what a terminal would obey
        console.print(f"Reasoning: {escape(repr(policy.reasoning))}", highlight=False)
        title = f"{text}\n{fill(repr(policy.reasoning), width=80)}"
    console.print(chunk_table(chunk, policy.action_spec, title=f"{text} ({policy.unnorm_key})"))
    if plot is not None:
        pictures = (value for key, value in observation.items() if key.startswith(IMAGES))
        picture = next(value for value in pictures if value is not None)
        plot_chunk(chunk, policy.action_spec, picture, title=title).savefig(plot)
        console.print(f"Wrote {plot}", highlight=False)


def open_upright(path):
    """Read a picture, turned as the camera was held.

    Raises:
        ValueError: it is none, or not whole.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: expected a picture (PNG, JPEG, ...), and all of it: {error}.") from error


def parse_images(values):
    """Read `NAME=FILE`, or one FILE, into camera's name (None) -> path; `NAME=` is a missing picture, None.

    Raises:
        typer.BadParameter: a file does not exist, several are not named, or a name comes twice.
    """
    files = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or Path(value).is_file():  # a file's name may hold the sign
            name, path = None, value
        if not (name and not path) and not Path(path).is_file():
            raise typer.BadParameter(f"File {path!r} does not exist.", param_hint="--image")
        if name in files or (len(values) > 1 and not name):
            raise typer.BadParameter(f"Of several pictures, name each once: NAME={path}.", param_hint="--image")
        files[name or None] = path or None
    return files


def name_cameras(files, cameras):
    """Give a picture without a name to the checkpoint's only camera.

    Raises:
        ValueError: there are several cameras, or none of the name given.
    """
    declared = [camera.name for camera in cameras if camera.name is not None]
    if None in files and len(declared) > 1:
        raise ValueError(f"This checkpoint looks through the cameras {declared}: give --image NAME=FILE for each.")
    if unknown := sorted(set(files) - {None, *declared}) if declared else []:
        raise ValueError(f"This checkpoint has no camera {', '.join(unknown)}, only {', '.join(declared)}.")
    return {name or (declared or ["image"])[0]: path for name, path in files.items()}


def parse_numbers(text):
    """Read numbers parted by spaces or commas.

    Raises:
        ValueError: something in it is not a number.
    """
    try:
        return [float(number) for number in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"Expected --state to be numbers like '0.1 0.2', came {text!r}.") from None
