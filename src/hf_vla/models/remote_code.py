"""A family's code as files of a checkpoint, for transformers to load where this library is not installed.

Every module that the family's classes import becomes one file, which keeps its text but for the imports: those of
`hf_vla.actions.codec` become relative ones of `actions_codec`. transformers finds files by relative imports, in one
folder only.
"""

import ast
import os
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path

from hf_vla.models.auto import FAMILIES, KINDS, family_module

_PACKAGE = "hf_vla"
_OURS = f"# Written by {_PACKAGE} "  # the beginning of every file
_AUTO_CLASSES = {
    "AutoConfig": "configuration",
    "AutoModel": "modeling",
    "AutoModelForImageTextToText": "modeling",
    "AutoProcessor": "processing",
}


def auto_map(model_type: str) -> dict[str, str]:
    """Where transformers' Auto classes find a family's classes.

    Args:
        model_type (`str`): a family.

    Returns:
        `dict[str, str]`: `{"AutoConfig": "file.Class", ...}`.
    """
    classes = dict(zip(KINDS, FAMILIES[model_type], strict=True))
    return {
        auto_class: f"{_file_name(family_module(model_type, kind))}.{classes[kind]}"
        for auto_class, kind in _AUTO_CLASSES.items()
    }


@cache
def flattened_code(model_type: str) -> dict[str, str]:
    """The code of a family.

    Args:
        model_type (`str`): a family.

    Returns:
        `dict[str, str]`: text of each file by its name, without folders.
    """
    code, found = {}, [family_module(model_type, kind) for kind in KINDS]
    while found:
        module = found.pop()
        name = f"{_file_name(module)}.py"
        if name not in code:
            code[name], imported = _flattened(module)
            found += imported
    return dict(sorted(code.items()))


def write_code(folder: str | Path, model_type: str) -> list[Path]:
    """Write the code of a family into a checkpoint, and remove what an earlier version wrote and this one does not.

    Args:
        folder (`str` or `Path`): of the checkpoint.
        model_type (`str`): a family.

    Returns:
        `list[Path]`: the files that were written.

    Raises:
        ValueError: files of the same names are there, which are not ours; nothing is written then.
    """
    folder, code = Path(folder), flattened_code(model_type)
    if foreign := [name for name in code if (folder / name).exists() and not is_ours(folder / name)]:
        raise ValueError(
            f"{folder} holds {foreign}, which hf_vla did not write and does not replace: move them away, or "
            "choose another folder."
        )
    written = [replace_file(folder / name, text) for name, text in code.items()]
    for path in folder.glob("*.py"):
        if path.name not in code and is_ours(path):
            path.unlink()
    return written


def replace_file(path: Path, text: str) -> Path:
    """Write a text file at once: whoever is stopped in between leaves the old one, or none."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)
    return path


def is_ours(path: Path) -> bool:
    """Whether a file is code that this library wrote, in whatever version."""
    with open(path, "rb") as file:
        return file.read(len(_OURS)) == _OURS.encode()


def _file_name(module: str) -> str:
    return module.removeprefix(f"{_PACKAGE}.").replace(".", "_")


def _flattened(module: str) -> tuple[str, list[str]]:
    """Text of a module's file, and the modules of ours that it imports."""
    *folders, name = module.split(".")[1:]
    source = files(_PACKAGE).joinpath(*folders, f"{name}.py").read_text(encoding="utf-8")
    lines, imported = source.split("\n"), []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for target in names:
            if target.split(".")[0] != _PACKAGE:
                continue
            line, start = lines[node.lineno - 1], node.col_offset
            before = f"from {target} import "
            if not line[start:].startswith(before) or _is_package(target):
                raise ValueError(f"Expected `from module import name` in {module}, line {node.lineno}, got {line!r}.")
            lines[node.lineno - 1] = f"{line[:start]}from .{_file_name(target)} import {line[start + len(before) :]}"
            imported.append(target)
    version = import_module(_PACKAGE).__version__
    head = [
        f"{_OURS}{version}: its module {module}. Change it there, not here.",
        "# SPDX-License-Identifier: Apache-2.0",
    ]
    return "\n".join([*head, *lines]), imported


def _is_package(module: str) -> bool:
    return files(_PACKAGE).joinpath(*module.split(".")[1:]).is_dir()
