import json
import logging
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, SiglipVisionConfig

import hf_vla  # noqa: F401
from hf_vla.models.divla.configuration_divla import DiVLAConfig
from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.modeling_tinyvla import TinyVLAForActionPrediction
from hf_vla.training.lora import PARTS, PROJECTORS, add_lora, load_adapter
from hf_vla.training.run import train

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
    model = add_lora(base, r=4, alpha=8, in_full=["spatial_embed_tokens"])
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
    torch.testing.assert_close(logits(base, batches[0])[..., ::8], recorded["eval.logits"], rtol=0, atol=1e-3)
    with torch.no_grad():
        loss = base(**batches[1]).loss
    torch.testing.assert_close(loss, recorded["train.loss"][0], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")  # its targets match the depth model too
def test_the_published_adapter_loads_with_peft_alone(golden, base, batches):
    recorded = load_file(golden / "lora_outputs.safetensors")
    model = PeftModel.from_pretrained(base, golden / "lora_adapter")
    torch.testing.assert_close(logits(model, batches[0])[..., ::8], recorded["eval.logits"], rtol=0, atol=1e-3)


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
        with pytest.raises(ValueError, match="model.path .* is an adapter, which a new training would drop"):
            train(make_recipe(tmp_path / "run", **overrides, **lora))
    with pytest.raises(ValueError, match="model.backbone .* is an adapter, which a new training would drop"):
        train(make_recipe(tmp_path / "run", "tinyvla_lora", model__backbone=str(tmp_path), training__bf16=False))


@pytest.mark.parametrize(
    ("family", "published"),
    [
        ("divla", (64, 256, 0.05, True)),
        ("spatialvla", (32, 32, 0.0, "gaussian")),
        ("tinyvla", (64, 256, 0.05, True)),
    ],
)
def test_where_nothing_is_said_the_published_values_hold(family, published, tiny_checkpoint):
    if family == "spatialvla":
        model = AutoModel.from_pretrained(tiny_checkpoint)
    elif family == "tinyvla":
        model = TinyVLAForActionPrediction(TinyVLAConfig.from_preset("tiny"))
    else:
        model = DiVLAForActionPrediction(DiVLAConfig.from_preset("tiny"))
    config = add_lora(model).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.init_lora_weights) == published


def test_alpha_scales_the_adapters(base):
    module = add_lora(base, r=4, alpha=6).get_submodule("base_model.model.multi_modal_projector.linear")
    assert module.scaling == {"default": 1.5} and module.r == {"default": 4}


def test_an_adapter_keeps_its_checkpoints_chunk_size(tiny_checkpoint, make_recipe, tmp_path):
    overrides = {"model__preset": None, "model__grid": None, "model__path": str(tiny_checkpoint), "model__lora__r": 4}
    with pytest.raises(ValueError, match="expected data.chunk_size 4, came 2"):
        train(make_recipe(tmp_path, **overrides, data__chunk_size=2))


SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
QWEN_VISION = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16}
# model type: configuration, and how many Linear layers vision tower and language model have
BACKBONES = {
    "llava": ({"vision_config": SIGLIP, "text_config": LLAMA, "image_token_index": 259}, 13),
    "paligemma": (
        {
            "vision_config": SIGLIP,
            "image_token_id": 259,
            "text_config": {**LLAMA, "model_type": "gemma", "head_dim": 8},
        },
        13,
    ),
    "idefics3": (
        {
            "vision_config": {**SIGLIP, "model_type": "idefics3_vision"},
            "image_token_id": 259,
            "text_config": LLAMA,
            "scale_factor": 2,
        },
        13,
    ),
    "smolvlm": (
        {
            "vision_config": {**SIGLIP, "model_type": "smolvlm_vision"},
            "image_token_id": 259,
            "text_config": LLAMA,
            "scale_factor": 2,
        },
        13,
    ),
    "qwen2_vl": (
        {"vision_config": QWEN_VISION, "image_token_id": 259, "text_config": {**LLAMA, "model_type": "qwen2_vl_text"}},
        11,
    ),
}


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_every_backbone_gets_adapters_in_vision_tower_and_language_model(name):
    backbone, count = BACKBONES[name]
    config = TinyVLAConfig(
        backbone_config={"model_type": name, **backbone}, head_config={"type": "regression"}, action_dim=2
    )
    with torch.device("meta"):
        model = add_lora(TinyVLAForActionPrediction(config))
    adapted = {layer for layer, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == count, sorted(adapted)
    assert not [layer for layer in adapted if any(part in layer for part in ("action_head", *PROJECTORS))]
    assert any("vis" in layer for layer in adapted)
    assert any(part in layer for layer in adapted for part in ("language_model.layers", "text_model.layers"))
    trained = {weight for weight, parameter in model.named_parameters() if parameter.requires_grad}
    in_full = {weight.split(".modules_to_save")[0] for weight in trained if "lora_" not in weight}
    assert len(in_full) == 2 and "base_model.model.action_head" in in_full
    assert (in_full - {"base_model.model.action_head"}).pop().endswith(PROJECTORS)


@pytest.mark.parametrize("name", sorted(BACKBONES))
@pytest.mark.parametrize("part", ["vision", "language"])
def test_adapters_sit_in_the_chosen_parts(name, part):
    config = TinyVLAConfig(
        backbone_config={"model_type": name, **BACKBONES[name][0]}, head_config={"type": "regression"}, action_dim=2
    )
    with torch.device("meta"):
        model = add_lora(TinyVLAForActionPrediction(config), parts=[part])
    adapted = {layer for layer, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted and {any(f".{tower}." in layer for tower in PARTS[part]) for layer in adapted} == {True}


def test_spatialvla_keeps_its_projector_whichever_part_is_chosen(tiny_checkpoint):
    layers = {
        part: {
            layer.removeprefix("base_model.model.").split(".")[0]
            for layer, module in add_lora(AutoModel.from_pretrained(tiny_checkpoint), parts=[part]).named_modules()
            if hasattr(module, "lora_A")
        }
        for part in PARTS
    }
    assert layers["vision"] == {"vision_tower", "multi_modal_projector", "position_embedding_3d"}
    assert layers["language"] == {"language_model", "multi_modal_projector", "position_embedding_3d"}


def test_an_unknown_part_is_an_error(tiny_checkpoint):
    for parts in ([], ["tower"]):
        with pytest.raises(ValueError, match="lora.parts"):
            add_lora(AutoModel.from_pretrained(tiny_checkpoint), parts=parts)


def test_readout_tokens_are_trained_beside_adapters(tmp_path):
    torch.manual_seed(0)
    model = TinyVLAForActionPrediction(
        TinyVLAConfig.from_preset("tiny", num_readout_tokens=2, head_config={"type": "regression"})
    )
    model.resize_token_embeddings(320)
    model.save_pretrained(tmp_path / "base")
    adapted = add_lora(AutoModel.from_pretrained(tmp_path / "base"), r=4)
    batch = {
        "input_ids": torch.tensor([[1, 2, 260, 261]]),
        "state": torch.ones(1, 7),
        "actions": torch.ones(1, 16, 10),
        "action_mask": torch.ones(1, 16, dtype=torch.bool),
    }
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=1.0)
    adapted(**batch).loss.backward()
    optimizer.step()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    trained = adapted.get_base_model().get_input_embeddings()(torch.arange(320))
    changed = (trained != model.get_input_embeddings().weight).any(-1).nonzero()[:, 0]
    assert changed.tolist() == [260, 261]
    loaded = AutoModel.from_pretrained(tmp_path / "adapter").get_input_embeddings()(torch.arange(320))
    torch.testing.assert_close(loaded, trained)


@pytest.mark.parametrize(
    ("preset", "total", "trainable", "adapters"),
    [("s", 421.8, 23.2, 6.9), ("b", 740.4, 17.2, 6.7), ("h", 1317.4, 12.1, 4.5)],
)
def test_the_trainable_shares_of_tinyvla_are_the_published_ones(preset, total, trainable, adapters, caplog):
    with torch.device("meta"), caplog.at_level(logging.INFO):
        model = TinyVLAForActionPrediction(TinyVLAConfig.from_preset(preset))
        before = sum(parameter.numel() for parameter in model.parameters())
        adapted = add_lora(model)
    assert round(before / 1e6, 1) == total
    lora = sum(parameter.numel() for name, parameter in adapted.named_parameters() if "lora_" in name)
    said = float(re.search(r"parameters \(([\d.]+) %\)", caplog.text).group(1))
    assert (round(said, 1), round(100 * lora / (before + lora), 1)) == (trainable, adapters)


def divla(name, **options):
    """A DiVLA on one of the backbones, on the meta device."""
    config = {"backbone_config": {"model_type": name, **BACKBONES[name][0]}, "end_token_id": 1, "action_dim": 2}
    with torch.device("meta"):
        return DiVLAForActionPrediction(DiVLAConfig(**config, head_config={"type": "regression"}, **options))


@pytest.mark.parametrize("name", sorted(BACKBONES))
@pytest.mark.parametrize("parts", [["vision"], ["language"], ["vision", "language"]])
def test_the_adapters_of_a_divla_sit_in_the_chosen_parts_and_nowhere_else(name, parts):
    model = add_lora(divla(name, latent_dim=4), parts=parts)
    adapted = {layer for layer, module in model.named_modules() if hasattr(module, "lora_A")}
    towers = [{tower for tower in PARTS[part] if any(f".{tower}." in layer for layer in adapted)} for part in parts]
    assert all(len(found) == 1 for found in towers)
    assert all(any(f".{tower}." in layer for found in towers for tower in found) for layer in adapted)
    assert not [layer for layer in adapted if layer.endswith("lm_head") or any(each in layer for each in PROJECTORS)]
    if len(parts) == 2:
        assert len(adapted) == BACKBONES[name][1]
    trained = {weight for weight, parameter in model.named_parameters() if parameter.requires_grad}
    in_full = {weight.split(".modules_to_save")[0] for weight in trained if "lora_" not in weight}
    film = ["film.prompt_proj", "film.reasoning_proj", "film.film"]
    assert in_full == {f"base_model.model.{each}" for each in ["action_head", *film, "embodiments.default"]}


def test_the_layers_that_a_divla_adapts_are_the_published_ones():
    layers = {name for name, module in add_lora(divla("qwen2_vl")).named_modules() if hasattr(module, "lora_A")}
    vision = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    language = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    model = "base_model.model.backbone.model"
    assert layers == {
        *(f"{model}.visual.blocks.0.{name}" for name in vision),
        *(f"{model}.language_model.layers.0.{name}" for name in language),
    }


def test_a_divla_without_film_or_latents_has_no_such_parts():
    names = {
        name for name, each in add_lora(divla("qwen2_vl", use_film=False)).named_parameters() if each.requires_grad
    }
    assert {name.split(".")[2] for name in names} == {"backbone", "action_head"}


def test_the_trainable_share_of_divla_is_the_published_one(caplog):
    with torch.device("meta"), caplog.at_level(logging.INFO):
        model = DiVLAForActionPrediction(DiVLAConfig.from_preset("2b"))
        before = sum(parameter.numel() for parameter in model.parameters())
        adapted = add_lora(model)
    lora = sum(parameter.numel() for name, parameter in adapted.named_parameters() if "lora_" in name)
    said = float(re.search(r"parameters \(([\d.]+) %\)", caplog.text).group(1))
    assert (round(before / 1e6), round(said, 1), round(100 * lora / (before + lora), 1)) == (2313, 9.0, 4.8)


def test_a_family_without_published_targets_is_an_error():
    with pytest.raises(ValueError, match=r"No LoRA targets are published for 'siglip_vision_model', only for"):
        add_lora(AutoModel.from_config(SiglipVisionConfig(**{k: v for k, v in SIGLIP.items() if k != "model_type"})))
