"""What holds for the adapters, the precision and the activation checkpointing of every family alike."""

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, TrainerCallback

import hf_vla  # noqa: F401
from hf_vla.policy import Policy
from hf_vla.training.lora import add_lora
from hf_vla.training.run import train

# peft asks every model for an attribute that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FAMILIES = ("divla", "pi0_vla", "spatialvla", "tinyvla")
SLOW_BUT_PI0 = [pytest.param(each, marks=[pytest.mark.slow] * (each != "pi0_vla")) for each in FAMILIES]
QUICK = {"training__max_steps": 2, "data__eval_episodes": [], "training__per_device_train_batch_size": 2}
QUICK |= {"training__save_strategy": "no", "training__learning_rate": 1e-2}


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, make_trainer, make_recipe, tmp_path_factory):
    """A checkpoint of a family, and adapters that two steps have trained on it."""
    family, base = request.param, tmp_path_factory.mktemp("base")
    make_trainer(base, f"{family}_tiny").save_model()
    overrides = {"model__preset": None, "model__path": str(base), "model__config": None, "model__grid": None}
    overrides |= {"model__lora": {"r": 4, "alpha": 8}, "training__gradient_accumulation_steps": 1}
    kept = SimpleNamespace(family=family, base=base, folder=tmp_path_factory.mktemp("adapter"))

    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            kept.model = model.eval()

    kept.recipe = lambda folder, **more: make_recipe(folder, f"{family}_tiny", **QUICK | overrides | more)
    train(kept.recipe(kept.folder), callbacks=[Keep()])
    return kept


def act(model, processor, item):
    """Normalised actions or, of SpatialVLA, the scores of its action tokens."""
    images = {camera.name: item[f"observation.images.{camera.name}"] for camera in processor.camera_specs()}
    images = images if len(images) > 1 else next(iter(images.values()))
    state = {"state": item["observation.state"]} if processor.action_codec.specs()[1] else {}
    inputs = processor(images=images, text=item["task"], **state)
    generator = torch.Generator().manual_seed(0)
    if hasattr(model, "reason"):  # what two steps have taught would go on for long
        inputs["max_reasoning_tokens"] = 4
    output = model.eval().predict_action(**inputs, generator=generator)
    return output.logits.masked_fill(output.logits.isinf(), 0) if output.actions is None else output.actions


def test_an_adapter_is_loaded_like_a_model(run, demo_item):
    model, processor = AutoModel.from_pretrained(run.folder), AutoProcessor.from_pretrained(run.folder)
    assert not (run.folder / "model.safetensors").exists()
    wanted = act(run.model.get_base_model(), processor, demo_item)
    torch.testing.assert_close(act(model, processor, demo_item), wanted, rtol=0, atol=1e-5)
    untrained = AutoModel.from_pretrained(run.base)
    assert (act(untrained, processor, demo_item) - wanted).abs().max() > 1e-3
    assert processor.statistics.keys() == {"robosuite_demos"}
    policy = Policy.from_pretrained(run.folder, seed=0)
    if policy.takes_reasoning:
        policy.model.config.max_reasoning_tokens = 4
    assert np.isfinite(policy.predict_chunk(demo_item)).all()


def test_merging_changes_nothing(run, demo_item, tmp_path):
    processor = AutoProcessor.from_pretrained(run.folder)
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(run.base), run.folder)
    wanted = act(adapted.get_base_model(), processor, demo_item)
    merged = adapted.merge_and_unload()
    assert not [name for name, _ in merged.named_parameters() if "lora_" in name]
    torch.testing.assert_close(act(merged, processor, demo_item), wanted, rtol=0, atol=1e-4)
    merged.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(act(loaded, processor, demo_item), wanted, rtol=0, atol=1e-4)


def test_what_is_trained_in_full_travels_with_the_adapter(run):
    names = {name.removeprefix("base_model.model.") for name in load_file(run.folder / "adapter_model.safetensors")}
    in_full = {name.split(".")[0] for name in names if "lora_" not in name}
    assert (
        in_full
        == {
            "divla": {"action_head", "film"},
            "pi0_vla": {"action_out_proj", "embed_action_time"},
            "spatialvla": set(),
            "tinyvla": {"action_head", "backbone"},
        }[run.family]
    )
    config = json.loads((run.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run.base)


def test_the_adapters_of_pi0_sit_in_language_model_and_expert(run):
    if run.family != "pi0_vla":
        pytest.skip("of pi0 alone")
    layers = {name for name, module in run.model.named_modules() if hasattr(module, "lora_A")}
    base = "base_model.model.model"
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    names = [*attention, *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    config = run.model.config
    counts = {"vlm.language_model": config.vlm_config.text_config, "dit": config.dit_config}
    assert layers == {
        f"{base}.{part}.layers.{layer}.{name}"
        for part, text_config in counts.items()
        for layer in range(text_config.num_hidden_layers)
        for name in names
    }
    seeing = add_lora(AutoModel.from_pretrained(run.base), parts=["vision"])
    layers = {name.split(".")[3:5][-1] for name, module in seeing.named_modules() if hasattr(module, "lora_A")}
    assert layers == {"vision_tower", "layers"}  # the expert always has some


@pytest.mark.parametrize("family", SLOW_BUT_PI0)
def test_activation_checkpointing_changes_nothing(family, make_trainer, tmp_path):
    losses, options = [], {"training__max_steps": 2, "data__eval_episodes": []}
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, f"{family}_tiny", **options, training__activation_checkpointing=checkpointing)
        if family == "pi0_vla" and checkpointing:
            with pytest.raises(ValueError, match="does not support (gradient|activation) checkpointing"):
                trainer.train()
            return
        trainer.train()
        assert trainer.model.is_activation_checkpointing == checkpointing
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2


@pytest.mark.parametrize("family", SLOW_BUT_PI0)
def test_bfloat16_computes_with_float32_weights(family, make_trainer, tmp_path):
    options = {"training__max_steps": 1, "data__eval_episodes": [], "training__use_cpu": True}
    losses = {}
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, f"{family}_tiny", **options, training__bf16=bf16)
        seen = []
        layer = next(module for module in trainer.model.modules() if isinstance(module, torch.nn.Linear))
        layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.dtype))
        trainer.train()
        assert set(seen) == {torch.bfloat16 if bf16 else torch.float32}
        assert {value.dtype for value in trainer.model.parameters()} == {torch.float32}
        losses[bf16] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert losses[True] == pytest.approx(losses[False], rel=0.02) and losses[True] != losses[False]


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_adapters_on_quantised_weights(run, kind, tmp_path, demo_item):
    kept = {}

    class Keep(TrainerCallback):
        def on_train_end(self, args, state, control, model, **kwargs):
            kept["model"] = model

    options = {"model__quantization": kind, "model__dtype": "bfloat16", "training__bf16": True}
    train(run.recipe(tmp_path, **options, training__use_cpu=True), callbacks=[Keep()])
    packed = {name for name, value in kept["model"].named_parameters() if value.dtype in (torch.uint8, torch.int8)}
    assert packed and not [name for name in packed if "action" in name or "lm_head" in name or "zoe" in name]
    assert {value.dtype for value in kept["model"].parameters() if value.requires_grad} == {torch.float32}
    assert "quantization" not in (tmp_path / "config.json").read_text()
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert {value.dtype for value in model.parameters()} <= {torch.float32, torch.bfloat16}
    assert torch.isfinite(act(model.float(), processor, demo_item)).all()
