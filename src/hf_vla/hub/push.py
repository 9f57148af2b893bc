"""Pushing a checkpoint to the Hub: its files, a model card and the code that loads it, in one commit.

The folder stays as it is: what is generated is written into a copy, which links to the weights and is removed.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

from hf_vla.hub.card import CARD, write_card
from hf_vla.hub.export import export_remote_code
from hf_vla.hub.facts import ADAPTER, known_on_hub
from hf_vla.models.base import BASE, check_folder
from hf_vla.models.checkpoint_files import is_file_name, is_pickle, published_files, stale_files
from hf_vla.models.conversion import read_json
from hf_vla.models.hub_errors import hub_errors
from hf_vla.models.remote_code import is_ours, replace_file

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")  # one of them is loaded
INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Args:
        url (`str`): of the commit.
        revision (`str`): hash of the commit.
        files (`list[str]`): paths in the repository that it holds.
        generated (`list[str]`): those of them that are not, or not like this, in the folder.
        left_out (`list[str]`): files and folders in the folder that were not pushed.
        removed (`list[str]`): paths of an earlier checkpoint that the repository held, and holds no more.
    """

    url: str
    revision: str
    files: list[str]
    generated: list[str]
    left_out: list[str]
    removed: list[str]


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    code: bool = True,
    message: str = "Upload checkpoint with hf_vla",
    token: str | None = None,
    license: str | None = None,
    include: Iterable[str] = (),
) -> Pushed:
    """Push a checkpoint, in one commit, with a model card and the code that loads it without this library.

    Whoever pushes again after an interruption sends only what has not arrived. What an earlier checkpoint left in the
    repository and this one has not, weights, tokenizer, code or evaluations, is removed in the same commit, since it
    would be loaded with it; other files stay there.

    Args:
        folder (`str` or `Path`): the checkpoint, which is not changed. Its weights must be safetensors; what is no
            part of one, see [`~hf_vla.models.checkpoint_files`], is left out.
        repo_id (`str`): `owner/name`, or a name of one's own; it is made if need be.
        private (`bool`, *optional*): whether a new repository is private; as the owner's settings say by default. With
            True nothing is pushed to one that is public.
        revision (`str`, *optional*): branch to push to; it is made if need be. Default: main.
        code (`bool`): whether the code that loads it goes along, see
            [`~hf_vla.hub.export.export_remote_code`]; if not, none that lies in the folder does, either.
        message (`str`): of the commit.
        token (`str`, *optional*): with write permission; by default HF_TOKEN, or that of `hf auth login`.
        license (`str`, *optional*): see [`~hf_vla.hub.card.write_card`].
        include (`Iterable[str]`): patterns of other paths that go along, such as `assets/*`; pickles, hidden files and
            a training's checkpoints never do.

    Returns:
        [`Pushed`]

    Raises:
        FileNotFoundError: this is no folder of a checkpoint.
        ValueError: its weights are not safetensors, or not whole, its adapters are of a model that is not on the Hub,
            a repository that shall be private is not, or see [`~hf_vla.hub.card.write_card`]. Nothing was pushed then,
            and no repository made.
        OSError: the Hub refuses, or cannot be reached; the text says why.
    """
    folder = Path(folder)
    check_folder(folder, str(folder))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; what is pushed is a checkpoint on this computer.")
    files, left_out = published_files(folder, include)
    check_weights(folder, files)
    check_base(folder)
    api = HfApi(token=token)
    with hub_errors(repo_id, revision, token, write=True):
        if "/" not in repo_id:
            repo_id = f"{api.whoami()['name']}/{repo_id}"
        there = _repository(api, repo_id, revision)
    if private and there is not None and not there.private:
        raise ValueError(
            f"{repo_id!r} was there before, and is public: make it private in its settings "
            f"({api.endpoint}/{repo_id}/settings), push to another name, or leave private out."
        )
    names = [] if there is None else [each.rfilename for each in there.siblings]
    with TemporaryDirectory(prefix="hf_vla_push") as aside:
        copy = Path(aside, folder.resolve().name)
        for name in files:
            if code or not (name.endswith(".py") and is_ours(folder / name)):
                _place(folder / name, copy / name)
        if CARD in names and not (copy / CARD).exists():  # what somebody wrote there is kept
            with hub_errors(repo_id, revision, token):
                card = hf_hub_download(repo_id, CARD, revision=there.sha, token=token, endpoint=api.endpoint)
            shutil.copyfile(card, copy / CARD)
        _generate(folder, copy, repo_id, code, license)
        paths = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
        removed = stale_files(names, paths)
        operations = [CommitOperationAdd(path, copy / path) for path in paths]
        operations += [CommitOperationDelete(path) for path in removed]
        with hub_errors(repo_id, revision, token, write=True):
            if there is None:
                api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.create_commit(
                repo_id, operations, commit_message=message, revision=revision, parent_commit=there and there.sha
            )
        generated = [path for path in paths if not _same(copy / path, folder / path)]
    return Pushed(commit.commit_url, commit.oid, paths, generated, left_out, removed)


