"""How predicted chunks become one action per control step.

Both classes work on decoded chunks in robot units, (..., chunk_size, action_dim), with any leading (environment) axes.

The receding horizon only selects, so it suits every kind of action. Ensembling averages component by component. That
is exact for joints, positions and delta positions, and good to second order for delta rotations of a control step,
which are small. Absolute rotations are not linear: Euler angles and axis-angle vectors jump by a full turn, q and -q
are one rotation. Convert those to rot6d before (`hf_vla.actions.rotations.convert`) and back after; the conversion
orthonormalises the average. A binary gripper comes out between its ends while the predictions disagree: threshold it.
"""

import math
from collections import deque

import numpy as np
from numpy.typing import ArrayLike

from hf_vla.actions.spec import whole_number
from hf_vla.actions.values import check_finite


class RecedingHorizon:
    """Executes the first `n_action_steps` of each chunk, then wants a new one.

    ```python
    if horizon.empty:
        horizon.push(predict_chunk(observation))
    action = horizon.pop()
    ```

    Args:
        n_action_steps (`int`): actions to execute per chunk, from 1 to the chunk size.

    Raises:
        ValueError: `n_action_steps` is not a positive integer.
    """

    def __init__(self, n_action_steps: int):
        self.n_action_steps = whole_number(n_action_steps, "n_action_steps")
        self._actions: deque[np.ndarray] = deque()

    @property
    def empty(self) -> bool:
        """Whether a new chunk is due."""
        return not self._actions

    def reset(self) -> None:
        """Forget the chunk; call it when an episode starts."""
        self._actions.clear()

    def push(self, chunk: ArrayLike) -> None:
        """Take a new chunk; actions of the one before that are still waiting are dropped.

        Args:
            chunk (`np.ndarray` of shape `(..., chunk_size, action_dim)`): robot units.

        Raises:
            ValueError: the chunk is shorter than `n_action_steps`, or holds NaN or infinity.
        """
        actions = _checked(chunk)
        if actions.shape[-2] < self.n_action_steps:
            raise ValueError(
                f"Expected chunks of at least n_action_steps={self.n_action_steps} actions, came {actions.shape[-2]}; "
                "lower n_action_steps."
            )
        self._actions = deque(actions[..., step, :].copy() for step in range(self.n_action_steps))

    def pop(self) -> np.ndarray:
        """Return the next action, shape (..., action_dim).

        Raises:
            ValueError: none is left.
        """
        if self.empty:
            raise ValueError("No action is left of this chunk; push a new one first (see `empty`).")
        return self._actions.popleft()


class TemporalEnsembler:
    """Averages all predictions made for the current step, one new chunk per step.

    The i-th oldest prediction (i = 0 the oldest) weighs exp(-coefficient * i), normalised. As the weight of a
    prediction is known when it arrives, running sums are enough: memory is one chunk, however long the episode.

    Args:
        coefficient (`float`): above 0 trusts older predictions more, 0 is the plain mean, below 0 newer ones.
        skip_zeros (`bool`): leave out predictions that are exactly 0 in every dimension. TinyVLA's evaluation does,
            because zeros mark the empty places of its buffer; for delta actions zero means "stay", so it is off here.

    Raises:
        ValueError: the coefficient is not finite.

    Source: ACT, https://huggingface.co/papers/2304.13705, algorithm 2; 0.01 is its and TinyVLA's value.
    """

    def __init__(self, coefficient: float = 0.01, skip_zeros: bool = False):
        if not isinstance(coefficient, (int, float)) or not math.isfinite(coefficient):
            raise ValueError(f"Expected a finite ensembling coefficient, came {coefficient!r}.")
        self.coefficient, self.skip_zeros = coefficient, skip_zeros
        self.reset()

    def reset(self) -> None:
        """Forget all predictions; call it when an episode starts."""
        # for this step and the next T - 1: sum of weighted predictions (T, ..., D), of weights and number (T, ..., 1)
        self._state: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def update(self, chunk: ArrayLike) -> np.ndarray:
        """Add the chunk predicted at this step and return this step's action.

        Args:
            chunk (`np.ndarray` of shape `(..., chunk_size, action_dim)`): robot units.

        Returns:
            `np.ndarray` of shape `(..., action_dim)`: robot units, float64 for float64 chunks, else float32.

        Raises:
            ValueError: the chunk's shape differs from the one before, or it holds NaN or infinity.
        """
        actions = _checked(chunk)
        predicted = np.moveaxis(actions, -2, 0)
        if self._state is None:
            weights, counts = np.zeros((2, *predicted.shape[:-1], 1))
            self._state = np.zeros(predicted.shape), weights, counts
        sums, weights, counts = self._state
        if predicted.shape != sums.shape:
            raise ValueError(
                f"Expected a chunk of shape {np.moveaxis(sums, 0, -2).shape} like the one before, came "
                f"{actions.shape}; call reset() between episodes."
            )
        taken = (predicted != 0).any(axis=-1, keepdims=True) | (not self.skip_zeros)
        # Below 0 the older ones fade instead of the newer ones growing: the same average, and no weight overflows.
        weight = taken * math.exp(-max(self.coefficient, 0.0)) ** counts
        fade = np.where(taken, math.exp(min(self.coefficient, 0.0)), 1.0)
        sums *= fade
        sums += weight * predicted
        weights *= fade
        weights += weight
        counts += taken
        action = sums[0] / np.where(weights[0] == 0, 1.0, weights[0])  # none taken: all were zero, and so is this
        for state in self._state:
            state[:-1] = state[1:]
            state[-1] = 0.0
        return action.astype(np.result_type(actions, np.float32), copy=False)


def _checked(chunk: ArrayLike) -> np.ndarray:
    actions = np.asarray(chunk)
    if actions.ndim < 2 or not actions.shape[-2]:
        raise ValueError(f"Expected a chunk of shape (..., chunk_size, action_dim), came {actions.shape}.")
    check_finite(actions, "chunk")
    return actions
