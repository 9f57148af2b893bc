"""Does a policy look at its pictures and listen to its instruction? Questions put by changing what it is shown.

`PROBES` change observations before a policy sees them, in rollouts with the seeds of the score; what succeeds all the
same did not need what was taken away. `probe_dataset` needs no simulator: how far predictions are from recorded
actions, and how much they change under each probe.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.schema import ACTION, PAD_SUFFIX
from hf_vla.evaluation.envs.base import check_known
from hf_vla.models.images import to_rgb
from hf_vla.policy import DEPTH, IMAGES, TASK, Policy

NOISE = 0.1  # standard deviation, of pictures in [0, 1]


@dataclass(frozen=True)
class ProbeContext:
    """What a probe knows of the episode.

    Args:
        seed (`int`): of the episode.
        step (`int`): at which the policy looks.
        instructions (`tuple[str, ...]`): of every task of the selection.
    """

    seed: int
    step: int
    instructions: tuple[str, ...]


def blank(observation: dict[str, Any], context: ProbeContext) -> dict[str, Any]:
    """Every picture black, depth a wall at its mean distance; the state stays."""
    flat = {key: np.full_like(value, np.mean(value)) for key, value in _values(observation, DEPTH)}
    return {
        **observation,
        **{key: np.zeros_like(_array(value)) for key, value in _values(observation, IMAGES)},
        **flat,
    }


def swap(observation: dict[str, Any], context: ProbeContext) -> dict[str, Any]:
    """The instruction of another task: the one half the selection away, since neighbours are often variants.

    Raises:
        ValueError: all tasks have this instruction.
    """
    own = observation[TASK]
    texts = sorted({*context.instructions, own})
    if len(texts) == 1:
        raise ValueError(
            f"Expected several tasks, to swap their instructions, came only {own!r}; select more of them."
        )
    return {**observation, TASK: texts[(texts.index(own) + len(texts) // 2) % len(texts)]}


def noise(observation: dict[str, Any], context: ProbeContext) -> dict[str, Any]:
    """Gaussian noise on every picture, with a standard deviation of a tenth of the range; drawn from seed and step."""
    generator = np.random.default_rng([context.seed, context.step])
    noisy = {}
    for key, value in _values(observation, IMAGES):
        picture = _array(value)
        picture = picture + 255.0 * NOISE * generator.standard_normal(picture.shape, dtype=np.float32)
        noisy[key] = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return {**observation, **noisy}


@dataclass(frozen=True)
class Probe:
    """A question to a policy.

    Args:
        change (`Callable`): observation and context -> another observation.
        shown (`str`): what the policy is shown, after "success".
        lower (`str`): what it means that success is significantly lower.
        same (`str`): what it may mean that no difference could be shown.
    """

    change: Callable[[dict[str, Any], ProbeContext], dict[str, Any]]
    shown: str
    lower: str
    same: str

    def __call__(self, observation: dict[str, Any], context: ProbeContext) -> dict[str, Any]:
        """Change an observation; the one that came stays as it is."""
        return self.change(observation, context)


PROBES = {
    "blank": Probe(
        blank,
        "without looking (every picture black, the robot's own state as it is)",
        "The policy looks. What still succeeds tells nothing of sight: those starts hardly vary.",
        "The score does not show that the policy looks: the starts may hardly vary.",
    ),
    "swap": Probe(
        swap,
        "under the instruction of another task",
        "The policy listens. What still succeeds, the pictures alone gave away.",
        "The score does not show that the policy listens: the pictures may give the task away.",
    ),
    "noise": Probe(
        noise,
        f"with noise on the pictures (standard deviation {NOISE:g} of their range)",
        "Such noise costs success.",
        "Such noise costs no more than these episodes could show.",
    ),
}


def check_probes(names: Sequence[str], tasks: Sequence[str]) -> None:
    """Check that probes can be run over a selection of tasks, before anything is run.

    Raises:
        ValueError: one is unknown, or there is no other instruction to swap with.
    """
    for name in names:
        check_known("probe", name, PROBES)
    if "swap" in names and len(tasks) == 1:
        raise ValueError(f"The probe 'swap' gives a task another's instruction: select more than {tasks[0]!r}.")


def probe_dataset(policy: Policy, episodes: LeRobotEpisodes, frames: int = 100) -> dict[str, Any]:
    """Compare predictions on recorded frames with the recorded actions, and with predictions under each probe.

    A model that draws noise starts from the same numbers everywhere, so that only the observation makes a difference.
    Frames are spread evenly over the episodes. `swap` is left out where the dataset has one instruction.

    Args:
        policy ([`~hf_vla.policy.Policy`]): its episode, if it is in one, ends.
        episodes ([`~hf_vla.data.lerobot.LeRobotEpisodes`]): with the cameras that the policy looks through, and
            `delta_indices={"action": range(chunk_size)}`.
        frames (`int`): how many to predict on, at most.

    Returns:
        `dict`, JSON-safe: "dataset", "episodes" and "frames" say on what; "dimensions" their names; "rmse", in robot
        units, and "variance_explained" (1: perfect, 0: no better than always the mean action; None where the recorded
        action never varies), one number per dimension, over all actions of the chunks; "spread", robot units: how much
        predictions differ from frame to frame (standard deviation); "changes": probe -> "rmse", robot units: how far
        a prediction moves, and "relative": the same in spreads, the mean over the dimensions that vary (None where
        none does). 0: what was changed is ignored; 1.4: as far apart as predictions for two frames taken at random.

    Raises:
        ValueError: the items hold no window of actions as long as a chunk, or of another robot.
    """
    if len(episodes) == 0 or frames < 1:
        raise ValueError(f"Expected one frame or more, came {frames} of {len(episodes)}.")
    rows = np.unique(np.linspace(0, len(episodes) - 1, frames).round().astype(int)).tolist()
    instructions = tuple(episodes.tasks.values())
    names = [name for name in PROBES if name != "swap" or len({*instructions}) > 1]
    recorded, masks, predicted, changed = [], [], [], {name: [] for name in names}
    for row in rows:
        seen = history(policy, episodes, row)
        recorded.append(_recorded(policy, seen[-1]))
        masks.append(~seen[-1][ACTION + PAD_SUFFIX].numpy())
        predicted.append(_predict(policy, [observation_of(episodes, item) for item in seen]))
        for name in names:
            probed = [PROBES[name](observation_of(episodes, item), _context(item, instructions)) for item in seen]
            changed[name].append(_predict(policy, probed))
    predicted, recorded, real = np.stack(predicted), np.concatenate(recorded), np.concatenate(masks)
    spread = np.sqrt(predicted.var(axis=0).mean(axis=0))
    return {
        "dataset": str(episodes.name),
        "episodes": episodes.num_episodes,
        "frames": len(rows),
        "dimensions": _dimensions(policy, len(spread)),
        **_errors(np.concatenate(predicted)[real], recorded[real]),
        "spread": spread.tolist(),
        "changes": {name: _change(np.stack(chunks), predicted, spread) for name, chunks in changed.items()},
    }


def history(policy: Policy, episodes: LeRobotEpisodes, row: int) -> list[dict[str, Any]]:
    """Return the items of a row and of as many before it, in its episode, as the policy looks back at."""
    back = policy.processor.action_codec.n_obs_steps - 1
    item = episodes[row]
    earlier = range(row - min(back, int(item["frame_index"])), row)
    return [*(episodes[place] for place in earlier), item]


def observation_of(episodes: LeRobotEpisodes, item: dict[str, Any]) -> dict[str, Any]:
    """Return what a policy sees of an item: pictures as simulators give them, under names that probes know."""
    cameras = episodes.camera_keys
    pictures = {IMAGES + key.removeprefix(IMAGES): _array(item[key]) for key in cameras}
    return {**{key: value for key, value in item.items() if key not in cameras}, **pictures}


def _values(observation, prefix):
    return [(key, value) for key, value in observation.items() if key.startswith(prefix) and value is not None]


def _array(picture):
    """`(H, W, 3)` uint8 of whatever a policy takes for a picture."""
    return np.asarray(to_rgb(picture))


def _context(item, instructions):
    return ProbeContext(int(item["episode_index"]), int(item["frame_index"]), instructions)


def _recorded(policy, item):
    expected = policy.processor.action_codec.chunk_size
    if ACTION + PAD_SUFFIX not in item or len(item[ACTION]) != expected:
        raise ValueError(
            "Expected items with as many actions as a chunk has: open the dataset with "
            f"delta_indices={{{ACTION!r}: range({expected})}}."
        )
    return item[ACTION].numpy().reshape(expected, -1)


def _predict(policy, observations):
    """Chunk for the last of the observations, `(chunk_size, action_dim)`."""
    policy.reset()
    with torch.random.fork_rng():
        for observation in observations:
            torch.manual_seed(0)
            chunk = policy.predict_chunk(observation)
    return chunk.astype(np.float64)


def _dimensions(policy, count):
    return [*policy.action_spec.names] if policy.action_spec else [str(place) for place in range(count)]


def _errors(predicted, recorded):
    """Of `(n, action_dim)` actions."""
    if predicted.shape != recorded.shape:
        raise ValueError(
            f"Expected a dataset of the policy's robot, with {predicted.shape[-1]} numbers per action, came "
            f"{recorded.shape[-1]}."
        )
    squared = ((predicted - recorded) ** 2).mean(axis=0)
    variance = recorded.var(axis=0, dtype=np.float64)
    explained = [float(1 - s / v) if v > 0 else None for s, v in zip(squared, variance, strict=True)]
    return {"rmse": np.sqrt(squared).tolist(), "variance_explained": explained}


def _change(changed, predicted, spread):
    """Of `(frames, chunk_size, action_dim)` predictions."""
    moved = np.sqrt(((changed - predicted) ** 2).mean(axis=(0, 1)))
    varies = spread > 1e-6 * np.abs(predicted).max()  # the rest is rounding
    relative = float((moved[varies] / spread[varies]).mean()) if varies.any() else None
    return {"rmse": moved.tolist(), "relative": relative}
