"""How long a checkpoint takes to act, measured on this machine and kept beside it for its model card."""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from hf_vla.evaluation.protocol import device_name, machine
from hf_vla.models.loading import load_processor
from hf_vla.policy import DEPTH, IMAGES, STATE, TASK, Policy
from hf_vla.training.summary import read_checked, read_summary

LATENCY = "latency.json"
WARM_UP = 3


class Latency(TypedDict):
    """What a model card tells of `latency.json`."""

    p50_ms: float | int
    p95_ms: float | int
    predictions: int
    reasoning: str | None
    machine: str
    device: str
    dtype: str
    versions: dict[str, str]


def measure_latency(
    folder: str | Path,
    predictions: int = 20,
    device: str | None = None,
    unnorm_key: str | None = None,
    task: str | None = None,
) -> dict[str, Any]:
    """Measure the time from an observation to a chunk of actions, one observation at a time.

    Args:
        folder (`str` or `Path`): the checkpoint.
        predictions (`int`): how many are measured, after three that are not.
        device (`str`, *optional*): default the accelerator where there is one, else the CPU.
        unnorm_key (`str`, *optional*): dataset whose robot acts; by default the first that it knows.
        task (`str`, *optional*): the instruction; by default one that it was trained with, where it is known.
            Pictures are black, states zero.

    Returns:
        `dict`: JSON-safe; "p50_ms" and "p95_ms" of "predictions", and under which circumstances.

    Raises:
        ValueError: see [`~hf_vla.policy.Policy`].
    """
    unnorm_key = unnorm_key or load_processor(folder).action_codec.keys[0]
    policy = Policy.from_pretrained(str(folder), unnorm_key=unnorm_key, device=device, seed=0)
    training = read_summary(folder)
    known = training["instructions"] if training else []
    task = task or next(iter(known), "pick up the red cube")
    observation = blank_observation(policy, task)
    times = []
    for _ in range(WARM_UP + predictions):
        policy.reset()
        started = time.perf_counter()
        policy.predict_chunk(observation)
        times.append(1000 * (time.perf_counter() - started))
    p50, p95 = np.percentile(times[WARM_UP:], [50, 95])
    device, threads = policy.model.device, torch.get_num_threads()
    return {
        "p50_ms": round(float(p50), 2),
        "p95_ms": round(float(p95), 2),
        "predictions": predictions,
        "task": task,
        "unnorm_key": policy.unnorm_key,
        "reasoning": policy.reasoning,
        "machine": machine(),
        "device": f"cpu, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device_name(device),
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("hf-vla", "torch", "transformers")},
    }


def blank_observation(policy: Policy, task: str) -> dict[str, Any]:
    """Make an observation that a policy takes: black pictures, depths of one metre, a state of zeros.

    Args:
        policy ([`~hf_vla.policy.Policy`])
        task (`str`): the instruction.

    Returns:
        `dict`: see [`~hf_vla.policy.Policy.predict_chunk`].
    """
    observation: dict[str, Any] = {TASK: task}
    sizes = {camera.name or "image": (camera.height, camera.width) for camera in policy.cameras}
    for name, size in (sizes or {"image": (224, 224)}).items():
        observation[IMAGES + name] = np.zeros((*size, 3), np.uint8)
    observation |= {
        DEPTH + (camera.name or "image"): np.ones((camera.height, camera.width), np.float32)
        for camera in policy.cameras
        if camera.depth
    }
    if policy.takes_state:
        observation[STATE] = np.zeros(policy.processor.action_codec.state_normalizer(policy.unnorm_key).action_dim)
    return observation


def write_latency(measured: dict[str, Any], folder: str | Path) -> Path:
    """Keep a measurement as `latency.json`, of which the model card tells."""
    path = Path(folder, LATENCY)
    path.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read_latency(folder: str | Path) -> dict[str, Any] | None:
    """Return what was measured; None where nothing was.

    Raises:
        ValueError: the file is broken; the text names it and the entry.
    """
    path = Path(folder, LATENCY)
    return read_checked(path, Latency) if path.is_file() else None
