"""What `compare_representations.py` measures of a checkpoint."""

import statistics
import time
from collections import Counter
from contextlib import contextmanager

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

import hf_vla  # noqa: F401  (makes the Auto classes know our families)
from hf_vla.actions.tokenizers.uniform import UniformTokenizer
from hf_vla.data import schema
from hf_vla.data.collator import VLACollator
from hf_vla.evaluation.envs.two_ways import TwoWaysTask
from hf_vla.training.datasets import open_datasets
from hf_vla.training.trainer import action_error

SEVEN = 7  # numbers of the action that most arms take: xyz, rotation, gripper


class Controller:
    """A checkpoint that answers many observations at once.

    Args:
        folder (`Path`): of the checkpoint.
        sampled (`bool`): draw what is otherwise the likeliest token or bin.

    Attributes:
        chooses (`bool`): whether it has tokens or bins to draw; other heads draw noise, or nothing.
    """

    def __init__(self, folder, sampled=False):
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()
        self.options, head = {}, getattr(self.model, "action_head", None)
        self.chooses = head is None or hasattr(head, "decoding")
        if sampled and head is None:
            self.options["do_sample"] = True
        elif sampled and self.chooses:
            head.decoding = "sample"

    def __call__(self, observations, generator=None) -> np.ndarray:
        """Predict `(len(observations), chunk_size, action_dim)`, robot units."""
        (key,) = {key for key in observations[0] if key.startswith(schema.IMAGES)}
        inputs = self.processor(
            images=[each[key] for each in observations], text=[each[schema.TASK] for each in observations]
        )
        output = self.model.predict_action(**inputs, generator=generator, **self.options)
        return self.processor.decode_actions(output)


@torch.no_grad()
def drive_two_ways(folder, budget) -> dict:
    """Drive a checkpoint on the bimodal task.

    Returns:
        `dict`: "usual", how it decides by itself, and "sampled", where it can draw instead; of each "episodes", how
        many there were of (side, success), and "starts", the sides taken from each of some starts with other draws.
    """
    results = {}
    for way in ("usual", "sampled"):
        controller = Controller(folder, sampled=way == "sampled")
        if way == "sampled" and not controller.chooses:
            continue
        draws = [
            _drive(controller, [seed] * budget.draws, budget.ways_executed, seed) for seed in range(budget.starts)
        ]
        results[way] = {
            "episodes": _counts(_drive(controller, range(budget.ways_episodes), budget.ways_executed, budget.starts)),
            "starts": [_counts(envs) for envs in draws],
        }
    return results


def _drive(controller, seeds, executed, drawn=0):
    """Run an episode for each seed, side by side; `drawn` is the seed of what is drawn. Return the environments."""
    envs, generator = [TwoWaysTask("reach-behind") for _ in seeds], torch.Generator().manual_seed(drawn)
    for env, seed in zip(envs, seeds, strict=True):
        env.restart(seed)
    return _run(envs, controller, executed, generator)


def _run(envs, controller, executed, generator):
    running = envs
    while running:
        chunks = controller([env.observe() for env in running], generator)
        pairs = zip(running, chunks, strict=True)
        running = [env for env, chunk in pairs if not any(any(env.advance(action)) for action in chunk[:executed])]
    return envs


def _counts(envs) -> dict[str, int]:
    """How many went by which side and arrived ("left"), went by it and did not ("left, lost"), or by none ("none")."""
    ends = Counter(f"{env.side or 'none'}{', lost' if env.side and not env.success else ''}" for env in envs)
    return {name: ends[name] for name in ("left", "right", "left, lost", "right, lost", "none")}


def measure(checkpoints, budget) -> dict[str, dict]:
    """Measure checkpoints; what takes time of all of them in turn, on one thread.

    Args:
        checkpoints (`dict`): name -> folder and recipe.
        budget: `frames` and `rounds`.
    """
    controllers = {name: Controller(folder) for name, (folder, _) in checkpoints.items()}
    data = {name: open_datasets(recipe.data)[0] for name, (_, recipe) in checkpoints.items()}
    results = {}
    for name, controller in controllers.items():
        frames, actions, mask = _held_out(data[name], budget.frames)
        results[name] = {
            "parameters": count_parameters(controller.model),
            **_predictions(controller, frames, actions, mask, budget.rounds),
            **round_trip(controller, actions[mask.all(-1)]),
            **_tokens(controller, actions[mask.all(-1)]),
        }
    return _timed(controllers, data, checkpoints, budget.rounds, results)


def _held_out(opened, count):
    """Observations, chunks `(n, T, D)` and masks `(n, T)` of frames that are evenly spread over held-out episodes."""
    rows = opened.eval_rows[np.linspace(0, len(opened.eval_rows) - 1, count).round().astype(int)]
    dataset = opened.episodes
    actions, is_pad = dataset.windows(schema.ACTION, rows)
    return [_observation(dataset[row]) for row in rows], actions, ~is_pad


