"""What evaluations measure: several datasets, streams, and the metric that chooses the best model."""

import json

import numpy as np
import pytest
from torch.utils.data import Subset

import hf_vla  # noqa: F401
from hf_vla.data.collator import VLACollator
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.streaming import LeRobotStream
from hf_vla.training.run import train

PANDA, SAWYER = "robosuite_demos", "metaworld_demos"


@pytest.fixture(scope="module")
def two_robots(demos):
    """Overrides of the recipe of two robots, with few rows held out."""
    options = {"data__source": None, "data__eval_episodes": [], "training__per_device_eval_batch_size": 64}
    for place, (name, held_out) in enumerate({PANDA: [3], SAWYER: [5, 11]}.items()):
        options[f"data__datasets__{place}__source"] = str(demos.parent / name)
        options[f"data__datasets__{place}__eval_episodes"] = held_out
    return options | {"training__eval_action_samples": 2, "model__config__head_config__num_inference_steps": 2}


def test_the_error_of_a_mixture_is_the_mean_over_its_rows(two_robots, make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, "mixture_tiny", **two_robots)
    trainer.data_collator.with_state = True
    rows = {name: len(each) for name, each in trainer.eval_dataset.rows.items()}
    errors = trainer.action_errors(trainer.eval_dataset)
    wanted = sum(rows[name] * errors[f"{name}_action_error"] for name in (PANDA, SAWYER)) / sum(rows.values())
    assert errors["action_error"] == pytest.approx(wanted) and rows[PANDA] != rows[SAWYER]
    assert errors[f"{PANDA}_action_error"] != errors[f"{SAWYER}_action_error"]
    trainer.args.eval_action_samples = 0
    assert trainer.action_errors(trainer.eval_dataset) == {}


@pytest.mark.parametrize(
    "metric", ["action_error", pytest.param(f"eval_{SAWYER}_action_error_gripper", marks=pytest.mark.slow)]
)
def test_the_best_model_of_a_mixture(metric, two_robots, make_recipe, tmp_path):
    options = two_robots | {"training__per_device_train_batch_size": 2, "training__metric_for_best_model": metric}
    options |= {"training__eval_strategy": "steps", "training__eval_steps": 1, "training__save_steps": 1}
    options |= {"training__max_steps": 2, "training__load_best_model_at_end": True, "training__learning_rate": 1e-2}
    train(make_recipe(tmp_path, "mixture_tiny", **options))
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    name = f"eval_{metric.removeprefix('eval_')}"
    measured = [entry[name] for entry in state["log_history"] if name in entry][:2]
    assert state["best_metric"] == min(measured) and measured[0] != measured[1]


@pytest.mark.parametrize(
    ("recipe", "metric", "message"),
    [
        ("spatialvla_tiny", "acton_error", r"came 'acton_error'. Did you mean action_error\?"),
        ("spatialvla_tiny", "action_error_joints", "came 'action_error_joints'. Did you mean action_error"),
        ("mixture_tiny", f"{SAWYER}_action_error_rotation", f"Did you mean {SAWYER}_action_error_translation"),
        ("mixture_tiny", "action_error_gripper", "came 'action_error_gripper'"),
        ("mixture_tiny", "eval_los", r"came 'eval_los'. Did you mean loss\?"),
    ],
)
def test_a_metric_that_is_not_measured_is_an_error_before_training(
    recipe, metric, message, two_robots, make_trainer, tmp_path
):
    options = {
        "training__eval_strategy": "steps",
        "training__eval_steps": 1,
        "training__metric_for_best_model": metric,
    }
    options |= two_robots if recipe == "mixture_tiny" else {}
    trainer = make_trainer(tmp_path, recipe, **options)
    with pytest.raises(ValueError, match=f"training.metric_for_best_model: evaluations measure .*{message}"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_every_metric_that_is_offered_is_measured(two_robots, make_trainer, tmp_path):
    options = {"training__eval_strategy": "steps", "training__eval_steps": 1, "training__metric_for_best_model": "x"}
    trainer = make_trainer(tmp_path, "mixture_tiny", **options, **two_robots)
    with pytest.raises(ValueError) as error:
        trainer.train()
    offered = str(error.value).split("measure [")[1].split("]")[0].replace("'", "").split(", ")
    trainer.data_collator.with_state = True
    measured = trainer.action_errors(trainer.eval_dataset)
    assert {name for name in offered if not name.endswith("loss")} == measured.keys()


def test_of_a_stream_the_first_rows_are_measured(make_trainer, demos, tmp_path):
    trainer = make_trainer(tmp_path, training__eval_action_samples=3, training__per_device_eval_batch_size=64)
    trainer.data_collator = VLACollator(trainer.processing_class, PANDA, ["agentview"])
    windows = {"action": [step / 20 for step in range(4)]}
    episodes = LeRobotEpisodes(demos, windows, episodes=[3], cameras=["agentview"])
    stream = LeRobotStream(episodes, rows=range(8), seed=1)
    first = [int(item["index"]) for item in stream][:3]
    metrics = trainer.evaluate(stream)
    rows = [list(map(int, episodes.column("index"))).index(row) for row in first]
    wanted = trainer.action_errors(Subset(episodes, rows))
    assert metrics["eval_action_error"] == pytest.approx(wanted["action_error"]) and np.isfinite(metrics["eval_loss"])
