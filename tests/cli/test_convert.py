import json
from importlib import import_module

import pytest
from transformers import AutoModel
from typer.testing import CliRunner

import hf_vla  # noqa: F401
from hf_vla.cli.convert import CONVERTERS
from hf_vla.cli.main import app
from hf_vla.models.conversion import Conversion


def convert(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], env={"COLUMNS": "2000"})


@pytest.fixture
def published(goldens):
    return goldens / "tinyvla" / "siglip_2cam" / "checkpoint"


def test_says_what_was_written_and_what_was_left_out(published, tmp_path):
    result = convert("tinyvla", published, tmp_path / "[converted]")
    assert result.exit_code == 0, result.output
    dropped, note, written = result.stdout.splitlines()
    assert dropped.startswith("Left out 11 weights without use: gpt_neox.vision_tower.vision_model.head.attention.")
    assert note.startswith("Note: There is no processor: the source has no tokenizer.json.")
    assert written == (
        f"Wrote {tmp_path}/[converted]: 236 weights, 0.3 million parameters in float32, without a processor."
    )
    assert type(AutoModel.from_pretrained(tmp_path / "[converted]")).__name__ == "TinyVLAForActionPrediction"


def test_hands_every_option_on(tmp_path, monkeypatch):
    (tmp_path / "stats.json").write_text("{}")
    calls = []
    monkeypatch.setattr("hf_vla.models.conversion.convert_checkpoint", lambda *args: calls.append(args))
    options = ("--statistics", tmp_path / "stats.json", "--camera", "left", "--camera", "right", "--dtype", "bfloat16")
    convert("tinyvla", "somebody/tinyvla", tmp_path / "new", *options, "--overwrite")
    ((translate, *arguments),) = calls
    assert translate.__module__ == CONVERTERS["tinyvla"]
    expected = ["somebody/tinyvla", tmp_path / "new", tmp_path / "stats.json", ["left", "right"], "bfloat16", True]
    assert arguments == expected


@pytest.mark.parametrize("family", sorted(CONVERTERS))
def test_every_converter_can_be_called(family):
    assert import_module(CONVERTERS[family]).translate.__annotations__["return"] is Conversion


def test_errors_are_one_readable_sentence_and_leave_nothing(published, tmp_path):
    config = json.loads((published / "config.json").read_text()) | {"action_head_type": "act"}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    wrong = {
        ("openvla", published, tmp_path / "new"): "Error: Expected one of ['divla', 'rlds', 'tinyvla']",
        ("tinyvla", tmp_path / "source", tmp_path / "new"): "Error: Expected action_head_type 'droid_diffusion' in",
        ("tinyvla", tmp_path / "lost", tmp_path / "new"): f"Error: {tmp_path}/lost: no such folder",
        ("tinyvla", published, tmp_path / "source"): f"Error: {tmp_path}/source is there already:",
    }
    for arguments, message in wrong.items():
        result = convert(*arguments)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].startswith(message) and "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
