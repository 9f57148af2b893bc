"""What a server serves: a model, the adapters that share its weights, and what it tells clients about them."""

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_vla.actions.spec import CameraSpec
from hf_vla.models.loading import load_checkpoint
from hf_vla.policy import DEPTH, IMAGES, STATE, TASK, Policy

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
WRAPPERS = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")  # peft's, around what they adapt


class ServedModels:
    """A checkpoint and its adapters, each with its own processor: its statistics go with it.

    An adapter is loaded as it would be alone, and then lets go of every weight that the checkpoint has as well: all
    use the same memory, no switch is ever made, and none can be forgotten. Each predicts once, for a black picture:
    whatever cannot is known before a robot asks, and the first answer is no slower than others.

    Args:
        path (`str`): the checkpoint's folder or Hub name.
        adapters (`Mapping[str, str]`, *optional*): name -> folder or Hub name of an adapter of this very checkpoint.
        unnorm_keys (`Mapping[str | None, str]`, *optional*): adapter's name, None for the checkpoint itself -> dataset
            whose robot is driven, where several are known.
        device (`str`, *optional*): default the accelerator where there is one, else the CPU.
        options: of every client's [`~hf_vla.policy.Policy`].

    Raises:
        ValueError: see `Policy`; or a name cannot be one, an adapter is of another model, or nothing can be predicted.
        OSError: there is no checkpoint.
    """

    def __init__(
        self,
        path: str,
        adapters: Mapping[str, str] | None = None,
        unnorm_keys: Mapping[str | None, str] | None = None,
        device: str | None = None,
        **options: Any,
    ):
        adapters, keys = dict(adapters or {}), dict(unnorm_keys or {})
        if wrong := [name for name in adapters if not ADAPTER_NAME.fullmatch(name)]:
            raise ValueError(f"Expected adapters' names of letters, digits, '.', '_' and '-', came {wrong}.")
        if unknown := sorted(str(name) for name in keys.keys() - {None, *adapters}):
            raise ValueError(f"A dataset is given for {unknown}, which is no adapter; there are {sorted(adapters)}.")
        self._options, self._keys = options, keys
        base = Policy.from_pretrained(path, keys.get(None), device, **options)
        if adapters and getattr(base.model, "_hf_peft_config_loaded", False):  # transformers' own word
            raise ValueError(f"{path!r} is an adapter itself: serve the model that all of them adapt.")
        self.name = Path(path).resolve().name if Path(path).exists() else path
        self._loaded = {None: (base.model, base.processor)}
        self.shared = {name: self._load(name, source, path) for name, source in adapters.items()}
        self.contracts = {name: contract(self.policy(name)) for name in self._loaded}
        for name in self._loaded:
            self._try(name)

    @property
    def adapters(self) -> list[str]:
        """Names, sorted."""
        return sorted(name for name in self._loaded if name is not None)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._loaded[None][0].device

    def policy(self, adapter: str | None = None) -> Policy:
        """Return a new policy, of one client.

        Args:
            adapter (`str`, *optional*): by its name; default the checkpoint itself.

        Raises:
            ValueError: there is none of this name.
        """
        if adapter not in self._loaded:
            raise ValueError(f"There is no adapter {str(adapter)[:80]!r}; this server has {self.adapters}.")
        return Policy(*self._loaded[adapter], self._keys.get(adapter), **self._options)

    def metadata(self) -> dict[str, Any]:
        """Return what a client is told first: what the checkpoint and each adapter expect and give."""
        adapters = {name: self.contracts[name] for name in self.adapters}
        return {"server": "hf_vla", "version": version("hf-vla"), "model": self.name} | {
            **self.contracts[None],
            "adapters": adapters,
        }

    def _try(self, name):
        """Predict for a robot that sees nothing, at its home."""
        policy = self.policy(name)
        observation: dict[str, Any] = {TASK: "wait"}
        for camera in policy.cameras or [CameraSpec(None, 224, 224)]:
            key, size = camera.name or "image", (camera.height, camera.width)
            observation[IMAGES + key] = np.zeros((*size, 3), np.uint8)
            observation[DEPTH + key] = np.ones(size, np.float32)
        observation[STATE] = np.zeros(self.contracts[name]["state_dim"] or 0, np.float32)
        try:
            policy.predict_chunk(observation)
        except ValueError as error:
            which = "The checkpoint" if name is None else f"The adapter {name!r}"
            raise ValueError(f"{which} cannot predict, tried with black pictures and zeros: {error}") from error

    def _load(self, name, source, path):
        """Load an adapter; returns the share of its weights that the checkpoint has in memory already."""
        model, processor = load_checkpoint(source, f"adapter {name}")
        base = self._loaded[None][0]
        shared, own, different = share_weights(model, base)
        if different:
            raise ValueError(
                f"The adapter {name!r} ({source}) is not one of {path!r}: {len(different)} weights of the model that "
                f"it adapts are others, among them {different[:3]}. Serve it on its own."
            )
        if not own:
            raise ValueError(f"{source!r} is no adapter: it has no weights beside those of {path!r}.")
        self._loaded[name] = model.to(self.device), processor
        return shared / (shared + own)


def share_weights(model: torch.nn.Module, base: torch.nn.Module) -> tuple[int, int, list[str]]:
    """Let a model with adapters use the memory of another for all that they have in common.

    Args:
        model (`torch.nn.Module`): has adapters of peft's in it; changed, and best still on the CPU.
        base (`torch.nn.Module`): what was adapted, on any device.

    Returns:
        `tuple[int, int, list[str]]`: bytes that are shared, bytes of the adapters, and names of weights that should be
        equal and are not, nor are shared.
    """
    theirs, shared, own, different = dict(base.named_parameters(remove_duplicate=False)), 0, 0, []
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        original = theirs.get(WRAPPERS.sub("", name))
        if original is None:
            own += parameter.nbytes
        elif not _equal(parameter, original):
            different.append(name)
        else:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, original)
            shared += original.nbytes
    return shared, own, different


def _equal(parameter, original):
    if parameter.dtype != original.dtype or parameter.shape != original.shape:
        return False
    return torch.equal(parameter.to(original.device), original)


def contract(policy: Policy) -> dict[str, Any]:
    """Say what a policy expects of a robot, and what it gives.

    Args:
        policy ([`~hf_vla.policy.Policy`])

    Returns:
        `dict`: JSON values.
    """
    codec, key = policy.processor.action_codec, policy.unnorm_key
    return {
        "model_type": policy.model.config.model_type,
        "unnorm_key": key,
        "chunk_size": codec.chunk_size,
        "action_dim": codec.normalizer(key).action_dim,
        "action": policy.action_spec and policy.action_spec.to_dict(),
        "state_dim": codec.state_normalizer(key).action_dim if policy.takes_state else None,
        "state": policy.state_spec.to_dict() if policy.takes_state and policy.state_spec else None,
        "cameras": [camera.to_dict() for camera in policy.cameras],
        "n_obs_steps": codec.n_obs_steps,
        "takes_reasoning": policy.takes_reasoning,
    }
