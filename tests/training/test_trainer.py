import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

import hf_vla  # noqa: F401
from hf_vla.actions.spec import ActionSpec, GripperSpec
from hf_vla.actions.tokenizers.gaussian_grid import transfer_embeddings
from hf_vla.data.collator import VLACollator
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.training.builders.registry import build
from hf_vla.training.datasets import join, open_datasets
from hf_vla.training.run import train
from hf_vla.training.trainer import VLATrainer, action_error

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def run(make_recipe, tmp_path_factory):
    """A finished run of six steps with its metrics."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(make_recipe(folder))


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other):
    first, second = weights(folder), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_three_steps_lower_the_loss_of_a_fixed_batch(make_recipe, tmp_path):
    recipe = make_recipe(tmp_path, training__max_steps=3, training__save_strategy="no")
    datasets = open_datasets(recipe.data)
    train_set, _ = join(recipe.data, datasets)
    model, processor = build(recipe, datasets)
    trainer = VLATrainer(
        model=model,
        args=recipe.training,
        data_collator=VLACollator(processor, "robosuite_demos", ["agentview"]),
        train_dataset=torch.utils.data.Subset(train_set, [0, 300, 600, 900]),
        processing_class=processor,
    )
    trainer.train()
    first, second, third = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert first > second > third


def test_the_saved_statistics_are_the_train_splits(run, demos):
    processor = AutoProcessor.from_pretrained(run[0])
    kept = [episode for episode in range(22) if episode not in (3, 7)]
    actions = LeRobotEpisodes(demos, episodes=kept, cameras=[]).column("action").astype(np.float64)
    entry = processor.statistics["robosuite_demos"]
    assert (entry["num_trajectories"], entry["num_transitions"], entry["action"]["count"]) == (20, *[len(actions)] * 2)
    for name, value in {
        "mean": actions.mean(0),
        "std": actions.std(0),
        "q01": np.quantile(actions, 0.01, axis=0),
        "q99": np.quantile(actions, 0.99, axis=0),
    }.items():
        np.testing.assert_allclose(entry["action"][name], value, rtol=1e-9, atol=1e-12)


def test_the_saved_grid_spec_and_camera_fit_the_dataset(run):
    processor = AutoProcessor.from_pretrained(run[0])
    spec, state = processor.action_codec.specs()
    gripper = GripperSpec(6, -1.0, 1.0)
    names = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
    assert spec == ActionSpec(names, "delta_ee", "axis_angle", "world", 20.0, gripper)
    assert state is None
    assert processor.action_codec.tokenizer.num_bins == (8, 16, 8, 8, 8, 8)
    focal = 48 / np.tan(np.radians(22.5))
    np.testing.assert_allclose(processor.camera_specs()[0].intrinsics, [[focal, 0, 48], [0, focal, 48], [0, 0, 1]])
    # The gripper's two values survive the grid; the other dimensions as well as its cells are fine.
    chunk = np.zeros((4, 7))
    chunk[:, 6] = [-1, 1, 1, -1]
    assert processor.action_codec.decode(processor.action_codec.encode(chunk))[:, 6].tolist() == [-1, 1, 1, -1]


def test_the_evaluation_is_what_the_saved_checkpoint_does(run, demos):
    folder, metrics = run
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    held_out = LeRobotEpisodes(demos, {"action": [0, 0.05, 0.1, 0.15]}, episodes=[3, 7], cameras=["agentview"])
    errors = []
    for row in np.linspace(0, len(held_out) - 1, 6).round().astype(int):
        item = held_out[row]
        inputs = processor(images=item["observation.images.agentview"], text=item["task"])
        predicted = processor.decode_actions(model.predict_action(**inputs))[0]
        errors.append(np.abs(predicted - item["action"].numpy())[~item["action_is_pad"].numpy()])
    errors = np.concatenate(errors).mean(0)
    assert metrics["eval_action_error"] == pytest.approx(errors.mean(), rel=1e-5)
    assert metrics["eval_action_error_gripper"] == pytest.approx(errors[6], rel=1e-5)
    assert metrics["eval_loss"] > 0


def test_every_checkpoint_holds_its_processor(run):
    for step in (3, 6):
        assert AutoProcessor.from_pretrained(run[0] / f"checkpoint-{step}").action_codec.keys == ["robosuite_demos"]


def test_action_error_by_hand():
    spec = ActionSpec(tuple("xyzrpwg"), "delta_ee", "axis_angle", None, None, GripperSpec(6, 0.0, 1.0))
    actions = np.zeros((1, 3, 7))
    predicted = np.zeros((1, 3, 7))
    predicted[0, 0] = [3, 0, 0, 0, 6, 0, 2]
    predicted[0, 2] = 1000  # padded
    errors = action_error(predicted, actions, np.array([[True, True, False]]), spec)
    wanted = {"": 11 / 14, "_translation": 0.5, "_rotation": 1.0, "_gripper": 1.0}
    assert errors == pytest.approx({f"action_error{name}": value for name, value in wanted.items()})
    joints = ActionSpec(tuple("abcdefg"), "joint")
    assert action_error(predicted, actions, np.array([[True, True, False]]), joints).keys() == {
        "action_error",
        "action_error_joints",
    }


def test_resuming_equals_an_uninterrupted_run(run, make_recipe, tmp_path):
    shutil.copytree(run[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    train(make_recipe(tmp_path, training__resume_from_checkpoint=True, training__save_strategy="no"))
    assert_same_weights(tmp_path, run[0])
    assert losses(tmp_path) == losses(run[0])


def test_resuming_takes_every_weight_from_the_checkpoint(run, make_recipe, tmp_path):
    """Another seed builds other random weights; none of them may be left, not even in the frozen depth model."""
    checkpoint = shutil.copytree(run[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    for name in ("manifest.json", "recipe.yaml"):  # by which another seed would be refused
        (checkpoint / name).unlink()
    train(make_recipe(tmp_path, training__resume_from_checkpoint=True, training__seed=7))
    assert_same_weights(tmp_path, run[0])


def test_a_checkpoint_that_lacks_weights_is_not_resumed(run, make_recipe, tmp_path):
    shutil.copytree(run[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "manifest.json").unlink()  # which says so first
    path = tmp_path / "checkpoint-3" / "model.safetensors"
    tensors = load_file(path)
    del tensors["spatial_embed_tokens.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 weights of the model, among them \['spatial_embed_tokens.weight'\]"
    ):
        train(make_recipe(tmp_path, training__resume_from_checkpoint=True))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__eval_episodes": [3, 8]}, "The recipe gives another statistics than .*checkpoint-3 was trained with"),
        ({"model__grid__distribution": "quantile"}, "The recipe gives another action_config than"),
        ({"data__chunk_size": 2}, "The recipe gives another action_config than"),
        ({"data__action__frame": "camera"}, "ActionSpec of the checkpoint .* frame: .* 'world', the recipe 'camera'"),
        ({"data__cameras__0__fovy": 60}, "CameraSpec of the checkpoint .* and of the recipe differ in intrinsics"),
    ],
)
def test_a_run_is_resumed_for_the_same_robot_only(run, make_recipe, tmp_path, overrides, message):
    shutil.copytree(run[0] / "checkpoint-3", tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=message):
        train(make_recipe(tmp_path, training__resume_from_checkpoint=True, **overrides))


def test_a_gripper_that_is_not_the_datasets_is_an_error(make_recipe, tmp_path):
    recipe = make_recipe(tmp_path, data__action__gripper={"index": 6, "open": 0.0, "closed": 1.0})
    with pytest.raises(
        ValueError, match=r"gripper \(action 6\) goes from 0.0 to 1.0, the dataset's goes from -1 to 1"
    ):
        train(recipe)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data__action__gripper": None}, "grid ends in a gripper: give data.action.gripper"),
        (
            {"data__cameras__0__fovy": None},
            "give fovy or intrinsics of the camera of 'robosuite_demos' in data.cameras",
        ),
        ({"model__grid__num_bins": [8, 8, 8]}, r"the dataset's actions have 7, model.grid.num_bins \[8, 8, 8\]"),
        ({"data__action__rotation": "quaternion_xyzw"}, "take 8 numbers; the action has 7"),
    ],
)
def test_recipes_that_do_not_fit_the_dataset(make_recipe, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(make_recipe(tmp_path, **overrides))


def test_actions_without_rotation(make_recipe, tmp_path):
    """Meta-World's four numbers: a grid of three bin counts, two tokens an action."""
    overrides = {
        "data__source": "scripts/data/metaworld_demos",
        "data__eval_episodes": [1],
        "data__action__rotation": None,
    }
    overrides |= {
        "data__cameras__0__name": "corner4",
        "data__action__gripper": {"index": 3, "open": -1.0, "closed": 1.0},
    }
    train(make_recipe(tmp_path, **overrides, model__grid__num_bins=[4, 8, 4], training__max_steps=2))
    model = AutoModel.from_pretrained(tmp_path)
    assert model.config.action_block_sizes == [128, 2] and model.config.chunk_size == 4


