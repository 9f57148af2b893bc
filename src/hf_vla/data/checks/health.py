"""The health check of a dataset: all that is wrong with it at once, where reading it would stop at the first."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import index as as_index
from pathlib import Path

import numpy as np

from hf_vla.data import schema
from hf_vla.data.checks.findings import ERROR, KINDS, Finding, Findings
from hf_vla.data.checks.health_pictures import PicturesCheck
from hf_vla.data.checks.health_rows import (
    RowsFound,
    check_dimensions,
    check_files,
    check_order,
    check_statistics,
    check_texts,
    check_times,
    note_unreadable,
    read_found_rows,
    text_tables,
)
from hf_vla.data.reading.files import DatasetFiles
from hf_vla.data.reading.pictures import ParquetPictures
from hf_vla.data.video import side_by_side

Progress = Callable[[str, int, int], None]


@dataclass
class Health:
    """What a check found.

    Args:
        name (`str`): of the dataset.
        root (`Path`): its folder.
        revision (`str`, *optional*): the commit of a dataset on the Hub.
        findings (`list[Finding]`): errors first, then warnings and notes.
        info (`DatasetInfo`, *optional*): what it declares; None where that cannot be read.
        episodes (`list[Episode]`): the ones checked.
        found (`RowsFound`, *optional*): their rows; None where the table of episodes cannot be read.
        texts (`dict[str, tuple]`): the columns that number texts: column -> (file of the texts, number -> text).
    """

    name: str
    root: Path
    revision: str | None
    findings: list[Finding]
    info: schema.DatasetInfo | None = None
    episodes: Iterable[schema.Episode] = ()
    found: RowsFound | None = None
    texts: dict[str, tuple] | None = None

    @property
    def counts(self) -> Counter:
        """How many findings there are of each severity."""
        return Counter(finding.severity for finding in self.findings)

    @property
    def healthy(self) -> bool:
        """Whether there are no errors."""
        return not self.counts[ERROR]


def check_health(
    source: str | Path,
    revision: str | None = None,
    episodes: Iterable[int] | None = None,
    quick: bool = False,
    progress: Progress | None = None,
) -> Health:
    """Check a dataset.

    All rows are read (without pictures), of every video the tables of its container, and of every episode and camera
    four pictures are decoded; ten where the four are alike.

    Args:
        source (`str` or `Path`): the folder of a LeRobot dataset, or its name on the Hub.
        revision (`str`, *optional*): branch, tag or commit of a dataset on the Hub.
        episodes (`Iterable[int]`, *optional*): the episodes to check; all of them by default.
        quick (`bool`, defaults to `False`): decode nothing; videos on the Hub are not fetched then.
        progress (`Callable[[str, int, int], None]`, *optional*): is told what is read, how much more of it was read,
            and how much there is.

    Raises:
        FileNotFoundError: there is no dataset.
        ValueError: it is of an unknown version, or has no episode of these.
    """
    progress = progress or (lambda what, done, total: None)
    dataset = DatasetFiles(source, revision)
    root, findings = dataset.root, Findings(dataset.root)
    health = Health(dataset.name, root, dataset.revision, [])
    info = health.info = schema.read_info(root)
    try:
        known = schema.read_episodes(root, info)
    except (ValueError, OSError, KeyError, TypeError) as error:
        table = "episodes.jsonl" if info.codebase_version in schema.BY_EPISODE else "episodes/*/*.parquet"
        note_unreadable(f"meta/{table}", error, findings)
        health.findings = [*findings]
        return health
    chosen = health.episodes = _chosen(health.name, known, episodes)
    dataset.fetch(schema.data_pattern(info))
    files = sorted(root.glob(schema.data_pattern(info)))
    health.texts = text_tables(root, info, findings)
    wanted = None if episodes is None else np.array([episode.index for episode in chosen])
    found = health.found = read_found_rows(
        files, info, health.texts, wanted, findings, lambda done: progress("files of rows", done, len(files))
    )
    in_order = check_order(found, chosen, findings)
    check_files(found, chosen, findings)
    check_texts(found, health.texts, findings)
    rate = check_times(found, info.fps, findings)
    check_dimensions(found, info, findings)
    check_statistics(root, found, info, findings, whole=episodes is None and in_order and found.complete)
    if episodes is None:
        _check_totals(root, known, findings)
    readable = [episode for episode in chosen if len(found.of(episode.index, "index"))]
    _check_pictures(dataset, info, found, readable, rate, quick, findings, progress)
    severities = [ERROR, *dict.fromkeys(severity for severity, _ in KINDS.values())]
    health.findings = sorted(findings, key=lambda finding: severities.index(finding.severity))
    return health


def _chosen(name: str, known: list[schema.Episode], episodes: Iterable[int] | None) -> list[schema.Episode]:
    if episodes is None:
        return known
    wanted = {as_index(number) for number in episodes}
    if (unknown := sorted(wanted - {episode.index for episode in known})) or not wanted:
        raise ValueError(f"{name}: expected episodes of its {len(known)}, came {unknown or 'none'}.")
    return [episode for episode in known if episode.index in wanted]


def _check_totals(root: Path, known: list[schema.Episode], findings: Findings) -> None:
    totals = {"total_episodes": len(known), "total_frames": sum(episode.length for episode in known)}
    written = json.loads((root / "meta/info.json").read_text(encoding="utf-8"))
    for name, expected in totals.items():
        if (came := written.get(name, expected)) != expected:
            text = f"expected {name} to be {expected}, as in the table of episodes, came {came}"
            findings.add("totals", "meta/info.json", text, subject=name)


def _check_pictures(dataset: DatasetFiles, info, found, episodes, rate, quick, findings, progress):
    colour = [key for key in info.camera_keys if key not in info.depth_keys]
    cameras = [key for key in colour if not (quick and dataset.hub_name and _is_video(info, key))]
    videos = [key for key in cameras if _is_video(info, key)]
    dataset.fetch_files({episode.videos[key][0] for episode in episodes for key in videos})
    total = len(cameras) * len(episodes)

    def check(key: str) -> Findings:
        of_camera = PicturesCheck(key, info, found, dataset.root, rate, not quick)
        if key in videos:
            return of_camera.videos(episodes, advance)
        return of_camera.images(ParquetPictures(found.rows, lambda path: None), episodes, advance)

    def advance(done: int) -> None:
        progress("episodes of cameras", done, total)

    for part in side_by_side(check, cameras):
        findings.update(part)


def _is_video(info: schema.DatasetInfo, key: str) -> bool:
    return info.features[key]["dtype"] == "video"
