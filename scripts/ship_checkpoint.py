"""Make a trained checkpoint ready to be given away: small, whole, with a model card and a frame to try it on.

    python scripts/ship_checkpoint.py outputs/mine tinyvla_metaworld --report outputs/eval/mine

writes spaces/action_demo/checkpoints/tinyvla_metaworld anew: weights in float16 (half the bytes; config.json says
float32, so that AutoModel computes in float32, as CPUs like it), configuration, processor, README.md, frame.json with
the pictures of a frame of a held-out episode, and in eval/ what `hf-vla eval` wrote. It refuses weights whose actions
change by more than 1 % of their range on average, a report about other weights, and files that name a folder of this
machine.
"""

import argparse
import gzip
import json
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from hf_vla import Policy
from hf_vla.evaluation.protocol import weights_sha256
from hf_vla.hub.card import write_card
from hf_vla.training.datasets import open_datasets
from hf_vla.training.recipe import load_recipe
from hf_vla.training.summary import SUMMARY

CHECKPOINTS = Path(__file__).resolve().parents[1] / "spaces" / "action_demo" / "checkpoints"
LARGEST_CHANGE = 0.01  # of the range of the recorded actions, on average, by rounding the weights
FRAMES = 32  # on which that is measured
EVALUATION = ("report.md", "report.json", "report.png", "protocol.json")

ABOUT = """
## About this checkpoint

It knows one simulated robot, its cameras where they stood, and its instructions, word by word. It has never been on a
robot. A model this small shows how a vision-language-action model is trained, run and evaluated; it does not
generalise as one of billions of parameters. Recipes in `scripts/recipes` make what it starts from.

The weights are rounded to float16 and computed with in float32. On {measured} held-out frames this changes the
actions by {change:.2g} % of their range on average, and by {largest:.2g} % at most.

`frame.json` is the middle of a held-out episode, with its pictures and the actions recorded there.
"""
EVALUATED = """
The evaluation was of {which}; [its report](eval/report.md) with records is in `eval/`.
"""


def ship(folder, name, recipe, report=None):
    """Write a checkpoint's folder anew; nothing is left of it where that fails."""
    model, processor = AutoModel.from_pretrained(folder, dtype=torch.float32), AutoProcessor.from_pretrained(folder)
    opened = open_datasets(recipe.data)[0]
    with TemporaryDirectory(dir=CHECKPOINTS, prefix=".") as aside:
        new = Path(aside, name)
        rounded = save_rounded(model, processor, new)
        key = opened.arguments.unnorm_key
        changes = action_changes([Policy(each, processor, key, seed=0) for each in (model, rounded)], opened)
        mean, largest = 100 * changes.mean(), 100 * changes.max()
        print(f"Rounding to float16 changes actions by {mean:.2g} % of their range, {largest:.2g} % at most.")
        if not mean <= 100 * LARGEST_CHANGE:
            raise ValueError(f"Expected {100 * LARGEST_CHANGE:g} % at most on average, came {mean:.2g} %.")
        save_frame(opened, new)
        shutil.copy(Path(folder, SUMMARY), new)
        about = ABOUT.format(measured=len(changes), change=mean, largest=largest)
        if report is not None:
            about += EVALUATED.format(
                which=copy_report(Path(report), new, weights_sha256(rounded), weights_sha256(model))
            )
        with write_card(new, license="apache-2.0").open("a", encoding="utf-8") as file:
            file.write(about)
        refuse_paths(new)
        shutil.rmtree(CHECKPOINTS / name, ignore_errors=True)
        new.rename(CHECKPOINTS / name)
    print(f"Wrote {CHECKPOINTS / name}")


