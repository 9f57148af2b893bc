"""A checkpoint that is being examined: its files, its parts, what it is shown and what it answers."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, snapshot_download
from PIL import Image
from transformers import AutoConfig, AutoModel

from hf_vla.actions.normalization import ActionNormalizer
from hf_vla.actions.spec import CameraSpec
from hf_vla.actions.values import middle
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.schema import ACTION
from hf_vla.evaluation.example import read_example
from hf_vla.evaluation.probes import history, observation_of
from hf_vla.models.base import base_of_adapter, check_folder
from hf_vla.models.hub_errors import hub_errors
from hf_vla.models.loading import load_processor
from hf_vla.policy import DEPTH, IMAGES, STATE, TASK, Policy

PASS, WARN, FAIL = "pass", "warn", "fail"
READ_FROM_HUB = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
INSTRUCTIONS = ("pick up the red cube", "open the drawer", "push the button")
SEED = 0
FRAMES = 8  # recorded ones that the model is shown
SAMPLES = 4  # of a head that draws noise, whose mean is compared with what was done
DEPTH_METRES = 1.0
UNNAMED = "image"  # what a camera is called that the checkpoint has no name for


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Args:
        level (`str`): "pass", "warn" or "fail".
        message (`str`): what was measured, what it means and, unless it is a pass, how to mend it.
        measured (`dict`): the numbers behind it, JSON-safe.
    """

    level: str
    message: str
    measured: dict[str, Any] = field(default_factory=dict)


class Unavailable(Exception):
    """A part that a check needs cannot be had; the line of the check that answers for it says why.

    Args:
        part (`str`): name of the property of [`Patient`] that failed first.
        message (`str`): why.
    """

    def __init__(self, part: str, message: str):
        super().__init__(message)
        self.part = part


def part(make: Callable[["Patient"], Any]) -> property:
    """A property that is made once; where that fails, whoever asks gets the same [`Unavailable`]."""

    def get(patient):
        known = patient._parts
        if make.__name__ not in known:
            try:
                known[make.__name__] = make(patient)
            except Unavailable as error:
                known[make.__name__] = error
            except Exception as error:  # whatever a broken checkpoint makes of it, the other checks go on
                text = " ".join(str(error).split()) if isinstance(error, (ValueError, OSError)) else repr(error)
                known[make.__name__] = Unavailable(make.__name__, text)
        if isinstance(known[make.__name__], Unavailable):
            raise known[make.__name__]
        return known[make.__name__]

    return property(get, doc=make.__doc__)


