"""The whole way in a few minutes on two CPU cores: train a tiny model, save it, load it again, predict.

`make train-demo` (SpatialVLA), `make train-demo MODEL=tinyvla` or `divla`; `python scripts/train_demo.py`. Everything
it makes is in outputs/demo, outputs/demo_tinyvla or outputs/demo_divla.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoProcessor

import hf_vla  # noqa: F401  (makes the Auto classes know our families)
from hf_vla.cli.render import chunk_table, plot_chunk
from hf_vla.data.collator import VLACollator
from hf_vla.training.callbacks import TimeLimit
from hf_vla.training.datasets import open_datasets
from hf_vla.training.recipe import load_recipe
from hf_vla.training.run import train
from hf_vla.training.trainer import action_error

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "scripts" / "recipes"


class Demo(NamedTuple):
    """A family's demonstration: its name, recipe and training steps, where it is saved, what it sees."""

    title: str
    recipe: Path
    steps: int
    output: str
    sees: str


DEMOS = {
    "spatialvla": Demo(
        "tiny SpatialVLA",
        RECIPES / "spatialvla_tiny.yaml",
        750,
        "outputs/demo",
        "The model sees one picture and the instruction, neither the past nor the joints.",
    ),
    "tinyvla": Demo(
        "tiny TinyVLA",
        RECIPES / "tinyvla_tiny.yaml",
        500,
        "outputs/demo_tinyvla",
        "The model sees the pictures of two cameras, the instruction and where the hand and its fingers are, but not "
        "the past. Its actions are samples: the noise that they start from is the same in every evaluation.",
    ),
    "divla": Demo(
        "tiny DiVLA",
        RECIPES / "divla_tiny.yaml",
        500,
        "outputs/demo_divla",
        "The model sees the pictures of two cameras, the instruction and where the hand and its fingers are, but not "
        "the past; it says which phase of the task comes next, and what it said conditions its actions. Those are "
        "samples: the noise that they start from is the same in every evaluation.",
    ),
}
RECORDED = "the same, words as recorded"
SWAPPED = "the same, shown other pictures"
MEAN, MEDIAN, LAST = "mean action", "median action", "last action, repeated"
MEANING = """\
What this means: one unit is 5 cm of translation or half a radian of rotation per step, 20 steps a second; the \
gripper's whole range is 2 units. {sees} \
Shown pictures from another moment of the same task instead, it does worse as far as it uses them. \
Mean and median action of the training set are guesses without looking; the median is the best constant for this \
measure. The last action knows what the robot was just doing; motions are smooth, so it is hard to beat over \
{chunk_size} steps, but repeating it would never start or end a motion. These are errors on recorded pictures: \
nothing was executed, and a small error does not prove that a robot would finish the task. A model this small, \
trained for minutes on 19 episodes, shows that the pipeline works and no more.
"""


