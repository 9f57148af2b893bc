"""The files of a LeRobot dataset v3.0, made anew aside with one episode more."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_vla.actions.statistics import ActionStatistics
from hf_vla.data import schema
from hf_vla.data.recording.commits import write_json
from hf_vla.data.recording.drafts import EpisodeDraft, merge_pictures, summarize, write_texts
from hf_vla.data.recording.encoding import concatenate
from hf_vla.data.recording.features import NUMERIC, SUBTASK_INDEX

INFO, STATS = Path("meta/info.json"), Path("meta/stats.json")
DATA, EPISODES, VIDEOS = "data", "meta/episodes", "videos"
PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
# Seconds of a video shared by episodes: LeRobot up to 0.4 compares times as float32, which are 1.2e-4 s apart from
# there on, and refuses frames of long episodes.
LONGEST_VIDEO_S = 1024
EPISODES_PER_TABLE = 1000  # the table's last file is written anew with every episode
_EXACT_ROWS = 100_000  # for the quantiles of the whole, which are taken anew with every episode
_ROW_GROUP_BYTES = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class LastFile:
    """The last file of a kind, and how many rows of this session it holds: none of an earlier one's, which it ends."""

    chunk: int
    file: int
    rows: int = 0

    def next(self, chunks_size: int) -> "LastFile":
        """Return the one that follows it."""
        full = self.file + 1 >= chunks_size
        return LastFile(self.chunk + 1, 0) if full else LastFile(self.chunk, self.file + 1)


