"""What LeRobot has to know of a checkpoint before it is loaded."""

from dataclasses import dataclass, field
from pathlib import Path

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.optim.optimizers import AdamWConfig

ACTION, STATE, IMAGES = "action", "observation.state", "observation.images."


@PreTrainedConfig.register_subclass("hf_vla")
@dataclass
class HfVlaConfig(PreTrainedConfig):
    """A hf_vla checkpoint, and how it is executed and trained.

    `chunk_size`, `n_obs_steps`, `cameras` and the features are read from the checkpoint, and are saved with the
    policy, so that the checkpoint itself need not stay where it was; they are no options.

    Args:
        checkpoint (`str`, *optional*): folder or Hub name of the hf_vla checkpoint to start from.
        unnorm_key (`str`, *optional*): dataset whose robot acts; may be left out where the checkpoint knows one.
        camera_map (`dict[str, str]`): the checkpoint's name of a camera -> the dataset's or robot's, or a whole key
            such as "observation.image", as some simulators have it; the same name by default.
        chunk_size (`int`, *optional*): actions that one prediction holds.
        cameras (`dict[str, list[int]]`): the checkpoint's cameras -> height and width in pixels.
        n_action_steps, ensemble_coefficient, seed, num_inference_steps, reasoning_interval, max_reasoning_tokens: see
            [`~hf_vla.policy.Policy`].
        optimizer_lr (`float`), optimizer_weight_decay (`float`), optimizer_grad_clip_norm (`float`): of AdamW.

    Raises:
        ValueError: the checkpoint knows several datasets and none is named, or a camera that is mapped is not its own.
    """

    checkpoint: str | None = None
    unnorm_key: str | None = None
    camera_map: dict[str, str] = field(default_factory=dict)
    chunk_size: int | None = None
    cameras: dict[str, list[int]] = field(default_factory=dict)
    n_action_steps: int | None = None
    ensemble_coefficient: float | None = None
    seed: int | None = None
    num_inference_steps: int | None = None
    reasoning_interval: int = 1
    max_reasoning_tokens: int | None = None
    optimizer_lr: float = 1e-4
    optimizer_weight_decay: float = 1e-6
    optimizer_grad_clip_norm: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        # LeRobot opens the dataset, which needs the chunk size, before it builds the policy
        if self.checkpoint is not None and self.chunk_size is None:
            self.read(self.checkpoint)
        elif self.chunk_size is not None:
            self._name_cameras()

    def read(self, checkpoint: str | Path) -> None:
        """Take over what a checkpoint says of itself.

        Args:
            checkpoint (`str` or `Path`): folder or Hub name of a hf_vla checkpoint.

        Raises:
            ValueError: see the class.
        """
        from hf_vla.models.loading import load_processor

        processor = load_processor(checkpoint)
        codec = processor.action_codec
        self.unnorm_key = codec.resolve_key(self.unnorm_key)
        self.chunk_size, self.n_obs_steps = codec.chunk_size, codec.n_obs_steps
        cameras = [camera for camera in processor.camera_specs(self.unnorm_key) if camera.name is not None]
        self.cameras = {camera.name: [camera.height, camera.width] for camera in cameras}
        self.input_features, self.output_features = {}, {}
        if codec.takes_state:
            size = codec.state_normalizer(self.unnorm_key).action_dim
            self.input_features[STATE] = PolicyFeature(FeatureType.STATE, (size,))
        size = codec.normalizer(self.unnorm_key).action_dim
        self.output_features[ACTION] = PolicyFeature(FeatureType.ACTION, (size,))
        self._name_cameras()

    def _name_cameras(self):
        """Call the pictures among the features as the dataset does, which may be another than at the last time."""
        if unknown := sorted({*self.camera_map} - {*self.cameras}):
            raise ValueError(f"camera_map names {unknown}; this checkpoint's cameras are {sorted(self.cameras)}.")
        others = {key: each for key, each in (self.input_features or {}).items() if each.type != FeatureType.VISUAL}
        pictures = {
            self.camera_key(name): PolicyFeature(FeatureType.VISUAL, (3, *size)) for name, size in self.cameras.items()
        }
        self.input_features = {**pictures, **others}

    def camera_key(self, name: str) -> str:
        """Return the key of one of the checkpoint's cameras in LeRobot's batches."""
        mapped = self.camera_map.get(name, name)
        return mapped if mapped.startswith("observation.") else IMAGES + mapped

    @property
    def normalization_mapping(self) -> dict[str, NormalizationMode]:
        """Nothing is normalised by LeRobot, since the checkpoint does it; no field, so that nobody can change it."""
        return {kind.value: NormalizationMode.IDENTITY for kind in FeatureType}

    @property
    def observation_delta_indices(self) -> list[int] | None:
        """Rows that the model sees, relative to the present one."""
        return None if self.n_obs_steps == 1 else list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        """Rows whose actions make a chunk."""
        if self.chunk_size is None:
            raise ValueError("Nothing to start from: give --policy.checkpoint, a folder or Hub name of hf_vla.")
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """None: no reward is learnt from."""
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        """AdamW with this configuration's numbers."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> None:
        """None: the learning rate is constant."""
        return None

    def validate_features(self) -> None:
        """Check that there is an action; the policy compares it with its checkpoint's.

        Raises:
            ValueError: there is none.
        """
        if self.action_feature is None:
            raise ValueError(f"Expected an {ACTION!r} among the features, came {sorted(self.output_features or {})}.")
