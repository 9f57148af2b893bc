"""What the published code of TinyVLA and DiVLA has in common: the UNet head, `dataset_stats.pkl`, tokenizers.

What does not depend on them is in `hf_vla.models.conversion`.
"""

from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from hf_vla.actions.normalization import TINYVLA_MARGIN
from hf_vla.actions.spec import CameraSpec
from hf_vla.models.conversion import Conversion, fields
from hf_vla.models.processing import DEFAULT_CAMERAS

NORMALIZATION = {"mode": "min_max", "clip": False, "convention": "tinyvla"}
STATE_NORMALIZATION = {"mode": "mean_std", "clip": False, "convention": "tinyvla"}
NO_STATISTICS = (
    "The processor has no statistics, so that it can neither normalise states nor decode actions: convert again with "
    "--statistics, a JSON file with action_min, action_max, qpos_mean and qpos_std of the published dataset_stats.pkl."
)
NO_CAMERAS = (
    "The processor takes one image. If the checkpoint has several cameras, name them: --camera left --camera right."
)


def shape_of(weights: dict[str, torch.Tensor], name: str) -> torch.Size:
    """Shape of a weight of the action head.

    Raises:
        ValueError: there is no such weight.
    """
    if name not in weights:
        raise ValueError(f"Expected the diffusion head's weight {name} in the source; it is missing.")
    return weights[name].shape


def unet_head(weights: dict[str, torch.Tensor], prefix: str) -> tuple[dict[str, Any], int, int]:
    """Read the sizes of the published UNet head off its weights.

    Args:
        weights (`dict[str, torch.Tensor]`): of the source.
        prefix (`str`): of the head's names.

    Returns:
        `tuple`: `head_config`, action_dim and state_dim.

    Raises:
        ValueError: weights of the head are missing.
    """
    levels = takewhile(
        lambda name: name in weights, (f"{prefix}down_modules.{level}.0.blocks.0.block.0.weight" for level in count())
    )
    feature_dim, joined_dim = shape_of(weights, f"{prefix}combine.weight")
    denoiser = {
        "type": "conditional_unet1d",
        "down_dims": [weights[name].shape[0] for name in levels],
        "diffusion_step_embed_dim": shape_of(weights, f"{prefix}diffusion_step_encoder.1.weight")[1],
        "kernel_size": shape_of(weights, f"{prefix}final_conv.0.block.0.weight")[2],
        "timestep_embedding_dtype": "bfloat16",
    }
    action_dim = shape_of(weights, f"{prefix}final_conv.1.weight")[0]
    return {"type": "diffusion", "denoiser": denoiser}, action_dim, joined_dim - feature_dim


def check_sizes(published: dict[str, Any], sizes: dict[str, int], place: str = "config.json") -> None:
    """Check that a published configuration says of the head what its weights say, if it says anything.

    Raises:
        ValueError: it says something else.
    """
    for name, value in sizes.items():
        if published.get(name, value) != value:
            raise ValueError(f"{place} says {name} {published[name]}, the weights say {value}.")


def source_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast | None:
    """The source's tokenizer, or None.

    Raises:
        ValueError: it cannot be read, or has more tokens than the embedding.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # KeyError, TypeError, and of the library in Rust nothing more special than Exception
        raise ValueError(
            f"Expected a tokenizer in {folder / 'tokenizer.json'} and the files beside it, came something else "
            f"({type(error).__name__}: {error}): copy that of the source's base model."
        ) from error
    if len(tokenizer) > vocab_size:
        raise ValueError(f"The source's tokenizer has {len(tokenizer)} tokens, its config.json only {vocab_size}.")
    return tokenizer


def add_processor(
    conversion: Conversion,
    processor_class: Any,
    parts: Any,
    *,
    statistics: dict[str, list[float]] | None,
    cameras: Sequence[str],
    unnorm_key: str,
    specs: dict[str, Any] | None,
    camera_size: tuple[int, int],
    prompt_config: dict[str, Any] | None = None,
) -> None:
    """Build a model's processor, with the published normalisation, and say what it lacks.

    Args:
        conversion ([`Conversion`]): changed in place.
        processor_class (`type`): of the family.
        parts: with an `image_processor` and a `tokenizer`.
        statistics (`dict`, *optional*): entries of the published `dataset_stats.pkl`.
        cameras (`Sequence[str]`): names in the order of the prompt; none for a single one without a name.
        unnorm_key (`str`): what to call the dataset.
        specs (`dict`, *optional*): of its actions and states, where they are known.
        camera_size (`tuple[int, int]`): width and height of the published training images.
        prompt_config (`dict`, *optional*): entries that replace those known for the backbone.

    Raises:
        ValueError: the statistics do not fit the model.
    """
    config = conversion.model.config
    action_config = {
        "chunk_size": config.chunk_size,
        "normalization": NORMALIZATION,
        "state_normalization": STATE_NORMALIZATION,
    }
    if statistics is not None and specs is not None:
        action_config["specs"] = {unnorm_key: specs}
    conversion.processor = processor_class.from_backbone(
        parts,
        config,
        None if statistics is None else {unnorm_key: published_statistics(statistics)},
        action_config,
        {DEFAULT_CAMERAS: [CameraSpec(name, *camera_size).to_dict() for name in cameras]} if cameras else None,
        prompt_config,
    )
    conversion.notes += [note for note, told in ((NO_STATISTICS, statistics), (NO_CAMERAS, cameras)) if not told]


def no_processor(conversion: Conversion, note: str, statistics: Any, cameras: Sequence[str]) -> None:
    """Say that there is no processor.

    Raises:
        ValueError: there are statistics or cameras, which only a processor keeps.
    """
    if statistics or cameras:
        raise ValueError(f"Statistics and cameras are kept by the processor. {note}")
    conversion.notes.append(note)


def published_statistics(published: dict[str, list[float]]) -> dict[str, dict[str, list[float]]]:
    """Statistics of actions and states, from the entries of a published `dataset_stats.pkl`.

    Raises:
        ValueError: an entry is missing.
    """
    entries = fields(published, ["action_min", "action_max", "qpos_mean", "qpos_std"], "the statistics")
    # The published file holds the margin already, which our normalisation adds; a constant dimension has nothing else.
    low, high = np.asarray(entries["action_min"]) + TINYVLA_MARGIN, np.asarray(entries["action_max"]) - TINYVLA_MARGIN
    return {
        "action": {"min": np.minimum(low, high).tolist(), "max": np.maximum(low, high).tolist()},
        "state": {"mean": entries["qpos_mean"], "std": entries["qpos_std"]},
    }
