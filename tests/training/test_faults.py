import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_vla.training.callbacks import StopOnTermination
from hf_vla.training.durable import TrainingStopped, one_line
from hf_vla.training.rows import RowsOfBatch, describe_rows
from hf_vla.training.run import train
from hf_vla.training.saving import UNFINISHED, find_flaw
from hf_vla.training.trainer import VLATrainer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launch(demos, tmp_path):
    """Start `scripts/train.py` on few rows, with a checkpoint every second step."""
    started = []

    def start(source=demos, recipe="spatialvla_tiny", **options):
        options = {
            "data.source": source,
            "data.eval_episodes": "[]",
            "training.output_dir": tmp_path / "out",
            "training.max_steps": 1000,
            "training.per_device_train_batch_size": 2,
            "training.logging_steps": 1,
            "training.save_steps": 2,
            "training.eval_strategy": "no",
            "training.disable_tqdm": "true",
        } | {name.replace("__", "."): value for name, value in options.items()}
        command = [sys.executable, "scripts/train.py", "--config", f"scripts/recipes/{recipe}.yaml"]
        command += [f"--{name}={value}" for name, value in options.items()]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "10000"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(path, process):
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-3000:]
        time.sleep(0.005)


def newest(folder):
    steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    return steps[max(steps)]


