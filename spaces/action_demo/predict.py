"""Checkpoints that the Space serves, and what one prediction of theirs is, as plain data.

The first sample is what [`~hf_vla.policy.Policy`] answers with the same seed; the k-th further one, but for rounding,
that of seed + k. Models that choose tokens take the likeliest first, and draw the further samples.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from guards import Refused, read_picture
from PIL import Image
from transformers.utils.hub import cached_file
from transformers.utils.logging import disable_progress_bar

from hf_vla.actions.heads.base import DenoisingHead
from hf_vla.actions.tokenizers.base import FixedLengthTokenizer
from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer
from hf_vla.actions.values import middle
from hf_vla.evaluation.example import read_example
from hf_vla.models.images import to_rgb
from hf_vla.models.loading import load_checkpoint
from hf_vla.models.outputs import VLAOutput
from hf_vla.training.summary import SUMMARY, read_summary

MAX_SECONDS = 60  # of one prediction, all samples together
TOP = 5  # candidates that are told of each token

CHECKPOINTS = {}  # that are served, by name; the first is the default


@dataclass
class Prediction:
    """What one press of the button gave; numpy and plain values, which travel between processes.

    Args:
        samples (`np.ndarray` of shape `(S, T, D)`): robot units.
        denoising (`np.ndarray` of shape `(steps, T, D)`, *optional*): the first sample behind each denoising step,
            robot units.
        tokens (`list[dict]`, *optional*): of the first sample: action, block, id, probability, candidates.
        directions (`np.ndarray` of shape `(T, n_theta, n_phi)`, *optional*): probability that an action moves there.
        depth (`np.ndarray` of shape `(H, W)`, *optional*): metres, as the model estimates them.
        reasoning (`str`, *optional*): words of the model.
        seconds (`float`): from the picture to robot units, the first sample.
        device (`str`): on which.
        notes (`list[str]`): what the reader should know.
    """

    samples: np.ndarray
    seconds: float
    device: str
    denoising: np.ndarray | None = None
    tokens: list[dict] | None = None
    directions: np.ndarray | None = None
    depth: np.ndarray | None = None
    reasoning: str | None = None
    notes: list[str] = field(default_factory=list)


class Checkpoint:
    """A model, its processor and, where a frame.json lies beside them, an example.

    Args:
        path (`str`): folder or Hub name.
        device (`str`): where the model computes.

    Raises:
        ValueError, OSError: there is no checkpoint of this library, or it needs a depth camera.
    """

    def __init__(self, path, device):
        self.path, self.name, self.device = str(path), Path(path).resolve().name, device
        self.model, self.processor = load_checkpoint(self.path)
        self.model.to(device)
        self.codec = self.processor.action_codec
        if not self.codec.keys:
            raise ValueError(f"The processor of {self.path} has no statistics of any robot's actions.")
        self.takes_reasoning = getattr(self.processor, "takes_reasoning", False) and (
            self.model.config.max_reasoning_tokens > 0
        )
        self.head = getattr(self.model, "action_head", None)
        self.denoises = isinstance(self.head, DenoisingHead)
        self.num_steps = self.head.num_inference_steps if self.denoises else None
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.example, self.pictures = read_example(self.path), {}
        if self.example is not None:
            self.pictures, known = self.example["images"], self.cameras()
            if unknown := self.pictures.keys() - known.keys():
                raise ValueError(
                    f"The frame.json of {self.path} shows {sorted(unknown)}; it looks through {[*known]}."
                )
        training = cached_file(self.path, SUMMARY, _raise_exceptions_for_missing_entries=False)
        self.instructions = read_summary(Path(training).parent)["instructions"] if training else []
        if any(camera.depth for key in self.codec.keys for camera in self.processor.camera_specs(key)):
            raise ValueError(f"{self.path} needs metric depth of a sensor, which this page has no input for.")

    def key(self, dataset=None):
        """Name of a dataset, the example's or the first by default.

        Raises:
            ValueError: there is none of that name.
        """
        if dataset:
            return self.codec.resolve_key(dataset)
        own = (self.example or {}).get("dataset")
        return own if own in self.codec.keys else self.codec.keys[0]

    def cameras(self, dataset=None):
        """[`~hf_vla.actions.spec.CameraSpec`] of a dataset, by name; one without a name is `"image"`."""
        specs = self.processor.camera_specs(self.key(dataset))
        return {camera.name or "image": camera for camera in specs} or {"image": None}

    def names(self, dataset=None):
        """Names of the action's and of the state's dimensions, the latter None where the model takes no state."""
        key = self.key(dataset)
        action, state = self.codec.specs(key)
        sizes = [self.codec.normalizer(key).action_dim]
        if self.codec.takes_state:
            sizes.append(self.codec.state_normalizer(key).action_dim)
        names = [
            [*spec.names] if spec else [f"[{index}]" for index in range(size)]
            for spec, size in zip((action, state), sizes, strict=False)
        ]
        return names[0], names[1] if self.codec.takes_state else None

    def default_state(self, dataset=None):
        """State of the example, else the middle of the dataset's; shortest numbers that are the same in float32."""
        key = self.key(dataset)
        if not self.codec.takes_state:
            return ""
        values = self.example["state"] if self.example is not None and key == self.key() else None
        if values is None:
            values = middle(self.codec.statistics[key]["state"], self.codec.state_normalizer(key).action_dim)
        return " ".join(np.format_float_positional(np.float32(value), trim="-") for value in values)

    def is_example(self, pictures):
        """Whether pictures are, pixel by pixel, those of the example."""
        return bool(self.pictures) and all(
            pictures.get(camera) is not None and same_picture(pictures[camera], path)
            for camera, path in self.pictures.items()
        )

    def run(self, pictures, instruction, state=None, dataset=None, seed=0, num_samples=1, num_inference_steps=None):
        """Predict.

        Args:
            pictures (`dict[str, PIL.Image.Image | None]`): RGB, of each camera; None where it is missing.
            instruction (`str`): what to do.
            state (`list[float]`, *optional*): robot units.
            dataset (`str`, *optional*): whose robot acts.
            seed (`int`), num_samples (`int`), num_inference_steps (`int`, *optional*): see the module.

        Returns:
            [`Prediction`]

        Raises:
            ValueError: something is missing or not usable, or all of it takes too long.
        """
        deadline, key = time.monotonic() + MAX_SECONDS, self.key(dataset)
        start = time.perf_counter()
        inputs = self._inputs(pictures, instruction, state, key)
        steps, options = [], {}
        if num_inference_steps is not None:
            if not self.denoises:
                raise Refused("This model denoises nothing: leave the number of denoising steps out.")
            options["num_inference_steps"] = num_inference_steps

        def keep(step, chunk):
            steps.append(chunk)
            _check_time(deadline)

        output = self._predict(inputs, options | ({"callback": keep} if self.denoises else {}), seed)
        chunks = [self.processor.decode_actions(output, key)[0]]
        result = Prediction(np.empty(0), time.perf_counter() - start, self.device)
        result.notes += self._doubts(pictures, instruction, state, key)
        if self.takes_reasoning:
            (result.reasoning,) = self.processor.decode_reasoning(output)
            options["reasoning_ids"] = output.reasoning_ids
        if steps:
            result.denoising = np.stack([self._decoded(chunk, key) for chunk in steps])
        if output.action_ids is not None:
            options["do_sample"] = True
            self._read_tokens(output, result)
        if getattr(self.model.config, "use_vision_zoe", False):
            result.depth = self._depth(inputs["pixel_values"])
        if num_samples > 1 and not self._draws:
            result.notes.append(
                "This model's head draws nothing: it has one answer, however many samples are asked for."
            )
        for number in range(1, num_samples if self._draws else 1):
            _check_time(deadline)
            chunks.append(self.processor.decode_actions(self._predict(inputs, options, seed + number), key)[0])
        result.samples = np.stack(chunks)
        return result

    def _doubts(self, pictures, instruction, state, key):
        """What this model was not trained for, in sentences: it answers all the same."""
        if self.instructions and instruction.strip().casefold() not in map(str.casefold, self.instructions):
            yield (
                f"It was not trained with this instruction: it knows {len(self.instructions)}, word by word, and they "
                f"are listed under the last tab; {self.instructions[0]!r} is one."
            )
        for name, camera in self.cameras(key).items():
            picture = pictures.get(name)
            if camera is None or picture is None:
                continue
            width, height = picture.size
            if abs(width * camera.height / (height * camera.width) - 1) > 0.05:
                yield (
                    f"The picture of {name} has {width} x {height} pixels, the camera {camera.width} x "
                    f"{camera.height}: it is squeezed into that shape."
                )
        known = self.codec.statistics[key].get("state", {}) if self.codec.takes_state and state else {}
        if {"min", "max"} <= known.keys():
            low, high = np.asarray(known["min"]), np.asarray(known["max"])
            if np.any((state < low - (high - low)) | (state > high + (high - low))):
                yield "The state lies far outside of those that it was trained with: are the units right?"

    @property
    def _draws(self):
        return (
            self.codec.tokenizer is not None
            or self.head is None
            or self.denoises
            or (getattr(self.head, "decoding", None) == "sample")
        )

    def _inputs(self, pictures, instruction, state, key):
        names, past = [*self.cameras(key)], self.codec.n_obs_steps - 1
        missing = [name for name in names if pictures.get(name) is None]
        if len(missing) == len(names):
            raise Refused("Give a picture: upload one, take one with the webcam, or choose an example.")
        seen = {name: pictures.get(name) for name in names}
        if past:  # as where an episode begins
            seen = {name: [None] * past + [picture] for name, picture in seen.items()}
        given = {"images": [seen if len(names) > 1 else seen[names[0]]], "text": [instruction]}
        if self.codec.takes_state:
            states = np.array(state, np.float32)
            given["state"] = np.stack([states] * (past + 1))[None] if past else states[None]
        return self.processor(**given, unnorm_key=key, return_tensors="pt").to(self.device)

    def _predict(self, inputs, options, seed):
        generator = torch.Generator(self.device).manual_seed(seed)
        return self.model.predict_action(**inputs, **options, generator=generator)

    def _decoded(self, chunk, key):
        return self.processor.decode_actions(VLAOutput(actions=chunk), key)[0]

    @torch.no_grad()
    def _depth(self, pixel_values):
        newest = pixel_values[:, -1] if pixel_values.ndim == 5 else pixel_values
        return self.model.estimate_depth(newest)[0].float().cpu().numpy()

    def _read_tokens(self, output, result):
        """What was chosen, and how sure the model was."""
        tokenizer = self.codec.tokenizer
        chances = output.logits[0].float().softmax(-1).cpu().numpy()
        blocks = [name for name, *_ in tokenizer.blocks] if isinstance(tokenizer, FixedLengthTokenizer) else ["token"]
        result.tokens = []
        for place, (chosen, chance) in enumerate(zip(output.action_ids[0].tolist(), chances, strict=True)):
            if chosen < 0:  # behind the end of a chunk that needs fewer
                break
            best = np.argsort(-chance, kind="stable")[:TOP]
            result.tokens.append(
                {
                    "action": place // len(blocks) if len(blocks) > 1 else place,
                    "block": blocks[place % len(blocks)],
                    "id": chosen,
                    "probability": float(chance[chosen]),
                    "candidates": [[int(each), float(chance[each])] for each in best if chance[each] > 0],
                }
            )
        if isinstance(tokenizer, GaussianGridTokenizer) and tokenizer.use_spherical:
            _, first, stop = tokenizer.blocks[0]
            grid = chances[:: len(blocks), first:stop].reshape(-1, *tokenizer.num_bins[:3])
            result.directions = grid.sum(-1)


