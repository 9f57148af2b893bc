"""`hf-vla push`: a checkpoint to the Hub."""

from pathlib import Path
from typing import Annotated

import typer


def push(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of the checkpoint; it is not changed.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub; made if need be.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; default: the owner's settings.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, made if need be; default: main.")] = None,
    no_code: Annotated[
        bool, typer.Option("--no-code", help="Leave out the code by which it loads where hf_vla is not installed.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="Licence in the model card, such as apache-2.0.")] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Other files that go along, 'assets/*'; repeatable.")
    ] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload checkpoint with hf_vla",
):
    """Push a checkpoint to the Hub in one commit, with a model card and the code that loads it.

    Sign in before by `hf auth login`, or set HF_TOKEN. Interrupted, call it again: what has arrived is not sent twice.
    """
    from rich.console import Console

    from hf_vla.hub.push import push_checkpoint

    pushed = push_checkpoint(
        checkpoint, repo_id, private, revision, not no_code, message, license=license, include=include or ()
    )
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Pushed {len(pushed.files)} files: {pushed.url}", markup=False)
    code = [name for name in pushed.generated if name.endswith(".py")]
    others = [name for name in pushed.generated if name not in code] + [f"{len(code)} files of code"] * bool(code)
    console.print(f"Written for the Hub, not into the folder: {', '.join(others) or 'nothing'}", markup=False)
    if pushed.removed:
        console.print(f"Removed there, of an earlier checkpoint: {', '.join(pushed.removed)}", markup=False)
    if pushed.left_out:
        console.print(f"Left out, no part of the checkpoint: {', '.join(pushed.left_out)}", markup=False)
