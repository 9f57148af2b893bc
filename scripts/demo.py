"""What a shipped checkpoint does: predict on a frame it has never seen, then act in a simulator.

`make demo`, `make demo MODEL=spatialvla`; `python scripts/demo.py --model tinyvla_metaworld`. Pictures go to
outputs/try. The simulator is optional: without the extra `sim` it says how to get it. `make train-demo` trains.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from hf_vla import Policy
from hf_vla.evaluation.example import read_example
from hf_vla.evaluation.videos import Film

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = Path("spaces") / "action_demo" / "checkpoints"
SEED = 500_000  # neither an evaluation, which count from 0, nor a demonstration, which count from 1,000,000
FILMED = {
    "metaworld": ("plate-slide-side-v3", "corner3", 8),
    "robosuite": ("Lift", "sideview", 1),
}  # the task, the film's camera, actions executed of a chunk
FILM_SIZE = 240, 240
WIDTH = 120  # of the table in characters, where actions have many dimensions
PLAIN = {"highlight": False, "markup": False, "soft_wrap": True}


def find_checkpoint(name):
    """The folder of a shipped checkpoint, or of the first of a family."""
    there = sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))
    found = [each for each in there if each == name or each.startswith(f"{name}_")]
    if not found:
        sys.exit(f"No checkpoint of {name} is shipped; there are: {', '.join(there)}. `make train-demo` trains one.")
    return CHECKPOINTS / found[0]


def predict(policy, checkpoint, output, console):
    """Predict the chunk of the held-out frame, beside what was recorded there."""
    frame = read_example(checkpoint)
    pictures = {camera: Image.open(path) for camera, path in frame["images"].items()}
    observation = {f"observation.images.{camera}": np.asarray(each) for camera, each in pictures.items()}
    observation |= {"task": frame["task"], "observation.state": frame["state"]}
    policy.reset()
    chunk, recorded = policy.predict_chunk(observation), np.array(frame["actions"])
    chunk = chunk[: len(recorded)]  # an episode's end may come before the chunk's
    place = f"{frame['dataset']}, episode {frame['episode']}, frame {frame['frame']}, held out of training"
    table = Table(
        title=f'"{frame["task"]}"\n{place}\nrecorded | predicted, robot units', box=box.SIMPLE, padding=(0, 1)
    )
    table.add_column("step", justify="right")
    for name in policy.action_spec.names:
        table.add_column(name, justify="right", no_wrap=True)
    for step, rows in enumerate(zip(recorded, chunk, strict=True)):
        table.add_row(str(step), *(f"{was:.2f} | {is_:.2f}" for was, is_ in zip(*rows, strict=True)))
    table.add_section()
    error = np.abs(recorded - chunk)
    table.add_row("error", *(f"{each:.3f}" for each in error.mean(0)))
    console.print(table)
    if policy.reasoning is not None:
        console.print(f'It says: "{policy.reasoning}"', **PLAIN)
    plot(recorded, chunk, policy.action_spec.names, pictures, frame["task"]).savefig(output / "prediction.png")
    console.print(f"Mean absolute error {error.mean():.3f}. Wrote {output / 'prediction.png'}.", **PLAIN)


def plot(recorded, chunk, names, pictures, title):
    """Draw the pictures, and a line of what was recorded and of what is predicted for each dimension."""
    count = len(pictures) + len(names)
    columns = min(count, 5)
    figure = Figure(figsize=(2.4 * columns, 2.2 * -(-count // columns) + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(-(-count // columns), columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, picture) in zip(axes, pictures.items(), strict=False):
        axis.imshow(picture)
        axis.set_title(name)
    for axis, name, was, is_ in zip(axes[len(pictures) :], names, recorded.T, chunk.T, strict=False):
        axis.set_axis_on()
        axis.plot(was, color="0.4", label="recorded")
        axis.plot(is_, color="tab:red", marker="o", markersize=3, label="predicted")
        axis.set_title(name)
    axes[len(pictures)].legend(fontsize=7)
    return figure


def roll_out(policy, env_name, task, output, console):
    """Let the policy act for one episode, and film it."""
    camera = FILMED[env_name][1]
    try:
        from hf_vla.evaluation.contract import check_contract, plan_cameras
        from hf_vla.evaluation.envs.registry import simulator

        kind = simulator(env_name)
        cameras = plan_cameras(policy, kind)
        env = kind(task, cameras={camera: FILM_SIZE, **cameras.sizes}, depth=cameras.depth)
    except ImportError as error:
        pip = os.path.relpath(Path(sys.executable).parent / "pip")
        install = f"`{pip} install -c constraints.txt -e '.[sim]'`"
        console.print(f"{error} The next demo also acts then. (Here, {install} installs the simulators.)", **PLAIN)
        return
    check_contract(policy, cameras, env.action_spec, env.state_spec, env.camera_specs, env_name)
    policy.reset()
    observation, _ = env.reset(seed=SEED)
    path, over = output / "rollout.gif", False
    film = Film(path, env.action_spec.control_hz)
    film.add(observation[f"observation.images.{camera}"])
    while not over:
        action = policy.select_action(cameras.rename(observation))
        observation, _, terminated, truncated, _ = env.step(action)
        film.add(observation[f"observation.images.{camera}"])
        over = terminated or truncated
    film.finish(path)
    env.close()
    end = f"success after {env.episode_length} steps" if env.success else f"no success in {env.episode_length} steps"
    seconds = env.episode_length / env.action_spec.control_hz
    console.print(
        f'{env_name}, {task}, seed {SEED} (of no evaluation, no demonstration): "{env.instruction}"',
        f"{end}, {seconds:.1f} s of the robot's time. One episode says little: see docs/evaluation.md.",
        f"Wrote {path}.",
        sep="\n",
        **PLAIN,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinyvla", help="family or checkpoint (default: %(default)s)")
    parser.add_argument("--task", help="of the simulator")
    parser.add_argument("--output", type=Path, help="folder (default: outputs/try/CHECKPOINT)")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    start = time.perf_counter()
    checkpoint = find_checkpoint(arguments.model)
    output = arguments.output or Path("outputs") / "try" / checkpoint.name
    output.mkdir(parents=True, exist_ok=True)
    console = Console(width=WIDTH)
    policy = Policy.from_pretrained(checkpoint, device="cpu", seed=0)
    env_name = checkpoint.name.rpartition("_")[2]
    policy = Policy(policy.model, policy.processor, n_action_steps=FILMED[env_name][2], seed=0)
    console.print(f"{checkpoint}: {policy.model.num_parameters() / 1e6:.1f} million parameters", **PLAIN)
    predict(policy, checkpoint, output, console)
    roll_out(policy, env_name, arguments.task or FILMED[env_name][0], output, console)
    console.print(f"The demo took {time.perf_counter() - start:.0f} s.", **PLAIN)


if __name__ == "__main__":
    main()
