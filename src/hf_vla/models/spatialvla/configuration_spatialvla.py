"""SpatialVLA configuration."""

import dataclasses
from itertools import accumulate
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from hf_vla.models.kept_code import KeepsCode
from hf_vla.models.names import refuse_near_misses

DECODINGS = ("autoregressive", "discrete_diffusion")
# Small enough to train on two CPU cores in minutes; every part of the architecture is there.
_TINY = {
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
        "model_type": "gemma2",
        "vocab_size": 1798,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": False,
    },
    "vision_zoe_config": {
        "model_type": "zoedepth",
        "backbone_config": {
            "model_type": "beit",
            "image_size": 96,
            "patch_size": 16,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "use_relative_position_bias": True,
            "reshape_hidden_states": False,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "neck_hidden_sizes": [8, 8, 16, 16],
        "fusion_hidden_size": 16,
        "num_relative_features": 8,
        "bottleneck_features": 16,
        "bin_embedding_dim": 16,
        "num_attractors": [4, 2, 1, 1],
        "bin_configurations": [{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}],
    },
    "zoe_image_size": 96,
    "image_token_index": 259,
    "action_token_begin_idx": 260,
    "spatial_token_num": 1538,
    "action_block_sizes": [1024, 512, 2],
}


@strict
class SpatialVLAConfig(KeepsCode, PreTrainedConfig):
    r"""Configuration of [`SpatialVLAForConditionalGeneration`]; the defaults are the published 4B model's.

    Args:
        vision_config (`dict` or `PreTrainedConfig`): SigLIP vision tower (so400m, 224 pixels).
        text_config (`dict` or `PreTrainedConfig`): any causal language model (Gemma2-2B with 265,347 untied rows).
        vision_zoe_config (`dict` or `PreTrainedConfig`): ZoeDepth with a BEiT-L backbone and two metric heads.
        image_token_index (`int`): id of the `<image>` placeholder.
        action_token_begin_idx (`int`): id of the first action token; `spatial_token_num` ids follow.
        spatial_token_num (`int`): number of action tokens, all blocks together.
        action_block_sizes (`list[int]`): how the action tokens of one step divide into blocks (translation, rotation,
            gripper), in the order in which they are generated, one token from each. `None` for other grids than the
            published one: `from_pretrained` then reads it from the checkpoint's processor.
        action_token_ranges (`list[list[int]]`): the same for tokenizers other than grids: `[first, stop]` of the
            action tokens, counted from 0, for each token of an action; several may choose among the same. `[]` where
            the number of tokens differs from chunk to chunk, as in FAST: the action tokenizer then says at every
            token which may follow.
        chunk_size (`int`): actions that one prediction holds. `None`: read from the processor likewise.
        use_spatial_token (`bool`): embed action tokens with `spatial_embed_tokens` instead of the language model's
            own embedding rows.
        use_vision_zoe (`bool`): estimate depth with ZoeDepth where the caller gives none.
        use_ego3d (`bool`): add the Ego3D position encoding; defaults to `use_vision_zoe`, as published. With
            `use_vision_zoe=False` the robot's own depth is then required.
        ego3d_patch_reso (`int`): points per patch side that are lifted to 3-D.
        n_freqs (`int`): frequencies of the Ego3D encoding.
        zoe_image_size (`int`): side in pixels at which ZoeDepth sees the image.
        decoding (`str`): how a chunk's tokens come about. `"autoregressive"`: one after the other.
            `"discrete_diffusion"`: all at once, in a few passes that begin with all of them masked, see
            [`~hf_vla.models.spatialvla.masked_decoding.decode`]; for tokenizers with a fixed number of tokens an
            action.
        num_decoding_steps (`int`): passes of discrete diffusion, fewer than a chunk has tokens.
        remask_threshold (`float`), remask_drop (`float`): when discrete diffusion masks a token again: its probability
            is below the threshold, or has fallen by more than the drop. 0 and 1: never. Both need a `replace_rate`.
        replace_rate (`float`): share of the tokens that discrete diffusion's training leaves visible which it replaces
            by others, to ask for the right ones there and at those that are right. Trained on masked tokens alone, as
            published (0), the model says nothing that means anything of a token which it sees.
        n_obs_steps (`int`): frames that the model sees, the last of them the present; the tokens of all stand in the
            prompt, the oldest first.

    Source: SpatialVLA, https://huggingface.co/papers/2501.15830
    """

    model_type = "spatialvla"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="siglip_vision_model",
            init_kwargs={
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 224,
                "patch_size": 14,
                "vision_use_head": False,
            },
        ),
        "text_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="gemma2",
            init_kwargs={
                "vocab_size": 265347,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "tie_word_embeddings": False,
            },
        ),
        "vision_zoe_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="zoedepth",
            init_kwargs={
                "neck_hidden_sizes": [256, 512, 1024, 1024],
                "bin_configurations": [
                    {"name": "nyu", "n_bins": 64, "min_depth": 1e-3, "max_depth": 10.0},
                    {"name": "kitti", "n_bins": 64, "min_depth": 1e-3, "max_depth": 80.0},
                ],
                "num_patch_transformer_layers": 4,
                "patch_transformer_hidden_size": 128,
                "patch_transformer_intermediate_size": 1024,
                "patch_transformer_num_attention_heads": 4,
            },
        ),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_zoe_config: dict | PreTrainedConfig | None = None
    image_token_index: int = 257152
    action_token_begin_idx: int = 257153
    spatial_token_num: int = 8194
    action_block_sizes: list[int] | None = None
    action_token_ranges: list[list[int]] | None = None
    chunk_size: int | None = None
    use_spatial_token: bool = True
    use_vision_zoe: bool = True
    use_ego3d: bool | None = None
    ego3d_patch_reso: int = 2
    n_freqs: int = 8
    zoe_image_size: int = 384
    decoding: str = "autoregressive"
    num_decoding_steps: int = 4
    remask_threshold: float = 0.0
    remask_drop: float = 1.0
    replace_rate: float = 0.0
    n_obs_steps: int = 1
    bos_token_id: int = 2
    eos_token_id: int = 1
    pad_token_id: int = 0

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "SpatialVLAConfig":
        """`"4b"`: the published sizes. `"tiny"`: 1.7 M parameters, for demonstrations and tests.

        Args:
            name (`str`): name of the preset.
            overrides: fields that replace the preset's.

        Raises:
            ValueError: there is no such preset.
        """
        presets = {"4b": {"action_block_sizes": [4096, 4096, 2], "chunk_size": 4}, "tiny": {**_TINY, "chunk_size": 4}}
        if name not in presets:
            raise ValueError(f"No SpatialVLA preset {name!r}; there are {sorted(presets)}.")
        return cls(**{**presets[name], **overrides})

    def __post_init__(self, **kwargs):
        refuse_near_misses("SpatialVLAConfig", kwargs, [field.name for field in dataclasses.fields(self)])
        super().__post_init__(**kwargs)
        self.architectures = self.architectures or ["SpatialVLAForConditionalGeneration"]
        if self.use_ego3d is None:
            self.use_ego3d = self.use_vision_zoe
        if self.action_block_sizes is None and self.action_token_ranges is None and self.spatial_token_num == 8194:
            self.action_block_sizes = [4096, 4096, 2]

    def validate_architecture(self):
        """Check that sizes are positive and that the action tokens fit the vocabulary and their blocks."""
        sizes = ("ego3d_patch_reso", "n_freqs", "zoe_image_size", "spatial_token_num", "action_block_sizes")
        for name in (*sizes, "num_decoding_steps", "n_obs_steps"):
            value = getattr(self, name)
            if value is not None and min(value if isinstance(value, list) else [value]) < 1:
                raise ValueError(f"Expected {name} of 1 or more, got {value}.")
        end = self.action_token_begin_idx + self.spatial_token_num
        if end > self.text_config.vocab_size:
            raise ValueError(
                f"The action tokens {self.action_token_begin_idx}..{end - 1} do not fit a vocabulary of "
                f"{self.text_config.vocab_size}: set text_config.vocab_size to {end} or more."
            )
        if self.action_block_sizes is not None and sum(self.action_block_sizes) != self.spatial_token_num:
            raise ValueError(
                f"action_block_sizes {self.action_block_sizes} hold {sum(self.action_block_sizes)} tokens, but "
                f"spatial_token_num is {self.spatial_token_num}."
            )
        if self.action_token_ranges is not None:
            if self.action_block_sizes is not None:
                raise ValueError("Expected action_block_sizes or action_token_ranges, got both.")
            for places in self.action_token_ranges:
                if len(places) != 2 or not 0 <= places[0] < places[1] <= self.spatial_token_num:
                    raise ValueError(
                        "Expected action_token_ranges of [first, stop] within the spatial_token_num "
                        f"{self.spatial_token_num} action tokens, got {places}."
                    )
        self._validate_decoding()
        if self.vision_config.image_size % self.vision_config.patch_size:
            raise ValueError(
                f"image_size {self.vision_config.image_size} is no multiple of "
                f"patch_size {self.vision_config.patch_size}."
            )

    def _validate_decoding(self):
        if self.decoding not in DECODINGS:
            raise ValueError(f"Expected a decoding in {list(DECODINGS)}, got {self.decoding!r}.")
        for name in ("remask_threshold", "remask_drop", "replace_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Expected a {name} in [0, 1], a probability, got {getattr(self, name)}.")
        if self.decoding == "autoregressive":
            return
        if self.action_token_ranges == []:
            raise ValueError(
                "Discrete diffusion fills in a fixed number of tokens, but that of these differs from chunk to chunk, "
                "as with FAST: set decoding to 'autoregressive', or take uniform bins or a grid."
            )
        if self.action_ranges(1) is None:
            raise ValueError("Discrete diffusion needs action_block_sizes or action_token_ranges, got neither.")
        if self.replace_rate == 0 and (self.remask_threshold > 0 or self.remask_drop < 1):
            raise ValueError(
                "Expected a replace_rate above 0, such as 0.1, beside remask_threshold or remask_drop, got 0: a model "
                "that was trained on masked tokens alone does not know which of those it sees are wrong."
            )
        ranges = None if self.chunk_size is None else self.action_ranges(self.chunk_size)
        if ranges is not None and self.num_decoding_steps > len(ranges):
            raise ValueError(
                f"Expected num_decoding_steps of at most {len(ranges)}, the number of tokens of a chunk, got "
                f"{self.num_decoding_steps}."
            )

    @property
    def num_image_tokens(self) -> int:
        """Patches, hence `<image>` tokens, of one frame."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    def action_ranges(self, chunk_size: int) -> list[tuple[int, int]] | None:
        """Action tokens `[first, stop)`, counted from 0, that may stand at each place of a chunk.

        Args:
            chunk_size (`int`): actions of the chunk.

        Returns:
            `list[tuple[int, int]]`: one for each token; `[]` where their number differs from chunk to chunk. None:
            this configuration does not say.
        """
        if self.action_block_sizes is not None:
            stops = list(accumulate(self.action_block_sizes))
            return list(zip([0, *stops[:-1]], stops, strict=True)) * chunk_size
        return self.action_token_ranges and [tuple(places) for places in self.action_token_ranges] * chunk_size