def load(models, warm_up):
    """Load the checkpoints to serve and let each predict once, which imports what is imported late.

    Args:
        models (`list[str]`): folders or Hub names.
        warm_up (`bool`): whether the models can compute already.

    Raises:
        ValueError, OSError: one of them cannot be served.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    disable_progress_bar()
    loaded = {}
    for path in models:
        checkpoint = Checkpoint(path, device)
        loaded[checkpoint.name if checkpoint.name not in loaded else checkpoint.path] = checkpoint
        if warm_up and checkpoint.example is not None:
            pictures = {camera: read_picture(path) for camera, path in checkpoint.pictures.items()}
            state = [float(value) for value in checkpoint.default_state().split()] or None
            checkpoint.run(pictures, checkpoint.example["task"], state)
    CHECKPOINTS.clear()
    CHECKPOINTS.update(loaded)


def example_pictures():
    """Paths of the pictures of all examples."""
    return [path for checkpoint in CHECKPOINTS.values() for path in checkpoint.pictures.values()]


def find(name):
    """A checkpoint by its name.

    Raises:
        Refused: there is none.
    """
    if name not in CHECKPOINTS:
        raise Refused(f"There is no model {str(name)[:80]!r} here; there are {', '.join(CHECKPOINTS)}.")
    return CHECKPOINTS[name]


def same_picture(picture, path):
    """Whether a picture has the pixels of a file."""
    with Image.open(path) as file:
        return picture.size == file.size and np.array_equal(np.asarray(picture), np.asarray(to_rgb(file)))


def _check_time(deadline):
    if time.monotonic() > deadline:
        raise Refused(f"This takes longer than {MAX_SECONDS} s: ask for fewer samples or denoising steps.")
