import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_vla.training.saving import find_flaw

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "scripts" / "accelerate"
SMALL = {"data.eval_episodes": "[]", "training.disable_tqdm": "true", "training.eval_strategy": "no"}
FAMILIES = {  # a vocabulary of actions, and a head that removes noise
    "spatialvla_tiny": {"data.chunk_size": 8},
    "tinyvla_tiny": {"data.chunk_size": 8, "model.config.head_config.denoiser.down_dims": "[16, 32]"},
}


def start(command, recipe, options, num_processes=1, script="tests/training/of_several_processes.py"):
    arguments = [script, *command, "--config", f"scripts/recipes/{recipe}.yaml"]
    arguments += [f"--{name}={value}" for name, value in (SMALL | FAMILIES[recipe] | options).items()]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def learn(folder, recipe, num_processes, demos, **options):
    """Train on 8 rows a step; the curve, and what each process learnt from."""
    options = {
        "data.source": demos,
        "data.episodes": "[0]",
        "training.output_dir": folder,
        "training.max_steps": 6,
        "training.per_device_train_batch_size": 4 // num_processes,
        "training.gradient_accumulation_steps": 2,
        "training.logging_steps": 1,
        "training.save_steps": 3,
        "training.warmup_steps": 0,
    } | options
    start(["train"], recipe, options, num_processes)
    logs = [Path(f"{folder}.{rank}").read_text().splitlines() for rank in range(num_processes)]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry], [[json.loads(line) for line in log] for log in logs]


@pytest.mark.parametrize("recipe", [pytest.param("spatialvla_tiny", marks=pytest.mark.slow), "tinyvla_tiny"])
def test_two_processes_learn_what_one_learns(recipe, demos, tmp_path):
    one, (rows_of_one,) = learn(tmp_path / "one", recipe, 1, demos)
    two, rows_of_two = learn(tmp_path / "two", recipe, 2, demos)
    for batch, *halves in zip(rows_of_one, *rows_of_two, strict=True):
        assert batch["rows"] == halves[0]["rows"] + halves[1]["rows"]
    if recipe == "tinyvla_tiny":  # means of unequal numbers of actions: a mean over actions would differ
        assert sum(first["num_real"] != second["num_real"] for first, second in zip(*rows_of_two, strict=True)) >= 3
    for entry, other in zip(one, two, strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert entry["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert len({round(entry["loss"], 4) for entry in one}) == 6
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(weights[name], others[name], atol=1e-4) for name in weights)
    folder = tmp_path / "two" / "checkpoint-3"
    assert {"rng_state_0.pth", "rng_state_1.pth", "unlogged_0.json", "unlogged_1.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert find_flaw(folder) is None


def test_a_process_that_does_not_write_writes_nothing(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer._summary = {}
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    trainer._save(tmp_path / "before the writer has made it")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_two_processes_go_on_where_they_were(demos, tmp_path):
    whole, first = learn(tmp_path, "tinyvla_tiny", 2, demos, **{"training.logging_steps": 2})
    weights = load_file(tmp_path / "model.safetensors")
    last = tmp_path / "checkpoint-6" / "rng_state_1.pth"  # which process 1 alone misses
    last.write_bytes(last.read_bytes()[:-1])
    resume = {"training.resume_from_checkpoint": "true", "training.logging_steps": 2}
    again, logs = learn(tmp_path, "tinyvla_tiny", 2, demos, **resume)
    assert logs == [[entry for entry in log if entry["step"] >= 3] for log in first]
    assert again == whole
    other = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[name], other[name]) for name in weights)


@pytest.mark.slow
def test_nodes_that_do_not_see_the_checkpoints_do_not_start_anew(demos, tmp_path):
    options = {"data.source": demos, "training.output_dir": tmp_path, "training.resume_from_checkpoint": "true"}
    said = start(["apart"], "tinyvla_tiny", options, 2)
    for process in range(2):
        assert f"process {process}: Not all processes see the checkpoints ['{tmp_path}/checkpoint-2']" in said


@pytest.mark.slow
def test_two_processes_do_not_go_on_as_one(demos, tmp_path):
    options = {"training.max_steps": 3, "training.resume_from_checkpoint": "true"}
    learn(tmp_path, "tinyvla_tiny", 2, demos, **options)
    with pytest.raises(AssertionError, match="num processes was 2, is 1. Resume with as many as then"):
        learn(tmp_path, "tinyvla_tiny", 1, demos, **options)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(FAMILIES))
def test_a_model_in_shards_learns_what_a_whole_one_learns(recipe, demos, tmp_path):
    """FSDP2 without accelerate, which makes it plain data parallelism on a CPU."""
    options = {"data.source": demos, "data.episodes": "[0]", "training.output_dir": tmp_path}
    came = json.loads(start(["shard"], recipe, options, 2).strip().splitlines()[-1])
    assert came["num_blocks"] >= 4 and came["share"] < 0.6
    assert came["loss"][0] == pytest.approx(came["loss"][1], abs=1e-5)
    assert came["norm"][0] == pytest.approx(came["norm"][1], rel=1e-4)
    assert came["missing"] == [] and came["away"] < 1e-5 < 1e-4 < came["moved"]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_configurations_are_accelerates(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # raises on names that it does not know
    wanted = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert config.distributed_type == wanted and config.mixed_precision == "no"
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if wanted == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    assert "machine_rank" in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_every_gpu_learns_and_goes_on(name, demos, tmp_path):
    """Steps on all GPUs of the machine; the second start goes on from the first one's checkpoint."""
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    for max_steps in (4, 6):
        options = {"data.source": demos, "training.output_dir": tmp_path, "training.max_steps": max_steps}
        options |= {"data.eval_episodes": "[3]", "training.eval_strategy": "steps", "training.eval_steps": 2}
        options |= {"training.ema_decay": 0.9} if name == "ddp" else {}  # of whole weights alone
        options |= {"training.save_steps": 2, "training.resume_from_checkpoint": "true", "training.logging_steps": 1}
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
        command += ["--num_processes", str(torch.cuda.device_count()), "scripts/train.py"]
        command += ["--config", "scripts/recipes/tinyvla_tiny.yaml"]
        command += [f"--{name}={value}" for name, value in (SMALL | options).items()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in history if "eval_action_error" in entry][:3] == [2, 4, 6]
    assert all(find_flaw(tmp_path / f"checkpoint-{step}") is None for step in (2, 4, 6))
    assert load_file(tmp_path / "model.safetensors")
