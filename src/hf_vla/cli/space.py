"""`hf-vla space`: the demo page of spaces/action_demo, in the browser."""

from pathlib import Path
from typing import Annotated

import typer


def space(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Checkpoint to serve, a folder or a name on the Hub; several times for several. "
                     "Default: those embedded in spaces/action_demo."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of the machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    share: Annotated[bool, typer.Option(help="Also under a public address, through gradio's servers.")] = False,
):  # fmt: skip
    """Open a page that shows what a checkpoint predicts for a picture, and how."""
    import importlib
    import sys

    sys.path.insert(0, str(find_app()))  # the Space's files import each other by name
    importlib.import_module("app").launch(model, host, port, share)


def find_app():
    """Folder of the Space's app: a clone's, else the copy that lies in the installed package.

    Raises:
        FileNotFoundError: there is neither.
    """
    package = Path(__file__).parents[1]
    places = [package.parents[1] / "spaces" / "action_demo", package / "spaces" / "action_demo"]
    for folder in places:
        if (folder / "app.py").is_file():
            return folder
    raise FileNotFoundError("The page's files are not in this installation: run `hf-vla space` from a clone.")
