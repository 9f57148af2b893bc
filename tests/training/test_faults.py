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

from hf_vla.training.faults import TrainingStopped, describe_rows, one_line
from hf_vla.training.manifest import find_flaw
from hf_vla.training.run import train
from hf_vla.training.saving import UNFINISHED
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


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
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
