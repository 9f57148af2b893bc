"""Every denoising network by name."""

from typing import Any

from hf_vla.actions.heads.networks.base import Denoiser, check_options
from hf_vla.actions.heads.networks.conditional_unet1d import ConditionalUnet1D
from hf_vla.actions.heads.networks.dit import DiT

DENOISERS = {"conditional_unet1d": ConditionalUnet1D, "dit": DiT}


def build_denoiser(config: dict[str, Any], action_dim: int, chunk_size: int, cond_dim: int) -> Denoiser:
    """Build a denoiser from `{"type": ..., **options}`.

    Args:
        config (`dict`): type and options.
        action_dim (`int`): numbers of one action.
        chunk_size (`int`): actions of one chunk.
        cond_dim (`int`): size of the condition's vector and tokens.

    Returns:
        The denoiser.

    Raises:
        ValueError: the type or an option is unknown, or an option's value is not valid.
    """
    options = dict(config)
    name = options.pop("type", None)
    if name not in DENOISERS:
        raise ValueError(f"No denoiser {name!r}; there are {sorted(DENOISERS)}.")
    check_options(f"Denoiser {name!r}", DENOISERS[name], options)
    return DENOISERS[name](action_dim, chunk_size, cond_dim, **options)
