"""Checkpoints that load without this library: its code, for transformers' `trust_remote_code=True`, goes with them."""

import json
from pathlib import Path

from hf_vla.models.auto import FAMILIES
from hf_vla.models.conversion import read_json
from hf_vla.models.remote_code import auto_map, replace_file, write_code

_FILES = ("processor_config.json", "config.json")  # where transformers looks for an auto_map


def export_remote_code(folder: str | Path) -> list[Path]:
    """Write a family's code into a checkpoint, and say in its configuration files that it is there.

    `AutoModel.from_pretrained(checkpoint, trust_remote_code=True)`, and AutoProcessor likewise, then need no hf_vla;
    where it is imported, its own classes load the checkpoint as before. The code stays with the checkpoint when it is
    loaded and saved, one way or the other. An earlier export is replaced. Others' Python files are left alone, but an
    `auto_map` that names them is replaced.

    Args:
        folder (`str` or `Path`): of the checkpoint: a whole model, or an adapter with its config.json. A processor
            that lies there is included.

    Returns:
        `list[Path]`: the files that were written, whole at any moment; the configurations are the last ones.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: the model is none of our families, or the folder has others' files of the names that ours take.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"Expected the folder of a checkpoint, got {str(folder)!r}, which has no config.json.")
    configs = {name: read_json(folder / name) for name in _FILES if (folder / name).is_file()}
    model_type = configs["config.json"].get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"Expected a model of the families {sorted(FAMILIES)}, got {model_type!r} in {folder}.")
    written = write_code(folder, model_type)
    for name, config in configs.items():
        config["auto_map"] = auto_map(model_type)
        written.append(replace_file(folder / name, json.dumps(config, indent=2) + "\n"))
    return written