def test_the_grid_bins_end_effector_motion(make_recipe, tmp_path):
    joints = make_recipe(tmp_path, data__action__kind="joint", data__action__rotation=None)
    with pytest.raises(ValueError, match="Expected end-effector actions with the gripper last.*kind 'joint'"):
        train(joints)


@pytest.mark.parametrize("rows", [2, 4])
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(make_recipe, tmp_path, rows):
    """Frames at the end of an episode have padded chunks: fewer labels, but a sample counts as a sample."""
    recipe = make_recipe(tmp_path)
    (opened,) = open_datasets(recipe.data)
    model, processor = build(recipe, [opened])
    dataset = opened.episodes
    collate = VLACollator(processor, "robosuite_demos", ["agentview"])
    end = int(dataset.episode_starts[1])
    items = [dataset[row] for row in (0, 1, end - 1, end - 2)]
    assert items[2]["action_is_pad"].sum() == 3
    whole = torch.autograd.grad(model(**collate(items)).loss, model.multi_modal_projector.linear.weight)[0]
    parts = [
        torch.autograd.grad(model(**collate(items[i : i + rows])).loss, model.multi_modal_projector.linear.weight)[0]
        for i in range(0, 4, rows)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, atol=1e-6, rtol=1e-3)


def test_a_checkpoint_keeps_its_grid_and_text_embedding(run, make_recipe, tmp_path):
    train(make_recipe(tmp_path, model__preset=None, model__grid=None, model__path=str(run[0]), training__max_steps=2))
    before, after = weights(run[0]), weights(tmp_path)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"vision_tower", "multi_modal_projector", "position_embedding_3d", "spatial_embed_tokens"} | {
        "language_model"
    }
    embedding = "language_model.model.embed_tokens.weight"
    assert torch.equal(before[embedding], after[embedding])
    grids = [AutoProcessor.from_pretrained(folder).action_codec.tokenizer.to_dict() for folder in (run[0], tmp_path)]
    assert grids[0] == grids[1]


