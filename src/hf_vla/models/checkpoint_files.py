"""Which files are a checkpoint's: those alone are pushed, and those of an earlier one are removed where another goes.

Whatever is not named here may be anybody's: notes, logs, a training's state, keys.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from hf_vla.models.auto import FAMILIES
from hf_vla.models.base import BASE
from hf_vla.models.remote_code import flattened_code, is_ours

# What a model and its processor are loaded from, and what was measured of them.
OF_A_MODEL = (
    *("config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json"),
    *("adapter_config.json", "adapter_model*.safetensors", "adapter_model*.safetensors.index.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "sentencepiece*.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.*"),
    *("training.json", "latency.json", "frame.json"),
)
OF_AN_EVALUATION = ("report.json", "report.md", "report.png", "protocol.json", "episodes.jsonl*", "open_loop.json")
PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.mp4")
TEXTS = ("README.md", "LICENSE", "LICENSE.*", "NOTICE", "NOTICE.*")
PICKLES = (".bin", ".pt", ".pth", ".pt.tar", ".pth.tar", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
# How folders begin of which nothing is pushed, whatever is asked for: hidden ones, a training's saves.
NOT_TOPS = (".", "_", "checkpoint-", "last-checkpoint")


def published_files(folder: Path, include: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Part the files of a folder into those of its checkpoint and others.

    Args:
        folder (`Path`): the checkpoint's.
        include (`Iterable[str]`): patterns of others' paths that go along; pickles, hidden files and a training's
            checkpoints never do.

    Returns:
        `tuple[list[str], list[str]]`: paths relative to the folder; of the others, a folder of which nothing is
        published counts as one.
    """
    files, others = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            (files if _is_published(path, name, include) else others).append(name)
    tops = {name.split("/")[0] for name in files}
    return files, sorted({name if (top := name.split("/")[0]) in tops else top for name in others})


def stale_files(there: Iterable[str], files: Iterable[str]) -> list[str]:
    """Return what a repository has of an earlier checkpoint and a new one has not: it would be loaded with it.

    Args:
        there (`Iterable[str]`): paths in the repository; those that are no checkpoint's stay.
        files (`Iterable[str]`): paths of the new checkpoint.
    """
    return sorted(name for name in set(there) - set(files) if _is_loaded(name) or _is_code(name))


def is_file_name(name: Any) -> bool:
    """Whether something that was read names a file in the same folder, and none elsewhere."""
    return isinstance(name, str) and Path(name).name == name not in ("", "..")


def is_pickle(name: str) -> bool:
    """Whether a file is, by its name, what pickle or torch.save writes."""
    return name.lower().endswith(PICKLES)


def _is_published(path, name, include):
    folder, _, file = name.rpartition("/")
    if name.startswith(NOT_TOPS) or any(part.startswith(".") for part in name.split("/")):
        return False
    if path.suffix == ".py" and folder in ("", BASE) and is_ours(path):
        return True
    if _matches(name, include):
        return not is_pickle(name)
    shown = folder in ("", BASE) and _matches(file, (*TEXTS, *PICTURES))
    return shown or _is_loaded(name) or (_is_report(folder) and _matches(file, PICTURES))


def _is_loaded(name):
    folder, _, file = name.rpartition("/")
    if folder in ("", BASE):
        return _matches(file, OF_A_MODEL)
    if folder in ("additional_chat_templates", f"{BASE}/additional_chat_templates"):
        return file.endswith(".jinja")
    return _is_report(folder) and _matches(file, OF_AN_EVALUATION)


def _is_report(folder):
    return folder.startswith("eval")


def _is_code(name):
    return name.removeprefix(f"{BASE}/") in _code_names()


@cache
def _code_names():
    return {name for family in FAMILIES for name in flattened_code(family)}


def _matches(name, patterns):
    return any(fnmatchcase(name, pattern) for pattern in patterns)
