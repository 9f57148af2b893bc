"""Kill a training again and again with SIGKILL, also while it saves, and compare what it becomes with an unkilled one.

`python scripts/kill_test.py --kills 20` prints a line for each kill and leaves with 1 if anything differs: the curve
of the losses (bit for bit), the rows that each step read, the final weights, or a checkpoint that is not whole. With
`--processes 2` that many learn together, and are killed together. Names of a recipe such as `--training.max_steps=90`
go to the training.
"""

import argparse
import json
import os
import platform
import random
import signal
import socket
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
        entry = {"life": os.environ["LIFE"], "rank": trainer.args.process_index, "step": trainer.state.global_step + 1}
        entry["rows"] = [row for _, row in inputs["rows"]]
        log.write(json.dumps(entry) + "\n")
        log.flush()
        return step(trainer, model, inputs, *args)

    VLATrainer.training_step = logged
    run.train(recipe)


class Life:
    """The processes of a training, from its start to its end or to a kill."""

    def __init__(self, folder, options, num_processes, number):
        values = TRAINING | options
        command = [sys.executable, __file__, "--child", "--config", str(values.pop("--config"))]
        command += [*(f"{name}={value}" for name, value in values.items()), f"--training.output_dir={folder}"]
        environment = os.environ | {"LIFE": str(number)}
        if num_processes > 1:
            with socket.create_server(("localhost", 0)) as free:
                environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
            environment |= {"WORLD_SIZE": str(num_processes), "ACCELERATE_USE_CPU": "true"}
        self.processes = []
        for rank in range(num_processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {}
            with Path(f"{folder}.log").open("ab") as log:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment | place, stdout=log, stderr=log)
                )

    def alive(self):
        return all(process.poll() is None for process in self.processes)

    def wait(self):
        """The worst exit status."""
        return max(abs(process.wait()) for process in self.processes)

    def kill(self):
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        self.wait()


def rows_of(folder):
    """Of each life that learnt anything, {(step, rank): rows of its batches}, in their order."""
    lives, path = {}, Path(f"{folder}.rows")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # the process was killed while it wrote this
            continue
        lives.setdefault(entry["life"], {}).setdefault((entry["step"], entry["rank"]), []).append(entry["rows"])
    return list(lives.values())


def wait_for(condition, life, seconds=240.0):
    """Poll; whether it came true while all processes lived."""
    end = time.monotonic() + seconds
    while life.alive() and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def kill_at_random(life, folder, moments, kind):
    """Kill a life at a random moment of a kind; says what it left, or None where it ended before."""
    saving, before = folder / UNFINISHED / "saving", len(rows_of(folder))
    if kind == "start":
        time.sleep(moments.uniform(0, 12))
    elif kind == "step":
        wait_for(lambda: len(rows_of(folder)) > before, life)
        time.sleep(moments.uniform(0, 3))
    elif kind == "save":
        for _ in range(moments.randint(1, 3)):
            wait_for(lambda: not saving.exists(), life)
            wait_for(saving.exists, life)
        time.sleep(moments.uniform(0, 0.12))
    else:  # the final model, which is no checkpoint
        wait_for(lambda: list((folder / UNFINISHED).glob("*/*.json")), life, 1200.0)
        time.sleep(moments.uniform(0, 0.01))
    if not life.alive():
        return None
    life.kill()
    return left_by_kill(folder, learnt=len(rows_of(folder)) > before)


def left_by_kill(folder, learnt):
    """What a killed life was doing, by what it left."""
    names = sorted(str(path.relative_to(folder / UNFINISHED)) for path in (folder / UNFINISHED).rglob("*"))
    if not names and (folder / "config.json").is_file():
        return "when the final model was in its place"
    if not names:
        return "while it learned" if learnt else "before its first step"
    doing = "deleted an old checkpoint"
    if any(name.startswith("saving/checkpoint-") for name in names):
        doing = "saved a checkpoint"
    elif any(name.startswith(("saving", "installing")) for name in names):
        doing = "saved the final model" if any("/" in name for name in names) else "began to save"
    return f"while it {doing}, {len(names)} names unfinished, the last {names[-1]}"


def checkpoints(folder):
    """(step, flaw) of each folder that looks like a checkpoint."""
    from hf_vla.training.saving import find_flaw

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
        for rank in {rank for _, rank in life}:
            steps = [step for step, other in life if other == rank]
            if steps != list(range(min(steps), max(steps) + 1)):
                yield f"the steps of life {number}, {steps}"
            read, wanted = ([own[step, rank] for step in steps] for own in (life, rows))
            # the kill may have come before the last step's second batch
            if read[:-1] != wanted[:-1] or read[-1] != wanted[-1][: len(read[-1])]:
                yield f"the rows of life {number}"
    if all(max(rows) not in life for life in lives):
        yield "the last step"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    known, rest = parser.parse_known_args()
    options = dict(argument.split("=", 1) for argument in rest)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, {packages}")
    moments, failures, runs, doings = random.Random(known.seed), [], 0, []
    # one kill before the first step, and the last one while the final model is saved
    kinds = moments.choices(["start", "step", "save"], [1, 3, 4], k=known.kills)
    if known.kills > 2:
        kinds[0], kinds[-1] = "start", "install"
    with tempfile.TemporaryDirectory() as place:
        reference = Path(place, "reference")
        began = time.monotonic()
        if Life(reference, options, known.processes, 0).wait() != 0:
            sys.exit(Path(f"{reference}.log").read_text(encoding="utf-8")[-3000:])
        print(f"never killed: {len(curve(reference))} entries of the curve in {time.monotonic() - began:.0f} s")
        while len(doings) < known.kills:
            runs += 1
            folder = Path(place, f"run{runs}")
            for number in range(1000):
                life = Life(folder, options, known.processes, number)
                kills = len(doings)
                if kills == known.kills or (how := kill_at_random(life, folder, moments, kinds[kills])) is None:
                    if life.wait() != 0:
                        sys.exit(Path(f"{folder}.log").read_text(encoding="utf-8")[-3000:])
                    break
                doings.append(how.partition(",")[0])
                lives, found = rows_of(folder), checkpoints(folder)
                failures += [f"checkpoint-{step} after kill {kills + 1}: {flaw}" for step, flaw in found if flaw]
                learnt = f"steps {min(lives[-1])[0]} to {max(lives[-1])[0]}" if lives else "no step"
                whole = [step for step, _ in found]
                print(f"kill {kills + 1:2}, run {runs}: {how}; last learnt {learnt}; whole: {whole}", flush=True)
            wrong = list(differences(folder, reference))
            failures += [f"run {runs}: {difference}" for difference in wrong]
            print(f"run {runs} ended after {number + 1} lives: {'differs' if wrong else 'the same'}")
            warned = Path(f"{folder}.log").read_text(encoding="utf-8").splitlines()
            print(*sorted({f"  {line}"[:160] for line in warned if UNFINISHED in line or "WARNING" in line}), sep="\n")
    print(*(f"{doings.count(doing)} kills {doing}" for doing in sorted(set(doings))), sep=", ")
    print("FAILED: " + "; ".join(failures) if failures else f"{known.kills} kills: every run ended as if never killed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        train_and_log_rows(sys.argv[2:])
    else:
        main()
