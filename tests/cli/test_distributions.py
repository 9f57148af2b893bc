import numpy as np
import pytest

from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer
from hf_vla.actions.tokenizers.uniform import UniformTokenizer
from hf_vla.cli.distributions import edges_in_robot_units, plot_column, plot_grid, remarks, statistics_table
from hf_vla.data.checks.scan import ColumnScan

NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "$gripper")


@pytest.fixture(scope="module")
def column():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(4000, 7)) * [1, 2, 3, 0.1, 0.2, 0.3, 1]
    rows[:, -1] = rows[:, -1] > 0.5
    column = ColumnScan(NAMES)
    column.statistics.update(rows)
    column.sample.update(generator.random(4000), rows.__getitem__)
    return column


@pytest.fixture(scope="module")
def summary(column):
    return column.statistics.summary()


def entry(tokenizer, size=7):
    modes = ["quantile"] * (size - 1) + ["zero_one"]
    normalization = {"mode": modes, "clip": True, "convention": "spatialvla"}
    return {"normalization": normalization, "tokenizer": tokenizer.to_dict()}


def lines(axis, label):
    """Where the upright lines of a label are."""
    (found,) = [each for each in axis.collections if each.get_label() == label]
    return [segment[0][0] for segment in found.get_segments()]


def bars(axis):
    """Heights and edges of the bars."""
    (steps,) = axis.patches
    return steps.get_data().values, steps.get_data().edges


def test_edges_come_in_robot_units(summary):
    low, high = summary["q01"], summary["q99"]
    uniform = edges_in_robot_units(entry(UniformTokenizer(7, 4)), summary)
    np.testing.assert_allclose(uniform[1], np.linspace(low[1], high[1], 5), rtol=1e-6)
    polar = edges_in_robot_units(entry(GaussianGridTokenizer(distribution="uniform")), summary)
    assert [len(edges) for edges in polar] == [0, 0, 0, 17, 17, 17, 1]
    np.testing.assert_allclose(polar[4], np.linspace(low[4], high[4], 17), rtol=1e-6)
    np.testing.assert_allclose(polar[6], 0.5)
    flat = GaussianGridTokenizer(num_bins=[2, 2, 2], distribution="uniform", use_spherical=False)
    few = {name: values[[0, 1, 2, 6]] for name, values in summary.items()}
    np.testing.assert_allclose(edges_in_robot_units(entry(flat, 4), few)[2], [low[2], (low[2] + high[2]) / 2, high[2]])
    constant = {name: np.where(np.arange(7) == 1, 5.0, values) for name, values in summary.items()}
    assert len(edges_in_robot_units(entry(UniformTokenizer(7, 4)), constant)[1]) == 0


def test_a_columns_plot_shows_bars_edges_and_quantiles(column, summary):
    sample = column.sample.entries()
    edges = {"uniform": edges_in_robot_units(entry(UniformTokenizer(7, 4)), summary)}
    figure = plot_column(sample, NAMES, summary, edges, "costs $5")
    assert [axis.get_title() for axis in figure.axes[:7]] == list(NAMES)
    assert figure.get_suptitle() == "costs $5"
    for place, axis in enumerate(figure.axes[:7]):
        heights, sides = np.histogram(sample[:, place], 100)
        np.testing.assert_array_equal(bars(axis)[0], heights)
        np.testing.assert_allclose(bars(axis)[1], sides)
        np.testing.assert_allclose(lines(axis, "uniform edges"), edges["uniform"][place])
        drawn = {line.get_label(): line.get_xdata()[0] for line in axis.lines}
        assert drawn == {name: summary[name][place] for name in ("q01", "q99")}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["uniform edges", "q01", "q99"]


@pytest.mark.parametrize("use_spherical", [True, False])
def test_a_grids_plot_shows_its_axes(column, use_spherical):
    normalized = np.clip(column.sample.entries() / 3, -1, 1)
    normalized[:100, :3] = 0.0
    grid = GaussianGridTokenizer.fit(normalized, use_spherical=use_spherical)
    figure = plot_grid(grid, normalized, "grid")
    axes = dict(zip(grid.edges, figure.axes, strict=False))
    for name, axis in axes.items():
        assert axis.get_title() == f"{name}, {len(grid.edges[name]) - 1} bins"
        np.testing.assert_allclose(lines(axis, "gaussian_grid edges"), grid.edges[name])
        np.testing.assert_allclose(
            lines(axis, "uniform edges"), np.linspace(*grid.ranges[name], len(grid.edges[name]))
        )
    counts = {name: bars(axis)[0].sum() for name, axis in axes.items()}
    directions = ("theta", "phi") if use_spherical else ()  # what does not move has none
    assert counts == {name: 3900 if name in directions else 4000 for name in grid.edges}
    # as many values below an edge as the grid itself puts there, but for those of the one bar that the edge cuts
    heights, sides = bars(axes[next(iter(axes))])
    ids = grid.encode(normalized[:, None, :])[:, 0] // (grid.num_bins[1] * grid.num_bins[2])
    moving = normalized[:, :3].any(axis=1) if use_spherical else np.ones(4000, bool)
    edges = grid.edges[next(iter(axes))]
    below = heights[sides[1:] <= edges[8]].sum()
    assert 0 <= (ids[moving] < 8).sum() - below <= heights[np.searchsorted(sides, edges[8]) - 1]


def test_a_column_without_edges_and_of_one_dimension():
    values = np.arange(10.0)[:, None]
    figure = plot_column(values, ("x",), {"q01": [0.1], "q99": [8.9]}, {}, "state")
    assert len(figure.axes) == 1 and bars(figure.axes[0])[0].sum() == 10


def test_the_table_has_a_row_for_each_dimension(column, summary):
    table = statistics_table("action", column)
    assert table.title == "action, 4,000 rows" and table.row_count == 7
    assert [each.header for each in table.columns] == ["", "min", "q01", "mean", "std", "q99", "max"]
    assert list(table.columns[3].cells) == [f"{value:.4g}" for value in summary["mean"]]


def test_what_is_not_as_it_should_be_is_said(column):
    assert remarks("action", column) == []
    odd = ColumnScan(("x", "y", "z"))
    rows = np.random.default_rng(0).normal(size=(1000, 3))
    rows[:, 1], rows[:, 2] = 0.25, 0.0
    rows[5, 2] = 1.0
    odd.statistics.update(rows)
    odd.report(25, [(3, place) for place in range(20)])
    bad, never, hardly = remarks("action", odd)
    assert bad.startswith("25 row(s) of action are NaN or infinite and left out here") and "episode 3 frame 0, " in bad
    assert bad.endswith("episode 3 frame 19, ....")
    assert never.startswith("Dimension 1 of action (y) is constant at 0.25 (never varies); ")
    assert hardly.startswith("Dimension 2 of action (z) is constant at 0 (hardly varies: ")
    empty = ColumnScan(("x",))
    assert remarks("action", empty) == ["action has no row that is a number."]
