"""What every family needs to know of the dataset, and what their builders share."""

import math
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
from torch.utils.data import Subset
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

from hf_vla.actions.spec import ActionSpec, CameraSpec, GripperSpec, StateSpec
from hf_vla.actions.statistics import ActionStatistics
from hf_vla.data import schema
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.models.base import VLAPreTrainedModel
from hf_vla.training.arguments import CameraArguments, DataArguments, ModelArguments


@dataclass(frozen=True)
class DatasetFacts:
    """What a checkpoint has to know of the dataset that it is trained on.

    Args:
        unnorm_key (`str`): the dataset's name in the checkpoint.
        statistics (`dict`): its entry there, "action", "num_trajectories" and "num_transitions", and "state" where
            the recipe uses it.
        actions (`np.ndarray` of shape `(num_frames, action_dim)`): of the training episodes, robot units.
        action_spec (`ActionSpec`): what they mean.
        state_spec (`StateSpec`, *optional*): what the state means; None where the model shall see none.
        cameras (`list[CameraSpec]`): in the recipe's order.
        chunk_size (`int`): actions of one prediction.
        reasonings (`list[str]`, *optional*): what the model is to say, each text once; None where it says nothing.
        without_text (`float`): share of the training frames whose reasoning is missing or blank.
    """

    unnorm_key: str
    statistics: dict[str, Any]
    actions: np.ndarray
    action_spec: ActionSpec
    state_spec: StateSpec | None
    cameras: list[CameraSpec]
    chunk_size: int
    reasonings: list[str] | None = None
    without_text: float = 0.0

    @property
    def sizes(self) -> dict[str, int | None]:
        """Fields of a configuration that the dataset decides, in families that emit normalised actions."""
        return {
            "action_dim": len(self.action_spec.names),
            "state_dim": None if self.state_spec is None else len(self.state_spec.names),
            "chunk_size": self.chunk_size,
        }

    @property
    def specs(self) -> dict[str, Any]:
        """The dataset's entry under "specs" of an action_config."""
        return {"action": self.action_spec.to_dict(), "state": self.state_spec and self.state_spec.to_dict()}


def dataset_facts(data: DataArguments, dataset: LeRobotEpisodes, train_set: Subset) -> DatasetFacts:
    """Collect the facts; statistics are those of the training episodes.

    Raises:
        ValueError: the recipe's words do not fit the dataset.
    """
    actions = dataset.column(schema.ACTION)[train_set.indices]
    entry = {
        "action": _statistics(actions),
        "num_trajectories": len(np.unique(dataset.column("episode_index")[train_set.indices])),
        "num_transitions": len(actions),
    }
    state_spec = None
    if data.state is not None:
        state_spec = StateSpec(column_names(dataset, schema.STATE, "state"), data.state.rotation, data.state.frame)
        entry["state"] = _statistics(dataset.column(schema.STATE)[train_set.indices])
    action = data.action
    names = column_names(dataset, schema.ACTION, "action")
    spec = ActionSpec(names, action.kind, action.rotation, action.frame, float(dataset.fps), action.gripper)
    if spec.gripper is not None:
        _check_gripper(spec.gripper, actions[:, spec.gripper.index])
    cameras = [camera_spec(camera, dataset) for camera in data.cameras]
    reasonings, without_text = None, 0.0
    if data.reasoning is not None:
        try:
            texts = dataset.texts(data.reasoning)[train_set.indices]
        except ValueError as error:
            raise ValueError(f"{error} To train on actions alone, set data.reasoning: null.") from error
        said = [text for text in texts if text and not text.isspace()]
        reasonings, without_text = sorted(set(said)), 1 - len(said) / len(texts)
    return DatasetFacts(
        data.unnorm_key, entry, actions, spec, state_spec, cameras, data.chunk_size, reasonings, without_text
    )


def camera_spec(camera: CameraArguments, dataset: LeRobotEpisodes) -> CameraSpec:
    """Camera of the dataset in pixels of its recorded images.

    Raises:
        ValueError: the dataset does not say where in its shape height and width are, or has not 3 channels.
    """
    key = camera.name if camera.name in dataset.features else schema.camera_key(camera.name)
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
    return CameraSpec(key.removeprefix(schema.IMAGES), width, height, intrinsics)


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
    names = _flat(feature.get("names")) or [f"{what}_{index}" for index in range(size)]
    if not all(isinstance(name, str) for name in names) or not len(names) == len(set(names)) == size:
        raise ValueError(
            f"{dataset.name}: expected {size} different names of the column {key!r}, one per number, came "
            f"{feature.get('names')!r}: mend them in meta/info.json, or set them to null."
        )
    return tuple(names)


def load_checkpoint(path: str, dtype: str):
    """Load model and processor of a folder or Hub name."""
    # An adapter remembers its checkpoint by this name: a folder's must not depend on where one stands.
    path = str(Path(path).resolve()) if Path(path).is_dir() else path
    return AutoModel.from_pretrained(path, dtype=dtype), AutoProcessor.from_pretrained(path)


