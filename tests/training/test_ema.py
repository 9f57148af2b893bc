"""The average of the weights: what it is, who uses it, and that resuming keeps it."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, TrainerCallback

import hf_vla  # noqa: F401
from hf_vla.training.ema import TRAINING_WEIGHTS
from hf_vla.training.recipe import load_recipe
from hf_vla.training.run import train

# peft asks every model for an attribute that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROOT = Path(__file__).parents[2]
DECAY = 0.3  # reached after four updates
OPTIONS = {
    "training__ema_decay": DECAY,
    "training__per_device_train_batch_size": 2,
    "training__per_device_eval_batch_size": 32,
    "training__eval_action_samples": 2,
    "training__learning_rate": 1e-2,
    "training__lr_scheduler_type": "constant",
}


class Keep(TrainerCallback):
    """Keeps the weights of training after each step."""

    def __init__(self):
        self.steps, self.after_evaluation = [], None

    def on_step_end(self, args, state, control, model, **kwargs):
        self.steps.append(self.weights(model))

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.after_evaluation = self.weights(model)

    def weights(self, model):
        return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def averages(steps):
    """By hand: the first update takes the weights, update n + 1 keeps min(decay, (1 + n) / (10 + n))."""
    average, all_of_them = None, []
    for n, weights in enumerate(steps):
        keep = min(DECAY, (1 + n) / (10 + n)) if n else 0.0
        average = {name: keep * (average or weights)[name] + (1 - keep) * weights[name] for name in weights}
        all_of_them.append(average)
    return all_of_them


def assert_close(tensors, wanted, atol=1e-6):
    for name, value in wanted.items():
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def run(make_recipe, tmp_path_factory):
    """A finished run of six steps: its folder, what it kept of the weights, its metrics."""
    folder, keep = tmp_path_factory.mktemp("ema"), Keep()
    return folder, keep, train(make_recipe(folder, **OPTIONS), callbacks=[keep])


def test_checkpoints_and_model_hold_the_average(run):
    folder, keep, _ = run
    wanted = averages(keep.steps)
    assert len(wanted) == 6
    for name, step in {"checkpoint-3": 3, "checkpoint-6": 6, ".": 6}.items():
        assert_close(load_file(folder / name / "model.safetensors"), wanted[step - 1])
    weights = load_file(folder / "checkpoint-3" / TRAINING_WEIGHTS)
    assert weights.keys() == keep.steps[2].keys()
    assert all(torch.equal(weights[name], value) for name, value in keep.steps[2].items())
    distance = max((wanted[5][name] - value).abs().max() for name, value in keep.steps[5].items())
    assert distance > 1e-3
    assert not (folder / TRAINING_WEIGHTS).exists()


def test_evaluation_measures_the_average_and_leaves_the_weights_alone(run, make_trainer, tmp_path):
    folder, keep, metrics = run
    assert all(torch.equal(keep.after_evaluation[name], value) for name, value in keep.steps[5].items())
    trainer = make_trainer(tmp_path, **OPTIONS | {"training__ema_decay": None})
    for weights in (keep.steps[5], averages(keep.steps)[5]):
        trainer.model.load_state_dict(weights, strict=False)
        measured = trainer.evaluate()
    assert measured["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    trainer.model.load_state_dict(keep.steps[5], strict=False)
    assert trainer.evaluate()["eval_loss"] != pytest.approx(metrics["eval_loss"], rel=1e-4)


def test_the_state_says_so(run):
    state = json.loads((run[0] / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["WeightAverage"]["args"] == {"decay": DECAY}
    saved = json.loads((run[0] / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["WeightAverage"]["attributes"] == {"num_updates": 3}


def test_resuming_keeps_weights_and_average(run, make_recipe, tmp_path):
    folder, keep, metrics = run
    shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    again = Keep()
    recipe = make_recipe(tmp_path, **OPTIONS, training__resume_from_checkpoint=True, training__seed=0)
    assert train(recipe, callbacks=[again])["eval_loss"] == metrics["eval_loss"]
    for one, other in zip(again.steps, keep.steps[3:], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    for name in (".", "checkpoint-6"):
        first, second = (load_file(each / name / "model.safetensors") for each in (folder, tmp_path))
        assert all(torch.equal(first[key], second[key]) for key in first)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["WeightAverage"]["attributes"] == {"num_updates": 6}


def test_only_what_is_trained_is_averaged_and_per_step(tiny_checkpoint, make_recipe, tmp_path, caplog):
    options = {"model__preset": None, "model__grid": None, "model__path": str(tiny_checkpoint), "model__lora__r": 4}
    options |= {"training__max_steps": 3, "training__gradient_accumulation_steps": 2, "data__eval_episodes": []}
    keep = Keep()
    with caplog.at_level(logging.INFO):
        train(make_recipe(tmp_path, **OPTIONS | options), callbacks=[keep])
    assert "Saved weights averaged with decay 0.3" in caplog.text
    assert len(keep.steps) == 3 and all("lora_" in name for name in keep.steps[0])
    wanted = {name.replace(".default", ""): value for name, value in averages(keep.steps)[2].items()}
    assert_close(load_file(tmp_path / "adapter_model.safetensors"), wanted)
    assert load_file(tmp_path / "checkpoint-3" / TRAINING_WEIGHTS).keys() == keep.steps[0].keys()
    loaded = dict(AutoModel.from_pretrained(tmp_path).named_parameters())
    assert_close(loaded, {name.removeprefix("base_model.model."): v for name, v in averages(keep.steps)[2].items()})


@pytest.mark.slow
def test_the_best_model_is_the_average_of_its_time(make_recipe, tmp_path):
    options = {"training__load_best_model_at_end": True, "training__eval_strategy": "steps", "training__eval_steps": 1}
    options |= {"training__save_steps": 1, "training__max_steps": 2, "training__greater_is_better": True}
    options |= {"training__metric_for_best_model": "loss", "training__learning_rate": 1e-3}
    keep = Keep()
    train(make_recipe(tmp_path, **OPTIONS | options), callbacks=[keep])
    best = json.loads((tmp_path / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert Path(best).name == "checkpoint-1"  # the higher loss counts as better here
    assert_close(load_file(tmp_path / "model.safetensors"), averages(keep.steps)[0])


@pytest.mark.parametrize("damage", ["gone", pytest.param("broken", marks=pytest.mark.slow)])
def test_a_best_model_that_cannot_be_loaded_leaves_the_average(damage, make_recipe, tmp_path):
    """The Trainer would go on with the last weights; the average would be lost with them."""

    class Damage(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            weights = Path(state.best_model_checkpoint) / "model.safetensors"
            weights.unlink() if damage == "gone" else weights.write_bytes(b"0")

    options = {"training__load_best_model_at_end": True, "training__eval_strategy": "steps", "training__eval_steps": 1}
    options |= {"training__save_steps": 1, "training__max_steps": 1, "training__eval_action_samples": 0}
    with pytest.raises(ValueError, match="The best checkpoint, .*checkpoint-1, cannot be loaded"):
        train(make_recipe(tmp_path, **OPTIONS | options), callbacks=[Damage()])
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_keep_one_average(make_recipe, demos, tmp_path):
    options = ["output_dir", "max_steps", "ema_decay", "learning_rate", "warmup_steps"]
    more = {"training__max_steps": 2, "data__eval_episodes": [], "training__optim": "sgd"}  # a gradient's size counts
    recipe = make_recipe(tmp_path / "one", **OPTIONS | more)
    keep = Keep()
    train(recipe, callbacks=[keep])
    recipe.training.output_dir = str(tmp_path / "two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["scripts/train.py", "--config", "scripts/recipes/spatialvla_tiny.yaml", f"--data.source={demos}"]
    command += [f"--training.{name}={getattr(recipe.training, name)}" for name in options]
    command += ["--training.per_device_train_batch_size=1", "--training.eval_strategy=no", "--data.eval_episodes=[]"]
    command += ["--training.optim=sgd", "--training.lr_scheduler_type=constant"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(load_file(tmp_path / "two" / "model.safetensors"), averages(keep.steps)[1], atol=1e-5)


def test_resuming_with_another_idea_of_the_average_is_an_error(run, make_recipe, tmp_path):
    folder = shutil.copytree(run[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    options = OPTIONS | {"training__resume_from_checkpoint": True}
    with pytest.raises(ValueError, match="training.ema_decay was 0.3, is None"):
        train(make_recipe(tmp_path, **options | {"training__ema_decay": None}))
    for name in ("manifest.json", "recipe.yaml"):  # which would say first that the checkpoint has changed
        (folder / name).unlink()
    with pytest.raises(ValueError, match="checkpoint-3 holds an average of the weights: set training.ema_decay"):
        train(make_recipe(tmp_path, **options | {"training__ema_decay": None}))
    tensors = load_file(folder / TRAINING_WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:1].clone()}, folder / TRAINING_WEIGHTS)
    with pytest.raises(ValueError, match=rf"is of another model: it differs in 1 weights, \['{name}'\]"):
        train(make_recipe(tmp_path, **options))
    (folder / TRAINING_WEIGHTS).write_bytes(b"\x08")
    with pytest.raises(ValueError, match=f"{TRAINING_WEIGHTS} is broken"):
        train(make_recipe(tmp_path, **options))
    (folder / TRAINING_WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-3 has no {TRAINING_WEIGHTS}: its run kept no average"):
        train(make_recipe(tmp_path, **options))


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_a_decay_is_between_0_and_1(decay):
    with pytest.raises(ValueError, match=f"ema_decay between 0 and 1, such as 0.999, came {decay}"):
        load_recipe(ROOT / "scripts/recipes/spatialvla_tiny.yaml", {"training.ema_decay": decay})


def test_sharded_weights_have_no_average():
    overrides = {"training.ema_decay": 0.9, "training.fsdp": "full_shard", "training.use_cpu": True}
    with pytest.raises(ValueError, match="averages whole float32 weights, which FSDP and DeepSpeed cut"):
        load_recipe(ROOT / "scripts/recipes/spatialvla_tiny.yaml", overrides)
