from abc import ABC, abstractmethod
from pathlib import Path

from torch import nn

from lerobot.configs.policies import PreTrainedConfig


class PreTrainedPolicy(nn.Module, ABC):
    config_class: None
    name: None

    def __init__(self, config, *inputs, **kwargs):
        super().__init__()
        assert isinstance(config, PreTrainedConfig)
        self.config = config

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for attribute in ("config_class", "name"):
            if not getattr(cls, attribute, None):
                raise TypeError(f"Class {cls.__name__} must define {attribute!r}")

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._save_pretrained(Path(folder))

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        raise NotImplementedError("LeRobot's own loads one model.safetensors; a policy of several files has its own.")

    @abstractmethod
    def get_optim_params(self): ...

    @abstractmethod
    def reset(self): ...

    @abstractmethod
    def forward(self, batch): ...

    @abstractmethod
    def predict_action_chunk(self, batch, **kwargs): ...

    @abstractmethod
    def select_action(self, batch, **kwargs): ...
