"""TinyVLA configuration."""

import copy
import dataclasses
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from hf_vla.models.backbone_configs import check_model_type, implementations
from hf_vla.models.kept_code import KeepsCode
from hf_vla.models.names import refuse_near_misses

_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
# hidden size, layers, attention heads, intermediate size of the three Pythia language models
_PYTHIA = {"s": (512, 6, 8, 2048), "b": (1024, 24, 16, 4096), "h": (2048, 16, 8, 8192)}


def _published(size: str) -> dict[str, Any]:
    """Options of Llava with CLIP and a Pythia language model; its tokenizer ends at id 50276."""
    hidden_size, num_layers, num_heads, intermediate_size = _PYTHIA[size]
    text_config = {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "intermediate_size": intermediate_size,
    }
    return {"vision_config": _CLIP_L, "text_config": text_config, "image_token_index": 50277, "image_seq_length": 576}


# Small enough to train on two CPU cores in minutes; every part of the architecture is there.
_TINY = {
    "backbone_config": {
        "model_type": "llava",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 84,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "gpt_neox",
            "vocab_size": 320,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 2048,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "image_token_index": 259,
        "image_seq_length": 36,
    },
    "head_config": {
        "type": "diffusion",
        "denoiser": {"type": "conditional_unet1d", "down_dims": [32, 64, 96], "diffusion_step_embed_dim": 64},
    },
    "readout_token_id": 260,
}


@strict
class TinyVLAConfig(KeepsCode, PreTrainedConfig):
    r"""Configuration of [`TinyVLAForActionPrediction`]; the defaults are the published TinyVLA-B's.

    Args:
        backbone_config (`dict` or `PreTrainedConfig`): any image-text-to-text model of transformers (Llava with
            CLIP-L/14 at 336 pixels and Pythia-410M).
        head_config (`dict`): `{"type": ..., **options}`, see `hf_vla.actions.heads.registry` (the published diffusion
            head).
        action_dim (`int`): numbers of one action.
        state_dim (`int`, *optional*): numbers of the robot's state, at one step; None for models that see none.
        chunk_size (`int`): actions that one prediction holds.
        num_readout_tokens (`int`): learnt tokens behind the prompt; where there are any, the head sees their hidden
            states alone, as in Octo and OpenVLA-OFT.
        readout_token_id (`int`, *optional*): id of the first readout token; the others follow.
        n_obs_steps (`int`): observations that the model sees, the last of them the present: the pictures of all stand
            in the prompt, the head gets their states one behind the other.

    Source: TinyVLA, https://huggingface.co/papers/2409.12514
    """

    model_type = "tinyvla"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="llava", init_kwargs=_published("b")),
    }

    backbone_config: dict | PreTrainedConfig | None = None
    head_config: dict | None = None
    action_dim: int = 10
    state_dim: int | None = 7
    chunk_size: int = 16
    num_readout_tokens: int = 0
    readout_token_id: int | None = 50278
    n_obs_steps: int = 1

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "TinyVLAConfig":
        """`"s"`, `"b"`, `"h"`: the published sizes. `"tiny"`: for demonstrations and tests.

        Args:
            name (`str`): name of the preset.
            overrides: fields that replace the preset's.

        Raises:
            ValueError: there is no such preset.
        """
        presets = {size: {"backbone_config": {"model_type": "llava", **_published(size)}} for size in _PYTHIA}
        presets["tiny"] = _TINY
        if name not in presets:
            raise ValueError(f"No TinyVLA preset {name!r}; there are {sorted(presets)}.")
        return cls(**{**copy.deepcopy(presets[name]), **overrides})

    def __post_init__(self, **kwargs):
        refuse_near_misses("TinyVLAConfig", kwargs, [field.name for field in dataclasses.fields(self)])
        if isinstance(self.backbone_config, dict):
            check_model_type(self.backbone_config)
        super().__post_init__(**{**implementations(self.backbone_config), **kwargs})
        self.architectures = self.architectures or ["TinyVLAForActionPrediction"]
        self.head_config = {"type": "diffusion"} if self.head_config is None else self.head_config

    def validate_architecture(self):
        """Check that sizes are positive, and that image and readout tokens have ids of their own in the vocabulary.

        The head's options are checked when the model builds it.
        """
        sizes = {"action_dim": 1, "chunk_size": 1, "state_dim": 1, "n_obs_steps": 1, "num_readout_tokens": 0}
        for name, least in sizes.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"Expected {name} of {least} or more, got {value}.")
        vocab_size, image, ids = self.get_text_config().vocab_size, self.image_token_id, self.readout_token_ids
        if not 0 <= image < vocab_size:
            raise ValueError(
                f"The image token {image} does not fit a vocabulary of {vocab_size}: set vocab_size of "
                f"backbone_config's text_config to {image + 1} or more, or the image token's id."
            )
        if self.num_readout_tokens == 0:
            return
        if self.readout_token_id is None:
            raise ValueError(f"num_readout_tokens is {self.num_readout_tokens}, but no readout_token_id is given.")
        if ids.start < 0 or ids.stop > vocab_size:
            raise ValueError(
                f"The readout tokens {ids.start}..{ids.stop - 1} do not fit a vocabulary of {vocab_size}: set "
                f"vocab_size of backbone_config's text_config to {ids.stop}."
            )
        if image in ids:
            raise ValueError(
                f"The image token {image} is among the readout tokens {ids.start}..{ids.stop - 1}: set "
                "readout_token_id to another id."
            )

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        """The backbone's text configuration."""
        return self.backbone_config.get_text_config(*args, **kwargs)

    @property
    def readout_token_ids(self) -> range:
        """Ids of the readout tokens."""
        start = self.readout_token_id or 0
        return range(start, start + self.num_readout_tokens)

    @property
    def image_token_id(self) -> int:
        """Id of the backbone's image placeholder."""
        return self.backbone_config.image_token_id
