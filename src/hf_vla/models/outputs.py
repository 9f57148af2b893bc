"""What every model of hf_vla returns."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


@dataclass
class VLAOutput(ModelOutput):
    """Output of `forward` and `predict_action` of every family; fields a family does not fill stay `None`.

    Args:
        loss (`torch.Tensor` of shape `()`): training loss, when targets were given.
        logits (`torch.Tensor`): scores over tokens. `forward`: `(batch_size, sequence_length, vocab_size)`;
            `predict_action`: `(batch_size, num_action_tokens, action_vocab_size)`, `-inf` where a step forbids an id.
        actions (`torch.Tensor` of shape `(batch_size, chunk_size, action_dim)`): normalised actions of a
            continuous head.
        action_ids (`torch.Tensor` of shape `(batch_size, num_action_tokens)`, int64): ids of an action tokenizer,
            relative to its own vocabulary (0 is its first id); -100 behind a chunk that needs fewer than another of
            the batch.
        reasoning_ids (`torch.Tensor` of shape `(batch_size, reasoning_length)`, int64): the reasoning with its end
            token, padded on the right.
        diffusion_loss (`torch.Tensor` of shape `()`): the action head's part of a loss that has several.
        ntp_loss (`torch.Tensor` of shape `()`): the reasoning's part, next-token prediction, before it is weighted.
        reconstruction_loss (`torch.Tensor` of shape `()`): the part of latents that hold less than actions do.
        volume_loss (`torch.Tensor` of shape `()`): the part that keeps latents from shrinking in front of a frozen
            head.
        hidden_states, attentions, past_key_values: as in transformers.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    actions: torch.Tensor | None = None
    action_ids: torch.Tensor | None = None
    reasoning_ids: torch.Tensor | None = None
    diffusion_loss: torch.Tensor | None = None
    ntp_loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    volume_loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    past_key_values: Cache | None = None
