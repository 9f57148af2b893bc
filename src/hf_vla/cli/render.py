"""An action chunk for human eyes: a table, and a picture."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from rich.console import Group
from rich.markup import escape
from rich.table import Table

# Where the drawing puts x, y and z (pixels count downwards): x to the lower left, y right, z up. The camera's pose is
# not known, so this is a convention of drawing and not a projection.
AXES = np.array([[-0.5, 0.5], [1.0, 0.0], [0.0, -1.0]])
# of a table, in characters: a terminal's width; its outer border and the column of steps; a cell's border and blanks
WIDTH, BORDERS, CELL = 80, 8, 3


def dimension_names(spec, action_dim):
    """Names of the action dimensions; their positions where the checkpoint declares none."""
    return [f"[{index}]" for index in range(action_dim)] if spec is None else list(spec.names)


def describe(spec):
    """Say in one line what the numbers of an [`~hf_vla.actions.spec.ActionSpec`] (or None) are."""
    if spec is None:
        return "robot units; the checkpoint does not say what the dimensions mean"
    gripper = spec.gripper
    parts = [
        f"robot units, {spec.kind}",
        f"rotation {spec.rotation}" if spec.rotation else "",
        f"frame {spec.frame}" if spec.frame else "",
        f"{spec.control_hz:g} Hz" if spec.control_hz else "",
        f"gripper {gripper.open:+g} open, {gripper.closed:+g} closed" if gripper else "",
    ]
    return "; ".join(filter(None, parts))


def chunk_table(chunk, spec, title):
    """Lay out an action chunk, in several tables where its dimensions do not fit one of 80 columns.

    Args:
        chunk (`np.ndarray` of shape `(chunk_size, action_dim)`): robot units.
        spec ([`~hf_vla.actions.spec.ActionSpec`], *optional*): names the columns.
        title (`str`): shown above.

    Returns:
        `rich.console.Group` of `rich.table.Table`: one row per step, one column per dimension.
    """
    names, cells = dimension_names(spec, chunk.shape[-1]), np.vectorize("{:+.4f}".format)(chunk)
    width = max(map(len, cells.flat))
    count = math.ceil(len(names) / max(1, (WIDTH - BORDERS) // (width + CELL)))
    tables = [Table() for _ in range(count)]
    for table, dimensions in zip(tables, np.array_split(np.arange(len(names)), count), strict=True):
        table.add_column("step", justify="right")
        for dimension in dimensions:
            table.add_column(escape(names[dimension]), justify="right", min_width=width, overflow="fold")
        for step, row in enumerate(cells[:, dimensions]):
            table.add_row(str(step), *row)
    tables[0].title, tables[-1].caption = escape(title), escape(describe(spec))
    return Group(*tables)


def plot_chunk(chunk, spec, image, title):
    """Draw an action chunk: its path over the image, and one line per dimension.

    Args:
        chunk (`np.ndarray` of shape `(chunk_size, action_dim)`): robot units.
        spec ([`~hf_vla.actions.spec.ActionSpec`], *optional*): without it no path can be drawn.
        image (`PIL.Image.Image`): what the model saw, upright.
        title (`str`): the instruction, and what the model says to it; may have several lines.

    Returns:
        `matplotlib.figure.Figure`
    """
    names = dimension_names(spec, chunk.shape[-1])
    columns = math.ceil(math.sqrt(len(names)))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.5 + 2.2 * columns, max(4.5, 1.8 * rows)), layout="constrained")
    figure.suptitle(title, parse_math=False)  # words are no formulas, though they hold dollars
    left, right = figure.subfigures(1, 2, width_ratios=(4.5, 2.2 * columns))
    _draw_path(left.add_subplot(), chunk, spec, image.convert("RGB"))
    axes = right.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for axis, name, values in zip(axes, names, chunk.T, strict=False):
        axis.plot(values, marker="o", markersize=3)
        axis.axhline(0.0, color="0.8", linewidth=0.8, zorder=0)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    right.supxlabel(f"step; {describe(spec)}", fontsize=7)
    return figure


def translation_path(chunk, spec):
    """Add up the translation of an end-effector chunk, whose first three dimensions it is.

    Args:
        chunk (`np.ndarray` of shape `(chunk_size, action_dim)`): robot units.
        spec ([`~hf_vla.actions.spec.ActionSpec`], *optional*): tells deltas from poses.

    Returns:
        `np.ndarray` of shape `(points, 3)`, robot units, starting at zero; None for joints and unknown actions.
    """
    if spec is None or spec.kind == "joint" or chunk.shape[-1] < 3:
        return None
    if spec.kind == "absolute_ee":
        return chunk[:, :3] - chunk[0, :3]
    return np.concatenate([np.zeros((1, 3)), np.cumsum(chunk[:, :3], axis=0)])


def _draw_path(axis, chunk, spec, image):
    """Draw the path from the middle of the image, scaled to a third of it, with the directions of x, y and z."""
    axis.imshow(image)
    axis.set_axis_off()
    path = translation_path(chunk, spec)
    if path is None:
        axis.set_title("no path: not known to be end-effector actions", fontsize=8)
        return
    size = np.array(image.size)
    drawn = path @ AXES
    points = size / 2 + drawn * (size.min() / 3 / max(np.abs(drawn).max(), 1e-12))
    axis.plot(*points.T, color="tab:red", linewidth=2)
    axis.scatter(*points.T, c=np.arange(len(points)), cmap="autumn", s=18, zorder=3)
    corner = size * (0.15, 0.85)
    outline = [withStroke(linewidth=3, foreground="black")]
    for direction, name in zip(AXES, spec.names, strict=False):
        tip = corner + 0.1 * size.min() * direction
        axis.plot(*np.stack([corner, tip]).T, color="white", linewidth=1, path_effects=outline)
        axis.text(*tip, name, color="white", fontsize=8, path_effects=outline)
    axis.set_title(
        f"cumulative translation, {np.linalg.norm(path[-1]):.3g} robot units from start to end\n"
        "drawn from the image centre at its own scale, not projected",
        fontsize=8,
    )
