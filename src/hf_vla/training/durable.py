"""A Trainer that may be killed: its saves are whole or not there, it resumes exactly, and says why it stopped."""

import json
import logging
import math
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_vla.training.callbacks import EvaluationLeft, StopOnTermination
from hf_vla.training.checkpoints import checkpoint_to_resume, last_good, layout, rotate
from hf_vla.training.pushing import PushingTrainer
from hf_vla.training.resolved import check_same_recipe, resolved, write_recipe
from hf_vla.training.rows import RowsOfBatch, describe_rows
from hf_vla.training.saving import UNFINISHED, clear, install, publish, staging_folder
from hf_vla.training.summary import write_summary

logger = logging.getLogger(__name__)


class TrainingStopped(ValueError):
    """A training cannot go on; the message says why, and which checkpoint is the last good one."""


def one_line(error: BaseException) -> str:
    """Say in one line what happened, of errors that come from a worker of the data loader as well."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    return lines[-1] if "Original Traceback" in str(error) else f"{type(error).__name__}: {lines[0]}"


class DurableTrainer(PushingTrainer):
    """[`~transformers.Trainer`] that may be killed at any moment.

    A checkpoint is written beside its place and moved there when every process has written its part; its manifest
    tells later whether it still is what was written. The model that is saved at the end is replaced likewise. Batches
    that cannot be read, losses that are not finite, memory or disks that are full raise [`TrainingStopped`], and
    leave the last good checkpoint as it is.

    Args:
        recipe (`Recipe`, *optional*): of the run. It is saved with every checkpoint, the training arguments at least,
            and compared where one is gone on from.
        summary (`dict`, *optional*): what is saved as `training.json`, see [`~hf_vla.training.summary`].
        write_card (`Callable`, *optional*): see [`~hf_vla.training.pushing.PushingTrainer`].
        args, kwargs: see [`~transformers.Trainer`].
    """

    def __init__(self, *args, recipe=None, summary=None, write_card=None, **kwargs):
        super().__init__(*args, write_card=write_card, **kwargs)
        self._recipe, self._summary = resolved(self.args, recipe), summary
        self._staging: Path | None = None  # where a save under way writes to
        self._losses_of_step = []
        self.parts_of_loss = {}  # of the last batch; set by a subclass whose models return them

    def get_train_dataloader(self):
        """Return the Trainer's, whose batches also say which rows they are made of."""
        collator, self.data_collator = self.data_collator, RowsOfBatch(self.data_collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    # Saving

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial):
        """Save everything of a checkpoint, then move it to its place, then delete old ones and push.

        What the Trainer itself deletes and pushes at the end of a save, it looks for in the folder in which it saves.
        """
        root, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._saving(root, name) as staging:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                write_recipe(self._recipe, staging / name)
            if self.state.best_model_checkpoint == str(staging / name):
                self.state.best_model_checkpoint = str(root / name)
                if self.args.should_save:
                    self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()  # only what all have written is complete
            if self.args.should_save:
                publish(staging / name, root / name, time=time.time(), **layout(self.args))
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(root / name))
        if self.args.should_save and self.args.save_total_limit:
            kept = [root / name, self.state.best_model_checkpoint, *self._being_pushed()]
            try:
                rotate(root, self.args.save_total_limit, kept)
            except OSError as error:
                logger.warning("Older checkpoints in %s could not be deleted: %s", root, one_line(error))

    def _save(self, output_dir=None, state_dict=None):
        """Save the model, and `training.json`; neither the Trainer's arguments, a pickle, nor peft's empty card."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # a process that only helps to gather the weights
            return
        folder = Path(output_dir or self.args.output_dir)
        for name in (TRAINING_ARGS_NAME, "README.md"):
            (folder / name).unlink(missing_ok=True)
        if self._summary is not None:
            write_summary(self._summary, self.state, folder)

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the model: until all of it is written, the folder keeps what it had."""
        if self._staging is not None:  # part of a checkpoint
            return super().save_model(output_dir, _internal_call)
        root = Path(output_dir or self.args.output_dir)
        with self._saving(root, f"The model of step {self.state.global_step}") as staging:
            super().save_model(str(staging), True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save and any(staging.iterdir()):
                install(staging, root)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_state(self):
        """Save the state: until all of it is written, the folder keeps what it had."""
        if self.is_world_process_zero():
            root = Path(self.args.output_dir)
            try:
                path = staging_folder(root) / TRAINER_STATE_NAME
                self.state.save_to_json(str(path))
                path.replace(root / TRAINER_STATE_NAME)
            except OSError as error:
                raise self._not_saved(root, TRAINER_STATE_NAME, error) from error
            finally:
                clear(root, "saving")

    @contextmanager
    def _saving(self, root, what):
        try:
            if self.args.should_save:
                staging_folder(root)
            self.accelerator.wait_for_everyone()
            self._staging = root / UNFINISHED / "saving"
            yield self._staging
        except (OSError, RuntimeError, SafetensorError) as error:
            stop = self._not_saved(root, what, error)
            if self.args.should_save:
                clear(root, "saving")
            raise stop from error
        finally:
            self._staging = None

    def _not_saved(self, root, what, error):
        free = shutil.disk_usage(root).free if root.exists() else 0
        return TrainingStopped(
            f"{what} could not be saved in {root}, where {free / 1e9:.1f} GB are free ({one_line(error)}). "
            f"{last_good(root)}"
        )

    # Resuming

    def _run_epoch(self, *args, epoch, epochs_trained, resume_from_checkpoint, **kwargs):
        """Train no step more than there are, and go on with what the checkpoint had not logged yet."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if hasattr(self.train_dataset, "set_epoch"):  # accelerate forgets it where batches are skipped or shared out
            self.train_dataset.set_epoch(epoch)
        if epoch == epochs_trained and resume_from_checkpoint is not None:
            path = Path(resume_from_checkpoint) / self._unlogged_name()
            if path.is_file():
                self.load_unlogged(json.loads(path.read_text(encoding="utf-8")))
        super()._run_epoch(
            *args, epoch=epoch, epochs_trained=epochs_trained, resume_from_checkpoint=resume_from_checkpoint, **kwargs
        )

    def _save_rng_state(self, output_dir):
        """Save what each process alone knows: its random numbers, and the losses that it has not logged yet."""
        super()._save_rng_state(output_dir)
        (Path(output_dir) / self._unlogged_name()).write_text(json.dumps(self.unlogged()), encoding="utf-8")

    def _unlogged_name(self):
        return f"unlogged_{self.args.process_index}.json"

    def unlogged(self) -> dict:
        """Return this process's losses since they were last logged."""
        return {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged}

    def load_unlogged(self, unlogged: dict) -> None:
        """Go on with those."""
        self._tr_loss += unlogged["loss"]
        self._globalstep_last_logged = unlogged["last_logged"]

    # Faults

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Read the batches of a step."""
        with self.reading():
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    @contextmanager
    def reading(self):
        """Turn what goes wrong while data are read into a fault."""
        try:
            yield
        except Exception as error:
            raise TrainingStopped(
                f"After step {self.state.global_step}, data could not be read: {one_line(error)} "
                f"{last_good(Path(self.args.output_dir))}"
            ) from error

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Remember which rows gave which loss, until the step is taken."""
        rows = inputs.pop("rows", [])
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except (ValueError, RuntimeError) as error:  # of a model that refuses what it was given
            hint = self._hint("train", error)
            if isinstance(error, RuntimeError) and (hint is None or self.args.auto_find_batch_size):
                raise
            raise TrainingStopped(
                f"Step {self.state.global_step + 1} was not taken with a batch of {describe_rows(rows)}: "
                f"{one_line(error)} {hint or ''}{last_good(Path(self.args.output_dir))}"
            ) from error
        self._losses_of_step.append((rows, {**self.parts_of_loss, "loss": loss}))
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Check the loss before DeepSpeed sees it, whose backward pass also takes the step."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.is_deepspeed_enabled and model.training:
            if self.accelerator.reduce((~loss.detach().isfinite()).float().sum()):
                raise ValueError(f"here the loss is {loss.item()}, and somewhere it is not finite.")
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args, **kwargs):
        """Evaluate, and say what was left where that fails."""
        try:
            return super().evaluate(*args, **kwargs)
        except (ValueError, RuntimeError, OSError) as error:
            hint = self._hint("eval", error)
            if isinstance(error, RuntimeError) and hint is None:
                raise
            raise TrainingStopped(
                f"The evaluation after step {self.state.global_step} failed: {one_line(error)} {hint or ''}"
                f"{last_good(Path(self.args.output_dir))}"
            ) from error

    def _hint(self, kind, error):
        """What helps where the memory is full; None where that is not what happened."""
        if not should_reduce_batch_size(error):
            return None
        name = f"per_device_{kind}_batch_size"
        more = ", double training.gradient_accumulation_steps to learn from as many rows" if kind == "train" else ""
        return f"Halve training.{name}, {getattr(self.args, name)}{more}. "

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        """Save at once where SIGTERM comes during an evaluation."""
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationLeft:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train, and say on what: launchers start one process instead of several without a word.

        Args:
            resume_from_checkpoint (`bool` or `str`, *optional*): see
                [`~hf_vla.training.checkpoints.checkpoint_to_resume`]; a new training by default.
            args, kwargs: see [`~transformers.Trainer.train`].

        Raises:
            ValueError: this training may not go on from that checkpoint.
            TrainingStopped: it cannot go on.
        """
        self._losses_of_step = []
        checkpoint = checkpoint_to_resume(self.args, resume_from_checkpoint or False)
        if checkpoint is not None:
            self.check_checkpoint(checkpoint)
        logger.info(
            "Training in %d %s on %s; a step learns from %d rows.",
            self.args.world_size,
            "process" if self.args.world_size == 1 else "processes",
            self.args.device.type,
            self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
        )
        try:
            return super().train(checkpoint, *args, **kwargs)
        finally:
            for listener in self._listeners():
                listener.listen_no_longer()

    def leave_if_told(self) -> None:
        """Leave an evaluation that the Trainer does not know as such, if SIGTERM came."""
        for listener in self._listeners():
            listener.on_prediction_step(self.args, self.state, self.control)

    def _listeners(self):
        return [each for each in self.callback_handler.callbacks if isinstance(each, StopOnTermination)]

    def check_checkpoint(self, checkpoint: str) -> None:
        """Check that this training may go on from a checkpoint, whose files are whole.

        Raises:
            ValueError: it is of another recipe.
        """
        check_same_recipe(checkpoint, self._recipe)

    def _get_grad_norm(self, model, grad_norm=None):
        """Stop before a step that would destroy the weights; DeepSpeed has taken it by now.

        A gradient is a sum over all processes, so all of them see when it is not finite. Of half precision that is
        nothing to stop for: its scaled gradients overflow now and then, and such a step is not taken.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        losses, self._losses_of_step = self._losses_of_step, []
        values = torch.stack([value.detach().float() for _, parts in losses for value in parts.values()])
        if values.isfinite().all() and (norm is None or self.args.fp16 or math.isfinite(norm)):
            return norm
        wrong = [
            f"{name} is {value.item()} in a batch of {describe_rows(rows)}"
            for rows, parts in losses
            for name, value in parts.items()
            if not value.isfinite()
        ] or [f"the gradient is not finite; here the losses are, of {describe_rows(rows)}" for rows, _ in losses]
        happened = "was taken, and must not be saved" if self.is_deepspeed_enabled else "was not taken"
        raise TrainingStopped(
            f"Step {self.state.global_step + 1} {happened}: {'; '.join(wrong)}. "
            f"{last_good(Path(self.args.output_dir))}"
        )
