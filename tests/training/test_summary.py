"""What is told of a training, in `training.json`."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import TrainerState

from hf_vla.training.recipe import load_recipe
from hf_vla.training.summary import read_summary, short_recipe, source_of, write_summary

RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"


def test_a_recipe_is_told_with_its_sources_names_alone(tmp_path):
    for name in ("eyes", "depth"):
        (tmp_path / name).mkdir()
    sources = {"model.vision_model": str(tmp_path / "eyes"), "model.depth_model": str(tmp_path / "depth")}
    path = RECIPES / "spatialvla_metaworld.yaml"
    told = short_recipe(load_recipe(path, sources))
    recipe = yaml.safe_load(path.read_text())
    assert told["model"] == {**recipe["model"], "vision_model": "eyes", "depth_model": "depth"}
    assert told["data"]["chunk_size"] == recipe["data"]["chunk_size"] and told["training"]["max_steps"] == 2000
    (dataset,) = told["data"]["datasets"]
    assert "state" not in dataset and str(tmp_path) not in json.dumps(told)
    assert json.loads(json.dumps(told)) == told


def test_every_recipe_can_be_told():
    for path in sorted(RECIPES.glob("*.yaml")):
        told = short_recipe(load_recipe(path, {"training.use_cpu": True}))
        assert json.loads(json.dumps(told)) == told and told["training"]["learning_rate"] > 0


def test_a_folder_is_told_from_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "model").mkdir(parents=True)
    assert source_of("outputs/model") == {"name": "model", "on_hub": False}
    assert source_of("owner/model") == {"name": "owner/model", "on_hub": True}


def test_progress_is_that_of_the_trainer(tmp_path):
    history = [{"eval_action_error": 0.5, "step": 1}, {"loss": 1.0}, {"eval_action_error": 0.25, "step": 2}]
    write_summary({"a": 1}, TrainerState(global_step=7, log_history=history), tmp_path)
    told = json.loads((tmp_path / "training.json").read_text())
    assert told == {"a": 1, "steps": 7, "action_error": 0.25}
    write_summary({}, TrainerState(), tmp_path)
    assert json.loads((tmp_path / "training.json").read_text())["action_error"] is None


def test_of_the_best_step_it_tells_the_best_step(tmp_path):
    """While it trains, it saves what it trains; at the end, what its best checkpoint holds."""
    history = [{"eval_action_error": error, "step": step} for step, error in ((2, 0.5), (4, 0.25), (6, 0.75))]
    state = TrainerState(global_step=6, best_model_checkpoint="outputs/run/checkpoint-4", log_history=history)

    def told(**training):
        write_summary({"recipe": {"training": training}}, state, tmp_path)
        told = json.loads((tmp_path / "training.json").read_text())
        return told["steps"], told.get("best_of"), told["action_error"]

    assert told(load_best_model_at_end=True) == (6, None, 0.75)
    state.log_history.append({"train_runtime": 1.0, "step": 6})
    assert told(load_best_model_at_end=True) == (4, 6, 0.25) and told() == (6, None, 0.75)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("https://me:secret@host/folder/data?token=secret", "data"),
        ("https://me:secret@host", "host"),
        ("s3://bucket/data/", "data"),
        ("somewhere/else/data", "data"),
        ("../data", "data"),
    ],
)
def test_of_what_is_no_name_on_the_hub_the_last_part_is_told(source, name):
    assert source_of(source) == {"name": name, "on_hub": False}


def test_what_is_broken_is_named(tmp_path):
    here = {"name": "here", "on_hub": False}
    whole = {"started_from": {"path": here}, "datasets": {"a": here | {"held_out_episodes": 1}}, "steps": 1}
    whole |= {"instructions": ["reach"], "num_instructions": 1, "action_error": None, "trainable_parameters": 1}
    whole |= {"recipe": {}}
    path = tmp_path / "training.json"
    path.write_text(json.dumps(whole))
    assert read_summary(tmp_path) == whole
    broken = {
        "{": "Expected JSON in .*training.json",
        "[]": "Expected a JSON object in .*training.json, came list",
        "{}": "training.json: expected action_error, which it lacks",
        json.dumps(whole | {"steps": "many"}): "training.json: .*Field 'steps' expected int, got str",
        json.dumps(whole | {"instructions": ["\ud800"]}): "training.json: instructions is no text",
        json.dumps(whole | {"datasets": {"a": here}}): "training.json: expected datasets.a.held_out_episodes",
        json.dumps(whole | {"started_from": {"path": "here"}}): "training.json: .*'started_from'",
        json.dumps(
            whole | {"started_from": {"path": here | {"on_hub": None}}}
        ): "in started_from.path: .*Field 'on_hub'",
    }
    for text, message in broken.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_summary(tmp_path)
    path.unlink()
    assert read_summary(tmp_path) is None
