import errno
import multiprocessing
import os
import shutil
import signal
import stat
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import hf_vla  # noqa: F401
from hf_vla.training.durable import TrainingStopped
from hf_vla.training.saving import (
    MANIFEST,
    UNFINISHED,
    install,
    publish,
    recover,
    staging_folder,
    write_manifest,
)


def fill(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


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


def fail_at(monkeypatch, name):
    """Let no file or folder of this name come to its place."""
    replace = os.replace

    def refuse(source, place):
        if Path(place).name == name and UNFINISHED not in str(place):
            raise OSError(errno.EIO, "Input/output error", str(place))
        return replace(source, place)

    monkeypatch.setattr("os.replace", refuse)


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    old, calls = fill(tmp_path / "checkpoint-3", old="old"), []
    replace = os.replace

    def refuse_once(source, place):
        if Path(place) == old and not calls:
            calls.append(source)
            raise OSError(errno.EIO, "Input/output error")
        return replace(source, place)

    monkeypatch.setattr("os.replace", refuse_once)
    with pytest.raises(OSError, match="Input/output error"):
        publish(fill(staging_folder(tmp_path) / "checkpoint-3", new="new"), old)
    assert calls and [path.name for path in old.iterdir()] == ["old"]


def test_a_checkpoint_killed_while_a_damaged_one_replaces_it_comes_back(tmp_path):
    fill(tmp_path / UNFINISHED / "replaced" / "checkpoint-3", old="old")
    fill(tmp_path / UNFINISHED / "saving" / "checkpoint-3", new="new")  # without a manifest
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert (tmp_path / "checkpoint-3" / "old").is_file()


def test_a_model_that_cannot_be_replaced_is_finished_later(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run")
    trainer.save_model()
    wanted = loaded(tmp_path / "run")
    weight = next(trainer.model.parameters())
    torch.nn.init.zeros_(weight)
    trainer.model.config.problem_type = "regression"
    with monkeypatch.context() as patch:
        fail_at(patch, "config.json")
        with pytest.raises(TrainingStopped, match=r"The model of step 0 could not be saved .*Input/output error"):
            trainer.save_model()
    assert (tmp_path / "run" / UNFINISHED / "installing" / "config.json").is_file()
    fill(staging_folder(tmp_path / "run") / "checkpoint-1", a="a")  # another save between leaves it alone
    publish(tmp_path / "run" / UNFINISHED / "saving" / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    recover(tmp_path / "run")
    new = loaded(tmp_path / "run")
    assert new.keys() == wanted.keys() and any(not torch.equal(new[name], wanted[name]) for name in new)
    assert not (tmp_path / "run" / UNFINISHED).exists()


@pytest.mark.parametrize(("code", "fails"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_need_not_sync_folders(tmp_path, monkeypatch, code, fails):
    sync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, "refused")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", refuse_folders)
    fill(tmp_path, a="a")
    with pytest.raises(OSError, match="refused") if fails else nullcontext():
        write_manifest(tmp_path)


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
