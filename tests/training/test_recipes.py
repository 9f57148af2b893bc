"""Every recipe in scripts/recipes loads, and those that run on the example data train and predict."""

from pathlib import Path

import numpy as np
import pytest
import take_backbone
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from hf_vla.actions.heads.registry import build_action_head
from hf_vla.models.divla.scale_dp import SCALE_DP_HEADS
from hf_vla.policy import Policy
from hf_vla.training.builders.registry import BUILDERS
from hf_vla.training.recipe import load_recipe
from hf_vla.training.run import train

RECIPES = {path.stem: path for path in (Path(__file__).parents[2] / "scripts" / "recipes").glob("*.yaml")}
# name: head, chunk, readout tokens, whether the state is used, cameras
SYSTEMS = {
    "cogact": ("diffusion", 16, 0, False, 1),
    "divla_latent_tiny": ("diffusion", 4, 0, True, 2),
    "divla_lora": ("diffusion", 16, 0, True, 2),
    "divla_scaledp": ("diffusion", 16, 0, True, 2),
    "divla_tiny": ("diffusion", 4, 0, True, 2),
    "diffusion_policy": ("diffusion", 16, 0, True, 2),
    "octo": ("diffusion", 4, 1, False, 2),
    "openvla_oft": ("regression", 8, 56, True, 2),
    "pi0_vla_tiny": (None, 4, 0, True, 2),  # transformers' own network
    "pi0": ("flow_matching", 16, 0, True, 2),
    "regression": ("regression", 4, 0, True, 2),
    "rt1": ("classification", 1, 0, False, 2),
    "tinyvla_head": ("diffusion", 16, 0, True, 2),
    "tinyvla_lora": ("diffusion", 16, 0, True, 2),
    "tinyvla_tiny": ("diffusion", 4, 0, True, 2),
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_loads(name):
    recipe = load_recipe(RECIPES[name], {"training.use_cpu": True})
    assert recipe.model.path is not None or recipe.model.family in BUILDERS
    assert recipe.training.output_dir == f"outputs/{name}"


def test_the_recipe_of_discrete_diffusion_trains_and_predicts(make_recipe, demo_item, tmp_path):
    options = {"data__eval_episodes": [6], "training__max_steps": 2, "training__eval_strategy": "steps"}
    options |= {"training__eval_steps": 2, "training__save_strategy": "no", "training__per_device_eval_batch_size": 3}
    recipe = make_recipe(tmp_path, "discrete_diffusion", **options, training__per_device_train_batch_size=2)
    assert np.isfinite(train(recipe)["eval_action_error"])
    policy = Policy.from_pretrained(tmp_path)
    config = policy.model.config
    assert (config.decoding, config.num_decoding_steps, len(config.action_ranges(4))) == ("discrete_diffusion", 4, 12)
    chunk = policy.predict_chunk(demo_item)
    assert chunk.shape == (4, 7) and np.array_equal(Policy.from_pretrained(tmp_path).predict_chunk(demo_item), chunk)


# peft asks every model for an attribute that transformers is about to rename.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_a_recipe_trains_and_predicts(name, make_recipe, vlm, qwen, small_head, demo_item, tmp_path):
    overrides = {}
    if load_recipe(RECIPES[name], {"training.use_cpu": True}).model.backbone is not None:  # of a size for tests
        overrides = {"model__backbone": str(vlm if name.startswith("tinyvla_") else qwen)}
        overrides |= {"training__bf16": False, "training__dataloader_num_workers": 0}
        if name == "divla_scaledp":
            options = {"depth": 2, "hidden_size": 16, "num_heads": 2}
            overrides |= {f"model__config__head_config__denoiser__{key}": value for key, value in options.items()}
        else:
            overrides["model__config"] = small_head
    recipe = make_recipe(
        tmp_path,
        name,
        data__eval_episodes=[],
        training__max_steps=2,
        training__per_device_train_batch_size=2,
        training__save_strategy="no",
        **overrides,
    )
    metrics = train(recipe)
    assert np.isfinite(metrics["train_loss"])

    head, chunk_size, num_readout_tokens, state, num_cameras = SYSTEMS[name]
    policy = Policy.from_pretrained(tmp_path, seed=0)
    if policy.takes_reasoning:  # what two steps have taught would go on for long
        policy.model.config.max_reasoning_tokens = 8
    config = policy.model.config
    found = getattr(config, "head_config", {}).get("type"), getattr(config, "num_readout_tokens", 0)
    assert found == (head, num_readout_tokens)
    assert (policy.takes_state, len(policy.cameras)) == (state, num_cameras)
    chunk = policy.predict_chunk(demo_item)
    assert chunk.shape == (chunk_size, 7) and np.isfinite(chunk).all()
    again = Policy.from_pretrained(tmp_path, seed=0)
    again.model.config = policy.model.config
    assert np.array_equal(again.predict_chunk(demo_item), chunk)
    assert np.array_equal(Policy(policy.model, policy.processor, seed=1).predict_chunk(demo_item), chunk) == (
        head in ("classification", "regression")
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["spatialvla_adapt", "spatialvla_full", "spatialvla_lora"])
def test_a_recipe_for_a_checkpoint_trains_what_it_says(name, make_recipe, tiny_checkpoint, tmp_path):
    options = {"model__path": str(tiny_checkpoint), "data__eval_episodes": [], "training__save_strategy": "no"}
    options |= {"training__max_steps": 2, "training__per_device_train_batch_size": 2, "training__use_cpu": True}
    train(make_recipe(tmp_path, name, **options, training__dataloader_num_workers=0))
    model = AutoModel.from_pretrained(tmp_path)
    names = [name for name, _ in model.named_parameters()]
    assert any("lora_" in each for each in names) == (name != "spatialvla_full")
    assert any("spatial_embed_tokens.modules_to_save" in each for each in names) == (name == "spatialvla_adapt")
    before = load_file(tiny_checkpoint / "model.safetensors")["spatial_embed_tokens.weight"]
    own = next(value for each, value in model.named_parameters() if each.startswith("spatial_embed_tokens"))
    embedding = dict(model.named_parameters()).get("spatial_embed_tokens.modules_to_save.default.weight", own)
    assert torch.equal(embedding, before.to(embedding.dtype)) == (name == "spatialvla_lora")


# name: ids an action, actions a chunk, whether patches know where they are in space
TOKENS = {"rt2": (8, 1, False), "openvla": (7, 1, False), "3d_vla": (7, 1, True), "fast": (None, 16, False)}


@pytest.mark.parametrize("name", sorted(TOKENS))
def test_a_recipe_of_action_tokens_trains_and_predicts(name, make_recipe, demo_item, tmp_path):
    options = {"data__eval_episodes": [6], "training__max_steps": 2, "training__eval_strategy": "steps"}
    options |= {"training__eval_steps": 2, "training__save_strategy": "no", "training__per_device_eval_batch_size": 3}
    metrics = train(make_recipe(tmp_path, name, **options, training__per_device_train_batch_size=2))
    assert np.isfinite([metrics["eval_loss"], metrics["eval_action_error"]]).all()
    policy, again = (Policy.from_pretrained(tmp_path) for _ in range(2))
    num_ids, chunk_size, ego3d = TOKENS[name]
    assert (policy.model.config.action_ranges(1) or None) == (num_ids and [(0, 2)] * (num_ids == 8) + [(0, 256)] * 7)
    assert policy.model.config.use_ego3d == ego3d and not policy.takes_state
    chunk = policy.predict_chunk(demo_item)
    assert chunk.shape == (chunk_size, 7) and np.isfinite(chunk).all()
    assert np.array_equal(again.predict_chunk(demo_item), chunk)


def test_the_tinyvla_lora_recipe_has_the_published_hyper_parameters():
    recipe = load_recipe(RECIPES["tinyvla_lora"], {"training.use_cpu": True})
    training, lora = recipe.training, recipe.model.lora
    assert (lora.r, lora.alpha, lora.dropout) == (64, 256, 0.05)
    assert (training.learning_rate, training.learning_rates, training.warmup_steps) == (2e-4, {"head": 2e-5}, 0.005)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.98, 1e-7)
    assert (training.max_steps, training.per_device_train_batch_size, recipe.data.chunk_size) == (10000, 32, 16)
    assert training.lr_scheduler_type == "cosine" and training.weight_decay == 0.0 and training.bf16


