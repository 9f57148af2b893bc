"""What every denoising network offers to the heads that train it and sample with it."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from hf_vla.actions.heads.networks.condition import Condition

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # in which times may be embedded


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
        """Denoise a chunk.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, T, action_dim)`): T up to `chunk_size`.
            context: one of `prepare`'s.

        Returns:
            `torch.Tensor` of the same shape.
        """


def check_options(what: str, kind: type, options: Collection[str]) -> None:
    """Raise where a class does not know an option.

    Args:
        what (`str`): the class in the reader's words.
        kind (`type`): its options, and those of its parents, are the keyword-only arguments.
        options: names given.

    Raises:
        ValueError: some are unknown; the text names them and what may have been meant.
    """
    parents = [inspect.signature(parent.__init__).parameters for parent in kind.__mro__[:-1]]
    known = sorted({name for names in parents for name, each in names.items() if each.kind is each.KEYWORD_ONLY})
    unknown = sorted(set(options) - set(known))
    if unknown:
        close = get_close_matches(unknown[0], known, n=1)
        hint = f" Did you mean {close[0]!r} for {unknown[0]!r}?" if close else ""
        raise ValueError(f"{what} has no option {', '.join(map(repr, unknown))}; known are {known}.{hint}")
