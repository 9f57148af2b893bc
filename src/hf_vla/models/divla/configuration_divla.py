"""DiVLA configuration."""

import copy
import dataclasses
import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch.nn import ModuleDict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from hf_vla.models.backbone_configs import check_model_type, implementations
from hf_vla.models.kept_code import KeepsCode
from hf_vla.models.names import refuse_near_misses, refuse_unknown

# Qwen2-VL's language models: hidden size, layers, attention heads, key-value heads, intermediate size, vocabulary
_QWEN2_VL = {
    "2b": (1536, 28, 12, 2, 8960, 151936),
    "7b": (3584, 28, 28, 4, 18944, 152064),
    "72b": (8192, 80, 64, 8, 29568, 152064),
}
EMBODIMENT_FIELDS = ("action_dim", "state_dim")


def _published(size: str) -> dict[str, Any]:
    """Options of Qwen2-VL."""
    hidden_size, num_layers, num_heads, num_key_value_heads, intermediate_size, vocab_size = _QWEN2_VL[size]
    text_config = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "rms_norm_eps": 1e-6,  # the configuration's own default is another
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    }
    vision_config = {"depth": 32, "embed_dim": 1280, "hidden_size": hidden_size, "num_heads": 16, "mlp_ratio": 4}
    return {"text_config": text_config, "vision_config": vision_config, "tie_word_embeddings": size == "2b"}


