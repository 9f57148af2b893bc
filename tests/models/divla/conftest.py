from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_vla.models.divla.configuration_divla import DiVLAConfig
from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction
from hf_vla.models.divla.processing_divla import DiVLAProcessor

# Cheap, and it starts from no noise.
HEAD = {"type": "regression"}
TEXTS = ["push", "pick up the red cube"]
REASONINGS = ["reach for it", "lift"]
STATE = np.array([[0.3, 1.0], [-0.2, 2.0]])


@pytest.fixture(scope="session")
def make_config(backbones, robot):
    """Builds a configuration around one of the backbones."""

    def make(backbone="qwen2_vl", **options):
        reasoning = {"end_token_id": 1, "max_reasoning_tokens": 6}
        return DiVLAConfig(
            **{
                "backbone_config": backbones[backbone].config,
                "head_config": HEAD,
                **robot.sizes,
                **reasoning,
                **options,
            }
        )

    return make


@pytest.fixture(scope="session")
def make_model(make_config):
    """Builds an untrained model, repeatable, with weights large enough for every input to matter, FiLM's, too."""

    def make(backbone="qwen2_vl", **options):
        torch.manual_seed(0)
        model = DiVLAForActionPrediction(make_config(backbone, **options)).eval()
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5.0)
                if not parameter.any() and parameter.ndim > 1:  # Gemma 3's projector, to which all images are alike
                    parameter.normal_(0.0, 0.1)
            if model.film is not None:
                for parameter in model.film.film.parameters():
                    parameter.normal_(0.0, 0.5)
        return model

    return make


@pytest.fixture(scope="session")
def make_processor(make_config, backbones, robot):
    """Builds a processor for one of the backbones and a robot with two cameras."""

    def make(backbone="qwen2_vl", vlm=None, prompt_config=None, **options):
        chosen = backbones[backbone]
        return DiVLAProcessor.from_backbone(
            chosen.processor if vlm is None else vlm,
            make_config(backbone, **options),
            *robot.processor,
            {**(chosen.prompt or {}), **(prompt_config or {})} or None,
        )

    return make


@pytest.fixture(scope="session")
def config(make_config):
    """Of a tiny Qwen2-VL; not to be changed."""
    return make_config()


@pytest.fixture(scope="session")
def model(make_model):
    """Of that configuration, untrained; not to be changed."""
    return make_model()


@pytest.fixture(scope="session")
def processor(make_processor):
    """Of that configuration and a robot with two cameras, "front" and "wrist"."""
    return make_processor()


@pytest.fixture
def make_batch(processor, pictures, chunks):
    """Builds a batch of two samples; options replace or join what the processor is given."""

    def make(of=None, **options):
        given = {"images": pictures, "text": TEXTS, "state": STATE, "actions": chunks, "reasoning": REASONINGS}
        return (of or processor)(**given | options)

    return make


@pytest.fixture
def batch(make_batch):
    """To learn from: with actions and a reasoning."""
    return make_batch()


@pytest.fixture
def prompt(make_batch):
    """To act on: with neither."""
    return make_batch(actions=None, reasoning=None)


@pytest.fixture
def system(backbone, make_model, make_processor):
    """A model and its processor, for every backbone."""
    return SimpleNamespace(name=backbone, model=make_model(backbone), processor=make_processor(backbone))
