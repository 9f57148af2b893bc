"""A training that pushes to the Hub: what arrives there is complete, and nothing that is nobody's business."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load
from transformers import AutoModel, AutoProcessor

import hf_vla  # noqa: F401
from hf_vla.policy import Policy
from hf_vla.training.run import train

# peft asks every model for an attribute that transformers is about to rename.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's own uploads
]
REPO = "somebody/run"
PROCESSOR = {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_weights.safetensors")


@pytest.mark.parametrize(("strategy", "adapters"), [("end", False), ("every_save", True), ("checkpoint", True)])
def test_what_is_pushed_is_complete(
    strategy, adapters, hub, make_recipe, tiny_checkpoint, tmp_path, caplog, capfd, monkeypatch
):
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers another test's stand-in
    options = {"training__push_to_hub": True, "training__hub_model_id": REPO, "training__hub_strategy": strategy}
    options |= {"training__hub_token": hub.token, "training__hub_always_push": True, "data__eval_episodes": []}
    options |= {"training__max_steps": 2, "training__save_steps": 1, "training__per_device_train_batch_size": 2}
    if adapters:
        options |= {"model__preset": None, "model__grid": None, "model__path": str(tiny_checkpoint)}
        options |= {"model__lora__r": 4, "training__ema_decay": 0.5, "training__learning_rate": 1e-2}
    folder = tmp_path / "run"
    with caplog.at_level(logging.DEBUG):
        train(make_recipe(folder, **options))

    files = set(hub.files(REPO, kind="model"))
    weights = "adapter_model.safetensors" if adapters else "model.safetensors"
    assert files >= {weights, "config.json", "README.md", *PROCESSOR}
    assert ("adapter_config.json" in files) == adapters
    root = {name for name in files if "/" not in name}
    assert not root & {*STATES} and not [name for name in root if name.startswith("_")]
    elsewhere = {name.split("/")[0] for name in files - root}
    assert elsewhere == ({"last-checkpoint"} if strategy == "checkpoint" else set())
    if strategy == "checkpoint":  # to go on elsewhere
        assert {f"last-checkpoint/{name}" for name in (*STATES, "trainer_state.json", weights)} <= files
    pushed, own = load(hub.read(REPO, weights, kind="model")), load((folder / weights).read_bytes())
    assert all(torch.equal(pushed[name], own[name]) for name in own)  # the last one, not an earlier step's

    said = caplog.text + "".join(capfd.readouterr())
    assert hub.token not in said
    assert not [name for name in files if hub.token.encode() in hub.read(REPO, name, kind="model")]
    model = AutoModel.from_pretrained(REPO, token=hub.token)
    processor = AutoProcessor.from_pretrained(REPO, token=hub.token)
    assert processor.action_codec.keys == ["robosuite_demos"]
    assert any("lora_" in name for name, _ in model.named_parameters()) == adapters


def test_adapters_are_pushed_with_the_model_that_they_adapt(
    hub, make_recipe, vlm, small_head, demo_item, tmp_path, monkeypatch
):
    """On another computer, where nothing of the training is, they are loaded from the Hub, and trained on."""
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    options = {"training__push_to_hub": True, "training__hub_model_id": REPO, "training__hub_token": hub.token}
    options |= {"training__hub_strategy": "checkpoint", "training__hub_always_push": True}
    options |= {"model__backbone": str(vlm), "model__lora": {"r": 4}, "model__preset": None}
    options |= {"model__config": small_head, "data__eval_episodes": [], "training__per_device_train_batch_size": 2}
    options |= {"training__learning_rate": 1e-2, "training__save_steps": 2}
    train(make_recipe(tmp_path / "run", "tinyvla_tiny", **options, training__max_steps=2))
    wanted = Policy.from_pretrained(tmp_path / "run", seed=0).predict_chunk(demo_item)
    base = (tmp_path / "run" / "base" / "model.safetensors").read_bytes()
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    assert np.array_equal(Policy.from_pretrained(moved, seed=0).predict_chunk(demo_item), wanted)
    shutil.rmtree(moved)

    assert any("lora_" in name for name, _ in AutoModel.from_pretrained(REPO).named_parameters())
    assert np.array_equal(Policy.from_pretrained(REPO, seed=0).predict_chunk(demo_item), wanted)
    there = snapshot_download(REPO, local_dir=tmp_path / "there", allow_patterns="last-checkpoint/*")
    policy = Policy.from_pretrained(f"{there}/last-checkpoint", seed=0)
    assert np.array_equal(policy.predict_chunk(demo_item), wanted)
    for name in ("manifest.json", "recipe.yaml"):  # by which another seed would be refused
        Path(there, "last-checkpoint", name).unlink()
    options |= {"training__push_to_hub": False, "training__resume_from_checkpoint": f"{there}/last-checkpoint"}
    for name in ("manifest.json", "recipe.yaml"):  # or another seed would be refused
        (tmp_path / "there" / "last-checkpoint" / name).unlink(missing_ok=True)
    train(make_recipe(tmp_path / "again", "tinyvla_tiny", **options, training__max_steps=4, training__seed=7))
    assert (tmp_path / "again" / "base" / "model.safetensors").read_bytes() == base  # of the first seed
