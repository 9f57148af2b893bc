"""What LeRobot's features say of a frame: their columns, and whether a frame fits them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from hf_vla.data import schema

NUMBER = {"dtype": "int64", "shape": [1], "names": None}
COUNTED = {  # the columns that are counted, not given
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    **dict.fromkeys(("frame_index", "episode_index", "index", schema.TASK + schema.INDEX_SUFFIX), NUMBER),
}
SUBTASK_INDEX = schema.SUBTASK + schema.INDEX_SUFFIX
NUMERIC = ("float32", "float64", "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))


def check_features(features: dict[str, dict]) -> dict[str, dict]:
    """Return LeRobot's features with shapes as lists and the counted columns at the end.

    Raises:
        ValueError: a name with a slash, a counted column declared otherwise, an unknown dtype, or a camera whose shape
            is not (height, width, 3).
    """
    checked = {}
    for key, feature in features.items():
        if "/" in key or key == schema.TASK:
            raise ValueError(f"A feature cannot be named {key!r}: no slashes, and the task is given with every frame.")
        if missing := {"dtype", "shape"} - set(feature):
            raise ValueError(f"Feature {key!r} lacks {sorted(missing)}; write it as {{'dtype', 'shape', 'names'}}.")
        feature = {"names": None} | feature | {"shape": [int(size) for size in feature["shape"]]}
        dtype, shape = feature["dtype"], feature["shape"]
        if key in COUNTED or key == SUBTASK_INDEX:
            if (dtype, shape) != ((expected := COUNTED.get(key, NUMBER))["dtype"], expected["shape"]):
                raise ValueError(f"Feature {key!r} is counted by the recorder as {expected}, came {feature}.")
        elif dtype in ("image", "video"):
            if len(shape) != 3 or shape[2] != 3:
                raise ValueError(
                    f"Feature {key!r}: expected a shape (height, width, 3) of pictures, came {shape}{_mend(shape)}."
                )
        elif dtype == "string":
            if shape != [1]:
                raise ValueError(f"Feature {key!r}: expected a text of shape (1,), came {shape}.")
        elif dtype not in NUMERIC or not shape or min(shape) < 1:
            raise ValueError(
                f"Feature {key!r}: expected a dtype of {[*NUMERIC, 'string', 'image', 'video']} and a shape of one "
                f"axis or more, came {dtype!r} and {shape}."
            )
        checked[key] = feature
    given = {key: feature for key, feature in checked.items() if key not in COUNTED}
    return given | {key: checked.get(key, feature) for key, feature in COUNTED.items()}


def check_frame(frame: dict, features: dict[str, dict]) -> dict:
    """Return a frame with its values as arrays of their features' dtypes and shapes.

    Raises:
        ValueError: a key is missing or unknown, a value has another shape or a dtype that does not fit, is NaN or
            infinite, or is no text where one is due.
    """
    texts = [schema.TASK, *([schema.SUBTASK] if SUBTASK_INDEX in features else [])]
    texts += [key for key, feature in features.items() if feature["dtype"] == "string"]
    expected = {*features, *texts} - {*COUNTED, SUBTASK_INDEX}
    if expected != set(frame):
        raise ValueError(
            f"expected the keys {sorted(expected)}; missing are {sorted(expected - set(frame))}, "
            f"unknown {sorted(set(frame) - expected)}."
        )
    for key in texts:
        if not isinstance(frame[key], str):
            raise ValueError(f"expected {key!r} to be a text, came {frame[key]!r}.")
    return {key: value if key in texts else _array(key, features[key], value) for key, value in frame.items()}


def _mend(shape) -> str:
    """How a picture of this shape becomes one of (height, width, 3)."""
    match tuple(shape):
        case (3, _, _):
            return "; put its channels last: np.moveaxis(picture, 0, -1)"
        case (_, _, 4):
            return "; leave its fourth channel out: picture[..., :3]"
        case (height, width) | (height, width, 1) | (1, height, width):
            return (
                f"; repeat its one channel: np.repeat(picture.reshape({height}, {width}, 1), 3, axis=-1), uint8. "
                "Depth of more than 8 bits cannot be recorded: leave it out or scale it"
            )
    return ""


def _array(key, feature, value) -> np.ndarray:
    array, shape, picture = np.asarray(value), tuple(feature["shape"]), feature["dtype"] in ("image", "video")
    dtype = np.dtype("uint8" if picture else feature["dtype"])
    if array.shape != shape and not (shape == (1,) and array.shape == ()):
        mend = _mend(array.shape) if picture else ""
        raise ValueError(f"expected {key!r} of shape {shape}, came {array.shape}{mend}.")
    if picture and array.dtype == dtype:
        return array  # its encoder copies it
    # A float64 may become a float32, but a float no whole number, and values in [0, 1] no pixels.
    if picture or not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(f"expected {key!r} of dtype {dtype}, came {array.dtype}; convert it.")
    with np.errstate(over="ignore"):  # infinite then, and refused below
        cast = np.array(array, dtype).reshape(shape)
    wrong = ~np.isfinite(cast) if dtype.kind == "f" else cast != array.reshape(shape)
    if wrong.any():
        place = np.argwhere(wrong)[0].tolist()
        came = array.reshape(shape)[tuple(place)]
        raise ValueError(f"expected finite numbers of dtype {dtype} in {key!r}, came {came} at {place}.")
    return cast


def check_same_features(root: Path, known: dict[str, dict], given: dict[str, dict]) -> None:
    """Check that frames of these features belong into a dataset.

    Raises:
        ValueError: a feature is missing on either side, or differs, other than in how its pictures are described.
    """
    for key in sorted({*known, *given}):
        there, here = ({**features[key]} if key in features else None for features in (known, given))
        codecs = {side.pop("info", {}).get("video.codec") for side in (there, here) if side} - {None}
        if there is not None:
            there["shape"] = [*there["shape"]]
        if there != here or len(codecs) > 1:
            raise ValueError(
                f"{root}: its feature {key!r} is {known.get(key)}, the recorder's {given.get(key)}; "
                "they must agree, or the recording needs a new folder."
            )


def arrow_schema(features: dict[str, dict]) -> pa.Schema:
    """Return the schema of the rows' files, with what the `datasets` library wants to know of them."""
    fields, notes = [], {}
    for key, feature in features.items():
        dtype, shape = feature["dtype"], feature["shape"]
        if dtype == "video":
            continue
        if dtype == "image":
            kind, note = pa.struct({"bytes": pa.binary(), "path": pa.string()}), {"_type": "Image"}
        else:
            kind = {"string": pa.string(), "bool": pa.bool_()}.get(dtype) or pa.from_numpy_dtype(dtype)
            note = {"dtype": dtype, "_type": "Value"}
            if len(shape) > 1:
                note = {"shape": shape, "dtype": dtype, "_type": f"Array{len(shape)}D"}
            elif shape != [1]:
                note = {"feature": note, "length": shape[0], "_type": "List"}
            for size in reversed(shape if shape != [1] else []):
                kind = pa.list_(kind, size) if len(shape) == 1 else pa.list_(kind)
        fields.append(pa.field(key, kind))
        notes[key] = note
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": notes}})})
