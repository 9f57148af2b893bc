"""Everything that decides an evaluation's results, so that another person can repeat it."""

import hashlib
import json
import os
import platform
import shlex
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hf_vla.evaluation.contract import CameraPlan, ends_differ
from hf_vla.evaluation.envs.base import FIRST_RECORDING_SEED, RENDERINGS
from hf_vla.evaluation.envs.registry import simulator
from hf_vla.evaluation.workers import Begun
from hf_vla.policy import Policy

TERMINATION = "success at any control step ends an episode; without it, the horizon does, and it has failed"
BATCH_SIZE = 4  # more would save less than it costs to build as many environments of a task


@dataclass(frozen=True)
class EvaluationPlan:
    """What to evaluate.

    Args:
        env (`str`): name of the simulator.
        selection (`str`): tasks and splits of it, separated by commas.
        episodes (`int`): of every task.
        seed (`int`): of every task's first episode; the others count up from it.
        horizon (`int`, *optional*): control steps of an episode; the simulator's own by default.
        rendering (`str`): "fast" or "full".
        cameras (`dict[str, str]`): the checkpoint's name of a camera -> the simulator's, where they differ.
        policy_options (`dict`): of [`~hf_vla.policy.Policy`]: `n_action_steps`, `ensemble_coefficient`,
            `num_inference_steps` and the like.
        batch_size (`int`): rows of every call of the model, which the last bits of a prediction depend on.

    Raises:
        ValueError: one of them is unknown or out of range.
    """

    env: str
    selection: str
    episodes: int = 20
    seed: int = 0
    horizon: int | None = None
    rendering: str = "fast"
    cameras: dict[str, str] = field(default_factory=dict)
    policy_options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = BATCH_SIZE

    def __post_init__(self):
        if self.rendering not in RENDERINGS:
            raise ValueError(f"Expected a rendering among {RENDERINGS}, came {self.rendering!r}.")
        horizon = 1 if self.horizon is None else self.horizon
        if min(self.episodes, horizon, self.batch_size) < 1 or self.seed < 0:
            raise ValueError(
                "Expected episodes, horizon and batch_size of 1 or more and a seed of 0 or more, came "
                f"{self.episodes}, {self.horizon}, {self.batch_size} and {self.seed}."
            )
        if self.seeds.stop > FIRST_RECORDING_SEED:
            raise ValueError(
                f"Expected seeds below {FIRST_RECORDING_SEED:,}, came {self.seed:,} and {self.episodes - 1:,} after "
                "it: demonstrations begin with the seeds above."
            )
        for task in self.tasks:
            starts = simulator(self.env).count_starts(task)
            if starts is not None and self.episodes > starts:
                raise ValueError(
                    f"{self.env}'s {task} has {starts} initial states, of which {self.episodes} episodes would repeat "
                    f"some as if they were others: give {starts} episodes or fewer."
                )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of the selection."""
        return simulator(self.env).select(self.selection)

    @property
    def seeds(self) -> range:
        """The seeds of every task."""
        return range(self.seed, self.seed + self.episodes)


def describe(plan: EvaluationPlan, policy: Policy, checkpoint: str, cameras: CameraPlan, robot: Begun) -> dict:
    """Write the protocol of an evaluation.

    Args:
        plan ([`EvaluationPlan`]): what is evaluated.
        policy ([`~hf_vla.policy.Policy`]): with the plan's options.
        checkpoint (`str`): where it is from.
        cameras ([`~hf_vla.evaluation.contract.CameraPlan`]): what it looks through.
        robot ([`~hf_vla.evaluation.workers.Begun`]): what the simulator says of the first task.

    Returns:
        `dict`: JSON-safe.
    """
    packages = ("hf-vla", "torch", "transformers", "numpy")
    return {
        "env": plan.env,
        "selection": plan.selection,
        "tasks": list(plan.tasks),
        "episodes": plan.episodes,
        "seed": plan.seed,
        "horizon": robot.horizon,
        "termination": TERMINATION,
        "rendering": plan.rendering,
        "cameras": {own: [name, *cameras.sizes[name]] for own, name in cameras.names.items()},
        "depth": cameras.depth,
        "n_action_steps": policy.n_action_steps,
        **{name: value for name, value in plan.policy_options.items() if name not in ("n_action_steps", "unnorm_key")},
        "unnorm_key": policy.unnorm_key,
        **_gripper(policy.action_spec, robot.action_spec),
        "preprocessing": _preprocessing(policy.processor),
        "batch_size": plan.batch_size,
        "checkpoint": checkpoint,
        "weights_sha256": weights_sha256(policy.model),
        "config_sha256": config_sha256(policy.model, policy.processor),
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "device": device_name(policy.model.device),
        "machine": machine(),
        "versions": {name: version(name) for name in packages} | robot.versions,
        "command": _command(plan, checkpoint, policy.model.device),
    }


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 of a model's weights: names, types and numbers, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def config_sha256(model, processor) -> str:
    """SHA-256 of everything else in a checkpoint.

    That is the model's configuration, the processor's with its statistics, and the tokenizer (where it has no fast
    backend, its vocabulary alone) with its chat template.
    Where it was loaded from, and the transformers that wrote it, are left out.
    """
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    tokenizer = processor.tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    said = {
        "model": model.config.to_dict(),
        "processor": processor.to_dict(),
        "tokenizer": tokenizer | dict.fromkeys(("padding", "truncation")),  # those of the last call
        "chat_template": [processor.chat_template, processor.tokenizer.chat_template],
    }
    return hashlib.sha256(json.dumps(_lasting(said), sort_keys=True, default=str).encode()).hexdigest()


def _lasting(value):
    if isinstance(value, dict):
        passing = ("_name_or_path", "transformers_version")
        return {str(name): _lasting(each) for name, each in value.items() if name not in passing}
    return [_lasting(each) for each in value] if isinstance(value, list | tuple) else value


def _gripper(own, other):
    """Both sides' numbers for open and closed where actions are converted."""
    if not ends_differ(own, other):
        return {}
    sides = {"checkpoint": own.gripper, "simulator": other.gripper}
    return {"gripper_converted": {side: {"open": each.open, "closed": each.closed} for side, each in sides.items()}}


def _preprocessing(processor):
    """What the image processor says of itself, without what is None."""
    values = processor.image_processor.to_dict()
    return {name: values[name] for name in sorted(values) if values[name] is not None and not name.startswith("_")}


def device_name(device: torch.device) -> str:
    """Name of an accelerator, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def available_cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def machine() -> str:
    """Processor, system and Python of this machine, in a line."""
    return f"{_processor()}, {platform.system()}, Python {platform.python_version()}"


def _processor():
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{available_cores()} cores of {next(iter(names), platform.processor() or platform.machine())}"


def _command(plan, checkpoint, device):
    """The command line that repeats the evaluation."""
    words = ["hf-vla", "eval", "--model", checkpoint, "--env", plan.env, "--tasks", plan.selection]
    words += ["--episodes", str(plan.episodes), "--seed", str(plan.seed), "--rendering", plan.rendering]
    words += ["--device", device.type]
    options = {"horizon": plan.horizon, "batch_size": plan.batch_size, **plan.policy_options}
    options["ensemble"] = options.pop("ensemble_coefficient", None)
    for name, value in options.items():
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    for own, name in plan.cameras.items():
        words += ["--camera", f"{own}={name}"]
    return shlex.join(words)