def evaluate(demo, output, num_frames=None):
    """Load the checkpoint like any other and compare its predictions with episodes that training never saw."""
    model, processor = (auto.from_pretrained(output / "model") for auto in (AutoModel, AutoProcessor))
    data = load_recipe(demo.recipe).data
    (opened,) = open_datasets(data)
    dataset, train_rows = opened.episodes, opened.train_rows
    collator = partial(VLACollator, unnorm_key=None, cameras=dataset.camera_keys, with_state=data.state is not None)
    column = dataset.column("action")

    # the first frame of an episode has no action before it that could be repeated
    rows = np.array([row for row in opened.eval_rows if dataset.column("frame_index")[row] > 0])
    rows = rows[np.linspace(0, len(rows) - 1, min(num_frames or len(rows), len(rows))).round().astype(int)]
    others, tasks = rows.copy(), dataset.column("task_index")[rows]
    for task in np.unique(tasks):
        others[tasks == task] = np.random.default_rng(0).permutation(rows[tasks == task])

    def with_own_words(items):
        return collator(processor).prompts(items)["inputs"]

    def with_recorded_words(items):
        return collator(partial(processor, reasoning=[item[data.reasoning] for item in items])).prompts(items)[
            "inputs"
        ]

    def predict(pictures, make_inputs=with_own_words):
        chunks, said, generator = [], [], torch.Generator().manual_seed(0)
        for places in np.array_split(np.arange(len(rows)), max(1, len(rows) // 32)):
            seen = [{key: dataset[row][key] for key in dataset.camera_keys} for row in pictures[places]]
            items = [dataset[row] | images for row, images in zip(rows[places], seen, strict=True)]
            prediction = model.predict_action(**make_inputs(items), generator=generator)
            chunks.append(processor.decode_actions(prediction))
            if prediction.reasoning_ids is not None:
                said += processor.decode_reasoning(prediction)
        return np.concatenate(chunks), said

    windows, is_pad = dataset.windows("action")
    actions, mask = windows[rows], ~is_pad[rows]
    chunks, said = predict(rows)
    guesses = {
        demo.title: chunks,
        **({RECORDED: predict(rows, with_recorded_words)[0]} if said else {}),
        SWAPPED: predict(others)[0],
        MEAN: np.broadcast_to(column[train_rows].mean(0), actions.shape),
        MEDIAN: np.broadcast_to(np.median(column[train_rows], axis=0), actions.shape),
        LAST: np.broadcast_to(column[rows - 1][:, None], actions.shape),
    }
    compare_errors(demo, guesses, actions, mask, processor.action_codec)

    each = (np.abs(chunks - actions).mean(-1) * mask).sum(-1) / mask.sum(-1)
    middle = np.argsort(each)[len(rows) // 2]
    words = None
    if said:
        texts = dataset.texts(data.reasoning)
        compare_words(said, texts, rows, train_rows, dataset.column("task_index"))
        words = said[middle], texts[rows[middle]]
    show(dataset[rows[middle]], chunks[middle], actions[middle], words, processor, output)


def compare_errors(demo, guesses, actions, mask, codec):
    """Print how far the model's actions and others are from those that were recorded."""
    spec, _ = codec.specs()
    errors = {name: action_error(guess, actions, mask, spec) for name, guess in guesses.items()}
    console = Console()
    table = Table(title=f"Mean absolute action error, robot units, {len(actions)} frames of held-out episodes")
    table.add_column("")
    for group in errors[demo.title]:
        table.add_column(group.removeprefix("action_error").strip("_") or "all", justify="right")
    for name, error in errors.items():
        table.add_row(name, *(f"{value:.3f}" for value in error.values()))
    console.print(table)
    ratios = [errors[demo.title]["action_error"] / errors[name]["action_error"] for name in (MEAN, LAST)]
    console.print(
        f"The model's error is {ratios[0]:.2f} times the mean action's and {ratios[1]:.2f} times the last action's.",
        MEANING.format(sees=demo.sees, chunk_size=codec.chunk_size),
        sep="\n",
        highlight=False,
    )


def compare_words(said, texts, rows, train_rows, tasks):
    """Print how often the model says what was recorded, beside a guess without looking."""
    frequent = {task: Counter(texts[row] for row in train_rows if tasks[row] == task) for task in set(tasks[rows])}
    guesses = [frequent[task].most_common(1)[0][0] for task in tasks[rows]]
    right, guessed = (np.mean(words == texts[rows]) for words in (said, guesses))
    Console().print(
        f"It says what was recorded on {right:.0%} of these frames; to say always what is most frequent with the "
        f"instruction would be right on {guessed:.0%}.\n",
        highlight=False,
    )


def show(item, chunk, actions, words, processor, output):
    """Print and draw a prediction, and say how to get it on the command line."""
    console, (spec, state_spec) = Console(), processor.action_codec.specs()
    place = f"episode {int(item['episode_index'])}, frame {int(item['frame_index'])}, of median error: {item['task']}"
    titles = [f"Predicted for {place}", "Recorded there"]
    if words is not None:
        titles = [f"{title}\nin words: {text!r}" for title, text in zip(titles, words, strict=True)]
    console.print(chunk_table(chunk, spec, title=titles[0]), chunk_table(actions, spec, title=titles[1]))
    names, frames, options = [camera.name for camera in processor.camera_specs()], [], ""
    for name in names:
        pixels = item[f"observation.images.{name}"].permute(1, 2, 0).numpy()
        frames.append(Image.fromarray((pixels * 255).round().astype(np.uint8)))
        path = output / ("frame.png" if len(names) == 1 else f"frame_{name}.png")
        frames[-1].save(path)
        options += f" --image {path if len(names) == 1 else f'{name}={path}'}"
    if state_spec is not None:
        options += ' --state "' + " ".join(f"{value:.5g}" for value in item["observation.state"].tolist()) + '"'
    program = os.path.relpath(Path(sys.executable).parent / "hf-vla")
    plot_chunk(chunk, spec, frames[0], title=item["task"]).savefig(output / "prediction.png")
    console.print(
        f"Wrote {output / 'prediction.png'}. On the command line:",
        f'{program} predict --model {output / "model"}{options} --text "{item["task"]}"',
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(DEMOS), default="spatialvla", help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="training steps (default: the model's)")
    parser.add_argument("--seconds", type=float, default=240, help="longest training (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder (default: the model's)")
    parser.add_argument("--frames", type=int, help="to evaluate on (default: all of the held-out episodes)")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate what an earlier run saved")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    demo = DEMOS[arguments.model]
    output = arguments.output or Path(demo.output)
    if arguments.evaluate:
        return evaluate(demo, output, arguments.frames)

    # This small, a second thread gains a third, and where another program needs its core the two wait for each other.
    torch.set_num_threads(1)
    start = time.perf_counter()
    training = {"output_dir": str(output / "model"), "max_steps": arguments.steps or demo.steps, "report_to": "none"}
    training |= {"eval_strategy": "no", "save_strategy": "no"}
    recipe = load_recipe(demo.recipe, {f"training.{name}": value for name, value in training.items()})
    train(recipe, callbacks=[TimeLimit(arguments.seconds)])
    state = json.loads((output / "model" / "trainer_state.json").read_text())
    steps = f"{state['global_step']} of {state['max_steps']} steps"
    print(
        f"Trained {steps} and saved in {time.perf_counter() - start:.0f} s. The rest in a fresh process.", flush=True
    )
    command = [sys.executable, __file__, "--model", arguments.model, "--evaluate", "--output", output]
    command += ["--frames", str(arguments.frames)] if arguments.frames else []
    subprocess.run(command, check=True)
    if state["global_step"] < state["max_steps"]:
        print(f"Time was up after {steps}: all of them make a better model, see --seconds.")
    print(f"The demo took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
