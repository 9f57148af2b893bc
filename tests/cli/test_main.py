import pytest
import typer
from typer.testing import CliRunner

from hf_vla.cli.main import ReadableErrors, app, readable


def app_that_raises(error):
    broken = typer.Typer(cls=ReadableErrors)

    @broken.callback()
    def main():
        pass

    @broken.command()
    def fail():
        raise error

    return broken


def test_help_lists_the_subcommands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0 and "predict" in result.output


@pytest.mark.parametrize(
    "error", [ValueError("Expected 3, came [4]."), FileNotFoundError("No such folder."), ImportError("Install it.")]
)
def test_what_a_user_can_mend_is_one_sentence(error, monkeypatch):
    monkeypatch.delenv("HF_VLA_DEBUG", raising=False)
    result = CliRunner().invoke(app_that_raises(error), ["fail"])
    assert result.exit_code == 1
    assert result.stderr == f"Error: {error}\n" and result.stdout == ""


def test_debug_shows_the_error(monkeypatch):
    monkeypatch.setenv("HF_VLA_DEBUG", "1")
    result = CliRunner().invoke(app_that_raises(ValueError("Expected 3.")), ["fail"])
    assert isinstance(result.exception, ValueError)


def test_a_bug_keeps_its_trace():
    result = CliRunner().invoke(app_that_raises(KeyError("x")), ["fail"])
    assert isinstance(result.exception, KeyError)


def test_tokens_are_not_shown():
    assert readable(ValueError("bad token hf_" + "Ab3" * 10 + " for hf_vla")) == "bad token hf_*** for hf_vla"
    assert app.pretty_exceptions_show_locals is False
