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
