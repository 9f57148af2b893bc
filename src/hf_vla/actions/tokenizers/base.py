"""The interface of every discrete action representation, and what fixed-length ones share."""

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np


class TokenStream(ABC):
    """One action chunk being generated: which ids may come next, so that what comes out always decodes."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.position = 0

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether the ids pushed so far are a whole chunk; nothing may follow."""

    @abstractmethod
    def allowed(self) -> np.ndarray:
        """Return a bool array of shape `(vocab_size,)`: True where the id can still lead to a valid chunk."""

    @abstractmethod
    def _advance(self, token_id: int) -> None: ...

    def push(self, token_id: int) -> None:
        """Append one id.

        Raises:
            ValueError: the chunk is complete already, `allowed()` is False for this id, or it is no integer.
        """
        (token_id,) = integer_ids([token_id]).tolist()
        if self.complete:
            raise ValueError(f"The chunk is complete after {self.position} ids; expected no id, got {token_id}.")
        allowed = self.allowed()
        if not (0 <= token_id < self.vocab_size and allowed[token_id]):
            raise ValueError(
                f"Id {token_id} cannot come at position {self.position}; expected one of the {allowed.sum()} ids "
                f"that allowed() marks, out of {self.vocab_size}."
            )
        self._advance(token_id)
        self.position += 1


class ActionTokenizer(ABC):
    """Normalised action chunks to relative ids and back; knows nothing of a text vocabulary.

    Ids are in `[0, vocab_size)`. The constructor's parameters are exactly the keys of `to_dict()` (beside "type"),
    JSON values all of them.
    """

    type: ClassVar[str]
    vocab_size: int
    action_dim: int
    terminate: bool = False  # whether ids say where an episode ends; `encode` then takes `terminate`, too

    @abstractmethod
    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Turn normalised chunks `(..., T, D)` into ids `(..., N)`, int64."""

    @abstractmethod
    def decode(self, ids: np.ndarray, horizon: int | None = None) -> np.ndarray:
        """Turn ids `(..., N)` into normalised chunks `(..., T, D)`, float64; `horizon` is the wanted T."""

    @abstractmethod
    def resolution(self) -> np.ndarray:
        """Return the worst round-trip error of each dimension, shape `(D,)`, normalised units."""

    @abstractmethod
    def stream(self, horizon: int) -> TokenStream:
        """Return the state of generating one chunk of `horizon` actions id by id."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return JSON-safe options from which `from_dict` builds an equal tokenizer."""

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ActionTokenizer":
        """Build from `to_dict()`'s options.

        Raises:
            ValueError: another tokenizer's type, an option that this tokenizer does not know, or one is missing.
        """
        options = dict(config)
        if options.pop("type", cls.type) != cls.type:
            raise ValueError(f"Expected the options of a {cls.type!r} action tokenizer; got type {config['type']!r}.")
        parameters = inspect.signature(cls).parameters
        unknown = sorted(set(options) - set(parameters))
        if unknown:
            raise ValueError(f"Unknown option(s) {unknown} for action tokenizer {cls.type!r}; known: {[*parameters]}.")
        required = (name for name, p in parameters.items() if p.default is p.empty)
        missing = [name for name in required if name not in options]
        if missing:
            raise ValueError(f"Action tokenizer {cls.type!r} needs the option(s) {missing}; got {sorted(options)}.")
        return cls(**options)


class FixedLengthTokenizer(ActionTokenizer):
    """A tokenizer that spends the same number of ids on every action, each from a known range.

    Subclasses set `blocks`: for each id of one action `(name, first id, id after the last)`.
    """

    blocks: list[tuple[str, int, int]]

    def id_ranges(self, horizon: int) -> np.ndarray:
        """Return the permitted ids `[first, last + 1)` at each position of a chunk, shape `(N, 2)`, int64."""
        return np.tile(np.array([block[1:] for block in self.blocks], dtype=np.int64), (positive(horizon), 1))

    def stream(self, horizon: int) -> TokenStream:
        """Return the state of generating one chunk of `horizon` actions id by id."""
        return _RangeStream(self.vocab_size, self.id_ranges(horizon))

    def _check_ids(self, ids: Any, horizon: int | None) -> np.ndarray:
        """Return ids as `(..., T, ids per action)`, each of them within its block, or raise naming the position."""
        ids, width = integer_ids(ids), len(self.blocks)
        if ids.shape[-1] == 0 or ids.shape[-1] % width:
            raise ValueError(f"Expected {width} ids for each action, a multiple in all; got {ids.shape[-1]}.")
        if horizon is not None and ids.shape[-1] != positive(horizon) * width:
            raise ValueError(
                f"Expected {horizon} actions of {width} ids, {horizon * width} in all; got {ids.shape[-1]}."
            )
        steps = ids.reshape(*ids.shape[:-1], ids.shape[-1] // width, width)
        for slot, (name, first, end) in enumerate(self.blocks):
            column = steps[..., slot]
            if column.size and (column.min() < first or column.max() >= end):
                *row, step = np.argwhere((column < first) | (column >= end))[0].tolist()
                place = [*row, step * width + slot]
                raise ValueError(
                    f"ids{place} is {column[(*row, step)]}; expected an id of the {name} block, [{first}, {end}). "
                    "Generate with stream() or id_ranges() and no id can leave its block."
                )
        return steps


class _RangeStream(TokenStream):
    def __init__(self, vocab_size: int, ranges: np.ndarray):
        super().__init__(vocab_size)
        self.ranges = ranges

    @property
    def complete(self) -> bool:
        return self.position == len(self.ranges)

    def allowed(self) -> np.ndarray:
        allowed = np.zeros(self.vocab_size, dtype=bool)
        if not self.complete:
            allowed[slice(*self.ranges[self.position])] = True
        return allowed

    def _advance(self, token_id: int) -> None:
        pass


def check_actions(actions: Any, action_dim: int | None = None) -> np.ndarray:
    """Return `actions` as a float array `(..., T, action_dim)` of finite values; any T and D where it is None.

    Raises:
        ValueError: another shape, no numbers, or NaN or infinity (which names the place).
    """
    actions = np.asarray(actions)
    if actions.dtype.kind not in "fiu":
        raise ValueError(f"Expected real numbers as actions; got an array of {actions.dtype}.")
    if actions.ndim < 2 or actions.shape[-2] == 0 or actions.shape[-1] != (action_dim or actions.shape[-1]):
        raise ValueError(f"Expected actions of shape (..., chunk_size, {action_dim or 'D'}); got {actions.shape}.")
    finite = np.isfinite(actions)
    if not finite.all():
        place = np.argwhere(~finite)[0].tolist()
        raise ValueError(f"actions{place} is {actions[tuple(place)]}; expected finite values. Clean the data first.")
    return actions.astype(np.result_type(actions, np.float32), copy=False)


def integer_ids(ids: Any) -> np.ndarray:
    """Return `ids` as an int64 array with at least one axis, or raise `ValueError`: ids are never rounded."""
    ids = np.asarray(ids)
    if ids.ndim == 0 or (ids.dtype.kind not in "iu" and ids.size):
        raise ValueError(f"Expected integer ids of shape (..., N); got {ids.dtype} of shape {ids.shape}.")
    return ids.astype(np.int64, copy=False)


def positive(horizon: int) -> int:
    """Return `horizon`, or raise `ValueError` where it is no positive number of actions."""
    if horizon < 1:
        raise ValueError(f"Expected a horizon of at least one action; got {horizon}.")
    return horizon