@pytest.mark.parametrize("name", ["divla_lora", "divla_scaledp"])
def test_the_large_recipes_of_divla_have_the_published_hyper_parameters(name):
    recipe = load_recipe(RECIPES[name], {"training.use_cpu": True})
    training, lora = recipe.training, recipe.model.lora
    assert (lora.r, lora.alpha, lora.dropout) == (64, 256, 0.05)
    assert (training.learning_rate, training.learning_rates, training.warmup_steps) == (2e-5, {"head": 2e-4}, 0.01)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.98, 1e-7)
    assert (training.max_steps, training.per_device_train_batch_size, recipe.data.chunk_size) == (60000, 12, 16)
    assert training.lr_scheduler_type == "cosine" and training.weight_decay == 0.0 and training.bf16
    assert recipe.model.backbone == "Qwen/Qwen2-VL-2B-Instruct" and recipe.data.reasoning == "subtask"


def test_the_scaledp_recipe_has_the_published_head():
    head = load_recipe(RECIPES["divla_scaledp"], {"training.use_cpu": True}).model.config["head_config"]
    assert build_head(head) == build_head(SCALE_DP_HEADS["scale_dp_h"])


def build_head(config):
    """Names and shapes of a head's weights."""
    with torch.device("meta"):
        head = build_action_head(config, 1536, 14, 16, 14)
    return {name: value.shape for name, value in head.state_dict().items()}


