"""Uniform bins, one id per dimension: RT-1, RT-2 and OpenVLA."""

from typing import Any

import numpy as np

from hf_vla.actions.tokenizers.base import FixedLengthTokenizer, check_actions

CONVENTIONS = ("centers", "openvla")


class UniformTokenizer(FixedLengthTokenizer):
    """`n_bins` bins of equal width on [-1, 1]; every dimension uses the same ids.

    Args:
        action_dim (`int`, defaults to 7): dimensions of an action, and ids of an action.
        n_bins (`int`, defaults to 256): ids in all.
        convention (`str`, defaults to `"centers"`):
            - `"centers"`: `n_bins` bins, decoded to their centres, id 0 lowest; a value on an edge goes up
              (RT-1, https://huggingface.co/papers/2212.06817; RT-2, https://huggingface.co/papers/2307.15818).
            - `"openvla"`: OpenVLA's ids, whose edges are `linspace(-1, 1, n_bins)`, so that there are only
              `n_bins - 1` bins and +1.0 alone has an id of its own, which shares the highest centre. OpenVLA counts
              them down from the end of the text vocabulary: its id is `vocab_size - n_bins` plus ours, so our
              id 0 is +1.0 and `n_bins - 1` the lowest bin (https://huggingface.co/papers/2406.09246).
        terminate (`bool`, defaults to `False`): RT-2's layout, one id more in front of every action: 1 where the
            episode ends with it, else 0, both of the same `n_bins` ids.
    """

    type = "uniform"

    def __init__(self, action_dim: int = 7, n_bins: int = 256, convention: str = "centers", terminate: bool = False):
        if convention not in CONVENTIONS:
            raise ValueError(f"Unknown convention {convention!r}; expected one of {list(CONVENTIONS)}.")
        if action_dim < 1 or n_bins < 2:
            raise ValueError(f"Expected action_dim >= 1 and n_bins >= 2; got {action_dim} and {n_bins}.")
        self.action_dim, self.n_bins, self.convention = action_dim, n_bins, convention
        self.vocab_size = n_bins
        self.terminate = terminate
        self.blocks = [("terminate", 0, 2)] * terminate + [(f"dimension {i}", 0, n_bins) for i in range(action_dim)]
        self._half_bin = 1.0 / (n_bins if convention == "centers" else n_bins - 1)
        edges = np.linspace(-1.0, 1.0, n_bins + (convention == "centers"))
        self._values = (edges[:-1] + edges[1:]) / 2
        if convention == "openvla":
            self._values = np.append(self._values, self._values[-1])[::-1].copy()
        self._edges = np.append(edges[:n_bins], np.inf)

    def encode(self, actions: np.ndarray, terminate: np.ndarray | None = None) -> np.ndarray:
        """Assign each value to its bin.

        Args:
            actions (`np.ndarray` of shape `(..., T, action_dim)`): in [-1, 1]; clipped outside.
            terminate (`np.ndarray` of shape `(..., T)`, bool, *optional*): where the episode ends, for a tokenizer
                that says so; by default nowhere.

        Returns:
            `np.ndarray` of shape `(..., T * action_dim)`, or `(..., T * (1 + action_dim))` where it says so: ids in
            `[0, n_bins)`.

        Raises:
            ValueError: `actions` hold NaN or infinity, or have another shape, or `terminate` has.
        """
        actions = check_actions(actions, self.action_dim)
        values = np.clip(actions, -1.0, 1.0, dtype=np.float64)
        values = values.reshape(*actions.shape[:-2], actions.shape[-2] * self.action_dim)
        # Half a bin low, the guess is the bin or the one below it whatever the rounding; one comparison settles which.
        bins = ((values + 1.0) * (0.5 / self._half_bin) - 0.5).astype(np.int64)
        bins += values >= self._edges.take(bins + 1)
        bins = self.n_bins - 1 - bins if self.convention == "openvla" else bins
        if not self.terminate:
            return bins
        ends = np.zeros(actions.shape[:-1], bool) if terminate is None else np.asarray(terminate)
        if ends.shape != actions.shape[:-1] or ends.dtype != bool:
            raise ValueError(
                f"Expected terminate as bool of shape {actions.shape[:-1]}, got {ends.dtype} of shape {ends.shape}."
            )
        ids = np.concatenate([ends[..., None], bins.reshape(actions.shape)], axis=-1, dtype=np.int64)
        return ids.reshape(*bins.shape[:-1], actions.shape[-2] * len(self.blocks))

    def decode(self, ids: np.ndarray, horizon: int | None = None) -> np.ndarray:
        """Return the bin centres of ids as `encode` gives them, shape `(..., T, action_dim)`, float64.

        Raises:
            ValueError: no whole number of actions, not `horizon` of them, or an id outside `[0, n_bins)`.
        """
        return self._values.take(self._check_ids(ids, horizon)[..., int(self.terminate) :])

    def decode_terminate(self, ids: np.ndarray, horizon: int | None = None) -> np.ndarray:
        """Return after which actions the episode ends, shape `(..., T)`, bool.

        Raises:
            ValueError: see `decode`; or these ids do not say so.
        """
        if not self.terminate:
            raise ValueError("These action tokens do not say where an episode ends: that needs terminate=True.")
        return self._check_ids(ids, horizon)[..., 0] == 1

    def resolution(self) -> np.ndarray:
        """Return half a bin for each dimension, shape `(action_dim,)`."""
        return np.full(self.action_dim, self._half_bin)

    def to_dict(self) -> dict[str, Any]:
        """Return the options, JSON-safe."""
        return {
            "type": self.type,
            "action_dim": self.action_dim,
            "n_bins": self.n_bins,
            "convention": self.convention,
            "terminate": self.terminate,
        }
