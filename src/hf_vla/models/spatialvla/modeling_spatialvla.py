"""SpatialVLA: SigLIP patches that know where they are in space, a causal language model, a few tokens per action.

image -> SigLIP -> (+ Ego3D encoding of the depth map) -> projector -> `<image>` places of the prompt -> language model
-> translation token, rotation token, gripper token (or those of another action tokenizer)
-> (processor) -> robot actions

Source: SpatialVLA, https://huggingface.co/papers/2501.15830
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForDepthEstimation
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import can_return_tuple

from hf_vla.actions.tokenizers.base import ActionTokenizer
from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer, transfer_embeddings
from hf_vla.models.base import VLAPreTrainedModel
from hf_vla.models.outputs import VLAOutput
from hf_vla.models.spatialvla.action_tokens import read_action_tokenizer, token_fields
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.ego3d import Ego3DPositionEncoding, back_project
from hf_vla.models.spatialvla.generation_spatialvla import SpatialVLAGenerationMixin
from hf_vla.models.spatialvla.masked_decoding import random_mask, replace

_ZOE_PADDING = 31  # pixels that ZoeDepth's preprocessing reflects on each side of an image


class SpatialVLAMultiModalProjector(nn.Module):
    """Vision features -> hidden size of the language model."""

    def __init__(self, config: SpatialVLAConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., vision_hidden_size)` -> `(..., hidden_size)`."""
        return self.linear(features)


