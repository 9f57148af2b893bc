import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_vla  # noqa: F401
from hf_vla.training.checkpoints import checkpoint_to_resume, last_good, rotate
from hf_vla.training.durable import TrainingStopped
from hf_vla.training.ema import check_average
from hf_vla.training.run import train
from hf_vla.training.saving import (
    MANIFEST,
    UNFINISHED,
    find_flaw,
    staging_folder,
    write_manifest,
)

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


def test_going_on_within_a_later_epoch_withholds_the_same_cameras(make_recipe, tmp_path):
    options = {"data__episodes": [0], "data__eval_episodes": [], "data__camera_dropout": 0.5}
    options |= {"model__config__head_config__denoiser__down_dims": [16, 32]}
    options |= {"training__per_device_train_batch_size": 8}  # five steps an epoch
    options |= {"training__save_steps": 7, "training__max_steps": 8}
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(make_recipe(whole, "tinyvla_tiny", **options))
    shutil.copytree(whole / "checkpoint-7", again / "checkpoint-7")
    train(make_recipe(again, "tinyvla_tiny", **options, training__resume_from_checkpoint=True))
    assert len(history(whole)) == 8
    assert_same_end(again, whole)


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
    third, sixth = copy(whole, tmp_path, 3, 6)
    for folder in (third, sixth):
        (folder / MANIFEST).unlink()
        os.utime(folder, (9, 9))
    tenth = third.rename(tmp_path / "checkpoint-10")  # as text, 6 comes after 10
    assert resume() == str(tenth)


def test_the_branch_that_was_learnt_last_goes_on(whole, resume, tmp_path):
    third, sixth = copy(whole, tmp_path, 3, 6)
    fourth = shutil.copytree(third, tmp_path / "checkpoint-4")
    path = fourth / MANIFEST  # saved after going back from step 6 to step 3
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time": time.time()}))
    os.utime(sixth)  # as copying to another place may do
    assert resume() == str(fourth)
    assert str(fourth) in last_good(tmp_path)
    rotate(tmp_path, 1, [])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_folder_that_is_not_there_is_called_so(resume, tmp_path):
    with pytest.raises(ValueError, match="checkpoint-9 is no folder. Restore it, or"):
        resume(str(tmp_path / "checkpoint-9"))


def test_the_trainer_itself_looks_before_it_goes_on(whole, make_trainer, tmp_path):
    _, sixth = copy(whole, tmp_path, 3, 6)
    flip_a_bit(sixth / "model.safetensors")
    fill(staging_folder(tmp_path) / "checkpoint-9", config__json="{}")
    trainer = make_trainer(tmp_path, "divla_tiny", **RUN)
    with pytest.raises(ValueError, match="checkpoint-6 is damaged: its model.safetensors is not what was written"):
        trainer.train(resume_from_checkpoint=str(sixth))
    assert not (tmp_path / UNFINISHED).exists()


def test_a_trainer_without_a_recipe_compares_its_arguments(whole, make_trainer, tmp_path):
    third, _ = copy(whole, tmp_path, 3, 6)
    trainer = make_trainer(tmp_path, "divla_tiny", **(RUN | {"training__seed": 7}))
    with pytest.raises(ValueError, match="training.seed was 0, is 7"):
        trainer.train(resume_from_checkpoint=str(third))


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"num_processes": 8}, "num processes was 8, is 1"),
        ({"rows_per_step": 16}, "rows per step was 16, is 4"),
        ({"num_processes": 2, "rows_per_step": 8}, "num processes was 2, is 1; rows per step was 8, is 4"),
    ],
)
def test_other_processes_or_rows_do_not_go_on(whole, make_recipe, tmp_path, saved, message):
    (third,) = copy(whole, tmp_path, 3)
    manifest = json.loads((third / MANIFEST).read_text())
    assert manifest["num_processes"] == 1 and manifest["rows_per_step"] == 4
    (third / "rng_state.pth").rename(third / "rng_state_0.pth")  # as several processes leave it
    manifest["files"]["rng_state_0.pth"] = manifest["files"].pop("rng_state.pth")
    (third / MANIFEST).write_text(json.dumps(manifest | saved))
    arguments = make_recipe(tmp_path, "divla_tiny", **RUN, training__resume_from_checkpoint=True).training
    with pytest.raises(ValueError, match=f"{third}: {message}. Resume with as many as then, or start a new run"):
        checkpoint_to_resume(arguments)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_says_that_weights_are_sharded(whole, resume, make_recipe, tmp_path, monkeypatch, name):
    (third,) = copy(whole, tmp_path, 3)
    (third / "optimizer.pt").rename(third / "optimizer.bin")  # as FSDP calls it
    write_manifest(third)
    with pytest.raises(ValueError, match=r"lacks \['optimizer.pt'\]"):
        resume(str(third))
    arguments = make_recipe(tmp_path, training__resume_from_checkpoint=True).training
    monkeypatch.setenv(name, "true")
    assert checkpoint_to_resume(arguments) == str(third)
    arguments.ema_decay = 0.9
    with pytest.raises(ValueError, match="which FSDP and DeepSpeed cut into shards"):
        check_average(arguments)


def test_what_was_pushed_goes_on_from_its_download(whole, make_recipe, tmp_path):
    (third,) = copy(whole, tmp_path, 3)
    last = third.rename(tmp_path / "last-checkpoint")
    train(make_recipe(tmp_path, "divla_tiny", **RUN, training__resume_from_checkpoint=str(last)))
    assert_same_end(tmp_path, whole)


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


def test_rotation_knows_the_best_by_any_name(tmp_path, monkeypatch):
    for age, step in enumerate([3, 6, 9]):
        os.utime(fill(tmp_path / "out" / f"checkpoint-{step}", a="a"), (age, age))
    monkeypatch.chdir(tmp_path)
    rotate(Path("out"), 2, [Path("out/checkpoint-9"), str(tmp_path / "out" / "checkpoint-3")])
    assert sorted(path.name for path in Path("out").iterdir()) == ["checkpoint-3", "checkpoint-9"]


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


def test_old_checkpoints_that_cannot_be_deleted_stop_nothing(make_recipe, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hf_vla.training.durable.rotate", refuse)
    train(make_recipe(tmp_path, training__save_total_limit=1, training__max_steps=2, training__save_steps=1))
    assert caplog.text.count("could not be deleted: OSError: [Errno 28] No space left on device") == 2
    assert find_flaw(tmp_path / "checkpoint-2") is None


def test_a_state_that_cannot_be_saved_is_said(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    (tmp_path / "trainer_state.json").mkdir(parents=True)
    with pytest.raises(TrainingStopped, match="trainer_state.json could not be saved in .*No checkpoint is in"):
        trainer.save_state()
    assert not (tmp_path / UNFINISHED).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "short"), [(1, ["--training.max_steps=12"]), (3, ["--processes=2", "--training.max_steps=9"]), (20, [])]
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(kills, short):
    command = [sys.executable, "scripts/kill_test.py", "--kills", str(kills), *short]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{kills} kills: every run ended as if never killed" in done.stdout