class Patient:
    """A checkpoint under examination; every part is loaded when a check first asks for it.

    Args:
        checkpoint (`str` or `Path`): folder or Hub name.
        dataset (`str` or `Path`, *optional*): LeRobot dataset of the robot: a folder or Hub name.
        unnorm_key (`str`, *optional*): dataset whose robot is driven; may be left out where there is only one.
        camera_map (`dict[str, str]`, *optional*): the checkpoint's name of a camera -> the dataset's.
        numbers (`list[int]`, *optional*): of the episodes of `dataset`; all by default.
        device (`str`, *optional*): default the accelerator where there is one, else the CPU.
        out (`Path`, *optional*): folder for pictures.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        OSError: the Hub refuses it, or cannot be reached.
        ValueError: there is no such device; the checkpoint knows no such dataset or camera.
    """

    def __init__(
        self, checkpoint, dataset=None, unnorm_key=None, camera_map=None, numbers=None, device=None, out=None
    ):
        self.name, self.dataset, self.out = str(checkpoint), dataset, out
        self._key, self._camera_map, self._numbers = unnorm_key, camera_map or {}, numbers
        self._device = device or torch.accelerator.current_accelerator() or "cpu"
        self._parts: dict[str, Any] = {}
        self.is_all_listed = True  # whether `files` are all that the checkpoint has
        check_folder(checkpoint, self.name)
        if Path(checkpoint).is_dir():
            self.folder = Path(checkpoint)
            self.files = _names(self.folder)
        else:
            with hub_errors(self.name):
                self.folder = Path(snapshot_download(self.name, allow_patterns=READ_FROM_HUB))
            try:
                with hub_errors(self.name):
                    self.files = HfApi().list_repo_files(self.name)
            except OSError:  # offline, what an earlier run has fetched can be examined all the same
                self.files, self.is_all_listed = _names(self.folder), False
        self._check_request()

    def _check_request(self):
        """Refuse what the caller got wrong, lest the checkpoint be blamed; one that is broken has its lines."""
        try:
            torch.empty(0, device=self._device)
        except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
            raise ValueError(f"Cannot use the device {str(self._device)!r}: {error}") from error
        try:
            codec = self.processor.action_codec
            if self._key is not None and codec.keys:
                codec.resolve_key(self._key)
            names = [camera.name for camera in self.processor.camera_specs(self.key) if camera.name is not None]
        except Unavailable:
            return
        if unknown := sorted({*self._camera_map} - {*(names or [UNNAMED])}):
            raise ValueError(
                f"The checkpoint has no camera {unknown}; it looks through "
                f"{names or f'one without a name, which is called {UNNAMED!r} here'}."
            )

    @property
    def is_adapter(self) -> bool:
        """Whether the checkpoint holds adapters of another model."""
        return (self.folder / "adapter_config.json").is_file()

    @property
    def weight_files(self) -> list[Path]:
        """Files of its weights; of an adapter also those of the model it adapts, where that lies in a folder."""
        folders = [self.folder]
        if self.is_adapter and (base := base_of_adapter(self.folder)) and Path(base).is_dir():
            folders.append(Path(base))
        return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]

    @part
    def processor(self):
        """The processor."""
        return load_processor(self.folder)

    @part
    def config(self):
        """The model's configuration, which can be read where the weights do not fit it; of an adapter, its base's."""
        source = base_of_adapter(self.folder) or self.folder
        with _way_to(source):
            return AutoConfig.from_pretrained(source)

    @part
    def model(self):
        """The model, in evaluation mode."""
        with _way_to(base_of_adapter(self.folder) or self.folder):
            # `from_pretrained` of our families refuses other shapes, and names them; transformers' own error does not
            model = AutoModel.from_pretrained(self.folder, ignore_mismatched_sizes=True)
        return model.to(self._device).eval()

    @part
    def key(self) -> str:
        """Dataset whose robot is driven."""
        return self.processor.action_codec.resolve_key(self._key)

    @part
    def normalizer(self) -> ActionNormalizer:
        """Of the robot's actions."""
        return self.processor.action_codec.normalizer(self.key)

    @part
    def state_normalizer(self) -> ActionNormalizer | None:
        """Of the robot's states; None where the checkpoint takes none."""
        codec = self.processor.action_codec
        return codec.state_normalizer(self.key) if codec.takes_state else None

    @part
    def spread(self) -> np.ndarray:
        """Standard deviation of the recorded actions, `(action_dim,)`, robot units; NaN where they do not vary.

        Published statistics may have none: a quarter of the range of quantiles, or of min and max, stands for it.
        """
        statistics = self.processor.action_codec.statistics[self.key][ACTION]
        for low, high in (("q01", "q99"), ("min", "max")):
            if statistics.get(low) is not None and statistics.get("std") is None:
                statistics = {"std": np.subtract(statistics[high], statistics[low]) / 4}
        if statistics.get("std") is None:
            return np.ones(self.normalizer.action_dim)
        std = np.asarray(statistics["std"], np.float64)
        return np.where((std > 0) & ~self.normalizer.constant, std, np.nan)

    @part
    def policy(self) -> Policy:
        """The checkpoint as a controller, whose noise starts from one seed."""
        _ = self.normalizer, self.state_normalizer  # which would else fail in the midst of a prediction
        return self.new_policy(SEED)

    def new_policy(self, seed: int) -> Policy:
        """Another controller of the same model."""
        return Policy(self.model, self.processor, self.key, seed=seed)

    @part
    def recorded(self) -> LeRobotEpisodes:
        """The dataset without its pictures."""
        return LeRobotEpisodes(self.dataset, episodes=self._numbers, cameras=[])

    @part
    def episodes(self) -> LeRobotEpisodes:
        """The dataset with the cameras that the checkpoint looks through, and a chunk of actions from every row on."""
        names = [camera.name for camera in self.policy.cameras if camera.name is not None]
        chunk = range(self.processor.action_codec.chunk_size)
        names = names or [*self._camera_map]  # of a camera without a name, UNNAMED
        options = {"cameras": names or None, "camera_map": self._camera_map, "delta_indices": {ACTION: chunk}}
        return LeRobotEpisodes(self.dataset, episodes=self._numbers, **options)

    def camera_in_dataset(self, name: str) -> str:
        """What the dataset calls one of the checkpoint's cameras."""
        return self._camera_map.get(name, name).removeprefix(IMAGES)

    @part
    def frame(self) -> dict[str, Any] | None:
        """The recorded frame that lies beside shipped checkpoints, see [`~hf_vla.evaluation.example.Example`].

        None where there is none, or it is of another robot than the one that is driven.
        """
        frame = read_example(self.name)
        return frame if frame is None or frame["dataset"] in (None, self.key) else None

    @part
    def instructions(self) -> tuple[str, ...]:
        """The dataset's; else some that any robot might hear, the recorded frame's first."""
        if self.dataset is not None:
            return tuple(dict.fromkeys(self.recorded.texts(TASK)))
        return (*([self.frame[TASK]] if self.frame else []), *INSTRUCTIONS)

    @part
    def frame_moment(self) -> list[dict[str, Any]]:
        """The recorded frame as the model is shown it."""
        pictures = {
            IMAGES + name: np.asarray(Image.open(file).convert("RGB")) for name, file in self.frame["images"].items()
        }
        return [pictures | self._state(self.frame["state"]) | _depths(self._cameras()) | {TASK: self.frame[TASK]}]

    def _state(self, values=None):
        """The robot's state, or the mean one where it is not known."""
        if not self.policy.takes_state:
            return {}
        known = self.processor.action_codec.statistics[self.key]["state"]
        return {STATE: middle(known, self.state_normalizer.action_dim) if values is None else values}

    def _cameras(self):
        cameras = self.policy.cameras or (CameraSpec(None, 224, 224),)
        if self.frame is not None and cameras[0].name is None:
            cameras = (replace(cameras[0], name=next(iter(self.frame["images"]))),)
        return cameras

    @part
    def moments(self) -> list[list[dict[str, Any]]]:
        """What the model is shown: of each moment as many observations as it looks back at, the present last.

        Frames spread over the dataset; else the checkpoint's own frame, and pictures with the spectrum of natural ones
        (amplitude falls with frequency) with the mean state.
        """
        if self.dataset is not None:
            rows = np.unique(np.linspace(0, len(self.episodes) - 1, FRAMES).round().astype(int)).tolist()
            return [
                [observation_of(self.episodes, item) for item in history(self.policy, self.episodes, row)]
                for row in rows
            ]
        cameras, rng, state = self._cameras(), np.random.default_rng(SEED), self._state()
        moments = [] if self.frame is None else [self.frame_moment]
        for task in self.instructions[:3]:
            pictures = {IMAGES + (camera.name or UNNAMED): natural_picture(camera, rng) for camera in cameras}
            moments.append([pictures | state | _depths(cameras) | {TASK: task}])
        return moments

    @part
    def chunks(self) -> list[np.ndarray]:
        """What the policy answers to [`moments`], `(chunk_size, action_dim)` each, robot units."""
        return [self.predict(moment) for moment in self.moments]

    def predict(self, moment: list[dict[str, Any]], policy: Policy | None = None) -> np.ndarray:
        """Predict as at an episode's beginning, with noise from the seed: only what is shown makes a difference.

        Args:
            moment (`list[dict]`): observations, the present last.
            policy ([`~hf_vla.policy.Policy`], *optional*): another one than the patient's own.

        Returns:
            `np.ndarray` of shape `(chunk_size, action_dim)`: float64, robot units.
        """
        policy = policy or self.policy
        policy.reset()
        for observation in moment[:-1]:
            policy.remember(observation)
        return policy.predict_chunk(moment[-1]).astype(np.float64)

    @part
    def samplers(self) -> list[Policy]:
        """Controllers of [`SAMPLES`] seeds; one alone where no noise is drawn."""
        policies = [self.new_policy(SEED + turn) for turn in range(SAMPLES)]
        is_drawn = not np.array_equal(self.predict(self.moments[0], policies[1]), self.chunks[0])
        return policies if is_drawn else policies[:1]

    def expect(self, moment: list[dict[str, Any]]) -> np.ndarray:
        """Predict as [`predict`] does, the mean of several samples where noise is drawn.

        A head that knows several ways draws one of them, further off than their mean though it may act better.
        """
        return np.mean([self.predict(moment, policy) for policy in self.samplers], axis=0)

    def moved(self, chunk: np.ndarray, other: np.ndarray) -> float:
        """How far two chunks lie apart, in spreads of the recorded actions: root mean square, mean over dimensions."""
        apart = np.sqrt(((chunk - other) ** 2).mean(axis=0)) / self.spread
        return float(apart[np.isfinite(self.spread)].mean()) if np.isfinite(self.spread).any() else 0.0


def natural_picture(camera: CameraSpec, rng: np.random.Generator) -> np.ndarray:
    """A picture of nothing, with the spectrum of natural ones: `(height, width, 3)`, uint8."""
    shape = camera.height, camera.width
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None])
    frequency[0, 0] = np.inf
    planes = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, *shape))) / frequency, shape)
    planes = 127.5 + 50 * planes / planes.std(axis=(1, 2), keepdims=True)
    return np.clip(planes, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def _way_to(source):
    return nullcontext() if Path(source).is_dir() else hub_errors(str(source))


def _names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def _depths(cameras):
    flat = {camera: np.full((camera.height, camera.width), DEPTH_METRES, np.float32) for camera in cameras}
    return {DEPTH + (camera.name or UNNAMED): depth for camera, depth in flat.items() if camera.depth}
