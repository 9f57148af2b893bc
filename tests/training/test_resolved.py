from contextlib import nullcontext

import pytest

import hf_vla  # noqa: F401
from hf_vla.training.recipe import load_recipe
from hf_vla.training.resolved import RECIPE, check_same_recipe, resolved, write_recipe

RUN = {
    "training__gradient_accumulation_steps": 2,
    "training__per_device_train_batch_size": 2,
    "training__ema_decay": 0.9,
}


CHANGES = [
    ({"training__seed": 7}, "training.seed was 0, is 7"),
    ({"data__camera_dropout": 0.5}, "data.camera_dropout was 0.0, is 0.5"),
    ({"data__source": "/elsewhere/robosuite_demos"}, None),
    ({"data__filters": {"idle": 0.1}}, "data.filters.idle was 'not given', is 0.1.*"),
    ({"training__learning_rates": {"head": 1e-3}}, "training.learning_rates.head was 'not given', is 0.001"),
    ({"training__ema_decay": 0.5}, "training.ema_decay was 0.9, is 0.5"),
    ({"data__cameras__0__fovy": 50.0}, "data.cameras.0.fovy was None, is 50.0"),
    ({"training__max_steps": 60, "training__eval_steps": 2, "training__logging_steps": 7}, None),
    ({"training__save_total_limit": 9, "training__report_to": [], "training__output_dir": "x"}, None),
    ({"training__dataloader_num_workers": 2, "training__activation_checkpointing": True}, None),
    ({"training__per_device_train_batch_size": 1, "training__gradient_accumulation_steps": 4}, None),
    ({"training__gradient_accumulation_steps": 4}, None),  # another check's
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_run_goes_on_with_the_recipe_that_it_began_with(make_recipe, tmp_path, change, message):
    recipe = make_recipe(tmp_path, "divla_tiny", **RUN)
    write_recipe(resolved(recipe.training, recipe), tmp_path)
    recipe = make_recipe(tmp_path, "divla_tiny", **(RUN | change))
    with nullcontext() if message is None else pytest.raises(ValueError, match=f"{tmp_path} was .*: {message}. Res"):
        check_same_recipe(tmp_path, resolved(recipe.training, recipe))


def test_windows_are_dealt_out_to_workers(make_recipe, tmp_path):
    run = RUN | {"data__shuffle": "windows"}
    recipe = make_recipe(tmp_path, "divla_tiny", **run)
    write_recipe(resolved(recipe.training, recipe), tmp_path)
    recipe = make_recipe(tmp_path, "divla_tiny", **(run | {"training__dataloader_num_workers": 2}))
    with pytest.raises(ValueError, match="training.dataloader_num_workers was 0, is 2"):
        check_same_recipe(tmp_path, resolved(recipe.training, recipe))


def test_datasets_of_several_may_move_and_their_cameras_may_not(make_recipe, tmp_path):
    run = {"data__source": None, "data__eval_episodes": []}
    recipe = make_recipe(tmp_path, "mixture_tiny", **run)
    write_recipe(resolved(recipe.training, recipe), tmp_path)
    moved = make_recipe(tmp_path, "mixture_tiny", **run, data__datasets__1__source="elsewhere/metaworld_demos")
    check_same_recipe(tmp_path, resolved(moved.training, moved))
    other = make_recipe(tmp_path, "mixture_tiny", **run, data__datasets__1__cameras__0__source="corner2")
    with pytest.raises(ValueError, match="data.datasets.1.cameras.0.source was 'corner4', is 'corner2'"):
        check_same_recipe(tmp_path, resolved(other.training, other))


@pytest.mark.parametrize("name", ["divla_tiny", "mixture_tiny"])
def test_the_saved_recipe_is_one(make_recipe, demos, tmp_path, name):
    other = {} if name == "divla_tiny" else {"data__source": None, "data__eval_episodes": []}
    recipe = make_recipe(tmp_path, name, **other)
    write_recipe(resolved(recipe.training, recipe), tmp_path)
    again = load_recipe(tmp_path / RECIPE)
    assert again.model == recipe.model and again.data == recipe.data
    assert resolved(again.training, again) == resolved(recipe.training, recipe)


def test_no_token_is_saved(make_recipe, tmp_path):
    recipe = make_recipe(tmp_path, training__hub_token="hf_secret")
    assert "hub_token" not in resolved(recipe.training, recipe)["training"]