def _observation(item):
    (key,) = {key for key in item if key.startswith(schema.IMAGES)}
    picture = (item[key].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return {key: picture, schema.TASK: item[schema.TASK]}


@torch.no_grad()
def _predictions(controller, frames, actions, mask, rounds):
    """Mean absolute error of actions, and how often the networks ran for a chunk, on average over some frames."""
    generator, chunks = torch.Generator().manual_seed(0), []
    for places in np.array_split(np.arange(len(frames)), -(-len(frames) // 32)):
        chunks.append(controller([frames[place] for place in places], generator))
    spec, _ = controller.processor.action_codec.specs()
    some = frames[:: -(-len(frames) // rounds)]
    with counted(controller.model) as calls:
        for frame in some:
            controller([frame], generator)
    passes = {network: count / len(some) for network, count in calls.items()}
    return {**action_error(np.concatenate(chunks), actions, mask, spec), "passes": passes}


@contextmanager
def counted(model):
    """Count the calls of the language model and of the action head's network."""
    head = getattr(model, "action_head", None)
    language = [name for name, _ in model.named_modules() if "language_model" in name and name.endswith("layers.0")]
    networks = {
        "head": getattr(head, "denoiser", None) or getattr(head, "network", None),
        "language": model.get_submodule(language[0]),
    }
    calls = Counter(language=0, head=0)
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in networks.items()
        if module is not None
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def count_parameters(model) -> dict[str, int]:
    """Parameters of the "backbone", which all have alike, and of the "rest": embeddings, scores of tokens, head.

    A SpatialVLA's text embedding has rows at the places of action tokens that nothing ever reads; they do not count.
    """
    count = Counter(backbone=0, rest=0)
    for name, parameter in model.named_parameters():
        shared = ("vision_tower" in name or "projector" in name or "language_model" in name) and not (
            "embed_tokens" in name or "lm_head" in name
        )
        count["backbone" if shared else "rest"] += parameter.numel()
    if getattr(model.config, "use_spatial_token", False):
        count["rest"] -= model.config.spatial_token_num * model.config.get_text_config().hidden_size
    return dict(count)


def round_trip(controller, actions) -> dict[str, list[float]]:
    """Worst and mean absolute error of each dimension when recorded actions are encoded and decoded, robot units.

    Args:
        controller (`Controller`): whose encoding is looked at.
        actions (`np.ndarray` of shape `(n, chunk_size, action_dim)`): robot units.
    """
    codec, head = controller.processor.action_codec, getattr(controller.model, "action_head", None)
    if codec.tokenizer is not None:
        ends = {"terminate": np.zeros(actions.shape[:2], bool)} if codec.terminates else {}
        decoded = codec.decode(codec.encode(actions, **ends))
    elif hasattr(head, "num_bins"):
        bins = UniformTokenizer(actions.shape[-1], head.num_bins)
        decoded = codec.decode(bins.decode(bins.encode(codec.encode(actions))))
    else:
        decoded = codec.decode(codec.encode(actions))
    error = np.abs(decoded - actions)
    return {"round_trip_worst": error.max((0, 1)).tolist(), "round_trip_mean": error.mean((0, 1)).tolist()}


def _tokens(controller, actions):
    """Tokens that the language model writes for an action and for a chunk; `seven` for an arm of 7 dimensions."""
    codec, (_, chunk_size, action_dim) = controller.processor.action_codec, actions.shape
    tokenizer = codec.tokenizer
    if tokenizer is None:
        return {"tokens_per_chunk": 0.0, "tokens_per_action": 0.0, "tokens_per_action_of_seven": 0.0}
    if not hasattr(tokenizer, "blocks"):  # as many as the chunk needs
        lengths = [(codec.encode(chunk) >= 0).sum() for chunk in actions]
        mean = float(np.mean(lengths))
        return {"tokens_per_chunk": mean, "tokens_per_action": mean / chunk_size, "tokens_per_action_of_seven": None}
    per_action = len(tokenizer.blocks)
    seven = per_action + 1 if tokenizer.type == "gaussian_grid" else per_action + SEVEN - action_dim
    return {
        "tokens_per_chunk": float(per_action * chunk_size),
        "tokens_per_action": float(per_action),
        "tokens_per_action_of_seven": float(seven),
    }


def _timed(controllers, data, checkpoints, rounds, results):
    """Add the CPU time of a prediction, batch 1, and the samples a second of training steps: medians over rounds.

    Each round predicts from another held-out frame, the same for all: some answer in more tokens or words than others.
    """
    batches, frames = {}, {}
    for name, (_, recipe) in checkpoints.items():
        opened = data[name]
        size = recipe.training.per_device_train_batch_size
        items = [opened.episodes[row] for row in opened.train_rows[:: max(1, len(opened.train_rows) // size)][:size]]
        frames[name] = _held_out(opened, rounds + 1)[0]
        collator = VLACollator(
            controllers[name].processor, None, recipe.data.roles, reasoning=recipe.data.reasoning, hold_tail=True
        )
        batches[name] = collator(items)
    seconds = {name: {"predict": [], "train": []} for name in controllers}
    for turn in range(rounds + 1):  # the first to warm up
        for name, controller in controllers.items():
            works = {"predict": lambda c=controller, n=name, t=turn: _predict(c, frames[n][t])}
            if turn == 0 or turn % 3 == 1:
                works["train"] = lambda c=controller, n=name: _train_step(c.model, batches[n])
            for what, work in works.items():
                start = time.process_time()
                work()
                if turn > 0:
                    seconds[name][what].append(time.process_time() - start)
    for name, times in seconds.items():
        size, chunk = len(next(iter(batches[name].values()))), controllers[name].processor.action_codec.chunk_size
        per_chunk = 1000 * statistics.median(times["predict"])
        results[name] |= {
            "ms_per_chunk": per_chunk,
            "ms_per_action": per_chunk / chunk,
            "samples_per_second": size / statistics.median(times["train"]),
        }
    return results


@torch.no_grad()
def _predict(controller, frame):
    controller([frame], torch.Generator().manual_seed(0))


def _train_step(model, batch):
    scores = {"logits_to_keep": 1} if "labels" in batch and not hasattr(model, "action_head") else {}  # as the Trainer
    model.train()
    model(**batch, **scores).loss.backward()
    model.zero_grad()
    model.eval()
