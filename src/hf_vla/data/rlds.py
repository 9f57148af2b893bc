"""RLDS datasets (TensorFlow Datasets of episodes) as numpy arrays; TensorFlow stays inside this file."""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hf_vla.data import schema
from hf_vla.data.oxe_steps import OxeDataset, standardize
from hf_vla.data.reading.pictures import decoded

STEPS, OBSERVATION = "steps", "observation/"
# TensorFlow writes to the terminal when it is imported, unless told so by these
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


class RldsEpisodes:
    """The episodes of an RLDS folder, one after the other, in the order of its files.

    Iterating gives a `dict` per episode. As they are, its keys are paths: what the steps hold
    (`"observation/state"`, `"action"` or `"action/world_vector"`), each an array whose first axis is the steps, and
    what the episode holds itself (`"episode_metadata/file_path"`). Texts are bytes in arrays of objects. With
    `dataset`, the keys are LeRobot's, see [`~hf_vla.data.oxe_steps.standardize`], and episodes marked as failures are
    left out.

    Pictures are decoded only where `images` is set, `(steps, height, width, 3)` uint8; else they stay as they are
    encoded, bytes in an array of objects, to be read by [`~hf_vla.data.reading.pictures.decoded`]. Depth always stays
    encoded. One episode is in memory at a time.

    Args:
        folder (`str` or `Path`): the folder with `dataset_info.json`, or the one above, if it holds one version.
        split (`str`, defaults to `"train"`): as TensorFlow Datasets writes it: `"train"`, `"train[:100]"`, `"all"`.
        dataset ([`~hf_vla.data.oxe_steps.OxeDataset`], *optional*): how to standardise; None leaves all as it is.
        images (`bool`, defaults to `False`): decode the pictures.

    Raises:
        FileNotFoundError: the folder holds no dataset of TensorFlow Datasets.
        ValueError: the split is unknown, there are no steps, or the extra `rlds` is not installed.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", dataset: OxeDataset | None = None, images: bool = False
    ):
        self.folder, self.split = _versioned(Path(folder)), split
        self.dataset, self.images = dataset, images
        self._tf, self._tfds = _import_tensorflow()
        self._builder = self._tfds.builder_from_directory(self.folder)
        self.name, self.version = self._builder.name, str(self._builder.version)
        if STEPS not in self._builder.info.features:
            raise ValueError(
                f"{self.folder}: expected episodes with {STEPS!r}, as RLDS has them, came the features "
                f"{sorted(self._builder.info.features)}."
            )
        splits = self._builder.info.splits
        try:
            self._length = splits.total_num_examples if split == "all" else splits[split].num_examples
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{self.folder}: no split {split!r}; it has {sorted(splits)}, and slices of them."
            ) from error

    def __len__(self) -> int:
        """Number of the split's episodes, those marked as failures included."""
        return self._length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, episode in self.read():
            try:
                finished = self._finish(episode)
            except ValueError as error:
                raise ValueError(f"{self.place(number)}: {error}") from error
            if finished is not None:
                yield finished

    def place(self, number: int) -> str:
        """Name an episode in messages."""
        return f"{self.folder}, episode {number} of {self.split!r}"

    @cached_property
    def features(self) -> dict[str, dict]:
        """What a step holds: path -> {"dtype", "shape"}; dtype "image" for a colour camera, "depth" for others."""
        features = {}
        for key, feature in sorted(_leaves(self._builder.info.features[STEPS].feature)):
            dtype = feature.tf_dtype.name
            if self._is_image(feature):
                dtype = "image" if dtype == "uint8" and feature.shape[-1] == 3 else "depth"
            features[key] = {"dtype": dtype, "shape": list(feature.shape)}
        return features

    @property
    def cameras(self) -> list[str]:
        """Names of the colour cameras, without `observation/`."""
        keys = [key for key, feature in self.features.items() if feature["dtype"] == "image"]
        return [key.removeprefix(OBSERVATION) for key in keys if key.startswith(OBSERVATION)]

    def read(self, start: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Read the episodes as they are, pictures encoded, with their numbers in the split.

        Args:
            start (`int`): the first episode to read. Those before it are not read from the disk, unless the split is
                a slice.

        Raises:
            ValueError: a file is damaged; the text names the episode.
        """
        whole = self.split in self._builder.info.splits
        split = f"{self.split}[{start}:]" if whole and start else self.split
        # one file after the other, or the order would depend on where the reading starts
        config = self._tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False, skip_prefetch=True)
        decoders = {STEPS: _encoded(self._builder.info.features[STEPS].feature, self._is_image, self._tfds)}
        if start >= len(self):
            return
        examples = self._builder.as_dataset(split=split, decoders=decoders, read_config=config, shuffle_files=False)
        examples = iter(examples if whole else examples.skip(start))
        for number in range(start, len(self)):
            try:
                example = next(examples)
                steps = example.pop(STEPS)
                batch = next(iter(steps.batch(max(int(steps.cardinality()), 1))), {})
            except self._tf.errors.OpError as error:
                raise ValueError(
                    f"{self.place(number)}: TensorFlow cannot read it; its file is damaged or incomplete "
                    f"({error.message})."
                ) from error
            yield number, _numpy(example) | _numpy(batch)

    def _finish(self, episode):
        if self.dataset is not None:
            episode = standardize(self.dataset, episode)
        if episode is None or not self.images:
            return episode
        prefix = OBSERVATION if self.dataset is None else schema.IMAGES
        for camera in self.cameras:
            if prefix + camera in episode:
                bgr = self.dataset is not None and camera in self.dataset.bgr
                pictures = [decoded(picture, bgr) for picture in episode[prefix + camera]]
                episode[prefix + camera] = np.stack(pictures)
        return episode

    def _is_image(self, feature) -> bool:
        return isinstance(feature, self._tfds.features.Image)


def _versioned(folder: Path) -> Path:
    """Folder with the dataset's description, which may be the only version inside."""
    if (folder / "dataset_info.json").is_file():
        return folder
    versions = sorted(path.parent for path in folder.glob("*/dataset_info.json"))
    if len(versions) != 1:
        found = f"several versions, {[version.name for version in versions]}: name one" if versions else "none"
        raise FileNotFoundError(
            f"{folder}: expected a folder of TensorFlow Datasets with dataset_info.json, found {found}."
        )
    return versions[0]


def _import_tensorflow():
    """Import TensorFlow without its messages, and keep it away from the accelerators."""
    ours = {name: value for name, value in _QUIET.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f"RLDS datasets are read through TensorFlow Datasets, which is not installed ({error}): "
            "`pip install 'hf-vla[rlds]'`, or convert the dataset to LeRobot's format on another machine."
        ) from error
    finally:
        for name in ours:
            os.environ.pop(name, None)
    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:  # the caller uses TensorFlow already: its accelerators are the caller's
        pass
    return tf, tfds


def _leaves(features, prefix: str = ""):
    """Path and feature of everything that a FeaturesDict holds."""
    for key, feature in features.items():
        path = f"{prefix}{key}"
        if hasattr(feature, "items"):
            yield from _leaves(feature, f"{path}/")
        else:
            yield path, feature


def _encoded(features, is_image, tfds) -> dict:
    """Decoders that leave pictures as they are encoded."""
    decoders = {}
    for key, feature in features.items():
        if hasattr(feature, "items"):
            decoders[key] = _encoded(feature, is_image, tfds)
        elif is_image(feature):
            decoders[key] = tfds.decode.SkipDecoding()
    return decoders


def _numpy(values: dict, prefix: str = "") -> dict[str, np.ndarray]:
    arrays = {}
    for key, value in values.items():
        if isinstance(value, dict):
            arrays |= _numpy(value, f"{prefix}{key}/")
        else:
            arrays[f"{prefix}{key}"] = np.asarray(value.numpy())
    return arrays
