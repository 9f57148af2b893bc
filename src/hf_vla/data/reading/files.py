"""Where the files of a dataset are: in a folder, on the Hub at one commit, or behind another URL."""

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hf_vla.data.reading.remote import RemoteFile, RemoteFolder, named

META = "meta/*"


class DatasetFiles:
    """The files of one dataset, under the path that each has or would have in a folder of this machine.

    Of a dataset on the Hub only what is asked for is downloaded, to the Hub's own cache, and all of it is of the
    commit that its revision named when this was made. With `streaming` files that are not there may be opened all the
    same: what is read of them is fetched by range requests.

    Args:
        source (`str` or `Path`): a folder, a name on the Hub, or (with `streaming`) a URL that fsspec knows.
        revision (`str`, *optional*): branch, tag or commit of a dataset on the Hub.
        streaming (`bool`, defaults to `False`): open files where they are.

    Attributes:
        root (`Path`): the folder; what lies in `meta` is in it.
        revision (`str` or `None`): the commit of a dataset on the Hub.
        remote (`bool`): files may be elsewhere than in the folder.

    Raises:
        FileNotFoundError: there is no such folder, and it is no dataset's name; or the Hub does not have it, or cannot
            be reached.
        ValueError: a URL without `streaming`, or the revision of a folder.
    """

    def __init__(self, source: str | Path, revision: str | None = None, streaming: bool = False):
        self.name, self.revision = str(source), None
        self._elsewhere: RemoteFolder | None = None
        self.hub_name, revision = _name_on_the_hub(source, revision)
        if self.hub_name:
            self.root = self._snapshot(revision or "main", META)
            self.revision = self.root.name  # snapshots are in folders that are named by their commit
            if streaming:
                from huggingface_hub import HfFileSystem

                base = f"datasets/{self.hub_name}@{self.revision}"
                self._elsewhere = RemoteFolder(HfFileSystem(), base, self.name)
            return
        if revision is not None:
            raise ValueError(f"{source}: revision {revision!r} is of a dataset on the Hub, but this is none.")
        if "://" not in self.name:
            self.root = Path(source)
        elif streaming:
            self.root = self._copied_meta()
        else:
            raise ValueError(f"{source} is a URL: read it where it is with streaming=True, or copy it to a folder.")

    @property
    def remote(self) -> bool:
        """Whether files are opened elsewhere than in the folder."""
        return self._elsewhere is not None

    def fetch(self, patterns: str | Sequence[str]) -> None:
        """Download what fits one of some patterns, of a dataset on the Hub; elsewhere there is nothing to do.

        Args:
            patterns (`str` or `Sequence[str]`): of paths in the dataset; `*` is any characters, `/` among them.
        """
        if self.hub_name and patterns:
            self._snapshot(self.revision, patterns)

    def fetch_files(self, paths: Iterable[Path]) -> None:
        """Download single files of a dataset on the Hub that are not there yet; those that it lacks are left out."""
        missing = [str(path.relative_to(self.root)) for path in paths if not path.is_file()]
        if self.hub_name and missing:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import RemoteEntryNotFoundError
            from huggingface_hub.utils import tqdm
            from tqdm.contrib.concurrent import thread_map

            download = partial(hf_hub_download, self.hub_name, repo_type="dataset", revision=self.revision)

            def fetch(name):
                try:
                    download(name)
                except RemoteEntryNotFoundError:
                    pass  # who reads it says what it was needed for

            with self._from_the_hub(self.revision):
                thread_map(fetch, missing, max_workers=8, tqdm_class=tqdm, desc=f"Fetching files of {self.name}")

    def glob(self, pattern: str) -> list[Path]:
        """Return the files that fit a pattern, in order of their names, be they here or elsewhere."""
        if self.remote:
            return sorted(self.root / name for name in self._elsewhere.glob(pattern))
        return sorted(self.root.glob(pattern))

    def open_remote(self, path: Path, in_blocks: bool = False) -> RemoteFile | None:
        """Open a file that is not in the folder; None if it is.

        Args:
            path (`Path`): in the folder, whether it is there or not.
            in_blocks (`bool`): fetch a block at once, and keep it for a while; else just what is read.

        Raises:
            FileNotFoundError: no such file.
            OSError: it cannot be fetched; the file system's own attempts, several of them, have failed.
        """
        if not self.remote or path.is_file():
            return None
        return self._elsewhere.open(path.relative_to(self.root).as_posix(), in_blocks)

    def open_video(self, path: Path) -> RemoteFile | None:
        """Open a video that is not in the folder, to read here and there in it; None if it is in the folder."""
        return self.open_remote(path, in_blocks=True)

    def _snapshot(self, revision: str, patterns: str | Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download

        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        options = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
        with self._from_the_hub(revision):
            return Path(snapshot_download(self.hub_name, **options))

    @contextmanager
    def _from_the_hub(self, revision: str) -> Iterator[None]:
        """Have the Hub's errors say what to do; what LeRobot recorded on this machine need not be on the Hub."""
        from huggingface_hub import constants, errors

        home = Path(os.environ.get("HF_LEROBOT_HOME") or Path(constants.HF_HOME, "lerobot"))
        own = home.expanduser() / self.hub_name
        hint = f" LeRobot keeps a dataset of this name in {own}: give that folder." if (own / "meta").is_dir() else ""
        try:
            yield
        except errors.RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{self.name}: the Hub has no such dataset, or none that you may read: check the name, or sign in "
                f"with `hf auth login`.{hint}"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise FileNotFoundError(
                f"{self.name}: the dataset has no branch, tag or commit {revision!r} on the Hub.{hint}"
            ) from error
        except errors.LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"{self.name}: the Hub cannot be reached, and what is needed was not downloaded before ({error})."
                f"{hint}"
            ) from error

    def _copied_meta(self) -> Path:
        import fsspec

        try:
            file_system, base = fsspec.core.url_to_fs(self.name)
        except (ValueError, ImportError) as error:  # an unknown kind, or one whose package is not installed
            raise ValueError(f"{self.name}: fsspec cannot open such a URL here ({error}).") from error
        self._elsewhere = RemoteFolder(file_system, base, self.name)
        folder = Path(tempfile.mkdtemp(prefix="hf_vla_meta_"))
        weakref.finalize(self, _remove, folder, os.getpid())
        for path in self._elsewhere.files("meta"):
            with named(f"{self.name}, {path}"):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(file_system.cat_file(f"{base}/{path}"))
        return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a process that was forked from the one that made it
        shutil.rmtree(folder, ignore_errors=True)


def _name_on_the_hub(source: str | Path, revision: str | None) -> tuple[str | None, str | None]:
    if Path(source).is_dir():
        return None, revision
    if isinstance(source, str) and (match := re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/?", source)):
        return match[1], revision or match[2]
    if isinstance(source, str) and "://" in source:
        return None, revision
    if not isinstance(source, str) or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(f"{source}: no such folder, and no dataset name of the form owner/name either.")
    return source, revision
