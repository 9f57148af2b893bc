"""A training recipe: a YAML file with the sections model, data and training, and dotted overrides."""

import argparse
import re
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.dataclasses import type_validator
from transformers import TrainingArguments

from hf_vla.training.arguments import ModelArguments, VLATrainingArguments
from hf_vla.training.data_arguments import DataArguments

RENAMED = {"full_learning_rate": "training.learning_rates: {head: ...}"}


@dataclass
class Recipe:
    """A whole training run."""

    model: ModelArguments
    data: DataArguments
    training: VLATrainingArguments

    def __post_init__(self):
        deepspeed = getattr(self.training, "deepspeed_plugin", None)
        if self.training.learning_rates and deepspeed and "optimizer" in deepspeed.deepspeed_config:
            raise ValueError(
                "DeepSpeed's own optimizer knows one learning rate: to use training.learning_rates, leave DeepSpeed's "
                "section optimizer out."
            )
        if self.model.dtype == "bfloat16" and (self.model.lora is None or not self.training.bf16):
            raise ValueError(
                "Weights of bfloat16 round the steps of a training away: leave model.dtype float32, and set "
                "training.bf16: true to compute in bfloat16. With both, model.lora trains float32 adapters on a "
                "bfloat16 model."
            )


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        path (`str` or `Path`): a YAML file.
        overrides (`dict`, *optional*): dotted name -> value, for example `{"training.max_steps": 20}`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a name is unknown or missing, or a value has the wrong type.
    """
    values = _parse(Path(path).read_text(encoding="utf-8"), str(path)) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected the sections model, data and training, came {values!r:.80}.")
    for name, value in (overrides or {}).items():
        *sections, last = name.split(".")
        section = values
        for part in sections:
            place = _place(section, part, name)
            if isinstance(section, dict) and section.get(place) is None:
                section[place] = {}
            section = section[place]
            if not isinstance(section, (dict, list)):
                raise ValueError(f"{name}: {part!r} is a value, not a section with names in it.")
        section[_place(section, last, name)] = value
    return _build(Recipe, values, "")


def parse_recipe(arguments: Sequence[str]) -> Recipe:
    """Read a recipe as the command line names it: `--config FILE --training.max_steps 20 --data.chunk_size=8`."""
    sections = get_type_hints(Recipe).items()
    parser = argparse.ArgumentParser(
        prog="hf-vla train",
        description="Train a VLA from a recipe, a YAML file. Each of its values can be overridden: "
        "--section.name VALUE, such as --training.max_steps 20 or --data.cameras.0.fovy 60.",
        epilog="\n\n".join(text for name, cls in sections for text in _described(name, cls, set())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="recipe in YAML, see scripts/recipes")
    known, rest = parser.parse_known_args(arguments)
    overrides = {}
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or "." not in name:
            parser.error(f"expected --section.name VALUE, came {name!r}")
        if not equals:
            if not rest:
                parser.error(f"{name} has no value")
            value = rest.pop(0)
        overrides[name[2:]] = _parse(value, name)
    return load_recipe(known.config, overrides)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 5e-4 for a text and `no` for false; a recipe means a number and a word, as in YAML 1.2."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(text, where):
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{where} is no YAML{place}: {getattr(error, 'problem', None) or error}.") from error


def _described(section: str, cls, seen: set[type]) -> list[str]:
    """What the docstrings of a section, and of those in it, say of each name, for `--help`; each section once."""
    seen.add(cls)
    lines = [f"{section}: {_plain(cls.__doc__.splitlines()[0])}"]
    names = r"^ {8}(\w[\w, ]*) \((.*?)\): (.*?)(?=^ {8}\w|^ *$|\Z)"
    for name, kind, text in re.findall(names, cls.__doc__, re.M | re.S):
        lines.append(f"  --{section}.{name}  {_plain(kind)}")
        lines.append(textwrap.fill(_plain(text), 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    if issubclass(cls, TrainingArguments):  # transformers documents its own
        return ["\n".join(lines)]
    parts = ["\n".join(lines)]
    for name, hint in get_type_hints(cls).items():
        inner = next((kind for kind in get_args(hint) or (hint,) if is_dataclass(kind) and kind not in seen), None)
        if inner is not None:
            parts += _described(f"{section}.{name}" + ".0" * (get_origin(hint) is list), inner, seen)
    return parts


def _plain(text: str) -> str:
    return re.sub(r"\[?`~?([^`]*)`\]?", r"\1", " ".join(text.split())).replace("*", "")


def _place(section, part, name):
    """Key of a section, or index of a list: `data.cameras.0.fovy`."""
    if isinstance(section, dict):
        return part
    if not part.isdigit() or int(part) >= len(section):
        raise ValueError(f"{name}: expected a place from 0 to {len(section) - 1} in the list, came {part!r}.")
    return int(part)


def _build(cls, values, where):
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'The recipe'}: expected names with values, came {values!r}.")
    prefix = f"{where}." if where else ""
    known = [item for item in fields(cls) if item.init]
    names = [item.name for item in known]
    for name in values:
        if name not in names:
            if name in RENAMED:
                raise ValueError(f"{prefix}{name} is no longer in use: write {RENAMED[name]} instead.")
            close = get_close_matches(str(name), names, n=1)
            hint = f" Did you mean {prefix}{close[0]}?" if close else f" There are {names}."
            raise ValueError(f"Unknown name {prefix}{name} in the recipe.{hint}")
    for item in known:
        if item.default is MISSING and item.default_factory is MISSING and item.name not in values:
            raise ValueError(f"The recipe lacks {prefix}{item.name}.")
    hints = get_type_hints(cls)
    return cls(**{name: _value(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _value(hint, value, name):
    kinds = get_args(hint) or (hint,)
    section = next((kind for kind in kinds if is_dataclass(kind)), None)
    if section is not None and get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{name}: expected a list, came {value!r}.")
        return [_build(section, item, f"{name}.{place}") for place, item in enumerate(value)]
    if section is not None and value is not None:
        return _build(section, value, name)
    if float in kinds and type(value) is int:
        value = float(value)
    choices = [each.value for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum) for each in kind]
    if choices and isinstance(value, str) and value not in choices:
        close = get_close_matches(value, choices, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {choices}."
        raise ValueError(f"{name}: {value!r} is none of its values, {hint}")
    try:
        type_validator(name, value, hint)
    except TypeError as error:
        raise ValueError(f"{name}: expected {getattr(hint, '__name__', hint)}, came {value!r}.") from error
    return value
