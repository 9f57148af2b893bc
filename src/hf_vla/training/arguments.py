"""The sections model and training of a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import get_scheduler

from hf_vla.training.ema import check_average
from hf_vla.training.optimization import GROUPS

TUNES = ("full", "head")
QUANTIZATIONS = (None, "4bit", "8bit")


@dataclass
class LoraArguments:
    """LoRA; where nothing is said, the family's published values, see [`~hf_vla.training.lora.PUBLISHED`].

    Args:
        r (`int`, *optional*): rank.
        alpha (`int`, *optional*): scale; the update is multiplied by alpha / r.
        dropout (`float`, *optional*): dropout before the adapter.
        parts (`list[str]`, *optional*): where adapters sit, "vision" (tower), "language" (model) or both.
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
        action_tokenizer (`dict`, *optional*): what a SpatialVLA of a preset emits instead of the grid's tokens: the
            `type`, "uniform" or "fast", and its options, such as `{"type": "uniform", "n_bins": 256}` (RT-2's with
            `"terminate": true`, OpenVLA's with `"convention": "openvla"`) or `{"type": "fast", "vocab_size": 1024}`,
            which is fitted to the dataset, see [`~hf_vla.actions.tokenizers.registry`].
        depth_model (`str`, *optional*): folder or Hub name of the ZoeDepth that tells a SpatialVLA of a preset how far
            things are, `Intel/zoedepth-nyu-kitti` for example, or what `scripts/train_depth.py` wrote; without it, an
            untrained one, or the robot's own depth with `config: {use_vision_zoe: false, use_ego3d: true}`.
        vision_model (`str`, *optional*): folder or Hub name of the SigLIP that a SpatialVLA of a preset begins to see
            with, `google/siglip-base-patch16-224` for example; without it, an untrained one.
        adapt_grid (`bool`): fit a checkpoint's grid anew to this dataset and move its spatial embeddings along.
        decoding (`str`, *optional*): with `path`, "discrete_diffusion": a SpatialVLA that generates token by token
            learns to fill in a chunk at once, see
            [`~hf_vla.models.spatialvla.modeling_spatialvla.SpatialVLAForConditionalGeneration.diffuse_actions`]; a new
            model's is a field of `config`.
        lora (`LoraArguments`, *optional*): train adapters instead of the weights.
        tune (`str`): without `lora`, what is trained: "full", everything, or "head", only what makes actions of what
            the frozen backbone sees, see [`~hf_vla.training.optimization.HEAD`].
        quantization (`str`, *optional*): with `path` and `lora`, "4bit" (QLoRA) or "8bit": keep the frozen weights of
            a checkpoint so, by bitsandbytes.
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
    action_tokenizer: dict[str, Any] | None = None
    depth_model: str | None = None
    vision_model: str | None = None
    adapt_grid: bool = False
    decoding: str | None = None
    lora: LoraArguments | None = None
    tune: str = "full"
    quantization: str | None = None
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
        for name, choices in (("tune", TUNES), ("quantization", QUANTIZATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"Expected model.{name} among {choices}, came {getattr(self, name)!r}.")
        if self.tune == "head" and (self.lora is not None or self.new_embodiment):
            raise ValueError(
                "model.tune: head freezes all but the action head, model.lora and model.new_embodiment choose by "
                "themselves what is trained: give one of them."
            )
        if self.quantization is not None and (self.path is None or self.lora is None):
            raise ValueError(
                "model.quantization is of the frozen weights of a checkpoint under adapters: give model.path and "
                "model.lora, too. For a new head on a VLM, train or save the full model first."
            )
        if self.decoding is not None and (self.path is None or self.quantization is not None):
            raise ValueError(
                "model.decoding is of a checkpoint that decodes otherwise, in its full precision: give model.path and "
                "no model.quantization; a new model's is model.config.decoding."
            )
        if self.action_tokenizer is not None and self.grid is not None:
            raise ValueError("A model emits tokens of one kind: give model.grid or model.action_tokenizer, not both.")
        if self.path is not None and self.action_tokenizer is not None:
            raise ValueError("A checkpoint keeps its own action tokenizer: leave model.action_tokenizer out.")
        for name in ("depth_model", "vision_model"):
            if self.path is not None and getattr(self, name) is not None:
                raise ValueError(f"A checkpoint keeps its own {name.replace('_', ' ')}: leave model.{name} out.")
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
class VLATrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with other defaults.

    Args:
        eval_action_samples (`int`): frames of each dataset, evenly spread over its held-out episodes, on which an
            evaluation predicts actions and compares them with the recorded ones; of a stream, its first.
        learning_rates (`dict[str, float]`, *optional*): above 0, of groups of parameters that do not learn at
            `learning_rate`: "backbone", "lora" (adapters), "head" (action head, projectors, ...) and "embeddings", see
            [`~hf_vla.training.optimization.parameter_groups`].
        ema_decay (`float`, *optional*): between 0 and 1, 0.999 for example: keep an average of the weights, which
            evaluations use and checkpoints hold, see [`~hf_vla.training.ema.WeightAverage`].
        estimate_memory (`bool`): log what the training will take before it starts, see
            [`~hf_vla.training.memory.estimate_memory`].
        ddp_find_unused_parameters (`bool`, *optional*): with activation checkpointing true by default, as it is
            without: backbones have weights that no loss reaches.
        resume_from_checkpoint (`bool` or `str`, *optional*): true goes on from the last complete checkpoint in
            `output_dir`, if there is one; a folder from that one.
    """

    output_dir: str = "outputs/train"
    eval_action_samples: int = 64
    learning_rates: dict[str, float | int] | None = None
    ema_decay: float | None = None
    estimate_memory: bool = True
    resume_from_checkpoint: bool | str | None = None
    remove_unused_columns: bool = False  # the collator, not the model, knows which columns it needs
    prediction_loss_only: bool = True  # logits over the vocabulary would fill the memory
    logging_nan_inf_filter: bool = False  # a loss of NaN must show
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)  # else torch only warns

    def __post_init__(self):
        if self.greater_is_better is None and "action_error" in (self.metric_for_best_model or ""):
            self.greater_is_better = False  # transformers takes for a loss only what is called one
        super().__post_init__()
        if self.label_smoothing_factor:
            raise ValueError("training.label_smoothing_factor: the models have losses of their own, leave it out.")
        if self.train_sampling_strategy != "random":
            raise ValueError(
                "training.train_sampling_strategy: the order of the rows is that of data.shuffle and data.balance, "
                "leave it out."
            )
        for name, rate in (self.learning_rates or {}).items():
            if name not in GROUPS:
                hint = "".join(f" Did you mean {close}?" for close in get_close_matches(name, GROUPS, n=1))
                raise ValueError(f"Expected training.learning_rates of some of {GROUPS}, came {name!r}.{hint}")
            if not rate > 0:
                raise ValueError(
                    f"Expected training.learning_rates.{name} above 0, came {rate}; leave it out to train that at "
                    "training.learning_rate."
                )
        check_average(self)
        check_trackers(self.report_to)
        self._check_schedule()
        if self.activation_checkpointing and self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True

    @property
    def sharded(self) -> bool:
        """Whether FSDP or DeepSpeed cut the weights; `accelerate launch` says so in its processes' environment."""
        names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
        return bool(self.fsdp or self.deepspeed) or any(parse_flag_from_env(name) for name in names)

    def _check_schedule(self):
        """Make the schedule of an optimizer that has nothing to learn."""
        kind, options = self.lr_scheduler_type.value, self.lr_scheduler_kwargs
        optimizer = torch.optim.SGD([torch.zeros(())], lr=self.learning_rate)
        try:
            get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=2, scheduler_specific_kwargs=options)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"training.lr_scheduler_kwargs {options} do not suit training.lr_scheduler_type {kind}: {error}"
            ) from error

    def __getstate__(self):
        """Leave the token out where arguments are pickled: the Trainer does so beside the weights that it pushes."""
        return {**self.__dict__, "hub_token": None}


def check_trackers(names: Sequence[str]) -> None:
    """Raise before anything is loaded where `training.report_to` names a tracker that will not start.

    Args:
        names (`Sequence[str]`): as in `TrainingArguments.report_to`.

    Raises:
        ValueError: one is unknown, or not installed.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            close = get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {sorted(INTEGRATION_TO_CALLBACK)}."
            raise ValueError(f"training.report_to: no tracker is called {name!r}; {hint}")
        try:
            INTEGRATION_TO_CALLBACK[name]()  # looks for its package and imports it
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"training.report_to: {name} is not installed: `pip install {name.replace('_', '-')}`, or leave it "
                f"out. ({error})"
            ) from error
