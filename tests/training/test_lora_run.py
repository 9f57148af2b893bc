"""Adapters through the trainer: saved, moved, resumed, in two precisions, at two learning rates."""

import json
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, TrainerCallback

import hf_vla  # noqa: F401
from hf_vla.models.processing import ContinuousActionProcessor
from hf_vla.policy import Policy
from hf_vla.training.builders.registry import build
from hf_vla.training.datasets import open_datasets
from hf_vla.training.run import train
from hf_vla.training.trainer import VLATrainer

# peft asks every model for an attribute that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def divla_run(qwen, small_head, make_recipe, tmp_path_factory):
    """The same of a DiVLA with latents, whose backbone is a tiny Qwen2-VL."""

    def recipe(folder, **overrides):
        options = {"model__backbone": str(qwen), "model__lora": {"r": 4, "alpha": 8}, "training__bf16": False}
        head = small_head["head_config"] | {"type": "flow_matching"}  # it clips no latents
        options |= {"model__config": {"head_config": head, "latent_dim": 6, "max_reasoning_tokens": 36}}
        options |= {"training__dataloader_num_workers": 0, "training__learning_rate": 1e-2}
        options |= {"training__learning_rates": {"head": 1e-2}, "training__max_steps": 4, "training__save_steps": 2}
        options |= {"data__chunk_size": 4, "training__per_device_train_batch_size": 2, "data__eval_episodes": []}
        return make_recipe(folder, "divla_lora", **(options | overrides))

    folder = tmp_path_factory.mktemp("divla_lora")
    kept = SimpleNamespace(folder=folder, recipe=recipe)

    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            kept.model = model.eval()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        train(recipe(folder), callbacks=[Keep()])
    return kept


@pytest.fixture(scope="module")
def tinyvla_run(vlm, small_head, make_recipe, tmp_path_factory):
    """Adapters of four steps on a pretrained backbone with a new head, a checkpoint every two steps."""

    def recipe(folder, **overrides):
        options = {
            "model__backbone": str(vlm),
            "model__config": small_head,
            "model__lora": {"r": 4, "alpha": 8},
            "training__bf16": False,
        }
        options |= {"training__dataloader_num_workers": 0, "training__learning_rate": 1e-2}
        options |= {"training__learning_rates": {"head": 1e-3}, "training__max_steps": 4, "training__save_steps": 2}
        options |= {"data__chunk_size": 4, "training__per_device_train_batch_size": 2, "data__eval_episodes": []}
        return make_recipe(folder, "tinyvla_lora", **(options | overrides))

    folder = tmp_path_factory.mktemp("tinyvla_lora")
    kept = SimpleNamespace(folder=folder, recipe=recipe)

    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, model, optimizer, **kwargs):
            kept.model, kept.groups = model, optimizer.param_groups

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        train(recipe(folder), callbacks=[Keep()])
    kept.model.eval()
    return kept


def predict(model, processor, item, **more):
    names = [camera.name for camera in processor.camera_specs()]
    images = {name: item[f"observation.images.{name}"] for name in names}
    inputs = processor(images=images, text=item["task"], state=item["observation.state"], **more)
    return model.predict_action(**inputs, generator=torch.Generator().manual_seed(0)).actions


def test_an_adapter_carries_head_projector_and_statistics(tinyvla_run, vlm, demo_item):
    folder = tinyvla_run.folder
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.statistics["robosuite_demos"].keys() >= {"action", "state"}
    wanted = predict(tinyvla_run.model.get_base_model(), processor, demo_item)
    loaded = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(predict(loaded, processor, demo_item), wanted, rtol=0, atol=1e-5)
    base = AutoModel.from_pretrained(folder / "base")
    assert (predict(base, processor, demo_item) - wanted).abs().max() > 1e-2

    chunk = Policy(loaded, processor, seed=0).predict_chunk(demo_item)
    np.testing.assert_allclose(Policy.from_pretrained(folder, seed=0).predict_chunk(demo_item), chunk, atol=1e-5)
    before, after = load_file(vlm / "model.safetensors"), load_file(folder / "base" / "model.safetensors")
    name = "language_model.layers.0.mlp.dense_h_to_4h.weight"
    (original,) = (value for key, value in before.items() if key.endswith(name.removeprefix("language_model.")))
    assert torch.equal(after[f"backbone.{name}"], original)  # the pretrained weights went in


