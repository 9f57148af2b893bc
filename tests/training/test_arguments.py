import importlib.util
import re
import struct
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from hf_vla.actions.spec import GripperSpec
from hf_vla.data.oxe import MIXTURES, oxe_dataset, oxe_mixture
from hf_vla.training.arguments import (
    GridArguments,
    LoraArguments,
    ModelArguments,
    VLATrainingArguments,
    check_trackers,
)
from hf_vla.training.data_arguments import CameraArguments, DataArguments, DatasetArguments
from hf_vla.training.recipe import load_recipe, parse_recipe
from hf_vla.training.run import train

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
TINY = RECIPES / "spatialvla_tiny.yaml"
OTHER = {"source": "other", "cameras": [{"name": "front"}], "action": {"kind": "joint"}}
# several datasets instead of the recipe's one
NONE = {f"data.{name}": value for name, value in {"source": None, "action": None, "eval_episodes": []}.items()}
ONLY = {**NONE, "data.datasets": [OTHER]}
SEVERAL = {**NONE, "data.cameras": []}
NAMED = {**NONE, "data.mixture": "bridge", "data.cameras": [{"name": "primary", "fovy": 60}]}


def test_the_tiny_recipe_reads_in_full():
    recipe = load_recipe(TINY)
    assert recipe.model.preset == "tiny"
    assert recipe.model.grid == GridArguments([8, 16, 8, 8, 8, 8])
    assert (recipe.data.datasets[0].unnorm_key, recipe.data.chunk_size) == ("robosuite_demos", 4)
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
        ({"training.learning_rates": 1e-4}, "training.learning_rates: expected"),
        (
            {"training.full_learning_rate": 1e-4},
            r"no longer in use: write training.learning_rates: {head: ...} instead",
        ),
        ({"data.cameras.0.intrinsics": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}, "came both"),
        ({"data.camera_dropout": 0.5}, "and 0 for one camera alone, came 0.5 for"),
        ({"data.cameras.0.name": "wrist", "data.camera_dropout": 1.0}, "camera_dropout from 0 to below 1"),
        ({"data.state_dropout": 0.5}, "and 0 where data.state is not given, came 0.5"),
        ({"training.learning_rates.head": 0.0}, "training.learning_rates.head above 0, came 0.0"),
        ({"training.learning_rates.heads": 1e-4}, "came 'heads'. Did you mean head?"),
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
    ("text", "message"),
    [
        ("model:\n  a: [b", r"recipe.yaml is no YAML in line 2, column 8: .*expected"),
        ("- model", r"recipe.yaml: expected the sections model, data and training, came \['model'\]"),
        ("model", "recipe.yaml: expected the sections model, data and training, came 'model'"),
        ("", "The recipe lacks model"),
    ],
)
def test_a_file_that_is_no_recipe(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "recipe.yaml", {"training.max_steps": 1} if text else None)


