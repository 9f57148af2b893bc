"""The datasets of a recipe: opened, and split into rows to train on and rows held out."""

import numpy as np
from torch.utils.data import Subset

from hf_vla.data import schema
from hf_vla.data.lerobot import LeRobotEpisodes, local_folder
from hf_vla.training.arguments import DataArguments


def open_dataset(data: DataArguments) -> tuple[LeRobotEpisodes, Subset, Subset | None]:
    """Open the dataset with windows of actions, and split it by episodes.

    Returns:
        `tuple`: the whole dataset, the rows to train on, and those of the held-out episodes (None without any).

    Raises:
        ValueError: a held-out episode does not exist, or none is left to train on.
    """
    fps = schema.read_info(local_folder(data.source, data.revision)).fps
    deltas = {schema.ACTION: [step / fps for step in range(data.chunk_size)]}
    dataset = LeRobotEpisodes(
        data.source, deltas, cameras=[camera.name for camera in data.cameras], revision=data.revision
    )
    known = {episode.index for episode in dataset.episodes}
    unknown = sorted(set(data.eval_episodes) - known)
    if unknown or known == set(data.eval_episodes):
        raise ValueError(
            f"Expected data.eval_episodes to be some of the {len(known)} episodes of {dataset.name} "
            f"({min(known)} to {max(known)}), came {unknown or 'all of them'}."
        )
    held_out = np.isin(dataset.column("episode_index"), data.eval_episodes)
    train_set = Subset(dataset, np.flatnonzero(~held_out).tolist())
    return dataset, train_set, Subset(dataset, np.flatnonzero(held_out).tolist()) if held_out.any() else None
