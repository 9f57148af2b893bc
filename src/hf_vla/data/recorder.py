"""Recording demonstrations as a LeRobot dataset v3.0 that is complete at any moment."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_vla.actions.statistics import ActionStatistics
from hf_vla.data import schema
from hf_vla.data.commits import FolderTransaction, write_json
from hf_vla.data.drafts import EpisodeDraft, merge_pictures, summarize, write_texts
from hf_vla.data.encoding import CODECS, VideoOptions, concatenate
from hf_vla.data.features import NUMERIC, SUBTASK_INDEX, check_features, check_frame, check_same_features
from hf_vla.data.publishing import push_dataset

INFO, STATS = Path("meta/info.json"), Path("meta/stats.json")
DATA, EPISODES, VIDEOS = "data", "meta/episodes", "videos"
_PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
SIZES = {"chunks_size": 1000, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200}  # LeRobot's
# Seconds of a video shared by episodes: LeRobot up to 0.4 compares times as float32, which are 1.2e-4 s apart from
# there on, and refuses frames of long episodes.
LONGEST_VIDEO_S = 1024
EPISODES_PER_TABLE = 1000  # the table's last file is written anew with every episode
_EXACT_ROWS = 100_000  # for the quantiles of the whole, which are taken anew with every episode
_ROW_GROUP_BYTES = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class _File:
    """The last file of a kind, and how many rows of this session it holds: none of an earlier one's, which it ends."""

    chunk: int
    file: int
    rows: int = 0

    def next(self, chunks_size: int) -> "_File":
        full = self.file + 1 >= chunks_size
        return _File(self.chunk + 1, 0) if full else _File(self.chunk, self.file + 1)


