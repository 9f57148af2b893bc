"""Files of a folder elsewhere, read by ranges of bytes: on the Hub, or wherever fsspec reaches."""

import io
import os
from collections import OrderedDict
from contextlib import contextmanager
from threading import Lock

# Bytes of a video that are fetched at once: of AV1 at 128 x 128 some 150 frames, at 480 x 640 some 15.
BLOCK_BYTES = 2**18
KEPT_BYTES = 2**27
MAX_OPEN = 64


class RemoteFolder:
    """A folder that fsspec reaches.

    The blocks of videos that were used last are kept, for all who read the same file: 128 MiB in each process. A
    connection that is interrupted is tried again by the file system: the Hub's five times within half a minute.

    Args:
        file_system (`fsspec.AbstractFileSystem`): whose folder it is.
        base (`str`): the folder's path in it.
        name (`str`): of the dataset, for errors.
    """

    def __init__(self, file_system, base: str, name: str):
        self.file_system, self.base, self.name = file_system, base, name
        self._forget()

    def glob(self, pattern: str) -> list[str]:
        """Return the paths in the folder that fit a pattern."""
        return self._within(self.file_system.glob, pattern)

    def files(self, folder: str) -> list[str]:
        """Return the paths of all files in a folder of the folder."""
        return self._within(self.file_system.find, folder)

    def _within(self, search, path: str) -> list[str]:
        self._check_process()
        with named(self.name):
            names = search(f"{self.base}/{path}")
        return [name.removeprefix(self.base).lstrip("/") for name in names]

    def open(self, path: str, in_blocks: bool = False) -> "RemoteFile":
        """Open a file.

        Args:
            path (`str`): in the folder.
            in_blocks (`bool`): fetch a block at once, and keep it for a while; else just what is read.

        Raises:
            FileNotFoundError: no such file.
            OSError: it cannot be fetched.
        """
        return RemoteFile(self, path, in_blocks)

    def size(self, path: str) -> int:
        """Return the number of bytes of a file."""
        with self._opened(path) as file:
            return file.seek(0, io.SEEK_END)

    def fetch(self, path: str, start: int, end: int) -> bytes:
        """Fetch these bytes of a file."""
        with self._opened(path) as file:
            file.seek(start)
            return file.read(end - start)

    def block(self, path: str, number: int) -> bytes:
        """Return a block of a file, fetched unless it is at hand."""
        self._check_process()
        with self._lock:
            if (path, number) in self._blocks:
                self._blocks.move_to_end((path, number))
                return self._blocks[path, number]
        data = self.fetch(path, number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES)
        with self._lock:
            self._blocks[path, number] = data
            while len(self._blocks) * BLOCK_BYTES > KEPT_BYTES:
                self._blocks.popitem(last=False)
        return data

    @contextmanager
    def _opened(self, path: str):
        self._check_process()
        with named(f"{self.name}, {path}"):
            with self._lock:
                if path not in self._files:
                    file = self.file_system.open(f"{self.base}/{path}", "rb", cache_type="none")
                    self._files[path] = file, Lock()
                    if len(self._files) > MAX_OPEN:
                        self._files.popitem(last=False)
                self._files.move_to_end(path)
                file, lock = self._files[path]
            with lock:
                yield file

    def _check_process(self):
        if self._process != os.getpid():  # files and locks are shared with the process that this one was forked from
            own, options = type(self.file_system), self.file_system.storage_options
            # and the thread that fetches, of file systems that have one, was not forked along
            self.file_system = own(*self.file_system.storage_args, **options, skip_instance_cache=True)
            self._forget()

    def _forget(self):
        self._files: OrderedDict[str, tuple] = OrderedDict()
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock, self._process = Lock(), os.getpid()

    def __getstate__(self):
        return {"file_system": self.file_system, "base": self.base, "name": self.name}

    def __setstate__(self, state):
        self.__init__(**state)


class RemoteFile(io.RawIOBase):
    """A file of a remote folder; several may read the same one, each at its own place."""

    def __init__(self, folder: RemoteFolder, path: str, in_blocks: bool):
        self._folder, self._path, self._in_blocks = folder, path, in_blocks
        self._size, self._place = folder.size(path), 0

    def readinto(self, buffer) -> int:
        """Read on."""
        start, end = self._place, min(self._place + len(buffer), self._size)
        if start >= end:
            return 0
        if self._in_blocks:
            number, offset = divmod(start, BLOCK_BYTES)
            end = min(end, (number + 1) * BLOCK_BYTES)
            data = self._folder.block(self._path, number)[offset : offset + end - start]
        else:
            data = self._folder.fetch(self._path, start, end)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go elsewhere in the file."""
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        """Return the place in the file."""
        return self._place

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that it can be read anywhere."""
        return True


@contextmanager
def named(name: str):
    """Have errors say of which file they are: FileNotFoundError, or OSError for whatever else went wrong."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such file; the dataset is incomplete.") from error
    except Exception as error:  # every file system has errors of its own
        raise OSError(f"{name} could not be fetched ({type(error).__name__}: {error}).") from error
