"""Training: the Hugging Face Trainer with the processor beside every checkpoint and an error in robot units."""

import copy
import inspect
import logging
from contextlib import nullcontext
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.utils.data import DataLoader, IterableDataset, Sampler, Subset
from tqdm.auto import tqdm

from hf_vla.actions.spec import ActionSpec
from hf_vla.data.mixture import Mixture
from hf_vla.models.base import BASE
from hf_vla.models.outputs import VLAOutput
from hf_vla.training.checkpoints import check_same_model, check_same_robot
from hf_vla.training.durable import DurableTrainer
from hf_vla.training.ema import WeightAverage, refuse_average
from hf_vla.training.memory import MemoryEstimate, check_memory, estimate_memory, with_batch_size
from hf_vla.training.optimization import split_by_group

logger = logging.getLogger(__name__)


class VLATrainer(DurableTrainer):
    """A Trainer whose evaluation also predicts actions and measures how far off they are.

    It may be killed at any moment, see [`~hf_vla.training.durable.DurableTrainer`].

    The parts of a loss, which models return as fields called `..._loss`, are logged beside it.

    `processing_class` is the processor, `data_collator` a [`~hf_vla.data.collator.VLACollator`]. Metrics are in robot
    units, see [`action_error`], over `args.eval_action_samples` frames of each dataset that is held out.

    Args:
        train_sampler (`torch.utils.data.Sampler`, *optional*): order of the training rows, with a `set_epoch`; the
            Trainer's own by default.
        camera_dropout, state_dropout (`float`): of training batches, see [`~hf_vla.data.collator.VLACollator`].
        own_words (`bool`, *optional*): learn under the reasonings that the model itself says, as it acts under them.
            Each step then waits for them. By default so with a model that says some, has a frozen backbone (after
            `train_embodiment`, for example) and a collator that gives it none.
        args, kwargs: see [`~transformers.Trainer`].

    Raises:
        ValueError: `own_words` is True and the model has no words.
    """

    def __init__(
        self,
        *args,
        train_sampler: Sampler | None = None,
        camera_dropout: float = 0.0,
        state_dropout: float = 0.0,
        own_words: bool | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.train_sampler = train_sampler
        self.withheld = {"camera_dropout": camera_dropout, "state_dropout": state_dropout}
        self.own_words = self._under_own_words(own_words)
        self._loss_parts, self._num_steps, self._eval_loss_parts = {}, 0.0, {}
        self._learning_rates = {}
        if self.args.ema_decay is not None:
            self.add_callback(WeightAverage(self.args.ema_decay))
        # The Trainer evaluates the loss of batches that have these only, and looks for arguments called labels, which
        # are missing where a model of actions says nothing.
        if "actions" in inspect.signature(self._bare(self.model).forward).parameters:
            self.label_names = ["actions"]

    def _under_own_words(self, wanted):
        model = self._bare(self.model)
        speaks = hasattr(model, "with_own_words")
        if wanted and not speaks:
            raise ValueError(f"A {type(model).__name__} says nothing by itself: leave own_words out.")
        if wanted is not None or not speaks:
            return bool(wanted)
        frozen = not any(parameter.requires_grad for parameter in model.backbone.parameters())
        told = getattr(self.data_collator, "reasoning", None) is not None
        return frozen and not told and model.config.max_reasoning_tokens > 0

    def _bare(self, model):
        """The model of ours within whatever wraps it."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def train(self, *args, **kwargs):
        """Train, and forget what an earlier training has left unlogged."""
        self._loss_parts, self._num_steps = {}, 0.0
        self._check_metric()
        if self.args.estimate_memory:
            self.report_memory()
        return super().train(*args, **kwargs)

    def _check_metric(self):
        """Raise before the training where no evaluation would measure what chooses the best model."""
        wanted, dataset = self.args.metric_for_best_model, self.eval_dataset
        if wanted is None or self.args.eval_strategy == "no" or isinstance(dataset, dict):
            return
        known = ["loss", *(name for name in VLAOutput.__annotations__ if name.endswith("_loss"))]
        keys = list(dataset.rows) if isinstance(dataset, Mixture) else [self.data_collator.unnorm_key]
        for key in keys if self.args.eval_action_samples else []:
            names = _dimensions(self.processing_class.action_codec.specs(key)[0])
            known += names if len(keys) == 1 else [f"{key}_{name}" for name in names]
        known += ["action_error"] * (len(keys) > 1 and self.args.eval_action_samples > 0)
        if (name := wanted.removeprefix("eval_")) not in known:
            hint = "".join(f" Did you mean {close}?" for close in get_close_matches(name, known, n=1))
            raise ValueError(f"training.metric_for_best_model: evaluations measure {known}, came {wanted!r}.{hint}")

    def report_memory(self) -> MemoryEstimate | None:
        """Log what the training will take, on copies of the first row; of a stream without activations.

        Returns:
            [`~hf_vla.training.memory.MemoryEstimate`], None where FSDP or DeepSpeed cut it into shards.

        Raises:
            ValueError: the accelerator cannot hold it, see [`~hf_vla.training.memory.check_memory`].
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.info("Memory is not estimated: FSDP and DeepSpeed cut into shards what a process would hold.")
            return None
        if not isinstance(self.train_dataset, IterableDataset):
            with self.reading():
                row = self.train_dataset[0]
            batches = (self._prepare_inputs(self.data_collator([row] * count)) for count in (1, 2))
            one, two = (estimate_memory(self.model, self.args, batch) for batch in batches)
            estimate = with_batch_size(one, two, self.args.per_device_train_batch_size)
        else:
            estimate = estimate_memory(self.model, self.args)
        if self.is_world_process_zero():
            logger.info("Memory of each process:\n%s", estimate)
        check_memory(estimate, self.args.device)
        return estimate

    def get_train_dataloader(self):
        """Return the Trainer's, whose batches alone withhold cameras and states."""
        collator = self.data_collator
        if any(self.withheld.values()):
            self.data_collator = partial(collator, **self.withheld, seed=self.args.seed)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def check_checkpoint(self, checkpoint):
        """Check that it is of the same robots, model and recipe."""
        check_same_robot(checkpoint, self.processing_class)
        check_same_model(checkpoint, self._bare(self.model).config)
        super().check_checkpoint(checkpoint)

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset) if self.train_sampler is None else self.train_sampler

    def _issue_warnings_after_load(self, load_result):
        """Raise where the Trainer only warns: a weight that a checkpoint lacks would stay random."""
        tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {})
        if missing := [key for key in load_result.missing_keys if key not in tied]:
            raise ValueError(
                f"The checkpoint lacks {len(missing)} weights of the model, among them {missing[:5]}: it was saved by "
                "another version or of another model. Start a new run with model.path set to it."
            )

    def _save(self, output_dir=None, state_dict=None):
        """Save the configuration beside an adapter, too: with it, the folder is found and loaded by our classes.

        An adapter that is pushed together with its base model names the repository in which both are.
        """
        model = self.accelerator.unwrap_model(self.model)
        if self.hub_model_id is not None and hasattr(model, "peft_config"):
            for adapter in model.peft_config.values():
                if Path(adapter.base_model_name_or_path) == Path(self.args.output_dir, BASE).resolve():
                    adapter.base_model_name_or_path = self.hub_model_id
        super()._save(output_dir, state_dict)
        if hasattr(model, "peft_config"):
            config = copy.deepcopy(model.config)
            if hasattr(config, "quantization_config"):  # of this training; adapters fit the whole weights, too
                del config.quantization_config
            config.save_pretrained(output_dir or self.args.output_dir)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Keep the parts of the loss, and ask models that score a vocabulary for one position's logits alone.

        The loss has logits of its own; all others would only fill the memory.
        """
        base = self._bare(model)
        if self.own_words:
            inputs = base.with_own_words(**inputs)
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            inputs = {**inputs, "logits_to_keep": 1}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # each process or, within one, each device of several has its own
        parts = {name: part.detach().float().mean() for name, part in outputs.items() if name.endswith("_loss")}
        self.parts_of_loss = parts
        if model.training:  # weighted as the Trainer weights the loss: batches of a step, then steps
            share = 1 / self.current_gradient_accumulation_steps
            self._num_steps += share
            for name, part in parts.items():
                self._loss_parts[name] = self._loss_parts.get(name, 0.0) + share * part
        else:  # by samples, of which the last batch may have fewer
            for name, part in parts.items():
                of_samples = self.gather_function(part.repeat(self.args.eval_batch_size))
                self._eval_loss_parts.setdefault(name, []).append(of_samples)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        """Add the parts of the training loss, as means over the steps since they were last logged."""
        if "loss" in logs:
            for name, total in self._loss_parts.items():
                logs[name] = self.accelerator.reduce(total, "mean").item() / self._num_steps
            self._loss_parts, self._num_steps = {}, 0.0
            logs |= self._learning_rates
        super().log(logs, *args, **kwargs)

    def unlogged(self):
        """Return the parts of the loss with it."""
        parts = {name: total.item() for name, total in self._loss_parts.items()}
        return super().unlogged() | {"parts": parts, "num_steps": self._num_steps}

    def load_unlogged(self, unlogged):
        """Go on with them."""
        super().load_unlogged(unlogged)
        self._num_steps = unlogged["num_steps"]
        self._loss_parts = {
            name: torch.tensor(total, device=self.args.device) for name, total in unlogged["parts"].items()
        }

    def create_optimizer(self, model=None):
        """Give groups of parameters the learning rates that the arguments name."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.learning_rates:
            split_by_group(optimizer, self.model if model is None else model, self.args.learning_rates)
        return optimizer

    def _get_learning_rate(self):
        groups = self.optimizer.param_groups if self.args.learning_rates else []
        self._learning_rates = {f"learning_rate_{group['name']}": float(group["lr"]) for group in groups}
        return super()._get_learning_rate()

    @property
    def average(self) -> WeightAverage | None:
        """The average of the weights that the arguments ask for; resuming exchanges the Trainer's callbacks."""
        return next((each for each in self.callback_handler.callbacks if isinstance(each, WeightAverage)), None)

    def _averaged(self):
        return nullcontext() if self.average is None else self.average.in_place()

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.average is not None:
            self.average.start(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)
        elif resume_from_checkpoint is not None:
            refuse_average(resume_from_checkpoint)
        return prepared

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the average of the weights, where there is one, in place of them; processor and arguments beside."""
        with self._averaged():
            super().save_model(output_dir, _internal_call)
        if self.average is not None and not _internal_call:
            logger.info("Saved weights averaged with decay %g.", self.args.ema_decay)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and self.args.should_save:
            self.average.save_training_weights(output_dir)

    def _load_best_model(self):
        """Raise where the Trainer only warns: the last weights, saved as the best ones, would go unnoticed."""
        best = Path(self.state.best_model_checkpoint)
        kind = "adapter_model" if hasattr(self.accelerator.unwrap_model(self.model), "peft_config") else "model"
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        try:
            if not sharded and not any(best.glob(f"{kind}*.safetensors")):
                raise FileNotFoundError(f"it has no {kind}.safetensors")
            super()._load_best_model()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"The best checkpoint, {best}, cannot be loaded ({error}). The training itself is done: restore the "
                "checkpoint and resume, or leave training.load_best_model_at_end out to keep the last weights."
            ) from error
        if self.average is not None:  # what was loaded is an average
            self.average.follow()

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs):
        """Add the parts of the loss, and the action errors, to the loss that the Trainer computes.

        Heads that draw noise draw the same in every evaluation, and leave the training's random numbers alone.
        """
        device = self.args.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            torch.manual_seed(self.args.seed)
            self._eval_loss_parts = {}
            with self._averaged():
                output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
                with self.accelerator.autocast():
                    errors = self.action_errors(dataloader.dataset)
        parts = {name: torch.cat(part).mean().item() for name, part in self._eval_loss_parts.items()}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in (parts | errors).items()})
        return output

    def action_errors(self, dataset) -> dict[str, float]:
        """Predict the chunks of some frames of a dataset and compare them with the recorded ones.

        Args:
            dataset (`torch.utils.data.Dataset`): of several in a [`~hf_vla.data.mixture.Mixture`], each is measured by
                itself, and its errors are called `<dataset>_action_error`; `action_error` is their mean, in which a
                dataset counts by its rows. Of a stream, the first rows are measured.
        """
        if not isinstance(dataset, Mixture):
            return self._action_errors(dataset, self.data_collator.unnorm_key)
        errors = {}
        for name, rows in dataset.rows.items():
            of_one = self._action_errors(Subset(dataset, rows), name)
            errors |= of_one if len(dataset.rows) == 1 else {f"{name}_{key}": error for key, error in of_one.items()}
        if errors and len(dataset.rows) > 1:
            total = sum(len(rows) * errors[f"{name}_action_error"] for name, rows in dataset.rows.items())
            errors["action_error"] = total / len(dataset)
        return errors

    def _action_errors(self, dataset, unnorm_key: str | None) -> dict[str, float]:
        count = self.args.eval_action_samples
        if isinstance(dataset, IterableDataset):
            samples = list(islice(dataset, count))
            samples = samples[: min(gather_object([len(samples)]))]  # each process has a stream of its own
        else:
            rows = np.linspace(0, len(dataset) - 1, min(len(dataset), count)).round().astype(int)
            samples = Subset(dataset, rows.tolist())
        if len(samples) == 0:
            return {}
        collator, model = self.data_collator, self.accelerator.unwrap_model(self.model)
        loader = self.accelerator.prepare(
            DataLoader(samples, batch_size=self.args.eval_batch_size, collate_fn=collator.prompts)
        )
        parts = []
        quiet = self.args.disable_tqdm or not self.is_local_process_zero()
        for batch in tqdm(loader, f"Predicting actions of {unnorm_key}", disable=quiet, leave=False):
            self.leave_if_told()
            output = model.predict_action(**batch["inputs"])
            predicted = self.processing_class.decode_actions(output, unnorm_key)
            predicted = torch.from_numpy(predicted).to(batch["actions"].device)
            parts.append(self.accelerator.gather_for_metrics((predicted, batch["actions"], batch["action_mask"])))
        predicted, actions, mask = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        spec, _ = self.processing_class.action_codec.specs(unnorm_key)
        return action_error(predicted, actions, mask, spec)


def action_error(
    predicted: np.ndarray, actions: np.ndarray, action_mask: np.ndarray, spec: ActionSpec | None = None
) -> dict[str, float]:
    """Mean absolute error over the actions that are real.

    Args:
        predicted, actions (`np.ndarray` of shape `(batch_size, chunk_size, action_dim)`): robot units.
        action_mask (`np.ndarray` of shape `(batch_size, chunk_size)`): True where an action is real.
        spec (`ActionSpec`, *optional*): tells which dimensions belong together.

    Returns:
        `dict[str, float]`: "action_error" over all dimensions and, with a spec, "action_error_translation",
        "action_error_rotation", "action_error_joints" and "action_error_gripper" where it has them.
    """
    error = np.abs(np.asarray(predicted, np.float64) - actions)[action_mask].mean(0)
    return {name: float(error[dimensions].mean()) for name, dimensions in _dimensions(spec).items()}


def _dimensions(spec: ActionSpec | None) -> dict[str, slice | list[int]]:
    """Name of each error, and the dimensions that it is the mean of."""
    groups = {"action_error": slice(None)}
    if spec is not None:
        body = [index for index in range(len(spec.names)) if spec.gripper is None or index != spec.gripper.index]
        if spec.kind == "joint":
            groups["action_error_joints"] = body
        else:
            groups |= {"action_error_translation": body[:3], "action_error_rotation": body[3:]}
        groups["action_error_gripper"] = [] if spec.gripper is None else [spec.gripper.index]
    return {name: dimensions for name, dimensions in groups.items() if dimensions}