def check_weights(folder: Path, files: list[str]) -> None:
    """Check that a checkpoint's weights are safetensors, and whole.

    Raises:
        ValueError: they are not; the text names the file.
    """
    if not any(name in files for name in WEIGHTS):
        pickled = [path.name for path in sorted(folder.iterdir()) if is_pickle(path.name)]
        came = f"only {', '.join(pickled)}, which is a pickle and could run any code" if pickled else "none of them"
        raise ValueError(
            f"Expected weights as model.safetensors or adapter_model.safetensors in {folder}, came {came}: save the "
            "model with save_pretrained."
        )
    again = "copy the checkpoint again, or save the model with save_pretrained."
    for name in (name for name in files if name.endswith(INDEX)):
        named = read_json(folder / name).get("weight_map")
        if not isinstance(named, dict) or not named or not all(map(is_file_name, named.values())):
            raise ValueError(f"{folder / name} names no files of weights: {again}")
        shards = {str(Path(name).with_name(shard)) for shard in named.values()}
        if missing := sorted(shards - set(files)):
            raise ValueError(f"{folder / name} names {', '.join(missing)}, which {folder} does not hold: {again}")
    for name in (name for name in files if name.endswith(".safetensors")):
        try:
            with safe_open(folder / name, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is not whole ({error}): {again}") from error


def check_base(folder: Path) -> None:
    """Check that whoever pulls adapters gets the model that they adapt, too.

    Raises:
        ValueError: it neither lies beside them nor is on the Hub.
    """
    if not (folder / ADAPTER).is_file() or any(folder.glob("model*.safetensors")) or (folder / BASE).is_dir():
        return
    name = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(name, str) or not known_on_hub(name):
        raise ValueError(
            f"The adapters in {folder} are of {name!r}, which is no model on the Hub that could be found, so that "
            f"whoever pulls them lacks it: push that model, and write its name as base_model_name_or_path into "
            f"{ADAPTER}, or lay it in {folder / BASE}."
        )


def _repository(api, repo_id, revision):
    """What the Hub tells of a repository as it is; None where there is none. A new branch begins with main."""
    for wanted in dict.fromkeys((revision, None)):
        try:
            return api.model_info(repo_id, revision=wanted)
        except RevisionNotFoundError:
            continue
        except RepositoryNotFoundError:
            return None
    return None


def _generate(folder, copy, repo_id, code, license):
    """Write into a copy of the folder what is made for the Hub; errors name the folder."""
    try:
        if (copy / BASE).is_dir():
            _name_base(copy, repo_id)
        if not code and not any(copy.rglob("*.py")):  # or transformers would look for what is not there
            _forget_code(copy)
        if code and (copy / "config.json").is_file():  # else adapters, whose model brings its code along
            export_remote_code(copy)
        write_card(copy, repo_id, license)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(str(error).replace(str(copy), str(folder))) from error


def _forget_code(copy):
    for path in (*copy.glob("*config.json"), *copy.glob(f"{BASE}/*config.json")):
        config = read_json(path)
        if config.pop("auto_map", None) is not None:
            replace_file(path, json.dumps(config, indent=2) + "\n")


def _name_base(copy, repo_id):
    """Have adapters look for their model where they are pushed to; AutoModel wants its config.json."""
    path = copy / ADAPTER
    path.write_text(
        json.dumps(read_json(path) | {"base_model_name_or_path": repo_id}, indent=2) + "\n", encoding="utf-8"
    )
    if not (copy / "config.json").exists():
        shutil.copyfile(copy / BASE / "config.json", copy / "config.json")


def _place(source, target):
    """Link to weights, and copy what else there is, which may be written to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".safetensors":
        try:
            os.symlink(source.resolve(), target)
            return
        except OSError:  # where links need a permission
            pass
    shutil.copyfile(source, target)


def _same(path, other):
    return other.is_file() and (path.samefile(other) or path.read_bytes() == other.read_bytes())
