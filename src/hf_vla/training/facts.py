"""What a checkpoint has to know of the data that it is trained on."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_vla.actions.spec import ActionSpec, CameraSpec, GripperSpec, StateSpec
from hf_vla.actions.statistics import ActionStatistics
from hf_vla.data import schema
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.tail import hold_tail
from hf_vla.training.data_arguments import CameraArguments, DataArguments
from hf_vla.training.datasets import OpenDataset

MAX_CHUNKS = 10_000  # of a dataset: what an action tokenizer is fitted to


@dataclass(frozen=True)
class DatasetFacts:
    """What a checkpoint has to know of a dataset that it is trained on.

    Args:
        statistics (`dict`): its entry there, "action", "num_trajectories" and "num_transitions", and "state" where
            the recipe uses it.
        actions (`np.ndarray` of shape `(num_transitions, action_dim)`): those to be learnt, robot units.
        chunks (`np.ndarray` of shape `(num_chunks, chunk_size, action_dim)`): some of those to be learnt, evenly
            spread, robot units; behind an episode's end as `data.chunk_tail` has it, "mask" repeating the last action.
        action_spec (`ActionSpec`): what they mean.
        state_spec (`StateSpec`, *optional*): what the state means; None where the model shall see none.
        cameras (`list[CameraSpec]`): in the recipe's order; also those that other datasets alone have.
    """

    statistics: dict[str, Any]
    actions: np.ndarray
    chunks: np.ndarray
    action_spec: ActionSpec
    state_spec: StateSpec | None
    cameras: list[CameraSpec]


@dataclass(frozen=True)
class DataFacts:
    """What a checkpoint has to know of all that it is trained on.

    Args:
        datasets (`dict[str, DatasetFacts]`): by unnorm_key, the dataset's name in the checkpoint.
        chunk_size (`int`): actions of one prediction.
        n_obs_steps (`int`): observations that the model sees.
        holds_tail (`bool`): whether the robot holds its position behind an episode's end, in chunks to be learnt.
        reasonings (`list[str]`, *optional*): what the model is to say, each text once; None where it says nothing.
        without_text (`float`): share of the training frames whose reasoning is missing or blank.
    """

    datasets: dict[str, DatasetFacts]
    chunk_size: int
    n_obs_steps: int = 1
    holds_tail: bool = False
    reasonings: list[str] | None = None
    without_text: float = 0.0

    @property
    def takes_state(self) -> bool:
        """Whether the model shall see the robot's state."""
        return any(facts.state_spec is not None for facts in self.datasets.values())

    @property
    def sizes(self) -> dict[str, int | None]:
        """Fields of a configuration that the data decide, in families that emit normalised actions.

        Of several robots the largest: the others' actions and states are padded.
        """
        states = [len(facts.state_spec.names) for facts in self.datasets.values() if facts.state_spec is not None]
        return {
            "action_dim": max(len(facts.action_spec.names) for facts in self.datasets.values()),
            "state_dim": max(states, default=None),
            "chunk_size": self.chunk_size,
        }

    @property
    def statistics(self) -> dict[str, dict]:
        """The datasets' entries under "statistics"."""
        return {key: facts.statistics for key, facts in self.datasets.items()}

    @property
    def specs(self) -> dict[str, dict]:
        """The datasets' entries under "specs" of an action_config."""
        return {
            key: {"action": facts.action_spec.to_dict(), "state": facts.state_spec and facts.state_spec.to_dict()}
            for key, facts in self.datasets.items()
        }

    @property
    def cameras(self) -> dict[str, list[dict]]:
        """The datasets' entries under "camera_config"."""
        return {key: [camera.to_dict() for camera in facts.cameras] for key, facts in self.datasets.items()}

    def only(self, why: str) -> str:
        """Return the unnorm_key of the one dataset.

        Raises:
            ValueError: there are several, which `why` rules out.
        """
        if len(self.datasets) > 1:
            raise ValueError(f"Expected one dataset, since {why}; came {list(self.datasets)}.")
        return next(iter(self.datasets))


def data_facts(data: DataArguments, datasets: list[OpenDataset]) -> DataFacts:
    """Collect the facts; statistics are those of the actions to be learnt, and of the states beside them.

    Raises:
        ValueError: the recipe's words do not fit the datasets.
    """
    holds_tail = data.chunk_tail == "hold"
    facts = {dataset.arguments.unnorm_key: _dataset_facts(dataset, holds_tail) for dataset in datasets}
    known = {camera.name: camera for each in facts.values() for camera in reversed(each.cameras)}
    for each in facts.values():  # what stands for a camera that a dataset lacks is black, but has a size
        own = {camera.name: camera for camera in each.cameras}
        each.cameras[:] = [own.get(name, replace(known[name], intrinsics=None)) for name in _camera_names(data)]
    reasonings, without_text = None, 0.0
    if data.reasoning is not None:
        texts = np.concatenate([_texts(dataset, data.reasoning) for dataset in datasets])
        said = [text for text in texts if text and not text.isspace()]
        reasonings, without_text = sorted(set(said)), 1 - len(said) / len(texts)
    return DataFacts(facts, data.chunk_size, data.n_obs_steps, holds_tail, reasonings, without_text)


