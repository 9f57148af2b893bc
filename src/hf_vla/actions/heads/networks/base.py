"""What every denoising network offers to the heads that train it and sample with it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_vla.actions.heads.networks.condition import Condition


class Denoiser(nn.Module, ABC):
    """A noisy chunk, a time and a condition in; noise, clean chunk or velocity out, as its head has trained it.

    Built with `(action_dim, chunk_size, cond_dim, **options)`. What does not depend on the noisy chunk is computed by
    `prepare`, once for all steps of a sampling, and handed to every call.
    """

    @abstractmethod
    def prepare(self, condition: Condition, times: torch.Tensor) -> Sequence[Any]:
        """Project condition and times.

        Args:
            condition ([`~hf_vla.actions.heads.networks.condition.Condition`]): of `batch_size` samples.
            times (`torch.Tensor` of shape `(num_steps, batch_size)` or `(num_steps, 1)`): in diffusion steps, 0 to
                about 1000, float32 or int64.

        Returns:
            `Sequence` of `num_steps` contexts, each for one call of `forward`.
        """

    @abstractmethod
    def forward(self, sample: torch.Tensor, context: Any) -> torch.Tensor:
        """Denoise `(batch_size, T, action_dim)`, any T, into the same shape."""
