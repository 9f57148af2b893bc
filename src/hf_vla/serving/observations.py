"""A robot's message -> an observation as a policy takes it: openpi's names, LeRobot's, or renamed by the user."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hf_vla.policy import DEPTH, IMAGES, STATE, TASK, Policy

MAX_DEPTH = 4  # of maps in maps
MAX_TEXT = 4096  # characters of an instruction: what is longer keeps the model from everybody else's
MAX_STATE = 1024
ASPECT = 0.05  # by which width to height may differ from the camera's: sizes that a resizing has rounded
OBSERVATION = "observation."
FIELDS = {"reset": bool, "predict": bool, "reasoning": str, "adapter": str}  # of a request, beside the observation


def take_fields(message: dict[str, Any]) -> dict[str, Any]:
    """Take what asks something of the server out of a message.

    Args:
        message (`dict`): changed, it keeps the observation.

    Returns:
        `dict`: of [`FIELDS`] those that are there and not None.

    Raises:
        ValueError: one is of another type.
    """
    fields = {name: message.pop(name) for name in FIELDS if name in message}
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, value in fields.items():
        if not isinstance(value, FIELDS[name]):
            raise ValueError(f"Expected {name!r} to be {FIELDS[name].__name__}, came {type(value).__name__}.")
        if isinstance(value, str):
            _check_text(name, value)
    return fields


def translate(
    message: Mapping[str, Any], policy: Policy, rename: Mapping[str, str], any_aspect: bool = False
) -> dict[str, Any]:
    """Call the parts of an observation as a policy does.

    Maps in maps are joined by dots, and slashes are dots: `observation/state`, `{"observation": {"state": ...}}` and
    `observation.state` are one. `prompt` is the task, `state` the state; a camera is known by its name, alone, behind
    `images.` or `image.`, or before `_image`, and `image` is the only camera of a checkpoint that has one. Pictures
    with their channels first are turned where that is certain.

    Args:
        message (`dict`): as [`~hf_vla.serving.protocol.unpack`] reads it.
        policy ([`~hf_vla.policy.Policy`]): whose names these are to be.
        rename (`dict[str, str]`): the robot's name -> ours, which is empty for what is not to be looked at.
        any_aspect (`bool`): take pictures of another shape than the camera's, too, which squashes them.

    Returns:
        `dict`: see [`~hf_vla.policy.Policy.predict_chunk`]. What is missing in it, a policy itself says.

    Raises:
        ValueError: a name means nothing to the checkpoint, two mean the same, or a value is not of the right kind; the
            text says what the checkpoint needs.
    """
    observation: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, value in _flatten(message):
        target = rename[key] if key in rename else _target(key, policy)
        if target is None:
            raise ValueError(
                f"Nothing of this checkpoint is called {_short(key)!r}. {describe_needs(policy)} Leave it out, or "
                "start the server with --rename THEIRS=OURS, or THEIRS= for what it shall not look at."
            )
        if target == "":
            continue
        if target in sources:
            raise ValueError(f"Both {_short(sources[target])!r} and {_short(key)!r} are {target!r}: send one of them.")
        sources[target] = key
        observation[target] = _value(target, value)
    if not any_aspect:
        _check_aspects(observation, policy.cameras)
    return observation


def describe_needs(policy: Policy) -> str:
    """Say in a sentence what a checkpoint has to be given."""
    needs = []
    for camera in policy.cameras or (None,):
        name = "<camera>" if camera is None or camera.name is None else camera.name
        size = "H, W" if camera is None else f"{camera.height}, {camera.width}"
        needs.append(f"{IMAGES + name!r} ({size}, 3) uint8")
        if camera is not None and camera.depth:
            needs.append(f"{DEPTH + name!r} ({size}) in metres")
    if policy.takes_state:
        names = "" if policy.state_spec is None else f" {', '.join(policy.state_spec.names)}"
        count = policy.processor.action_codec.state_normalizer(policy.unnorm_key).action_dim
        needs.append(f"{STATE!r} ({count} numbers{':' * bool(names)}{names})")
    return f"It needs {', '.join(needs)} and {TASK!r} (a text)."


def parse_rename(pairs: Mapping[str, str]) -> dict[str, str]:
    """Check names given by a user, `{theirs: ours}`; slashes are dots, as in [`translate`].

    Raises:
        ValueError: one of ours is nothing that an observation has.
    """
    for theirs, ours in pairs.items():
        if ours not in ("", STATE, TASK) and not ours.startswith((IMAGES, DEPTH)):
            raise ValueError(
                f"Expected {theirs!r} to be renamed to {IMAGES}<camera>, {DEPTH}<camera>, {STATE} or {TASK}, or to "
                f"nothing, came {ours!r}."
            )
    return {_dotted(theirs): ours for theirs, ours in pairs.items()}


def check_rename(rename: Mapping[str, str], policies: Iterable[Policy]) -> None:
    """Refuse names for cameras that nothing which is served looks through.

    Raises:
        ValueError: there is no such camera; the text lists those that there are.
    """
    cameras = [{camera.name for camera in policy.cameras} for policy in policies]
    if any(not names or None in names for names in cameras):  # that one takes any name
        return
    known = sorted(set().union(*cameras))
    for theirs, ours in rename.items():
        name = ours.removeprefix(IMAGES).removeprefix(DEPTH)
        if name != ours and name not in known:
            raise ValueError(
                f"{theirs!r} cannot be renamed to {ours!r}: there is no camera {name!r}, only {', '.join(known)}."
            )


def _flatten(message, path="", depth=0):
    if depth > MAX_DEPTH:
        raise ValueError(f"Expected an observation of at most {MAX_DEPTH} maps in each other.")
    for key, value in message.items():
        name = f"{path}{_dotted(key)}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.", depth + 1)
        else:
            yield name, value


def _dotted(key):
    return key.replace("/", ".")


def _target(key, policy):
    """Our name of a robot's; None where there is none."""
    if key in (TASK, "prompt"):
        return TASK
    body = key.removeprefix(OBSERVATION)
    if body == "state":
        return STATE
    cameras = [camera.name for camera in policy.cameras if camera.name is not None]
    if body.startswith("depth."):
        name = body.removeprefix("depth.")
        return DEPTH + name if name in cameras or not cameras else None
    for name in cameras:
        names = (name, f"images.{name}", f"image.{name}", f"{name}_image")
        if key == name or body in names or body in (_dotted(each) for each in names):
            return IMAGES + name
    if body in ("image", "images.image") and len(cameras) < 2:
        return IMAGES + (cameras or ["image"])[0]
    return IMAGES + body.removeprefix("images.") if not cameras and body.startswith("images.") else None


