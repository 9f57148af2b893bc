"""A Trainer that may be killed: its saves are whole or not there, it resumes exactly, and says why it stopped."""

import json
import logging
import math
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_vla.training.checkpoints import last_good, rotate
from hf_vla.training.faults import RowsOfBatch, TrainingStopped, describe_rows, one_line
from hf_vla.training.saving import UNFINISHED, clear, install, publish, staging_folder

logger = logging.getLogger(__name__)


class DurableTrainer(Trainer):
    """[`~transformers.Trainer`] that may be killed at any moment.

    A checkpoint is written beside its place and moved there when every process has written its part; its manifest
    tells later whether it still is what was written. The model that is saved at the end is replaced likewise. Batches
    that cannot be read, losses that are not finite and disks that are full raise
    [`~hf_vla.training.faults.TrainingStopped`], and leave the last good checkpoint as it is.
    """

    _staging: Path | None = None  # where a save under way writes to

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
            if self.state.best_model_checkpoint == str(staging / name):
                self.state.best_model_checkpoint = str(root / name)
                if self.args.should_save:
                    self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()  # only what all have written is complete
            if self.args.should_save:
                publish(staging / name, root / name)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(root / name))
        if self.args.should_save and self.args.save_total_limit:
            rotate(root, self.args.save_total_limit, [root / name, self.state.best_model_checkpoint])

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
            path = staging_folder(root) / TRAINER_STATE_NAME
            self.state.save_to_json(str(path))
            path.replace(root / TRAINER_STATE_NAME)
            clear(root)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    @contextmanager
    def _saving(self, root, what):
        try:
            if self.args.should_save:
                staging_folder(root)
            self.accelerator.wait_for_everyone()
            self._staging = root / UNFINISHED / "saving"
            yield self._staging
        except (OSError, RuntimeError, SafetensorError) as error:
            free = shutil.disk_usage(root).free if root.exists() else 0
            if self.args.should_save:
                clear(root)
            raise TrainingStopped(
                f"{what} could not be saved in {root}, where {free / 1e9:.1f} GB are "
                f"free ({one_line(error)}). {last_good(root)}"
            ) from error
        finally:
            self._staging = None

    # Resuming

    def _run_epoch(self, *args, epoch, epochs_trained, resume_from_checkpoint, **kwargs):
        """Train no step more than there are, and go on with what the checkpoint had not logged yet."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
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
        try:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
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
        except ValueError as error:  # of a model that refuses what it was given
            raise TrainingStopped(
                f"Step {self.state.global_step + 1} was not taken with a batch of {describe_rows(rows)}: "
                f"{one_line(error)} {last_good(Path(self.args.output_dir))}"
            ) from error
        self._losses_of_step.append((rows, {**self.parts_of_loss, "loss": loss}))
        return loss

    parts_of_loss: dict = {}
    """Of the last batch; set by a subclass whose models return them."""

    def train(self, *positional, **kwargs):
        """Train, and say on what: launchers start one process instead of several without a word."""
        self._losses_of_step, args = [], self.args
        logger.info(
            "Training in %d %s on %s; a step learns from %d rows.",
            args.world_size,
            "process" if args.world_size == 1 else "processes",
            args.device.type,
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )
        return super().train(*positional, **kwargs)

    def _get_grad_norm(self, model, grad_norm=None):
        """Stop before a step that would destroy the weights.

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
        raise TrainingStopped(
            f"Step {self.state.global_step + 1} was not taken: {'; '.join(wrong)}. "
            f"{last_good(Path(self.args.output_dir))}"
        )
