import io
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from hf_vla.actions.spec import ActionSpec, GripperSpec
from hf_vla.cli.render import chunk_table, describe, plot_chunk, translation_path

CHUNK = np.array([[0.1, 0.0, -0.2, 1.0], [0.1, 0.3, 0.0, -1.0]], np.float32)
SPEC = ActionSpec(("dx", "dy", "dz", "gripper"), "delta_ee", frame="base", gripper=GripperSpec(3, -1.0, 1.0))
JOINTS = ActionSpec(("j1", "j2", "j3", "j4"), "joint")


def test_table_has_a_row_per_step_and_a_column_per_dimension():
    (table,) = chunk_table(CHUNK, SPEC, "[pick] up").renderables
    assert [column.header for column in table.columns] == ["step", "dx", "dy", "dz", "gripper"]
    assert list(table.columns[3].cells) == ["-0.2000", "+0.0000"]
    assert str(table.title) == r"\[pick] up"


@pytest.mark.parametrize(
    ("steps", "names", "scale", "parts"),
    [
        (4, [f"d{index}" for index in range(7)], 1.0, [7]),
        (16, [f"d{index}" for index in range(10)], 1.0, [5, 5]),
        (16, [f"d{index}" for index in range(14)], 1.0, [7, 7]),
        (16, [f"left_arm_forearm_roll_{index}" for index in range(14)], 100.0, [5, 5, 4]),
    ],
)
def test_every_number_can_be_read_in_80_columns(steps, names, scale, parts):
    chunk = scale * (1.0 + np.arange(steps * len(names)).reshape(steps, -1) / 1000)
    tables = chunk_table(chunk, ActionSpec(tuple(names), "joint"), "wave")
    assert [len(table.columns) - 1 for table in tables.renderables] == parts
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables)
    lines = console.export_text().splitlines()
    numbers = [number for line in lines for number in re.findall(r"[+-]\d+\.\d+(?= │)", line)]
    assert sorted(map(float, numbers)) == pytest.approx(sorted(chunk.ravel().round(4)))
    assert max(map(len, lines)) <= 80 and sum("wave" in line for line in lines) == 1
    assert sum(line.startswith("│") for line in lines) == steps * len(parts)


def test_description_says_what_is_known():
    assert describe(SPEC) == "robot units, delta_ee; frame base; gripper -1 open, +1 closed"
    assert "does not say" in describe(None)


def test_path_sums_deltas_and_shifts_poses():
    assert translation_path(CHUNK, SPEC) == pytest.approx(np.array([[0, 0, 0], [0.1, 0, -0.2], [0.2, 0.3, -0.2]]))
    poses = ActionSpec(("x", "y", "z", "gripper"), "absolute_ee")
    assert translation_path(CHUNK, poses) == pytest.approx(np.array([[0, 0, 0], [0, 0.3, 0.2]]))
    assert translation_path(CHUNK, JOINTS) is None and translation_path(CHUNK, None) is None


@pytest.mark.parametrize("spec", [SPEC, JOINTS, None])
def test_picture_has_the_image_and_one_line_per_dimension(spec):
    figure = plot_chunk(CHUNK, spec, Image.new("L", (40, 30)), "wave")
    image, *lines = figure.axes
    drawn = [axis.get_title() for axis in lines if axis.lines]
    assert drawn == (list(spec.names) if spec else ["[0]", "[1]", "[2]", "[3]"])
    assert np.array_equal(lines[1].lines[0].get_ydata(), CHUNK[:, 1])
    assert ("not projected" in image.get_title()) == (spec is SPEC)


def test_a_chunk_that_does_not_move_is_drawn():
    figure = plot_chunk(np.zeros_like(CHUNK), SPEC, Image.new("RGB", (40, 30)), "wait")
    figure.savefig(io.BytesIO())  # which draws, as a Figure's own canvas does not
    assert np.allclose(figure.axes[0].lines[0].get_xydata(), (20, 15))


def test_a_title_with_dollars_is_no_formula():
    figure = plot_chunk(CHUNK, SPEC, Image.new("RGB", (40, 30)), "$\\frac$\n'pay [5]'")
    figure.savefig(io.BytesIO())  # which draws, as a Figure's own canvas does not
    assert figure.get_suptitle() == "$\\frac$\n'pay [5]'"
