import json
import shutil

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
