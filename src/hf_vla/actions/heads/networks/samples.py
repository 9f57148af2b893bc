"""What everything that draws actions shares: noise from its generators, a check of what came out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


def check_finite(actions: torch.Tensor) -> torch.Tensor:
    """Return predicted actions as they are, or raise.

    Raises:
        ValueError: some are NaN or infinite; the text names their samples.
    """
    finite = torch.isfinite(actions).flatten(1).all(1)
    if not finite.all():
        raise ValueError(
            f"The predicted actions of samples {(~finite).nonzero()[:, 0].tolist()} are NaN or infinite: are their "
            "images and states finite, and do the weights fit their precision?"
        )
    return actions


def draw(
    function: Callable[..., torch.Tensor],
    *arguments: Any,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    **options: Any,
) -> torch.Tensor:
    """Random numbers, drawn where the generator lives.

    Args:
        function, arguments, options: such as `torch.randn`, a shape and a dtype; `device` is where the numbers go to.
        generator (`torch.Generator`, *optional*): on any device; None: the global one of `device`. A list has one for
            each sample: what a sample draws does not depend on the others.

    Returns:
        `torch.Tensor` on `device`.

    Raises:
        ValueError: there is another number of generators than of samples.
    """
    device = options.pop("device")
    if isinstance(generator, Sequence):
        *others, shape = arguments
        if len(generator) != shape[0]:
            raise ValueError(f"Expected a generator for each of {shape[0]} samples, came {len(generator)}.")
        own = (1, *shape[1:])
        return torch.cat([draw(function, *others, own, generator=g, device=device, **options) for g in generator])
    place = device if generator is None else generator.device
    return function(*arguments, generator=generator, device=place, **options).to(device)
