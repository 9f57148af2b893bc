"""The trainer with a model that reasons: parts of its loss, texts from a column, resuming."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Subset

import hf_vla  # noqa: F401
from hf_vla.data.collator import VLACollator
from hf_vla.training.builders.registry import build
from hf_vla.training.trainer import VLATrainer, open_dataset, train

PARTS = ["diffusion_loss", "ntp_loss", "reconstruction_loss"]
# latents that hold less than actions do have a loss of their own, and a column holds what is said
LATENT = {"model__config__latent_dim": 3, "model__config__ntp_loss_weight": 0.5}


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def run(make_recipe, tmp_path_factory):
    """Four steps of two batches each, logged every three; an evaluation and a checkpoint every two."""
    folder = tmp_path_factory.mktemp("divla")
    options = {"training__max_steps": 4, "training__logging_steps": 3, "training__eval_strategy": "steps"}
    options |= {"training__eval_steps": 2, "training__save_steps": 2, "training__gradient_accumulation_steps": 2}
    options |= {"data__eval_episodes": [3], "training__per_device_eval_batch_size": 16}

    def recipe(folder, **overrides):
        return make_recipe(folder, "divla_latent_tiny", **LATENT, **(options | overrides))

    train(recipe(folder))
    return folder, recipe


def parts_of(entry, prefix=""):
    diffusion, ntp, reconstruction = (entry[f"{prefix}{name}"] for name in PARTS)
    return diffusion + 0.5 * ntp + reconstruction


def test_the_parts_of_a_loss_are_logged_beside_it(run):
    """Means of the same batches, weighted alike: they add up to the loss, however steps and batches are cut."""
    training = [entry for entry in history(run[0]) if "loss" in entry]
    evaluation = [entry for entry in history(run[0]) if "eval_loss" in entry]
    assert [entry["step"] for entry in training] == [3] and len(evaluation) == 3
    for entry, prefix in [*((entry, "") for entry in training), *((entry, "eval_") for entry in evaluation)]:
        assert min(entry[f"{prefix}{name}"] for name in PARTS) > 0
        assert entry[f"{prefix}loss"] == pytest.approx(parts_of(entry, prefix), rel=1e-5)


def test_the_logged_parts_are_those_of_the_steps_since_the_last_log(run, make_recipe, tmp_path):
    folder, recipe = run
    train(recipe(tmp_path, training__logging_steps=1, training__eval_strategy="no", training__save_strategy="no"))
    steps = [entry for entry in history(tmp_path) if "loss" in entry]
    (logged,) = (entry for entry in history(folder) if "loss" in entry)
    for name in ["loss", *PARTS]:
        assert logged[name] == pytest.approx(sum(entry[name] for entry in steps[:3]) / 3, rel=1e-5)
    assert len({entry["ntp_loss"] for entry in steps}) == 4


def test_a_model_without_parts_logs_none(make_recipe, tmp_path):
    train(make_recipe(tmp_path, "tinyvla_tiny", training__max_steps=1, training__save_strategy="no"))
    names = {name for entry in history(tmp_path) for name in entry if name.endswith("_loss")}
    assert names == {"train_loss", "eval_loss"}


def test_resuming_equals_an_uninterrupted_run(run, tmp_path):
    folder, recipe = run
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    train(recipe(tmp_path, training__resume_from_checkpoint=True))
    first, second = (load_file(each / "model.safetensors") for each in (folder, tmp_path))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for name in ("eval_loss", *(f"eval_{part}" for part in PARTS), "eval_action_error"):
        wanted, came = ([entry[name] for entry in history(each) if name in entry] for each in (folder, tmp_path))
        assert wanted == came


def trainer_of(recipe, rows=None):
    dataset, train_set, eval_set = open_dataset(recipe.data)
    model, processor = build(recipe, dataset, train_set)
    return VLATrainer(
        model=model,
        args=recipe.training,
        data_collator=VLACollator(processor, "robosuite_demos", ["agentview", "wrist"], True, recipe.data.reasoning),
        train_dataset=train_set if rows is None else Subset(train_set, rows),
        eval_dataset=eval_set,
        processing_class=processor,
    )


def test_a_few_steps_lower_both_losses_of_a_fixed_batch(make_recipe, tmp_path):
    recipe = make_recipe(tmp_path, "divla_tiny", training__max_steps=12, training__save_strategy="no")
    trainer = trainer_of(recipe, [0, 300, 600, 900])
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in PARTS[:2]:
        values = [entry[name] for entry in entries]
        assert sum(values[-3:]) < 0.8 * sum(values[:3]), name


def test_a_step_of_fewer_batches_counts_as_a_step(make_recipe, tmp_path):
    """Three batches, two of them a step: the last one of the epoch has a step of its own."""
    options = {"training__max_steps": 2, "training__logging_steps": 2, "training__save_strategy": "no"}
    options |= {"training__per_device_train_batch_size": 1, "training__gradient_accumulation_steps": 2}
    trainer = trainer_of(make_recipe(tmp_path, "divla_tiny", **options), [0, 300, 600])
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(entry["diffusion_loss"] + entry["ntp_loss"], rel=1e-5)


def test_data_without_reasonings_train_the_head_alone(make_recipe, tmp_path):
    options = {"training__max_steps": 2, "training__save_strategy": "no", "data__eval_episodes": [3]}
    train(make_recipe(tmp_path, "divla_tiny", **options, data__reasoning=None))
    entries = [entry for entry in history(tmp_path) if "loss" in entry]
    assert [entry["ntp_loss"] for entry in entries] == [0.0, 0.0]
    assert [entry["loss"] for entry in entries] == pytest.approx([entry["diffusion_loss"] for entry in entries])


def test_what_a_batch_says_is_the_columns_text(make_recipe, tmp_path):
    trainer = trainer_of(make_recipe(tmp_path, "divla_tiny"))
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 30)])
    processor = trainer.processing_class
    said = [processor.tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in batch["labels"]]
    column = open_dataset(make_recipe(tmp_path, "divla_tiny").data)[0].texts("subtask")
    assert said == [f"{column[row]}Next action:" for row in (0, 30)] and said[0] != said[1]
    assert "labels" not in trainer.data_collator.prompts([trainer.train_dataset[0]])["inputs"]
