"""Teach the depth model of a tiny SpatialVLA what a simulator knows: `python scripts/train_depth.py --out DIR`.

Experts act in the simulator's tasks, pushed about so that the hand is everywhere, and its own depth is what a small
ZoeDepth learns to see in the picture. A recipe names the folder as `model.depth_model`. Three thousand steps of 32
pictures take a quarter of an hour on a CPU core.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hf_vla.evaluation.demonstrations import demonstrate
from hf_vla.evaluation.envs.base import FIRST_RECORDING_SEED
from hf_vla.evaluation.envs.experts.registry import expert
from hf_vla.evaluation.envs.registry import simulator
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration

FIRST_SEED = FIRST_RECORDING_SEED + 500_000  # no episode of a dataset
EVERY = 10  # steps from one picture to the next
HELD_OUT = 128
BATCH_SIZE = 32


def main(arguments: list[str] | None = None):
    """Render, train, save.

    Args:
        arguments (`list[str]`, *optional*): instead of those of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", default="metaworld")
    parser.add_argument("--tasks", default="easy")
    parser.add_argument("--camera", default="corner4")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--episodes", type=int, default=12, help="of every task")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = SpatialVLAForConditionalGeneration(SpatialVLAConfig.from_preset("tiny"))
    farthest = model.config.vision_zoe_config.bin_configurations[0]["max_depth"]
    pictures, depths = render(options)
    train(model, pictures, np.minimum(depths, farthest), options.steps)
    model.vision_zoe_model.save_pretrained(options.out)


def render(options) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures `(N, H, W, 3)` uint8 and depths `(N, H, W)` in metres, in random order."""
    kind, seen = simulator(options.env), []
    for task in tqdm(kind.select(options.tasks), desc="Rendering"):
        env = kind(task, {options.camera: (options.size, options.size)}, depth=True)
        look, env.observe = env.observe, dict  # demonstrate() would look at every step
        env.horizon, actor = 100, expert(options.env)(env)
        for seed in range(FIRST_SEED, FIRST_SEED + options.episodes):
            for step, _ in enumerate(demonstrate(env, actor, seed, noise=0.6, noise_steps=8)):
                if step % EVERY == 0:
                    seen.append([look()[f"observation.{what}.{options.camera}"] for what in ("images", "depth")])
        env.close()
    order = np.random.default_rng(0).permutation(len(seen))
    pictures, depths = zip(*(seen[place] for place in order), strict=True)
    return np.stack(pictures), np.stack(depths)


def train(model: SpatialVLAForConditionalGeneration, pictures: np.ndarray, depths: np.ndarray, steps: int):
    """Train the depth model on the error of the depth's logarithm.

    Args:
        model (`SpatialVLAForConditionalGeneration`): whose `estimate_depth` is to be right.
        pictures (`np.ndarray` of shape `(N, H, W, 3)`), depths (`np.ndarray` of shape `(N, H, W)`): in metres.
        steps (`int`): of `BATCH_SIZE` pictures.
    """
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    depths, zoe = torch.from_numpy(depths.astype(np.float32)), model.vision_zoe_model
    zoe.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(zoe.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    bar = tqdm(range(steps), desc="Training")
    for step in bar:
        rows = torch.randint(HELD_OUT, len(pixels), (BATCH_SIZE,))
        error = model.estimate_depth(pixels[rows] / 255).clamp_min(1e-3).log() - depths[rows].log()
        (error.abs().mean() + error.std((1, 2)).mean()).backward()
        torch.nn.utils.clip_grad_norm_(zoe.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            bar.set_postfix_str(f"held-out error {held_out_error(model, pixels, depths):.3f}")
    zoe.requires_grad_(False).eval()


@torch.no_grad()
def held_out_error(model, pixels, depths) -> float:
    """Median relative error of the depth of pictures that were not trained on."""
    model.vision_zoe_model.eval()
    seen, known = model.estimate_depth(pixels[:HELD_OUT] / 255), depths[:HELD_OUT]
    model.vision_zoe_model.train()
    return ((seen - known).abs() / known).median().item()


if __name__ == "__main__":
    main()
