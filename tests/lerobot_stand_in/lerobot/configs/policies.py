import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from lerobot.configs.types import FeatureType, PolicyFeature


@dataclass
class PreTrainedConfig(ABC):
    n_obs_steps: int = 1
    input_features: dict[str, PolicyFeature] | None = field(default_factory=dict)
    output_features: dict[str, PolicyFeature] | None = field(default_factory=dict)
    device: str | None = None
    use_amp: bool = False
    use_peft: bool = False
    push_to_hub: bool = True
    repo_id: str | None = None
    private: bool | None = None
    tags: list[str] | None = None
    license: str | None = None
    pretrained_path: Path | None = None

    _choices = {}  # noqa: RUF012 (no field: it has no annotation)

    @classmethod
    def register_subclass(cls, name):
        def register(subclass):
            assert issubclass(subclass, PreTrainedConfig)
            cls._choices[name] = subclass
            return subclass

        return register

    @classmethod
    def get_choice_class(cls, name):
        return cls._choices[name]

    @classmethod
    def get_known_choices(cls):
        return dict(cls._choices)

    def __post_init__(self):
        self.device = self.device or "cpu"

    @property
    def type(self):
        return next(name for name, kind in self._choices.items() if kind is type(self))

    @property
    @abstractmethod
    def observation_delta_indices(self): ...

    @property
    @abstractmethod
    def action_delta_indices(self): ...

    @property
    @abstractmethod
    def reward_delta_indices(self): ...

    @abstractmethod
    def get_optimizer_preset(self): ...

    @abstractmethod
    def get_scheduler_preset(self): ...

    @abstractmethod
    def validate_features(self): ...

    @property
    def action_feature(self):
        features = (self.output_features or {}).items()
        return next((each for name, each in features if each.type is FeatureType.ACTION and name == "action"), None)

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._save_pretrained(Path(folder))

    def _save_pretrained(self, folder):
        (folder / "config.json").write_text(json.dumps({"type": self.type, **asdict(self)}))

    @classmethod
    def from_pretrained(cls, folder, **overrides):
        """Read a configuration; `overrides` are what LeRobot parses from `--policy.name=value`."""
        saved = json.loads((Path(folder) / "config.json").read_text())
        kind = cls.get_choice_class(saved.pop("type"))
        assert {*saved} == {each.name for each in fields(kind)}
        for name in ("input_features", "output_features"):
            features = {
                key: PolicyFeature(FeatureType(each["type"]), tuple(each["shape"]))
                for key, each in saved[name].items()
            }
            saved[name] = features
        return kind(**{**saved, **overrides})
