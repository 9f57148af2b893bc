"""Discrete diffusion of action tokens: all of them masked, predicted in parallel, revealed from the surest on.

Training hides a random part of a chunk's tokens and asks for them; it may replace some of the others, and ask there,
too. Decoding begins with all hidden; every pass predicts each of them, keeps those it is surest of, and may take back
what it has come to doubt. No model in here: `predict` is one.

Source: Discrete Diffusion VLA, https://huggingface.co/papers/2508.20072, sections 3.2 to 3.5; the schedule is
MaskGIT's, https://huggingface.co/papers/2202.04200, section 3.2
"""

import math
from collections.abc import Callable

import torch

from hf_vla.actions.heads.networks.samples import draw


def cosine_schedule(num_tokens: int, num_steps: int) -> list[int]:
    """Count the tokens that are still masked after each pass: few are revealed at first, many at last.

    Rounded down, as Discrete Diffusion VLA's code does (MaskGIT rounds up), and every pass reveals one at least.

    Args:
        num_tokens (`int`): of a chunk.
        num_steps (`int`): passes, 1 to `num_tokens`.

    Returns:
        `list[int]`: `num_steps` numbers, falling, the last of them 0.

    Raises:
        ValueError: there are no passes, or more than tokens.
    """
    if not 1 <= num_steps <= num_tokens:
        raise ValueError(
            f"Expected 1 to {num_tokens} decoding passes, as many as a chunk has tokens at most, got {num_steps}."
        )
    schedule = [num_tokens]
    for step in range(1, num_steps):
        ratio = math.cos(math.pi / 2 * step / num_steps)
        schedule.append(min(math.floor(ratio * num_tokens), schedule[-1] - 1))
    return [*schedule[1:], 0]


