"""The trainer with a model that reasons: parts of its loss, texts from a column, resuming."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Subset

import hf_vla  # noqa: F401
from hf_vla.data.collator import VLACollator
from hf_vla.training.builders.registry import build
from hf_vla.training.datasets import join, open_datasets
from hf_vla.training.run import train
from hf_vla.training.trainer import VLATrainer

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
        return make_recipe(folder, "divla_latent_tiny", **(LATENT | options | overrides))

    train(recipe(folder))
    return folder, recipe


def parts_of(entry, prefix=""):
    diffusion, ntp, reconstruction = (entry[f"{prefix}{name}"] for name in PARTS)
    return diffusion + 0.5 * ntp + reconstruction


def test_the_parts_of_a_loss_are_logged_beside_it(run):
    """Means of the same batches, weighted alike: they add up to the loss, however steps and batches are cut."""
    training = [entry for entry in history(run[0]) if "loss" in entry]
    evaluation = [entry for entry in history(run[0]) if "eval_loss" in entry]
    assert [entry["step"] for entry in training] == [3] and [entry["step"] for entry in evaluation] == [2, 4]
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


def trainer_of(recipe, rows=None, change=lambda model: None, **options):
    datasets = open_datasets(recipe.data)
    train_set, eval_set = join(recipe.data, datasets)
    model, processor = build(recipe, datasets)
    change(model)
    return VLATrainer(
        model=model,
        args=recipe.training,
        data_collator=VLACollator(processor, "robosuite_demos", ["agentview", "wrist"], True, recipe.data.reasoning),
        train_dataset=train_set if rows is None else Subset(train_set, rows),
        eval_dataset=eval_set,
        processing_class=processor,
        **options,
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
    metrics = train(make_recipe(tmp_path, "divla_tiny", **options, data__reasoning=None))
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_diffusion_loss"]) and metrics["eval_ntp_loss"] == 0
    entries = [entry for entry in history(tmp_path) if "loss" in entry]
    assert [entry["ntp_loss"] for entry in entries] == [0.0, 0.0]
    assert [entry["loss"] for entry in entries] == pytest.approx([entry["diffusion_loss"] for entry in entries])


def test_every_batch_is_evaluated_whether_it_says_something_or_not(make_recipe, tmp_path, monkeypatch):
    options = {"training__per_device_eval_batch_size": 2, "training__eval_action_samples": 0}
    trainer = trainer_of(make_recipe(tmp_path, "divla_tiny", **options))
    items = [trainer.eval_dataset[row] for row in range(6)]
    texts = ["now", "now", None, " ", "then", None]
    trainer.eval_dataset = [item | {"subtask": text} for item, text in zip(items, texts, strict=True)]
    seen, compute_loss = [], trainer.compute_loss

    def keep(model, inputs, *args, **kwargs):
        seen.append(("labels" in inputs, *compute_loss(model, inputs, *args, **kwargs)))
        return seen[-1][1:]

    monkeypatch.setattr(trainer, "compute_loss", keep)
    metrics = trainer.evaluate()
    assert [spoken for spoken, *_ in seen] == [True, False, True]
    losses = [loss.item() for _, loss, _ in seen]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 3) and len(set(losses)) == 3
    ntp = [outputs["ntp_loss"].item() for *_, outputs in seen]
    assert metrics["eval_ntp_loss"] == pytest.approx(sum(ntp) / 3) and ntp[1] == 0


def test_parts_of_several_devices_are_averaged(make_recipe, tmp_path, monkeypatch):
    """torch's DataParallel returns those of all devices, as a vector."""
    trainer = trainer_of(make_recipe(tmp_path, "divla_tiny", training__max_steps=1, training__save_strategy="no"))
    seen, forward = [], trainer.model.forward

    def two_devices(**inputs):
        output = forward(**inputs)
        seen.append(output.diffusion_loss.item())
        output.diffusion_loss = torch.stack([output.diffusion_loss, 3 * output.diffusion_loss])
        return output

    monkeypatch.setattr(trainer.model, "forward", two_devices)
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["diffusion_loss"] == pytest.approx(2 * seen[0])


