import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import PI0Config

from hf_vla.models.pi0_vla.configuration_pi0_vla import PI0VLAConfig
from hf_vla.models.pi0_vla.modeling_pi0_vla import PI0VLAForActionPrediction


def test_base_has_the_published_sizes():
    config = PI0VLAConfig.from_preset("base")
    theirs = PI0Config().to_dict() | {"model_type": "pi0_vla", "architectures": ["PI0VLAForActionPrediction"]}
    assert config.to_dict() == theirs
    with torch.device("meta"):
        model = PI0VLAForActionPrediction(config)
    embeddings = 257152 * 1024  # the action expert's, which nothing reads
    assert sum(p.numel() for p in model.parameters()) - embeddings == 3_238_048_528  # the paper: "3.3 B"


def test_presets_take_overrides():
    assert PI0VLAConfig.from_preset("tiny", chunk_size=8).chunk_size == 8
    with pytest.raises(ValueError, match="No pi0 preset 'large'; there are \\['base', 'tiny'\\]"):
        PI0VLAConfig.from_preset("large")


def test_near_misses_of_a_name_are_refused():
    with pytest.raises(ValueError, match="did you mean 'chunk_size'"):
        PI0VLAConfig(chunk_sise=8)


@pytest.mark.parametrize("name", ["chunk_size", "max_state_dim", "max_action_dim", "num_inference_steps"])
def test_sizes_are_positive(name):
    with pytest.raises(StrictDataclassClassValidationError, match=f"Expected {name} of 1 or more, got 0"):
        PI0VLAConfig(**{name: 0})


@pytest.mark.parametrize("name", ["num_hidden_layers", "num_key_value_heads", "head_dim"])
def test_expert_fits_the_cache(name):
    expert = PI0VLAConfig.from_preset("tiny").dit_config.to_dict()
    with pytest.raises(
        StrictDataclassClassValidationError, match=f"dit_config.{name} equal to vlm_config.text_config.{name}"
    ):
        PI0VLAConfig.from_preset("tiny", dit_config=expert | {name: expert[name] * 2})