def test_an_override_that_is_no_yaml_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="--data.source is no YAML in line 1, column 2"):
        parse_recipe(["--config", str(TINY), "--data.source=["])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lr_scheduler_type": "cosin"}, "training.lr_scheduler_type: 'cosin' is none of its values, .* 'cosine'"),
        ({"eval_strategy": "step"}, "training.eval_strategy: 'step' is none of its values, did you mean 'steps'"),
        ({"optim": "muon"}, r"training.optim: 'muon' is none of its values, there are \['adamw_torch'"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lrr": 1}}, "keyword .*'min_lrr'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_kwargs None do not suit .* cosine_with_min_lr: "),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "do not suit training.lr_scheduler_type warmup_stable_decay"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: the models have losses of their own"),
        ({"train_sampling_strategy": "sequential"}, "the order of the rows is that of data.shuffle"),
    ],
)
def test_what_the_trainer_would_find_late_or_not_at_all(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(TINY, {f"training.{name}": value for name, value in overrides.items()})


@pytest.mark.parametrize("kind", ["linear", "reduce_lr_on_plateau", "greedy", "inverse_sqrt", "constant"])
def test_schedules_that_need_no_more_are_taken(kind):
    assert load_recipe(TINY, {"training.lr_scheduler_type": kind}).training.lr_scheduler_type == kind


@pytest.mark.parametrize("metric", ["action_error", "eval_arm_action_error_gripper", "loss"])
def test_of_errors_the_least_is_best(metric):
    assert load_recipe(TINY, {"training.metric_for_best_model": metric}).training.greater_is_better is False
    overrides = {"training.metric_for_best_model": metric, "training.greater_is_better": True}
    assert load_recipe(TINY, overrides).training.greater_is_better


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
        recipe.training.deepspeed_plugin = SimpleNamespace(deepspeed_config=config)
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
    assert recipe.data.state is None and load_recipe(RECIPES / "tinyvla_tiny.yaml").data.state.frame == "world"


def test_help_names_everything_of_a_recipe(capsys):
    with pytest.raises(SystemExit) as end:
        parse_recipe(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    own = {"training": set(VLATrainingArguments.__annotations__) - set(TrainingArguments.__annotations__)}
    own |= {"model": {field.name for field in fields(ModelArguments)}}
    own |= {
        "data": {field.name for field in fields(DataArguments)} - {field.name for field in fields(DatasetArguments)}
    }
    own |= {"data.datasets.0": {field.name for field in fields(DatasetArguments)}, "model.lora": {"r", "parts"}}
    for section, names in own.items():
        assert [name for name in sorted(names) if f"--{section}.{name} " not in shown] == []
    assert "transformers.TrainingArguments" in shown and "`" not in shown


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.source": None}, "Expected one of data.source, data.datasets and data.mixture, came none"),
        (
            {"data.datasets": [OTHER]},
            r"Expected one of .*, came \['data.source', 'data.datasets'\]",
        ),
        ({"data.action": None}, "The recipe lacks data.action: what the actions of data.source mean"),
        ({**ONLY, "data.cameras": [{"name": "wrist"}]}, "data.cameras is of data.source alone: leave it out"),
        ({**SEVERAL, "data.datasets": [OTHER, OTHER]}, r"called \['other'\]: give them different unnorm_keys"),
        (
            {**SEVERAL, "data.datasets": [OTHER, {**OTHER, "source": "x", "state": {}}]},
            "Some of data.datasets have a state and some none",
        ),
        (
            {**SEVERAL, "data.datasets": [{**OTHER, "weight": 0}]},
            "Expected a weight above 0 for other, came 0.0",
        ),
        ({**SEVERAL, "data.datasets": [{**OTHER, "wait": 1}]}, "data.datasets.0.wait .* mean data.datasets.0.weight"),
        ({**SEVERAL, "data.datasets": [{"source": "x"}]}, "The recipe lacks data.datasets.0.cameras"),
        ({**SEVERAL, "data.mixture": "bridg"}, r"No mixture 'bridg'. Did you mean 'bridge'"),
        ({**NAMED, "data.mixture_without": ["kuka"]}, r"names \['kuka'\], which 'bridge' has not: \['bridge_orig'\]"),
        (
            {**NAMED, "data.cameras": []},
            r"bridge_orig: its cameras are \['primary', 'secondary'\]",
        ),
        ({**NAMED, "data.episodes": [0]}, "data.episodes is of data.source alone"),
        ({**NAMED, "data.revision": "main"}, "data.revision is of data.source alone"),
        ({"data.mixture_without": ["kuka"]}, "data.mixture_without is of a data.mixture: leave it out"),
        ({**NAMED, "data.source": "x"}, "Expected one of data.source, data.datasets and data.mixture"),
        ({"data.balance": "rows"}, r"Expected data.balance among \('size', 'equal'\), came 'rows'"),
        ({"data.chunk_tail": "zero"}, r"Expected data.chunk_tail among \('mask', 'hold'\), came 'zero'"),
        ({"data.shuffle": "none"}, r"Expected data.shuffle among \('rows', 'windows'\), came 'none'"),
        ({"data.n_obs_steps": 0}, "Expected data.n_obs_steps of 1 or more, came 0"),
    ],
)
def test_data_that_are_no_choice(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(TINY, overrides)


def test_a_mixture_is_the_datasets_that_the_table_has(tmp_path):
    overrides = {**NAMED, "data.mixture": "oxe_spatial_vla_plus", "data.mixture_root": str(tmp_path)}
    for name in ("rh20t_rlds", "bc_z", "ucsd_kitchen_dataset", "iamlab_cmu_pickup_insert"):
        with pytest.raises(ValueError, match=f"{name}: (no LeRobot conversion is known|the conversion's actions are)"):
            load_recipe(TINY, overrides)
        (tmp_path / name).mkdir()  # as if it had been converted from RLDS
    data = load_recipe(TINY, overrides | {"data.mixture_without": ["kuka"]}).data
    by_name = {dataset.unnorm_key: dataset for dataset in data.datasets}
    assert len(by_name) == len(oxe_mixture("oxe_spatial_vla_plus")) - 1 and "kuka" not in by_name
    bridge, taco = by_name["bridge_orig"], by_name["taco_play"]
    assert (bridge.source, bridge.weight) == (f"{tmp_path}/bridge_orig_lerobot", 1.0)
    (camera,) = bridge.cameras  # what is known of a camera stands over what the recipe says of all
    assert (camera.name, camera.source, camera.fovy, camera.size) == ("primary", "image_0", None, [640, 480])
    assert taco.cameras == [CameraArguments("primary", 60.0, source="rgb_static")] and taco.weight == 2.0
    assert taco.action.gripper == GripperSpec(6, open=1.0, closed=0.0) and taco.action.rotation == "euler_xyz"
    # the conversion from RLDS has the common form, IPEC-COMMUNITY's keeps rotation vectors
    assert (by_name["bc_z"].source, by_name["bc_z"].action.rotation) == (f"{tmp_path}/bc_z", "euler_xyz")
    assert oxe_dataset("bc_z").action.rotation == "axis_angle"


@pytest.mark.parametrize("options", [{}, {"data.state": {}}, {"data.cameras": [{"name": "wrist"}]}])
@pytest.mark.parametrize("mixture", sorted(MIXTURES))
def test_what_is_advised_of_a_mixture_helps(mixture, options):
    overrides = {**NAMED, "data.mixture": mixture, **options}
    try:
        data = load_recipe(TINY, overrides).data
    except ValueError as error:
        without = re.search(r"data.mixture_without: \[([^\]]*)\]", str(error))[1].replace("'", "").split(", ")
        if set(without) == set(oxe_mixture(mixture)):
            return  # all of it: bridge and fractal have no wrist camera
        data = load_recipe(TINY, overrides | {"data.mixture_without": without}).data
    assert {dataset.action.kind for dataset in data.datasets} == {"delta_ee"}
    assert len({dataset.state is None for dataset in data.datasets}) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trakio", "no tracker is called 'trakio'; did you mean trackio"),
        ("tensorbord", "no tracker is called 'tensorbord'; did you mean tensorboard"),
        ("paper", "no tracker is called 'paper'; there are .*'tensorboard', 'trackio', 'wandb'"),
    ],
)
def test_an_unknown_tracker_is_an_error_of_the_recipe(name, message, make_recipe, tmp_path):
    for names in (name, [name]):
        with pytest.raises(ValueError, match=f"training.report_to: {message}"):
            make_recipe(tmp_path, training__report_to=names)


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard", "clearml", "swanlab"])
def test_a_tracker_that_is_not_installed_is_an_error_of_the_recipe(name, make_recipe, tmp_path):
    packages = {"tensorboard": ("tensorboard", "tensorboardX")}.get(name, (name,))
    if any(importlib.util.find_spec(package) for package in packages):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ValueError, match=f"training.report_to: {name} is not installed: `pip install "):
        make_recipe(tmp_path, training__report_to=name)


