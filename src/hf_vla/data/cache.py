"""Decoded frames on disk: bounded, memory-mapped, shared by processes, never half a frame."""

import errno
import hashlib
import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

# Of an index file: what it is, the name of its file of pictures, size and mtime (ns) of the video, height and width.
HEADER = struct.Struct("<8s8sqqII")
MAGIC = b"hf_vla 1"
# A picture: its time in the video, and a checksum of both. The n-th record is of the n-th picture.
RECORD = struct.Struct("<dQ")
USED = struct.Struct("<q")
MAX_OPEN = 256  # videos, each of which holds one file open
TOUCH_S, UNUSED_S = 60, 600  # mark a video as in use so often; take it as unused when that is so long ago


class FrameCache:
    """Keeps what was decoded, so that later epochs, and other processes, need not decode it again.

    A picture is added by writing its bytes, then the record that makes it known; a process killed between the two
    leaves bytes that the next picture overwrites. A checksum, compared when a process first reads a picture, finds
    what a power failure left. Pictures of a video whose size or mtime changed are dropped. When the room is used up,
    videos give way that were not asked for since this cache was made, nor by other processes in the last ten minutes;
    if there are none, further pictures are decoded every time: with rows shuffled, what is kept serves as well as
    what would replace it. Needs a system with `flock` (Linux, macOS) and a disk of this machine.

    A picture needs `height * width * 3` bytes: of 128x128 pixels 20,000 to the GB.

    Args:
        folder (`str` or `Path`): where to keep the pictures; made if it is not there. Give it to this cache alone.
        max_bytes (`int`): the most that the pictures may take there, of all processes and datasets together.

    Raises:
        ValueError: `max_bytes` is not positive.
        OSError: the disk has no room for `max_bytes`.
    """

    def __init__(self, folder: str | Path, max_bytes: int):
        if max_bytes <= 0:
            raise ValueError(f"max_bytes should be positive, came {max_bytes}; leave the cache out to have none.")
        self.folder, self.max_bytes = Path(folder), int(max_bytes)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._began = time.time()
        self._begin()
        with self._locked():
            used, free = self._count(), shutil.disk_usage(self.folder).free
        if free < self.max_bytes - used:
            raise OSError(
                errno.ENOSPC,
                f"a cache of {self.max_bytes} bytes, {used} of them there already, does not fit: {free} bytes are "
                "free; give a smaller max_bytes or a folder on another disk",
                str(self.folder),
            )

    def read(self, path: str | Path, seconds: list[float], decode: Callable) -> np.ndarray:
        """Return the frames of a video at these times, decoding those that are not there yet.

        Args:
            path (`str` or `Path`): the video; one that is no local file must not change.
            seconds (`list[float]`): times on the file's own clock, in any order.
            decode (`Callable`): (path, seconds) -> frames, as `VideoFrames.read`.

        Returns:
            `np.ndarray` of shape `(len(seconds), height, width, 3)`, uint8, RGB.

        Raises:
            OSError: a picture cannot be written, because the disk is full or for another reason.
        """
        if self._process != os.getpid():
            self._begin()
        video = self._video(path)
        pictures = {second: video.picture(second) for second in seconds}
        missing = [second for second, picture in pictures.items() if picture is None]
        if missing:
            decoded = decode(path, missing)
            pictures.update(zip(missing, decoded, strict=True))
            self._add(video, missing, decoded)
        return np.stack([pictures[second] for second in seconds])

    def _video(self, path: str | Path) -> "_Video":
        try:
            stat = os.stat(path)
            version = stat.st_size, stat.st_mtime_ns
        except OSError:
            version = 0, 0
        with self._threads:
            video = self._videos.pop(path, None)
            if video is None or video.version != version:
                name = hashlib.sha256(str(path).encode()).hexdigest()[:32]
                video = _Video(self.folder / f"{name}.index", version)
            self._videos[path] = video  # the one used last is the last one
            if len(self._videos) > MAX_OPEN:
                del self._videos[next(iter(self._videos))]
        video.touch()
        return video

    def _add(self, video: "_Video", seconds: list[float], pictures: np.ndarray):
        with self._locked():
            if not video.refresh() or not video.pictures_file.exists():
                _remove(video.index)
                self._count()
                video.create(pictures.shape[1:3])
            for second, picture in zip(seconds, pictures, strict=True):
                if video.picture(second) is None and self._has_room(picture.nbytes):
                    self._use(picture.nbytes)  # first: who is killed in between counts too much, never too little
                    video.append(second, np.ascontiguousarray(picture))

    def _has_room(self, size: int) -> bool:
        if self._used() + size > self.max_bytes and not self._full:
            before = min(self._began, time.time() - UNUSED_S)
            unused = sorted((path.stat().st_mtime, path) for path in self.folder.glob("*.index"))
            for touched, path in unused:
                if self._count() + size <= self.max_bytes or touched >= before:
                    break
                _remove(path)
            self._full = self._count() + size > self.max_bytes  # asked once: the folder may hold many files
        return self._used() + size <= self.max_bytes

    def _count(self) -> int:
        used = sum(path.stat().st_size for path in self.folder.glob("*.pictures"))
        os.pwrite(self._lock.fileno(), USED.pack(used), 0)
        return used

    def _used(self) -> int:
        return USED.unpack(os.pread(self._lock.fileno(), USED.size, 0))[0]

    def _use(self, size: int):
        os.pwrite(self._lock.fileno(), USED.pack(self._used() + size), 0)

    @contextmanager
    def _locked(self):
        import fcntl

        # Opened every time: a file shared with a forked process would not lock it out.
        with self._threads, open(os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT), "r+b") as self._lock:
            fcntl.flock(self._lock, fcntl.LOCK_EX)  # let go by the system when its holder is killed
            try:
                yield
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"a picture cannot be kept ({error.strerror}), {self._used()} of max_bytes {self.max_bytes} are "
                    "used; make room on the disk, give a smaller max_bytes, or do without a cache",
                    str(self.folder),
                ) from error

    def _begin(self):
        self._process = os.getpid()
        self._threads = threading.Lock()
        self._videos: dict[str | Path, _Video] = {}
        self._full = False

    def __getstate__(self):
        return {"folder": self.folder, "max_bytes": self.max_bytes, "_began": self._began}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin()


