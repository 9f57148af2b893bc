"""Robot units <-> model targets: normalisation and, where the model emits ids, tokenization."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hf_vla.actions.normalization import ActionNormalizer
from hf_vla.actions.spec import ActionSpec, StateSpec, whole_number
from hf_vla.actions.tokenizers.registry import build_action_tokenizer
from hf_vla.actions.values import check_finite

SIZE_KEYS = ("n_obs_steps", "action_dim", "state_dim")
CONFIG_KEYS = ("chunk_size", "normalization", "state_normalization", "tokenizer", "specs", *SIZE_KEYS)
NORMALIZATION_KEYS = ("mode", "clip", "convention")
SPEC_KEYS = ("action", "state")


class ActionCodec:
    """Everything a checkpoint knows about actions and states, derived from two JSON dictionaries of its processor.

    Args:
        statistics (`dict`, *optional*): `{unnorm_key: {"action": {"q01": [...], "q99": [...], "mask"?, ...},
            "state": {...}, ...}}`. A missing mask is all True.
        action_config (`dict`, *optional*): `{"chunk_size": int, "normalization": {"mode", "clip", "convention"},
            "state_normalization": {"mode", "clip", "convention"} | None, "tokenizer": {"type": ..., ...} | None,
            "specs": {unnorm_key: {"action": dict | None, "state": dict | None}}, "n_obs_steps": int, "action_dim":
            int, "state_dim": int}`. Without normalization: SpatialVLA's (quantile, clipped). Without
            state_normalization: the checkpoint takes no state. Without n_obs_steps: 1, the model sees the present
            alone. `action_dim` and `state_dim` are the model's sizes, by default the largest among the datasets; what
            a robot has less is padded with zeros at the end. None: a processor that has no actions yet; every method
            below but `keys` raises.

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
        given = {name: config[name] for name in SIZE_KEYS if config.get(name) is not None}
        sizes = {name: whole_number(size, f"action_config[{name!r}]") for name, size in given.items()}
        self.n_obs_steps = sizes.get("n_obs_steps", 1)
        self._dims = {what: sizes.get(f"{what}_dim") for what in SPEC_KEYS}
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

    @property
    def action_dim(self) -> int:
        """Numbers of an action of the model: `action_config["action_dim"]`, or the most that a dataset has."""
        return self._dim("action")

    @property
    def state_dim(self) -> int | None:
        """Numbers of a state of the model, likewise; None where it takes none."""
        return self._dim("state") if self.takes_state else None

    @property
    def terminates(self) -> bool:
        """Whether the action tokens say, beside the action, where an episode ends."""
        return self.tokenizer is not None and self.tokenizer.terminate

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

    def own_dims(self, unnorm_keys: Sequence[str | None]) -> np.ndarray | None:
        """Which numbers of the model's actions robots have themselves; the others are padding.

        Args:
            unnorm_keys (`Sequence[str]`): datasets, see `resolve_key`.

        Returns:
            `np.ndarray` of shape `(len(unnorm_keys), self.action_dim)`, bool. None where this codec pads for no
            dataset, be it among these or not: batches of one checkpoint have one layout.

        Raises:
            ValueError: see `normalizer`.
        """
        known = [key for key in self.keys if "action" in self.statistics[key]]
        if self.chunk_size is None or all(self.normalizer(key).action_dim == self.action_dim for key in known):
            return None
        sizes = [self.normalizer(key).action_dim for key in unnorm_keys]
        return np.arange(self.action_dim) < np.array(sizes)[:, None]

    def encode(
        self,
        actions: ArrayLike,
        unnorm_key: str | None = None,
        pad: bool = True,
        terminate: ArrayLike | None = None,
    ) -> np.ndarray:
        """Turn actions into what the model is trained on.

        Args:
            actions (`np.ndarray` of shape `(..., chunk_size, action_dim)`): robot units, the dataset's own numbers.
            unnorm_key (`str`, *optional*): see `resolve_key`.
            pad (`bool`, defaults to `True`): False: keep the dataset's own numbers alone.
            terminate (`np.ndarray` of shape `(..., chunk_size)`, bool, *optional*): where the episode ends; needed
                where the tokenizer says so, and else ignored.

        Returns:
            `np.ndarray`: action ids, int64 of shape `(..., N)`, with a tokenizer; else normalised actions, float32,
            `(..., chunk_size, self.action_dim)`: zeros behind the robot's own numbers.

        Raises:
            ValueError: the shape does not fit, a value is NaN or infinite, `terminate` is missing, or see
                `normalizer`.
        """
        normalizer = self.normalizer(unnorm_key)
        normalized = normalizer.normalize(self._checked(actions, normalizer, "actions"))
        if self.terminates and terminate is None:
            raise ValueError(
                "These action tokens say where an episode ends: give `terminate`, True at its last action."
            )
        if self.tokenizer is not None:
            ends = {"terminate": np.asarray(terminate)} if self.terminates else {}
            return self.tokenizer.encode(normalized, **ends)
        return _padded(normalized.astype(np.float32), self.action_dim if pad else normalizer.action_dim)

    def decode(self, prediction: ArrayLike, unnorm_key: str | None = None) -> np.ndarray:
        """Turn a model's prediction into actions; the inverse of `encode`.

        Args:
            prediction (`np.ndarray`): action ids of shape `(..., N)`, with a tokenizer; else normalised actions of
                shape `(..., chunk_size, self.action_dim)`, or no wider than the dataset's own.
            unnorm_key (`str`, *optional*): see `resolve_key`.

        Returns:
            `np.ndarray` of shape `(..., chunk_size, action_dim)`: float32, robot units, the dataset's own numbers.

        Raises:
            ValueError: ids that are no chunk, a shape that does not fit, NaN or infinity, or see `normalizer`.
        """
        normalizer = self.normalizer(unnorm_key)
        if self.tokenizer is not None:
            prediction = self.tokenizer.decode(np.asarray(prediction), horizon=self.chunk_size)
        elif np.shape(prediction)[-1:] == (self.action_dim,):
            prediction = np.asarray(prediction)[..., : normalizer.action_dim]
        normalized = self._checked(prediction, normalizer, "predicted actions")
        return normalizer.unnormalize(normalized).astype(np.float32)

    def encode_state(self, state: ArrayLike, unnorm_key: str | None = None, pad: bool = True) -> np.ndarray:
        """Normalise a robot's state.

        Args:
            state (`np.ndarray` of shape `(..., state_dim)`): robot units.
            unnorm_key (`str`, *optional*): see `resolve_key`.
            pad (`bool`, defaults to `True`): False: keep the dataset's own numbers alone.

        Returns:
            `np.ndarray` of shape `(..., self.state_dim)`: float32, zeros behind the robot's own numbers.

        Raises:
            ValueError: the shape does not fit, a value is NaN or infinite, or see `state_normalizer`.
        """
        normalizer, state = self.state_normalizer(unnorm_key), np.asarray(state)
        if state.ndim == 0 or state.shape[-1] != normalizer.action_dim:
            raise ValueError(f"Expected states of shape (..., {normalizer.action_dim}), came {state.shape}.")
        check_finite(state, "states")
        normalized = normalizer.normalize(state).astype(np.float32)
        return _padded(normalized, self.state_dim if pad else normalizer.action_dim)

    def specs(self, unnorm_key: str | None = None) -> tuple[ActionSpec | None, StateSpec | None]:
        """Return a dataset's `(ActionSpec | None, StateSpec | None)`; None where nothing was declared."""
        return self._specs.get(self.resolve_key(unnorm_key), (None, None))

    def _parse_specs(self, key, specs):
        self.resolve_key(key)
        _require_known(specs, SPEC_KEYS, f"action_config['specs'][{key!r}]")
        parsers = {"action": ActionSpec.from_dict, "state": StateSpec.from_dict}
        return tuple(None if specs.get(name) is None else parse(specs[name]) for name, parse in parsers.items())

    def _dim(self, what):
        if self._dims[what] is None:
            known = [key for key in self.keys if what in self.statistics[key]]
            self._dims[what] = max((self._normalizer(key, what).action_dim for key in known), default=None)
        return self._dims[what]

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
        own, most = normalizer.action_dim, self._dims[what]
        spec = dict(zip(SPEC_KEYS, self.specs(key), strict=True))[what]
        if spec is not None and len(spec.names) != own:
            raise ValueError(f"{name} have {own} dimensions, the {what} spec has {len(spec.names)}.")
        if what == "action" and self.tokenizer is not None and self.tokenizer.action_dim != own:
            raise ValueError(
                f"{name} have {own} dimensions, the action tokenizer has {self.tokenizer.action_dim}: one tokenizer "
                "serves datasets of equally many; leave the others out."
            )
        if most is not None and own > most:
            raise ValueError(
                f"{name} have {own} dimensions, but this model's {what}s hold at most {most} "
                f"(action_config['{what}_dim']): leave that dataset out, or train a model of a larger {what}_dim."
            )
        return normalizer

    def _checked(self, actions, normalizer, what):
        actions = np.asarray(actions)
        if actions.shape[-2:] != (self.chunk_size, normalizer.action_dim):
            raise ValueError(
                f"Expected {what} of shape (..., chunk_size={self.chunk_size}, action_dim={normalizer.action_dim}), "
                f"came {actions.shape}."
            )
        return actions


def _padded(values, width):
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])])


def _require_known(values, known, what):
    if not isinstance(values, dict):
        raise ValueError(f"Expected a dictionary for {what}, came {type(values).__name__}.")
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"Unknown keys {unknown} in {what}; known are {list(known)}.")
