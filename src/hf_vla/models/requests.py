"""Several policies that ask one model at the same time: who may share a batch with whom, so that nobody notices."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_vla.models.outputs import VLAOutput


@dataclass(eq=False)
class Request:
    """What one policy asks a model for.

    Args:
        model ([`~transformers.PreTrainedModel`]), processor ([`~transformers.ProcessorMixin`]): of one checkpoint.
        unnorm_key (`str`): dataset whose robot is driven.
        inputs (`dict`): what the processor makes of one observation.
        options (`dict`): of `predict_action`.
        talks (`bool`): whether the model is going to reason in words of its own.
    """

    model: Any
    processor: Any
    unnorm_key: str
    inputs: dict[str, Any]
    options: dict[str, Any]
    talks: bool = False

    def way(self) -> tuple:
        """All that may lead a model another way than the numbers do; the same for requests that may share a batch.

        Prompts of other lengths, or with other places masked, would make the sums of a row longer or choose another
        kernel, and a model that talks goes on until the last of a batch has ended: a row's last bits would depend on
        the others.
        """
        options = {name: value for name, value in self.options.items() if name != "generator"}
        alone = self if self.talks else None
        marks = [(name, _mark(name, value)) for name, value in {**self.inputs, **options}.items()]
        return self.model, self.processor, alone, self.unnorm_key, "generator" in self.options, *marks


def answer(requests: list[Request], batch_size: int | None = None) -> list[tuple[np.ndarray, VLAOutput]]:
    """Predict, requests that may share a batch in one call of the model.

    Args:
        requests (`list[Request]`): in any order.
        batch_size (`int`, *optional*): of every batch, larger groups being split and smaller ones filled up with
            copies. An answer is then the same to the last bit whoever shares the batch: on one thread, and wherever
            else the numbers of a row do not depend on its place. Default: as many as there are.

    Returns:
        `list[tuple]`: for each request the chunk `(chunk_size, action_dim)` in robot units and a
        [`~hf_vla.models.outputs.VLAOutput`] of its own `reasoning_ids`.

    Raises:
        ValueError: see the model's `predict_action` and the processor's `decode_actions`. No random numbers are used
            up then.
    """
    generators = [request.options["generator"] for request in requests if "generator" in request.options]
    places = [generator.get_state() for generator in generators]
    try:
        return _answer(requests, batch_size)
    except Exception:
        for generator, place in zip(generators, places, strict=True):
            generator.set_state(place)
        raise


def _answer(requests, batch_size):
    groups: dict[tuple, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(request.way(), []).append(place)
    answers: dict[int, tuple[np.ndarray, VLAOutput]] = {}
    for group in groups.values():
        size = 1 if requests[group[0]].talks else batch_size or len(group)
        for first in range(0, len(group), size):
            batch = group[first : first + size]
            answers |= zip(batch, _run([requests[place] for place in batch], size), strict=True)
    return [answers[place] for place in range(len(requests))]


def _mark(name, value):
    if not isinstance(value, torch.Tensor):
        return value
    numbers = value.is_floating_point() or name in ("input_ids", "reasoning_ids")
    return tuple(value.shape), None if numbers else value.cpu().numpy().tobytes()


def _run(requests, size):
    """Answers of one call of the model on `size` rows."""
    first, rows = requests[0], requests + requests[:1] * (size - len(requests))
    inputs = type(first.inputs)({name: _joined([row.inputs[name] for row in rows]) for name in first.inputs})
    options = {name: _joined([row.options[name] for row in rows]) for name in first.options if name != "generator"}
    if "generator" in first.options:
        generators = [request.options["generator"] for request in requests]
        generators += [torch.Generator(generators[0].device) for _ in rows[len(requests) :]]  # nobody needs the copies
        options["generator"] = generators[0] if size == 1 else generators
    output = first.model.predict_action(**inputs.to(first.model.device), **options)
    chunks = first.processor.decode_actions(output, first.unnorm_key)
    return [(chunks[place], _row(output, place)) for place in range(len(requests))]


def _joined(values):
    return torch.cat(values) if isinstance(values[0], torch.Tensor) and len(values) > 1 else values[0]


def _row(output, place):
    ids = output.reasoning_ids
    return VLAOutput(reasoning_ids=None if ids is None else ids[place : place + 1])
