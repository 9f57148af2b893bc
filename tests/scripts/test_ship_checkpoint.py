import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ship_checkpoint
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from hf_vla.evaluation.protocol import weights_sha256
from hf_vla.hub.card import write_card
from hf_vla.training.recipe import load_recipe
from hf_vla.training.run import train

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "scripts" / "recipes" / "tinyvla_tiny.yaml"
NAMES = ("config.json", "frame.json", "frame_agentview.png", "frame_wrist.png", "model.safetensors", "README.md")
NAMES += ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "training.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of one training step, and its recipe."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"output_dir": str(folder), "max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    recipe = load_recipe(RECIPE, {f"training.{name}": value for name, value in changes.items()})
    train(recipe)
    return folder, recipe


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script, which writes to a folder of the test's own."""
    monkeypatch.setattr(ship_checkpoint, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(ship_checkpoint, "FRAMES", 3)
    monkeypatch.chdir(ROOT)
    return ship_checkpoint


def write_evaluation(folder, sha256, checkpoint="outputs/mine"):
    folder.mkdir()
    protocol = {"env": "metaworld", "tasks": ["reach-v3"], "weights_sha256": sha256, "checkpoint": checkpoint}
    protocol |= {"episodes": 1, "seed": 0}
    record = {"task": "reach-v3", "instruction": "reach", "seed": 0, "success": True, "steps": 9, "predictions": 1}
    record |= {"latency_ms": [2.0], "wall_s": 0.5, "restarts": 0, "probe": "none"}
    (folder / "protocol.json").write_text(json.dumps(protocol))
    (folder / "episodes.jsonl").write_text(json.dumps(record) + "\n")
    from hf_vla.evaluation.report import write_report

    write_report(folder)


def test_it_ships_half_the_bytes_and_all_that_is_needed(script, trained, tmp_path, capsys):
    folder, recipe = trained
    script.ship(folder, "tiny", recipe)
    shipped = tmp_path / "tiny"
    assert sorted(path.name for path in shipped.iterdir()) == sorted(NAMES)
    assert list(tmp_path.iterdir()) == [shipped]
    before, stored = load_file(folder / "model.safetensors"), load_file(shipped / "model.safetensors")
    assert before.keys() == stored.keys()
    loaded = AutoModel.from_pretrained(shipped)
    assert loaded.dtype == torch.float32
    for name, value in stored.items():
        assert value.dtype == torch.float16 and torch.equal(value, before[name].half())
        assert torch.equal(loaded.state_dict()[name], value.float())
    assert AutoProcessor.from_pretrained(shipped).action_codec.specs() is not None
    card = (shipped / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card and "A TinyVLA of " in card and "trained for 1 steps" in card
    assert "| `robosuite_demos` | `robosuite_demos`, not on the Hub | 3 |" in card
    assert write_card(shipped).read_text() == card and "On 3 held-out frames this changes the\nactions by" in card
    assert "changes actions by" in capsys.readouterr().out


def test_the_frame_is_the_dataset_s(script, trained, tmp_path):
    folder, recipe = trained
    script.ship(folder, "tiny", recipe)
    frame = json.loads((tmp_path / "tiny" / "frame.json").read_text())
    opened = script.open_datasets(recipe.data)[0]
    episode, number = (opened.episodes.column(f"{name}_index") for name in ("episode", "frame"))
    (row,) = np.flatnonzero((episode == frame["episode"]) & (number == frame["frame"]))
    assert row in opened.eval_rows and not (opened.train_rows == row).any()
    count = len(frame["actions"])
    assert count == recipe.data.chunk_size  # in the middle of an episode nothing is padded
    assert np.array(frame["actions"]) == pytest.approx(opened.episodes.column("action")[row : row + count])
    item = opened.episodes[row]
    assert frame["state"] == pytest.approx(item["observation.state"].tolist()) and frame["task"] == item["task"]
    for camera, file in frame["images"].items():
        pixels = np.asarray(Image.open(tmp_path / "tiny" / file)).transpose(2, 0, 1) / 255
        assert pixels == pytest.approx(item[f"observation.images.{camera}"].numpy(), abs=1e-6)


def test_a_report_lies_beside_it_and_in_its_card(script, trained, tmp_path):
    folder, recipe = trained
    evaluation = tmp_path.with_name("evaluation")
    write_evaluation(evaluation, weights_sha256(AutoModel.from_pretrained(folder)))
    script.ship(folder, "tiny", recipe, evaluation)
    shipped = tmp_path / "tiny"
    records = gzip.decompress((shipped / "eval" / "episodes.jsonl.gz").read_bytes())
    assert records == (evaluation / "episodes.jsonl").read_bytes()
    card = (shipped / "README.md").read_text()
    assert "The evaluation was of the weights before rounding" in card and "model-index:" not in card
    again = tmp_path.with_name("again")
    write_evaluation(again, weights_sha256(AutoModel.from_pretrained(shipped)))
    script.ship(folder, "tiny", recipe, again)
    card = (shipped / "README.md").read_text()
    assert "## Evaluation on metaworld" in card and "model-index:" in card and "the weights of this folder" in card


def test_it_refuses_what_it_should_and_leaves_what_was_there(script, trained, tmp_path, monkeypatch):
    folder, recipe = trained
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "mine.txt").write_text("kept")
    other, here = tmp_path.with_name("other"), tmp_path.with_name("here")
    write_evaluation(other, "0" * 64)
    with pytest.raises(ValueError, match="other weights"):
        script.ship(folder, "tiny", recipe, other)
    write_evaluation(here, weights_sha256(AutoModel.from_pretrained(folder)), checkpoint=str(folder))
    with pytest.raises(ValueError, match=r"names .* a folder of this machine"):
        script.ship(folder, "tiny", recipe, here)
    monkeypatch.setattr(script, "action_changes", lambda *_: np.full((2, 16, 7), 0.011))
    with pytest.raises(ValueError, match=r"Expected 1 % at most on average, came 1\.1 %"):
        script.ship(folder, "tiny", recipe)
    assert [path.name for path in tmp_path.rglob("*")] == ["tiny", "mine.txt"]


def test_changes_are_shares_of_the_recorded_range(script, trained):
    folder, recipe = trained
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    opened = script.open_datasets(recipe.data)[0]
    key = opened.arguments.unnorm_key
    assert (script.action_changes([script.Policy(model, processor, key, seed=0)] * 2, opened) == 0).all()

    def always(chunk):
        return SimpleNamespace(processor=processor, unnorm_key=key, reset=int, predict_chunk=lambda observation: chunk)

    recorded, chunk = opened.episodes.column("action")[opened.train_rows], np.zeros((4, 7))
    another = chunk + 0.1 * (recorded.max(0) - recorded.min(0)) * (np.arange(7) == 2)
    changes = script.action_changes([always(chunk), always(another)], opened)
    assert changes.shape == (3, 4, 7)
    assert changes == pytest.approx(np.broadcast_to(0.1 * (np.arange(7) == 2), (3, 4, 7)), abs=1e-6)
