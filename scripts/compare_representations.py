"""Which action representation wins: one backbone, one dataset, one budget, twelve ways to emit actions.

    python scripts/compare_representations.py [--data FOLDER] [--only NAME ...]

Records demonstrations of four Meta-World tasks (or takes those of a dataset that has them) and of the bimodal task
`two_ways`, trains every recipe of scripts/recipes/compare on both, drives each in closed loop, measures each beside
all others, and writes docs/representations.{md,json,png}. What is finished is not done again: after an interruption,
or to add a representation, run the same command; a training goes on from its last checkpoint.

Everything runs on one thread. Run the same command in a second shell, too, and both share the work, one representation
at a time: on two cores it takes about three hours. `--quick` does all of it with hardly any training in minutes, to
see that it works; its figures say nothing.
"""

import argparse
import json
import shutil
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import numpy as np
import torch
from annotate_phases import annotate_motions, write
from representation_measures import drive_two_ways, measure
from representation_report import write_report
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hf_vla.data import schema
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.evaluation.demonstrations import RecordingPlan
from hf_vla.evaluation.envs.metaworld import INSTRUCTIONS
from hf_vla.evaluation.protocol import EvaluationPlan
from hf_vla.evaluation.recording import record
from hf_vla.evaluation.records import read_records, write_whole
from hf_vla.evaluation.rollout import evaluate as evaluate_plan
from hf_vla.models.byte_tokenizer import byte_tokenizer
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.training.recipe import load_recipe
from hf_vla.training.run import train

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "scripts" / "recipes" / "compare"
NAMES = (  # in the order of the chapter
    *("regression", "rt1", "rt2", "openvla", "3d_vla", "spatialvla", "fast"),
    *("ddpm", "ddim", "flow_matching", "discrete_diffusion", "divla"),
)
SAME_WEIGHTS = {"ddim": "ddpm"}  # another sampler of the same training
CAMERAS = {"metaworld": "corner4", "two_ways": "top"}
WORDS = {"metaworld": (16, 0.01), "two_ways": (8, 0.1)}  # frames ahead, and metres, less of which is no motion
SAVE_STEPS = 100  # an interrupted training loses as many at most
HELD_OUT = 2  # of each task's demonstrations, the last


@dataclass(frozen=True)
class Budget:
    """How much of everything; the protocol of the comparison."""

    tasks: tuple[str, ...] = ("drawer-close-v3", "button-press-topdown-v3", "window-open-v3", "drawer-open-v3")
    demonstrations: int = 32  # of every task of Meta-World
    ways: int = 300  # demonstrations of two_ways
    noise: float | None = 0.1  # on what is executed while recording Meta-World
    data: str | None = None  # name of the dataset given instead, whose noise we do not know
    steps: int = 600
    batch_size: int = 32
    episodes: int = 20  # of every task of Meta-World
    horizon: int = 300  # of an episode of Meta-World, some four times what the expert takes
    executed: int = 16  # of the 16 actions of a chunk, on Meta-World; 80 a second
    ways_episodes: int = 100
    ways_executed: int = 8  # of 16
    starts: int = 5  # of two_ways, each with
    draws: int = 20  # seeds of the sampling
    frames: int = 256  # held out, on which actions are compared
    rounds: int = 15  # of timing


QUICK = {
    **{"tasks": ("drawer-close-v3",), "demonstrations": 3, "ways": 4, "steps": 2, "batch_size": 4, "episodes": 1},
    **{"horizon": 32, "ways_episodes": 2, "starts": 1, "draws": 2, "frames": 4, "rounds": 2},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--data", type=Path, help="dataset of Meta-World to take the tasks' episodes from")
    parser.add_argument("--steps", type=int, help=f"gradient steps of every training (default: {Budget.steps})")
    parser.add_argument("--episodes", type=int, help=f"evaluated of every task (default: {Budget.episodes})")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "representations", help="default: %(default)s")
    parser.add_argument("--docs", type=Path, help="where to write the page (default: docs; with --quick: --out)")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    options = parser.parse_args()
    given = {name: value for name in ("steps", "episodes") if (value := getattr(options, name)) is not None}
    if options.data is not None:
        given |= {"data": options.data.resolve().name, "noise": None}
    budget, out = Budget(**{**(QUICK if options.quick else {}), **given}), options.out.resolve()
    torch.set_num_threads(1)
    with turn(out, "data"):
        settle(out, budget)
        make_backbone(out / "backbone")
        prepare(out, budget, options.data)
    for wait in (False, True):  # first what no other process is at; then what one was, should it have been killed
        for name in sorted(options.only, key=SAME_WEIGHTS.__contains__):  # by then the weights are there
            with turn(out, name, wait) as ours:
                if ours:
                    finish(out, name, budget)
    docs = options.docs or (out if options.quick else ROOT / "docs")
    with turn(out, "report"):
        write_report(docs, {"protocol": asdict(budget), "representations": results(out, budget)})
    print(f"Wrote {docs / 'representations.md'}.")


