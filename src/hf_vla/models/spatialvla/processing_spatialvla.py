"""SpatialVLA processor: image, instruction and actions <-> tensors; keeps action tokenizer and every statistic."""

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BatchFeature
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from hf_vla.actions.codec import ActionCodec
from hf_vla.actions.spec import ActionSpec, CameraSpec
from hf_vla.actions.tokenizers.base import ActionTokenizer, FixedLengthTokenizer
from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer
from hf_vla.models.batches import (
    IGNORED,
    VLAFeatures,
    as_numpy,
    check_words,
    control_ids,
    decode_predictions,
    is_batch,
    padded,
    per_sample,
    targets,
    token_id,
)
from hf_vla.models.byte_tokenizer import byte_tokenizer
from hf_vla.models.images import pil_backend
from hf_vla.models.processing import VLAProcessor, camera_steps, dataset_cameras
from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig

IMAGE_TOKEN = "<image>"
# What every published grid bins; the checkpoints themselves do not say it.
PUBLISHED_SPEC = ActionSpec(("x", "y", "z", "roll", "pitch", "yaw", "gripper"), "delta_ee", rotation="euler_xyz")


class SpatialVLAProcessor(VLAProcessor):
    """Everything outside the network: pixels, prompt, camera matrix, action tokenizer, un-normalisation.

    Args:
        image_processor (`SiglipImageProcessorPil`): resizes and rescales; the model itself normalises.
        tokenizer (`PreTrainedTokenizerFast`): text, `<image>` and the action tokens `<ACTION00000>`...
        statistics (`dict`, *optional*): `{unnorm_key: {"action": {"q01": [...], "q99": [...], "mask": [...]}}}`.
        action_config (`dict`, *optional*): chunk size, normalisation, tokenizer and specs, see
            [`~hf_vla.actions.codec.ActionCodec`]. The tokenizer serves datasets of equally many numbers; SpatialVLA's
            own, the adaptive grid, of 7 or 4 with the gripper last.
        camera_config (`dict`, *optional*): `{unnorm_key: CameraSpec.to_dict()}`; the key `"default"` serves every
            dataset that has no camera of its own.
        chat_template (`str`, *optional*): unused, kept for `ProcessorMixin`.

    Source: SpatialVLA, https://huggingface.co/papers/2501.15830
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        statistics=None,
        action_config=None,
        camera_config=None,
        chat_template=None,
    ):
        if image_processor is None or image_processor.do_normalize or not image_processor.do_rescale:
            raise ValueError(
                "Expected an image processor that rescales to [0, 1] and leaves normalising to the model."
            )
        self.statistics, self.action_config, self.camera_config = statistics, action_config, camera_config
        self.action_codec = ActionCodec(statistics, action_config)
        self.cameras = {key: (CameraSpec.from_dict(camera),) for key, camera in (camera_config or {}).items()}
        super().__init__(pil_backend(image_processor), tokenizer, chat_template=chat_template)
        if not hasattr(image_processor, "image_seq_length"):
            raise ValueError("Expected an image processor with `image_seq_length`, the number of patches of an image.")
        self.action_token_begin = token_id(tokenizer, "<ACTION00000>")
        if self.action_codec.tokenizer is not None:
            last = self.action_codec.tokenizer.vocab_size - 1
            if token_id(tokenizer, f"<ACTION{last:05d}>") != self.action_token_begin + last:
                raise ValueError(
                    f"Expected the {last + 1} action tokens to have consecutive ids; this tokenizer's have not."
                )

        for key in self.action_codec.keys:
            _check_spec(key, self.action_codec.specs(key)[0], self.action_codec.tokenizer)
        actions = range(self.action_token_begin, len(tokenizer))
        self._control_ids = control_ids(tokenizer, token_id(tokenizer, IMAGE_TOKEN), *actions)

    @classmethod
    def from_scratch(cls, config: SpatialVLAConfig, statistics: dict, action_config: dict, camera_config: dict):
        """Processor of an untrained model: bytes as text tokens, images of the vision tower's size.

        Args:
            config ([`SpatialVLAConfig`]): gives image size and number of patches.
            statistics, action_config, camera_config (`dict`): see the class.
        """
        size = config.vision_config.image_size
        image_processor = SiglipImageProcessorPil(
            size={"height": size, "width": size}, do_normalize=False, image_seq_length=config.num_image_tokens
        )
        tokenizer = byte_tokenizer(config.spatial_token_num)
        return cls(image_processor, tokenizer, statistics, action_config, camera_config)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        """Build the processor from processor_config.json, in our layout or the published one."""
        if "bin_policy" in processor_dict:
            code = {"auto_map": processor_dict["auto_map"]} if "auto_map" in processor_dict else {}
            processor_dict = _from_published(processor_dict) | code
        return super().from_args_and_dict(args, processor_dict, **kwargs)

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
        terminate=None,
        return_tensors="pt",
    ) -> BatchFeature:
        """Prepare a batch; with `actions` a training batch, padded on the right, else a prompt, padded on the left.

        Args:
            images: one image or a list with one per sample; see [`~hf_vla.models.images.to_rgb`]. Where the
                checkpoint sees `n_obs_steps` above 1, a list of as many for each sample, the oldest first, None where
                the episode had not begun.
            text (`str` or `list[str]`): instruction, one for all or one per sample; it may be empty.
            actions (`(T, D)` or `(batch_size, T, D)`, *optional*): targets in robot units.
            action_mask (`(T,)` or `(batch_size, T)` of bool, *optional*): True where an action is real. Actions that
                are not real, and the end token behind them, get no label.
            unnorm_key (`str` or `list[str]`, *optional*): dataset of the samples; chooses statistics and camera.
            intrinsics (`(3, 3)` or `(batch_size, 3, 3)`, *optional*): in pixels of the image given; overrides the
                dataset's camera. Of several steps also `(batch_size, n_obs_steps, 3, 3)`.
            depth (`(H, W)` or `(batch_size, H, W)`, *optional*): metres, the image's field of view, any resolution.
                Of several steps `(batch_size, n_obs_steps, H, W)`, or lists of maps like those of images.
            terminate (`(T,)` or `(batch_size, T)` of bool, *optional*): True where the episode ends with an action;
                needed beside `actions` where the action tokens say so, as RT-2's do.
            return_tensors (`str`): `"pt"` or `"np"`.

        Returns:
            `BatchFeature` with `pixel_values` `(batch_size, 3, S, S)` in [0, 1], `input_ids` and `attention_mask`
            `(batch_size, L)`, `intrinsics` `(batch_size, 3, 3)` in pixels of S x S, `depth` `(batch_size, S, S)`;
            with `actions` also `labels` and `token_type_ids` `(batch_size, L)`. Pixels, intrinsics and depth of
            several steps are `(batch_size, n_obs_steps, ...)`; the tokens of steps before the episode are masked.

        Raises:
            ValueError: image or text is missing, counts differ, a value is not usable, or an unused input is given.
        """
        for name, value in (("state", state), ("reasoning", reasoning)):
            if value is not None:
                raise ValueError(f"SpatialVLA takes no {name}; leave `{name}` out.")
        images, texts, keys = per_sample(images, text, unnorm_key)
        for key in keys:
            if key is not None and key not in self.cameras:
                self.action_codec.resolve_key(key)
        steps = self.action_codec.n_obs_steps
        leading = (len(images),) if steps == 1 else (len(images), steps)
        frames = [frame for each in images for frame in self._frames(each, steps)]
        images = [image for image, _ in frames]
        present = np.array([there for _, there in frames]).reshape(-1, steps)
        pixel_values = self.image_processor(images, return_tensors="np")["pixel_values"]
        size = pixel_values.shape[-2:]
        data = {"pixel_values": pixel_values.reshape(*leading, *pixel_values.shape[1:])}
        matrices = self._intrinsics(images, [key for key in keys for _ in range(steps)], intrinsics, size)
        if matrices is not None:
            data["intrinsics"] = matrices.reshape(*leading, 3, 3)
        if depth is not None:
            data["depth"] = _resized_depth(depth, leading, size)
        prompts = [self._prompt_ids(prompt) for prompt in texts]
        masks = [self._prompt_mask(prompt, there) for prompt, there in zip(prompts, present, strict=True)]
        if actions is None:
            data.update(self._padded(prompts, masks, left=True))
        else:
            data.update(self._with_targets(prompts, masks, actions, action_mask, terminate, keys))
        return VLAFeatures(data, tensor_type=return_tensors)

    def decode_actions(self, output, unnorm_key=None, clip_ids=False) -> np.ndarray:
        """Turn predicted ids into robot actions.

        Args:
            output ([`VLAOutput`] of `predict_action`, or the ids of `generate` behind the prompt, `(batch_size, L)`).
            unnorm_key (`str` or `list[str]`, *optional*): dataset whose robot acts, one for all or one per sample;
                may be left out where the checkpoint knows one dataset.
            clip_ids (`bool`): move an id of `generate` that lies outside its block to the block's nearest end, as the
                published implementation does, instead of raising. Ids of `predict_action` never do.

        Returns:
            `np.ndarray` of shape `(batch_size, chunk_size, action_dim)`: float32, robot units.

        Raises:
            ValueError: the statistics are not known, or the ids are no chunk of actions.
        """
        ids, tokenizer = self._action_ids(output), self.action_codec.tokenizer
        if clip_ids:
            if not isinstance(tokenizer, FixedLengthTokenizer):
                raise ValueError("These action tokens have no blocks to move ids into: leave clip_ids out.")
            low, stop = tokenizer.id_ranges(self.action_codec.chunk_size).T
            if ids.shape[-1] != len(low):
                raise ValueError(f"Expected {len(low)} action tokens, got {ids.shape[-1]}.")
            ids = np.clip(ids, low, stop - 1)
        return decode_predictions(self.action_codec, ids, unnorm_key)

    def decode_terminate(self, output) -> np.ndarray:
        """Tell after which actions the model holds the episode to be over; of action tokens that say so.

        Args:
            output: see `decode_actions`.

        Returns:
            `np.ndarray` of shape `(batch_size, chunk_size)`: bool.

        Raises:
            ValueError: the action tokens do not say so, or the ids are no chunk of actions.
        """
        if not self.action_codec.terminates:
            raise ValueError("The action tokens of this checkpoint do not say where an episode ends.")
        return self.action_codec.tokenizer.decode_terminate(self._action_ids(output), self.action_codec.chunk_size)

    def _action_ids(self, output) -> np.ndarray:
        if not hasattr(output, "action_ids"):  # a model's own code may have come with a VLAOutput of its own
            return self._generated_ids(output)
        if output.action_ids is None:
            raise ValueError("Expected an output of predict_action, got a VLAOutput without `action_ids`.")
        return output.action_ids.cpu().numpy()

    def _prompt_ids(self, text: str) -> list[int]:
        """`<image>` for every patch, `<bos>`, the instruction, a newline: the same in training and inference."""
        if isinstance(text, str):
            text = text.removeprefix(IMAGE_TOKEN)
        check_words(text, self.tokenizer, self._control_ids)
        num_images = self.image_processor.image_seq_length * self.action_codec.n_obs_steps
        prompt = f"{IMAGE_TOKEN * num_images}{self.tokenizer.bos_token}{text}\n"
        return self.tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def _frames(self, pictures, steps):
        """What the camera saw; the present at least is to be there."""
        frames = camera_steps(pictures, steps)
        if not frames[-1][1]:
            raise ValueError("Expected a picture of the present for every sample, got None.")
        return frames

    def _prompt_mask(self, prompt: list[int], present: np.ndarray) -> list[int]:
        """0 on the tokens of frames from before the episode, which stand in front."""
        images = np.repeat(present.astype(int), self.image_processor.image_seq_length).tolist()
        return images + [1] * (len(prompt) - len(images))

    def _padded(self, rows: list[list[int]], masks: list[list[int]], left: bool) -> dict[str, np.ndarray]:
        ids = padded(rows, self.tokenizer.pad_token_id, left)
        return {"input_ids": ids, "attention_mask": padded(masks, 0, left)}

    def _with_targets(self, prompts, masks, actions, action_mask, terminate, keys) -> dict[str, np.ndarray]:
        actions, mask = targets(actions, action_mask, len(prompts))
        ends = [None] * len(mask) if terminate is None else np.atleast_2d(as_numpy(terminate))
        if terminate is not None and ends.shape != mask.shape:
            raise ValueError(f"Expected terminate of shape {mask.shape}, one for each action, got {ends.shape}.")
        if not (mask.all() or isinstance(self.action_codec.tokenizer, FixedLengthTokenizer)):
            raise ValueError(
                "Every action of a chunk enters all of its tokens, so those that are not real cannot be left out: "
                "let the robot hold its position behind an episode's end, data.chunk_tail: hold in a recipe."
            )
        rows, attended, labels, types = [], [], [], []
        samples = zip(prompts, masks, actions, mask, ends, keys, strict=True)
        for prompt, prompt_mask, chunk, real, end, key in samples:
            ids = self.action_codec.encode(chunk, key, terminate=end) + self.action_token_begin
            suffix = np.append(ids, self.tokenizer.eos_token_id)
            supervised = np.ones(len(suffix), bool)
            if not real.all():
                supervised = np.append(np.repeat(real, len(ids) // len(real)), False)
            rows.append(prompt + suffix.tolist())
            attended.append(prompt_mask + [1] * len(suffix))
            labels.append([IGNORED] * len(prompt) + np.where(supervised, suffix, IGNORED).tolist())
            types.append([0] * len(prompt) + [1] * len(suffix))
        return {
            **self._padded(rows, attended, left=False),
            "labels": padded(labels, IGNORED),
            "token_type_ids": padded(types, 0),
        }

    def _intrinsics(self, images, keys, intrinsics, size) -> np.ndarray | None:
        """Camera matrix of every sample in pixels of the model's image; None where no camera is known at all."""
        if intrinsics is not None:
            matrices, steps = as_numpy(intrinsics), self.action_codec.n_obs_steps
            batch_size = len(images) // steps
            several = f" or ({batch_size}, {steps}, 3, 3)" if steps > 1 else ""
            if matrices.shape not in ((3, 3), (batch_size, 3, 3), (batch_size, steps, 3, 3)):
                raise ValueError(
                    f"Expected intrinsics of shape (3, 3) or ({batch_size}, 3, 3){several}, got {matrices.shape}."
                )
            matrices = matrices[:, None] if matrices.ndim == 3 else matrices
            matrices = np.broadcast_to(matrices, (batch_size, steps, 3, 3)).reshape(-1, 3, 3)
            cameras = [CameraSpec(None, *image.size, matrix) for image, matrix in zip(images, matrices, strict=True)]
        else:
            cameras = [camera for key in keys for camera in self.camera_specs(key)]
        if len(cameras) < len(keys) or any(camera.intrinsics is None for camera in cameras):
            return None
        height, width = size
        return np.array([camera.scaled(width, height).intrinsics for camera in cameras], np.float32)

    def camera_specs(self, unnorm_key: str | None = None) -> tuple[CameraSpec, ...]:
        """Camera of a dataset.

        Args:
            unnorm_key (`str`, *optional*): a dataset's name; may be left out where the checkpoint knows one.

        Returns:
            `tuple[CameraSpec, ...]`: one, its own or else the default; () where none is declared at all.

        Raises:
            ValueError: the key is unknown, or there are several cameras, no default and no key.
        """
        return dataset_cameras(self.cameras, self.action_codec, unnorm_key)

    def _generated_ids(self, token_ids) -> np.ndarray:
        token_ids = np.atleast_2d(torch.as_tensor(token_ids).cpu().numpy())
        end = (token_ids == self.tokenizer.eos_token_id).argmax(-1)
        rows = [row[: stop or None] - self.action_token_begin for row, stop in zip(token_ids, end, strict=True)]
        if isinstance(self.action_codec.tokenizer, FixedLengthTokenizer) and len({len(row) for row in rows}) > 1:
            raise ValueError(
                f"Expected chunks of one length, got {[len(row) for row in rows]} tokens before the end token."
            )
        return padded([row.tolist() for row in rows], IGNORED)


