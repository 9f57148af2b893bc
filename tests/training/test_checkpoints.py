import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import hf_vla  # noqa: F401
from hf_vla.training.checkpoints import checkpoint_to_resume, rotate
from hf_vla.training.manifest import MANIFEST, find_flaw, write_manifest
from hf_vla.training.run import train
from hf_vla.training.saving import UNFINISHED, install, publish, recover, staging_folder

ROOT = Path(__file__).parents[2]
RUN = {  # a loss of several parts, from noise, logged between the checkpoints
    "model__config": {
        "head_config": {"type": "diffusion", "denoiser": {"type": "conditional_unet1d", "down_dims": [16, 32]}}
    },
    "data__episodes": [0, 3, 7],
    "training__logging_steps": 4,
    "training__gradient_accumulation_steps": 2,
    "training__per_device_train_batch_size": 2,
    "training__ema_decay": 0.9,
}


@pytest.fixture(scope="session")
def whole(make_recipe, tmp_path_factory):
    """A run of six steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train(make_recipe(folder, "divla_tiny", **RUN))
    return folder


@pytest.fixture
def resume(make_recipe, tmp_path):
    """The checkpoint that a run in `tmp_path` would go on from."""
    return lambda wanted=True: checkpoint_to_resume(
        make_recipe(tmp_path, training__resume_from_checkpoint=wanted).training
    )


def copy(whole, tmp_path, *steps):
    return [shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}") for step in steps]


def history(folder):
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "loss" in entry]


def assert_same_end(folder, other):
    assert history(folder) == history(other)
    first, second = (load_file(each / "model.safetensors") for each in (folder, other))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def flip_a_bit(path, place=-100):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_everything_of_a_checkpoint_is_in_its_manifest(whole):
    for step in (3, 6):
        folder = whole / f"checkpoint-{step}"
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        assert set(json.loads((folder / MANIFEST).read_text())["files"]) == files - {MANIFEST}
        assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < files
        assert {"processor_config.json", "unlogged_0.json", "training_weights.safetensors"} < files
        assert find_flaw(folder) is None
    assert not (whole / UNFINISHED).exists() and not (whole / MANIFEST).exists()


def test_going_on_between_two_logged_losses_gives_the_same_curve(whole, make_recipe, tmp_path):
    (entry,) = history(whole)
    assert entry["step"] == 4 and {"loss", "diffusion_loss", "ntp_loss"} < entry.keys()
    copy(whole, tmp_path, 3)
    train(make_recipe(tmp_path, "divla_tiny", **RUN, training__resume_from_checkpoint=True))
    assert_same_end(tmp_path, whole)


def test_a_finished_run_trains_no_further_step(whole, make_recipe, tmp_path):
    copy(whole, tmp_path, 3, 6)
    metrics = train(make_recipe(tmp_path, "divla_tiny", **RUN, training__resume_from_checkpoint=True))
    assert_same_end(tmp_path, whole)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert metrics["eval_loss"] > 0


@pytest.mark.parametrize(
    ("damage", "flaw"),
    [
        (
            lambda folder: flip_a_bit(folder / "optimizer.pt"),
            "its optimizer.pt is not what was written: its SHA-256 is",
        ),
        (lambda folder: flip_a_bit(folder / "model.safetensors"), "its model.safetensors is not what was written"),
        (
            lambda folder: os.truncate(folder / "scheduler.pt", 100),
            r"its scheduler.pt has 100 bytes, \d+ were written",
        ),
        (lambda folder: (folder / "rng_state.pth").unlink(), "its rng_state.pth is missing"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"a'), f"its {MANIFEST} cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": ["a"]}'), f"its {MANIFEST} cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(whole, resume, tmp_path, caplog, damage, flaw):
    third, sixth = copy(whole, tmp_path, 3, 6)
    assert resume() == str(sixth) and caplog.text == ""
    damage(sixth)
    assert resume() == str(third)
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert re.search(f"checkpoint-6 is damaged: {flaw}.* and is passed over", warning)
    with pytest.raises(ValueError, match=f"checkpoint-6 is damaged: {flaw}.*Restore it, or resume from another"):
        resume(str(sixth))
    shutil.rmtree(third)
    with pytest.raises(ValueError, match="No checkpoint is left to go on from: .*checkpoint-6 is damaged.*start anew"):
        resume()


def test_going_on_from_the_one_before_a_damaged_one_ends_alike(whole, make_recipe, tmp_path):
    _, sixth = copy(whole, tmp_path, 3, 6)
    flip_a_bit(sixth / "optimizer.pt")
    train(make_recipe(tmp_path, "divla_tiny", **RUN, training__resume_from_checkpoint=True))
    assert_same_end(tmp_path, whole)
    assert find_flaw(sixth) is None  # written anew


def test_checkpoints_of_other_tools_have_no_manifest(whole, resume, tmp_path, caplog):
    third, sixth = copy(whole, tmp_path, 3, 6)
    for folder in (third, sixth):
        (folder / MANIFEST).unlink()
    assert resume() == str(sixth) and resume(str(third)) == str(third)
    (sixth / "trainer_state.json").write_text('{"global_st')
    assert resume() == str(third)
    assert "checkpoint-6 is no complete checkpoint (killed in mid-save?)" in caplog.text
    (third / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3 lacks \['optimizer.pt'\]: resuming would go on"):
        resume()
    shutil.rmtree(third)
    assert resume() is None
    assert "No complete checkpoint in" in caplog.text and "the training starts anew" in caplog.text
    with pytest.raises(ValueError, match="checkpoint-6 is no complete checkpoint"):
        resume(str(sixth))


def test_the_newest_step_counts_not_the_name(whole, resume, tmp_path):
    assert resume(None) is None and resume() is None
    third, _ = copy(whole, tmp_path, 3, 6)
    tenth = third.rename(tmp_path / "checkpoint-10")  # as text, 6 comes after 10
    assert resume() == str(tenth)


def fill(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for age, step in enumerate([50, 3, 6, 9]):  # the first is of an earlier run
        os.utime(fill(tmp_path / f"checkpoint-{step}", a="a"), (age, age))
    rotate(tmp_path, 2, [tmp_path / "checkpoint-9", str(tmp_path / "checkpoint-3")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-9"]
    fill(tmp_path / "checkpoint-12", a="a")
    rotate(tmp_path, 1, [tmp_path / "checkpoint-12", None])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12"]


def test_the_best_checkpoint_survives_and_is_named_by_its_place(make_recipe, tmp_path):
    best = {"training__load_best_model_at_end": True, "training__metric_for_best_model": "action_error"}
    limits = {"training__save_total_limit": 1, "training__eval_strategy": "steps", "training__eval_steps": 1}
    recipe = make_recipe(
        tmp_path, **best, **limits, training__save_steps=1, training__greater_is_better=False, training__max_steps=3
    )
    train(recipe)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{state['best_global_step']}")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{state['best_global_step']}"]
    assert find_flaw(Path(state["best_model_checkpoint"])) is None


def test_what_a_killed_save_left_is_removed_and_nothing_else(resume, tmp_path):
    fill(tmp_path / "_unfinished", mine="keep")
    fill(tmp_path / "checkpoint-new", mine="keep")
    fill(staging_folder(tmp_path) / "checkpoint-3", config__json="{}")
    fill(tmp_path / UNFINISHED / "deleting" / "checkpoint-1", config__json="{}")
    assert resume() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_unfinished", "checkpoint-new"]


def test_a_save_that_was_whole_when_it_was_killed_is_finished(tmp_path):
    staged = fill(staging_folder(tmp_path) / "checkpoint-3", trainer_state__json="{}")
    write_manifest(staged)
    fill(tmp_path / UNFINISHED / "deleting" / "checkpoint-3", trainer_state__json="old")
    recover(tmp_path)
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3"]
    staged = fill(staging_folder(tmp_path) / "checkpoint-3", trainer_state__json="newer")
    write_manifest(staged)
    recover(tmp_path)  # killed before the one that is there was set aside: it stays
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").read_text() == "{}"


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    fill(tmp_path / "checkpoint-3", old="old")
    publish(fill(staging_folder(tmp_path) / "checkpoint-3", new="new"), tmp_path / "checkpoint-3")
    assert sorted(path.name for path in (tmp_path / "checkpoint-3").iterdir()) == [MANIFEST, "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def install_or_die(staged, root, left):
    """Kill the process before its change number `left` of files in `root`."""

    def count(event, arguments):
        nonlocal left
        if event in ("os.rename", "os.remove") and str(root) in str(arguments[0]):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    install(staged, root)


def loaded(folder):
    """The weights that a folder gives; None where none load."""
    try:
        return AutoModel.from_pretrained(folder).state_dict()
    except (OSError, ValueError):
        return None


@pytest.mark.parametrize("same_shape", [True, False], ids=["retrained", "another model"])
def test_a_kill_while_the_model_is_replaced_leaves_the_old_or_the_new_one(tiny_checkpoint, tmp_path, same_shape):
    """Killed before each change to the disk in turn: never a mixture, and afterwards the new one."""
    new, old = shutil.copytree(tiny_checkpoint, tmp_path / "new"), shutil.copytree(tiny_checkpoint, tmp_path / "old")
    model = AutoModel.from_pretrained(tiny_checkpoint)
    torch.nn.init.ones_(model.spatial_embed_tokens.weight)
    model.save_pretrained(new)
    if not same_shape:  # what it says of itself, and how it is cut, differs as well
        model.config.problem_type = "regression"
        shutil.rmtree(old)
        shutil.copytree(tiny_checkpoint, old, ignore=shutil.ignore_patterns("model*"))
        AutoModel.from_pretrained(tiny_checkpoint).save_pretrained(old, max_shard_size="3MB")
        model.save_pretrained(new)
    outcomes, place = [], tmp_path / "place"
    for left in range(100):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(old, place)
        staged = staging_folder(place)
        shutil.copytree(new, staged, dirs_exist_ok=True)
        process = multiprocessing.get_context("fork").Process(target=install_or_die, args=(staged, place, left))
        process.start()
        process.join(60)
        weights = loaded(place)
        if weights is None:
            outcomes.append("none")
        else:
            is_new = torch.equal(weights["spatial_embed_tokens.weight"], model.spatial_embed_tokens.weight)
            outcomes.append("new" if is_new else "old")
            wanted = AutoModel.from_pretrained(new if is_new else old)
            assert all(torch.equal(weights[name], value) for name, value in wanted.state_dict().items())
            assert wanted.config.problem_type == AutoModel.from_pretrained(place).config.problem_type
        moved = not staged.exists()
        recover(place)
        assert moved == torch.equal(loaded(place)["spatial_embed_tokens.weight"], model.spatial_embed_tokens.weight)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert outcomes[0] == "old" and outcomes[-1] == "new"
    assert ("none" in outcomes) == (not same_shape)
    assert sorted(path.name for path in place.iterdir()) == sorted(path.name for path in new.iterdir())


def test_an_old_adapter_does_not_outlive_the_whole_model_that_replaces_it(tmp_path):
    fill(tmp_path, adapter_config__json="{}", adapter_model__safetensors="old", README__md="mine")
    install(fill(staging_folder(tmp_path), config__json="{}", model__safetensors="new"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    install(fill(staging_folder(tmp_path), adapter_config__json="{}", adapter_model__safetensors="a"), tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "new"  # which the adapter may be of


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(kills):
    short = ["--training.max_steps=12"] if kills == 1 else []
    command = [sys.executable, "scripts/kill_test.py", "--kills", str(kills), *short]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{kills} kills: every run ended as if never killed" in done.stdout
