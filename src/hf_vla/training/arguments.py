"""The sections of a training recipe: model, data and training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from hf_vla.actions.spec import GripperSpec
from hf_vla.data import schema


@dataclass
class LoraArguments:
    """LoRA; where nothing is said, the family's published values, see [`~hf_vla.training.lora.PUBLISHED`].

    Args:
        r (`int`, *optional*): rank.
        alpha (`int`, *optional*): scale; the update is multiplied by alpha / r.
        dropout (`float`, *optional*): dropout before the adapter.
        parts (`list[str]`, *optional*): where adapters sit, "vision" (tower) and "language" (model); both by default.
    """

    r: int | None = None
    alpha: int | None = None
    dropout: float | None = None
    parts: list[str] | None = None


@dataclass
class GridArguments:
    """The action grid to fit, see [`~hf_vla.actions.tokenizers.gaussian_grid.GaussianGridTokenizer`].

    Args:
        num_bins (`list[int]`, *optional*): bins of each axis; the published 16, 32, 8, 16, 16, 16 by default, or the
            checkpoint's where its grid is adapted.
        distribution (`str`): what the bins shall hold equal shares of.
        min_sigma (`float`): floor of the Gaussians' standard deviation.
    """

    num_bins: list[int] | None = None
    distribution: str = "gaussian"
    min_sigma: float = 0.0


@dataclass
class ModelArguments:
    """Which model to train: a new one of a preset size, a pretrained checkpoint, or a new head on a pretrained VLM.

    Args:
        family (`str`, *optional*): model type of a new model, see `hf_vla.training.builders.registry`; a checkpoint
            knows its own.
        preset (`str`, *optional*): size of a new model, "tiny" for example.
        path (`str`, *optional*): folder or Hub name of a checkpoint of this library.
        backbone (`str`, *optional*): folder or Hub name of a vision-language model that gets a new action head, in
            families that take any.
        prompt_config (`dict`, *optional*): with `backbone`, entries of the prompt that replace those known for it, see
            [`~hf_vla.models.prompts.PromptProcessor`].
        config (`dict`, *optional*): fields of the family's configuration that replace a new model's own.
        dtype (`str`): of the weights, "float32" or, with `lora`, whose adapters stay float32, "bfloat16".
        grid (`GridArguments`, *optional*): SpatialVLA's grid to fit, for a preset or with `adapt_grid`.
        adapt_grid (`bool`): fit a checkpoint's grid anew to this dataset and move its spatial embeddings along.
        lora (`LoraArguments`, *optional*): train adapters instead of the weights.
        new_embodiment (`bool`): the dataset is of a robot that is new to a checkpoint with latent actions: what this
            robot has of its own, named like the dataset, is added and trained, and nothing else, under whatever the
            checkpoint says by itself. A robot that the checkpoint knows by that name is not added, but goes
            on learning, alone as well, with the statistics of this dataset.
        head_weights (`str`, *optional*): folder of published ScaleDP weights for a new DiVLA's DiT head, see
            [`~hf_vla.models.divla.scale_dp.load_scale_dp`].
    """

    family: str | None = None
    preset: str | None = None
    path: str | None = None
    backbone: str | None = None
    prompt_config: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    dtype: str = "float32"
    grid: GridArguments | None = None
    adapt_grid: bool = False
    lora: LoraArguments | None = None
    new_embodiment: bool = False
    head_weights: str | None = None

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"Expected model.dtype float32 or bfloat16, came {self.dtype!r}.")
        sources = {name: getattr(self, name) for name in ("preset", "path", "backbone")}
        if sum(source is not None for source in sources.values()) != 1:
            came = ", ".join(f"{name}={source!r}" for name, source in sources.items())
            raise ValueError(f"Expected one of model.preset, model.path and model.backbone, came {came}.")
        if self.prompt_config and self.backbone is None:
            raise ValueError("model.prompt_config is the prompt of a model.backbone: leave it out, or name that.")
        if self.path is None and self.family is None:
            raise ValueError("A new model is of a family: give model.family, such as spatialvla or tinyvla.")
        if self.preset is not None and (self.adapt_grid or self.lora is not None):
            raise ValueError(
                "model.adapt_grid and model.lora build on pretrained weights: give model.path or model.backbone, no "
                "model.preset."
            )
        if self.path is not None and self.grid is not None and not self.adapt_grid:
            raise ValueError("A checkpoint keeps its own grid: leave model.grid out, or set model.adapt_grid: true.")
        if self.path is not None and self.config:
            raise ValueError("A checkpoint keeps its own configuration: leave model.config out.")
        if self.path is not None and self.head_weights:
            raise ValueError("A checkpoint keeps its own action head: leave model.head_weights out.")
        if self.new_embodiment and (self.path is None or self.lora is not None):
            raise ValueError(
                "model.new_embodiment adds to a checkpoint what a robot has of its own, and trains that alone: give "
                "model.path, and no model.lora."
            )


@dataclass
class CameraArguments:
    """A camera to look through and its calibration.

    Args:
        name (`str`): with or without `observation.images.`.
        fovy (`float`, *optional*): vertical field of view in degrees, of square pixels around the image's centre.
        intrinsics (`list`, *optional*): 3 x 3 pinhole matrix in pixels of the recorded image, instead of `fovy`.
    """

    name: str
    fovy: float | None = None
    intrinsics: list[list[float | int]] | None = None

    def __post_init__(self):
        if self.fovy is not None and self.intrinsics is not None:
            raise ValueError("Expected fovy or intrinsics of a camera, came both.")
        if self.fovy is not None and not 0 < self.fovy < 180:
            raise ValueError(f"Expected a camera's fovy between 0 and 180 degrees, came {self.fovy}.")


@dataclass
class ActionArguments:
    """What the actions mean, see [`~hf_vla.actions.spec.ActionSpec`]; names and rate come from the dataset."""

    kind: str
    rotation: str | None = None
    frame: str | None = None
    gripper: GripperSpec | None = None


@dataclass
class StateArguments:
    """What the robot's state means, see [`~hf_vla.actions.spec.StateSpec`]; names come from the dataset."""

    rotation: str | None = None
    frame: str | None = None


