"""Parameter groups: what belongs to which, at which rate each learns, and training the head alone."""

import importlib.util
import shutil

import pytest
import torch
from safetensors.torch import load_file

import hf_vla  # noqa: F401
from hf_vla.models.divla.configuration_divla import DiVLAConfig
from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction
from hf_vla.models.pi0_vla.configuration_pi0_vla import PI0VLAConfig
from hf_vla.models.pi0_vla.modeling_pi0_vla import PI0VLAForActionPrediction
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.modeling_tinyvla import TinyVLAForActionPrediction
from hf_vla.training.lora import add_lora
from hf_vla.training.optimization import freeze_backbone, parameter_groups, quantization_config, split_by_group
from hf_vla.training.run import train

# peft asks every model for an attribute that transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROBOT = {"latent_dim": 4, "embodiments": {"arm": {"action_dim": 7, "state_dim": 7}}}
MODELS = {
    "divla": (DiVLAForActionPrediction, DiVLAConfig, ROBOT),
    "pi0_vla": (PI0VLAForActionPrediction, PI0VLAConfig, {}),
    "spatialvla": (SpatialVLAForConditionalGeneration, SpatialVLAConfig, {}),
    "tinyvla": (TinyVLAForActionPrediction, TinyVLAConfig, {"num_readout_tokens": 2}),
}
# family: the modules of head and embeddings, as far as their names go before a layer's own
PARTS = {
    "divla": (
        {"backbone.model.visual.merger", "film", "action_head", "embodiments"},
        {"backbone.model.language_model"},
    ),
    "pi0_vla": (
        {"model.dit", "model.vlm.multi_modal_projector", "embed_action_time", "action_out_proj"},
        {"model.vlm.language_model"},
    ),
    "spatialvla": (
        {"multi_modal_projector", "position_embedding_3d"},
        {"language_model.model.embed_tokens", "spatial_embed_tokens"},
    ),
    "tinyvla": ({"backbone.multi_modal_projector", "action_head"}, {"backbone.language_model.embed_in"}),
}


def tiny(family):
    model_class, config_class, options = MODELS[family]
    with torch.device("meta"):
        return model_class(config_class.from_preset("tiny", **options))


@pytest.mark.parametrize("family", sorted(MODELS))
def test_every_parameter_is_in_one_group(family):
    model = tiny(family)
    groups = parameter_groups(model)
    names = [name for members in groups.values() for name in members]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(names) == sorted(trained) and list(groups) == ["backbone", "head", "embeddings"]
    for group, parts in zip(("head", "embeddings"), PARTS[family], strict=True):
        found = {next((part for part in parts if name.startswith(f"{part}.")), name) for name in groups[group]}
        assert found == parts
    vocabulary = len(model.get_input_embeddings().weight)
    assert vocabulary in [len(each) for each in groups["embeddings"].values()]
    assert not [name for name in groups["backbone"] if "projector" in name or "action" in name]


@pytest.mark.parametrize("family", sorted(MODELS))
def test_adapters_are_a_group_of_their_own(family):
    groups = parameter_groups(add_lora(tiny(family)))
    assert all("lora_" in name for name in groups["lora"])
    others = {"spatialvla": set(), "tinyvla": {"head", "embeddings"}}  # readout tokens are rows of the embedding
    assert groups.keys() - {"lora"} == others.get(family, {"head"})
    assert not [name for group in groups.keys() - {"lora"} for name in groups[group] if "lora_" in name]


@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_frozen_backbone_leaves_head_and_action_tokens(family):
    model = tiny(family)
    before = parameter_groups(model)
    freeze_backbone(model)
    after = parameter_groups(model)
    assert after.pop("head").keys() == before["head"].keys()
    assert {name for members in after.values() for name in members} == (
        {"spatial_embed_tokens.weight"} if family == "spatialvla" else set()
    )


def test_readout_tokens_of_a_new_model_cannot_stay_random(make_trainer, tmp_path):
    """They are rows of the embedding, which is frozen; a checkpoint's have been trained."""
    with pytest.raises(ValueError, match="the 2 readout tokens of a new model are still random: train them by"):
        freeze_backbone(tiny("tinyvla"), is_new=True)
    options = {"model__tune": "head", "data__eval_episodes": []}
    with pytest.raises(ValueError, match="the 1 readout tokens of a new model"):
        make_trainer(tmp_path, "octo", **options)
    make_trainer(tmp_path, "octo", data__eval_episodes=[]).save_model()
    model = make_trainer(tmp_path, "octo", **options, **OF_A_CHECKPOINT, model__path=str(tmp_path)).model
    assert list(parameter_groups(model)) == ["head"]


OF_A_CHECKPOINT = {"model__preset": None, "model__config": None}


def test_a_model_without_a_head_cannot_be_trained_so():
    with pytest.raises(ValueError, match="model.tune: head leaves nothing of this Linear to be trained"):
        freeze_backbone(torch.nn.Linear(2, 2))


