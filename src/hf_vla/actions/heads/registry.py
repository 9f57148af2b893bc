"""Every action head by name."""

from typing import Any

from hf_vla.actions.heads.base import ActionHead
from hf_vla.actions.heads.classification import ClassificationHead
from hf_vla.actions.heads.diffusion import DiffusionHead
from hf_vla.actions.heads.flow_matching import FlowMatchingHead
from hf_vla.actions.heads.networks.base import check_options
from hf_vla.actions.heads.regression import RegressionHead

ACTION_HEADS = {
    "diffusion": DiffusionHead,
    "flow_matching": FlowMatchingHead,
    "regression": RegressionHead,
    "classification": ClassificationHead,
}


def build_action_head(
    config: dict[str, Any], feature_dim: int, action_dim: int, chunk_size: int, state_dim: int | None = None
) -> ActionHead:
    """Build a head from `{"type": ..., **options}`.

    Args:
        config (`dict`): type and options.
        feature_dim, action_dim, chunk_size, state_dim: see [`~hf_vla.actions.heads.base.ActionHead`].

    Returns:
        The head.

    Raises:
        ValueError: the type or an option is unknown, or an option's value is not valid.
    """
    options = dict(config)
    name = options.pop("type", None)
    if name not in ACTION_HEADS:
        raise ValueError(f"No action head {name!r}; there are {sorted(ACTION_HEADS)}.")
    check_options(f"Action head {name!r}", ACTION_HEADS[name], options)
    return ACTION_HEADS[name](feature_dim, action_dim, chunk_size, state_dim, **options)
