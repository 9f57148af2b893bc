"""Where a training is watched: names that are wrong stop it early, and a real tracker gets what was logged."""

import importlib.util
import struct

import pytest

import hf_vla  # noqa: F401
from hf_vla.training.recipe import load_recipe
from hf_vla.training.run import train
from hf_vla.training.trackers import check_trackers


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
