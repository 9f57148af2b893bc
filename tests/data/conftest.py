import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest


@pytest.fixture
def copy(goldens, tmp_path):
    """Copy a recorded dataset to a folder where it may be changed."""

    def make(name="v30_video_av1"):
        return shutil.copytree(goldens / "lerobot" / "datasets" / name, tmp_path / name)

    return make


@pytest.fixture
def edit():
    """Change a JSON file."""

    def change_file(path, change):
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return change_file


@pytest.fixture
def rewrite():
    """Change a column of a parquet file."""

    def change_column(path, column, values):
        table = pq.read_table(path)
        place = table.column_names.index(column)
        pq.write_table(table.set_column(place, column, values(table[column])), path)

    return change_column


@pytest.fixture
def add(edit):
    """Add a column that `meta/info.json` declares; its values are made of the rows' own numbers."""

    def add_column(root, key, dtype, values):
        for path in root.glob("data/*/*.parquet"):
            table = pq.read_table(path)
            pq.write_table(table.append_column(key, values(table["index"].to_pylist())), path)
        feature = {key: {"dtype": dtype, "shape": [1], "names": None}}
        edit(root / "meta/info.json", lambda info: info | {"features": info["features"] | feature})

    return add_column


@pytest.fixture
def write_dataset(tmp_path_factory):
    """Write a LeRobot v3.0 dataset of numbers; returns its folder and columns.

    The first number of a row's action counts the rows. `change` may alter the columns before they are written;
    episodes are spread over the files, and `row_group` is the number of rows in a group.
    """

    def write(lengths, files=1, names=None, row_group=None, change=None):
        root, count = tmp_path_factory.mktemp("dataset"), sum(lengths)
        generator, episodes = np.random.default_rng(count), np.repeat(np.arange(len(lengths)), lengths)
        columns = {
            "action": generator.standard_normal((count, 2)).astype(np.float32),
            "observation.state": generator.lognormal(size=(count, 3)).astype(np.float32),
            "reward": generator.random(count, np.float32),
        }
        columns["action"][:, 0] = np.arange(count)
        if change is not None:
            change(columns)
        features = {
            key: {"dtype": "float32", "shape": list(values.shape[1:]) or [1], "names": None}
            for key, values in columns.items()
        }
        features["action"]["names"] = names
        info = {
            "codebase_version": "v3.0",
            "fps": 10,
            "features": features,
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        }
        for folder in ("data/chunk-000", "meta/episodes/chunk-000"):
            (root / folder).mkdir(parents=True)
        (root / "meta/info.json").write_text(json.dumps(info))
        places = np.arange(len(lengths)) * files // len(lengths)
        table = {"episode_index": np.arange(len(lengths)), "length": lengths}
        table |= {"data/chunk_index": np.zeros_like(places), "data/file_index": places}
        pq.write_table(pa.table(table), root / "meta/episodes/chunk-000/file-000.parquet")
        frames = np.concatenate([np.arange(length) for length in lengths])
        for file in range(files):
            rows = places[episodes] == file
            table = {key: list(values[rows]) if values.ndim > 1 else values[rows] for key, values in columns.items()}
            table |= {"episode_index": episodes[rows], "frame_index": frames[rows], "index": np.flatnonzero(rows)}
            path = root / f"data/chunk-000/file-{file:03d}.parquet"
            pq.write_table(pa.table(table), path, row_group_size=row_group)
        return root, columns

    return write
