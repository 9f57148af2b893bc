"""What a scan of a dataset found, for human eyes: tables, sentences and plots."""

import math

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from hf_vla.actions.normalization import ActionNormalizer
from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer
from hf_vla.actions.tokenizers.registry import build_action_tokenizer
from hf_vla.actions.tokenizers.uniform import UniformTokenizer
from hf_vla.actions.values import is_constant

SHOWN = ("min", "q01", "mean", "std", "q99", "max")
COLORS = {"uniform": "tab:gray", "gaussian_grid": "tab:orange"}
BARS = 100


def statistics_table(key, column):
    """Lay out a column's statistics.

    Args:
        key (`str`): the column.
        column ([`~hf_vla.data.checks.scan.ColumnScan`]): with one row at least.

    Returns:
        `rich.table.Table`: one row per dimension, in the dataset's units.
    """
    summary = column.statistics.summary()
    title = f"{escape(key)}, {column.statistics.count:,} rows"
    table = Table("", title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in SHOWN:
        table.add_column(name, justify="right")
    for place, name in enumerate(column.names):
        table.add_row(escape(name), *(f"{summary[statistic][place]:.4g}" for statistic in SHOWN))
    return table


def remarks(key, column):
    """Say what of a column is not as it should be.

    Args:
        key (`str`): the column.
        column ([`~hf_vla.data.checks.scan.ColumnScan`]).

    Returns:
        `list[str]`: sentences.
    """
    sentences = []
    if column.bad_rows:
        places = ", ".join(f"episode {episode} frame {frame}" for episode, frame in column.bad_places)
        more = ", ..." if column.bad_rows > len(column.bad_places) else ""
        sentences.append(
            f"{column.bad_rows:,} row(s) of {key} are NaN or infinite and left out here; training refuses them: "
            f"{places}{more}."
        )
    if not column.statistics.count:
        return [*sentences, f"{key} has no row that is a number."]
    summary = column.statistics.summary()
    never = is_constant(summary["min"], summary["max"])
    for place in np.flatnonzero(column.statistics.constant):
        name, value = column.names[place], summary["q01"][place]
        seldom = "never varies" if never[place] else "hardly varies: it leaves that only outside q01..q99"
        sentences.append(
            f"Dimension {place} of {key} ({name}) is constant at {value:.4g} ({seldom}); scaled by its quantiles it "
            "carries no information, and every prediction decodes to that value."
        )
    return sentences


def edges_in_robot_units(entry, statistics):
    """Where a representation parts the values of each action dimension.

    Args:
        entry (`dict`): its "normalization" and "tokenizer", see [`~hf_vla.data.checks.grids.fit_tokenizers`].
        statistics (`dict`): of the actions, in LeRobot's names.

    Returns:
        `list[np.ndarray]`: of each dimension; empty where it has no edges of its own (polar axes, constants).
    """
    normalizer = ActionNormalizer(statistics, **entry["normalization"])
    tokenizer = build_action_tokenizer(entry["tokenizer"])
    edges = [np.zeros(0)] * normalizer.action_dim
    if isinstance(tokenizer, UniformTokenizer):
        edges = [np.linspace(-1.0, 1.0, tokenizer.n_bins + 1)] * normalizer.action_dim
    elif isinstance(tokenizer, GaussianGridTokenizer):
        edges[:-1] = tokenizer.edges.values()
        edges[-1] = np.array([0.5])
        if tokenizer.use_spherical:
            edges[:3] = [np.zeros(0)] * 3
    scaled = []
    for place, values in enumerate(edges):
        rows = np.zeros((len(values), normalizer.action_dim))
        rows[:, place] = values
        scaled.append(np.zeros(0) if normalizer.constant[place] else normalizer.unnormalize(rows)[:, place])
    return scaled


def plot_column(values, names, statistics, edges, title):
    """Draw how the values of each dimension are distributed.

    Args:
        values (`np.ndarray` of shape `(n, D)`): rows of the column, in its own units.
        names (`tuple[str, ...]`): of the dimensions.
        statistics (`dict`): in LeRobot's names; q01 and q99 are drawn.
        edges (`dict[str, list[np.ndarray]]`): representation -> the edges of each dimension, in the same units.
        title (`str`): shown above.

    Returns:
        `matplotlib.figure.Figure`: a panel per dimension.
    """
    figure, axes = _panels(len(names), title)
    for place, axis in enumerate(axes):
        _draw_bars(axis, values[:, place])
        for height, (name, parts) in enumerate(edges.items()):
            top = 1.0 - 0.05 * height  # rows of ticks: 257 lines across the panel would hide what it shows
            _draw_edges(axis, parts[place], top - 0.05, top, name)
        for name in ("q01", "q99"):
            axis.axvline(statistics[name][place], color="tab:red", linestyle="--", linewidth=1, label=name)
        axis.set_title(names[place], fontsize=9, parse_math=False)
    _legend(figure, axes)
    return figure


def plot_grid(grid, normalized_actions, title):
    """Draw how actions are distributed on the axes of an adaptive grid, with its edges and those of a uniform one.

    Args:
        grid ([`~hf_vla.actions.tokenizers.gaussian_grid.GaussianGridTokenizer`]): fitted to them.
        normalized_actions (`np.ndarray` of shape `(n, grid.action_dim)`): normalised.
        title (`str`): shown above.

    Returns:
        `matplotlib.figure.Figure`: a panel per axis.
    """
    columns = list(np.clip(normalized_actions, -1.0, 1.0).T)
    if grid.use_spherical:
        x, y, z = columns[:3]
        flat = np.hypot(x, y)
        r = np.hypot(flat, z)
        moving = r > 0  # what does not move has no direction
        columns[:3] = np.arctan2(flat, z)[moving], np.arctan2(y, x)[moving], r
    figure, axes = _panels(len(grid.edges), title)
    for axis, values, (name, edges) in zip(axes, columns, grid.edges.items(), strict=False):
        low, high = grid.ranges[name]
        _draw_bars(axis, np.clip(values, low, high), (low, high))
        _draw_edges(axis, edges, 0.0, 0.9, "gaussian_grid")
        _draw_edges(axis, np.linspace(low, high, len(edges)), 0.9, 1.0, "uniform")
        axis.set_title(f"{name}, {len(edges) - 1} bins", fontsize=9)
    _legend(figure, axes)
    return figure


def _panels(count, title):
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_axis_off()
    for axis in axes:
        axis.tick_params(labelsize=7)
    return figure, axes[:count]


def _draw_bars(axis, values, ends=None):
    axis.stairs(*np.histogram(values, BARS, ends), fill=True, color="tab:blue")  # one shape: hist makes a hundred


def _draw_edges(axis, edges, bottom, top, name):
    """Draw edges as upright lines; `bottom` and `top` are shares of the panel's height."""
    transform, color = axis.get_xaxis_transform(), COLORS.get(name)
    axis.vlines(edges, bottom, top, transform=transform, color=color, linewidth=0.6, label=f"{name} edges")


def _legend(figure, axes):
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
