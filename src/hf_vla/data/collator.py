"""From a list of dataset items to the processor's batch."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch

from hf_vla.data import schema
from hf_vla.data.mixture import DATASET, EPOCH
from hf_vla.data.tail import hold_tail

STATE_DRAWS = 1  # beside those of cameras, which have no number


class VLACollator:
    """Stacks dataset items and hands them to the processor, with their actions as training targets.

    Args:
        processor: a processor of this library; called with `images, text, unnorm_key, actions, action_mask`.
        unnorm_key (`str`, *optional*): the dataset whose statistics normalise the actions of items that do not say,
            as those of a [`~hf_vla.data.mixture.Mixture`] do, which dataset they are from.
        cameras (`Sequence[str]`): the cameras to look through, with or without `observation.images.`. The processor
            gets a picture for each sample; of several cameras a dictionary, camera's name -> picture.
        with_state (`bool`, defaults to `False`): also hand over `observation.state`.
        reasoning (`str`, *optional*): the text of the items that the model learns to say before it acts, such as
            `subtask`; in training batches alone. None in an item, or a blank text, is no reasoning: none is learnt.
        hold_tail (`bool`, defaults to `False`): in training batches, the actions of a chunk that lie behind its
            episode's end hold the robot's position, see [`~hf_vla.data.tail.hold_tail`], instead of counting for
            nothing.
    """

    def __init__(
        self,
        processor,
        unnorm_key: str | None,
        cameras: Sequence[str],
        with_state: bool = False,
        reasoning: str | None = None,
        hold_tail: bool = False,
    ):
        self.processor, self.reasoning, self.hold_tail = processor, reasoning, hold_tail
        self.unnorm_key = unnorm_key
        if isinstance(cameras, str) or not cameras:
            raise ValueError(f"Expected a list of cameras, one or more, came {cameras!r}.")
        self.camera_keys = [schema.camera_key(camera) for camera in cameras]
        self.with_state = with_state
        self.terminates = getattr(getattr(processor, "action_codec", None), "terminates", False)

    def __call__(self, items: Sequence[dict], camera_dropout: float = 0.0, state_dropout: float = 0.0, seed: int = 0):
        """Make a training batch.

        Args:
            items (`Sequence[dict]`): of the dataset.
            camera_dropout (`float`): probability with which each camera of a sample that has several is withheld,
                though never all of them.
            state_dropout (`float`): probability with which the state of a sample is withheld: normalised zeros, the
                mean state in families that normalise it so, stand in its place.
            seed (`int`): settles, together with each item's dataset, row and epoch, which are withheld: a run that is
                resumed, or divided among processes and workers, withholds the same.

        Raises:
            ValueError: the items lack the camera, the actions' padding, the state or the reasoning.
        """
        targets = self._held(items) if self.hold_tail else self._targets(items)
        if self.terminates:
            targets["terminate"] = self._terminate(items)
        if self.reasoning is not None:
            targets["reasoning"] = [self._reasoning(item) for item in items]
        if camera_dropout:
            items = [self._withhold(item, camera_dropout, seed) for item in items]
        batch = self._process(items, **targets)
        if state_dropout and self.with_state:
            out = [self._generator(item, seed, STATE_DRAWS).random() < state_dropout for item in items]
            batch["state"][torch.tensor(out)] = 0
        return batch

    def prompts(self, items: Sequence[dict]) -> dict:
        """Make a batch to predict on: the prompts as `inputs`, beside `actions` and `action_mask` to compare with."""
        return {**self._targets(items), "inputs": dict(self._process(items))}

    def _targets(self, items):
        needed = [*self.camera_keys, schema.ACTION, schema.ACTION + schema.PAD_SUFFIX]
        needed += [schema.STATE] * self.with_state
        missing = [key for key in needed if key not in items[0]]
        if missing:
            raise ValueError(
                f"The items hold no {missing}, only {sorted(items[0])}; "
                "actions need delta_timestamps for their chunk, cameras must be among those decoded."
            )
        return {
            "actions": _stacked([item[schema.ACTION] for item in items]),
            # The dataset marks what is padding, everything above it marks what is real: inverted here and only here.
            "action_mask": ~torch.stack([item[schema.ACTION + schema.PAD_SUFFIX] for item in items]),
        }

    def _held(self, items):
        targets = self._targets(items)
        specs = [self.processor.action_codec.specs(key)[0] for key in self.unnorm_keys(items)]
        chunks = zip(targets["actions"], targets["action_mask"], specs, strict=True)
        held = [torch.as_tensor(hold_tail(chunk.numpy(), ~real.numpy(), spec)) for chunk, real, spec in chunks]
        return {"actions": _stacked(held), "action_mask": torch.ones_like(targets["action_mask"])}

    def _terminate(self, items):
        """Where an episode ends with an action: there is no row behind it."""
        if schema.TIMESTAMP + schema.PAD_SUFFIX not in items[0]:
            raise ValueError(
                "The model learns where episodes end: give the dataset a window of the rows behind a chunk's actions, "
                f"delta_indices={{{schema.TIMESTAMP!r}: range(1, chunk_size + 1)}}."
            )
        return torch.stack([item[schema.TIMESTAMP + schema.PAD_SUFFIX] for item in items])

    def unnorm_keys(self, items: Sequence[dict]) -> list[str | None]:
        """Return the dataset of each item."""
        return [item.get(DATASET, self.unnorm_key) for item in items]

    def _reasoning(self, item):
        text = item.get(self.reasoning, item)  # the item itself is no text
        if text is None or isinstance(text, str):
            return text if text and not text.isspace() else None
        texts = sorted(key for key, value in item.items() if value is None or isinstance(value, str))
        raise ValueError(f"The items hold no text {self.reasoning!r} to learn as reasoning, only {texts}.")

    def _process(self, items, **targets):
        state = {"state": _stacked([item[schema.STATE] for item in items])} if self.with_state else {}
        return self.processor(
            images=[self._pictures(item) for item in items],
            text=[item[schema.TASK] for item in items],
            unnorm_key=self.unnorm_keys(items),
            return_tensors="pt",
            **targets,
            **state,
        )

    def _withhold(self, item, probability, seed):
        there = [key for key in self.camera_keys if item[key] is not None]
        generator = self._generator(item, seed)
        withheld = generator.random(len(there)) < probability
        if there and withheld.all():
            withheld[generator.integers(len(there))] = False
        return item | {key: None for key, out in zip(there, withheld, strict=True) if out}

    def _generator(self, item, seed, *draws):
        name = zlib.crc32(str(item.get(DATASET, self.unnorm_key)).encode())
        return np.random.default_rng([seed, item.get(EPOCH, 0), name, int(item["index"]), *draws])

    def _pictures(self, item):
        if len(self.camera_keys) == 1:
            return _history(item, self.camera_keys[0])
        return {key.removeprefix(schema.IMAGES): _history(item, key) for key in self.camera_keys}


def _history(item, key):
    """A camera's picture or, of several observations, the list of them; None before the episode began."""
    pictures, is_pad = item[key], item.get(key + schema.PAD_SUFFIX)
    if pictures is None or is_pad is None:
        return pictures
    return [None if padded else picture for picture, padded in zip(pictures, is_pad.tolist(), strict=True)]


def _stacked(rows: list[torch.Tensor]):
    """One array where all rows have one shape; robots of different sizes keep theirs, in a list."""
    return torch.stack(rows) if len({row.shape for row in rows}) == 1 else rows
