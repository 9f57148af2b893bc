"""The example that may lie beside a checkpoint: a recorded moment, its pictures, and what was done."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from transformers.utils.hub import cached_file

from hf_vla.models.checkpoint_files import is_file_name
from hf_vla.training.summary import read_checked

FRAME = "frame.json"
Numbers = list[int | float]


class Example(TypedDict):
    """What `frame.json` holds; states and actions in robot units.

    Args:
        task (`str`): the instruction.
        images (`dict[str, str]`): names of the pictures beside it, by camera.
        dataset (`str`, *optional*): whose robot it is.
        state (`list`, *optional*): of the robot.
        actions (`list`, *optional*): what was done from there on, `(T, D)`.
        scene (`dict`, *optional*): where camera and hand were, see the Space.
    """

    task: str
    images: dict[str, str]
    dataset: NotRequired[str | None]
    state: NotRequired[Numbers | None]
    actions: NotRequired[list[Numbers] | None]
    scene: NotRequired[dict[str, Any] | None]


def read_example(checkpoint: str | Path) -> dict[str, Any] | None:
    """Read a checkpoint's example.

    Args:
        checkpoint (`str` or `Path`): folder or Hub name.

    Returns:
        `dict`: as in [`Example`], what is not there as None; `images` has paths of the pictures, downloaded where they
        lie on the Hub. None where the checkpoint has no example.

    Raises:
        ValueError: it is broken, or names a picture that does not lie beside it. Checkpoints come from anybody, and
            what their examples name is shown to everybody.
        OSError: the Hub cannot be reached.
    """
    file = cached_file(str(checkpoint), FRAME, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    example = dict.fromkeys(Example.__annotations__) | read_checked(Path(file), Example)
    if not example["images"]:
        raise ValueError(f"{file}: expected a picture of at least one camera as images; add it, or remove the file.")
    for camera, name in example["images"].items():
        picture = None
        if is_file_name(name):
            picture = cached_file(str(checkpoint), name, _raise_exceptions_for_missing_entries=False)
        if picture is None:
            raise ValueError(f"{file}: expected a picture beside it for the camera {camera!r}, came {name!r}.")
        example["images"][camera] = picture
    return example
