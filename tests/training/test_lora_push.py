"""A training that pushes to the Hub: what arrives there is complete, and nothing that is nobody's business."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load
from transformers import AutoModel, AutoProcessor, TrainerCallback

import hf_vla  # noqa: F401
from hf_vla.hub.card import write_card
from hf_vla.hub.push import push_checkpoint
from hf_vla.policy import Policy
from hf_vla.training.run import train
from hf_vla.training.saving import find_flaw

# peft asks every model for an attribute that transformers is about to rename.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's own uploads
]
REPO = "somebody/run"
PROCESSOR = {"processor_config.json", "tokenizer.json", "tokenizer_config.json"}
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_weights.safetensors")


@pytest.mark.parametrize(
    ("strategy", "adapters"),
    [("end", False), pytest.param("every_save", True, marks=pytest.mark.slow), ("checkpoint", True)],
)
def test_what_is_pushed_is_complete(
    strategy, adapters, hub, make_recipe, tiny_checkpoint, tmp_path, caplog, capfd, monkeypatch
):
    options = {"training__push_to_hub": True, "training__hub_model_id": REPO, "training__hub_strategy": strategy}
    options |= {"training__hub_token": hub.token, "training__hub_always_push": True, "data__eval_episodes": []}
    options |= {"training__max_steps": 2, "training__save_steps": 1, "training__per_device_train_batch_size": 2}
    if adapters:
        monkeypatch.setenv("HF_TOKEN", hub.token)
        push_checkpoint(tiny_checkpoint, "somebody/base", code=False)
        options |= {"model__preset": None, "model__grid": None, "model__path": "somebody/base"}
        options |= {"model__lora__r": 4, "training__ema_decay": 0.5, "training__learning_rate": 1e-2}
    folder = tmp_path / "run"
    others = ("secret_notes.txt", "runs/now/events.out.host", "wandb/metadata.json", "credentials.json")
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    with caplog.at_level(logging.DEBUG):
        train(make_recipe(folder, **options), write_card=write_card)

    files = set(hub.files(REPO, kind="model"))
    weights = "adapter_model.safetensors" if adapters else "model.safetensors"
    assert files >= {weights, "config.json", "README.md", "training.json", *PROCESSOR}
    assert ("adapter_config.json" in files) == adapters
    assert not files & set(others)
    root = {name for name in files if "/" not in name}
    assert not [name for name in root if name.endswith((".bin", ".pt", ".pth"))]  # which are pickles
    card = hub.read(REPO, "README.md", kind="model").decode()  # names no folder, which the Hub refuses
    assert f'Policy.from_pretrained("{REPO}"' in card and str(tmp_path) not in card
    assert ("base_model: somebody/base" in card) == adapters
    assert not [name for name in files if str(tmp_path).encode() in hub.read(REPO, name, kind="model")]
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
    options |= {"training__push_to_hub": False, "training__resume_from_checkpoint": f"{there}/last-checkpoint"}
    train(make_recipe(tmp_path / "again", "tinyvla_tiny", **options, training__max_steps=4, training__seed=7))
    assert (tmp_path / "again" / "base" / "model.safetensors").read_bytes() == base  # of the first seed


SMALL = {"training__max_steps": 2, "training__per_device_train_batch_size": 2, "data__eval_episodes": []}
PUSHED = SMALL | {"training__push_to_hub": True, "training__hub_model_id": REPO}


def test_adapters_of_a_folder_are_refused_before_the_training(
    hub, make_recipe, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    options = PUSHED | {"model__preset": None, "model__grid": None, "model__lora__r": 4}
    steps = Steps()
    with pytest.raises(
        ValueError, match=f"would push adapters of '{tiny_checkpoint}', which whoever pulls them lacks"
    ):
        train(make_recipe(tmp_path / "run", **options, model__path=str(tiny_checkpoint)), [steps])
    assert not hub.repos and not steps.taken


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "Pushing to 'somebody/run' needs a token with write permission, and none was found"),
        ("hf_wrongwrongwrongwrong", "The Hub does not accept the token"),
        ("read", "The Hub does not let the token .* write to 'somebody/run'"),
    ],
)
def test_tokens_that_may_not_push_are_told_before_the_training(hub, make_recipe, token, message, tmp_path):
    token = hub.read_token if token == "read" else token
    steps = Steps()
    with pytest.raises(OSError, match=message) as caught:
        train(make_recipe(tmp_path / "run", **PUSHED, training__hub_token=token), [steps])
    assert not steps.taken and not (token and token in str(caught.value))


def test_nothing_of_an_earlier_model_stays(hub, make_recipe, tmp_path, monkeypatch):
    """Adapters and their model made way for; other files and the best step's number stay."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    HfApi().create_repo(REPO)
    for name in ("adapter_config.json", "adapter_model.safetensors", "base/model.safetensors", "mine.csv"):
        HfApi().upload_file(repo_id=REPO, path_or_fileobj=b"{}", path_in_repo=name)
    best = {"training__load_best_model_at_end": True, "training__metric_for_best_model": "loss"}
    best |= {"training__eval_strategy": "steps", "training__eval_steps": 1, "training__save_steps": 1}
    best |= {"training__hub_strategy": "checkpoint", "training__hub_always_push": True, "data__eval_episodes": [0]}
    train(make_recipe(tmp_path / "run", **PUSHED | best))
    files = set(hub.files(REPO, kind="model"))
    assert "mine.csv" in files and not [name for name in files if name.startswith(("adapter", "base"))]
    assert not [name for name in files if str(tmp_path).encode() in hub.read(REPO, name, kind="model")]
    state = json.loads(hub.read(REPO, "last-checkpoint/trainer_state.json", kind="model"))
    assert state["best_model_checkpoint"].startswith("checkpoint-")
    there = snapshot_download(REPO, local_dir=tmp_path / "there", allow_patterns="last-checkpoint/*")
    assert find_flaw(Path(there, "last-checkpoint")) is None
    again = SMALL | {
        "training__max_steps": 3,
        "data__eval_episodes": [0],
        "training__resume_from_checkpoint": f"{there}/last-checkpoint",
    }
    train(make_recipe(tmp_path / "again", **again))


class Steps(TrainerCallback):
    """Says whether a step was taken."""

    taken = False

    def on_step_begin(self, *args, **kwargs):
        self.taken = True