def _camera_names(data: DataArguments) -> list[str]:
    return [role.removeprefix(schema.IMAGES) for role in data.roles]


def _texts(dataset: OpenDataset, column: str) -> np.ndarray:
    try:
        return dataset.episodes.texts(column)[dataset.train_rows]
    except ValueError as error:
        raise ValueError(f"{error} To train on actions alone, set data.reasoning: null.") from error


def _dataset_facts(opened: OpenDataset, holds_tail: bool) -> DatasetFacts:
    data, dataset, rows = opened.arguments, opened.episodes, opened.action_rows
    actions = dataset.column(schema.ACTION)[rows]
    entry = {
        "action": _statistics(actions),
        "num_trajectories": len(np.unique(dataset.column("episode_index")[rows])),
        "num_transitions": len(actions),
    }
    state_spec = None
    if data.state is not None:
        state_spec = StateSpec(column_names(dataset, schema.STATE, "state"), data.state.rotation, data.state.frame)
        entry["state"] = _statistics(dataset.column(schema.STATE)[rows])
    action = data.action
    names = column_names(dataset, schema.ACTION, "action")
    spec = ActionSpec(names, action.kind, action.rotation, action.frame, float(dataset.fps), action.gripper)
    if spec.gripper is not None:
        _check_gripper(spec.gripper, actions[:, spec.gripper.index])
    starts = opened.train_rows[:: 1 + len(opened.train_rows) // MAX_CHUNKS]
    chunks, is_pad = dataset.windows(schema.ACTION, starts)
    if holds_tail:
        chunks = hold_tail(chunks, is_pad, spec)
    cameras = [camera_spec(camera, dataset) for camera in data.cameras]
    return DatasetFacts(entry, actions, chunks, spec, state_spec, cameras)


def camera_spec(camera: CameraArguments, dataset: LeRobotEpisodes) -> CameraSpec:
    """Camera of the dataset in pixels of its recorded images.

    Raises:
        ValueError: the dataset does not say where in its shape height and width are, or has not 3 channels.
    """
    key = schema.camera_key(camera.name)
    feature = dataset.features[key]
    axes, shape = feature.get("names") or ("height", "width", "channels"), feature["shape"]
    sizes = dict(zip(axes, shape, strict=False)) if len(axes) == len(shape) == 3 else {}
    height, width = (sizes.pop(side, 0) for side in ("height", "width"))
    if not (height and width and list(sizes.values()) == [3]):
        raise ValueError(
            f"{dataset.name}: expected pictures of height, width and 3 channels under {key!r}, came names "
            f"{feature.get('names')} of shape {list(shape)}: mend names and shape in meta/info.json."
        )
    intrinsics = camera.intrinsics
    if camera.fovy is not None:
        focal = height / 2 / math.tan(math.radians(camera.fovy) / 2)
        intrinsics = [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]
    calibrated = CameraSpec(key.removeprefix(schema.IMAGES), *(camera.size or (width, height)), intrinsics)
    return calibrated.scaled(width, height)


def column_names(dataset: LeRobotEpisodes, key: str, what: str) -> tuple[str, ...]:
    """Name of each number of a column.

    Args:
        dataset (`LeRobotEpisodes`): names it in one of the ways that are about, or not at all.
        key (`str`): the column.
        what (`str`): "action" or "state"; the recipe's word for it, and `action_0`... where there are no names.

    Raises:
        ValueError: there is no such column, or its names are not one per number.
    """
    if key not in dataset.features:
        raise ValueError(f"{dataset.name} has no column {key!r}, which data.{what} is about.")
    feature = dataset.features[key]
    size = feature["shape"][0]
    names = schema.flat_names(feature.get("names")) or [f"{what}_{index}" for index in range(size)]
    if not all(isinstance(name, str) for name in names) or not len(names) == len(set(names)) == size:
        raise ValueError(
            f"{dataset.name}: expected {size} different names of the column {key!r}, one per number, came "
            f"{feature.get('names')!r}: mend them in meta/info.json, or set them to null."
        )
    return tuple(names)


def _statistics(values: np.ndarray) -> dict[str, Any]:
    statistics = ActionStatistics()
    statistics.update(values)
    return statistics.to_dict()


def _check_gripper(gripper: GripperSpec, values: np.ndarray) -> None:
    low, high = sorted((gripper.open, gripper.closed))
    if values.min() < low - 1e-6 or values.max() > high + 1e-6:
        raise ValueError(
            f"The recipe says that the gripper (action {gripper.index}) goes from {low} to {high}, the dataset's goes "
            f"from {values.min():g} to {values.max():g}: mend data.action.gripper."
        )