def random_mask(real: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Choose what is hidden in training: a ratio for each sample, drawn as the schedule would pass through it.

    Args:
        real (`torch.Tensor` of shape `(batch_size, num_tokens)`, bool): True where a token is of a real action.
        generator (`torch.Generator`, *optional*): makes the choice repeatable; torch's own by default.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_tokens)`, bool: True where the model sees the mask token. At least
        one real token of a sample that has any, and all that are not real: a padded action would tell of real ones.
    """
    time = torch.rand(len(real), generator=generator, device=real.device)
    count = torch.ceil(torch.cos(math.pi / 2 * time) * real.sum(-1)).clamp(min=1)
    draws = torch.rand(real.shape, generator=generator, device=real.device).masked_fill(~real, 2.0)  # come last
    return (_rank(draws) < count[:, None]) | ~real


def replace(ids: torch.Tensor, visible: torch.Tensor, id_ranges: torch.Tensor, rate: float) -> torch.Tensor:
    """Replace some visible ids by others that are permitted there, all alike likely.

    Args:
        ids (`torch.Tensor` of shape `(batch_size, num_tokens)`): of chunks.
        visible (`torch.Tensor` of the same shape, bool): which may be replaced.
        id_ranges (`torch.Tensor` of shape `(num_tokens, 2)`): see [`decode`].
        rate (`float`): share of the visible ones that are drawn anew.

    Returns:
        `torch.Tensor` of the shape of `ids`.
    """
    first, stop = id_ranges.T
    drawn = first + (torch.rand(ids.shape, device=ids.device) * (stop - first)).long()
    return torch.where(visible & (torch.rand(ids.shape, device=ids.device) < rate), drawn, ids)


def decode(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    id_ranges: torch.Tensor,
    batch_size: int,
    num_steps: int,
    *,
    remask_threshold: float = 0.0,
    remask_drop: float = 1.0,
    temperature: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill in a chunk in `num_steps` passes.

    A pass proposes an id for every masked position and reveals the surest, those with the highest probability, as many
    as `cosine_schedule` wants. A revealed id is masked again by a later pass, for the next one to predict anew, if its
    probability is now below `remask_threshold * step / num_steps` (the paper's threshold check, which rises) or has
    fallen by more than `remask_drop` since it was revealed (its residual-drop check). The passes that follow reveal so
    many more, and their number stays. The paper compares the probability of the likeliest id; this one that of the id
    which stands there, so that a model which has become sure of another one gives it back.

    Args:
        predict (`Callable`): `(ids, masked)`, both `(batch_size, num_tokens)`, to scores `(batch_size, num_tokens,
            vocab_size)`; called once a pass. Ids of masked positions mean nothing.
        id_ranges (`torch.Tensor` of shape `(num_tokens, 2)`): permitted ids `[first, last + 1)` of each position.
        batch_size (`int`): number of chunks.
        num_steps (`int`): passes, 1 to `num_tokens`.
        remask_threshold (`float`): in [0, 1]; 0 turns the check off.
        remask_drop (`float`): in [0, 1]; 1 turns the check off.
        temperature (`float`): of the ids' sampling in the first pass; it falls with the number of masked positions.
            0: the likeliest ids.
        generator (`torch.Generator`, *optional*): makes sampling repeatable; a list has one for each sample.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: ids `(batch_size, num_tokens)`, int64, and the scores `(batch_size,
        num_tokens, vocab_size)` that each was chosen by, float32, `-inf` where an id is not permitted.

    Raises:
        ValueError: the number of passes, a check's bound, the temperature or the number of generators is no use.
    """
    num_tokens, device = len(id_ranges), id_ranges.device
    schedule = cosine_schedule(num_tokens, num_steps)
    for name, bound in (("remask_threshold", remask_threshold), ("remask_drop", remask_drop)):
        if not 0 <= bound <= 1:
            raise ValueError(f"Expected a {name} in [0, 1], a probability, got {bound}.")
    if temperature < 0:
        raise ValueError(f"Expected a temperature of 0 or more, got {temperature}.")
    ids = torch.zeros(batch_size, num_tokens, dtype=torch.long, device=device)
    masked = torch.ones_like(ids, dtype=torch.bool)
    surety = torch.zeros(ids.shape, device=device)  # of each id, when it was revealed
    chosen_by = None
    for step, (before, after) in enumerate(zip([num_tokens, *schedule], schedule, strict=False), start=1):
        scores = predict(ids, masked).float()
        allowed = torch.arange(scores.shape[-1], device=device)
        allowed = (allowed >= id_ranges[:, :1]) & (allowed < id_ranges[:, 1:])
        scores = scores.masked_fill(~allowed, -torch.inf)
        ids = torch.where(masked, _choose(scores, temperature * before / num_tokens, generator), ids)
        probability = scores.softmax(-1).gather(-1, ids[..., None])[..., 0]
        # what stands already comes first
        revealed = masked & (_rank(-probability.masked_fill(~masked, 2.0)) < num_tokens - after)
        doubted = ~masked & (probability < remask_threshold * step / num_steps)
        doubted |= ~masked & (surety - probability > remask_drop)
        surety = torch.where(revealed, probability, surety)
        chosen_by = scores if chosen_by is None else torch.where(revealed[..., None], scores, chosen_by)
        masked = (masked & ~revealed) | doubted
    return ids, chosen_by


def _choose(scores: torch.Tensor, temperature: float, generator) -> torch.Tensor:
    """Likeliest ids, or, by the Gumbel-max trick, ids drawn from the softmax of `scores / temperature`."""
    if temperature == 0:
        return scores.argmax(-1)
    draws = draw(torch.rand, scores.shape, generator=generator, device=scores.device, dtype=scores.dtype)
    return (scores - temperature * (-draws.log()).log()).argmax(-1)


def _rank(values: torch.Tensor) -> torch.Tensor:
    """Place of each value among those of its row, the smallest first; of equal ones the left."""
    return values.argsort(dim=-1, stable=True).argsort(dim=-1)