def test_a_second_training_logs_its_own_parts(make_recipe, tmp_path):
    options = {"training__max_steps": 3, "training__logging_steps": 2, "training__save_strategy": "no"}
    trainer = trainer_of(make_recipe(tmp_path, "divla_tiny", **options))
    for _ in range(2):  # the third step of the first one is never logged
        trainer.train()
        (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
        assert entry["loss"] == pytest.approx(entry["diffusion_loss"] + entry["ntp_loss"], rel=1e-5)


def test_a_new_robot_learns_under_what_the_model_says(run, make_recipe, tmp_path, caplog):
    """Its language is frozen; no text of the data would be said when it acts."""
    options = {"model__preset": None, "model__config": None, "model__new_embodiment": True, "data__reasoning": None}
    options |= {"data__unnorm_key": "mine", "training__logging_steps": 2, "training__eval_action_samples": 1}
    options |= {"data__eval_episodes": [3], "training__per_device_eval_batch_size": 64, "training__max_steps": 2}
    folder = shutil.copytree(run[0], tmp_path / "old", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((folder / "config.json").read_text()) | {"max_reasoning_tokens": 6}
    (folder / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.INFO):
        train(make_recipe(tmp_path, "divla_latent_tiny", **options, model__path=str(folder)))
    assert "The robot learns under what the frozen model says" in caplog.text
    entries = history(tmp_path)
    for prefix in ("", "eval_"):
        (entry,) = (entry for entry in entries if f"{prefix}loss" in entry)
        assert entry[f"{prefix}ntp_loss"] == 0 and entry[f"{prefix}volume_loss"] != 0
        parts = parts_of(entry, prefix) + entry[f"{prefix}volume_loss"]
        assert entry[f"{prefix}loss"] == pytest.approx(parts, rel=1e-5)


def test_the_words_to_learn_under_are_those_to_act_under(make_recipe, tmp_path, monkeypatch):
    """Of a robot that is trained alone, in training and evaluation."""
    options = {"data__reasoning": None, "model__config__max_reasoning_tokens": 6, "training__eval_action_samples": 0}
    options |= {"training__max_steps": 1, "training__save_strategy": "no", "training__per_device_eval_batch_size": 64}
    recipe = make_recipe(tmp_path, "divla_latent_tiny", **options)
    trainer = trainer_of(recipe, [0, 300], lambda model: model.train_embodiment("robosuite_demos"))
    seen, forward = [], trainer.model.forward

    def keep(**inputs):
        seen.append((trainer.model.training, inputs))
        return forward(**inputs)

    monkeypatch.setattr(trainer.model, "forward", keep)
    trainer.train()
    trainer.evaluate()
    assert [training for training, _ in seen][:2] == [True, False]
    for _, inputs in seen[:2]:
        prompts = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
        pictures = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_grid_thw")}
        _, said = trainer.model.eval().reason(**prompts, **pictures)
        assert said.shape[1] == 6 and torch.equal(inputs["reasoning_ids"], said)


@pytest.mark.parametrize(
    ("overrides", "alone", "given", "wanted"),
    [
        ({}, True, None, True),
        ({}, False, None, False),  # learns to speak
        ({"model__config__max_reasoning_tokens": 0}, True, None, False),
        ({"data__reasoning": "subtask"}, True, None, False),  # is told what to say
        ({}, True, False, False),
        ({}, False, True, True),
    ],
)
def test_own_words_are_for_a_model_that_speaks_and_does_not_learn_to(
    overrides, alone, given, wanted, make_recipe, tmp_path
):
    options = {"data__reasoning": None, "model__config__max_reasoning_tokens": 6} | overrides
    if options["data__reasoning"]:
        del options["model__config__max_reasoning_tokens"]
    recipe = make_recipe(tmp_path, "divla_latent_tiny", **options)
    change = (lambda model: model.train_embodiment("robosuite_demos")) if alone else (lambda model: None)
    assert trainer_of(recipe, change=change, own_words=given).own_words is wanted


def test_a_model_without_words_has_none_of_its_own(make_recipe, tmp_path):
    recipe = make_recipe(tmp_path, "tinyvla_tiny")
    assert trainer_of(recipe).own_words is False
    with pytest.raises(ValueError, match="TinyVLA.* says nothing by itself: leave own_words out"):
        trainer_of(recipe, own_words=True)


def test_errors_are_those_of_actions_under_the_models_own_words(make_recipe, tmp_path, monkeypatch):
    trainer = trainer_of(make_recipe(tmp_path, "divla_tiny", model__config__max_reasoning_tokens=35))
    seen, predict_action = [], trainer.model.predict_action
    monkeypatch.setattr(
        trainer.model,
        "predict_action",
        lambda **inputs: seen.append((inputs, predict_action(**inputs))) or seen[-1][1],
    )
    trainer.action_errors(Subset(trainer.eval_dataset, [0]))
    ((inputs, output),) = seen
    assert "labels" not in inputs and output.reasoning_ids.shape[1] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__config__use_film": False}, "the model use_film False, .*checkpoint-2 was trained with True: resume"),
        ({"model__config__latent_dim": 5}, "the model latent_dim 5, .*checkpoint-2 was trained with 3: resume"),
        ({"model__config__max_reasoning_tokens": 40}, "max_reasoning_tokens 40, .* was trained with 64: resume with"),
        ({"model__config__head_config__num_inference_steps": 5}, "the model head_config {.* was trained with {"),
        ({"data__reasoning": None}, "the model max_reasoning_tokens 0, .* was trained with 64: resume with"),
    ],
)
def test_a_run_is_resumed_with_the_same_model(run, tmp_path, overrides, message):
    shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=message):
        train(run[1](tmp_path, training__resume_from_checkpoint=True, **overrides))


@pytest.mark.parametrize("name", ["prompt_config", "embodiments"])
def test_a_run_is_resumed_with_the_same_words_and_robots(name, run, tmp_path):
    folder = shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    config = json.loads((folder / "processor_config.json").read_text())
    config[name] |= {"template": "{images}{instruction}?"} if name == "prompt_config" else {"robosuite_demos": "arm"}
    (folder / "processor_config.json").write_text(json.dumps(config))
    (folder / "manifest.json").unlink()  # which says so first
    with pytest.raises(ValueError, match=f"The recipe gives another {name} than .*checkpoint-2"):
        train(run[1](tmp_path, training__resume_from_checkpoint=True))


def test_what_a_batch_says_is_the_columns_text(make_recipe, tmp_path):
    trainer = trainer_of(make_recipe(tmp_path, "divla_tiny"))
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 30)])
    processor = trainer.processing_class
    said = [processor.tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in batch["labels"]]
    column = open_datasets(make_recipe(tmp_path, "divla_tiny").data)[0].episodes.texts("subtask")
    assert said == [f"{column[row]}Next action:" for row in (0, 30)] and said[0] != said[1]
    assert "labels" not in trainer.data_collator.prompts([trainer.train_dataset[0]])["inputs"]
