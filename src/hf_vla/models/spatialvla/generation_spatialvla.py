"""How SpatialVLA generates: transformers' `generate` for text, `predict_action` for chunks that always decode.

A chunk comes about token by token, or, by discrete diffusion, as a whole in a few passes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin

from hf_vla.actions.tokenizers.base import TokenStream
from hf_vla.models.outputs import VLAOutput
from hf_vla.models.spatialvla.masked_decoding import decode

ENDED = -100  # stands behind the ids of a chunk that needs fewer than another of its batch


class SpatialVLAGenerationMixin(GenerationMixin):
    """What `generate` has to know of images and action tokens, and the generation of action chunks."""

    def generate(self, *args, **kwargs):
        """As [`~transformers.GenerationMixin.generate`].

        Raises:
            ValueError: the model decodes by discrete diffusion, which has no next token.
        """
        if self.config.decoding == "discrete_diffusion":
            raise ValueError(
                "This model decodes by discrete diffusion, all action tokens at once, and has no next token to "
                "generate: call predict_action."
            )
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args, is_first_iteration: bool = False, **kwargs):
        """Show the image to the first step only; later ones have it in the cache."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        inputs.pop("position_ids", None)  # ours count from 1 and come from the attention mask
        if not is_first_iteration and kwargs.get("use_cache", True):
            for key in ("pixel_values", "intrinsics", "depth"):
                inputs.pop(key, None)
        return inputs

    def _expand_inputs_for_generation(self, *args, input_ids=None, **model_kwargs):
        """Mark where the prompt ends, and give every sample a camera matrix, before beams multiply the batch."""
        if (intrinsics := model_kwargs.get("intrinsics")) is not None and intrinsics.ndim == 2:
            model_kwargs["intrinsics"] = intrinsics.expand(len(input_ids), 3, 3)
        model_kwargs["token_type_ids"] = self._suffix_mask(model_kwargs.get("token_type_ids"), input_ids, None).long()
        return super()._expand_inputs_for_generation(*args, input_ids=input_ids, **model_kwargs)

    def _update_model_kwargs_for_generation(self, *args, num_new_tokens: int = 1, **kwargs):
        """Mark what has been generated as suffix: without a cache it is seen again, and is no part of the prompt."""
        model_kwargs = super()._update_model_kwargs_for_generation(*args, num_new_tokens=num_new_tokens, **kwargs)
        model_kwargs["token_type_ids"][:, -num_new_tokens:] = 1
        return model_kwargs

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs):
        """Leave the mask as it is: `forward` knows where the prompt ends."""
        return attention_mask

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        intrinsics: torch.FloatTensor | None = None,
        depth: torch.FloatTensor | None = None,
        chunk_size: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
    ) -> VLAOutput:
        """Generate the action tokens of a chunk, each chosen among those that may stand at its place.

        No undecodable id can be chosen. Of a tokenizer with a fixed number of tokens an action, only the head's rows
        of those are computed, so a step costs a small part of the full vocabulary's head.

        Args:
            input_ids, pixel_values, attention_mask, intrinsics, depth: from the processor, left-padded.
            chunk_size (`int`, *optional*): number of actions; the checkpoint's by default.
            do_sample (`bool`): sample instead of taking the most likely id.
            temperature (`float`): divides the logits before sampling.
            generator (`torch.Generator`, *optional*): makes sampling repeatable; for discrete diffusion also a list,
                one for each sample.
            num_inference_steps (`int`, *optional*): passes of discrete diffusion, the checkpoint's by default; None
                where tokens are generated one after the other.

        Returns:
            [`VLAOutput`] with `action_ids` `(batch_size, num_action_tokens)` in `[0, spatial_token_num)` and `logits`
            `(batch_size, num_action_tokens, spatial_token_num)`. Where the number of tokens differs from chunk to
            chunk, shorter ones end in -100.

        Raises:
            ValueError: the prompt is right-padded, the checkpoint does not tell its action tokens or chunk size, the
                scores are NaN or infinite, or the model is training with activation checkpointing, which has no cache.
        """
        config = self.config
        chunk_size = config.chunk_size if chunk_size is None else chunk_size
        ranges = None if chunk_size is None else config.action_ranges(chunk_size)
        if chunk_size is None or chunk_size < 1 or ranges is None:
            raise ValueError(
                f"Expected a chunk_size of 1 or more and config.action_block_sizes, got {chunk_size} and "
                f"{config.action_block_sizes}: set them to the processor's chunk size and its grid's block sizes, or "
                "config.action_token_ranges for another action tokenizer."
            )
        diffuses = config.decoding == "discrete_diffusion"
        if num_inference_steps is not None and not diffuses:
            raise ValueError(
                "This SpatialVLA generates one token after the other and denoises nothing: leave num_inference_steps "
                "out."
            )
        if diffuses and not ranges:
            raise ValueError(
                "Discrete diffusion fills in a fixed number of tokens, but that of these differs from chunk to chunk."
            )
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("Expected prompts padded on the left, got padding at the end of a prompt.")
        if temperature <= 0:
            raise ValueError(
                f"Expected a temperature above 0, got {temperature}; for the likeliest id do_sample=False."
            )
        if self.training and self.is_activation_checkpointing:
            raise ValueError("Activation checkpointing keeps no cache in training mode: call model.eval() first.")
        if num_inference_steps is None:
            num_inference_steps = config.num_decoding_steps
        streams = None if ranges else self._streams(len(input_ids), chunk_size)

        embeds = self.embed_inputs(input_ids, self.get_image_features(pixel_values, intrinsics, depth))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)

        if diffuses:
            temperature = temperature if do_sample else 0.0
            return self._decode_at_once(embeds, attention_mask, ranges, num_inference_steps, temperature, generator)

        def choose(scores):
            if do_sample:
                return torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)[:, 0]
            return scores.argmax(-1)

        return self._decode_in_order(embeds, attention_mask, ranges, streams, choose)

    def _streams(self, batch_size, chunk_size) -> list[TokenStream]:
        if self.action_tokenizer is None:
            raise ValueError(
                "How many action tokens a chunk of this model needs, only its action tokenizer knows: load it from a "
                "folder that holds its processor, too, or set model.action_tokenizer to processor.action_codec's."
            )
        return [self.action_tokenizer.stream(chunk_size) for _ in range(batch_size)]

    def _decode_in_order(self, embeds, attention_mask, ranges, streams, choose) -> VLAOutput:
        """Generate one token after the other behind the prompt `embeds`.

        `ranges`: the ids `[start, stop)` at each place; or empty, and `streams`, one per sample, say what may follow.
        """
        config = self.config
        cache = DynamicCache(config=config.text_config)
        blocks = attention_mask.new_zeros(attention_mask.shape)
        ids, logits = [], []
        while len(ids) < len(ranges) if ranges else not all(stream.complete for stream in streams):
            if ids:
                embeds = self.embed_inputs(ids[-1][:, None].clamp(min=0) + config.action_token_begin_idx)
                attention_mask, blocks = F.pad(attention_mask, (0, 1), value=1), None
            hidden = self._decode(embeds, attention_mask, blocks, past_key_values=cache, use_cache=True)
            start, stop = ranges[len(ids)] if ranges else (0, config.spatial_token_num)
            scores = self._action_head(hidden.last_hidden_state[:, -1], start, stop).float()
            _check_finite(scores, f"action token {len(ids)}")
            chosen = choose(scores) + start if ranges else _push(scores, streams, choose)
            ids.append(chosen)
            logits.append(F.pad(scores, (start, config.spatial_token_num - stop), value=-torch.inf))
        return VLAOutput(action_ids=torch.stack(ids, 1), logits=torch.stack(logits, 1))

    def _decode_at_once(self, embeds, attention_mask, ranges, num_steps, temperature, generator) -> VLAOutput:
        """Fill in all tokens behind the prompt `embeds` by discrete diffusion.

        The first pass sees the prompt, too, and leaves it in a cache: it never sees the action tokens.
        """
        config, num_tokens = self.config, len(ranges)
        blocks = F.pad(attention_mask.new_zeros(attention_mask.shape), (0, num_tokens), value=1)
        attention_mask = F.pad(attention_mask, (0, num_tokens), value=1)
        cache = DynamicCache(config=config.text_config)
        places = torch.arange(num_tokens, device=embeds.device)
        cache.activate_past_recording()  # else layers with a sliding window could not forget the action tokens

        def predict(ids, masked):
            inputs = self.hide_actions(self.embed_inputs(ids + config.action_token_begin_idx), masked, places)
            if cache.get_seq_length() == 0:
                inputs = torch.cat([embeds, inputs], dim=1)
            hidden = self._decode(inputs, attention_mask, blocks, past_key_values=cache, use_cache=True)
            cache.crop(-num_tokens)
            scores = self._action_head(hidden.last_hidden_state[:, -num_tokens:], 0, config.spatial_token_num).float()
            _check_finite(scores, "a decoding pass")
            return scores

        ids, logits = decode(
            predict,
            torch.tensor(ranges, device=embeds.device),
            len(embeds),
            num_steps,
            remask_threshold=config.remask_threshold,
            remask_drop=config.remask_drop,
            temperature=temperature,
            generator=generator,
        )
        return VLAOutput(action_ids=ids, logits=logits)


def _check_finite(scores, what) -> None:
    if not (finite := torch.isfinite(scores).flatten(1).all(-1)).all():
        raise ValueError(
            f"The scores of {what} are NaN or infinite for samples {(~finite).nonzero()[:, 0].tolist()}: are their "
            "images, depth and intrinsics finite, and do the weights fit their precision?"
        )


def _push(scores, streams, choose) -> torch.Tensor:
    """Choose what each stream allows; mask the others' scores in place."""
    allowed = torch.from_numpy(np.stack([stream.allowed() for stream in streams])).to(scores.device)
    ended = ~allowed.any(-1)
    chosen = choose(scores.masked_fill(~(allowed | ended[:, None]), -torch.inf)).masked_fill(ended, ENDED)
    scores.masked_fill_(~allowed, -torch.inf)
    for stream, token in zip(streams, chosen.tolist(), strict=True):
        if token != ENDED:
            stream.push(token)
    return chosen
