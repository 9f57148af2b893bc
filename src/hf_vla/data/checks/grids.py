"""Every action representation fitted to what a scan of a dataset found."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_vla.actions.normalization import ActionNormalizer
from hf_vla.actions.tokenizers.base import ActionTokenizer
from hf_vla.actions.tokenizers.fast import FastTokenizer
from hf_vla.actions.tokenizers.gaussian_grid import NUM_BINS, GaussianGridTokenizer
from hf_vla.actions.tokenizers.registry import ACTION_TOKENIZERS
from hf_vla.actions.tokenizers.uniform import UniformTokenizer
from hf_vla.data import schema
from hf_vla.data.checks.scan import DatasetScan

FAST_IDS = 1024  # as published
_BINS = {4: NUM_BINS[:3], 7: NUM_BINS}  # dimensions -> the grid's
_LAYOUT = "the grid bins an end effector's translation, rotation and gripper (7), or translation and gripper (4)"


def fit_tokenizers(scan: DatasetScan, end_effector: bool = False) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Fit every representation to a dataset's actions, normalised by their own statistics as SpatialVLA does.

    All dimensions go from q01..q99 to [-1, 1]; the adaptive grid has the gripper, its last one, in [0, 1].

    Args:
        scan ([`~hf_vla.data.checks.scan.DatasetScan`]): of the dataset; its sample of rows and windows is what is
            fitted to.
        end_effector (`bool`): whether the actions are an end effector's translation, rotation (or none) and gripper,
            in this order, as the adaptive grid needs them, though their names do not say so.

    Returns:
        `tuple`: of two dictionaries by the representation's name. What it needs of an `action_config`,
        `{"normalization": ..., "tokenizer": ...}`; and, for those that do not fit these actions, why.
    """
    fitted, refused = {}, {}
    column = scan.columns.get(schema.ACTION)
    if column is None or not column.statistics.count:
        reason = f"there are no rows of {schema.ACTION!r}"
        return {}, dict.fromkeys(ACTION_TOKENIZERS, reason)
    for name in ACTION_TOKENIZERS:
        modes = ["quantile"] * len(column.names)
        if name == GaussianGridTokenizer.type:
            modes[-1] = "zero_one"
        normalization = {"mode": modes, "clip": True, "convention": "spatialvla"}
        normalizer = ActionNormalizer(column.statistics.summary(), **normalization)
        try:
            tokenizer = _fit(name, scan, normalizer, end_effector)
        except ValueError as error:
            refused[name] = str(error)
        else:
            fitted[name] = {"normalization": normalization, "tokenizer": tokenizer.to_dict()}
    return fitted, refused


def _fit(name: str, scan: DatasetScan, normalizer: ActionNormalizer, end_effector: bool) -> ActionTokenizer:
    """Return the tokenizer; a ValueError says why there can be none."""
    size = normalizer.action_dim
    if name == UniformTokenizer.type:
        return UniformTokenizer(size)
    if name == GaussianGridTokenizer.type:
        names = scan.columns[schema.ACTION].names
        if size not in _BINS:
            raise ValueError(f"{_LAYOUT}; these actions have {size}")
        if not end_effector and not _named_like_end_effector(names):
            raise ValueError(f"{_LAYOUT}; if {list(names)} are these, in this order, say so (--end-effector)")
        sample = normalizer.normalize(scan.columns[schema.ACTION].sample.entries())
        return GaussianGridTokenizer.fit(sample, _BINS[size])
    if name == FastTokenizer.type:
        windows, length = scan.windows.entries(), scan.plan.chunk_size
        if windows is None:
            raise ValueError(f"it is fitted to {length} consecutive actions, and no episode has as many")
        return FastTokenizer.fit(np.ascontiguousarray(normalizer.normalize(windows)), FAST_IDS)
    raise ValueError("nobody wrote down how it is fitted to rows")


def _named_like_end_effector(names: Sequence[str]) -> bool:
    """Whether the first three are called x, y, z (dx, delta_x, x.vel, pos_x...) and the last one alone a gripper."""
    axes = [re.findall(r"(?<![a-z])(?:d|delta)?([xyz])(?![a-z])", name.lower()) for name in names[:3]]
    is_gripper = ["grip" in name.lower() for name in names]
    return axes == [["x"], ["y"], ["z"]] and is_gripper == [False] * (len(names) - 1) + [True]
