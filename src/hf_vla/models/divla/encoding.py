"""Where in a sequence of tokens DiVLA's prompt ends and its reasoning is."""

from typing import NamedTuple

import torch

from hf_vla.models.batches import IGNORED
from hf_vla.models.divla.configuration_divla import DiVLAConfig


class Encoding(NamedTuple):
    """Prompt and reasoning behind the backbone.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): behind the final norm.
        mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, bool): True where a token is real.
        is_reasoning (`torch.Tensor` of shape `(batch_size, sequence_length)`, bool): True where a real token is of
            the reasoning, be it the model's own or given.
    """

    hidden_states: torch.Tensor
    mask: torch.Tensor
    is_reasoning: torch.Tensor


def check_ids(name: str, ids: torch.Tensor, shape: tuple[int, int | None]) -> None:
    """Raise where ids are not of integers or of a shape, in which None stands for any length."""
    is_tensor = isinstance(ids, torch.Tensor)
    fits = is_tensor and ids.dtype == torch.long and ids.ndim == 2
    if not fits or any(size not in (None, own) for own, size in zip(ids.shape, shape, strict=True)):
        got = f"shape {tuple(ids.shape)} of {ids.dtype}" if is_tensor else f"a {type(ids).__name__}"
        wanted = ", ".join("any length" if size is None else str(size) for size in shape)
        raise ValueError(f"Expected {name} as a tensor of shape ({wanted}) of torch.int64, got {got}.")


def reasoning_mask(input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """True from the first label of a real token on."""
    if labels is None:
        return torch.zeros_like(mask)
    check_ids("labels", labels, tuple(input_ids.shape))
    is_reasoning = ((labels != IGNORED) & mask).cumsum(-1) > 0
    in_front = (mask & ~is_reasoning).any(-1)
    if bare := (~in_front & is_reasoning.any(-1)).nonzero()[:, 0].tolist():
        raise ValueError(
            f"Expected labels of {IGNORED} over the prompts, got one for the first token in samples {bare}."
        )
    return is_reasoning


def pad_left(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, image_token_id: int):
    """Prompts behind which a reasoning can stand: some backbones count the tokens in between, padding or not."""
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids)
    in_prompt = attention_mask.bool() | (input_ids == image_token_id)
    order = in_prompt.int().argsort(dim=-1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def append(config: DiVLAConfig, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, reasoning_ids):
    """Prompts with a reasoning behind them, and its labels; nothing is real behind its first end token."""
    check_ids("reasoning_ids", reasoning_ids, (len(input_ids), None))
    vocab_size, image = config.get_text_config().vocab_size, config.image_token_id
    if ((reasoning_ids < 0) | (reasoning_ids >= vocab_size) | (reasoning_ids == image)).any():
        raise ValueError(
            f"Expected reasoning_ids of 0 to {vocab_size - 1}, without the image token {image}, got "
            f"{reasoning_ids.tolist()}."
        )
    is_end = reasoning_ids == config.end_token_id
    if reasoning_ids.shape[1] and not is_end.any(-1).all():
        raise ValueError(
            f"Expected every reasoning to end with the token {config.end_token_id}: give reasoning_ids as an "
            "earlier output had them, or a text as `reasoning` to the processor."
        )
    input_ids, attention_mask = pad_left(input_ids, attention_mask, image)
    mask = is_end.cumsum(-1) - is_end.long() == 0
    labels = torch.cat([torch.full_like(input_ids, IGNORED), reasoning_ids.masked_fill(~mask, IGNORED)], 1)
    attention_mask = torch.cat([attention_mask, mask.to(attention_mask.dtype)], 1)
    return torch.cat([input_ids, reasoning_ids], 1), attention_mask, labels


def last_real(mask: torch.Tensor) -> torch.Tensor:
    """Where, up to each token, the last real one is: it says the next, even if a missing camera is in between."""
    return torch.where(mask, torch.arange(mask.shape[1], device=mask.device), 0).cummax(-1).values


def without_end(encoding: Encoding) -> Encoding:
    """Without the last token of each reasoning."""
    states, mask, is_reasoning = encoding
    kept = ~is_reasoning | (is_reasoning.cumsum(-1) < is_reasoning.sum(-1, keepdim=True))
    return Encoding(states, mask & kept, is_reasoning & kept)
