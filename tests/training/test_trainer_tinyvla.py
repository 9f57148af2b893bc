"""The trainer with a head that draws noise, several cameras and a state."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback

import hf_vla  # noqa: F401
from hf_vla.data.collator import VLACollator
from hf_vla.training.builders.registry import build
from hf_vla.training.callbacks import SeedOfProcess
from hf_vla.training.datasets import join, open_datasets
from hf_vla.training.run import train
from hf_vla.training.trainer import VLATrainer


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other):
    first, second = weights(folder), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def tinyvla_run(make_recipe, tmp_path_factory):
    """Four steps of a head that draws noise, in training and in prediction."""
    folder = tmp_path_factory.mktemp("tinyvla")
    options = {"training__max_steps": 4, "training__save_steps": 2, "data__eval_episodes": [3]}
    return folder, train(make_recipe(folder, "tinyvla_tiny", **options))


def tinyvla_trainer(make_recipe, folder):
    recipe = make_recipe(folder, "tinyvla_tiny", data__eval_episodes=[3])
    datasets = open_datasets(recipe.data)
    train_set, eval_set = join(recipe.data, datasets)
    model, processor = build(recipe, datasets)
    return VLATrainer(
        model=model,
        args=recipe.training,
        data_collator=VLACollator(processor, "robosuite_demos", ["agentview", "wrist"], with_state=True),
        eval_dataset=torch.utils.data.Subset(eval_set, range(0, 40, 8)),
        processing_class=processor,
    )


def test_evaluations_of_a_head_that_draws_noise_repeat_and_leave_training_alone(make_recipe, tmp_path):
    trainer = tinyvla_trainer(make_recipe, tmp_path)
    torch.manual_seed(1)
    first, drawn = trainer.evaluate(), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    second = trainer.evaluate()
    assert {name: first[name] for name in ("eval_loss", "eval_action_error")} == {
        name: second[name] for name in ("eval_loss", "eval_action_error")
    }
    other = trainer.model.predict_action(
        **trainer.data_collator.prompts([trainer.eval_dataset[0]])["inputs"],
        generator=torch.Generator().manual_seed(5),
    )
    again = trainer.model.predict_action(**trainer.data_collator.prompts([trainer.eval_dataset[0]])["inputs"])
    assert not torch.equal(other.actions, again.actions)  # it does draw


def test_a_continuous_head_is_evaluated_by_loss_and_action_error(tinyvla_run):
    metrics = tinyvla_run[1]
    assert np.isfinite([metrics["eval_loss"], metrics["eval_action_error_gripper"]]).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__cameras": [{"name": "wrist"}, {"name": "agentview"}]}, "CameraSpec of .* differ in name"),
        ({"data__cameras": [{"name": "agentview"}]}, "The recipe gives another camera_config than"),
        ({"data__state__frame": "camera"}, "StateSpec of .* frame: .* 'world', the recipe 'camera'"),
        ({"data__state": None}, "The recipe gives another statistics than"),
    ],
)
def test_a_run_with_cameras_and_state_is_resumed_with_the_same_ones(
    tinyvla_run, make_recipe, tmp_path, overrides, message
):
    shutil.copytree(tinyvla_run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    options = {"data__eval_episodes": [3], "training__resume_from_checkpoint": True}
    with pytest.raises(ValueError, match=message):
        train(make_recipe(tmp_path, "tinyvla_tiny", **options, **overrides))


def test_resuming_a_head_that_draws_noise_equals_an_uninterrupted_run(tinyvla_run, make_recipe, tmp_path):
    options = {"training__max_steps": 4, "training__save_strategy": "no", "data__eval_episodes": [3]}
    checkpoint = str(tinyvla_run[0] / "checkpoint-2")
    train(make_recipe(tmp_path, "tinyvla_tiny", **options, training__resume_from_checkpoint=checkpoint))
    assert_same_weights(tmp_path, tinyvla_run[0])
    assert losses(tmp_path) == losses(tinyvla_run[0])


def test_activation_checkpointing_changes_nothing(tinyvla_run, make_recipe, tmp_path):
    checkpointed = []

    class Look(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            checkpointed.append(model.is_activation_checkpointing)

    options = {"training__max_steps": 4, "training__save_strategy": "no", "data__eval_episodes": [3]}
    recipe = make_recipe(tmp_path, "tinyvla_tiny", **options, training__activation_checkpointing=True)
    train(recipe, callbacks=[Look()])
    assert checkpointed == [True]
    np.testing.assert_allclose(losses(tmp_path), losses(tinyvla_run[0]), rtol=1e-3)


def test_the_gradient_is_the_mean_over_the_accumulated_batches(make_recipe, tmp_path, monkeypatch):
    """Of a head that draws noise: each batch is computed again, with the random numbers that it had."""
    options = {"training__max_steps": 1, "training__gradient_accumulation_steps": 2, "training__optim": "sgd"}
    options |= {"training__learning_rate": 1.0, "training__max_grad_norm": 0.0, "training__save_strategy": "no"}
    options |= {"training__lr_scheduler_type": "constant", "training__per_device_train_batch_size": 2}
    seen, compute_loss = [], VLATrainer.compute_loss

    def keep(self, model, inputs, *args, **kwargs):
        seen.append((copy.deepcopy(model.state_dict()), inputs, torch.get_rng_state()))
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(VLATrainer, "compute_loss", keep)
    train(make_recipe(tmp_path, "tinyvla_tiny", **options, data__eval_episodes=[]))
    model, parts = AutoModel.from_pretrained(tmp_path).train(), []
    after = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.load_state_dict(seen[0][0])
    for _, inputs, state in seen:
        torch.set_rng_state(state)
        parts.append(model(**inputs).loss)
    (sum(parts) / 2).backward()
    assert len(seen) == 2
    for name, value in model.named_parameters():
        step = 0 if value.grad is None else value.grad
        torch.testing.assert_close(after[name], value.detach() - step, rtol=1e-4, atol=1e-6, msg=name)


def test_training_seeds_every_process_anew(make_recipe, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(SeedOfProcess, "on_train_begin", lambda self, args, *_, **__: seeds.append(args.seed))
    train(make_recipe(tmp_path, training__max_steps=1, training__save_strategy="no", data__eval_episodes=[]))
    assert seeds == [0]


def test_training_withholds_states_and_evaluation_none(make_recipe, tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(VLATrainer, "train", lambda self, **kwargs: kept.update(trainer=self) or 1 / 0)
    options = {"data__state_dropout": 0.5, "training__per_device_train_batch_size": 32}
    with pytest.raises(ZeroDivisionError):
        train(make_recipe(tmp_path, "tinyvla_tiny", **options))
    trainer = kept["trainer"]
    withheld = [
        (next(iter(batches))["state"] == 0).all(-1).float().mean().item()
        for batches in (trainer.get_train_dataloader(), trainer.get_eval_dataloader())
    ]
    assert 0.2 < withheld[0] < 0.8 and withheld[1] == 0


@pytest.mark.parametrize("family", ["tinyvla", "pi0_vla"])
def test_training_withholds_cameras_and_evaluation_none(family, make_recipe, tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(VLATrainer, "train", lambda self, **kwargs: kept.update(trainer=self) or 1 / 0)
    options = {"data__camera_dropout": 0.5, "training__per_device_train_batch_size": 32}
    with pytest.raises(ZeroDivisionError):
        train(make_recipe(tmp_path, f"{family}_tiny", **options))

    def missing(batch):
        if family == "pi0_vla":
            return (~batch["pixel_attention_mask"]).float().mean().item()
        return 1 - batch["attention_mask"][batch["input_ids"] == 259].float().mean().item()

    trainer = kept["trainer"]
    assert 0.2 < missing(next(iter(trainer.get_train_dataloader()))) < 0.5
    assert missing(next(iter(trainer.get_eval_dataloader()))) == 0