def load_backbone(arguments: ModelArguments, auto_class, own_class):
    """Load the vision-language model that gets a new action head.

    Args:
        arguments (`ModelArguments`): holds `model.backbone` and `model.dtype`.
        auto_class (`type`): of transformers, that loads it.
        own_class (`type`): the family's model, whose backbone is taken out of it.

    Returns:
        `tuple`: the backbone, and what has its tokenizer and image processor; of a checkpoint of the family, its whole
        processor.

    Raises:
        ValueError: weights are missing, or it is a model of another family of this library.
    """
    source = arguments.backbone
    vlm, info = auto_class.from_pretrained(source, dtype=arguments.dtype, output_loading_info=True)
    if wrong := sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind]):
        raise ValueError(
            f"model.backbone {source!r} lacks {len(wrong)} weights of a {type(vlm).__name__}, or has them in another "
            f"shape, among them {wrong[:5]}; they would be random. Does config.json belong to it?"
        )
    if isinstance(vlm, own_class):
        return vlm.backbone, AutoProcessor.from_pretrained(source)
    if isinstance(vlm, VLAPreTrainedModel):
        raise ValueError(
            f"model.backbone {source!r} is a {vlm.config.model_type}: give a vision-language model of transformers, "
            f"or a {own_class.config_class.model_type}."
        )
    # its processor as a whole may want more than we have, for videos for example
    return vlm, SimpleNamespace(
        tokenizer=AutoTokenizer.from_pretrained(source), image_processor=AutoImageProcessor.from_pretrained(source)
    )


def check_sizes(path: str, sizes: dict[str, int | None], wanted: dict[str, int | None], hint: str) -> None:
    """Raise where a checkpoint is for another robot than the dataset's.

    Args:
        path (`str`): the checkpoint.
        sizes (`dict`): its own, see `DatasetFacts.sizes`.
        wanted (`dict`): the dataset's.
        hint (`str`): how to mend it.

    Raises:
        ValueError: sizes differ.
    """
    for name, value in wanted.items():
        if sizes[name] != value:
            raise ValueError(
                f"The checkpoint {path!r} has {name} {sizes[name]}, the recipe's data have {value}. {hint}"
            )


def continuous_dictionaries(
    facts: DatasetFacts, normalization: dict[str, Any], state_normalization: dict[str, Any]
) -> dict[str, dict]:
    """What the processor of a family that emits normalised actions is told: statistics, action_config, camera_config.

    Args:
        facts (`DatasetFacts`): of the dataset.
        normalization (`dict`), state_normalization (`dict`): see [`~hf_vla.actions.codec.ActionCodec`].
    """
    return {
        "statistics": {facts.unnorm_key: facts.statistics},
        "action_config": {
            "chunk_size": facts.chunk_size,
            "normalization": normalization,
            "state_normalization": None if facts.state_spec is None else state_normalization,
            "tokenizer": None,
            "specs": {facts.unnorm_key: facts.specs},
        },
        "camera_config": {facts.unnorm_key: [camera.to_dict() for camera in facts.cameras]},
    }


def keep_normalization(dictionaries: dict[str, dict], pretrained) -> None:
    """Let a checkpoint's weights see numbers normalised as they were in its own training.

    Args:
        dictionaries (`dict`): see `continuous_dictionaries`; changed in place.
        pretrained: the checkpoint's processor; a converted one may say nothing.
    """
    known, config = pretrained.action_config or {}, dictionaries["action_config"]
    for name in ("normalization", "state_normalization"):
        config[name] = config[name] and (known.get(name) or config[name])


def config_overrides(arguments: ModelArguments, config_class, given: dict[str, Any]) -> dict[str, Any]:
    """Fields of a new model's configuration: the dataset's, and those of `model.config`.

    Args:
        arguments (`ModelArguments`): holds `model.config`.
        config_class (`type`): the family's configuration.
        given (`dict`): fields that the dataset decides.

    Raises:
        ValueError: `model.config` names no field of the configuration, or one that the dataset decides.
    """
    wanted = arguments.config or {}
    known = {field.name: field.type for field in fields(config_class)}
    for name, value in wanted.items():
        if name in given:
            raise ValueError(f"model.config.{name} follows from the data, {given[name]!r} here: leave it out.")
        if name not in known:
            close = get_close_matches(name, list(known), n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ValueError(f"{config_class.__name__} has no {name!r} that model.config could set{hint}")
        if float in (known[name], *get_args(known[name])) and type(value) is int:
            wanted = {**wanted, name: float(value)}
    return {**given, **wanted}


def refuse(family: str, reason: str, **values) -> None:
    """Raise a ValueError that names those of the recipe's values that are set though the family has no use for them.

    Args:
        family (`str`): model type.
        reason (`str`): what it takes instead.
        values: names in the recipe, `model__grid` for `model.grid`, with what they are set to.
    """
    if given := [name.replace("__", ".") for name, value in values.items() if value]:
        raise ValueError(f"{family} takes no {', '.join(given)}: {reason}")


def refuse_reasoning(family: str, arguments: ModelArguments, facts: DatasetFacts) -> None:
    """Raise where a recipe asks a family that says nothing, and knows one robot, for what only DiVLA has.

    Raises:
        ValueError: it does.
    """
    refuse(
        family,
        "that is for divla.",
        data__reasoning=facts.reasonings is not None,
        model__new_embodiment=arguments.new_embodiment,
        model__head_weights=arguments.head_weights,
    )


def _statistics(values: np.ndarray) -> dict[str, Any]:
    statistics = ActionStatistics()
    statistics.update(values)
    return statistics.to_dict()


def _flat(names) -> list:
    """Names as datasets write them: a list, `{"x": 0, "y": 1}`, groups such as `{"motors": [...]}`, lists in lists."""
    if isinstance(names, dict):
        if all(place in names.values() for place in range(len(names))):
            return sorted(names, key=names.get)
        names = list(names.values())
    return [name for each in names for name in _flat(each)] if isinstance(names, list) else [names] * bool(names)


def _check_gripper(gripper: GripperSpec, values: np.ndarray) -> None:
    low, high = sorted((gripper.open, gripper.closed))
    if values.min() < low - 1e-6 or values.max() > high + 1e-6:
        raise ValueError(
            f"The recipe says that the gripper (action {gripper.index}) goes from {low} to {high}, the dataset's goes "
            f"from {values.min():g} to {values.max():g}: mend data.action.gripper."
        )
