"""A Trainer that pushes to the Hub what is a checkpoint's, and nothing else that lies in its folders."""

import hashlib
import json
import logging
from functools import partial
from glob import escape
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress, hf_api

from hf_vla.models.base import BASE
from hf_vla.models.checkpoint_files import published_files, stale_files
from hf_vla.models.hub_errors import hub_errors
from hf_vla.training.resolved import RECIPE
from hf_vla.training.saving import MANIFEST

logger = logging.getLogger(__name__)


class PushingTrainer(Trainer):
    """[`~transformers.Trainer`] whose repository can be loaded after every push, and holds nobody's business.

    Args:
        write_card (`Callable`, *optional*): writes README.md into the folder that is pushed, given the folder and the
            repository's name, see [`~hf_vla.hub.card.write_card`]; without it no card is written.
        args, kwargs: see [`~transformers.Trainer`].

    Raises:
        OSError: the Hub does not let this computer push, which is found out before the training; the text says why.
        ValueError: adapters would be pushed, and their model is on this computer alone.
    """

    _staging: Path | None = None  # where a save under way writes to

    def __init__(self, *args, write_card=None, **kwargs):
        self._write_card = write_card
        self._pushed = []  # folders that uploads under way may still read
        super().__init__(*args, **kwargs)

    def init_hf_repo(self, token=None, private=None):
        """Make the repository, unless nobody could load what would be pushed to it."""
        args = self.args
        for adapter in getattr(self.model, "peft_config", {}).values():
            base = Path(adapter.base_model_name_or_path)  # loaded just now: from there if it is there, else the Hub
            if base.exists() and base.resolve() != Path(args.output_dir, BASE).resolve():
                raise ValueError(
                    f"training.push_to_hub would push adapters of {str(base)!r}, which whoever pulls them lacks: push "
                    "that model by `hf-vla push`, and name it on the Hub as model.path."
                )
        token = args.hub_token if token is None else token
        with hub_errors(args.hub_model_id or Path(args.output_dir).absolute().name, token=token, write=True):
            super().init_hf_repo(token, private)

    def create_model_card(self, *args, **kwargs):
        """Write the card; the Trainer's own may name a folder as base model, which the Hub refuses."""
        if self._write_card is not None and self.is_world_process_zero():
            self._write_card(self.args.output_dir, self.hub_model_id)

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Push the model in `output_dir`; the Trainer would push all that lies there, logs and notes as well.

        Arguments and what is returned are those of the Trainer's method.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        token = args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        options = {"message": commit_message, "token": token, "revision": revision or args.hub_revision}
        push = partial(push_model, Path(args.output_dir), self.hub_model_id, **options)
        return push() if blocking else hf_api().run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Push what is in the checkpoint; the Trainer would copy it into `output_dir` first, file by file."""
        args = self.args
        if self._staging is not None or not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        self._pushed = self._being_pushed()
        if self._pushed and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        options = {"repo_id": self.hub_model_id, "token": args.hub_token, "revision": args.hub_revision}
        folder, base = Path(checkpoint_folder), Path(args.output_dir, BASE)  # of adapters to a new model, see `build`
        pushes = []
        if self.push_in_progress is None and base.is_dir():
            pushes.append(partial(push_model, base, message=f"{message}, base model", place=BASE, **options))
        pushes.append(partial(push_model, folder, message=message, with_base=base.is_dir(), **options))
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
            pushes.append(partial(push_training, folder, message=f"{message}, checkpoint", place=place, **options))
        jobs = [hf_api().run_as_future(push) for push in pushes]
        for job in jobs:
            job.add_done_callback(_warn)
        self._pushed.append(checkpoint_folder)
        self.push_in_progress = PushInProgress([*self._jobs_under_way(), *jobs])

    def _jobs_under_way(self):
        push = getattr(self, "push_in_progress", None)
        return [] if push is None else [job for job in push.jobs if not job.done()]

    def _being_pushed(self):
        return self._pushed if self._jobs_under_way() else []


def push_model(
    folder: Path,
    repo_id: str,
    message: str,
    token: str | None = None,
    revision: str | None = None,
    place: str = "",
    with_base: bool = False,
) -> CommitInfo:
    """Push the model in a folder, in place of what the repository has of an earlier one.

    Args:
        folder (`Path`): what is no checkpoint's in it is left out.
        repo_id (`str`): the repository, which exists.
        message (`str`): of the commit.
        token, revision (`str`, *optional*): see [`~huggingface_hub.HfApi.upload_folder`].
        place (`str`): folder in the repository; by default its root.
        with_base (`bool`): keep the model that adapters were added to, which is pushed by itself.

    Raises:
        OSError: the Hub refuses, or cannot be reached; the text says why.
    """
    files, _ = published_files(folder)
    with hub_errors(repo_id, revision, token, write=True):
        there = [] if place else hf_api().list_repo_files(repo_id, revision=revision, token=token)
        stale = [name for name in stale_files(there, files) if not (with_base and name.startswith(f"{BASE}/"))]
        return hf_api().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=place,
            commit_message=message,
            token=token,
            revision=revision,
            allow_patterns=[escape(name) for name in files],
            delete_patterns=[escape(name) for name in stale] or None,
        )


def push_training(
    folder: Path, repo_id: str, message: str, place: str, token: str | None = None, revision: str | None = None
) -> CommitInfo:
    """Push a checkpoint with all that a training goes on from, but for the names of this computer's folders.

    Its recipe, which is full of them, stays here: whoever goes on gives his own, which is not compared with it.

    Args:
        folder (`Path`): the checkpoint.
        place (`str`): folder in the repository.
        repo_id, message, token, revision: see [`push_model`].

    Raises:
        OSError: the Hub refuses, or cannot be reached; the text says why.
    """
    state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if state["best_model_checkpoint"] is not None:
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    content = json.dumps(state, indent=2).encode()
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"].pop(RECIPE, None)
    manifest["files"][TRAINER_STATE_NAME] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    texts = {TRAINER_STATE_NAME: content, MANIFEST: json.dumps(manifest, indent=2).encode()}
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    operations = [
        CommitOperationAdd(f"{place}/{name}", texts.get(name, folder / name)) for name in names if name != RECIPE
    ]
    with hub_errors(repo_id, revision, token, write=True):
        return hf_api().create_commit(repo_id, operations, commit_message=message, token=token, revision=revision)


def _warn(job):
    if not job.cancelled() and (error := job.exception()) is not None:
        logger.warning("A push during the training failed: %s", error)
