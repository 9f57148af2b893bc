"""What processors share: a dataset's cameras; of models that emit normalised actions, all but their prompts."""

from abc import abstractmethod

import numpy as np
from PIL import Image
from transformers import ProcessorMixin

from hf_vla.actions.codec import ActionCodec
from hf_vla.actions.spec import CameraSpec
from hf_vla.models.batches import (
    VLAFeatures,
    as_numpy,
    decode_predictions,
    is_batch,
    one_each,
    per_sample,
    rows,
    targets,
)
from hf_vla.models.images import pil_backend, to_rgb
from hf_vla.models.kept_code import KeepsCode
from hf_vla.models.outputs import VLAOutput

DEFAULT_CAMERAS = "default"


class VLAProcessor(KeepsCode, ProcessorMixin):
    """`ProcessorMixin` that knows the code which came with its checkpoint, if any did."""

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        """Build the processor from processor_config.json."""
        made = super().from_args_and_dict(args, processor_dict, **kwargs)
        if "auto_map" in processor_dict:
            processor = made[0] if kwargs.get("return_unused_kwargs") else made
            processor.auto_map = processor_dict["auto_map"]
        return made


class ContinuousActionProcessor(VLAProcessor):
    """Everything outside a network that emits normalised actions; a family says how pictures and words enter it.

    Args:
        image_processor, tokenizer: of the family.
        statistics (`dict`, *optional*): `{unnorm_key: {"action": {...}, "state": {...}}}`.
        action_config (`dict`, *optional*): chunk size, normalisations and specs, see
            [`~hf_vla.actions.codec.ActionCodec`]. With `"state_normalization"` every call needs a state, with
            `"n_obs_steps"` above 1 what was seen before.
        camera_config (`dict`, *optional*): `{unnorm_key: [CameraSpec.to_dict(), ...]}`, in the order in which the
            cameras' pictures enter the network; the key `"default"` serves every dataset that has none of its own.
        chat_template (`str`, *optional*): unused, kept for `ProcessorMixin`.
    """

    takes_reasoning = False  # whether the family's model says, or is told, in words what it is about to do
    takes_history = False  # whether it sees more than the present

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        statistics=None,
        action_config=None,
        camera_config=None,
        chat_template=None,
    ):
        self.statistics, self.action_config, self.camera_config = statistics, action_config, camera_config
        self.action_codec = ActionCodec(statistics, action_config)
        if self.action_codec.tokenizer is not None:
            raise ValueError("This model predicts continuous actions: leave action_config['tokenizer'] out.")
        if self.action_codec.n_obs_steps > 1 and not self.takes_history:
            raise ValueError(
                f"A {type(self).__name__} is of a model that sees one observation, the present: leave "
                f"action_config['n_obs_steps'] out, came {self.action_codec.n_obs_steps}. TinyVLA and SpatialVLA see "
                "several."
            )
        self.cameras = {key: _camera_specs(key, cameras) for key, cameras in (camera_config or {}).items()}
        super().__init__(pil_backend(image_processor), tokenizer, chat_template=chat_template)

    @abstractmethod
    def encode_prompts(
        self, views: list[list[tuple[Image.Image, bool]]], texts: list[str], reasonings: list[str | None]
    ) -> dict[str, np.ndarray]:
        """Turn pictures, instructions and reasonings into the network's inputs.

        Args:
            views (`list[list[tuple]]`): for each sample, step (the oldest first) and camera an RGB picture and whether
                it is there; one that is missing is black.
            texts (`list[str]`): instructions, unchecked.
            reasonings (`list[str | None]`): unchecked; of families without `takes_reasoning` always None.

        Returns:
            `dict[str, np.ndarray]`: inputs by name, padded.

        Raises:
            ValueError: an instruction or reasoning is no text, or holds tokens that control the model.
        """

    def __call__(
        self,
        images=None,
        text=None,
        state=None,
        actions=None,
        action_mask=None,
        unnorm_key=None,
        intrinsics=None,
        depth=None,
        reasoning=None,
        return_tensors="pt",
    ) -> VLAFeatures:
        """Prepare a batch, in training and inference alike.

        Args:
            images: one entry, or a list with one per sample: an image, where one camera is declared, else
                `{camera name: image or None}`, None where the camera's picture is missing; see
                [`~hf_vla.models.images.to_rgb`]. Where the checkpoint sees `n_obs_steps` above 1, lists of as many in
                place of an image, the oldest first, None where the episode had not begun. Cameras that the sample's
                dataset does not declare may be there as None.
            text (`str` or `list[str]`): instruction, one for all or one per sample; blanks around it are dropped. It
                may be empty: there are datasets without instructions.
            state (`(S,)` or `(batch_size, S)`, *optional*): robot units; needed where the checkpoint declares one;
                `(n_obs_steps, S)` or `(batch_size, n_obs_steps, S)` where it sees several, before the episode began
                the first. A list of one per sample where robots have different sizes.
            actions (`(T, D)` or `(batch_size, T, D)`, *optional*): targets in robot units; a list of one per sample
                where robots have different sizes.
            action_mask (`(T,)` or `(batch_size, T)` of bool, *optional*): True where an action is real.
            unnorm_key (`str` or `list[str]`, *optional*): dataset of the samples; chooses statistics and cameras.
            intrinsics, depth: other families'; refused.
            reasoning (`str` or `list[str | None]`, *optional*): what the model is to say, or did, before it acts; one
                for all or one per sample; blanks around it are dropped. None in training: the sample teaches no
                reasoning. None in prediction: the model reasons by itself, so give all samples theirs, or none.
                Refused by families that say nothing.
            return_tensors (`str`): `"pt"` or `"np"`.

        Returns:
            [`~hf_vla.models.batches.VLAFeatures`] with the family's inputs, `state` `(batch_size, S)` or
            `(batch_size, n_obs_steps, S)` and what `routing` says; with `actions` also `actions` `(batch_size, T, D)`
            and `action_mask` `(batch_size, T)`; states and actions normalised, float32. Where a dataset of the
            checkpoint has fewer dimensions than its model, `action_mask` is always there, `(batch_size, T, D)`.

        Raises:
            ValueError: something is missing, not declared or not usable, no camera has a picture, or counts differ.
        """
        _refuse(intrinsics=intrinsics, depth=depth, reasoning=None if self.takes_reasoning else reasoning)
        images, texts, keys = per_sample(images, text, unnorm_key)
        routing = self.routing(keys)
        codec = self.action_codec
        views = [
            _views(sample, self.camera_specs(key), codec.n_obs_steps) for sample, key in zip(images, keys, strict=True)
        ]
        if blind := [index for index, sample in enumerate(views) if not any(there for _, there in sample)]:
            raise ValueError(f"Expected a picture of at least one camera, got none for the samples {blind}.")
        data = self.encode_prompts(views, texts, _reasonings(reasoning, len(texts)))
        if codec.takes_state:
            data["state"] = self._states(state, keys)
        elif state is not None:
            raise ValueError("This checkpoint takes no state; leave `state` out.")
        own = self.own_dims(keys)
        if actions is not None:
            chunks, mask = targets(actions, action_mask, len(texts))
            encoded = [codec.encode(chunk, key, self.pads) for chunk, key in zip(chunks, keys, strict=True)]
            # Zero in robot units may be far from zero when it is normalised.
            data["actions"] = np.where(mask[..., None], np.stack(encoded), np.float32(0))
            data["action_mask"] = mask if own is None else mask[..., None] & own[:, None]
        elif own is not None:
            data["action_mask"] = own[:, None].repeat(codec.chunk_size, axis=1)
        return VLAFeatures(data | routing, tensor_type=return_tensors)

    @property
    def pads(self) -> bool:
        """Whether robots of fewer dimensions than the model's are padded to these."""
        return True

    def own_dims(self, unnorm_keys: list[str | None]) -> np.ndarray | None:
        """Which dimensions are a robot's own, see [`~hf_vla.actions.codec.ActionCodec.own_dims`].

        Args:
            unnorm_keys (`list[str | None]`): dataset of each sample.

        Returns:
            `np.ndarray` of shape `(batch_size, action_dim)`, bool. None where the model need not be told.
        """
        return self.action_codec.own_dims(unnorm_keys)

    def routing(self, unnorm_keys: list[str | None]) -> dict[str, str]:
        """Say which part of the network a batch is for.

        Args:
            unnorm_keys (`list[str | None]`): dataset of each sample.

        Returns:
            `dict[str, str]`: arguments of the model; none by default.

        Raises:
            ValueError: the batch is for several parts.
        """
        return {}

    def decode_actions(self, output: VLAOutput, unnorm_key=None) -> np.ndarray:
        """Turn predicted actions into robot actions.

        Args:
            output ([`VLAOutput`] of `predict_action`).
            unnorm_key (`str` or `list[str]`, *optional*): dataset whose robot acts, one for all or one per sample;
                may be left out where the checkpoint knows one dataset.

        Returns:
            `np.ndarray` of shape `(batch_size, chunk_size, action_dim)`: float32, robot units. Where the robots of a
            list have different numbers of dimensions, NaN stands behind those of the smaller ones.

        Raises:
            ValueError: there are no predicted actions in it, or the statistics are not known.
        """
        if getattr(output, "actions", None) is None:
            raise ValueError(
                f"Expected the output of predict_action, got a {type(output).__name__} without `actions`."
            )
        return decode_predictions(self.action_codec, as_numpy(output.actions), unnorm_key)

    def camera_specs(self, unnorm_key: str | None = None) -> tuple[CameraSpec, ...]:
        """Cameras of a dataset, in the order of the prompt.

        Args:
            unnorm_key (`str`, *optional*): a dataset's name; may be left out where the checkpoint knows one.

        Returns:
            `tuple[CameraSpec, ...]`: its own, else the default ones; () where none is declared at all.

        Raises:
            ValueError: the key is unknown, or there are several datasets, no default and no key.
        """
        return dataset_cameras(self.cameras, self.action_codec, unnorm_key)

    def _states(self, state, keys) -> np.ndarray:
        if state is None:
            raise ValueError("This checkpoint needs the robot's state: give `state`, one row of numbers per sample.")
        codec, steps = self.action_codec, self.action_codec.n_obs_steps
        leading = () if steps == 1 else (steps,)
        states = rows(state, len(leading) + 1)
        for each in states:
            if each.dtype.kind not in "fiu":
                raise ValueError(f"Expected a state of numbers, got {each.dtype}: {each.tolist()}.")
        if len(states) != len(keys) or any(each.shape[:-1] != leading or not each.ndim for each in states):
            wanted = ", ".join(map(str, (len(keys), *leading, "S")))
            got = (len(states), *states[0].shape) if states else (0,)
            raise ValueError(
                f"Expected a state of shape ({wanted}), one row per sample{' and step' * (steps > 1)}, got {got}."
            )
        return np.stack([codec.encode_state(each, key, self.pads) for each, key in zip(states, keys, strict=True)])


