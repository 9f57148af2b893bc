import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig

from hf_vla.actions.heads.registry import build_action_head
from hf_vla.models.backbones import num_image_tokens
from hf_vla.models.divla.configuration_divla import DiVLAConfig
from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction
from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig
from hf_vla.training.lora import add_lora

# parameters of Qwen2-VL with its language head
BACKBONES = {"2b": 2208985600, "7b": 8291375616, "72b": 73405560320}
# of the 2B, the one that was published: millions of parameters without adapters, and what its LoRA trains, all of it
# and the adapters alone, in percent of the parameters with adapters
TOTAL, TRAINABLE_SHARE, ADAPTER_SHARE = 2312.8, 9.0, 4.8


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


@pytest.fixture(scope="module", params=sorted(BACKBONES))
def published(request):
    """A published size on the meta device, which holds no numbers."""
    with torch.device("meta"):
        return request.param, DiVLAForActionPrediction(DiVLAConfig.from_preset(request.param))


def test_sizes(published):
    size, model = published
    hidden_size = model.config.get_text_config().hidden_size
    assert count(model.backbone.parameters()) == BACKBONES[size]
    assert count(model.film.parameters()) == 6 * (hidden_size**2 + hidden_size)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (size == "2b")
    with torch.device("meta"):
        head = build_action_head({"type": "diffusion"}, hidden_size, 14, 16, 14)
    assert count(model.action_head.parameters()) == count(head.parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_parameters_and_trainable_shares_are_the_published():
    with torch.device("meta"):
        model = DiVLAForActionPrediction(DiVLAConfig())
    base = count(model.parameters())
    assert round(base / 1e6, 1) == TOTAL
    add_lora(model)
    parameters = {name: value for name, value in model.named_parameters() if "original_module" not in name}
    adapters = count(value for name, value in parameters.items() if "lora_" in name)
    trainable = count(value for value in parameters.values() if value.requires_grad)
    assert count(parameters.values()) == base + adapters
    assert round(100 * trainable / (base + adapters), 1) == TRAINABLE_SHARE
    assert round(100 * adapters / (base + adapters), 1) == ADAPTER_SHARE


def test_defaults_are_the_published_sizes():
    config = DiVLAConfig()
    assert config.to_dict() == DiVLAConfig.from_preset("2b").to_dict()
    assert (config.action_dim, config.state_dim, config.chunk_size) == (14, 14, 16)
    assert config.head_config == {"type": "diffusion"} and config.architectures == ["DiVLAForActionPrediction"]
    assert config.use_film and config.film_includes_end and config.ntp_loss_weight == 1.0
    assert config.max_reasoning_tokens == 256 and config.latent_dim is None and config.embodiments is None
    backbone, text = config.backbone_config, config.get_text_config()
    assert num_image_tokens(backbone) is None
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (1536, 28, 151936)
    assert text.rms_norm_eps == 1e-6 and text.rope_parameters["rope_theta"] == 1e6
    # of the published tokenizer
    assert (config.end_token_id, config.image_token_id) == (151645, 151655)
    assert (backbone.vision_start_token_id, backbone.vision_end_token_id) == (151652, 151653)


def test_tiny_is_tiny():
    model = DiVLAForActionPrediction(DiVLAConfig.from_preset("tiny"))
    assert 1e6 < count(model.parameters()) < 2.5e6
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("preset", ["2b", "7b", "72b", "tiny"])
def test_round_trip(preset, tmp_path):
    options = {"latent_dim": 8, "embodiments": {"arm": {"action_dim": 7, "state_dim": None}}, "state_dim": None}
    config = DiVLAConfig.from_preset(preset, ntp_loss_weight=0.5, film_includes_end=False, **options)
    config.save_pretrained(tmp_path)
    assert DiVLAConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is DiVLAConfig and type(again.backbone_config) is type(config.backbone_config)
    assert again.state_dim is None and again.embodiments == options["embodiments"]


def test_a_preset_is_not_changed_by_its_configs():
    DiVLAConfig.from_preset("tiny").head_config["type"] = "regression"
    DiVLAConfig.from_preset("tiny").backbone_config.text_config.vocab_size = 9
    config = DiVLAConfig.from_preset("tiny")
    assert config.head_config["type"] == "diffusion" and config.get_text_config().vocab_size == 320


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"No DiVLA preset '3b'; there are \['2b', '72b', '7b', 'tiny'\]"):
        DiVLAConfig.from_preset("3b")


