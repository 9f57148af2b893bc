from types import SimpleNamespace

import pytest
import torch

from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.modeling_tinyvla import TinyVLAForActionPrediction
from hf_vla.models.tinyvla.processing_tinyvla import TinyVLAProcessor

# Cheap, and it starts from no noise.
HEAD = {"type": "regression"}


@pytest.fixture(scope="session")
def make_config(backbones, robot):
    """Builds a configuration around one of the backbones."""

    def make(backbone="llava_siglip", **options):
        chosen = backbones[backbone]
        readout = {"readout_token_id": len(chosen.processor.tokenizer)}
        return TinyVLAConfig(
            **{"backbone_config": chosen.config, "head_config": HEAD, **robot.sizes, **readout, **options}
        )

    return make


@pytest.fixture(scope="session")
def make_model(make_config):
    """Builds an untrained model, repeatable, with weights large enough for every input to matter."""

    def make(backbone="llava_siglip", **options):
        torch.manual_seed(0)
        model = TinyVLAForActionPrediction(make_config(backbone, **options)).eval()
        with torch.no_grad():
            for parameter in model.backbone.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5.0)
                if not parameter.any() and parameter.ndim > 1:  # Gemma 3's projector, to which all images are alike
                    parameter.normal_(0.0, 0.1)
        return model

    return make


@pytest.fixture(scope="session")
def make_processor(make_config, backbones, robot):
    """Builds a processor for one of the backbones and a robot with two cameras."""

    def make(backbone="llava_siglip", vlm=None, prompt_config=None, **options):
        chosen = backbones[backbone]
        return TinyVLAProcessor.from_backbone(
            chosen.processor if vlm is None else vlm,
            make_config(backbone, **options),
            *robot.processor,
            {**(chosen.prompt or {}), **(prompt_config or {})} or None,
        )

    return make


@pytest.fixture
def make_system(backbone, make_model, make_processor):
    """Builds a model and its processor, for every backbone."""

    def make(**options):
        model, processor = make_model(backbone, **options), make_processor(backbone, **options)
        return SimpleNamespace(name=backbone, model=model, processor=processor)

    return make


@pytest.fixture
def system(make_system):
    """A model and its processor, for every backbone."""
    return make_system()