def _check_spec(key: str, spec: ActionSpec | None, tokenizer: ActionTokenizer | None) -> None:
    """The grid takes its first three dimensions for a translation and its last for the gripper."""
    if None not in (spec, tokenizer) and len(spec.names) != tokenizer.action_dim:
        raise ValueError(
            f"This SpatialVLA's action tokens stand for {tokenizer.action_dim} numbers of every robot alike, the "
            f"actions of {key!r} have {len(spec.names)}, {list(spec.names)}: convert them, or leave that dataset out."
        )
    on_grid = spec is not None and isinstance(tokenizer, GaussianGridTokenizer)
    if on_grid and (spec.kind == "joint" or (spec.gripper and spec.gripper.index != len(spec.names) - 1)):
        raise ValueError(
            f"Expected end-effector actions with the gripper last, as the action grid bins them; the spec of {key!r} "
            f"has kind {spec.kind!r}, dimensions {list(spec.names)} and gripper {spec.gripper and spec.gripper.index}."
        )


def _resized_depth(depth, leading: tuple[int, ...], size: tuple[int, int]) -> np.ndarray:
    """Depth of the model's image, `(*leading, S, S)`: of a batch, or of its samples' steps."""
    if len(leading) == 2 and is_batch(depth):  # a frame that is not there, and masked, is as far as the present
        depth = [[maps[-1] if each is None else each for each in maps] for maps in depth]
        depth = np.stack([as_numpy(maps) for maps in depth])
    depth = torch.from_numpy(as_numpy(depth))
    if not depth.is_floating_point():
        raise ValueError(f"Expected depth in metres as floating point, got {depth.dtype}: are these millimetres?")
    depth = depth[None] if depth.ndim == 2 else depth
    if depth.shape[:-2] != leading:
        wanted = ", ".join(map(str, leading))
        raise ValueError(f"Expected depth of shape ({wanted}, height, width) in metres, got {tuple(depth.shape)}.")
    if not (torch.isfinite(depth) & (depth > 0)).all():
        raise ValueError(
            "Expected a depth above 0 metres in every pixel, got zero, negative, NaN or infinite ones: fill holes."
        )
    maps = F.interpolate(depth.flatten(0, -3)[:, None].float(), size, mode="nearest-exact")
    return maps.reshape(*leading, *size).numpy()


def _from_published(published: dict) -> dict:
    """Translate the published processor_config.json; its grid's own edges are kept, digit for digit."""
    if published.get("num_obs_steps", 1) != 1:
        raise ValueError(f"Expected a checkpoint that sees one frame, got num_obs_steps={published['num_obs_steps']}.")
    grid = GaussianGridTokenizer.from_published(
        published["action_config"], published["bin_policy"], published.get("min_sigma", 0.0)
    )
    cameras = {
        key: CameraSpec(None, camera["width"], camera["height"], camera["intrinsic"]).to_dict()
        for key, camera in published.get("intrinsic_config", {}).items()
    }
    return {
        "statistics": published.get("statistics"),
        "action_config": {
            "chunk_size": published["action_chunk_size"],
            "normalization": {"mode": "quantile", "clip": True, "convention": "spatialvla"},
            "tokenizer": {"type": "gaussian_grid", **grid.to_dict()},
            "specs": {key: {"action": PUBLISHED_SPEC.to_dict()} for key in published.get("statistics") or {}},
        },
        "camera_config": cameras,
    }
