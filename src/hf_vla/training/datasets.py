"""The datasets of a recipe: opened, split into rows to train on and rows held out, and joined."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Subset

from hf_vla.data import schema
from hf_vla.data.cache import FrameCache
from hf_vla.data.filters import DropReport, chunks_with, find_dropped
from hf_vla.data.lerobot import LeRobotEpisodes
from hf_vla.data.mixture import Mixture
from hf_vla.training.data_arguments import DataArguments, DatasetArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenDataset:
    """A dataset of a recipe.

    Args:
        arguments (`DatasetArguments`): what the recipe says of it.
        episodes ([`~hf_vla.data.lerobot.LeRobotEpisodes`]): its rows, with windows of actions and observations.
        train_rows (`np.ndarray` of shape `(n,)`): those to train on, at which a chunk may start.
        action_rows (`np.ndarray` of shape `(k,)`): those whose actions are to be learnt, at any place of a chunk, and
            of which the statistics are: kept, not held out and not excluded. Near an excluded row there are more of
            them than of `train_rows`, since chunks start before it that would hold it.
        eval_rows (`np.ndarray` of shape `(m,)`): those of the held-out episodes.
        drop_report ([`~hf_vla.data.filters.DropReport`], *optional*): what the recipe's filters left out.
    """

    arguments: DatasetArguments
    episodes: LeRobotEpisodes
    train_rows: np.ndarray
    action_rows: np.ndarray
    eval_rows: np.ndarray
    drop_report: DropReport | None = None

    @property
    def learnt_starts(self) -> np.ndarray:
        """First of the rows to train on of every episode, counted among them, and their number at the end."""
        return np.searchsorted(self.train_rows, self.episodes.episode_starts)


def open_datasets(data: DataArguments) -> list[OpenDataset]:
    """Open the datasets of a recipe, and split each by episodes.

    Raises:
        ValueError: a held-out episode does not exist, or none is left to train on.
    """
    cache = data.frame_cache and FrameCache(data.frame_cache, int(data.frame_cache_gb * 1e9))
    return [_open(data, arguments, cache) for arguments in data.datasets]


def join(data: DataArguments, datasets: list[OpenDataset]) -> tuple[Mixture, Mixture | None]:
    """Join the rows to train on, and the held-out ones (None without any)."""
    missing = {}
    for dataset in datasets:
        own = [camera.name for camera in dataset.arguments.cameras]
        missing[dataset.arguments.unnorm_key] = [schema.camera_key(role) for role in data.roles if role not in own]
    train = {each.arguments.unnorm_key: Subset(each.episodes, each.train_rows) for each in datasets}
    held_out = {
        each.arguments.unnorm_key: Subset(each.episodes, each.eval_rows) for each in datasets if len(each.eval_rows)
    }
    weights = {each.arguments.unnorm_key: each.arguments.weight for each in datasets}
    return Mixture(train, weights, data.balance, missing), Mixture(held_out, missing=missing) if held_out else None


def write_report(datasets: list[OpenDataset], folder: str | Path) -> None:
    """Write what filters left out, and why, to `data_report.json`; nothing where there were none."""
    reports = [dataset.drop_report for dataset in datasets if dataset.drop_report is not None]
    for line in (line for each in reports for line in each.lines()):
        logger.info("Left out of the training: %s", line)
    if reports:
        path = Path(folder, "data_report.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([each.to_dict() for each in reports], indent=2), encoding="utf-8")


def _open(data: DataArguments, arguments: DatasetArguments, cache: FrameCache | None) -> OpenDataset:
    names = [camera.name for camera in arguments.cameras]
    # Behind an episode's last action there is no row: models learn from it where episodes end.
    windows = {schema.ACTION: range(data.chunk_size), schema.TIMESTAMP: range(1, data.chunk_size + 1)}
    if data.n_obs_steps > 1:
        seen = [schema.camera_key(name) for name in names] + [schema.STATE] * (arguments.state is not None)
        windows |= dict.fromkeys(seen, range(1 - data.n_obs_steps, 1))
    dataset = LeRobotEpisodes(
        arguments.source,
        episodes=arguments.episodes,
        cameras=names,
        revision=arguments.revision,
        camera_map={camera.name: camera.source or camera.name for camera in arguments.cameras},
        column_map=arguments.columns,
        delta_indices=windows,
        streaming=data.streaming,
        frame_cache=cache,
    )
    known = {episode.index for episode in dataset.episodes}
    unknown = sorted(set(arguments.eval_episodes) - known)
    if unknown or known == set(arguments.eval_episodes):
        raise ValueError(
            f"Expected data.eval_episodes to be some of the {len(known)} episodes of {dataset.name} "
            f"({min(known)} to {max(known)}), came {unknown or 'all of them'}."
        )
    held_out = np.isin(dataset.column("episode_index"), arguments.eval_episodes)
    if data.filters is None:
        train_rows = np.flatnonzero(~held_out)
        return OpenDataset(arguments, dataset, train_rows, train_rows, np.flatnonzero(held_out))
    action = arguments.action
    gripper = None if action.gripper is None else action.gripper.index
    report = find_dropped(dataset, action.kind, gripper, arguments.eval_episodes, **asdict(data.filters))
    kept, excluded = ~report.removed, report.excluded | report.removed
    if kept.any():
        dataset, held_out, excluded = dataset.keep(kept), held_out[kept], excluded[kept]
    starts = ~held_out & ~chunks_with(excluded, dataset.episode_starts, data.chunk_size)
    if not starts.any():
        raise ValueError(f"The filters leave nothing of {dataset.name} to train on: {' '.join(report.lines())}")
    rows = [np.flatnonzero(mask) for mask in (starts, ~held_out & ~excluded, held_out)]
    return OpenDataset(arguments, dataset, *rows, report)
