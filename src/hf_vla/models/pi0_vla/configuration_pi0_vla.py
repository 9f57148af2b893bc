"""pi0 configuration: transformers' own under a name of its own, with presets."""

import dataclasses

from huggingface_hub.dataclasses import strict
from transformers.models.pi0.configuration_pi0 import PI0Config

from hf_vla.models.kept_code import KeepsCode
from hf_vla.models.names import refuse_near_misses

# Small enough to train on two CPU cores in minutes; every part of the architecture is there.
_TINY = {
    "vlm_config": {
        "model_type": "paligemma",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "text_config": {
            "model_type": "gemma",
            "vocab_size": 260,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
        "projection_dim": 64,
        "image_token_id": 259,
    },
    "dit_config": {
        "model_type": "gemma",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "chunk_size": 4,
}


@strict
class PI0VLAConfig(KeepsCode, PI0Config):
    """Configuration of [`PI0VLAForActionPrediction`]; fields and defaults are those of `PI0Config`.

    The model type is another one, so that transformers' own classes still serve checkpoints of type "pi0".
    `loss_reduction` means nothing here: see [`PI0VLAForActionPrediction.forward`].

    Source: pi0, https://huggingface.co/papers/2410.24164
    """

    model_type = "pi0_vla"

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "PI0VLAConfig":
        """`"base"`: the published sizes. `"tiny"`: 0.3 M parameters, for demonstrations and tests.

        Args:
            name (`str`): name of the preset.
            overrides: fields that replace the preset's.

        Raises:
            ValueError: there is no such preset.
        """
        presets = {"base": {}, "tiny": _TINY}
        if name not in presets:
            raise ValueError(f"No pi0 preset {name!r}; there are {sorted(presets)}.")
        return cls(**{**presets[name], **overrides})

    def __post_init__(self, **kwargs):
        refuse_near_misses("PI0VLAConfig", kwargs, [field.name for field in dataclasses.fields(self)])
        super().__post_init__(**kwargs)
        self.model_type = type(self).model_type  # a checkpoint of transformers' own says "pi0"
        self.architectures = self.architectures or ["PI0VLAForActionPrediction"]

    def validate_architecture(self):
        """Check that sizes are positive and that the action expert can read the language model's cache."""
        super().validate_architecture()
        for name in ("chunk_size", "max_state_dim", "max_action_dim", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected {name} of 1 or more, got {getattr(self, name)}.")
        for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"):
            expert, language = getattr(self.dit_config, name), getattr(self.vlm_config.text_config, name)
            if expert != language:
                raise ValueError(
                    f"Expected dit_config.{name} equal to vlm_config.text_config.{name}, whose keys and values the "
                    f"action expert attends to; got {expert} and {language}."
                )

    @property
    def num_image_tokens(self) -> int:
        """Patches, hence `<image>` tokens, of one image."""
        vision = self.vlm_config.vision_config
        return (vision.image_size // vision.patch_size) ** 2