@dataclass
class DataArguments:
    """The dataset.

    Args:
        source (`str`): folder or Hub name of a LeRobot dataset.
        cameras (`list[CameraArguments]`): the cameras to look through, in the order in which the model sees them.
        action (`ActionArguments`): what the actions mean.
        state (`StateArguments`, *optional*): what the robot's state means; without it the model sees no state.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        unnorm_key (`str`, *optional*): the dataset's name in the checkpoint; the last part of `source` by default.
        chunk_size (`int`): actions that one prediction holds.
        eval_episodes (`list[int]`): episodes kept from training, for evaluation.
        reasoning (`str`, *optional*): column of texts that the model is to say before it acts, "subtask" for example;
            a row without one trains the action head alone. By default nothing is said; a model that would still say
            something from its own training is made to act without a word, unless `model.new_embodiment` freezes it.
        camera_dropout (`float`): probability, below 1, with which each of several cameras is withheld from a training
            sample, though never all of them: so a model learns to act when one is missing.
    """

    source: str
    cameras: list[CameraArguments]
    action: ActionArguments
    state: StateArguments | None = None
    revision: str | None = None
    unnorm_key: str | None = None
    chunk_size: int = 4
    eval_episodes: list[int] = field(default_factory=list)
    reasoning: str | None = None
    camera_dropout: float = 0.0

    def __post_init__(self):
        names = [schema.camera_key(camera.name) for camera in self.cameras]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Expected data.cameras to name one camera or more, each once, came {names}.")
        if not 0 <= self.camera_dropout < 1 or (self.camera_dropout and len(names) == 1):
            raise ValueError(
                f"Expected data.camera_dropout from 0 to below 1, and 0 for one camera alone, came "
                f"{self.camera_dropout} for {names}."
            )
        self.unnorm_key = self.unnorm_key or Path(self.source).name


@dataclass
class VLATrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with other defaults.

    Args:
        eval_action_samples (`int`): frames, evenly spread over the held-out episodes, on which an evaluation predicts
            actions and compares them with the recorded ones.
        full_learning_rate (`float`, *optional*): above 0; with `model.lora`, of what is trained in full beside the
            adapters (action head, projector), whose own is `learning_rate`; the same for both by default.
        ddp_find_unused_parameters (`bool`, *optional*): with activation checkpointing true by default, as it is
            without: backbones have weights that no loss reaches.
        resume_from_checkpoint (`bool` or `str`, *optional*): true goes on from the last complete checkpoint in
            `output_dir`, if there is one; a folder from that one.
    """

    output_dir: str = "outputs/train"
    eval_action_samples: int = 64
    full_learning_rate: float | None = None
    resume_from_checkpoint: bool | str | None = None
    remove_unused_columns: bool = False  # the collator, not the model, knows which columns it needs
    prediction_loss_only: bool = True  # logits over the vocabulary would fill the memory
    logging_nan_inf_filter: bool = False  # a loss of NaN must show
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)  # else torch only warns

    def __post_init__(self):
        super().__post_init__()
        if self.full_learning_rate is not None and self.full_learning_rate <= 0:
            raise ValueError(
                f"Expected training.full_learning_rate above 0, came {self.full_learning_rate}; leave it out to train "
                "everything at training.learning_rate."
            )
        if self.activation_checkpointing and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True
