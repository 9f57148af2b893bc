"""A hf_vla checkpoint behind LeRobot's interface of policies."""

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy

from hf_vla.data.collator import VLACollator
from hf_vla.data.schema import PAD_SUFFIX, TASK
from hf_vla.models.loading import load_checkpoint
from hf_vla.policy import Policy, predict_chunks
from lerobot_policy_hf_vla.configuration_hf_vla import ACTION, IMAGES, STATE, HfVlaConfig

CHECKPOINT = "hf_vla"  # folder of the hf_vla checkpoint in a LeRobot one: both have a config.json


class HfVlaPolicy(PreTrainedPolicy):
    """Trains and executes a hf_vla checkpoint; robot units go in and come out.

    Batches are LeRobot's: pictures `(B, 3, H, W)` float32 in [0, 1], `observation.state` `(B, S)`, `task` a list of
    text. Each row of a batch is a robot of its own, with its own queue of actions; all of them are predicted for at
    once.

    Args:
        config ([`HfVlaConfig`]): names the checkpoint.
        folder (`str` or `Path`, *optional*): the hf_vla checkpoint, where it is another than `config.checkpoint`.
        kwargs: LeRobot's `dataset_stats` and `dataset_meta`, which nobody needs: statistics are the checkpoint's.

    Raises:
        ValueError: there is no checkpoint, or it is of another robot, or an adapter.
    """

    config_class = HfVlaConfig
    name = "hf_vla"

    def __init__(self, config: HfVlaConfig, folder: str | Path | None = None, **kwargs: Any):
        super().__init__(config)
        folder = folder or config.checkpoint
        if folder is None:
            raise ValueError("Nothing to start from: give --policy.checkpoint, a folder or Hub name of hf_vla.")
        if config.chunk_size is None:
            config.read(folder)
        config.validate_features()
        self.model, self.processor = load_checkpoint(folder)
        if getattr(self.model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"{str(folder)!r} is an adapter: merge it into its base model first (PeftModel.merge_and_unload), as "
                "hf_vla's docs/finetuning.md shows; LeRobot would save it without."
            )
        codec = self.processor.action_codec
        own, given = codec.normalizer(config.unnorm_key).action_dim, config.action_feature.shape[-1]
        if (own, codec.chunk_size) != (given, config.chunk_size):
            raise ValueError(
                f"This checkpoint predicts {codec.chunk_size} actions of {own} numbers, expected were "
                f"{config.chunk_size} of {given}: use a checkpoint made for this robot."
            )
        names = [camera.name for camera in self.processor.camera_specs(config.unnorm_key) if camera.name is not None]
        self._cameras = {IMAGES + name: config.camera_key(name) for name in names}
        self._robots: list[_Robot] = []

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        force_download: bool = False,
        resume_download: bool | None = None,
        proxies: dict | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> "HfVlaPolicy":
        """Load what `save_pretrained` saved, or a plain hf_vla checkpoint; missing weights are always an error.

        Arguments are those of LeRobot's `PreTrainedPolicy.from_pretrained`.
        """
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            options = {"token": token, "cache_dir": cache_dir, "revision": revision}
            options |= {"local_files_only": local_files_only, "force_download": force_download}
            folder = Path(snapshot_download(str(pretrained_name_or_path), **options))
        saved = (folder / CHECKPOINT).is_dir()
        if config is None:
            config = PreTrainedConfig.from_pretrained(folder) if saved else HfVlaConfig(checkpoint=str(folder))
        policy = cls(config, folder=folder / CHECKPOINT if saved else folder, **kwargs)
        policy.to(config.device)
        return policy.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        self.config._save_pretrained(save_directory)
        self.model.save_pretrained(save_directory / CHECKPOINT)
        self.processor.save_pretrained(save_directory / CHECKPOINT)

    def get_optim_params(self) -> list[torch.nn.Parameter]:
        """Return the parameters to train."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def reset(self) -> None:
        """Forget all robots, as episodes start."""
        self._robots = []

    def forward(self, batch: dict[str, Any], reduction: str = "mean") -> tuple[torch.Tensor, dict[str, float]]:
        """Return the loss of a batch, and numbers to log.

        Raises:
            ValueError: the batch lacks something that the checkpoint needs, or another reduction is asked for.
        """
        if reduction != "mean":
            raise ValueError(f"Expected the reduction 'mean', came {reduction!r}: losses are not weighted by sample.")
        items = self._rows(batch, (ACTION, ACTION + PAD_SUFFIX))
        cameras = [key for key in items[0] if key.startswith(IMAGES) and not key.endswith(PAD_SUFFIX)]
        collate = VLACollator(self.processor, self.config.unnorm_key, cameras, self.processor.action_codec.takes_state)
        loss = self.model(**collate(items).to(self.model.device)).loss
        return loss, {"loss": loss.item()}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **kwargs: Any) -> torch.Tensor:
        """Predict `(B, chunk_size, action_dim)`, robot units.

        Raises:
            ValueError: the batch lacks something that the checkpoint needs, or there are options.
        """
        _refuse(kwargs)
        observations = self._rows(batch)
        robots = self._robots_for(len(observations))
        return self._tensor(predict_chunks([robot.policy for robot in robots], observations))

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> torch.Tensor:
        """Return the next action of every robot, `(B, action_dim)`, robot units; predicts for those that need it.

        Raises:
            ValueError: the batch lacks something that the checkpoint needs, or there are options.
        """
        _refuse(kwargs)
        observations = self._rows(batch)
        robots, due = self._robots_for(len(observations)), []
        for robot, observation in zip(robots, observations, strict=True):
            if robot.sees(observation):
                due.append((robot, observation))
        if due:
            chunks = predict_chunks([robot.policy for robot, _ in due], [observation for _, observation in due])
            for (robot, _), chunk in zip(due, chunks, strict=True):
                robot.queue.extend(robot.policy.execute(chunk))
        return self._tensor([robot.queue.popleft() for robot in robots])

    def _rows(self, batch, further=()):
        """One dictionary for every row, with the checkpoint's names of cameras."""
        tasks = batch.get(TASK)
        if isinstance(tasks, str) or tasks is None:
            raise ValueError(f"Expected {TASK!r}, a list with the instruction of every row, came {tasks!r}.")
        there = [key for key in batch if key.startswith("observation.image") and not key.endswith(PAD_SUFFIX)]
        cameras = self._cameras or dict(zip([IMAGES + "image"], there, strict=False))
        missing = [key for key in (*cameras.values(), *further) if key not in batch]
        if self.processor.action_codec.takes_state and STATE not in batch:
            missing.append(STATE)
        if missing or (not self._cameras and len(there) != 1):
            raise ValueError(
                f"This checkpoint needs {missing or 'exactly one picture'}; the batch has {sorted(batch)}. Say what "
                'the cameras are called there: --policy.camera_map=\'{"its own name": "the name there"}\'.'
            )
        names = {own + pad: key + pad for own, key in cameras.items() for pad in ("", PAD_SUFFIX)}
        names |= {key: key for key in (STATE, *further)}
        columns = {own: batch[key].detach().cpu() for own, key in names.items() if key in batch}
        return [
            {TASK: task, **{key: column[row] for key, column in columns.items()}} for row, task in enumerate(tasks)
        ]

    def _robots_for(self, count):
        if len(self._robots) != count:
            self._robots = [_Robot(self, row) for row in range(count)]
        return self._robots

    def _tensor(self, rows):
        return torch.from_numpy(np.stack(rows)).to(self.model.device)


class _Robot:
    """One row of the batches: its controller, and the actions that it still has to execute."""

    def __init__(self, policy: HfVlaPolicy, row: int):
        config = policy.config
        self.policy = Policy(
            policy.model,
            policy.processor,
            config.unnorm_key,
            n_action_steps=config.n_action_steps,
            ensemble_coefficient=config.ensemble_coefficient,
            seed=None if config.seed is None else config.seed + row,
            num_inference_steps=config.num_inference_steps,
            reasoning_interval=config.reasoning_interval,
            max_reasoning_tokens=config.max_reasoning_tokens,
        )
        self.queue: deque[np.ndarray] = deque()
        self.task: str | None = None

    def sees(self, observation: dict[str, Any]) -> bool:
        """Take note of a control step; return whether a prediction is due."""
        if observation[TASK] != self.task:
            self.policy.reset()
            self.queue.clear()
            self.task = observation[TASK]
        if self.queue and self.policy.looks_at_every_step:
            self.policy.remember(observation)
        return not self.queue


def _refuse(options):
    if given := {name for name, value in options.items() if value is not None}:
        raise ValueError(f"This policy takes no {sorted(given)}: leave them out (a seed is --policy.seed).")
