"""openpi's wire format: msgpack with numpy arrays, read as carefully as what comes from a network deserves."""

import math
from typing import Any

import msgpack
import numpy as np

MAX_ITEMS = 1024  # of one map or list, of a wire format whose large things are all arrays
MAX_TOTAL_ITEMS = 16 * MAX_ITEMS  # of a whole message
MAX_DIMS = 8
MAX_SENTENCE = 2000  # characters of an error
ARRAY, SCALAR, DATA, DTYPE, SHAPE = b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape"
DTYPES = {"|b1", "|i1", "|u1"} | {f"{order}{kind}{size}" for order in "<>" for kind in "iuf" for size in (2, 4, 8)}
PLAIN = (type(None), bool, int, float, str, list, dict, np.ndarray)


class RefusedRequest(ValueError):
    """A request that gets an error instead of an answer.

    Args:
        kind (`str`): a word for programs: `malformed`, `observation`, `overloaded`, `deadline`, `stopping`, `left` or
            `internal`.
        sentence (`str`): what was expected, what came, and how to mend it.
    """

    def __init__(self, kind: str, sentence: str):
        super().__init__(sentence)
        self.kind = kind

    def to_text(self) -> str:
        """Return the text frame that says so: `kind: sentence`."""
        return f"{self.kind}: {self}"[:MAX_SENTENCE]

    @classmethod
    def from_text(cls, text: str) -> "RefusedRequest":
        """Read what `to_text` wrote; the text of a server that names no kind is `internal`."""
        kind, colon, sentence = text.partition(": ")
        return cls(kind, sentence) if colon and kind.isalpha() else cls("internal", text)


def pack(message: dict[str, Any]) -> bytes:
    """Write a message.

    Args:
        message (`dict`): of texts, numbers, lists, dictionaries and numpy arrays of numbers or truth values.

    Returns:
        `bytes`

    Raises:
        ValueError: an array holds something else.
        TypeError: there is anything else in it.

    Source: openpi's msgpack_numpy, https://github.com/Physical-Intelligence/openpi
    """
    return msgpack.packb(message, default=_pack_array)


def unpack(data: bytes) -> dict[str, Any]:
    """Read a message. Nothing is allocated that the bytes themselves do not hold.

    Args:
        data (`bytes`): of a size that was limited before.

    Returns:
        `dict[str, Any]`: of None, truth values, numbers, texts, lists, dictionaries with texts as keys, and numpy
        arrays in this machine's byte order, which may not be written to.

    Raises:
        ValueError: it is no such message; the text says what is wrong with it.
    """
    message = _Reader().read(data)
    if not isinstance(message, dict):
        raise ValueError(f"Expected a map of msgpack, came {type(message).__name__}.")
    return message


class _Reader:
    """Counts as it reads, so that a small message of many lists is given up early."""

    def __init__(self):
        self.items = 0

    def read(self, data):
        limits = {"max_array_len": MAX_ITEMS, "max_map_len": MAX_ITEMS, "max_ext_len": 0}
        try:
            message = msgpack.unpackb(data, object_hook=self._map, list_hook=self._list, **limits)
        except RefusedItem as error:
            raise ValueError(str(error)) from None
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
            said = str(error) or type(error).__name__  # msgpack's own, of a few words
            raise ValueError(f"Expected a message of msgpack with at most {MAX_ITEMS} items each: {said}.") from None
        return message

    def _map(self, values):
        self._count(values)
        if values.keys() == {ARRAY, DATA, DTYPE, SHAPE}:
            return _read_array(values)
        if values.keys() == {SCALAR, DATA, DTYPE}:
            return _read_scalar(values)
        if not all(isinstance(key, str) for key in values):
            raise RefusedItem("Expected texts as keys of a map; those of an array are its data, dtype and shape.")
        return self._plain(values, values.values())

    def _list(self, values):
        self._count(values)
        return self._plain(values, values)

    def _count(self, values):
        self.items += len(values)
        if self.items > MAX_TOTAL_ITEMS:
            raise RefusedItem(f"Expected at most {MAX_TOTAL_ITEMS} items in a message; send numbers as arrays.")

    def _plain(self, values, items):
        for item in items:
            if not isinstance(item, PLAIN):
                raise RefusedItem(f"Expected texts, numbers, lists, maps and arrays, came {type(item).__name__}.")
        return values


class RefusedItem(Exception):
    """Something in a message; msgpack does not take it for an error of its own."""


def _pack_array(value):
    dtype = getattr(value, "dtype", None)
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"Expected texts, numbers, lists, dictionaries and numpy arrays, came {type(value).__name__}.")
    if dtype.str not in DTYPES:
        raise ValueError(f"Expected an array of numbers of at most 8 bytes, came {dtype}.")
    if isinstance(value, np.generic):
        return {SCALAR: True, DATA: value.item(), DTYPE: dtype.str}
    return {ARRAY: True, DATA: value.tobytes(), DTYPE: dtype.str, SHAPE: value.shape}


def _read_array(values):
    data, shape, dtype = values[DATA], values[SHAPE], _dtype(values[DTYPE])
    if not isinstance(data, bytes):
        raise RefusedItem(f"Expected the bytes of an array, came {type(data).__name__}.")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(size) for size in shape):
        raise RefusedItem(f"Expected the shape of an array, at most {MAX_DIMS} whole numbers.")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise RefusedItem(f"An array of {dtype} and shape {shape} does not have {len(data)} bytes.")
    return np.ndarray(shape, dtype, data).astype(dtype.newbyteorder("="), copy=False)


def _is_size(value):
    return type(value) is int and 0 <= value < 2**31


def _read_scalar(values):
    """A number as Python's; its precision is no matter to us."""
    _dtype(values[DTYPE])
    if not isinstance(values[DATA], (bool, int, float)):
        raise RefusedItem(f"Expected a number, came {type(values[DATA]).__name__}.")
    return values[DATA]


def _dtype(name):
    if not isinstance(name, str) or name not in DTYPES:
        raise RefusedItem(
            "Expected the dtype of an array as numpy writes that of numbers, such as '<f4' or '|u1', came "
            f"{str(name)[:20]!r}. A text is sent as such, not as an array of it."
        )
    return np.dtype(name)