@pytest.mark.slow
def test_a_disk_that_is_full_stops_the_training_and_keeps_the_last_checkpoint(launch, tmp_path):
    process = launch()
    wait_for(tmp_path / "out" / "checkpoint-2", process)
    # no file may grow beyond this: weights still fit, the optimizer's two moments do not
    limit = (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").stat().st_size - 100_000
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output[-3000:]
    last = newest(tmp_path / "out")
    step = int(last.name.rpartition("-")[2]) + 2
    assert f"checkpoint-{step} could not be saved in {tmp_path / 'out'}, where " in output
    assert f"The last good checkpoint is {last};" in output and "Traceback" not in output
    assert find_flaw(last) is None and not (tmp_path / "out" / UNFINISHED).exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_goes_bad_stops_the_training_and_keeps_the_last_checkpoint(launch, demos, tmp_path, workers):
    source = shutil.copytree(demos, tmp_path / "robosuite_demos")
    process = launch(source, training__dataloader_num_workers=workers)
    wait_for(tmp_path / "out" / "checkpoint-2", process)
    for path in source.rglob("*.mp4"):  # what is open and read, not another file of the same name
        with path.open("rb+") as file:
            file.write(os.urandom(path.stat().st_size))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output[-3000:]
    last = newest(tmp_path / "out")
    assert "data could not be read: " in output and ".mp4: cannot be decoded" in output, output[-3000:]
    assert f"The last good checkpoint is {last};" in output and "Traceback" not in output
    assert find_flaw(last) is None


@pytest.mark.slow
def test_a_job_that_is_told_to_end_saves_and_goes_on_later(launch, tmp_path):
    process = launch(training__save_steps=1000)
    end = time.monotonic() + 120
    for line in process.stdout:
        if "'loss'" in line or time.monotonic() > end:
            break
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output[-3000:]
    saved = newest(tmp_path / "out")
    step = json.loads((saved / "trainer_state.json").read_text())["global_step"]
    assert step < 1000 and find_flaw(saved) is None
    assert not (tmp_path / "out" / "config.json").exists()  # a run that is not finished has no model yet
    process = launch(training__max_steps=step + 1, training__resume_from_checkpoint="true")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == step + 1


class At(TrainerCallback):
    """Does something at an event of a training."""

    def __init__(self, event, action):
        setattr(self, event, lambda args, state, control, **kwargs: action(state))


SMALL = {"training__per_device_train_batch_size": 2, "training__save_steps": 2, "training__max_steps": 8}


def test_a_full_disk_keeps_the_last_checkpoint(make_recipe, tmp_path):
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(state):  # no file may grow beyond this: weights still fit, the optimizer's two moments do not
        if state.global_step == 2:
            limit = (tmp_path / "checkpoint-2" / "optimizer.pt").stat().st_size - 100_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    try:
        with pytest.raises(TrainingStopped, match=r"checkpoint-4 could not be saved in .*checkpoint-2; training"):
            train(make_recipe(tmp_path, **SMALL), [At("on_save", fill_up)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert find_flaw(tmp_path / "checkpoint-2") is None and not (tmp_path / UNFINISHED).exists()


def test_a_row_that_cannot_be_read_stops_the_training_and_an_evaluation(make_trainer, tmp_path, monkeypatch):
    """In a batch, in an evaluation, and where the memory is estimated from the first row."""
    trainer = make_trainer(tmp_path, **SMALL, training__save_strategy="steps", training__estimate_memory=True)

    class Broken(type(trainer.train_dataset)):
        def __getitem__(self, row):
            raise ValueError(f"file-7.mp4: row {row} cannot be decoded")

    for name, call, message in (
        ("eval_dataset", trainer.evaluate, "The evaluation after step 0 failed: ValueError: file-7.mp4: row"),
        ("train_dataset", trainer.train, "After step 0, data could not be read: ValueError: file-7.mp4: row 0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(trainer, name), "__class__", Broken)
            with pytest.raises(TrainingStopped, match=rf"{message} .*No checkpoint is in"):
                call()


@pytest.mark.parametrize(("kind", "more"), [("train", ", double training.gradient_accumulation_steps"), ("eval", "")])
def test_full_memory_says_which_batch_to_halve(make_trainer, tmp_path, monkeypatch, kind, more):
    trainer = make_trainer(tmp_path, **SMALL)

    def full(*args, **kwargs):
        torch.empty(1 << 50)  # a real error of the allocator

    monkeypatch.setattr(trainer, "compute_loss" if kind == "train" else "prediction_step", full)
    size = getattr(trainer.args, f"per_device_{kind}_batch_size")
    with pytest.raises(TrainingStopped, match=f"memory.*Halve training.per_device_{kind}_batch_size, {size}{more}"):
        trainer.train() if kind == "train" else trainer.evaluate()


def test_other_errors_of_a_model_are_not_disguised(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **SMALL)
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **kwargs: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        trainer.train()


@pytest.mark.parametrize("event", [pytest.param("on_step_begin", marks=pytest.mark.slow), "on_prediction_step"])
def test_sigterm_saves_at_once_and_the_run_ends_as_if_it_had_not_come(make_recipe, tmp_path, event):
    """Also in an evaluation, in which the weights are an average."""
    options = SMALL | {"training__save_steps": 100, "training__eval_strategy": "steps", "training__eval_steps": 3}
    options |= {"training__ema_decay": 0.9, "training__max_steps": 5, "training__dataloader_num_workers": 0}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(make_recipe(whole, **options))
    before = signal.getsignal(signal.SIGTERM)

    def tell(state):
        if state.global_step == (2 if event == "on_step_begin" else 3):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        train(make_recipe(cut, **options), [At(event, tell)])
    assert left.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert newest(cut).name == "checkpoint-3" and find_flaw(newest(cut)) is None
    entries = json.loads((newest(cut) / "trainer_state.json").read_text())["log_history"]
    assert not any("eval_loss" in entry for entry in entries)  # it was left, or not begun
    train(make_recipe(cut, **options, training__resume_from_checkpoint=True))
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sigterm_does_not_wait_for_predicted_actions(make_trainer, tmp_path, monkeypatch):
    """Nor for the first evaluation, before which there is nothing to save."""
    options = SMALL | {"training__eval_strategy": "steps", "training__eval_on_start": True}
    trainer, listener = make_trainer(tmp_path, **options), StopOnTermination()
    trainer.add_callback(listener)
    measure = trainer.action_errors

    def tell_and_measure(dataset):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(dataset)

    monkeypatch.setattr(trainer, "action_errors", tell_and_measure)
    monkeypatch.setattr(trainer.model, "predict_action", lambda **_: pytest.fail("it goes on"))
    with pytest.raises(SystemExit) as left:
        trainer.train()
    assert left.value.code == 143 and not list(tmp_path.glob("checkpoint-*"))


def test_sigterm_is_given_back_where_a_training_stops(make_trainer, tmp_path, monkeypatch):
    before, trainer = signal.getsignal(signal.SIGTERM), make_trainer(tmp_path, **SMALL)
    trainer.add_callback(StopOnTermination())

    def refuse(*args, **kwargs):
        assert signal.getsignal(signal.SIGTERM) is not before
        raise ValueError("no")

    monkeypatch.setattr(trainer, "compute_loss", refuse)
    with pytest.raises(TrainingStopped, match="Step 1 was not taken with a batch of rows .*: ValueError: no"):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own uploads
def test_a_push_leaves_the_output_folder_alone(hub, make_recipe, tmp_path):
    """What is there is the model of a run that ended, or none: a copy would be seen half-written."""
    options = SMALL | {"training__push_to_hub": True, "training__hub_model_id": "me/run", "data__eval_episodes": []}
    options |= {"training__hub_token": hub.token, "training__hub_always_push": True, "training__save_total_limit": 1}
    options |= {"training__max_steps": 4, "training__hub_strategy": "all_checkpoints", "training__save_steps": 1}
    seen, folder = [], tmp_path / "run"
    look = At("on_step_end", lambda state: seen.append([path.name for path in folder.glob("*") if path.is_file()]))
    train(make_recipe(folder, **options), [look])
    assert len(seen) == 4 and not any(
        name.startswith(("config", "model", "processor")) for each in seen for name in each
    )
    files = set(hub.files("me/run", kind="model"))
    at_root = {name for name in files if "/" not in name}
    assert {"model.safetensors", "config.json", "processor_config.json"} <= at_root
    assert not at_root & {"optimizer.pt", "manifest.json", "recipe.yaml", "trainer_state.json", "unlogged_0.json"}
    wanted = {"optimizer.pt", "manifest.json", "model.safetensors", "rng_state.pth", "unlogged_0.json"}
    for step in range(1, 5):  # those that were deleted meanwhile as well: their uploads were waited for
        assert {f"checkpoint-{step}/{name}" for name in wanted} <= files
    assert not [name for name in files if name.endswith("recipe.yaml")]  # which names folders of this computer


def test_items_need_not_say_which_rows_they_are():
    collate = RowsOfBatch(lambda items: {"count": len(items)})
    assert collate([{"a": 1}, {"a": 2}]) == {"count": 2, "rows": []}
    assert collate([torch.ones(2)]) == {"count": 1, "rows": []}
    assert collate([{"index": torch.tensor(3), "dataset": "d"}]) == {"count": 1, "rows": [("d", 3)]}


def test_deepspeed_is_told_before_its_backward_pass(make_trainer, tmp_path, small_head):
    """Which also takes the step; here without DeepSpeed itself."""
    trainer = make_trainer(tmp_path, "divla_tiny", model__config=small_head)
    trainer.is_deepspeed_enabled = True
    next(trainer.model.action_head.parameters()).data.fill_(float("inf"))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    with pytest.raises(ValueError, match="here the loss is (nan|inf), and somewhere it is not finite"):
        trainer.compute_loss(trainer.model, batch)


class Poisoned(VLATrainer):
    """Its noise prediction is not a number from one step on."""

    at, what = 4, "loss"

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.state.global_step + 1 >= self.at and self.what == "loss":
            next(model.action_head.parameters()).data.fill_(float("inf"))
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.state.global_step + 1 >= self.at and self.what == "value":
            result = result + float("inf")
        if self.state.global_step + 1 >= self.at and self.what == "gradient":
            weight = next(each for each in model.parameters() if each.requires_grad)
            result = result + 0.0 * (weight - weight.detach()).sum().sqrt()  # of infinite slope at zero
        return result


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("loss", r"Step 4 was not taken: diffusion_loss is (nan|inf) in a batch of rows \[\d+, \d+\] of robosuite_"),
        (
            "value",
            r"Step 4 was not taken: loss is inf in a batch of rows \[\d+, \d+\] of robosuite_demos; loss is inf",
        ),
        (
            "gradient",
            r"Step 4 was not taken: the gradient is not finite; here the losses are, of rows \[\d+, \d+\]",
        ),
    ],
)
def test_a_loss_that_is_not_a_number_is_not_learnt_from(make_recipe, tmp_path, monkeypatch, small_head, what, message):
    seen = []

    class Watched(Poisoned):
        def training_step(self, model, inputs, *args):
            seen.append([row for _, row in inputs["rows"]])
            return super().training_step(model, inputs, *args)

    monkeypatch.setattr("hf_vla.training.run.VLATrainer", Watched)
    monkeypatch.setattr(Poisoned, "what", what)
    recipe = make_recipe(
        tmp_path,
        "divla_tiny",
        model__config=small_head,
        training__per_device_train_batch_size=2,
        training__gradient_accumulation_steps=2,
        training__save_steps=1,
        training__learning_rate=1e-4,
    )
    with pytest.raises(TrainingStopped, match=message) as stop:
        train(recipe)
    assert all(str(rows) in str(stop.value) for rows in seen[-2:]) and len(seen) == 8
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-3'};" in str(stop.value)
    assert find_flaw(tmp_path / "checkpoint-3") is None and newest(tmp_path).name == "checkpoint-3"
    weights = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
    assert all(entry["exp_avg"].isfinite().all() for entry in weights.values())


def test_what_is_said_of_an_error():
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert one_line(ValueError()) == "ValueError: "
    worker = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  a\nE: b\n"
    )
    assert one_line(ValueError(worker)) == "E: b"


def test_what_is_said_of_rows():
    assert describe_rows([("a", 3), ("b", 1), ("a", 2)]) == "rows [3, 2] of a and rows [1] of b"
    assert describe_rows([(None, 3)]) == "rows [3]"
    assert describe_rows([]) == "unknown rows"
