"""Stand-in, see tests/lerobot_stand_in/README.md: pipelines of steps that are saved by their registered names."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lerobot.configs.types import NormalizationMode, PolicyFeature
from lerobot.processor.converters import batch_to_transition, transition_to_batch

PolicyAction = torch.Tensor
STEPS = {}


def register(name):
    def apply(kind):
        STEPS[name] = kind
        kind.registered = name
        return kind

    return apply


@register("rename_observations_processor")
@dataclass
class RenameObservationsProcessorStep:
    rename_map: dict[str, str] = field(default_factory=dict)

    def __call__(self, transition):
        seen = {self.rename_map.get(key, key): value for key, value in transition["observation"].items()}
        return {**transition, "observation": seen}


@register("to_batch_processor")
@dataclass
class AddBatchDimensionProcessorStep:
    def __call__(self, transition):
        seen, others = dict(transition["observation"]), dict(transition["others"])
        for key, value in seen.items():
            if value.dim() == (3 if key.startswith("observation.image") else 1):
                seen[key] = value.unsqueeze(0)
        if isinstance(others.get("task"), str):
            others["task"] = [others["task"]]
        return {**transition, "observation": seen, "others": others}


@register("device_processor")
@dataclass
class DeviceProcessorStep:
    device: str = "cpu"
    float_dtype: str | None = None

    def __call__(self, transition):
        moved = {key: value.to(self.device) for key, value in transition["observation"].items()}
        action = transition["action"]
        return {**transition, "observation": moved, "action": action if action is None else action.to(self.device)}


@dataclass
class _Normalizing:
    features: dict[str, PolicyFeature]
    norm_map: dict[str, NormalizationMode]
    stats: dict[str, dict[str, Any]] | None = None
    device: str | None = None

    def apply(self, key, value, inverse):
        mode = self.norm_map.get(self.features[key].type if key in self.features else None, "IDENTITY")
        if mode == "IDENTITY" or not self.stats or key not in self.stats:
            return value
        mean, std = (torch.as_tensor(self.stats[key][name], dtype=torch.float32) for name in ("mean", "std"))
        return value * std + mean if inverse else (value - mean) / (std + 1e-8)


@register("normalizer_processor")
@dataclass
class NormalizerProcessorStep(_Normalizing):
    def __call__(self, transition):
        seen = {key: self.apply(key, value, False) for key, value in transition["observation"].items()}
        action = transition["action"]
        action = action if action is None else self.apply("action", action, False)
        return {**transition, "observation": seen, "action": action}


@register("unnormalizer_processor")
@dataclass
class UnnormalizerProcessorStep(_Normalizing):
    def __call__(self, transition):
        return {**transition, "action": self.apply("action", transition["action"], True)}


class PolicyProcessorPipeline:
    def __class_getitem__(cls, item):
        return cls

    def __init__(self, steps, name, to_transition=batch_to_transition, to_output=transition_to_batch):
        self.steps, self.name = steps, name
        self.to_transition, self.to_output = to_transition, to_output

    def __call__(self, data):
        transition = self.to_transition(data)
        for step in self.steps:
            transition = step(transition)
        return self.to_output(transition)

    def save_pretrained(self, folder):
        plain = {RenameObservationsProcessorStep: ("rename_map",), DeviceProcessorStep: ("device", "float_dtype")}
        steps = [
            {
                "registry_name": step.registered,
                "config": {name: getattr(step, name) for name in plain.get(type(step), ())},
            }
            for step in self.steps
        ]
        (Path(folder) / f"{self.name}.json").write_text(json.dumps({"name": self.name, "steps": steps}))

    @classmethod
    def from_pretrained(cls, folder, config_filename, overrides, **options):
        saved = json.loads((Path(folder) / config_filename).read_text())
        names = [entry["registry_name"] for entry in saved["steps"]]
        if unused := {*overrides} - {*names}:
            raise KeyError(f"Override keys {unused} do not match any step in the saved configuration: {names}")
        empty = {"features": {}, "norm_map": {}}
        steps = [
            STEPS[entry["registry_name"]](
                **(empty if "normalizer" in entry["registry_name"] else {})
                | entry["config"]
                | overrides.get(entry["registry_name"], {})
            )
            for entry in saved["steps"]
        ]
        return cls(steps, saved["name"], **options)
