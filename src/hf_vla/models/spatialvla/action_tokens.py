"""What a SpatialVLA has to know of its action tokenizer, and where checkpoints keep it: with the processor."""

import json
from typing import Any

from transformers.utils.hub import cached_file

from hf_vla.actions.tokenizers.base import ActionTokenizer, FixedLengthTokenizer
from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer
from hf_vla.actions.tokenizers.registry import build_action_tokenizer

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def token_fields(tokenizer: ActionTokenizer) -> dict[str, Any]:
    """Fields of a [`SpatialVLAConfig`] that an action tokenizer decides."""
    sizes = ranges = None
    if isinstance(tokenizer, GaussianGridTokenizer):
        sizes = [stop - start for _, start, stop in tokenizer.blocks]
    elif isinstance(tokenizer, FixedLengthTokenizer):
        ranges = [[start, stop] for _, start, stop in tokenizer.blocks]
    else:
        ranges = []
    return {
        "spatial_token_num": tokenizer.vocab_size,
        "action_block_sizes": sizes,
        "action_token_ranges": ranges,
    }


def read_action_tokenizer(path, **options) -> tuple[ActionTokenizer, int] | None:
    """Read a checkpoint's action tokenizer and chunk size from its processor_config.json, published or ours.

    Args:
        path (`str` or `Path`): folder or Hub name.
        options: those of `from_pretrained`.

    Returns:
        `tuple[ActionTokenizer, int]`: None where there is no such file, or it holds no action tokenizer.
    """
    hub = {key: options[key] for key in _HUB_KWARGS if key in options}
    file = cached_file(path, "processor_config.json", _raise_exceptions_for_missing_entries=False, **hub)
    if file is None:
        return None
    with open(file, encoding="utf-8") as stream:
        processor = json.load(stream)
    actions = processor.get("action_config") or {}
    if "bin_policy" in processor:
        grid = GaussianGridTokenizer.from_published(actions, processor["bin_policy"])
        return grid, processor["action_chunk_size"]
    if actions.get("tokenizer") is not None:
        return build_action_tokenizer(actions["tokenizer"]), actions["chunk_size"]
    return None
