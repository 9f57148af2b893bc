"""An average of the weights over the training, which often acts better than the last ones."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

logger = logging.getLogger(__name__)

TRAINING_WEIGHTS = "training_weights.safetensors"


def check_average(arguments) -> None:
    """Raise where `arguments.ema_decay` cannot be meant.

    Raises:
        ValueError: it is not between 0 and 1, or the weights will be cut into shards.
    """
    if arguments.ema_decay is None:
        return
    if not 0 < arguments.ema_decay < 1:
        raise ValueError(f"Expected training.ema_decay between 0 and 1, such as 0.999, came {arguments.ema_decay}.")
    if arguments.sharded:
        raise ValueError(
            "training.ema_decay averages whole float32 weights, which FSDP and DeepSpeed cut into shards or keep out "
            "of sight: leave it out, or train with plain data parallelism."
        )


class WeightAverage(TrainerCallback, ExportableState):
    """Exponential moving average of the weights that are trained, updated after each optimizer step.

    At step n the average keeps min(`decay`, (1 + n) / (10 + n)) of itself, so that it soon forgets the first weights.
    Frozen weights have none. The checkpoints of a run hold the average in place of the weights, so whoever loads one
    has what was evaluated; `training_weights.safetensors` beside it has what the optimizer goes on with.

    Args:
        decay (`float`): between 0 and 1.

    Source: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging (1992); the decay of the first
    steps is that of diffusers' `EMAModel`.
    """

    def __init__(self, decay: float):
        self.decay, self.average, self._in_place = decay, None, False

    def start(self, model: nn.Module, checkpoint: str | None = None) -> None:
        """Begin with the model's weights, or go on from a checkpoint, whose average the model has just loaded.

        Args:
            model (`nn.Module`): its trained weights become those of training.
            checkpoint (`str`, *optional*): folder.

        Raises:
            ValueError: the checkpoint has no training weights, or others than the model's.
        """
        from diffusers.training_utils import EMAModel

        self.parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.average = EMAModel(self.parameters.values(), self.decay, foreach=True)
        if checkpoint is not None:
            self.average.optimization_step = load_training_weights(self.parameters, Path(checkpoint))

    def on_step_end(self, args, state, control, **kwargs):
        """Draw the average towards the weights."""
        self.average.step(self.parameters.values())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the averaged weights for a while; the same memory changes hands, nothing is copied."""
        if self.average is None or self._in_place:  # before a training, or within another's while
            yield
            return
        self._in_place = True
        self._swap()
        try:
            yield
        finally:
            self._swap()
            self._in_place = False

    def _swap(self):
        for parameter, shadow in zip(self.parameters.values(), self.average.shadow_params, strict=True):
            parameter.data, shadow.data = shadow.data, parameter.data

    def follow(self) -> None:
        """Forget the average for the weights that the model has now."""
        torch._foreach_copy_(self.average.shadow_params, [each.data for each in self.parameters.values()])

    def save_training_weights(self, folder: str | Path) -> None:
        """Save what the optimizer goes on with, and how often the average was updated."""
        tensors = {name: parameter.detach().contiguous() for name, parameter in self.parameters.items()}
        metadata = {"format": "pt", "num_updates": str(self.average.optimization_step)}
        save_file(tensors, Path(folder, TRAINING_WEIGHTS), metadata)

    def state(self) -> dict:
        """What trainer_state.json says of it."""
        num_updates = 0 if self.average is None else self.average.optimization_step
        return {"args": {"decay": self.decay}, "attributes": {"num_updates": num_updates}}


def refuse_average(checkpoint: str | Path) -> None:
    """Raise where a run without an average would go on from a checkpoint that holds one in place of its weights.

    Raises:
        ValueError: it would.
    """
    if Path(checkpoint, TRAINING_WEIGHTS).is_file():
        raise ValueError(
            f"{checkpoint} holds an average of the weights: set training.ema_decay to go on with it, or start a new "
            "run with model.path set to it."
        )


@torch.no_grad()
def load_training_weights(parameters: dict[str, nn.Parameter], checkpoint: Path) -> int:
    """Fill parameters from a checkpoint's training weights.

    Returns:
        `int`: how often the average had been updated.

    Raises:
        ValueError: the file is missing or broken, or its weights are others.
    """
    path = checkpoint / TRAINING_WEIGHTS
    if not path.is_file():
        raise ValueError(
            f"{checkpoint} has no {TRAINING_WEIGHTS}: its run kept no average of the weights. Leave "
            "training.ema_decay out to go on with it, or start a new run with model.path set to it."
        )
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
            if shapes != wanted:
                wrong = sorted({name for name, _ in shapes.items() ^ wanted.items()})
                raise ValueError(f"{path} is of another model: it differs in {len(wrong)} weights, {wrong[:5]}.")
            for name, parameter in parameters.items():
                parameter.copy_(file.get_tensor(name))
            return int(file.metadata()["num_updates"])
    except SafetensorError as error:
        raise ValueError(f"{path} is broken ({error}): resume from another checkpoint.") from error