@pytest.mark.parametrize("embodiments", [None, {}])
def test_latents_have_a_decoder_for_a_robot_of_the_configuration_s_sizes(embodiments):
    config = DiVLAConfig.from_preset("tiny", latent_dim=8, embodiments=embodiments)
    assert config.embodiments == {"default": {"action_dim": 14, "state_dim": 14}}
    given = {"arm": {"action_dim": 7}, "hand": {"action_dim": 3, "state_dim": 5}}
    config = DiVLAConfig.from_preset("tiny", latent_dim=8, embodiments=given)
    assert config.embodiments == {"arm": {"action_dim": 7, "state_dim": 14}, "hand": given["hand"]}
    assert given["arm"] == {"action_dim": 7}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"action_dim": 0}, "Expected action_dim of 1 or more, got 0"),
        ({"chunk_size": 0}, "Expected chunk_size of 1 or more, got 0"),
        ({"state_dim": 0}, "Expected state_dim of 1 or more, got 0"),
        ({"latent_dim": 0}, "Expected latent_dim of 1 or more, got 0"),
        ({"max_reasoning_tokens": -1}, "Expected max_reasoning_tokens of 0 or more, got -1"),
        ({"ntp_loss_weight": -0.1}, "Expected ntp_loss_weight of 0 or more, got -0.1"),
        ({"ntp_loss_weight": float("nan")}, "Expected ntp_loss_weight of 0 or more, got nan"),
        ({"ntp_loss_weight": float("inf")}, "Expected ntp_loss_weight of 0 or more, got inf"),
        ({"end_token_id": 320}, "end_token_id 320 does not fit a vocabulary of 320: .* 321 or more"),
        ({"end_token_id": -1}, "end_token_id -1 does not fit a vocabulary of 320"),
        ({"embodiments": {"arm": {"action_dim": 7}}}, "Embodiments have decoders of latents: set latent_dim"),
        ({"latent_dim": 8, "embodiments": {"a.b": {"action_dim": 7}}}, "name to be a word without points, got 'a.b'"),
        ({"latent_dim": 8, "embodiments": {"": {"action_dim": 7}}}, "name to be a word without points, got ''"),
        ({"latent_dim": 8, "embodiments": {3: {"action_dim": 7}}}, "name to be a word without points, got 3"),
        (
            {"latent_dim": 8, "embodiments": {"aloha": 14}},
            r"Expected the embodiment 'aloha' as \{'action_dim': .* got 14",
        ),
        ({"latent_dim": 8, "embodiments": {"arm": {"action_dims": 7}}}, "'arm' takes no 'action_dims'; did you mean"),
        ({"latent_dim": 8, "embodiments": {"arm": {}}}, "Expected an action_dim of 1 or more of the embodiment 'arm'"),
        ({"latent_dim": 8, "embodiments": {"arm": {"action_dim": 7, "state_dim": 0}}}, "a state_dim of 1 or more or"),
        ({"latent_dim": 8, "embodiments": {"arm": {"action_dim": 7.0}}}, "Expected an action_dim of 1 or more"),
    ],
)
def test_inconsistent_sizes(overrides, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        DiVLAConfig.from_preset("tiny", **overrides)


@pytest.mark.parametrize("name", ["keys", "items", "type", "train", "training"])
def test_names_that_pytorch_has_itself(name):
    with pytest.raises(StrictDataclassClassValidationError, match=f"have '{name}' of their own: give .* another name"):
        DiVLAConfig.from_preset("tiny", latent_dim=8, embodiments={name: {"action_dim": 7}})


@pytest.mark.parametrize("name", [3, "keys"])
def test_an_added_robot_needs_a_name_too(name):
    with torch.device("meta"):
        model = DiVLAForActionPrediction(DiVLAConfig.from_preset("tiny", latent_dim=8))
    with pytest.raises(ValueError, match="name"):
        model.add_embodiment(name, 3)
    assert list(model.embodiments) == list(model.config.embodiments) == ["default"]


@pytest.mark.parametrize(
    ("backbone_config", "message"),
    [
        ({}, r"Expected backbone_config\['model_type'\] of transformers, got None, such as 'qwen2_vl'"),
        ({"text_config": {}}, "got None, such as"),
        ({"model_type": "nope!"}, "got 'nope!', such as"),
        ({"model_type": "qwen2vl"}, "got 'qwen2vl'; did you mean 'qwen2_vl'"),
    ],
)
@pytest.mark.parametrize("config_class", [DiVLAConfig, TinyVLAConfig])
def test_backbones_are_named(config_class, backbone_config, message):
    with pytest.raises(ValueError, match=message):
        config_class(backbone_config=backbone_config)


@pytest.mark.parametrize("index", [-1, 320])
def test_the_image_token_is_in_the_vocabulary(index):
    backbone = DiVLAConfig.from_preset("tiny").backbone_config.to_dict() | {"image_token_id": index}
    with pytest.raises(StrictDataclassClassValidationError, match=f"image_token_id {index} does not fit a vocabulary"):
        DiVLAConfig.from_preset("tiny", backbone_config=backbone)


@pytest.mark.parametrize(
    ("name", "wanted"), [("use_films", "use_film"), ("max_reasoning_token", "max_reasoning_tokens")]
)
def test_misspelt_names(name, wanted):
    with pytest.raises(ValueError, match=f"DiVLAConfig has no '{name}'; did you mean '{wanted}'"):
        DiVLAConfig.from_preset("tiny", **{name: 1})
