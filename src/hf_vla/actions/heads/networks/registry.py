"""Every denoising network by name."""

from typing import Any

from hf_vla.actions.heads.networks.base import Denoiser
from hf_vla.actions.heads.networks.conditional_unet1d import ConditionalUnet1D
from hf_vla.actions.heads.networks.dit import DiT

DENOISERS = {"conditional_unet1d": ConditionalUnet1D, "dit": DiT}


def build_denoiser(config: dict[str, Any], action_dim: int, chunk_size: int, cond_dim: int) -> Denoiser:
    """Build a denoiser from `{"type": ..., **options}`.

    Raises:
        ValueError: the type or an option is unknown, or an option's value is not valid.
    """
    options = dict(config)
    name = options.pop("type", None)
    if name not in DENOISERS:
        raise ValueError(f"No denoiser {name!r}; there are {sorted(DENOISERS)}.")
    try:
        return DENOISERS[name](action_dim, chunk_size, cond_dim, **options)
    except TypeError as error:
        raise ValueError(f"Denoiser {name!r}: {error}") from error
