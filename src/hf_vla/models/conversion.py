"""Checkpoints of published implementations -> ours: what the families' `convert_` files share.

A `convert_` file has a function `translate(folder, statistics, cameras, dtype) -> Conversion`, which only reads;
[`convert_checkpoint`] writes.
"""

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file

INDEX = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Conversion:
    """A published checkpoint in our terms.

    Args:
        model (`PreTrainedModel`): without weights, on the meta device.
        weights (`dict[str, torch.Tensor]`): all of the model's, by its own names.
        processor (`ProcessorMixin`, *optional*): None where the source lacks files for it.
        dropped (`list[str]`): weights of the source that ours has no use for.
        notes (`list[str]`): what whoever converts must know.
    """

    model: Any
    weights: dict[str, torch.Tensor]
    processor: Any = None
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def convert_checkpoint(
    translate: Callable[..., Conversion],
    source: str | Path,
    destination: str | Path,
    statistics: str | Path | None = None,
    cameras: Sequence[str] = (),
    dtype: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write a published checkpoint as ours; where that fails, nothing stays behind.

    Args:
        translate (`Callable`): a family's `translate`.
        source (`str` or `Path`): folder, or name on the Hub.
        destination (`str` or `Path`): folder to write; must not hold anything.
        statistics (`str` or `Path`, *optional*): a `.json` or `.safetensors` file with the entries of the published
            `dataset_stats.pkl`, such as `action_min`.
        cameras (`Sequence[str]`): the names of several cameras, in the order in which their images enter the prompt.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; the source's by default.
        overwrite (`bool`): replace the checkpoint at `destination`.

    Returns:
        [`Conversion`]: what was written.

    Raises:
        ValueError: the source is not what it should be, `destination` holds files, an option is unknown.
        OSError: a file or folder is missing.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"Expected a dtype in {[*DTYPES]}, came {dtype!r}.")
    destination = Path(destination).resolve()
    _check_destination(destination, overwrite)
    entries = None if statistics is None else read_statistics(statistics)
    source = find_checkpoint(source)
    if source.resolve().is_relative_to(destination):
        raise ValueError(f"{destination} is the source, or holds it: choose another folder.")
    conversion = translate(source, entries, cameras, None if dtype is None else DTYPES[dtype])
    with _all_or_nothing(destination) as folder:
        weights = dict(conversion.weights)  # save_pretrained empties it
        conversion.model.save_pretrained(folder, state_dict=weights, max_shard_size="5GB")
        if conversion.processor is not None:
            conversion.processor.save_pretrained(folder)
    return conversion


def find_checkpoint(source: str | Path) -> Path:
    """Folder of a published checkpoint, downloaded where `source` is a name on the Hub.

    Raises:
        FileNotFoundError: there is no such folder, and it is no name on the Hub.
    """
    if Path(source).is_dir():
        return Path(source)
    if str(source).startswith((".", "/", "~")) or str(source).count("/") != 1:
        raise FileNotFoundError(f"{source}: no such folder, and no Hub name of the form owner/name either.")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors", "*.txt"]))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"Expected JSON in {path}, came something else: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a JSON object in {path}, came {type(content).__name__}.")
    return content


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read `model.safetensors`, or all shards that `model.safetensors.index.json` names.

    Raises:
        ValueError: there are no safetensors (pickled weights are never read), or a shard or one of its weights is
            missing.
    """
    if (folder / INDEX).is_file():
        places = read_json(folder / INDEX).get("weight_map", {})
        shards = sorted({Path(name).name for name in places.values()})
        if missing := [name for name in shards if not (folder / name).is_file()]:
            raise ValueError(f"{INDEX} in {folder} names {len(shards)} files, of which {missing} are missing.")
        weights = {key: tensor for name in shards for key, tensor in load_file(folder / name).items()}
        if absent := sorted(places.keys() - weights.keys()):
            raise ValueError(f"{INDEX} in {folder} names {len(absent)} weights that its files lack: {absent}.")
        return weights
    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    raise ValueError(
        f"Expected model.safetensors or {INDEX} in {folder}, came {sorted(path.name for path in folder.iterdir())}. "
        "Pickled weights (pytorch_model.bin) can run any code and are never read here: load them where you trust them "
        "with torch.load(..., weights_only=True) and write them with safetensors.torch.save_file. Adapters are to be "
        "merged into their base model first."
    )


def read_statistics(path: str | Path) -> dict[str, list[float]]:
    """Read the entries of a published `dataset_stats.pkl` from a `.json` or `.safetensors` file.

    Raises:
        ValueError: another kind of file (a pickle can run any code and is never read).
        OSError: there is no such file.
    """
    path = Path(path)
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix == ".safetensors":
        return {name: tensor.tolist() for name, tensor in load_file(path).items()}
    raise ValueError(
        f"Expected statistics in a .json or .safetensors file, came {path.name!r}. Pickles can run any code and are "
        "never read here: load yours where you trust it and write its arrays as lists into a JSON file."
    )


def rename(name: str, prefixes: Sequence[tuple[str, str]]) -> str:
    """Replace the first of the prefixes that a name has."""
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def match_weights(
    published: dict[str, torch.Tensor],
    prefixes: Sequence[tuple[str, str]],
    model: torch.nn.Module,
) -> dict[str, torch.Tensor]:
    """Give published weights our names; all of the model must be there, and nothing else.

    Args:
        published (`dict[str, torch.Tensor]`): by their own names.
        prefixes (`Sequence`): published prefix and ours; the first that fits counts.
        model (`nn.Module`): ours.

    Returns:
        `dict[str, torch.Tensor]`: by the model's names.

    Raises:
        ValueError: weights are missing, left over or have another shape; the text lists all of them by their published
            names.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = {rename(name, prefixes): tensor for name, tensor in published.items()}
    published_names = [(new, old) for old, new in prefixes]
    missing, left_over = (
        sorted(rename(name, published_names) for name in names)
        for names in (expected.keys() - weights.keys(), weights.keys() - expected.keys())
    )
    reshaped = [
        f"{rename(name, published_names)} {tuple(weights[name].shape)} instead of {shape}"
        for name, shape in sorted(expected.items())
        if name in weights and weights[name].shape != shape
    ]
    if missing or left_over or reshaped:
        raise ValueError(
            f"The source's weights do not fit its config.json. Missing: {missing}. Left over: {left_over}. "
            f"Of another shape: {reshaped}."
        )
    return weights


