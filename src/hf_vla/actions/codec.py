"""Robot units <-> model targets: normalisation and, where the model emits ids, tokenization."""

from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_vla.actions.normalization import ActionNormalizer
from hf_vla.actions.spec import ActionSpec, StateSpec, whole_number
from hf_vla.actions.statistics import check_finite
from hf_vla.actions.tokenizers.registry import build_action_tokenizer

CONFIG_KEYS = ("chunk_size", "normalization", "state_normalization", "tokenizer", "specs")
NORMALIZATION_KEYS = ("mode", "clip", "convention")
SPEC_KEYS = ("action", "state")


class ActionCodec:
    """Everything a checkpoint knows about actions and states, derived from two JSON dictionaries of its processor.

    Args:
        statistics (`dict`, *optional*): `{unnorm_key: {"action": {"q01": [...], "q99": [...], "mask"?, ...},
            "state": {...}, ...}}`. A missing mask is all True.
        action_config (`dict`, *optional*): `{"chunk_size": int, "normalization": {"mode", "clip", "convention"},
            "state_normalization": {"mode", "clip", "convention"} | None, "tokenizer": {"type": ..., ...} | None,
            "specs": {unnorm_key: {"action": dict | None, "state": dict | None}}}`. Without normalization: SpatialVLA's
            (quantile, clipped). Without state_normalization: the checkpoint takes no state. None: a processor that has
            no actions yet; every method below but `keys` raises.

    Raises:
        ValueError: an unknown key, an invalid value, or specs of a dataset that has no statistics.
    """

    def __init__(self, statistics: dict[str, Any] | None = None, action_config: dict[str, Any] | None = None):
        self.statistics = statistics or {}
        config = {} if action_config is None else action_config
        _require_known(config, CONFIG_KEYS, "action_config")
        self.chunk_size = config.get("chunk_size")
        if action_config is not None:
            self.chunk_size = whole_number(self.chunk_size, "action_config['chunk_size']")
        self._normalization = {
            "action": config.get("normalization") or {},
            "state": config.get("state_normalization") or {},
        }
        for name, what in (("normalization", "action"), ("state_normalization", "state")):
            _require_known(self._normalization[what], NORMALIZATION_KEYS, f"action_config[{name!r}]")
        self.takes_state = config.get("state_normalization") is not None
        tokenizer = config.get("tokenizer")
        self.tokenizer = None if tokenizer is None else build_action_tokenizer(tokenizer)
        self._specs = {key: self._parse_specs(key, specs) for key, specs in (config.get("specs") or {}).items()}
        self._normalizers: dict[tuple[str, str], ActionNormalizer] = {}

    @property
    def keys(self) -> list[str]:
        """Names of the datasets this checkpoint has statistics for, sorted."""
        return sorted(self.statistics)

    def resolve_key(self, unnorm_key: str | None = None) -> str:
        """Return the dataset to use.

        Args:
            unnorm_key (`str`, *optional*): a dataset's name; may be left out where there is only one.

        Raises:
            ValueError: there are no statistics, the key is unknown, or several datasets and no key.
        """
        if not self.keys:
            raise ValueError("This checkpoint has no action statistics; give its processor `statistics`.")
        if unnorm_key is None and len(self.keys) == 1:
            return self.keys[0]
        if unnorm_key is None:
            raise ValueError(f"Several datasets have action statistics; choose unnorm_key among {self.keys}.")
        if unnorm_key not in self.statistics:
            close = get_close_matches(str(unnorm_key), self.keys, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"No action statistics for {unnorm_key!r}; this checkpoint knows {self.keys}.{hint}")
        return unnorm_key

    def normalizer(self, unnorm_key: str | None = None) -> ActionNormalizer:
        """Return the `ActionNormalizer` of a dataset's actions.

        Raises:
            ValueError: see `resolve_key`; or the statistics do not fit the modes, the tokenizer or the spec.
        """
        return self._normalizer(unnorm_key, "action")

    def state_normalizer(self, unnorm_key: str | None = None) -> ActionNormalizer:
        """Return the `ActionNormalizer` of a dataset's states.

        Raises:
            ValueError: see `normalizer`; or the checkpoint takes no state.
        """
        if not self.takes_state:
            raise ValueError("This checkpoint takes no state: its action_config has no 'state_normalization'.")
        return self._normalizer(unnorm_key, "state")

    def encode(self, actions: ArrayLike, unnorm_key: str | None = None) -> np.ndarray:
        """Turn actions into what the model is trained on.

        Args:
            actions (`np.ndarray` of shape `(..., chunk_size, action_dim)`): robot units.
            unnorm_key (`str`, *optional*): see `resolve_key`.

        Returns:
            `np.ndarray`: action ids, int64 of shape `(..., N)`, with a tokenizer; else normalised actions, float32 of
            the shape of `actions`.

        Raises:
            ValueError: the shape does not fit, a value is NaN or infinite, or see `normalizer`.
        """
        normalizer = self.normalizer(unnorm_key)
        normalized = normalizer.normalize(self._checked(actions, normalizer, "actions"))
        return normalized.astype(np.float32) if self.tokenizer is None else self.tokenizer.encode(normalized)

    def decode(self, prediction: ArrayLike, unnorm_key: str | None = None) -> np.ndarray:
        """Turn a model's prediction into actions; the inverse of `encode`.

        Args:
            prediction (`np.ndarray`): action ids of shape `(..., N)`, with a tokenizer; else normalised actions of
                shape `(..., chunk_size, action_dim)`.
            unnorm_key (`str`, *optional*): see `resolve_key`.

        Returns:
            `np.ndarray` of shape `(..., chunk_size, action_dim)`: float32, robot units.

        Raises:
            ValueError: ids that are no chunk, a shape that does not fit, NaN or infinity, or see `normalizer`.
        """
        normalizer = self.normalizer(unnorm_key)
        if self.tokenizer is not None:
            prediction = self.tokenizer.decode(np.asarray(prediction), horizon=self.chunk_size)
        normalized = self._checked(prediction, normalizer, "predicted actions")
        return normalizer.unnormalize(normalized).astype(np.float32)

    def encode_state(self, state: ArrayLike, unnorm_key: str | None = None) -> np.ndarray:
        """Normalise a robot's state.

        Args:
            state (`np.ndarray` of shape `(..., state_dim)`): robot units.
            unnorm_key (`str`, *optional*): see `resolve_key`.

        Returns:
            `np.ndarray` of the same shape: float32.

        Raises:
            ValueError: the shape does not fit, a value is NaN or infinite, or see `state_normalizer`.
        """
        normalizer, state = self.state_normalizer(unnorm_key), np.asarray(state)
        if state.ndim == 0 or state.shape[-1] != normalizer.action_dim:
            raise ValueError(f"Expected states of shape (..., {normalizer.action_dim}), came {state.shape}.")
        check_finite(state, "states")
        return normalizer.normalize(state).astype(np.float32)

    def specs(self, unnorm_key: str | None = None) -> tuple[ActionSpec | None, StateSpec | None]:
        """Return a dataset's `(ActionSpec | None, StateSpec | None)`; None where nothing was declared."""
        return self._specs.get(self.resolve_key(unnorm_key), (None, None))

    def _parse_specs(self, key, specs):
        self.resolve_key(key)
        _require_known(specs, SPEC_KEYS, f"action_config['specs'][{key!r}]")
        parsers = {"action": ActionSpec.from_dict, "state": StateSpec.from_dict}
        return tuple(None if specs.get(name) is None else parse(specs[name]) for name, parse in parsers.items())

    def _normalizer(self, unnorm_key, what):
        key = self.resolve_key(unnorm_key)
        if (key, what) not in self._normalizers:
            self._normalizers[key, what] = self._build_normalizer(key, what)
        return self._normalizers[key, what]

    def _build_normalizer(self, key, what):
        if self.chunk_size is None:
            raise ValueError("This processor has no action_config; give it one with its 'chunk_size'.")
        if what not in self.statistics[key]:
            raise ValueError(f"Statistics of {key!r} have no {what!r}, only {sorted(self.statistics[key])}.")
        name = f"{what.capitalize()} statistics of {key!r}"
        try:
            normalizer = ActionNormalizer(self.statistics[key][what], **self._normalization[what])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        spec = dict(zip(SPEC_KEYS, self.specs(key), strict=True))[what]
        sizes = {f"the {what} spec": None if spec is None else len(spec.names)}
        if what == "action" and self.tokenizer is not None:
            sizes["the action tokenizer"] = self.tokenizer.action_dim
        for other, size in sizes.items():
            if size is not None and size != normalizer.action_dim:
                raise ValueError(f"{name} have {normalizer.action_dim} dimensions, {other} has {size}.")
        return normalizer

    def _checked(self, actions, normalizer, what):
        actions = np.asarray(actions)
        if actions.shape[-2:] != (self.chunk_size, normalizer.action_dim):
            raise ValueError(
                f"Expected {what} of shape (..., chunk_size={self.chunk_size}, action_dim={normalizer.action_dim}), "
                f"came {actions.shape}."
            )
        return actions


def _require_known(values, known, what):
    if not isinstance(values, dict):
        raise ValueError(f"Expected a dictionary for {what}, came {type(values).__name__}.")
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"Unknown keys {unknown} in {what}; known are {list(known)}.")
