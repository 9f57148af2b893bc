"""What a checkpoint says of itself, for its model card. What it does not say is None here: nothing is guessed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import safe_open
from transformers import AutoConfig, AutoModel

from hf_vla.actions.codec import ActionCodec
from hf_vla.actions.heads.networks.registry import DENOISERS
from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer
from hf_vla.hub.latency import read_latency
from hf_vla.models.auto import FAMILIES
from hf_vla.models.base import BASE, base_of_adapter, check_folder, recorded_base
from hf_vla.models.checkpoint_files import published_files
from hf_vla.models.conversion import read_json
from hf_vla.models.loading import load_processor
from hf_vla.training.summary import is_hub_name, read_summary

RANGES = ("min", "q01", "q99", "max")
ADAPTER = "adapter_config.json"
FINE_TUNED = ("path", "backbone")  # of what a training begins with: what the whole model was, not one of its parts


def checkpoint_facts(folder: str | Path) -> dict[str, Any]:
    """Read what a model card tells from the files of a checkpoint; its weights are not loaded.

    Args:
        folder (`str` or `Path`): a checkpoint of this library, or adapters that a training saved.

    Returns:
        `dict`: see the templates in `model_cards/`, which read it.

    Raises:
        FileNotFoundError: this is no folder of a checkpoint.
        ValueError: it is of no family of this library, or was saved without its processor.
    """
    folder = Path(folder)
    check_folder(folder, str(folder))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; a card is made of a checkpoint on this computer.")
    base = base_of_adapter(folder)
    config = AutoConfig.from_pretrained(folder if (folder / "config.json").is_file() else base)
    if config.model_type not in FAMILIES:
        raise ValueError(f"Expected a checkpoint of {sorted(FAMILIES)}, came model_type {config.model_type!r}.")
    processor = load_processor(folder)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    codec, training = processor.action_codec, read_summary(folder)
    head = _head_facts(config.to_dict().get("head_config"), getattr(model, "action_head", None))
    rounding = _rounding(codec, head, getattr(config, "latent_dim", None))
    datasets = [_dataset_facts(processor, key, rounding) for key in codec.keys]
    trained = [each for each in datasets if training is not None and each["key"] in training["datasets"]]
    counts = {name: [each[name] for each in trained] for name in ("episodes", "steps")}
    return {
        "family": config.model_type,
        "title": type(model).__name__.partition("For")[0],
        "config": config.to_dict(),
        "parameters": sum(each.numel() for each in model.parameters()),
        "parts": {
            name: count
            for name, part in model.named_children()
            if (count := sum(each.numel() for each in part.parameters()))
        },
        "stored": _stored(folder),
        "adapter": _adapter_facts(folder, base),
        "training": training,
        "base_models": base_models(folder, training),
        "hub_datasets": _on_hub(training and training["datasets"].values()),
        "chunk_size": codec.chunk_size,
        "n_obs_steps": codec.n_obs_steps,
        "takes_state": codec.takes_state,
        "normalization": (processor.action_config or {}).get("normalization"),
        "state_normalization": (processor.action_config or {}).get("state_normalization"),
        "tokenizer": codec.tokenizer and _tokenizer_facts(codec),
        "head": head,
        "rounds": rounding is not None,
        "datasets": datasets,
        **{f"num_{name}": None if None in each else sum(each) for name, each in counts.items()},
        "latency": read_latency(folder),
    }


def base_models(folder: Path, training: dict[str, Any] | None) -> list[str]:
    """Names on the Hub of what a checkpoint was made from.

    Args:
        folder (`Path`): the checkpoint's.
        training (`dict`, *optional*): see [`~hf_vla.training.summary.training_summary`].

    Returns:
        `list[str]`: none of which is a folder of some computer.
    """
    if training is not None:
        started = training["started_from"]
        return _on_hub(started[name] for name in FINE_TUNED if name in started)
    if not (folder / ADAPTER).is_file():
        return []
    if (folder / BASE).is_dir():
        return []
    name = recorded_base(folder / ADAPTER)
    return [name] if known_on_hub(name) else []


def known_on_hub(name: str) -> bool:
    """Whether a name is that of a model on the Hub: one that was loaded from there before, or that the Hub knows."""
    if not is_hub_name(name) or Path(name).exists():
        return False
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return True
    try:
        HfApi().model_info(name, timeout=10)
    except Exception:  # nobody of that name, or whatever keeps a computer from the Hub
        return False
    return True


def _on_hub(sources: Iterable[dict] | None) -> list[str]:
    return sorted({each["name"] for each in sources or () if each["on_hub"]})


def _stored(folder):
    """Bytes of the weights in the folder, and the types of their numbers."""
    files = [folder / name for name in published_files(folder)[0] if name.endswith(".safetensors")]
    types = set()
    for path in files:
        with safe_open(path, "pt") as weights:
            types |= {str(weights.get_slice(name).get_dtype()) for name in weights.keys()}  # noqa: SIM118
    return {"bytes": sum(path.stat().st_size for path in files), "types": sorted(types)}


def _adapter_facts(folder, base):
    if base is None:
        return None
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        sizes = {name: int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys()}  # noqa: SIM118
    added = sum(size for name, size in sizes.items() if "lora_" in name)
    config = read_json(folder / ADAPTER)
    return {
        "parameters": added,
        "retrained": sum(sizes.values()) - added,  # peft's modules_to_save
        "type": config.get("peft_type"),
        "rank": config.get("r"),
    }


def _tokenizer_facts(codec: ActionCodec):
    options = codec.tokenizer.to_dict()
    bins = options.get("num_bins", options.get("n_bins"))
    return {
        "type": options["type"],
        "vocab_size": codec.tokenizer.vocab_size,
        "bins": " x ".join(map(str, bins)) if isinstance(bins, (list, tuple)) else bins,
    }


def _head_facts(options, head):
    """Kind of a head, its denoiser, its steps and its bins, as the network that is built has them."""
    if options is None:
        return None
    denoiser = getattr(head, "denoiser", None)
    names = {kind: name for name, kind in DENOISERS.items()}
    return {
        "type": options["type"],
        "denoiser": names.get(type(denoiser)),
        "steps": getattr(head, "num_inference_steps", None),
        "bins": getattr(head, "num_bins", None),
        "decoding": getattr(head, "decoding", None),
        "samples": denoiser is not None or getattr(head, "decoding", None) == "sample",
    }


def _rounding(codec, head, latent_dim):
    """Worst error of each dimension that comes of tokens or bins, normalised; None where nothing is rounded."""
    if codec.tokenizer is not None:
        return codec.tokenizer.resolution()
    bins = head and head["decoding"] != "expectation" and latent_dim is None and head["bins"]
    return np.full(codec.action_dim, 1 / bins) if bins else None


def _dataset_facts(processor, key, rounding):
    codec = processor.action_codec
    action, state = codec.specs(key)
    statistics = codec.statistics[key]
    return {
        "key": key,
        "episodes": statistics.get("num_trajectories"),
        "steps": statistics.get("num_transitions"),
        "action": action,
        "state": state,
        "state_dim": codec.state_normalizer(key).action_dim if codec.takes_state else None,
        "cameras": processor.camera_specs(key),
        "dimensions": _dimensions(codec, key, action, rounding),
    }


def _dimensions(codec, key, spec, rounding):
    """A row of each dimension of the actions: name, recorded range, and the worst rounding, robot units."""
    normalizer, statistics = codec.normalizer(key), codec.statistics[key]["action"]
    worst = [None] * normalizer.action_dim
    if rounding is not None:
        own = rounding[: normalizer.action_dim]
        worst = np.abs(normalizer.unnormalize(own) - normalizer.unnormalize(np.zeros_like(own))).tolist()
    names = [f"[{place}]" for place in range(normalizer.action_dim)] if spec is None else spec.names
    return [
        {
            "name": name,
            **{end: statistics[end][place] if statistics.get(end) is not None else None for end in RANGES},
            "constant": bool(normalizer.constant[place]),
            "rounding": worst[place],
            "binary": isinstance(codec.tokenizer, GaussianGridTokenizer) and place == normalizer.action_dim - 1,
        }
        for place, name in enumerate(names)
    ]