def test_the_recipes_of_the_shipped_checkpoints_follow_each_other(tmp_path):
    """First learn to look, then take what has learnt it into the others."""
    root = Path(__file__).parents[2]
    short = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "eval_strategy": "no"}
    short |= {"estimate_memory": False, "disable_tqdm": True}

    def learn(name, **overrides):
        demos = root / "scripts" / "data" / f"{name.split('_')[1]}_demos"
        changes = {"data.source": str(demos), "data.eval_episodes": [], "data.frame_cache": None}
        changes |= {f"training.{key}": value for key, value in short.items()}
        changes |= {"training.output_dir": str(tmp_path / name)}
        changes |= {
            key.replace("__", "."): str(value) if isinstance(value, Path) else value
            for key, value in overrides.items()
        }
        train(load_recipe(RECIPES[name], changes))
        return Policy.from_pretrained(tmp_path / name)

    learn("looking_metaworld")
    vlm = tmp_path / "vlm"
    take_backbone.main([str(tmp_path / "looking_metaworld"), str(vlm)])
    learn("tinyvla_metaworld", model__backbone=tmp_path / "looking_metaworld")
    tinyvla = learn("tinyvla_metaworld_further", model__path=tmp_path / "tinyvla_metaworld")
    learn("divla_metaworld", model__backbone=vlm, data__reasoning=None)
    divla = learn("divla_metaworld_further", model__path=tmp_path / "divla_metaworld", data__reasoning=None)
    grid = learn("spatialvla_metaworld", model__vision_model=vlm / "vision", model__depth_model=None)
    wrist = learn("spatialvla_robosuite", model__vision_model=vlm / "vision")
    assert [policy.takes_state for policy in (tinyvla, divla, grid, wrist)] == [True, True, False, False]
    for policy in (tinyvla, divla, grid, wrist):
        (camera,) = policy.cameras
        observation = {f"observation.images.{camera.name}": np.zeros((96, 96, 3), np.uint8), "task": "Open a drawer"}
        chunk = policy.predict_chunk(observation | {"observation.state": np.zeros(4, np.float32)})
        assert np.isfinite(chunk).all() and len(chunk) == policy.processor.action_codec.chunk_size