def dataset_cameras(
    cameras: dict[str, tuple[CameraSpec, ...]], codec: ActionCodec, unnorm_key: str | None
) -> tuple[CameraSpec, ...]:
    """Choose a dataset's cameras.

    Args:
        cameras (`dict[str, tuple[CameraSpec, ...]]`): by dataset; the key `"default"` serves all others.
        codec ([`~hf_vla.actions.codec.ActionCodec`]): knows the datasets.
        unnorm_key (`str`, *optional*): a dataset's name; may be left out where the codec knows one.

    Returns:
        `tuple[CameraSpec, ...]`: () where none is declared at all.

    Raises:
        ValueError: the key is unknown, or there are several datasets, no default and no key.
    """
    if unnorm_key is None and len(codec.keys) == 1:
        unnorm_key = codec.keys[0]
    if unnorm_key in cameras:
        return cameras[unnorm_key]
    if unnorm_key is not None:
        codec.resolve_key(unnorm_key)
    if cameras and DEFAULT_CAMERAS not in cameras:
        raise ValueError(f"No cameras for {unnorm_key!r}; this checkpoint knows those of {sorted(cameras)}.")
    return cameras.get(DEFAULT_CAMERAS, ())


def _refuse(**others) -> None:
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"This model takes no {name}; leave `{name}` out.")