class _Video:
    """The pictures kept of one video: an index, which says what is in the file of pictures beside it."""

    def __init__(self, index: Path, version: tuple[int, int]):
        self.index, self.version = index, version
        self._touched = 0.0
        self._forget()
        self.refresh()

    def picture(self, seconds: float) -> np.ndarray | None:
        """Return a picture that is kept, as a view of the file."""
        if seconds not in self._records:
            self.refresh()
        if seconds not in self._records:
            return None
        place, checksum = self._records[seconds]
        if place >= len(self._pictures):
            self._map()
        picture = self._pictures[place] if place < len(self._pictures) else None
        if checksum is not None:  # not compared yet in this process
            if picture is None or _checksum(seconds, picture) != checksum:
                del self._records[seconds]
                return None
            self._records[seconds] = place, None
        return picture

    def refresh(self) -> bool:
        """Learn what was added, here or by another process.

        Returns:
            `bool`: pictures of this version of the video are kept, or may be appended.
        """
        try:
            with open(self.index, "rb") as file:
                header = file.read(HEADER.size)
                if header != self._header:
                    self._forget()
                    if len(header) < HEADER.size or _version(header) != (MAGIC, *self.version):
                        return False
                    self._header = header
                file.seek(HEADER.size + RECORD.size * self._count)
                added = file.read()
        except FileNotFoundError:
            self._forget()
            return False
        for seconds, checksum in RECORD.iter_unpack(added[: len(added) // RECORD.size * RECORD.size]):
            self._records[seconds] = self._count, checksum
            self._count += 1
        return True

    def create(self, shape: tuple[int, int]):
        self._forget()
        self._header = HEADER.pack(MAGIC, os.urandom(8), *self.version, *shape)
        self.pictures_file.touch()
        self.index.write_bytes(self._header)
        self._touched = time.time()

    def append(self, seconds: float, picture: np.ndarray):
        _write(self.pictures_file, picture.nbytes * self._count, picture.data.cast("B"))
        record = RECORD.pack(seconds, _checksum(seconds, picture))
        _write(self.index, HEADER.size + RECORD.size * self._count, record)
        self._records[seconds] = self._count, None
        self._count += 1

    def touch(self):
        """Mark the video as in use, for processes that look for room."""
        if time.time() > self._touched + TOUCH_S and self._header:
            self._touched = time.time()
            with suppress(FileNotFoundError):
                os.utime(self.index)

    @property
    def pictures_file(self) -> Path:
        name = HEADER.unpack(self._header)[1].hex()  # of its own whenever it is made anew: readers never mix two
        return self.index.with_suffix(f".{name}.pictures")

    def _map(self):
        *_, height, width = HEADER.unpack(self._header)
        with suppress(FileNotFoundError):  # another process made room
            count = self.pictures_file.stat().st_size // (height * width * 3)
            if count:
                self._pictures = np.memmap(self.pictures_file, np.uint8, "r", shape=(count, height, width, 3))

    def _forget(self):
        self._header, self._count, self._pictures = b"", 0, ()
        self._records: dict[float, tuple[int, int | None]] = {}  # time -> place, and the checksum if not compared yet


def _version(header: bytes) -> tuple[bytes, int, int]:
    magic, _, size, mtime, _, _ = HEADER.unpack(header)
    return magic, size, mtime


def _checksum(seconds: float, picture: np.ndarray) -> int:
    return zlib.crc32(picture, zlib.crc32(struct.pack("<d", seconds)))


def _write(path: Path, offset: int, content):
    with open(path, "r+b", buffering=0) as file:
        if os.pwrite(file.fileno(), content, offset) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _remove(index: Path):
    for path in index.parent.glob(f"{index.stem}.*"):
        path.unlink(missing_ok=True)
