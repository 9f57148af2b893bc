import numpy as np
import pytest
import torch

from hf_vla.models.pi0_vla.configuration_pi0_vla import PI0VLAConfig
from hf_vla.models.pi0_vla.modeling_pi0_vla import PI0VLAForActionPrediction
from hf_vla.models.pi0_vla.processing_pi0_vla import PI0VLAProcessor

MEAN_STD = {"mode": "mean_std", "convention": "lerobot"}
STATISTICS = {
    "robot": {
        "action": {"mean": [0.1] * 6 + [0.5], "std": [0.5] * 7},
        "state": {"mean": [0.2] * 5, "std": [0.4] * 5},
    }
}
ACTION_CONFIG = {"chunk_size": 4, "normalization": MEAN_STD, "state_normalization": MEAN_STD}
CAMERAS = {"robot": [{"name": "front", "width": 80, "height": 60}, {"name": "wrist", "width": 64, "height": 64}]}


@pytest.fixture(scope="session")
def config():
    return PI0VLAConfig.from_preset("tiny")


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return PI0VLAForActionPrediction(config).eval()


@pytest.fixture(scope="session")
def processor(config):
    return PI0VLAProcessor.from_scratch(config, STATISTICS, ACTION_CONFIG, CAMERAS)


@pytest.fixture(scope="session")
def observation():
    """Two samples: the second lacks its first camera and has the longer instruction."""
    rng = np.random.default_rng(0)
    front, first_wrist, second_wrist = (
        rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((60, 80, 3), (64, 64, 3), (64, 64, 3))
    )
    return {
        "images": [{"front": front, "wrist": first_wrist}, {"front": None, "wrist": second_wrist}],
        "text": ["lift the cube", "put the lemon into the bowl on the left"],
        "state": rng.normal(size=(2, 5)).astype(np.float32),
    }


@pytest.fixture
def inputs(processor, observation):
    """A prompt batch."""
    return dict(processor(**observation))


@pytest.fixture
def batch(processor, observation):
    """A training batch; the second sample's last action is padding."""
    actions = np.random.default_rng(1).normal(size=(2, 4, 7)).astype(np.float32)
    mask = np.array([[True] * 4, [True] * 3 + [False]])
    return dict(processor(**observation, actions=actions, action_mask=mask))


@pytest.fixture
def noise(config):
    return torch.randn(2, config.chunk_size, config.max_action_dim, generator=torch.Generator().manual_seed(2))
