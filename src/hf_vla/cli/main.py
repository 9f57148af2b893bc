"""The `hf-vla` command: puts the subcommands together and turns errors into one readable sentence.

Subcommand files import the library inside their functions, so that `hf-vla --help` answers at once.
"""

import os
import re
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from hf_vla.cli.card import card
from hf_vla.cli.client import client
from hf_vla.cli.convert import convert
from hf_vla.cli.doctor import doctor
from hf_vla.cli.eval import evaluate
from hf_vla.cli.inspect import inspect
from hf_vla.cli.predict import predict
from hf_vla.cli.push import push
from hf_vla.cli.record import record
from hf_vla.cli.serve import serve
from hf_vla.cli.space import space
from hf_vla.cli.stats import stats
from hf_vla.cli.train import train

DEBUG_VARIABLE = "HF_VLA_DEBUG"
EXTRAS = {
    **dict.fromkeys(("accelerate", "peft", "yaml"), "train"),
    **dict.fromkeys(("msgpack", "prometheus_client", "websockets"), "serve"),
    "gradio": "space",
}


def readable(error):
    """Text of an error without access tokens, and what to install where that mends it."""
    if isinstance(error, ModuleNotFoundError) and (package := str(error.name).partition(".")[0]) in EXTRAS:
        extra = EXTRAS[package]
        return f"This command needs {package}: pip install 'hf-vla[{extra}]', in a clone pip install -e '.[{extra}]'."
    return re.sub(r"hf_[A-Za-z0-9]{16,}", "hf_***", str(error).strip() or type(error).__name__)


class ReadableErrors(typer.core.TyperGroup):
    """Shows what a user can mend as one sentence; any other error is a bug and stays whole."""

    def invoke(self, ctx):
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError, ImportError) as error:  # the last: an extra is not installed
            if os.environ.get(DEBUG_VARIABLE):
                raise
            console = Console(stderr=True)
            console.print(f"[bold red]Error:[/] {escape(readable(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(1) from None


# show_locals would print tokens that a local variable holds
app = typer.Typer(name="hf-vla", cls=ReadableErrors, no_args_is_help=True, pretty_exceptions_show_locals=False)


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
):
    """Vision-language-action models for robots."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


app.command()(predict)
app.command()(convert)
app.command()(inspect)
app.command()(stats)
app.command()(record)
app.command()(card)
app.command()(push)
app.command("eval")(evaluate)
app.command()(serve)
app.command()(client)
app.command()(doctor)
app.command()(space)
# a recipe's names are read from it, not declared here
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command(context_settings=_PASSED_ON)(train)