@contextmanager
def turn(out: Path, name: str, wait: bool = True):
    """Keep other processes from the same work; False where one is at it and we do not wait for it."""
    (out / "locks").mkdir(parents=True, exist_ok=True)
    try:  # the system lets go of it when its holder is killed
        lock = filelock.FileLock(out / "locks" / name).acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        yield False
    else:
        with lock:
            yield True


def finish(out: Path, name: str, budget: Budget):
    """Train and drive a representation."""
    for env in CAMERAS:
        if name in SAME_WEIGHTS:
            with turn(out, SAME_WEIGHTS[name]):
                checkpoint(out, env, SAME_WEIGHTS[name], budget)
        checkpoint(out, env, name, budget)
    evaluate(out, name, budget)


def results(out: Path, budget: Budget) -> dict[str, dict]:
    """What was measured of all that are finished; in one process, or their times would tell of other things."""
    driven = {name: result_file(out, name) for name in NAMES if result_file(out, name).exists()}
    path = out / "results" / "measures.json"
    measures = json.loads(path.read_text()) if path.exists() else {}
    if [*measures] != [*driven]:
        folders = {name: (out / f"metaworld-{name}", recipe_of(out, "metaworld", name, budget)) for name in driven}
        measures = measure(folders, budget)
        write_whole(path, json.dumps(measures, indent=1))
    return {
        name: {**json.loads(file.read_text()), "solved": solved(file.with_suffix("")), **measures[name]}
        for name, file in driven.items()
    }


def solved(folder: Path) -> dict[str, list[int]]:
    """Task of Meta-World -> seeds of the episodes that were solved."""
    seeds = defaultdict(list)
    for episode in read_records(folder)[0]:
        if episode.success:
            seeds[episode.task].append(episode.seed)
    return {task: sorted(each) for task, each in seeds.items()}