def _reasonings(reasoning, batch_size: int) -> list[str | None]:
    reasonings = one_each(reasoning, batch_size, "reasoning")
    if len(reasonings) != batch_size:
        raise ValueError(f"Got {len(reasonings)} reasonings for {batch_size} samples: give one per sample.")
    return reasonings


def _camera_specs(key: str, cameras) -> tuple[CameraSpec, ...]:
    if not isinstance(cameras, (list, tuple)) or not cameras:
        raise ValueError(f"Expected a list of cameras in camera_config[{key!r}], got {cameras!r}.")
    specs = tuple(CameraSpec.from_dict(camera) for camera in cameras)
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names) or (len(names) > 1 and None in names):
        raise ValueError(f"Expected cameras of different names in camera_config[{key!r}], got {names}.")
    if any(spec.depth for spec in specs):
        raise ValueError(f"This model takes no depth: leave it out of the cameras of camera_config[{key!r}].")
    return specs


def camera_steps(pictures, n_obs_steps: int, size: tuple[int, int] | None = None) -> list[tuple[Image.Image, bool]]:
    """What a camera saw, the oldest first, and which pictures are there; one that is missing is black.

    Args:
        pictures: a picture, see [`~hf_vla.models.images.to_rgb`], or None; of several steps a list of as many.
        n_obs_steps (`int`): number of steps.
        size (`tuple[int, int]`, *optional*): width and height of a black picture; those of the newest by default.

    Raises:
        ValueError: there is another number of pictures.
    """
    if n_obs_steps == 1:
        pictures = [pictures]
    elif pictures is None:
        pictures = [None] * n_obs_steps
    elif not is_batch(pictures) or len(pictures) != n_obs_steps:
        got = f"{len(pictures)} of them" if is_batch(pictures) else f"one {type(pictures).__name__}"
        raise ValueError(
            f"This checkpoint sees {n_obs_steps} observations: expected a list of as many pictures of each camera, "
            f"the oldest first and None where the episode had not begun, got {got}."
        )
    seen = [None if picture is None else to_rgb(picture) for picture in pictures]
    size = size or next((picture.size for picture in reversed(seen) if picture is not None), (1, 1))
    return [(Image.new("RGB", size), False) if picture is None else (picture, True) for picture in seen]


def _views(sample, specs: tuple[CameraSpec, ...], n_obs_steps: int) -> list[tuple[Image.Image, bool]]:
    """The picture of each step and camera and whether it is there."""
    names, sizes = [spec.name for spec in specs], [(spec.width, spec.height) for spec in specs]
    if isinstance(sample, dict):
        if {name for name, picture in sample.items() if picture is not None or name in names} != set(names):
            raise ValueError(
                f"Expected images of the cameras {names}, got those of {list(sample)}; a camera that is out of order "
                "is given as None."
            )
        seen = [sample[name] for name in names]
    elif len(names) > 1:
        raise ValueError(f"Several cameras are declared: give a dictionary with an image (or None) for {names}.")
    else:
        seen, sizes = [sample], sizes or [None]
    cameras = [camera_steps(pictures, n_obs_steps, size) for pictures, size in zip(seen, sizes, strict=True)]
    return [view for step in zip(*cameras, strict=True) for view in step]
