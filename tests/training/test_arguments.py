from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_vla.training.arguments import CameraArguments, GridArguments, LoraArguments
from hf_vla.training.recipe import load_recipe, parse_recipe

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
TINY = RECIPES / "spatialvla_tiny.yaml"


def test_the_tiny_recipe_reads_in_full():
    recipe = load_recipe(TINY)
    assert recipe.model.preset == "tiny"
    assert recipe.model.grid == GridArguments([8, 16, 8, 8, 8, 8])
    assert (recipe.data.unnorm_key, recipe.data.chunk_size) == ("robosuite_demos", 4)
    assert recipe.data.cameras == [CameraArguments("agentview", 45.0)] and recipe.data.state is None
    assert (recipe.data.action.gripper.index, recipe.data.action.gripper.closed) == (6, 1.0)
    assert recipe.training.learning_rate == 1e-3
    assert not recipe.training.remove_unused_columns


def test_the_lora_recipe_has_the_published_hyper_parameters():
    recipe = load_recipe(RECIPES / "spatialvla_lora.yaml", {"training.use_cpu": True})
    training = recipe.training
    assert recipe.model.lora == LoraArguments(r=32, alpha=32, dropout=0.0)
    assert (training.learning_rate, training.warmup_steps, training.weight_decay) == (5e-4, 0.005, 0.0)
    assert (training.num_train_epochs, training.lr_scheduler_type) == (50, "linear")
    assert training.bf16 and training.activation_checkpointing
    assert (training.per_device_train_batch_size, recipe.data.chunk_size) == (32, 4)