def expect(published: dict[str, Any], name: str, *expected: Any, place: str = "config.json") -> None:
    """Check a field of a published configuration.

    Raises:
        ValueError: it is none of those expected.
    """
    if published.get(name) not in expected:
        raise ValueError(
            f"Expected {name} {' or '.join(map(repr, expected))} in {place}, came {published.get(name)!r}: "
            "this converter knows no other."
        )


def build_config(config_class: Callable[..., Any], **options) -> Any:
    """Build a family's configuration from what a published one says.

    Raises:
        ValueError: an option has another type than it should have, or another value.
    """
    try:
        return config_class(**options)
    except StrictDataclassError as error:
        raise ValueError(f"Expected usual types and values in config.json, came another. {error}") from error


def fields(published: dict[str, Any], names: Sequence[str], place: str = "config.json") -> dict[str, Any]:
    """Take fields of a published configuration.

    Raises:
        ValueError: some are missing.
    """
    if missing := [name for name in names if name not in published]:
        raise ValueError(f"Expected {missing} in {place}; they are missing, and nothing else tells them.")
    return {name: published[name] for name in names}


def section(published: dict[str, Any], name: str, place: str = "config.json") -> dict[str, Any]:
    """Take a field of a published configuration that holds fields itself.

    Raises:
        ValueError: it is missing, or holds none.
    """
    value = fields(published, [name], place)[name]
    if not isinstance(value, dict):
        raise ValueError(f"Expected {name} in {place} to hold fields of its own, came {value!r}.")
    return value


def split_unused(
    weights: dict[str, torch.Tensor], patterns: Sequence[str]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Part the weights that ours has no use for from the others.

    Args:
        weights (`dict[str, torch.Tensor]`): of the source.
        patterns (`Sequence[str]`): regular expressions of whole names.

    Returns:
        `tuple`: the others, and the sorted names of those without use.
    """
    unused = sorted(name for name in weights if any(re.fullmatch(pattern, name) for pattern in patterns))
    return {name: tensor for name, tensor in weights.items() if name not in unused}, unused


def one_dtype(weights: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Cast weights to a precision; by default to none, if all have the same.

    Raises:
        ValueError: no precision was chosen and they have several.
    """
    found = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if dtype is None and len(found) > 1:
        names = sorted(str(kind).removeprefix("torch.") for kind in found)
        raise ValueError(f"The source's weights are a mixture of {names}; choose one of {[*DTYPES]} as dtype.")
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def _check_destination(destination, overwrite):
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{destination} is there already: choose another folder, or overwrite it with --overwrite.")
    if not (destination / "config.json").is_file():
        raise ValueError(f"{destination} is no checkpoint (it has no config.json), so it is not overwritten.")


@contextmanager
def _all_or_nothing(destination):
    """A new folder beside the destination, which takes its place only when everything in it is written."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}-", dir=destination.parent) as workplace:
        folder = Path(workplace, "new")
        folder.mkdir()
        yield folder
        if destination.exists():
            destination.rename(Path(workplace, "old"))
        folder.rename(destination)
