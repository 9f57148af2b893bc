"""Pictures that lie in the parquet files of the rows, read from where they are."""

import io
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hf_vla.data.reading.rows import Rows


def decoded(data: bytes | None, bgr: bool = False) -> np.ndarray:
    """Decode a picture.

    Args:
        data (`bytes` or `None`): PNG, JPEG or whatever Pillow reads.
        bgr (`bool`): its colours are stored as blue, green, red.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`, uint8, RGB.

    Raises:
        ValueError: there are no bytes, they are no picture, or it has more than 8 bits per channel.
    """
    if not data:
        raise ValueError("the picture has no bytes; was it left in a file of its own?")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):  # convert() would clip them to white
                raise ValueError(f"expected 8 bits per channel, came mode {image.mode!r}; see `cameras` to skip it.")
            pixels = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError and more
        raise ValueError(f"a picture cannot be decoded: {error}") from error
    return pixels[..., ::-1] if bgr else pixels


class MappedPictures:
    """Encoded pictures by their place in parquet files of this machine, any of them as fast as the next.

    Parquet has no random access, and pictures are too many for memory: `datasets` copies them to its cache
    (`HF_DATASETS_CACHE`), once for these files and columns, from where they are memory-mapped. Read at random from row
    groups instead, a picture of 256x256 pixels costs half as much again as its decoding does where they have 100 rows,
    and seven times as much where they have 1000.

    Args:
        files (`list[Path]`): in order.
        cameras (`list[str]`): the columns.
    """

    def __init__(self, files: list[Path], cameras: list[str]):
        import datasets

        self.files = datasets.load_dataset("parquet", data_files=[*map(str, files)], columns=cameras, split="train")

    def encoded(self, key: str, place: int) -> bytes | None:
        """Return a picture's bytes, as [`ParquetPictures.encoded`] does."""
        return self.files.data[key][place]["bytes"].as_py()


class ParquetPictures:
    """Encoded pictures by their place in parquet files that may be elsewhere.

    Parquet is read by row groups (of LeRobot's datasets one for each episode, or for every 100 rows): the row groups
    used last are kept, so that rows read in order, several such sequences side by side, cost each row group once.

    Args:
        rows ([`~hf_vla.data.reading.rows.Rows`]): where the rows are.
        open_file (`Callable[[Path], BinaryIO | None]`): opens one of the files; None where it is on this machine.
        max_bytes (`int`, defaults to 256 MiB): of the row groups kept; the one used last is always kept.
    """

    MAX_OPEN = 32

    def __init__(self, rows: Rows, open_file: Callable[[Path], BinaryIO | None], max_bytes: int = 2**28):
        self.files, self.open_file, self.max_bytes = rows.files, open_file, max_bytes
        self._sizes = np.array([size for groups in rows.row_groups for size in groups], np.int64)
        self._starts = np.cumsum([0, *self._sizes])  # of every row group, of all files
        self._file_starts = np.cumsum([0, *map(len, rows.row_groups)])  # the first row group of every file
        self._forget()

    def encoded(self, key: str, place: int) -> bytes | None:
        """Return a picture's bytes, as they are in the file; None where there are none.

        Args:
            key (`str`): the column.
            place (`int`): of the row, in these files one behind the other.

        Raises:
            OSError, ValueError: the file cannot be read.
        """
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self._column(group, key)[int(place - self._starts[group])]["bytes"].as_py()

    def _column(self, group: int, key: str) -> pa.ChunkedArray:
        if self._process != os.getpid():  # a file's place is shared with the process that this one was forked from
            self._forget()
        if (group, key) not in self._kept:
            number = int(np.searchsorted(self._file_starts, group, side="right")) - 1
            table = self._open(self.files[number]).read_row_group(group - int(self._file_starts[number]), [key])
            self._kept[group, key] = table[key]
            while len(self._kept) > 1 and sum(column.nbytes for column in self._kept.values()) > self.max_bytes:
                self._kept.popitem(last=False)
        self._kept.move_to_end((group, key))
        return self._kept[group, key]

    def _open(self, path: Path) -> pq.ParquetFile:
        if path not in self._opened:
            try:
                self._opened[path] = pq.ParquetFile(self.open_file(path) or path, pre_buffer=True)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path}: cannot be read ({error}); is the file complete?") from error
            if len(self._opened) > self.MAX_OPEN:
                self._opened.popitem(last=False)[1].close(force=True)
        self._opened.move_to_end(path)
        return self._opened[path]

    def _forget(self):
        self._kept: OrderedDict[tuple[int, str], pa.ChunkedArray] = OrderedDict()
        self._opened: OrderedDict[Path, pq.ParquetFile] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self):
        return self.__dict__ | {"_kept": None, "_opened": None, "_process": None}