def test_no_tracker_is_the_default(make_recipe, tmp_path):
    for overrides in ({}, {"training__report_to": "none"}, {"training__report_to": []}):
        assert make_recipe(tmp_path, **overrides).training.report_to == []
    check_trackers([])


def events(path):
    """Step and value of each scalar in a TensorBoard file, whose records are a length, a sum, an event and a sum."""
    from tensorboardX.proto.event_pb2 import Event

    content, scalars = path.read_bytes(), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event, content = Event.FromString(content[12 : 12 + length]), content[16 + length :]
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboardX")
def test_tensorboard_gets_what_is_logged(make_recipe, tmp_path):
    pytest.importorskip("tensorboardX")
    options = {"training__max_steps": 2, "training__per_device_train_batch_size": 2, "training__save_strategy": "no"}
    options |= {"training__per_device_eval_batch_size": 32, "training__eval_action_samples": 2}
    options |= {"training__eval_strategy": "steps", "training__eval_steps": 2}
    recipe = make_recipe(
        tmp_path, **options, training__report_to="tensorboard", training__learning_rates={"embeddings": 1e-4}
    )
    metrics = train(recipe)
    path = min(tmp_path.rglob("events.out.tfevents.*"))  # a second one is of the evaluation behind the training
    scalars = events(path)
    assert [step for step, _ in scalars["train/loss"]] == [1, 2]
    assert scalars["train/learning_rate_embeddings"] == [(1, pytest.approx(1e-4)), (2, pytest.approx(5e-5))]
    assert scalars["eval/action_error"] == [(2, pytest.approx(metrics["eval_action_error"], rel=1e-5))]


@pytest.mark.parametrize("name", ["trackio", "tensorboard", "wandb"])
def test_trackers_are_named_in_a_recipe(name):
    """By name, or in a list, as in the recipes."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    path = "scripts/recipes/spatialvla_tiny.yaml"
    assert load_recipe(path, {"training.report_to": [name], "training.use_cpu": True}).training.report_to == [name]
