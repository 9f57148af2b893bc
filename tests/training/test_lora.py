import json
import logging

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

import hf_vla  # noqa: F401
from hf_vla.training.lora import add_lora, load_adapter
from hf_vla.training.trainer import train

# peft asks every model for an attribute that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def golden(goldens):
    return goldens / "spatialvla" / "zoe1_spatial_chunk4"


@pytest.fixture
def base(golden):
    return AutoModel.from_pretrained(golden / "checkpoint")


@pytest.fixture(scope="module")
def batches(golden):
    """Recorded inputs for inference and for training."""
    recorded = load_file(golden / "inputs.safetensors")

    def batch(kind, *more):
        names = ("input_ids", "attention_mask", "pixel_values", *more)
        return {name: recorded[f"{kind}.{name}"] for name in names} | {"intrinsics": recorded[f"{kind}.intrinsic"]}

    return batch("infer"), batch("train", "labels", "token_type_ids")


@pytest.fixture
def adapted(base):
    """Adapters that do something, and a spatial embedding that differs from the checkpoint's."""
    with torch.no_grad():
        base.spatial_embed_tokens.weight.add_(0.1)
    model = add_lora(base, r=4, alpha=8, train_spatial_embedding=True)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


def test_the_published_adapter_gives_the_recorded_outputs(golden, base, batches):
    recorded = load_file(golden / "lora_outputs.safetensors")
    load_adapter(base, golden / "lora_adapter")
    torch.testing.assert_close(logits(base, batches[0]), recorded["eval.logits"], rtol=0, atol=1e-3)
    with torch.no_grad():
        loss = base(**batches[1]).loss
    torch.testing.assert_close(loss, recorded["train.loss"][0], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # its targets match the depth model too
def test_the_published_adapter_loads_with_peft_alone(golden, base, batches):
    recorded = load_file(golden / "lora_outputs.safetensors")
    model = PeftModel.from_pretrained(base, golden / "lora_adapter")
    torch.testing.assert_close(logits(model, batches[0]), recorded["eval.logits"], rtol=0, atol=1e-3)


def test_adapters_sit_where_the_published_ones_do(golden, base, caplog):
    recorded = json.loads((golden / "lora.json").read_text())
    with caplog.at_level(logging.INFO):
        model = add_lora(base, r=4, alpha=8)
    names = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    # transformers 5 dropped a level of the vision tower
    assert {name.replace("vision_tower.", "vision_tower.vision_model.") for name in names} == {
        *recorded["matched_modules"]
    }
    assert model.get_nb_trainable_parameters() == (recorded["trainable"], recorded["total"])
    assert f"LoRA trains {recorded['trainable']} of {recorded['total']} parameters (3.11 %)" in caplog.text


def test_only_adapters_and_the_adapted_embedding_are_trained(adapted):
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert not any("vision_zoe_model" in name for name in trained)
    assert {name.rsplit(".", 1)[0] for name in trained if "lora_" not in name} == {
        "base_model.model.spatial_embed_tokens.modules_to_save.default"
    }


def test_merging_changes_nothing(adapted, batches):
    before = logits(adapted, batches[0])
    torch.testing.assert_close(logits(adapted.merge_and_unload(), batches[0]), before, rtol=0, atol=1e-4)


def test_an_adapter_loads_by_every_way(golden, adapted, batches, tmp_path):
    wanted = logits(adapted, batches[0])
    adapted.save_pretrained(tmp_path)
    by_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(golden / "checkpoint"), tmp_path)
    by_us = AutoModel.from_pretrained(golden / "checkpoint")
    assert not torch.allclose(logits(by_us, batches[0]), wanted, atol=1e-2)
    load_adapter(by_us, tmp_path)
    for model in (by_peft, by_us, AutoModel.from_pretrained(tmp_path)):
        assert torch.equal(logits(model, batches[0]), wanted)


def test_an_adapter_of_another_model_is_an_error(golden, base, adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if "projector" not in name}, path)
    with pytest.raises(ValueError, match=r"does not fit .*: 2 weights are missing.*multi_modal_projector"):
        load_adapter(AutoModel.from_pretrained(golden / "checkpoint"), tmp_path)


def test_a_recipe_trains_saves_and_resumes_an_adapter(tiny_checkpoint, make_recipe, tmp_path, demo_item):
    def recipe(folder, **overrides):
        lora = {"model__preset": None, "model__grid": None, "model__path": str(tiny_checkpoint), "model__lora__r": 4}
        return make_recipe(folder, **lora, model__adapt_grid=True, training__max_steps=4, **overrides)

    train(recipe(tmp_path, training__save_steps=2))
    base = load_file(tiny_checkpoint / "model.safetensors")["spatial_embed_tokens.weight"]
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert not torch.equal(model.get_parameter("spatial_embed_tokens.modules_to_save.default.weight"), base)
    assert processor.action_codec.keys == ["robosuite_demos"]
    assert not (tmp_path / "model.safetensors").exists()
    inputs = processor(images=demo_item["observation.images.agentview"], text=demo_item["task"])
    assert processor.decode_actions(model.predict_action(**inputs)).shape == (1, 4, 7)

    again = tmp_path / "again"
    train(recipe(again, training__resume_from_checkpoint=str(tmp_path / "checkpoint-2"), training__save_strategy="no"))
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_adapter_is_no_base_for_another(adapted, make_recipe, tmp_path):
    adapted.save_pretrained(tmp_path)
    overrides = {"model__preset": None, "model__grid": None, "model__path": str(tmp_path)}
    for lora in ({}, {"model__lora__r": 4}):
        with pytest.raises(ValueError, match="is an adapter, which a new training would drop"):
            train(make_recipe(tmp_path / "run", **overrides, **lora))


def test_alpha_scales_the_adapters(base):
    module = add_lora(base, r=4, alpha=6).get_submodule("base_model.model.multi_modal_projector.linear")
    assert module.scaling == {"default": 1.5} and module.r == {"default": 4}


def test_an_adapter_keeps_its_checkpoints_chunk_size(tiny_checkpoint, make_recipe, tmp_path):
    overrides = {"model__preset": None, "model__grid": None, "model__path": str(tiny_checkpoint), "model__lora__r": 4}
    with pytest.raises(ValueError, match="expected data.chunk_size 4, came 2"):
        train(make_recipe(tmp_path, **overrides, data__chunk_size=2))