def _value(target, value):
    if target == TASK:
        return _check_text(TASK, value)
    if target == STATE:
        return _state(value)
    if target.startswith(DEPTH):
        return _array(target, value, "floating-point numbers (H, W)", lambda given: given.dtype.kind == "f", 2)
    if value is None:  # a camera that is out of order
        return None
    picture = _array(target, value, "uint8 (H, W, 3)", lambda given: given.dtype == np.uint8, 3)
    if picture.shape[0] == 3 and picture.shape[-1] != 3:  # as openpi's ALOHA robots send them
        return np.ascontiguousarray(picture.transpose(1, 2, 0))
    if picture.shape[-1] != 3:
        raise ValueError(f"Expected {target!r} as uint8 (H, W, 3), its channels last, came {picture.shape}.")
    return picture


def _check_aspects(observation, cameras):
    cameras = {camera.name: camera for camera in cameras}
    for key, picture in observation.items():
        camera = cameras.get(key.removeprefix(IMAGES), cameras.get(None))
        if not key.startswith(IMAGES) or picture is None or camera is None:
            continue
        (height, width), wanted = picture.shape[:2], camera.width / camera.height
        if abs(width / height - wanted) > ASPECT * wanted:
            raise ValueError(
                f"Expected {key!r} in the shape of {camera.height} x {camera.width}, height x width, came "
                f"{height} x {width}, which would be squashed: send what the camera sees, neither cropped nor with "
                "bars; or start the server with --any-aspect, if training had it so."
            )


def _array(target, value, expected, fits, ndim):
    if not isinstance(value, np.ndarray):
        raise ValueError(f"Expected {target!r} as an array of {expected}, came {type(value).__name__}.")
    if not fits(value) or value.ndim != ndim or value.size == 0:
        raise ValueError(f"Expected {target!r} as an array of {expected}, came {value.dtype} {value.shape}.")
    return value


def _state(value):
    if isinstance(value, list):
        if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in value):
            raise ValueError(f"Expected {STATE!r} as an array of numbers, came a list of other things.")
        value = np.array(value, np.float64)
    if not isinstance(value, np.ndarray):
        raise ValueError(f"Expected {STATE!r} as an array of numbers, came {type(value).__name__}.")
    if value.dtype.kind not in "fiu" or value.ndim != 1 or value.size > MAX_STATE:
        raise ValueError(f"Expected {STATE!r} as one row of numbers, came {value.dtype} {value.shape}.")
    with np.errstate(over="ignore"):  # what becomes infinite is refused by the policy
        return value.astype(np.float32)


def _check_text(name, value):
    if not isinstance(value, str):
        raise ValueError(f"Expected {name!r} to be a text, came {type(value).__name__}.")
    if len(value) > MAX_TEXT:
        raise ValueError(f"Expected {name!r} of at most {MAX_TEXT} characters, came {len(value)}.")
    return value


def _short(key):
    return key if len(key) <= 80 else f"{key[:77]}..."