RATES = {"backbone": 1e-5, "head": 1e-3, "embeddings": 1e-4}


def test_groups_have_their_rates_and_keep_their_weight_decay(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, training__learning_rates=RATES, training__weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    assert trainer.create_optimizer().param_groups is groups  # a second call changes nothing
    decayed = trainer.get_decay_parameter_names(trainer.model)
    wanted = {}
    for group, members in parameter_groups(trainer.model).items():
        for name, parameter in members.items():
            wanted[id(parameter)] = (group, RATES[group], 0.1 if name in decayed else 0.0)
    found = {
        id(each): (group["name"], group["lr"], group["weight_decay"]) for group in groups for each in group["params"]
    }
    assert found == wanted and sum(len(group["params"]) for group in groups) == len(wanted)
    assert {decay for *_, decay in found.values()} == {0.0, 0.1}


def test_what_is_not_named_learns_at_the_usual_rate(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, training__learning_rates={"head": 1}, training__learning_rate=1e-3)
    rates = {group["name"]: group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == {"backbone": 1e-3, "head": 1.0, "embeddings": 1e-3}


SCHEDULES = {
    "linear": {},
    "cosine": {},
    "constant_with_warmup": {},
    "polynomial": {"power": 2.0},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 2, "min_lr_ratio": 0.1},
}


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_keep_the_ratios(name, make_trainer, tmp_path):
    trainer = make_trainer(
        tmp_path,
        training__learning_rates=RATES,
        training__lr_scheduler_type=name,
        training__lr_scheduler_kwargs=SCHEDULES[name] or None,
        training__warmup_steps=2,
    )
    trainer.create_optimizer_and_scheduler(6)
    seen = []
    for _ in range(6):
        rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
        factor = rates["head"] / RATES["head"]
        assert rates == pytest.approx({group: factor * rate for group, rate in RATES.items()})
        seen.append(rates["head"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert seen[0] < seen[1] < seen[2] == pytest.approx(1e-3)  # warmed up
    assert (seen[-1] < 1e-3) == (name != "constant_with_warmup")


def test_the_rate_of_each_group_is_logged(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, training__learning_rates=RATES, training__max_steps=2)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for group, rate in RATES.items():
        assert [entry[f"learning_rate_{group}"] for entry in logged] == pytest.approx([rate, rate / 2])
    assert [entry["learning_rate"] for entry in logged] == pytest.approx([1e-5, 5e-6])  # the first group's


@pytest.mark.parametrize("recipe", ["tinyvla_tiny", "pi0_vla_tiny"])
def test_a_group_without_parameters_is_an_error(recipe, make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, recipe, training__learning_rates={"lora": 1e-4}, model__tune="head")
    with pytest.raises(
        ValueError, match=r"names \['lora'\], of which this run trains nothing; it trains head \(\d+ parameters\)"
    ):
        trainer.create_optimizer()


def test_groups_of_one_optimizer_are_cut_in_place():
    model = torch.nn.ModuleDict({"action_head": torch.nn.Linear(2, 2), "tower": torch.nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    split_by_group(optimizer, model, {"head": 0.2})
    assert [(group["name"], group["lr"], group["momentum"]) for group in optimizer.param_groups] == [
        ("backbone", 0.1, 0.5),
        ("head", 0.2, 0.5),
    ]


def test_resuming_keeps_the_rates(make_recipe, tmp_path):
    options = {
        "training__learning_rates": RATES,
        "training__per_device_train_batch_size": 2,
        "data__eval_episodes": [],
    }
    train(make_recipe(tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    train(make_recipe(tmp_path / "again", **options, training__resume_from_checkpoint=True))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("recipe", ["divla_tiny", "pi0_vla_tiny", "spatialvla_tiny", "tinyvla_tiny"])
def test_the_head_alone_is_trained(recipe, make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, recipe, model__tune="head", training__max_steps=2, data__eval_episodes=[])
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    groups = parameter_groups(trainer.model, trained_only=False)
    assert changed and changed <= groups["head"].keys() | {"spatial_embed_tokens.weight"}
    assert ("spatial_embed_tokens.weight" in changed) == (recipe == "spatialvla_tiny")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantization_without_bitsandbytes_is_an_error(tiny_checkpoint, make_trainer, tmp_path):
    options = {"model__preset": None, "model__grid": None, "model__path": str(tiny_checkpoint), "model__lora__r": 4}
    with pytest.raises(ValueError, match="model.quantization: 4bit needs bitsandbytes: `pip install bitsandbytes`"):
        make_trainer(tmp_path, **options, model__quantization="4bit")


def test_heads_are_not_quantised():
    pytest.importorskip("bitsandbytes")
    config = quantization_config("4bit", "bfloat16")
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert {rf"(.*\.)?{name}" for name in ("action_head", "lm_head")} <= {*config.llm_int8_skip_modules}
    assert quantization_config("8bit", "bfloat16").load_in_8bit