@dataclasses.dataclass(frozen=True)
class SavedEpisodes:
    """What a recorder knows of the episodes in its dataset.

    Args:
        root (`Path`): the dataset's folder.
        info (`dict`): what `meta/info.json` says.
        files (`dict[str, LastFile]`): the last file of the rows, of the table of episodes and of each camera.
        texts (`dict[str, list[str]]`): the texts under "task" and "subtask".
        numbers (`dict[str, ActionStatistics]`): of the features that are numbers, all rows.
        pictures (`dict[str, dict]`): statistics of the cameras, by feature and name.
        table (`pa.Table`, *optional*): the rows in the last file of the table of episodes, if this session's.
        table_schema (`pa.Schema`, *optional*): of an earlier session's.
    """

    root: Path
    info: dict
    files: dict[str, LastFile]
    texts: dict[str, list[str]]
    numbers: dict[str, ActionStatistics]
    pictures: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    table: pa.Table | None = None
    table_schema: pa.Schema | None = None

    @classmethod
    def none(cls, root: Path, info: dict) -> "SavedEpisodes":
        """Return what is known of a dataset without episodes."""
        features = info["features"]
        return cls(
            root,
            info,
            files={kind: LastFile(0, -1) for kind in (DATA, EPISODES, *_keys(features, "video"))},
            texts={schema.TASK: []} | ({schema.SUBTASK: []} if SUBTASK_INDEX in features else {}),
            numbers={key: ActionStatistics(_EXACT_ROWS) for key in _keys(features, *NUMERIC)},
        )

    @classmethod
    def read(cls, root: Path, info: dict) -> "SavedEpisodes":
        """Return what the files of a dataset say, whose `meta/info.json` was read.

        Raises:
            ValueError: the table of episodes holds others than `info` counts.
        """
        saved = cls.none(root, info)
        if not info["total_episodes"]:
            return saved
        description = schema.read_info(root)
        episodes = schema.read_episodes(root, description)
        table = len(episodes), sum(episode.length for episode in episodes)
        if table != (info["total_episodes"], info["total_frames"]):
            raise ValueError(
                f"{root}: {INFO} counts {info['total_episodes']} episodes of {info['total_frames']} frames, the table "
                f"of episodes {table[0]} of {table[1]}; the dataset was not written completely."
            )
        saved.texts[schema.TASK] = [*schema.read_tasks(root, description).values()]
        if schema.SUBTASK in saved.texts:
            saved.texts[schema.SUBTASK] = [*(schema.read_subtasks(root) or {}).values()]
        numeric = {key: info["features"][key] for key in saved.numbers}
        for key, column in schema.read_columns(schema.data_files(root, description), numeric).items():
            saved.numbers[key].update(column.reshape(len(column), -1))
        statistics = schema.read_statistics(root, description)
        saved.pictures.update({key: statistics[key] for key in _keys(info["features"], "image", "video")})
        saved.files.update({kind: saved._last_file(kind) for kind in saved.files})
        # Readers take all files of the table together: one schema for all of them.
        known = pq.read_schema(root / saved._path(EPISODES, saved.files[EPISODES]))
        return dataclasses.replace(saved, table_schema=known)

    def add(self, draft: EpisodeDraft, aside: Path) -> tuple["SavedEpisodes", list[tuple[Path, Path]]]:
        """Make every file that changes with an episode.

        Args:
            draft (`EpisodeDraft`): the episode; it is closed.
            aside (`Path`): a folder for the files. What lies there is overwritten.

        Returns:
            What is known with the episode, and `(file, path in the dataset)` in the order of the renames.
        """
        aside.mkdir(exist_ok=True)
        files: dict[str, LastFile] = {}
        staged: list[tuple[Path, Path]] = []
        row = {"episode_index": draft.episode_index, "tasks": draft.tasks, "length": draft.length}
        videos = {}
        for key in _keys(self.info["features"], "video"):
            place, files[key], path = self._stage_video(key, draft, aside)
            videos |= place
            staged.append((path, self._path(key, files[key])))
        place, files[DATA], path = self._stage_rows(draft, aside)
        row |= place | videos
        staged.append((path, self._path(DATA, files[DATA])))
        for name, texts in draft.texts.items():
            if texts != self.texts[name]:
                staged.append((write_texts(aside / f"{name}s.parquet", name, texts), Path(f"meta/{name}s.parquet")))
        own = draft.pictures()
        pictures = {key: merge_pictures(self.pictures.get(key), part) for key, part in own.items()}
        numbers = {key: ActionStatistics(_EXACT_ROWS).merge(part) for key, part in self.numbers.items()}
        for key, part in draft.numbers.items():
            numbers[key].merge(part)
        for key, part in (own | self._summaries(draft.numbers)).items():
            row |= {f"stats/{key}/{name}": value.tolist() for name, value in part.items()}
        table, files[EPISODES], path = self._stage_episode(row, aside)
        staged.append((path, self._path(EPISODES, files[EPISODES])))
        info = self.info | {
            "total_episodes": self.info["total_episodes"] + 1,
            "total_frames": self.info["total_frames"] + draft.length,
            "total_tasks": len(draft.texts[schema.TASK]),
            "splits": {"train": f"0:{self.info['total_episodes'] + 1}"},
        }
        staged.append((write_json(aside / "stats.json", pictures | self._summaries(numbers)), STATS))
        staged.append((write_json(aside / "info.json", info), INFO))
        saved = dataclasses.replace(
            self,
            info=info,
            files=self.files | files,
            texts=draft.texts,
            numbers=numbers,
            pictures=pictures,
            table=table,
        )
        return saved, staged

    def _path(self, kind: str, file: LastFile) -> Path:
        place = PLACE.format(chunk_index=file.chunk, file_index=file.file)
        return Path(f"{kind}/{place}.parquet" if kind in (DATA, EPISODES) else f"{VIDEOS}/{kind}/{place}.mp4")

    def _last_file(self, kind: str) -> LastFile:
        folder = self.root / self._path(kind, LastFile(0, 0)).parents[1]
        names = ((path.parent.name, path.stem) for path in folder.glob("chunk-*/file-*"))
        return LastFile(*max(tuple(int(name.rpartition("-")[2]) for name in place) for place in names))

    def _target(self, kind: str, length: int, part: Path, limit: float) -> tuple[Path | None, LastFile]:
        """Return the file that the part is to be added to, where there is one with room, and its place."""
        last = self.files[kind]
        path = self.root / self._path(kind, last)
        if last.rows and path.stat().st_size + part.stat().st_size < limit * 2**20:
            return path, dataclasses.replace(last, rows=last.rows + length)
        return None, dataclasses.replace(last.next(self.info["chunks_size"]), rows=length)

    def _stage_video(self, key: str, draft: EpisodeDraft, aside: Path) -> tuple[dict, LastFile, Path]:
        segment, limit = draft.video(key), self.info["video_files_size_in_mb"]
        if (self.files[key].rows + draft.length) / draft.fps > LONGEST_VIDEO_S:
            limit = 0
        old, file = self._target(key, draft.length, segment, limit)
        parts = [(segment, draft.length)]
        if old is not None:
            parts.insert(0, (old, file.rows - draft.length))
        concatenate(parts, aside / f"{key}.mp4", draft.fps)
        first = file.rows - draft.length
        places = {
            "chunk_index": file.chunk,
            "file_index": file.file,
            "from_timestamp": float(first / draft.fps),
            "to_timestamp": float(file.rows / draft.fps),
        }
        return {f"videos/{key}/{name}": value for name, value in places.items()}, file, aside / f"{key}.mp4"

    def _stage_rows(self, draft: EpisodeDraft, aside: Path) -> tuple[dict, LastFile, Path]:
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

    def _stage_episode(self, row: dict, aside: Path) -> tuple[pa.Table, LastFile, Path]:
        last = self.files[EPISODES]
        if not last.rows or last.rows >= EPISODES_PER_TABLE:
            last = last.next(self.info["chunks_size"])
        file = dataclasses.replace(last, rows=last.rows + 1)
        row |= {f"{EPISODES}/chunk_index": file.chunk, f"{EPISODES}/file_index": file.file}
        table = pa.Table.from_pylist([row], schema=self.table_schema)
        if last.rows:
            table = pa.concat_tables([self.table, table]).combine_chunks()
        pq.write_table(table, aside / "episodes.parquet")
        return table, file, aside / "episodes.parquet"

    def _summaries(self, numbers: dict[str, ActionStatistics]) -> dict[str, dict[str, np.ndarray]]:
        return {key: summarize(part, self.info["features"][key]) for key, part in numbers.items()}


def _keys(features: dict[str, dict], *dtypes: str) -> list[str]:
    return [key for key, feature in features.items() if feature["dtype"] in dtypes]
