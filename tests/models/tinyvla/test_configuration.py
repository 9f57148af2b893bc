import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig

from hf_vla.models.backbones import num_image_tokens
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.models.tinyvla.modeling_tinyvla import TinyVLAForActionPrediction
from hf_vla.training.lora import add_lora

# millions of parameters without adapters, and what the published LoRA trains, all of it and the adapters alone, in
# percent of the parameters with adapters: the published table
PUBLISHED = {"s": (421.8, 23.2, 6.9), "b": (740.4, 17.2, 6.7), "h": (1317.0, 12.1, 4.5)}


@pytest.fixture(scope="module", params=sorted(PUBLISHED))
def published(request):
    """A published size on the meta device, which holds no numbers."""
    with torch.device("meta"):
        return PUBLISHED[request.param], TinyVLAForActionPrediction(TinyVLAConfig.from_preset(request.param))


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_parameters_and_trainable_shares_are_the_published(published):
    (total, trainable_share, adapter_share), model = published
    base = count(model.parameters())
    assert round(base / 1e6, 1 if total < 1000 else 0) == total
    add_lora(model)
    parameters = {name: value for name, value in model.named_parameters() if "original_module" not in name}
    adapters = count(value for name, value in parameters.items() if "lora_" in name)
    trainable = count(value for value in parameters.values() if value.requires_grad)
    assert count(parameters.values()) == base + adapters
    assert round(100 * trainable / (base + adapters), 1) == trainable_share
    assert round(100 * adapters / (base + adapters), 1) == adapter_share


def test_defaults_are_the_published_sizes():
    config = TinyVLAConfig()
    assert config.to_dict() == TinyVLAConfig.from_preset("b").to_dict()
    assert (config.action_dim, config.state_dim, config.chunk_size) == (10, 7, 16)
    assert config.head_config == {"type": "diffusion"} and config.architectures == ["TinyVLAForActionPrediction"]
    backbone = config.backbone_config
    assert backbone.vision_feature_layer == -2 and backbone.vision_feature_select_strategy == "default"
    assert num_image_tokens(config.backbone_config) == backbone.image_seq_length == 576
    text = config.get_text_config()
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (1024, 24, 50304)
    assert text.use_parallel_residual and text.rope_parameters["partial_rotary_factor"] == 0.25


def test_the_class_token_is_an_image_token_where_it_is_kept():
    backbone = TinyVLAConfig().backbone_config.to_dict() | {"vision_feature_select_strategy": "full"}
    assert num_image_tokens(TinyVLAConfig(backbone_config=backbone).backbone_config) == 577


@pytest.mark.parametrize("index", [-1, 50304])
def test_the_image_token_is_in_the_vocabulary(index):
    backbone = TinyVLAConfig().backbone_config.to_dict() | {"image_token_index": index, "image_token_id": index}
    with pytest.raises(StrictDataclassClassValidationError, match=f"image token {index} does not fit a vocabulary of"):
        TinyVLAConfig(backbone_config=backbone)


def test_a_llava_that_leaves_out_the_first_token_does_so_without_a_class_token(make_config):
    backbone = make_config("llava_siglip").backbone_config.to_dict() | {"vision_feature_select_strategy": "default"}
    assert num_image_tokens(make_config(backbone_config=backbone).backbone_config) == 15


@pytest.mark.parametrize("model_type", ["llava_next", "mistral3", "llava_onevision", "blip-2", "got_ocr2"])
def test_image_tokens_that_no_configuration_tells(model_type):
    config = TinyVLAConfig()
    config.backbone_config = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=f"of a '{model_type}' does not tell how many tokens an image takes"):
        num_image_tokens(config.backbone_config)


def test_tiny_is_tiny():
    model = TinyVLAForActionPrediction(TinyVLAConfig.from_preset("tiny"))
    assert 1e6 < count(model.parameters()) < 2e6
    assert num_image_tokens(model.config.backbone_config) == model.config.backbone_config.image_seq_length == 36


@pytest.mark.parametrize("preset", ["s", "b", "h", "tiny"])
def test_round_trip(preset, tmp_path):
    config = TinyVLAConfig.from_preset(preset, num_readout_tokens=2, state_dim=None)
    config.save_pretrained(tmp_path)
    assert TinyVLAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is TinyVLAConfig and type(again.backbone_config) is type(config.backbone_config)
    assert again.state_dim is None


def test_a_preset_is_not_changed_by_its_configs():
    TinyVLAConfig.from_preset("tiny").head_config["type"] = "regression"
    TinyVLAConfig.from_preset("tiny").backbone_config.text_config.vocab_size = 9
    config = TinyVLAConfig.from_preset("tiny")
    assert config.head_config["type"] == "diffusion" and config.get_text_config().vocab_size == 320


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"No TinyVLA preset 'xl'; there are \['b', 'h', 's', 'tiny'\]"):
        TinyVLAConfig.from_preset("xl")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"action_dim": 0}, "Expected action_dim of 1 or more, got 0"),
        ({"chunk_size": 0}, "Expected chunk_size of 1 or more, got 0"),
        ({"state_dim": 0}, "Expected state_dim of 1 or more, got 0"),
        ({"num_readout_tokens": -1}, "Expected num_readout_tokens of 0 or more, got -1"),
        ({"num_readout_tokens": 61}, "readout tokens 260..320 do not fit a vocabulary of 320.*to 321"),
        ({"num_readout_tokens": 1, "readout_token_id": -1}, "readout tokens -1..-1 do not fit"),
        ({"num_readout_tokens": 2, "readout_token_id": 258}, "image token 259 is among the readout tokens 258..259"),
        ({"num_readout_tokens": 1, "readout_token_id": None}, "num_readout_tokens is 1, but no readout_token_id"),
    ],
)
def test_inconsistent_sizes(overrides, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        TinyVLAConfig.from_preset("tiny", **overrides)


@pytest.mark.parametrize(("name", "wanted"), [("chunk_sizes", "chunk_size"), ("backbone_confg", "backbone_config")])
def test_misspelt_names(name, wanted):
    with pytest.raises(ValueError, match=f"TinyVLAConfig has no '{name}'; did you mean '{wanted}'"):
        TinyVLAConfig.from_preset("tiny", **{name: 1})