def save_rounded(model, processor, folder):
    """Save with weights in float16, and return what AutoModel makes of them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "model.safetensors"
    weights = {name: each.half() if each.is_floating_point() else each for name, each in load_file(path).items()}
    if broken := [name for name, each in weights.items() if not torch.isfinite(each).all()]:
        raise ValueError(f"These weights are beyond float16's range: {broken}.")
    save_file(weights, path, metadata={"format": "pt"})
    loaded = AutoModel.from_pretrained(folder)
    if loaded.dtype != torch.float32:
        raise ValueError(f"Expected AutoModel to load float32, came {loaded.dtype}: see config.json.")
    for name, value in loaded.state_dict().items():
        if name in weights and not torch.equal(value, weights[name].to(value.dtype)):
            raise ValueError(f"AutoModel does not load {name!r} as it was saved.")
    return loaded


def action_changes(policies, opened):
    """How much two policies' actions differ on held-out frames, `(frames, chunk_size, D)`, shares of their range."""
    rows = opened.eval_rows[np.linspace(0, len(opened.eval_rows) - 1, FRAMES).round().astype(int)]
    codec, key = policies[0].processor.action_codec, policies[0].unnorm_key
    low, high = (np.array(codec.statistics[key]["action"][end]) for end in ("min", "max"))
    changes = []
    for row in np.unique(rows):
        chunks = []
        for policy in policies:
            policy.reset()
            chunks.append(policy.predict_chunk(observe(opened.episodes[row])))
        changes.append(np.abs(chunks[0] - chunks[1]))
    difference = np.array(changes)
    return np.divide(difference, high - low, out=np.zeros_like(difference), where=high > low)


def observe(item):
    """A dataset's frame as a robot would give it."""
    pictures = {key: picture(value) for key, value in item.items() if key.startswith("observation.images.")}
    state = {key: item[key].numpy() for key in ("observation.state",) if key in item}
    return {**pictures, **state, "task": item["task"]}


def picture(tensor):
    """`(H, W, 3)` uint8."""
    return (tensor.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def save_frame(opened, folder):
    """Write the frame in the middle of the first held-out episode, and what was recorded there."""
    dataset, arguments = opened.episodes, opened.arguments
    rows = opened.eval_rows[dataset.column("episode_index")[opened.eval_rows] == arguments.eval_episodes[0]]
    row = rows[len(rows) // 2]
    item = dataset[row]
    actions, is_pad = dataset.windows("action", np.array([row]))
    images = {}
    for camera in arguments.cameras:
        images[camera.name] = f"frame_{camera.name}.png"
        Image.fromarray(picture(item[f"observation.images.{camera.name}"])).save(folder / images[camera.name])
    frame = {
        "dataset": arguments.unnorm_key,
        "episode": int(item["episode_index"]),
        "frame": int(item["frame_index"]),
        "task": item["task"],
        "images": images,
        "state": None if arguments.state is None else item["observation.state"].tolist(),
        "actions": actions[0][~is_pad[0]].tolist(),
    }
    (folder / "frame.json").write_text(json.dumps(frame, indent=1) + "\n")
    return frame


def copy_report(source, folder, shipped, trained):
    """Put an evaluation beside the checkpoint, and say which weights it is of."""
    protocol = json.loads((source / "protocol.json").read_text(encoding="utf-8"))
    if protocol["weights_sha256"] not in (shipped, trained):
        raise ValueError(f"{source} tells of other weights: {protocol['weights_sha256']}, these are {shipped}.")
    target = folder / "eval"
    target.mkdir()
    for name in EVALUATION:
        shutil.copy(source / name, target)
    records = (source / "episodes.jsonl").read_bytes()
    (target / "episodes.jsonl.gz").write_bytes(gzip.compress(records, mtime=0))
    return "the weights of this folder" if protocol["weights_sha256"] == shipped else "the weights before rounding"


def refuse_paths(folder):
    """Raise a ValueError where a file names a folder of this machine."""
    tops = "|".join(re.escape(each.name) for each in Path("/").iterdir() if each.is_dir())
    pattern = re.compile(rf"(?<![\w./:])/(?:{tops})/[\w./-]+")
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".json", ".md", ".jinja") and (found := pattern.search(path.read_text(encoding="utf-8"))):
            raise ValueError(
                f"{path.name} names {found[0]}, a folder of this machine; train and evaluate with relative paths."
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what a training saved")
    parser.add_argument("name", help="of the folder that is written")
    parser.add_argument("--recipe", type=Path, help="default: that of the training's last checkpoint")
    parser.add_argument("--report", type=Path, help="folder of `hf-vla eval`")
    arguments = parser.parse_args()
    saved = sorted(arguments.folder.glob("checkpoint-*/recipe.yaml"), key=lambda path: path.stat().st_mtime)
    if not (recipe := arguments.recipe or (saved[-1] if saved else None)):
        parser.error(f"{arguments.folder} keeps no checkpoint with its recipe: give --recipe.")
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    ship(arguments.folder, arguments.name, load_recipe(recipe), arguments.report)


if __name__ == "__main__":
    main()