@pytest.mark.parametrize("name", [".", "checkpoint-2"])
def test_an_adapter_that_moved_finds_the_base_that_moved_with_it(tinyvla_run, demo_item, tmp_path, name):
    moved = shutil.copytree(tinyvla_run.folder, tmp_path / "moved")
    config = json.loads((moved / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tinyvla_run.folder / "base")
    config["base_model_name_or_path"] = str(tmp_path / "gone" / "base")
    (moved / name / "adapter_config.json").write_text(json.dumps(config))
    wanted = Policy.from_pretrained(tinyvla_run.folder / name, seed=0).predict_chunk(demo_item)
    assert np.array_equal(Policy.from_pretrained(moved / name, seed=0).predict_chunk(demo_item), wanted)
    shutil.rmtree(moved / "base")
    with pytest.raises(ValueError, match="is an adapter of .*gone.*, which is not there: put it back, lay it in"):
        AutoModel.from_pretrained(moved / name)


def test_an_adapter_takes_its_own_base_and_not_what_lies_where_it_was(tinyvla_run, demo_item, tmp_path):
    moved = shutil.copytree(tinyvla_run.folder, tmp_path / "moved")
    other = shutil.copytree(tinyvla_run.folder / "base", tmp_path / "other" / "base")
    (other / "model.safetensors").write_bytes(b"another run's")
    config = json.loads((moved / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(other)
    (moved / "adapter_config.json").write_text(json.dumps(config))
    wanted = Policy.from_pretrained(tinyvla_run.folder, seed=0).predict_chunk(demo_item)
    assert np.array_equal(Policy.from_pretrained(moved, seed=0).predict_chunk(demo_item), wanted)


def make(recipe, checkpoint=None):
    return build(recipe, open_datasets(recipe.data), checkpoint)[0]


def test_resuming_takes_the_base_of_the_checkpoint(tinyvla_run, tmp_path):
    """Another seed draws another head; the base comes along where the training goes on elsewhere."""
    before = load_file(tinyvla_run.folder / "base" / "model.safetensors")
    torch.manual_seed(7)
    model = make(tinyvla_run.recipe(tmp_path), str(tinyvla_run.folder / "checkpoint-2"))
    head = model.get_base_model().action_head.original_module.state_dict()
    assert all(torch.equal(value, before[f"action_head.{name}"]) for name, value in head.items())
    own = load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(before[name], own[name]) for name in before)
    assert AutoProcessor.from_pretrained(tmp_path / "base").statistics.keys() == {"robosuite_demos"}
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    shutil.copytree(tinyvla_run.folder / "checkpoint-2", tmp_path / "checkpoint-2")
    make(tinyvla_run.recipe(tmp_path), str(tmp_path / "checkpoint-2"))
    assert {path: path.stat().st_mtime_ns for path in written if path != tmp_path} == {
        path: time for path, time in written.items() if path != tmp_path
    }


def test_without_a_checkpoint_the_base_of_an_earlier_try_is_replaced(tinyvla_run, tmp_path):
    """Also where resuming was asked for, as a script that is started again and again does."""
    shutil.copytree(tinyvla_run.folder / "base", tmp_path / "base")
    (tmp_path / "base" / "left.safetensors").touch()
    other = {"model__config": {"head_config": {"type": "regression"}}, "training__max_steps": 1}
    train(tinyvla_run.recipe(tmp_path, **other, training__resume_from_checkpoint=True))
    for folder in (tmp_path, tmp_path / "base"):
        assert AutoModel.from_pretrained(folder).config.head_config["type"] == "regression"
    assert not (tmp_path / "base" / "left.safetensors").exists()
    with pytest.raises(ValueError, match="The recipe gives the model head_config .*, .*checkpoint-1 was trained with"):
        train(tinyvla_run.recipe(tmp_path, training__resume_from_checkpoint=True))
    assert AutoModel.from_pretrained(tmp_path / "base").config.head_config["type"] == "regression"  # as it was


def test_a_base_that_cannot_be_saved_leaves_the_earlier_one(tinyvla_run, tmp_path, monkeypatch):
    shutil.copytree(tinyvla_run.folder / "base", tmp_path / "base")
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    monkeypatch.setattr(ContinuousActionProcessor, "save_pretrained", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tinyvla_run.recipe(tmp_path, training__seed=7))
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_whole_weights_are_not_gone_on_from_with_adapters(tinyvla_run, tmp_path):
    with pytest.raises(ValueError, match="base holds whole weights, no adapters: leave model.lora out"):
        make(tinyvla_run.recipe(tmp_path), str(tinyvla_run.folder / "base"))


def test_a_base_beside_the_adapters_of_another_model_is_an_error(tinyvla_run, tmp_path):
    shutil.copytree(tinyvla_run.folder / "base", tmp_path / "base")
    options = {"model__backbone": None, "model__config": None, "model__path": str(tinyvla_run.folder / "base")}
    with pytest.raises(ValueError, match=r"base is what another training's adapters were added to, and would be"):
        make(tinyvla_run.recipe(tmp_path, **options))


def test_one_process_saves_the_base_and_all_know_its_name(tinyvla_run, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_vla.training.arguments.VLATrainingArguments.should_save", False)
    model = make(tinyvla_run.recipe(tmp_path))
    assert not (tmp_path / "base").exists()
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")


def test_a_divla_adapter_carries_all_that_was_trained(divla_run, demo_item, tmp_path):
    processor = AutoProcessor.from_pretrained(divla_run.folder)
    assert processor.statistics["robosuite_demos"].keys() >= {"action", "state"}
    assert processor.embodiments == {"robosuite_demos": "robosuite_demos"}
    said = {"reasoning": "grasp the can"}  # modulates
    wanted = predict(divla_run.model.get_base_model(), processor, demo_item, **said)
    base = AutoModel.from_pretrained(divla_run.folder / "base")
    loaded = AutoModel.from_pretrained(divla_run.folder)
    torch.testing.assert_close(predict(loaded, processor, demo_item, **said), wanted, rtol=0, atol=1e-5)
    trained = load_file(divla_run.folder / "adapter_model.safetensors")
    for part in ("action_head", "film.prompt_proj", "film.reasoning_proj", "film.film", "embodiments.robosuite_demos"):
        names = {name: value for name, value in trained.items() if name.startswith(f"base_model.model.{part}.")}
        own, untrained = loaded.get_submodule(part), base.get_submodule(part).state_dict()
        own = getattr(own, "modules_to_save", {"default": own})["default"].state_dict()
        assert len(names) == len(untrained), part
        assert all(torch.equal(value, trained[f"base_model.model.{part}.{name}"]) for name, value in own.items())
        assert any(not torch.equal(value, untrained[name]) for name, value in own.items()), part

    adapted = PeftModel.from_pretrained(base, divla_run.folder).eval()
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(predict(merged, processor, demo_item, **said), wanted, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(predict(again, processor, demo_item, **said), wanted, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_resuming_a_divla_adapter_equals_an_uninterrupted_run(divla_run, tmp_path):
    checkpoint = str(divla_run.folder / "checkpoint-2")
    train(divla_run.recipe(tmp_path, training__resume_from_checkpoint=checkpoint, training__save_strategy="no"))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (divla_run.folder, tmp_path))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


BFLOAT16 = {"model__dtype": "bfloat16", "training__bf16": True, "training__use_cpu": True}


@pytest.mark.parametrize(
    "family", ["tinyvla", *(pytest.param(each, marks=pytest.mark.slow) for each in ("divla", "spatialvla"))]
)
def test_what_is_trained_is_float32_on_a_bfloat16_model(
    family, divla_run, tinyvla_run, tiny_checkpoint, small_head, make_recipe, tmp_path, demo_item
):
    seen = {}

    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            seen.update({name: value.clone() for name, value in model.named_parameters() if value.requires_grad})

        def on_train_end(self, args, state, control, model, **kwargs):
            seen["model"] = model

    options = {**BFLOAT16, "training__save_strategy": "no", "training__max_steps": 2, "data__eval_episodes": [3]}
    options |= {"training__eval_action_samples": 1, "training__per_device_eval_batch_size": 32}
    words = {"max_reasoning_tokens": 4} if family == "divla" else {}  # what is said takes longest
    if family == "tinyvla":
        options["model__config"] = {**small_head, "num_readout_tokens": 2}
        options |= {"training__learning_rate": 2e-4, "training__learning_rates": {"head": 2e-5}}
        recipe = tinyvla_run.recipe(tmp_path, **options)
    elif family == "divla":
        recipe = divla_run.recipe(tmp_path, **options)
    else:
        options |= {"model__preset": None, "model__grid": None, "model__path": str(tiny_checkpoint)}
        options |= {"model__lora__r": 4, "model__adapt_grid": True, "training__learning_rate": 2e-5}
        recipe = make_recipe(tmp_path, **options)
    metrics = train(recipe, callbacks=[Keep()])
    assert np.isfinite(metrics["eval_action_error"])
    model = seen.pop("model")
    if family == "divla":  # also without autocast: all that is trained in full sees inputs of its own precision
        predict(model.eval().get_base_model(), AutoProcessor.from_pretrained(tmp_path), demo_item, reasoning="reach")
    assert {value.dtype for value in model.parameters() if not value.requires_grad} == {torch.bfloat16}
    in_full = {name: value for name, value in model.named_parameters() if name in seen and "lora_" not in name}
    assert {value.dtype for value in seen.values()} == {torch.float32} and in_full
    moved = torch.cat([(value != seen[name]).flatten() for name, value in in_full.items() if value.ndim > 1])
    assert moved.float().mean() > (0.9 if family == "tinyvla" else 0)  # most of a grid's ids are seen in no batch
    for dtype in (torch.float32, torch.bfloat16):
        loaded = AutoModel.from_pretrained(tmp_path, dtype=dtype)
        assert {value.dtype for name, value in loaded.named_parameters() if "lora_" not in name} == {dtype}
        policy = Policy(loaded, AutoProcessor.from_pretrained(tmp_path), seed=0, **words)
        assert np.isfinite(policy.predict_chunk(demo_item)).all()


def test_merging_a_trained_tinyvla_changes_nothing(tinyvla_run, demo_item, tmp_path):
    processor = AutoProcessor.from_pretrained(tinyvla_run.folder)
    base = AutoModel.from_pretrained(tinyvla_run.folder / "base")
    adapted = PeftModel.from_pretrained(base, tinyvla_run.folder).eval()
    before = predict(adapted.get_base_model(), processor, demo_item)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(predict(merged, processor, demo_item), before, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(
        predict(AutoModel.from_pretrained(tmp_path), processor, demo_item), before, rtol=0, atol=1e-4
    )


def test_adapters_and_what_is_trained_in_full_have_their_own_learning_rates(tinyvla_run):
    names = {id(parameter): name for name, parameter in tinyvla_run.model.named_parameters()}
    seen = []
    for group in tinyvla_run.groups:
        members = [names[id(parameter)] for parameter in group["params"]]
        assert {"lora_" in name for name in members} == {group["initial_lr"] == 1e-2}
        assert group["initial_lr"] in (1e-2, 1e-3)
        seen += members
    assert sorted(seen) == sorted(
        name for name, parameter in tinyvla_run.model.named_parameters() if parameter.requires_grad
    )
    assert any("action_head" in name for name in seen) and any("projector" in name for name in seen)


def test_weight_decay_spares_biases_and_norms_at_both_rates(tinyvla_run):
    trainer = VLATrainer(
        model=tinyvla_run.model,
        args=tinyvla_run.recipe(tinyvla_run.folder / "unused", training__weight_decay=0.1).training,
    )
    names = {id(parameter): name for name, parameter in tinyvla_run.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    assert trainer.create_optimizer().param_groups is groups  # a second call changes nothing
    assert sorted((group["lr"], group["weight_decay"]) for group in groups) == [(1e-3, 0.0), (1e-3, 0.1), (1e-2, 0.1)]
    for group in groups:
        assert all(names[id(each)].endswith("bias") or each.ndim == 1 for each in group["params"]) == (
            group["weight_decay"] == 0.0
        )


def test_resuming_keeps_both_learning_rates(tinyvla_run, tmp_path):
    checkpoint = str(tinyvla_run.folder / "checkpoint-2")
    train(tinyvla_run.recipe(tmp_path, training__resume_from_checkpoint=checkpoint, training__save_strategy="no"))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tinyvla_run.folder, tmp_path))
    assert first.keys() == second.keys() and any("action_head" in name for name in first)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