class LeRobotRecorder:
    """Records episodes into a folder that LeRobot and `LeRobotEpisodes` can read at any moment.

    An episode is written aside, in the hidden folder `.recording`, its pictures encoded while they come, so that
    memory does not grow with it. `save_episode` makes every file that changes anew, on the disk to the last byte, and
    then puts them into place by one rename after the other: videos, rows, tasks, table of episodes, statistics,
    `meta/info.json`. What a kill -9, a full disk or a loss of power leaves:

    - Every episode saved before, with the same values and pictures, and nothing of the one being recorded. Of the one
      being saved, a reader finds all or nothing; in between the last renames the table of episodes, which
      `LeRobotEpisodes` goes by, may list it while `meta/info.json`, which LeRobot goes by, does not count it yet.
    - Opening the folder again finishes a `save_episode` that was interrupted among its renames, drops an episode that
      was not saved, and goes on.
    - A `save_episode` that failed (a full disk) changed nothing and may be called again.

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
        self.info = {
            "codebase_version": "v3.0",
            "robot_type": robot_type,
            "total_episodes": 0,
            "total_frames": 0,
            "total_tasks": 0,
            **(SIZES | sizes),
            "fps": fps,
            "splits": {},
            "data_path": f"{DATA}/{_PLACE}.parquet",
            "video_path": f"{VIDEOS}/{{video_key}}/{_PLACE}.mp4" if self._cameras else None,
            "features": self.features | {key: self._describe(key, fps) for key in self._cameras},
        }
        self._draft: EpisodeDraft | None = None
        self._folder = FolderTransaction(self.root)
        try:
            self._open(sizes)
        except BaseException:
            self._folder.close()
            raise

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
            OSError: the frame could not be written; the episode must be discarded.
        """
        self._require_open()
        try:
            frame = check_frame(frame, self.features)
        except ValueError as error:
            place = f"episode {self.num_episodes}, frame {self.episode_length}"
            raise ValueError(f"{self.root}, {place}: {error}") from error
        if self._draft is None:
            place, folder = (self.num_episodes, self.num_frames), self._folder.work / "episode"
            self._draft = EpisodeDraft(folder, self.features, self._fps, *place, self._texts, self.video)
        self._draft.add(frame)

    def save_episode(self) -> None:
        """Make the episode being recorded part of the dataset.

        Raises:
            ValueError: it has no frames, or could not be written before.
            OSError: it cannot be written; the dataset is as before. Make room and save it again, or discard it.
        """
        self._require_open()
        if (draft := self._draft) is None:
            raise ValueError(f"{self.root}: the episode has no frames to save; call add_frame() first.")
        draft.close()
        aside = self._folder.work / "next"
        aside.mkdir(exist_ok=True)
        files: dict[str, _File] = {}
        staged: list[tuple[Path, Path]] = []  # in the order of the renames
        row = {"episode_index": draft.episode_index, "tasks": draft.tasks, "length": draft.length}
        videos = {}
        for key in self._cameras:
            place, files[key], path = self._stage_video(key, draft, aside)
            videos |= place
            staged.append((path, self._path(key, files[key])))
        place, files[DATA], path = self._stage_rows(draft, aside)
        row |= place | videos
        staged.append((path, self._path(DATA, files[DATA])))
        for name, texts in draft.texts.items():
            if texts != self._texts[name]:
                staged.append((write_texts(aside / f"{name}s.parquet", name, texts), Path(f"meta/{name}s.parquet")))
        own = draft.pictures()
        pictures = {key: merge_pictures(self._pictures.get(key), part) for key, part in own.items()}
        numbers = {key: ActionStatistics(_EXACT_ROWS).merge(self._numbers[key]) for key in self._numbers}
        for key, part in draft.numbers.items():
            numbers[key].merge(part)
        for key, part in (own | self._summaries(draft.numbers)).items():
            row |= {f"stats/{key}/{name}": value.tolist() for name, value in part.items()}
        table, files[EPISODES], path = self._stage_episode(row, aside)
        staged.append((path, self._path(EPISODES, files[EPISODES])))
        info = self.info | {
            "total_episodes": self.num_episodes + 1,
            "total_frames": self.num_frames + draft.length,
            "total_tasks": len(draft.texts[schema.TASK]),
            "splits": {"train": f"0:{self.num_episodes + 1}"},
        }
        staged.append((write_json(aside / "stats.json", pictures | self._summaries(numbers)), STATS))
        staged.append((write_json(aside / "info.json", info), INFO))
        self._folder.commit(staged)
        self.info, self._files, self._texts, self._table = info, self._files | files, draft.texts, table
        self._numbers, self._pictures = numbers, pictures
        self.discard_episode()

    def discard_episode(self) -> None:
        """Drop the frames that came since the last episode was saved."""
        if self._draft is not None:
            draft, self._draft = self._draft, None
            draft.discard()

    def finalize(self) -> None:
        """Let go of the folder.

        Raises:
            ValueError: frames were neither saved nor discarded.
        """
        if self._draft is not None:
            raise ValueError(
                f"{self.root}: {self.episode_length} frames were neither saved nor discarded; call save_episode() or "
                "discard_episode()."
            )
        self._folder.close()

    def __enter__(self) -> "LeRobotRecorder":
        return self

    def __exit__(self, kind, *_):
        if kind is not None:
            self.discard_episode()
        self.finalize()

    def push_to_hub(self, repo_id: str, **options) -> str:
        """Upload the episodes saved so far; see `hf_vla.data.publishing.push_dataset` for the options."""
        return push_dataset(self.root, repo_id, **options)

    def _require_open(self):
        if not self._folder.is_open:
            raise ValueError(f"{self.root}: the recorder is finalized; make a new one to go on with the dataset.")

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

    def _open(self, sizes: dict):
        self._texts = {schema.TASK: []} | ({schema.SUBTASK: []} if SUBTASK_INDEX in self.features else {})
        self._files = {kind: _File(0, -1) for kind in (DATA, EPISODES, *self._cameras)}
        self._table, self._table_schema, self._pictures = None, None, {}
        self._numbers = {
            key: ActionStatistics(_EXACT_ROWS) for key, feature in self.features.items() if feature["dtype"] in NUMERIC
        }
        if (self.root / INFO).is_file():
            self._go_on(sizes)
        elif found := [name for name in (DATA, "meta", VIDEOS) if any((self.root / name).glob("**/*.*"))]:
            raise ValueError(
                f"{self.root}: expected a LeRobot dataset or a new folder; it holds {found}, but no {INFO}."
            )
        else:
            self._folder.commit([(write_json(self._folder.work / "info.json", self.info), INFO)])

    def _go_on(self, sizes: dict):
        wanted, info = self.info, json.loads((self.root / INFO).read_text(encoding="utf-8"))
        names = ["codebase_version", "fps", "robot_type", "data_path"]
        names += ["video_path"] if self._cameras else []
        # Readers take the rows in the order of the files' names, so the size of the folders stays.
        names += ["chunks_size"] if "chunks_size" in sizes else []
        for name in names:
            if info.get(name) != wanted[name]:
                raise ValueError(f"{self.root}: its {name} is {info.get(name)!r}, the recorder's {wanted[name]!r}.")
        check_same_features(self.root, info["features"], wanted["features"])
        self.features = {key: self.features[key] for key in info["features"]}  # in the order of its files
        self.info = info | sizes
        if not self.num_episodes:
            return
        description = schema.read_info(self.root)
        episodes = schema.read_episodes(self.root, description)
        table = len(episodes), sum(episode.length for episode in episodes)
        if table != (self.num_episodes, self.num_frames):
            raise ValueError(
                f"{self.root}: {INFO} counts {self.num_episodes} episodes of {self.num_frames} frames, the table of "
                f"episodes {table[0]} of {table[1]}; the dataset was not written completely."
            )
        self._texts[schema.TASK] = [*schema.read_tasks(self.root, description).values()]
        if schema.SUBTASK in self._texts:
            self._texts[schema.SUBTASK] = [*(schema.read_subtasks(self.root) or {}).values()]
        numeric = {key: self.features[key] for key in self._numbers}
        for key, column in schema.read_columns(schema.data_files(self.root, description), numeric).items():
            self._numbers[key].update(column.reshape(len(column), -1))
        statistics = schema.read_statistics(self.root, description)
        self._pictures = {key: statistics[key] for key, f in self.features.items() if f["dtype"] in ("image", "video")}
        self._files = {kind: self._last_file(kind) for kind in self._files}
        # Readers take all files of the table together: one schema for all of them.
        self._table_schema = pq.read_schema(self.root / self._path(EPISODES, self._files[EPISODES]))

    def _path(self, kind: str, file: _File) -> Path:
        place = _PLACE.format(chunk_index=file.chunk, file_index=file.file)
        return Path(f"{VIDEOS}/{kind}/{place}.mp4" if kind in self._cameras else f"{kind}/{place}.parquet")

    def _last_file(self, kind: str) -> _File:
        folder = self.root / self._path(kind, _File(0, 0)).parents[1]
        names = ((path.parent.name, path.stem) for path in folder.glob("chunk-*/file-*"))
        return _File(*max(tuple(int(name.rpartition("-")[2]) for name in place) for place in names))

    def _target(self, kind: str, length: int, part: Path, limit: float) -> tuple[Path | None, _File]:
        """Return the file that the part is to be added to, where there is one with room, and its place."""
        last = self._files[kind]
        path = self.root / self._path(kind, last)
        if last.rows and path.stat().st_size + part.stat().st_size < limit * 2**20:
            return path, dataclasses.replace(last, rows=last.rows + length)
        return None, dataclasses.replace(last.next(self.info["chunks_size"]), rows=length)

    def _stage_video(self, key: str, draft: EpisodeDraft, aside: Path) -> tuple[dict, _File, Path]:
        segment, limit = draft.video(key), self.info["video_files_size_in_mb"]
        if (self._files[key].rows + draft.length) / self._fps > LONGEST_VIDEO_S:
            limit = 0
        old, file = self._target(key, draft.length, segment, limit)
        parts = [(segment, draft.length)]
        if old is not None:
            parts.insert(0, (old, file.rows - draft.length))
        concatenate(parts, aside / f"{key}.mp4", self._fps)
        first = file.rows - draft.length
        places = {
            "chunk_index": file.chunk,
            "file_index": file.file,
            "from_timestamp": float(first / self._fps),
            "to_timestamp": float(file.rows / self._fps),
        }
        return {f"videos/{key}/{name}": value for name, value in places.items()}, file, aside / f"{key}.mp4"

    def _stage_rows(self, draft: EpisodeDraft, aside: Path) -> tuple[dict, _File, Path]:
        limit = self.info["data_files_size_in_mb"]
        old, file = self._target(DATA, draft.length, draft.data, limit)
        path = draft.data
        if path.stat().st_size < limit * 2**20:  # a larger one is a file of its own as it is, and never in memory
            table = pa.concat_tables([pq.read_table(part) for part in (old, draft.data) if part is not None])
            path = aside / "rows.parquet"
            pq.write_table(table, path, row_group_size=max(1, _ROW_GROUP_BYTES * table.num_rows // table.nbytes))
        row = {
            "data/chunk_index": file.chunk,
            "data/file_index": file.file,
            "dataset_from_index": draft.first_index,
            "dataset_to_index": draft.first_index + draft.length,
        }
        return row, file, path

    def _stage_episode(self, row: dict, aside: Path) -> tuple[pa.Table, _File, Path]:
        last = self._files[EPISODES]
        if not last.rows or last.rows >= EPISODES_PER_TABLE:
            last = last.next(self.info["chunks_size"])
        file = dataclasses.replace(last, rows=last.rows + 1)
        row |= {f"{EPISODES}/chunk_index": file.chunk, f"{EPISODES}/file_index": file.file}
        table = pa.Table.from_pylist([row], schema=self._table_schema)
        if last.rows:
            table = pa.concat_tables([self._table, table]).combine_chunks()
        pq.write_table(table, aside / "episodes.parquet")
        return table, file, aside / "episodes.parquet"

    def _summaries(self, numbers: dict[str, ActionStatistics]) -> dict[str, dict[str, np.ndarray]]:
        return {key: summarize(part, self.features[key]) for key, part in numbers.items()}