def settle(out: Path, budget: Budget):
    """Refuse a folder of another protocol: its results would be mixed with this one's."""
    path, text = out / "protocol.json", json.dumps(asdict(budget), indent=1)
    if path.exists() and path.read_text() != text:
        raise SystemExit(f"{out} holds a comparison of another protocol, see {path}: give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def make_backbone(folder: Path):
    """Save the untrained vision-language model that all representations start from: a tiny SpatialVLA's."""
    if folder.exists():
        return
    vision = load_recipe(RECIPES / "spatialvla.yaml").model.config["vision_config"]
    tiny, tokenizer = SpatialVLAConfig.from_preset("tiny", vision_config=vision), byte_tokenizer(0)
    text = tiny.text_config.to_dict() | {"vocab_size": len(tokenizer) + 4}  # room beside for a readout
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = AutoConfig.for_model(
        "paligemma",
        text_config=text,
        vision_config=tiny.vision_config.to_dict(),
        projection_dim=tiny.text_config.hidden_size,
        image_token_index=tiny.image_token_index,
        **special,
    )
    torch.manual_seed(0)
    aside = folder.with_name(".backbone")
    AutoModelForImageTextToText.from_config(config).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    SiglipImageProcessorPil(size=size, image_seq_length=tiny.num_image_tokens).save_pretrained(aside)
    aside.rename(folder)


def prepare(out: Path, budget: Budget, data: Path | None):
    """Record what is to be learnt, and say in words where the hand moves, which DiVLA learns to say."""
    plans = {
        "metaworld": RecordingPlan(
            "metaworld", budget.tasks, budget.demonstrations, {"corner4": (96, 96)}, noise=budget.noise
        ),
        "two_ways": RecordingPlan("two_ways", ("reach-behind",), budget.ways),
    }
    for env, plan in plans.items():
        if (out / env).exists():
            continue
        source, aside = data if data and env == "metaworld" else out / "recordings" / env, out / f".{env}"
        if source != data:
            record(plan, source, on_progress=Progress(env))
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(source, aside)
        write(aside, *annotate_motions(aside, ["x", "y", "z"], *WORDS[env]))
        aside.rename(out / env)


class Progress:
    """Prints how far a recording is, every ten seconds."""

    def __init__(self, env):
        self.env, self.last = env, time.monotonic()

    def __call__(self, recorded, frames):
        if time.monotonic() > self.last + 10:
            self.last = time.monotonic()
            print(f"{self.env}: {sum(each.episodes for each in recorded.values())} demonstrations", flush=True)


def demonstrations(out: Path, env: str, budget: Budget) -> tuple[list[int], list[int]]:
    """Numbers of the episodes to read, held-out ones included, and of the held-out ones."""
    dataset = LeRobotEpisodes(out / env, cameras=[])
    tasks = dataset.texts(schema.TASK)[dataset.episode_starts[:-1]]
    wanted = [INSTRUCTIONS[task] for task in budget.tasks] if env == "metaworld" else sorted(set(tasks))
    count = budget.demonstrations if env == "metaworld" else budget.ways
    chosen, held_out = [], []
    for task in wanted:
        episodes = [dataset.episodes[place].index for place in np.flatnonzero(tasks == task)[:count]]
        if len(episodes) < count:
            raise SystemExit(f"{out / env} has {len(episodes)} episodes of {task!r}, {count} are wanted.")
        chosen += episodes
        held_out += episodes[-HELD_OUT:]
    return sorted(chosen), sorted(held_out)


def recipe_of(out: Path, env: str, name: str, budget: Budget):
    """The recipe for one of the two datasets."""
    episodes, held_out = demonstrations(out, env, budget)
    path = RECIPES / f"{name}.yaml"
    overrides = {
        "data.source": str(out / env),
        "data.cameras.0.name": CAMERAS[env],
        "data.episodes": episodes,
        "data.eval_episodes": held_out,
        "training.output_dir": str(out / f"{env}-{name}"),
        "training.max_steps": budget.steps,
        "training.per_device_train_batch_size": budget.batch_size,
        "training.save_strategy": "steps",
        "training.save_steps": SAVE_STEPS,
        "training.save_total_limit": 1,
        "training.resume_from_checkpoint": True,
        "training.eval_action_samples": min(64, budget.frames),
        "training.report_to": "none",
        "training.disable_tqdm": True,
    }
    if load_recipe(path).model.backbone is not None:
        overrides["model.backbone"] = str(out / "backbone")
    return load_recipe(path, overrides)


def checkpoint(out: Path, env: str, name: str, budget: Budget) -> Path:
    """Train a checkpoint to its end, unless that is done."""
    folder, finished = out / f"{env}-{name}", out / f"{env}-{name}" / "trainer_state.json"
    if finished.exists():
        return folder
    recipe, start = recipe_of(out, env, name, budget), time.monotonic()
    if name in SAME_WEIGHTS:
        aside = out / f".{folder.name}"
        shutil.rmtree(aside, ignore_errors=True)
        trained = out / f"{env}-{SAME_WEIGHTS[name]}"
        shutil.copytree(trained, aside, ignore=shutil.ignore_patterns("checkpoint-*"))
        config = json.loads((aside / "config.json").read_text())
        config["head_config"] = recipe.model.config["head_config"]
        write_whole(aside / "config.json", json.dumps(config, indent=2))
        aside.rename(folder)
    else:
        print(f"{name}: training on {env}", flush=True)
        train(recipe)
    print(f"{name}: trained on {env} in {time.monotonic() - start:.0f} s", flush=True)
    return folder


def result_file(out: Path, name: str) -> Path:
    return out / "results" / f"{name}.json"


def evaluate(out: Path, name: str, budget: Budget):
    """Drive a representation in closed loop, on both, unless that is done."""
    path = result_file(out, name)
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    start = time.monotonic()
    result = {
        "metaworld": evaluate_metaworld(out, name, budget),
        "two_ways": drive_two_ways(out / f"two_ways-{name}", budget),
    }
    write_whole(path, json.dumps(result, indent=1))
    print(f"{name}: evaluated in {time.monotonic() - start:.0f} s", flush=True)


def evaluate_metaworld(out: Path, name: str, budget: Budget) -> dict[str, tuple[int, int]]:
    """Return successes and episodes of every task; the records are in results/<name>."""
    folder, counts = out / f"metaworld-{name}", dict.fromkeys(budget.tasks, (0, 0))
    plan = EvaluationPlan(
        "metaworld",
        ",".join(budget.tasks),
        budget.episodes,
        horizon=budget.horizon,
        policy_options={"n_action_steps": budget.executed},
    )
    model, processor = (auto.from_pretrained(folder) for auto in (AutoModel, AutoProcessor))
    patience = {"deadline_s": 600.0}  # where others use the machine
    for episode in evaluate_plan(model, processor, plan, out / "results" / name, folder.name, **patience):
        solved, episodes = counts[episode.task]
        counts[episode.task] = solved + episode.success, episodes + 1
    return counts


if __name__ == "__main__":
    main()