# Small enough to train on two CPU cores in minutes; every part of the architecture is there.
_TINY = {
    "backbone_config": {
        "model_type": "qwen2_vl",
        "vision_config": {"depth": 3, "embed_dim": 96, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2},
        "text_config": {
            "vocab_size": 320,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        "tie_word_embeddings": True,
        "image_token_id": 259,
        "video_token_id": 260,
        "vision_start_token_id": 261,
        "vision_end_token_id": 262,
    },
    "head_config": {
        "type": "diffusion",
        "denoiser": {"type": "conditional_unet1d", "down_dims": [32, 64, 96], "diffusion_step_embed_dim": 64},
    },
    "end_token_id": 1,
    "max_reasoning_tokens": 64,
}


@strict
class DiVLAConfig(KeepsCode, PreTrainedConfig):
    r"""Configuration of [`DiVLAForActionPrediction`]; the defaults are the published DiVLA-2B's.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`): any image-text-to-text model of transformers (Qwen2-VL-2B).
        head_config (`dict`): `{"type": ..., **options}`, see `hf_vla.actions.heads.registry` (the published diffusion
            head).
        action_dim (`int`): numbers of one action.
        state_dim (`int`, *optional*): numbers of the robot's state; None for models that see none.
        chunk_size (`int`): actions that one prediction holds.
        use_film (`bool`): one condition vector, in which the reasoning modulates the prompt. False: the head sees all
            hidden states, of prompt and reasoning alike.
        ntp_loss_weight (`float`): of the reasoning's loss, beside the action head's 1.
        max_reasoning_tokens (`int`): longest reasoning with its end token; 0 for models that act without.
        end_token_id (`int`): of the token that ends a reasoning.
        film_includes_end (`bool`): whether the end of a generated reasoning modulates, too, as in training. False: as
            in the published evaluation, for comparison only.
        latent_dim (`int`, *optional*): the head denoises latents of this size, which a decoder for each embodiment
            turns into actions; None: it denoises actions.
        embodiments (`dict`, *optional*): with `latent_dim`, `{name: {"action_dim": ..., "state_dim": ...}}` (by
            default `"default"`, of this configuration's sizes; a `state_dim` that is left out is also this one's).

    Source: Diffusion-VLA, https://huggingface.co/papers/2412.03293
    """

    model_type = "divla"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2_vl", init_kwargs=_published("2b")),
    }

    backbone_config: dict | PreTrainedConfig | None = None
    head_config: dict | None = None
    action_dim: int = 14
    state_dim: int | None = 14
    chunk_size: int = 16
    use_film: bool = True
    ntp_loss_weight: float = 1.0
    max_reasoning_tokens: int = 256
    end_token_id: int = 151645
    film_includes_end: bool = True
    latent_dim: int | None = None
    embodiments: dict | None = None

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "DiVLAConfig":
        """`"2b"`, `"7b"`, `"72b"`: the published sizes. `"tiny"`: for demonstrations and tests.

        Args:
            name (`str`): name of the preset.
            overrides: fields that replace the preset's.

        Raises:
            ValueError: there is no such preset.
        """
        presets = {size: {"backbone_config": {"model_type": "qwen2_vl", **_published(size)}} for size in _QWEN2_VL}
        presets["tiny"] = _TINY
        if name not in presets:
            raise ValueError(f"No DiVLA preset {name!r}; there are {sorted(presets)}.")
        return cls(**{**copy.deepcopy(presets[name]), **overrides})

    def __post_init__(self, **kwargs):
        refuse_near_misses("DiVLAConfig", kwargs, [field.name for field in dataclasses.fields(self)])
        if isinstance(self.backbone_config, dict):
            check_model_type(self.backbone_config)
        super().__post_init__(**{**implementations(self.backbone_config), **kwargs})
        self.architectures = self.architectures or ["DiVLAForActionPrediction"]
        self.head_config = {"type": "diffusion"} if self.head_config is None else self.head_config
        if self.latent_dim is not None and not self.embodiments:
            self.embodiments = {"default": {"action_dim": self.action_dim}}
        if self.embodiments:
            default = {"state_dim": self.state_dim}
            self.embodiments = {
                name: default | sizes if isinstance(sizes, dict) else sizes for name, sizes in self.embodiments.items()
            }

    def validate_architecture(self):
        """Check that sizes are positive, ids in the vocabulary, and embodiments well described.

        The head's options are checked when the model builds it.
        """
        sizes = {"action_dim": 1, "chunk_size": 1, "state_dim": 1, "latent_dim": 1, "max_reasoning_tokens": 0}
        for name, least in sizes.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"Expected {name} of {least} or more, got {value}.")
        if not 0 <= self.ntp_loss_weight < math.inf:
            raise ValueError(f"Expected ntp_loss_weight of 0 or more, got {self.ntp_loss_weight}.")
        vocab_size = self.get_text_config().vocab_size
        for name in ("image_token_id", "end_token_id"):
            if not 0 <= (index := getattr(self, name)) < vocab_size:
                raise ValueError(
                    f"The {name} {index} does not fit a vocabulary of {vocab_size}: set vocab_size of "
                    f"backbone_config's text_config to {index + 1} or more, or the token's id."
                )
        if self.latent_dim is None and self.embodiments:
            raise ValueError(
                "Embodiments have decoders of latents: set latent_dim (32 is usual), or leave embodiments out."
            )
        for name, embodiment in (self.embodiments or {}).items():
            check_embodiment(name, embodiment)

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The backbone's text configuration."""
        return self.backbone_config.get_text_config(*args, **kwargs)

    @property
    def image_token_id(self) -> int:
        """Id of the backbone's image placeholder.

        Raises:
            ValueError: the backbone has none.
        """
        image_token_id = getattr(self.backbone_config, "image_token_id", None)
        if image_token_id is None:
            raise ValueError(
                "Expected a backbone whose configuration has an image_token_id, as Qwen2-VL's has, got "
                f"{self.backbone_config.model_type!r}."
            )
        return image_token_id


def check_embodiment(name: str, embodiment: dict[str, Any]) -> None:
    """Check a name, which becomes part of the weights' names, and the sizes that it stands for.

    Raises:
        ValueError: the name is no word, has a point or means something to PyTorch, or the sizes are missing or not
            positive.
    """
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"Expected an embodiment's name to be a word without points, got {name!r}.")
    if hasattr(ModuleDict(), name):
        raise ValueError(f"PyTorch's modules have {name!r} of their own: give the embodiment another name.")
    if not isinstance(embodiment, dict):
        raise ValueError(
            f"Expected the embodiment {name!r} as {{'action_dim': ..., 'state_dim': ...}}, got {embodiment!r}."
        )
    refuse_unknown(f"The embodiment {name!r}", embodiment, EMBODIMENT_FIELDS)
    action_dim, state_dim = (embodiment.get(field) for field in EMBODIMENT_FIELDS)
    if any(type(size) is not int or size < 1 for size in (action_dim, 1 if state_dim is None else state_dim)):
        raise ValueError(
            f"Expected an action_dim of 1 or more of the embodiment {name!r}, and a state_dim of 1 or more or None, "
            f"got {embodiment}."
        )
