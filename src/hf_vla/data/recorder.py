"""Recording demonstrations as a LeRobot dataset v3.0 that is complete at any moment."""

import json
from fractions import Fraction
from pathlib import Path

from hf_vla.data.recording.commits import FolderTransaction, write_json
from hf_vla.data.recording.drafts import EpisodeDraft
from hf_vla.data.recording.encoding import CODECS, VideoOptions
from hf_vla.data.recording.features import check_features, check_frame, check_same_features
from hf_vla.data.recording.publishing import push_dataset
from hf_vla.data.recording.staging import DATA, INFO, PLACE, VIDEOS, SavedEpisodes

SIZES = {"chunks_size": 1000, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200}  # LeRobot's


class LeRobotRecorder:
    """Records episodes into a folder that LeRobot and `LeRobotEpisodes` can read at any moment.

    An episode is written aside, in the hidden folder `.recording`, its pictures encoded while they come, so that
    memory does not grow with it. `save_episode` makes every file that changes anew, on the disk to the last byte, and
    then puts them into place by one rename after the other: videos, rows, tasks, table of episodes, statistics,
    `meta/info.json`. What an interruption leaves, be it a kill -9, Ctrl-C, a full disk, a loss of power, or an error
    inside `with`:

    - Every episode saved before, with the same values and pictures, and nothing of the one being recorded. Of the one
      being saved, a reader finds all or nothing; in between the last renames the table of episodes, which
      `LeRobotEpisodes` goes by, may list it while `meta/info.json`, which LeRobot goes by, does not count it yet.
    - A `save_episode` that was interrupted before its renames changed nothing and may be called again, unless the
      frames themselves could not be written: then it says so, and the episode has to be discarded.
    - One that was interrupted among its renames is finished by whatever comes next: any method of the recorder (it
      can no longer be discarded), the end of `with`, or opening the folder again.
    - Opening the folder again also drops an episode that was not saved, and goes on.

    Several episodes share a file, up to the sizes given and 1024 s of video; videos are joined without encoding them
    anew, a copy of the file so far with every episode. Every session begins new files. The statistics of numbers are
    those of all rows; LeRobot's quantiles are means over the episodes', as are those of pictures here.

    Args:
        root (`str` or `Path`): the folder. Where it holds a dataset, the recording goes on with it.
        fps (`float`): frames per second.
        features (`dict`): LeRobot's, name -> {"dtype", "shape", "names"}; cameras have the dtype "video" or "image"
            (pictures inside the parquet files) and the shape (height, width, 3). With a feature "subtask_index" every
            frame brings a text "subtask". Timestamps and the other indices are counted.
        robot_type (`str`, *optional*): name of the robot.
        video (`VideoOptions`, *optional*): codec and its settings; AV1 by default.
        chunks_size (`int`, *optional*): files per folder; as the dataset has it, 1000 for a new one.
        data_files_size_in_mb (`float`, *optional*): size at which a parquet file is full; likewise, 100.
        video_files_size_in_mb (`float`, *optional*): size at which a video is full; likewise, 200.

    Raises:
        ValueError: a feature is none of LeRobot's, the codec takes no pictures of a camera's size, or the folder holds
            something else than a dataset of these features, this rate, robot and codec.
        BlockingIOError: another recorder has the folder open.
    """

    def __init__(
        self,
        root: str | Path,
        fps: float,
        features: dict[str, dict],
        robot_type: str | None = None,
        video: VideoOptions | None = None,
        chunks_size: int | None = None,
        data_files_size_in_mb: float | None = None,
        video_files_size_in_mb: float | None = None,
    ):
        given = {
            "chunks_size": chunks_size,
            "data_files_size_in_mb": data_files_size_in_mb,
            "video_files_size_in_mb": video_files_size_in_mb,
        }
        sizes = {name: size for name, size in given.items() if size is not None}
        if wrong := {name: size for name, size in {"fps": fps, **sizes}.items() if not size > 0}:
            raise ValueError(f"Expected numbers above 0, came {wrong}.")
        fps = int(fps) if fps == int(fps) else float(fps)
        self.root, self.video = Path(root), video or VideoOptions()
        self.features = check_features(features)
        self._fps = Fraction(fps).limit_denominator(1000)
        self._cameras = [key for key, feature in self.features.items() if feature["dtype"] == "video"]
        for height, width in {tuple(self.features[key]["shape"][:2]) for key in self._cameras}:
            self.video.check(self._fps, height, width)
        info = {
            "codebase_version": "v3.0",
            "robot_type": robot_type,
            "total_episodes": 0,
            "total_frames": 0,
            "total_tasks": 0,
            **(SIZES | sizes),
            "fps": fps,
            "splits": {},
            "data_path": f"{DATA}/{PLACE}.parquet",
            "video_path": f"{VIDEOS}/{{video_key}}/{PLACE}.mp4" if self._cameras else None,
            "features": self.features | {key: self._describe(key, fps) for key in self._cameras},
        }
        self._draft: EpisodeDraft | None = None
        self._next: SavedEpisodes | None = None  # while an episode is being saved
        self._folder = FolderTransaction(self.root)
        try:
            self._saved = self._open(info, sizes)
        except BaseException:
            self._folder.close()
            raise

    @property
    def info(self) -> dict:
        """What `meta/info.json` says."""
        return self._saved.info

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.info["fps"]

    @property
    def num_episodes(self) -> int:
        """Number of the episodes saved."""
        return self.info["total_episodes"]

    @property
    def num_frames(self) -> int:
        """Number of the frames saved."""
        return self.info["total_frames"]

    @property
    def episode_length(self) -> int:
        """Number of frames of the episode being recorded."""
        return self._draft.length if self._draft else 0

    def add_frame(self, frame: dict) -> None:
        """Add a frame to the episode being recorded.

        Args:
            frame (`dict`): a value for every feature that is not counted, and the text "task". Pictures are uint8
                `(height, width, 3)`. Everything is copied.

        Raises:
            ValueError: the frame does not fit the features, or holds NaN; it is left out and the episode goes on.
                Or the episode waits to be saved or discarded.
            OSError: the frame could not be written; the episode must be discarded.
        """
        self._require_open()
        self._settle()
        try:
            frame = check_frame(frame, self.features)
        except ValueError as error:
            place = f"episode {self.num_episodes}, frame {self.episode_length}"
            raise ValueError(f"{self.root}, {place}: {error}") from error
        if self._draft is None:
            place, folder = (self.num_episodes, self.num_frames), self._folder.work / "episode"
            self._draft = EpisodeDraft(folder, self.features, self._fps, *place, self._saved.texts, self.video)
        self._draft.add(frame)

    def save_episode(self) -> None:
        """Make the episode being recorded part of the dataset.

        Raises:
            ValueError: it has no frames, or could not be written before.
            OSError: it cannot be written; the dataset is as before. Make room and save it again, or discard it. Where
                only renames are missing, every method begins with them, and the episode counts as saved.
        """
        self._require_open()
        if self._settle():
            return
        if (draft := self._draft) is None:
            raise ValueError(f"{self.root}: the episode has no frames to save; call add_frame() first.")
        draft.close()
        self._next, staged = self._saved.add(draft, self._folder.work / "next")
        self._folder.commit(staged)
        self._settle()

    def discard_episode(self) -> None:
        """Drop the frames that came since the last episode was saved.

        Raises:
            OSError: a `save_episode` that was interrupted among its renames cannot be finished yet.
        """
        if not self._settle():
            self._next = None
            self._drop_draft()

    def finalize(self) -> None:
        """Let go of the folder.

        Raises:
            ValueError: frames were neither saved nor discarded.
            OSError: an interrupted `save_episode` cannot be finished; opening the folder again will.
        """
        self._settle()
        if self._draft is not None:
            raise ValueError(
                f"{self.root}: {self.episode_length} frames were neither saved nor discarded; call save_episode() or "
                "discard_episode()."
            )
        self._folder.close()

    def __enter__(self) -> "LeRobotRecorder":
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.finalize()
            return
        try:
            self.discard_episode()
        finally:
            self._folder.close()

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Upload the episodes saved so far; see `hf_vla.data.recording.publishing.push_dataset` for the options."""
        self._settle()
        return push_dataset(self.root, repo_id, **options)

    def _require_open(self):
        if not self._folder.is_open:
            raise ValueError(f"{self.root}: the recorder is finalized; make a new one to go on with the dataset.")

    def _settle(self) -> bool:
        """Finish an interrupted `save_episode`, and return whether there was one to finish.

        Every step may be interrupted and done again; the dataset says whether the episode is in it.
        """
        if self._next is None or not self._folder.is_open:
            return False
        self._folder.finish()
        in_place = json.loads((self.root / INFO).read_text(encoding="utf-8"))["total_episodes"]
        if in_place != self._next.info["total_episodes"]:
            return False
        self._saved = self._next
        self._drop_draft()
        self._next = None
        return True

    def _drop_draft(self):
        if self._draft is not None:
            draft, self._draft = self._draft, None
            draft.discard()

    def _describe(self, key: str, fps: float) -> dict:
        height, width, channels = self.features[key]["shape"]
        return self.features[key] | {
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": CODECS[self.video.vcodec],
                "video.pix_fmt": self.video.pix_fmt,
                "video.is_depth_map": False,
                "video.fps": fps,
                "video.channels": channels,
                "has_audio": False,
            }
        }

    def _open(self, info: dict, sizes: dict) -> SavedEpisodes:
        if (self.root / INFO).is_file():
            return SavedEpisodes.read(self.root, self._go_on(info, sizes))
        others = sorted(path for path in self.root.iterdir() if path != self._folder.work)
        if found := [path.name for path in others if path.is_file() or any(path.glob("**/*.*"))]:
            raise ValueError(
                f"{self.root}: expected a LeRobot dataset or a new folder; it holds {found}, but no {INFO}."
            )
        self._folder.commit([(write_json(self._folder.work / "info.json", info), INFO)])
        return SavedEpisodes.none(self.root, info)

    def _go_on(self, wanted: dict, sizes: dict) -> dict:
        """Return the `info` of the dataset there is, which has to be the one wanted."""
        info = json.loads((self.root / INFO).read_text(encoding="utf-8"))
        names = ["codebase_version", "fps", "robot_type", "data_path"]
        names += ["video_path"] if wanted["video_path"] else []
        # Readers take the rows in the order of the files' names, so the size of the folders stays.
        names += ["chunks_size"] if "chunks_size" in sizes else []
        for name in names:
            if info.get(name) != wanted[name]:
                raise ValueError(f"{self.root}: its {name} is {info.get(name)!r}, the recorder's {wanted[name]!r}.")
        check_same_features(self.root, info["features"], wanted["features"])
        self.features = {key: self.features[key] for key in info["features"]}  # in the order of its files
        return info | sizes