def test_adapting_the_grid_moves_the_spatial_embedding(run, make_recipe, tmp_path):
    recipe = make_recipe(
        tmp_path,
        model__preset=None,
        model__path=str(run[0]),
        model__adapt_grid=True,
        model__grid={"distribution": "mixture"},
        data__eval_episodes=[],
    )
    datasets = open_datasets(recipe.data)
    assert join(recipe.data, datasets)[1] is None
    model, processor = build(recipe, datasets)
    old, new = AutoProcessor.from_pretrained(run[0]).action_codec.tokenizer, processor.action_codec.tokenizer
    assert (new.distribution, new.num_bins) == ("mixture", old.num_bins)
    wanted = transfer_embeddings(weights(run[0])["spatial_embed_tokens.weight"].numpy(), old, new)
    np.testing.assert_allclose(model.spatial_embed_tokens.weight.detach().numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize(("episodes", "came"), [([3, 22], r"\[22\]"), (list(range(22)), "all of them")])
def test_held_out_episodes_must_exist_and_leave_some(make_recipe, tmp_path, episodes, came):
    with pytest.raises(ValueError, match=rf"some of the 22 episodes of .* \(0 to 21\), came {came}"):
        open_datasets(make_recipe(tmp_path, data__eval_episodes=episodes).data)


@pytest.mark.parametrize("launcher", ["accelerate launch", "two processes"])
def test_launched_as_the_readme_says(make_recipe, tmp_path, demos, launcher):
    commands = {
        "accelerate launch": ["accelerate.commands.launch"],
        "two processes": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    }
    if launcher == "two processes":  # of each two evaluation batches, one says nothing
        demos = shutil.copytree(demos, tmp_path / "data" / "robosuite_demos")
        file = demos / "data" / "chunk-000" / "file-000.parquet"
        table = pq.read_table(file)
        place, frames = table.schema.get_field_index("subtask_index"), table["frame_index"].to_numpy()
        said = np.where(frames // 2 % 2 == 0, table["subtask_index"].to_numpy(), -1)
        pq.write_table(
            table.set_column(place, table.schema.field(place), pa.array(said, table.schema.types[place])), file
        )
    # Two processes agree on the gradients of a checkpointed backbone, some of whose weights have none.
    recipe, more = {
        "accelerate launch": ("spatialvla_tiny", []),
        "two processes": (
            "divla_tiny",
            [
                "--training.activation_checkpointing=true",
                "--training.logging_steps=2",
                "--training.per_device_eval_batch_size=2",
            ],
        ),
    }[launcher]
    arguments = ["scripts/train.py", "--config", f"scripts/recipes/{recipe}.yaml", f"--data.source={demos}", *more]
    arguments += ["--training.max_steps", "2", f"--training.output_dir={tmp_path}", "--data.eval_episodes=[3]"]
    arguments += ["--training.per_device_train_batch_size=2", "--training.eval_action_samples=5"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *commands[launcher], *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "eval_action_error_translation" in done.stdout
    assert AutoProcessor.from_pretrained(tmp_path).action_codec.chunk_size == 4
    if launcher == "two processes":  # whose batches differ: parts and loss are means over both
        history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
        for prefix in ("", "eval_"):
            entries = [entry for entry in history if f"{prefix}loss" in entry]
            parts = [entry[f"{prefix}diffusion_loss"] + entry[f"{prefix}ntp_loss"] for entry in entries]
            assert parts and [entry[f"{prefix}loss"] for entry in entries] == pytest.approx(parts, rel=1e-5)
