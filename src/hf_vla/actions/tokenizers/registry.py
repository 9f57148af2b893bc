"""Every action tokenizer by its name in a checkpoint's `processor_config.json`."""

import difflib
from typing import Any

from hf_vla.actions.tokenizers.base import ActionTokenizer
from hf_vla.actions.tokenizers.fast import FastTokenizer
from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer
from hf_vla.actions.tokenizers.uniform import UniformTokenizer

ACTION_TOKENIZERS: dict[str, type[ActionTokenizer]] = {
    "uniform": UniformTokenizer,
    "gaussian_grid": GaussianGridTokenizer,
    "fast": FastTokenizer,
}


def build_action_tokenizer(config: dict[str, Any]) -> ActionTokenizer:
    """Build the tokenizer that `config["type"]` names from the other options.

    Raises:
        ValueError: an unknown type, an unknown option or a missing one (the text lists the known ones), or no
            dictionary.
    """
    if not isinstance(config, dict):
        raise ValueError(f"Expected an action tokenizer as a dictionary like {{'type': 'uniform'}}, came {config!r}.")
    name = config.get("type")
    if name not in ACTION_TOKENIZERS:
        close = difflib.get_close_matches(str(name), ACTION_TOKENIZERS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown action tokenizer {name!r}; known types: {sorted(ACTION_TOKENIZERS)}.{hint}")
    return ACTION_TOKENIZERS[name].from_dict(config)