class SpatialVLAForConditionalGeneration(VLAPreTrainedModel, SpatialVLAGenerationMixin):
    """Image and instruction in, action tokens out.

    Attributes:
        action_tokenizer (`ActionTokenizer`, *optional*): needed where `config.action_token_ranges` is `[]`, as with
            FAST: it says how a chunk may go on. `from_pretrained` reads it from the processor's file.

    Example:
    ```python
    >>> import hf_vla
    >>> from transformers import AutoModel, AutoProcessor

    >>> model = AutoModel.from_pretrained(path)
    >>> processor = AutoProcessor.from_pretrained(path)
    >>> inputs = processor(images=image, text="pick up the red cube")
    >>> actions = processor.decode_actions(model.predict_action(**inputs))
    ```
    """

    config: SpatialVLAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _no_split_modules = ["SpatialVLAMultiModalProjector", "Ego3DPositionEncoding"]
    _supports_sdpa = True
    # The prompt attends to itself in both directions, which flash attention's causal kernels cannot express.
    _supports_flash_attn = False
    _supports_attention_backend = True

    def __init__(self, config: SpatialVLAConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = SpatialVLAMultiModalProjector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        if config.use_vision_zoe:
            self.vision_zoe_model = AutoModelForDepthEstimation.from_config(config.vision_zoe_config)
            self.vision_zoe_model.eval().requires_grad_(False)
        if config.use_ego3d:
            self.position_embedding_3d = Ego3DPositionEncoding(
                config.ego3d_patch_reso**2, config.n_freqs, config.vision_config.hidden_size
            )
        if config.use_spatial_token:
            self.spatial_embed_tokens = nn.Embedding(config.spatial_token_num, config.text_config.hidden_size)
        if config.decoding == "discrete_diffusion":
            self.action_mask_embedding = nn.Embedding(len(config.action_ranges(1)), config.text_config.hidden_size)
        self.action_tokenizer = None
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As [`VLAPreTrainedModel.from_pretrained`]; checkpoints in the published layout are read as they are.

        The published layout keeps the grid's resolution and the chunk size with the processor only, so they are read
        there; likewise FAST's vocabulary.
        """
        options = dict(kwargs)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if model.config.use_vision_zoe:
            model.vision_zoe_model.requires_grad_(False)  # loading does not keep what __init__ set
        if model.config.chunk_size is None or model.config.action_token_ranges == []:
            if (found := read_action_tokenizer(pretrained_model_name_or_path, **options)) is not None:
                model.set_action_tokenizer(*found)
        return (model, info) if output_loading_info else model

    def set_action_tokenizer(self, tokenizer: ActionTokenizer, chunk_size: int) -> None:
        """Take over what an action tokenizer says of the tokens to generate.

        Args:
            tokenizer (`ActionTokenizer`): the processor's.
            chunk_size (`int`): likewise.

        Raises:
            ValueError: it has another number of ids than the model.
        """
        fields = token_fields(tokenizer)
        if fields["spatial_token_num"] != self.config.spatial_token_num:
            raise ValueError(
                f"Expected an action tokenizer of {self.config.spatial_token_num} ids, as many as this model has, got "
                f"{tokenizer.vocab_size}: is processor_config.json another checkpoint's?"
            )
        for name, value in {**fields, "chunk_size": chunk_size}.items():
            setattr(self.config, name, value)
        self.config.validate_architecture()
        self.action_tokenizer = tokenizer

    @torch.no_grad()
    def diffuse_actions(self) -> None:
        """Let a model that generates token by token learn to fill in a chunk at once, by discrete diffusion.

        All weights stay; a mask token begins as the mean of the embeddings of those that may stand at its place.

        Raises:
            ValueError: it does so already, or its chunks have no fixed number of tokens, as with FAST.
        """
        config = self.config
        if config.decoding == "discrete_diffusion":
            raise ValueError("This model decodes by discrete diffusion already.")
        config.decoding = "discrete_diffusion"
        config.validate_architecture()
        if config.use_spatial_token:
            actions = self.spatial_embed_tokens.weight
        else:
            actions = self.get_input_embeddings().weight[config.action_token_begin_idx :][: config.spatial_token_num]
        means = torch.stack([actions[start:stop].mean(0) for start, stop in config.action_ranges(1)])
        self.action_mask_embedding = nn.Embedding.from_pretrained(means, freeze=False)

    def train(self, mode: bool = True):
        """Switch to training mode, all but the frozen depth model (its drop path would perturb the depth)."""
        super().train(mode)
        if self.config.use_vision_zoe:
            self.vision_zoe_model.eval()
        return self

    def get_input_embeddings(self):
        """The language model's, whose action rows `spatial_embed_tokens` replaces."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Replace the language model's input embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(value)

    def get_decoder(self):
        """The language model without its head."""
        return self.language_model.get_decoder()

    @torch.no_grad()
    def adapt_spatial_embeddings(self, source: GaussianGridTokenizer, target: GaussianGridTokenizer) -> None:
        """Move the pretrained embeddings of the action tokens to the cells of a grid fitted to another dataset.

        Trilinear between the old cells' centres, see [`~hf_vla.actions.tokenizers.gaussian_grid.transfer_embeddings`].
        An untied head keeps its rows, as published: they name cells by probability mass, which re-fitting keeps.

        Args:
            source, target (`GaussianGridTokenizer`): grid of the checkpoint, grid of the new dataset; one resolution.

        Raises:
            ValueError: the model has no spatial embedding, or the grids have another number of ids than it.
        """
        if not self.config.use_spatial_token:
            raise ValueError("This model has no spatial embedding to adapt: its config says use_spatial_token=False.")
        weight = self.spatial_embed_tokens.weight
        if source.num_bins != target.num_bins or source.vocab_size != len(weight):
            raise ValueError(
                f"Expected two grids of {len(weight)} ids with the same bins, got {list(source.num_bins)} and "
                f"{list(target.num_bins)}: fit the new grid with the checkpoint's own numbers of bins."
            )
        adapted = transfer_embeddings(weight.float().cpu().numpy(), source, target)
        weight.copy_(torch.from_numpy(adapted))

    def estimate_depth(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Metric depth by ZoeDepth, which is frozen.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): RGB in [0, 1].

        Returns:
            `torch.Tensor` of shape `(batch_size, height, width)`, float32, metres.
        """
        height, width = pixel_values.shape[-2:]
        pad = min(_ZOE_PADDING, height - 1, width - 1)
        size = (self.config.zoe_image_size,) * 2
        images = F.pad(pixel_values.float(), (pad,) * 4, mode="reflect")
        images = F.interpolate(images, size, mode="bicubic", align_corners=True)
        images = ((images - 0.5) / 0.5).to(self.vision_zoe_model.dtype)
        # With several metric heads ZoeDepth lets the batch vote for one of them: ask for each image alone.
        batches = images.split(1) if len(self.config.vision_zoe_config.bin_configurations) > 1 else [images]
        depth = torch.cat([self.vision_zoe_model(pixel_values=batch).predicted_depth for batch in batches])
        size = (height + 2 * pad, width + 2 * pad)
        depth = F.interpolate(depth[:, None].float(), size, mode="bicubic", align_corners=True)
        return depth[:, 0, pad : pad + height, pad : pad + width]

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        intrinsics: torch.Tensor | None = None,
        depth: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed images as tokens, in the units of the language model's embedding table.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): RGB in [0, 1]. Of a model that
                sees several frames `(batch_size, n_obs_steps, 3, height, width)`, the oldest first; intrinsics and
                depth then have that axis, too, or all frames one camera matrix.
            intrinsics (`torch.Tensor` of shape `(batch_size, 3, 3)` or `(3, 3)`): in pixels of `pixel_values`.
            depth (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*): metric depth of the robot's
                own sensor; ZoeDepth estimates it when it is not given.

        Returns:
            `torch.Tensor` of shape `(batch_size, n_obs_steps * num_patches, hidden_size)`.

        Raises:
            ValueError: intrinsics or depth are needed and missing, or depth is of no use or of another shape than the
                image, or there is another number of frames.
        """
        steps = pixel_values.shape[1] if pixel_values.ndim == 5 else 1
        if steps != self.config.n_obs_steps:
            raise ValueError(
                f"Expected {self.config.n_obs_steps} frames of every sample, as config.n_obs_steps says, got {steps}, "
                f"pixel_values of shape {tuple(pixel_values.shape)}: set the processor's action_config['n_obs_steps'] "
                "to that."
            )
        if pixel_values.ndim == 5:
            if intrinsics is not None and intrinsics.ndim == 3:  # one camera for all frames of a sample
                intrinsics = intrinsics[:, None].expand(-1, steps, 3, 3)
            if intrinsics is not None and intrinsics.ndim == 4:
                intrinsics = intrinsics.flatten(0, 1)
            if depth is not None and depth.shape[:2] == pixel_values.shape[:2]:
                depth = depth.flatten(0, 1)
            frames = self._frame_features(pixel_values.flatten(0, 1), intrinsics, depth)
            return frames.unflatten(0, pixel_values.shape[:2]).flatten(1, 2)
        return self._frame_features(pixel_values, intrinsics, depth)

    def _frame_features(self, pixel_values, intrinsics, depth) -> torch.Tensor:
        """Tokens of each frame alone."""
        features = self.vision_tower(((pixel_values - 0.5) / 0.5).to(self.vision_tower.dtype)).last_hidden_state
        if depth is not None and not self.config.use_ego3d:
            raise ValueError("This checkpoint encodes no 3-D positions and would ignore `depth`; leave it out.")
        if self.config.use_ego3d:
            if intrinsics is None:
                raise ValueError(
                    "This checkpoint encodes 3-D positions and needs `intrinsics`, a (3, 3) camera matrix in pixels "
                    "of the model's image; the processor returns it for the dataset named by `unnorm_key`."
                )
            if depth is None and not self.config.use_vision_zoe:
                raise ValueError(
                    "This checkpoint has no depth model: give `depth`, in metres, of shape (batch, H, W)."
                )
            depth = self.estimate_depth(pixel_values) if depth is None else depth
            expected = (pixel_values.shape[0], *pixel_values.shape[-2:])
            if depth.shape != expected:
                raise ValueError(
                    f"Expected depth of shape {expected}, one metre value per pixel, got {tuple(depth.shape)}."
                )
            patch_size = self.config.vision_config.patch_size
            xyz = back_project(depth, intrinsics, patch_size, self.config.ego3d_patch_reso)
            features = features + self.position_embedding_3d(xyz)
        return self.multi_modal_projector(features) / self.config.text_config.hidden_size**0.5

    def embed_inputs(self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None) -> torch.Tensor:
        """Look up text tokens, action tokens and image features.

        Args:
            input_ids (`torch.Tensor` of shape `(batch_size, sequence_length)`).
            image_features (`torch.Tensor` of shape `(batch_size, num_patches, hidden_size)`, *optional*): goes where
                `input_ids` hold the image token.

        Returns:
            `torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`.

        Raises:
            ValueError: a prompt holds another number of image tokens than its image has patches.
        """
        config, embed_tokens = self.config, self.get_input_embeddings()
        # Gemma scales its embeddings by sqrt(hidden_size) inside `embed_tokens`; ours must be scaled alike.
        scale = getattr(embed_tokens, "scalar_embed_scale", 1.0)
        embeds = embed_tokens(input_ids)
        if config.use_spatial_token:
            action_ids = input_ids - config.action_token_begin_idx
            is_action = (action_ids >= 0) & (action_ids < config.spatial_token_num)
            spatial = self.spatial_embed_tokens(action_ids.clamp(0, config.spatial_token_num - 1)) * scale
            embeds = torch.where(is_action[..., None], spatial.to(embeds.dtype), embeds)
        if image_features is not None:
            is_image = input_ids == config.image_token_index
            counts, expected = is_image.sum(-1), image_features.shape[1]
            if (counts != expected).any():
                raise ValueError(
                    f"Expected {expected} image tokens in every prompt, one per patch of its image, "
                    f"got {counts.tolist()}."
                )
            embeds = embeds.masked_scatter(is_image[..., None], (image_features * scale).to(embeds.dtype))
        return embeds

    def hide_actions(self, embeds: torch.Tensor, masked: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Put the mask tokens of discrete diffusion in the place of action tokens.

        Each token of an action has a mask of its own. Discrete Diffusion VLA has one for all, and its position alone
        tells a token then which number of the action it is, which takes a small model long to learn.

        Args:
            embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): of `embed_inputs`.
            masked (`torch.Tensor` of shape `(batch_size, sequence_length)`, bool): which to hide.
            places (`torch.Tensor` of shape `(sequence_length,)` or that of `masked`): of the tokens in the chunk,
                counted from 0; only read where they are hidden.

        Returns:
            `torch.Tensor` of the shape of `embeds`.
        """
        scale = getattr(self.get_input_embeddings(), "scalar_embed_scale", 1.0)
        masks = self.action_mask_embedding(places % len(self.config.action_ranges(1))) * scale
        return torch.where(masked[..., None], masks.to(embeds.dtype), embeds)

    def _decode(
        self, inputs_embeds, attention_mask, block_ids=None, position_ids=None, past_key_values=None, **kwargs
    ):
        """Run the language model: every token sees the past, and tokens of one block see each other whole.

        `block_ids`: `(batch_size, cached + sequence_length)`, -1 where a token belongs to no block; None: all of them.
        Under the prefix-LM mask of training and prediction the prompt is one block and action tokens belong to none;
        in discrete diffusion they are a second block, which the prompt does not see either.
        """
        if attention_mask is None:
            past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
            attention_mask = inputs_embeds.new_ones(
                (inputs_embeds.shape[0], past_length + inputs_embeds.shape[1]), dtype=torch.long
            )
        if position_ids is None:  # counted from 1 over the real tokens, so that padding moves nothing
            position_ids = attention_mask.long().cumsum(-1).clamp(min=1)[:, -inputs_embeds.shape[1] :]
        masks = create_masks_for_generate(
            config=self.config.text_config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask.bool(),
            past_key_values=past_key_values,
            position_ids=position_ids,
            block_sequence_ids=block_ids,
        )
        return self.get_decoder()(
            inputs_embeds=inputs_embeds,
            attention_mask=masks,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of the whole vocabulary: `(..., hidden_size)` -> `(..., vocab_size)`."""
        logits = self.get_output_embeddings()(hidden_states)
        if self._spatial_head:
            begin, count = self.config.action_token_begin_idx, self.config.spatial_token_num
            spatial = F.linear(hidden_states, self._spatial_rows(0, count, hidden_states))
            logits = torch.cat([logits[..., :begin], spatial, logits[..., begin + count :]], dim=-1)
        return self._softcap(logits)

    def _action_head(self, hidden_states: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Logits of the action ids `start:stop` alone: `(..., hidden_size)` -> `(..., stop - start)`."""
        if self._spatial_head:
            return self._softcap(F.linear(hidden_states, self._spatial_rows(start, stop, hidden_states)))
        head = self.get_output_embeddings()
        rows = slice(self.config.action_token_begin_idx + start, self.config.action_token_begin_idx + stop)
        if type(head) is not nn.Linear or hasattr(head, "_hf_hook"):
            # quantised, with an adapter, or offloaded by accelerate: only the module itself knows its weight
            return self._softcap(head(hidden_states)[..., rows])
        return self._softcap(
            F.linear(hidden_states, head.weight[rows], None if head.bias is None else head.bias[rows])
        )

    def _spatial_rows(self, start: int, stop: int, like: torch.Tensor) -> torch.Tensor:
        return self.spatial_embed_tokens(torch.arange(start, stop, device=like.device))

    @property
    def _spatial_head(self) -> bool:
        """A head tied to the input embedding is tied, for action tokens, to their spatial embedding."""
        return self.config.use_spatial_token and self.config.text_config.tie_word_embeddings

    def _softcap(self, logits: torch.Tensor) -> torch.Tensor:
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        intrinsics: torch.FloatTensor | None = None,
        depth: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> VLAOutput:
        """Score next tokens, and the loss where `labels` are given.

        In discrete diffusion a token's own scores stand at its place, and with `labels` some action tokens, drawn from
        torch's generator, are masked: the loss is the cross entropy over the action ids at those of them that are
        labelled, all of equal weight, as in Discrete Diffusion VLA (section 3.2; the end token is not used).

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): from the processor.
            pixel_values (`torch.FloatTensor` of shape `(batch_size, 3, height, width)`): RGB in [0, 1]; several frames
                have an axis of their own, see `get_image_features`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 where a token is real, 0 also
                on the tokens of a frame from before the episode began.
            intrinsics (`torch.FloatTensor` of shape `(batch_size, 3, 3)` or `(3, 3)`): camera matrix in pixels.
            depth (`torch.FloatTensor` of shape `(batch_size, height, width)`, *optional*): metres; skips ZoeDepth.
            token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): 0 prompt,
                1 action tokens. By default the prompt ends where the first action token stands.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): -100 is ignored.
            position_ids, past_key_values, inputs_embeds, logits_to_keep: as in transformers. With `labels`, the loss
                is computed at the labelled positions only, whatever `logits_to_keep` says.

        Returns:
            [`VLAOutput`] with `loss`, `logits`, `past_key_values`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of `input_ids` and `inputs_embeds`.")
        block_ids = None
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            if inputs_embeds is not None and labels is not None and token_type_ids is None:
                raise ValueError(
                    "Expected `token_type_ids` beside `inputs_embeds` and `labels`: where do actions begin?"
                )
            if pixel_values is None and input_ids is not None and (input_ids == self.config.image_token_index).any():
                raise ValueError("Expected `pixel_values` for the image tokens of the prompt, got none.")
            block_ids = -self._suffix_mask(token_type_ids, input_ids, inputs_embeds).long()  # 0, and -1 behind
            if self.config.decoding == "discrete_diffusion" and input_ids is not None:
                block_ids = block_ids.masked_fill(self._is_action(input_ids), 1)
        targets = masked = None
        if labels is not None and self.config.decoding == "discrete_diffusion":
            input_ids, masked, places, targets = self._mask_actions(input_ids, labels)
        elif labels is not None:
            targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
        if inputs_embeds is None:
            features = None if pixel_values is None else self.get_image_features(pixel_values, intrinsics, depth)
            inputs_embeds = self.embed_inputs(input_ids, features)
        if masked is not None:
            inputs_embeds = self.hide_actions(inputs_embeds, masked, places)
        outputs = self._decode(inputs_embeds, attention_mask, block_ids, position_ids, past_key_values, **kwargs)

        hidden_states = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss = None
        if targets is not None:
            supervised = targets != -100
            if not supervised.any():
                raise ValueError("Expected labels other than -100 in the batch, got none: no action is real.")
            scores, targets = self._head(hidden_states[supervised]).float(), targets[supervised]
            if self.config.decoding == "discrete_diffusion":
                begin = self.config.action_token_begin_idx
                scores, targets = scores[:, begin : begin + self.config.spatial_token_num], targets - begin
            loss = F.cross_entropy(scores, targets, reduction="none")
            # A mean per sample, then over samples: however a batch is cut into smaller ones, the gradient is the same.
            counts = supervised.sum(-1)
            loss = (loss / counts.repeat_interleave(counts)).sum() / (counts > 0).sum()
        return VLAOutput(
            loss=loss,
            logits=self._head(hidden_states[:, keep]),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _suffix_mask(self, token_type_ids, input_ids, inputs_embeds) -> torch.Tensor:
        if token_type_ids is not None:
            return token_type_ids.bool()
        if input_ids is None:  # a prompt given as embeddings
            return inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.bool)
        return self._is_action(input_ids).cumsum(-1) > 0

    def _is_action(self, input_ids) -> torch.Tensor:
        begin = self.config.action_token_begin_idx
        return (input_ids >= begin) & (input_ids < begin + self.config.spatial_token_num)

    def _mask_actions(self, input_ids, labels) -> tuple[torch.Tensor, ...]:
        """What of a training batch to show, to hide (of action tokens without a label all), where, and to ask for."""
        if input_ids is None:
            raise ValueError("Discrete diffusion masks action tokens: give `input_ids` with `labels`, no embeddings.")
        is_action = self._is_action(input_ids)
        counts = is_action.sum(-1)
        if (counts != counts[0]).any():
            raise ValueError(f"Expected equally many action tokens in every sample, got {counts.tolist()}.")
        masked = random_mask(labels[is_action].view(len(labels), counts[0]) != -100)
        hidden = asked = is_action.masked_scatter(is_action, masked)
        if self.config.replace_rate > 0:
            begin, places = self.config.action_token_begin_idx, self.config.action_ranges(1)
            ranges = torch.tensor(places, device=input_ids.device).repeat(int(counts[0]) // len(places), 1) + begin
            shown = replace(input_ids[is_action].view_as(masked), ~masked, ranges, self.config.replace_rate)
            input_ids, asked = input_ids.masked_scatter(is_action, shown), is_action
        return input_ids, hidden, is_action.cumsum(-1) - 1, labels.masked_fill(~asked, -100)


# Only for registered models does peft translate adapters of older layouts; the backbones bring the translations along.
register_checkpoint_conversion_mapping(SpatialVLAConfig.model_type, [], overwrite=True)