def test_the_command_line_overrides_the_file():
    arguments = ["--config", str(TINY), "--training.max_steps", "20", "--training.learning_rate=5e-4"]
    arguments += ["--data.eval_episodes", "[1, 2]", "--training.eval_strategy", "no", "--data.cameras.0.fovy", "60"]
    arguments += ["--training.resume_from_checkpoint=true", "--training.seed=-1", "--model.grid.min_sigma=1"]
    recipe = parse_recipe(arguments)
    assert (recipe.training.max_steps, recipe.training.learning_rate, recipe.training.seed) == (20, 5e-4, -1)
    assert recipe.training.eval_strategy == "no"
    assert recipe.training.resume_from_checkpoint is True
    assert (recipe.data.eval_episodes, recipe.data.cameras[0].fovy) == ([1, 2], 60.0)
    assert (recipe.model.grid.min_sigma, recipe.model.grid.num_bins) == (1.0, [8, 16, 8, 8, 8, 8])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.max_step": 3}, r"Unknown name training.max_step .* Did you mean training.max_steps\?"),
        ({"trainin.max_steps": 3}, r"Unknown name trainin .* Did you mean training\?"),
        ({"model.gird": None}, r"Unknown name model.gird .* Did you mean model.grid\?"),
        ({"data.cameras.0.fov": 3}, r"Unknown name data.cameras.0.fov .* Did you mean data.cameras.0.fovy\?"),
        ({"data.zzz": 3}, r"Unknown name data.zzz in the recipe. There are \['source', 'cameras'"),
        ({"training.max_steps": "many"}, "training.max_steps: expected int, came 'many'"),
        ({"data.cameras.0.fovy": "wide"}, r"data.cameras.0.fovy: expected float \| None, came 'wide'"),
        ({"data.eval_episodes": ["one"]}, r"data.eval_episodes: expected list.*, came \['one'\]"),
        ({"data.cameras": "agentview"}, "data.cameras: expected a list, came 'agentview'"),
        ({"data.chunk_size.x": 3}, "data.chunk_size.x: 'chunk_size' is a value"),
        ({"data.action": {}}, "lacks data.action.kind"),
        ({"data.action.gripper": {"index": 6}}, "lacks data.action.gripper.open"),
        ({"model.preset": None}, "one of model.preset, .* came preset=None, path=None, backbone=None"),
        ({"model.path": "x"}, "one of model.preset, .* came preset='tiny', path='x', backbone=None"),
        ({"model.lora.r": 4}, "give model.path"),
        ({"model.preset": None, "model.path": "x"}, "set model.adapt_grid: true"),
        ({"data.cameras.1.name": "wrist"}, "data.cameras.1.name: expected a place from 0 to 0 in the list, came '1'"),
        ({"data.cameras.name": "wrist"}, "expected a place from 0 to 0 in the list, came 'name'"),
        ({"data.cameras": []}, r"name one camera or more, each once, came \[\]"),
        ({"data.cameras": [{"name": "a"}, {"name": "observation.images.a"}]}, "each once, came"),
        ({"data.cameras": [{"name": "a"}, {"nam": "b"}]}, r"data.cameras.1.nam .* Did you mean data.cameras.1.name\?"),
        ({"data.camera": {"name": "a"}}, r"Unknown name data.camera .* Did you mean data.cameras\?"),
        ({"data.state": {"names": []}}, r"Unknown name data.state.names"),
        ({"model.family": None}, "give model.family, such as spatialvla or tinyvla"),
        ({"model.preset": None, "model.backbone": "x", "model.path": "x"}, "path='x', backbone='x'"),
        ({"model.preset": None, "model.grid": None, "model.path": "x", "model.config": {"a": 1}}, "model.config out"),
        ({"model.config": 3}, "model.config: expected"),
        ({"training.full_learning_rate": "fast"}, "training.full_learning_rate: expected float"),
        ({"data.cameras.0.intrinsics": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}, "came both"),
        ({"data.camera_dropout": 0.5}, "and 0 for one camera alone, came 0.5 for"),
        ({"data.cameras.0.name": "wrist", "data.camera_dropout": 1.0}, "camera_dropout from 0 to below 1"),
        ({"training.full_learning_rate": 0.0}, "full_learning_rate above 0, came 0.0"),
        ({"training.full_learning_rate": 1e-4}, "full_learning_rate is that of what is trained beside adapters"),
        ({"model.dtype": "bfloat16"}, "leave model.dtype float32, and set training.bf16: true"),
        (
            {
                "model.preset": None,
                "model.grid": None,
                "model.path": "x",
                "model.lora.r": 4,
                "model.dtype": "bfloat16",
            },
            "leave model.dtype float32, and set training.bf16: true",
        ),
        ({"model.new_embodiment": True}, "give model.path, and no model.lora"),
        (
            {"model.preset": None, "model.grid": None, "model.path": "x", "model.head_weights": "y"},
            "A checkpoint keeps its own action head: leave model.head_weights out",
        ),
        (
            {
                "model.preset": None,
                "model.grid": None,
                "model.path": "x",
                "model.lora.r": 4,
                "model.new_embodiment": True,
            },
            "give model.path, and no model.lora",
        ),
        ({"data.cameras.0.fovy": 180}, "between 0 and 180 degrees, came 180"),
    ],
)
def test_mistakes_in_a_recipe_are_errors_that_name_them(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(TINY, overrides)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, None),
        ({"activation_checkpointing": True}, True),
        ({"activation_checkpointing": True, "ddp_find_unused_parameters": False}, False),
    ],
)
def test_weights_without_a_gradient_are_looked_for_with_activation_checkpointing(options, wanted):
    recipe = load_recipe(TINY, {f"training.{name}": value for name, value in options.items()})
    assert recipe.training.ddp_find_unused_parameters is wanted


def test_a_second_learning_rate_needs_our_optimizer():
    recipe = load_recipe(RECIPES / "tinyvla_lora.yaml", {"training.use_cpu": True})
    for config, fails in (({"optimizer": {"type": "AdamW"}}, True), ({}, False)):
        recipe.training.hf_deepspeed_config = SimpleNamespace(config=config)
        with pytest.raises(ValueError, match="leave DeepSpeed's section optimizer out") if fails else nullcontext():
            recipe.__post_init__()


@pytest.mark.parametrize("arguments", [[], ["--config", "x", "max_steps", "3"], ["--config", "x", "--training.seed"]])
def test_mistakes_on_the_command_line_end_it(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_recipe(arguments)
    assert "usage" in capsys.readouterr().err


def test_an_override_reaches_into_lists_and_the_configuration():
    overrides = {"data.cameras.1.fovy": 75, "model.config.head_config.type": "regression", "data.state": None}
    recipe = load_recipe(RECIPES / "tinyvla_tiny.yaml", overrides)
    assert recipe.data.cameras == [CameraArguments("agentview"), CameraArguments("wrist", 75.0)]
    assert recipe.model.config["head_config"]["type"] == "regression"
    assert recipe.data.state is None and load_recipe(RECIPES / "tinyvla_tiny.yaml").data.state.frame == "base"
