"""Kill a training again and again with SIGKILL, also while it saves, and compare what it becomes with an unkilled one.

`python scripts/kill_test.py --kills 20` prints a line for each kill and leaves with 1 if anything differs: the curve
of the losses (bit for bit), the rows that each step read, the final weights, or a checkpoint that is not whole. Names
of a recipe such as `--training.max_steps=90` go to the training.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNFINISHED = "_hf_vla_unfinished"
# A diffusion head draws noise, dropout withholds cameras, weights are averaged, two batches make a step, nine steps an
# epoch, and losses are logged between saves.
TRAINING = {
    "--config": ROOT / "scripts" / "recipes" / "tinyvla_tiny.yaml",
    "--data.source": ROOT / "scripts" / "data" / "robosuite_demos",
    "--data.episodes": "[0]",
    "--data.eval_episodes": "[]",
    "--data.camera_dropout": 0.3,
    "--model.config.head_config.denoiser.down_dims": "[16, 32]",
    "--training.max_steps": 60,
    "--training.per_device_train_batch_size": 2,
    "--training.gradient_accumulation_steps": 2,
    "--training.dataloader_num_workers": 1,
    "--training.ema_decay": 0.9,
    "--training.logging_steps": 2,
    "--training.save_steps": 3,
    "--training.save_total_limit": 2,
    "--training.eval_strategy": "no",
    "--training.disable_tqdm": "true",
    "--training.resume_from_checkpoint": "true",
}


def train_and_log_rows(arguments):
    """The process that is killed: an ordinary training, which also writes down the rows of each batch."""
    from hf_vla.training import run
    from hf_vla.training.recipe import parse_recipe
    from hf_vla.training.trainer import VLATrainer

    recipe = parse_recipe(arguments)
    log = Path(f"{recipe.training.output_dir}.rows").open("a", encoding="utf-8")
    step = VLATrainer.training_step

    def logged(trainer, model, inputs, *args):
        entry = {"pid": os.getpid(), "step": trainer.state.global_step + 1, "rows": [row for _, row in inputs["rows"]]}
        log.write(json.dumps(entry) + "\n")
        log.flush()
        return step(trainer, model, inputs, *args)

    VLATrainer.training_step = logged
    run.train(recipe)


def start(folder, options):
    arguments = [f"{name}={value}" for name, value in (TRAINING | options).items() if name != "--config"]
    command = [sys.executable, __file__, "--child", "--config", str((TRAINING | options)["--config"]), *arguments]
    output = Path(f"{folder}.log").open("ab")
    return subprocess.Popen([*command, f"--training.output_dir={folder}"], cwd=ROOT, stdout=output, stderr=output)


def rows_of(folder):
    """{step: rows} of each process that learnt anything, in their order."""
    lives, path = {}, Path(f"{folder}.rows")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # the process was killed while it wrote this
            continue
        lives.setdefault(entry["pid"], {}).setdefault(entry["step"], []).append(entry["rows"])
    return list(lives.values())


def wait_for(condition, process, seconds=120.0):
    """Poll; whether it came true while the process lived."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.001)
    return False


def kill_at_random(process, folder, moments):
    """Kill a process at a random moment; says which, or None where it ended before."""
    saving, before = folder / UNFINISHED / "saving", len(rows_of(folder))
    kind = moments.choices(["start", "step", "save"], [1, 3, 4])[0]
    if kind == "start":
        time.sleep(moments.uniform(0, 12))
    elif kind == "step":
        wait_for(lambda: len(rows_of(folder)) > before, process)
        time.sleep(moments.uniform(0, 3))
    else:
        for _ in range(moments.randint(1, 3)):
            wait_for(lambda: not saving.exists(), process)
            wait_for(saving.exists, process)
        time.sleep(moments.uniform(0, 0.12))
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = sorted(str(path.relative_to(folder / UNFINISHED)) for path in (folder / UNFINISHED).rglob("*"))
    return kind + (f", {len(left)} names unfinished, the last {left[-1]}" if left else ", nothing unfinished")


def checkpoints(folder):
    """(step, flaw) of each folder that looks like a checkpoint."""
    from hf_vla.training.manifest import find_flaw

    found = [(int(path.name.rpartition("-")[2]), find_flaw(path)) for path in folder.glob("checkpoint-*")]
    return sorted(found, key=lambda each: each[0])


def curve(folder):
    """What was logged at each step, without what depends on the clock."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry for entry in history if "train_runtime" not in entry]


def differences(folder, reference):
    """What a run that was killed has otherwise than the one that was not."""
    from safetensors.torch import load_file

    if curve(folder) != curve(reference):
        yield "the curve of the losses"
    weights, wanted = (load_file(each / "model.safetensors") for each in (folder, reference))
    if weights.keys() != wanted.keys() or not all(weights[name].equal(wanted[name]) for name in wanted):
        yield "the final weights"
    (rows,) = rows_of(reference)
    lives = rows_of(folder)
    for number, life in enumerate(lives):
        if list(life) != list(range(min(life), max(life) + 1)):
            yield f"the steps of life {number}, {list(life)}"
        last = max(life)  # of which the kill may have come before the second batch
        wrong = [step for step in life if life[step] != rows[step] and (step < last or life[step] != rows[step][:1])]
        if wrong:
            yield f"the rows of the steps {wrong} of life {number}"
    if max(lives[-1]) != max(rows):
        yield "the last step"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    known, rest = parser.parse_known_args()
    options = dict(argument.split("=", 1) for argument in rest)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}")
    moments, failures, kills, runs = random.Random(known.seed), [], 0, 0
    with tempfile.TemporaryDirectory() as place:
        reference = Path(place, "reference")
        began = time.monotonic()
        if start(reference, options).wait() != 0:
            sys.exit(Path(f"{reference}.log").read_text(encoding="utf-8")[-3000:])
        print(f"never killed: {len(curve(reference))} entries of the curve in {time.monotonic() - began:.0f} s")
        while kills < known.kills:
            runs += 1
            folder = Path(place, f"run{runs}")
            while True:
                process = start(folder, options)
                if kills == known.kills or (how := kill_at_random(process, folder, moments)) is None:
                    if process.wait() != 0:
                        sys.exit(Path(f"{folder}.log").read_text(encoding="utf-8")[-3000:])
                    break
                kills += 1
                lives, found = rows_of(folder), checkpoints(folder)
                failures += [f"checkpoint-{step} after kill {kills}: {flaw}" for step, flaw in found if flaw]
                steps = f"steps {min(lives[-1])} to {max(lives[-1])}" if lives else "no step"
                print(f"kill {kills:2}, run {runs}: {how}; last learnt {steps}; whole: {[step for step, _ in found]}")
            wrong = list(differences(folder, reference))
            failures += [f"run {runs}: {difference}" for difference in wrong]
            print(f"run {runs} ended after {len(rows_of(folder))} lives: {'differs' if wrong else 'the same'}")
            warned = Path(f"{folder}.log").read_text(encoding="utf-8").splitlines()
            print(*sorted({f"  {line}"[:160] for line in warned if UNFINISHED in line or "WARNING" in line}), sep="\n")
    print("FAILED: " + "; ".join(failures) if failures else f"{kills} kills: every run ended as if never killed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        train_and_log_rows(sys.argv[2:])
    else:
        main()
