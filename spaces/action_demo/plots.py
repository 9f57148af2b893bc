"""Drawings of a prediction, as matplotlib figures; nothing is written to disk."""

import matplotlib
import numpy as np
from geometry import end_effector_path, project
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

FIRST, OTHERS, START = "#1d4ed8", "#94a3b8", "#16a34a"
STYLE = {
    "figure.dpi": 160,
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
    "text.color": "#0f172a",
    "text.parse_math": False,  # words are no formulas, though they hold dollars
}


matplotlib.rcParams.update(STYLE)


def plot_path(samples, spec):
    """The end effector's path in space, all samples, the first in front.

    Args:
        samples (`np.ndarray` of shape `(S, T, D)`): robot units.
        spec ([`~hf_vla.actions.spec.ActionSpec`], *optional*): what they mean.

    Returns:
        `tuple`: the figure, or None and the reason, a sentence.
    """
    paths, reason = end_effector_path(samples, spec)
    if paths is None:
        return None, reason
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    axis = figure.add_subplot(projection="3d", computed_zorder=False)
    for path in paths[1:]:
        axis.plot(*path.T, color=OTHERS, linewidth=1, alpha=0.8)
    axis.plot(*paths[0].T, color=FIRST, linewidth=2.2, marker="o", markersize=3.5)
    axis.scatter(*paths[0][0], color=START, s=60, zorder=5)
    axis.text(*paths[0][0], "start ", color=START, ha="right", va="top")
    points = paths.reshape(-1, 3)
    middle = (points.min(0) + points.max(0)) / 2
    reach = max(np.ptp(points, axis=0).max() / 2, 1e-6) * 1.05  # one scale for all axes, or directions would deceive
    for name, centre, setter in zip(spec.names, middle, (axis.set_xlim, axis.set_ylim, axis.set_zlim), strict=False):
        setter(centre - reach, centre + reach)
        getattr(axis, f"set_{setter.__name__[4]}label")(name, labelpad=4)
    axis.tick_params(labelsize=8, pad=0)
    axis.locator_params(nbins=5)
    axis.set_box_aspect((1, 1, 1), zoom=0.92)
    return figure, None


def plot_dimensions(samples, names):
    """One small diagram for each dimension of the action, over the steps of the chunk.

    Args:
        samples (`np.ndarray` of shape `(S, T, D)`): robot units.
        names (`list[str]`): of the dimensions.
    """
    figure, axes = _diagrams(names)
    for index, axis in enumerate(axes):
        axis.axhline(0, color="#e2e8f0", linewidth=1, zorder=0)
        axis.plot(samples[1:, :, index].T, color=OTHERS, linewidth=1, alpha=0.8)
        axis.plot(samples[0, :, index], color=FIRST, linewidth=2, marker="o", markersize=3)
        axis.margins(y=0.15)
        if np.ptp(samples[..., index]) < 1e-3:  # else rounding would fill the diagram
            middle = samples[..., index].mean()
            axis.set_ylim(middle - 0.5, middle + 0.5)
    return figure


def _diagrams(names):
    """A figure with a diagram for each dimension."""
    columns = 2 if len(names) > 1 else 1
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(5, 1.35 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        axis.set_title(name, loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(names) - columns) : len(names)]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("step of the chunk", fontsize=9)
    return figure, axes[: len(names)]


def picture_path(samples, spec, camera, scene, example, size):
    """Where the paths are in a picture.

    Args:
        samples (`np.ndarray` of shape `(S, T, D)`): robot units.
        spec ([`~hf_vla.actions.spec.ActionSpec`], *optional*): what they mean.
        camera ([`~hf_vla.actions.spec.CameraSpec`], *optional*): that took the picture.
        scene (`dict`, *optional*): of the example's frame.json: where camera and hand were, how long a unit is.
        example (`bool`): whether the picture is the example's.
        size (`tuple[int, int]`): of the picture, width and height.

    Returns:
        `tuple`: pixels `(S, points, 2)`, or None and the reason, a sentence.
    """
    paths, reason = end_effector_path(samples, spec)
    if paths is None:
        return None, reason
    if camera is None or camera.intrinsics is None:
        return None, "The path is not drawn into the picture: the checkpoint does not know the camera's intrinsics."
    pose = ((scene or {}).get("camera_to_world") or {}).get(camera.name)
    if not example or pose is None:
        frame = f"in the axes of the {spec.frame}" if spec.frame else "in axes that the checkpoint does not name"
        return None, (
            f"The path is not drawn into the picture. It is {frame}, and where camera and hand were when this picture "
            "was taken is not known: the camera's intrinsics alone do not tell where in the picture the path lies."
        )
    points = scene["metres_per_unit"] * paths
    if spec.kind != "absolute_ee":
        points = points + np.array(scene["start"])
    pixels = project(points, camera.scaled(*size).intrinsics, pose)
    if np.isnan(pixels[0]).any():
        return None, "The path is not drawn into the picture: some of it lies behind the camera."
    return pixels, None


def plot_picture(picture, pixels):
    """Draw projected paths into a picture.

    Args:
        picture (`PIL.Image.Image`): RGB.
        pixels (`np.ndarray` of shape `(S, points, 2)`): of [`picture_path`].
    """
    width, height = picture.size
    figure = Figure(figsize=(5, 5 * height / width))
    axis = figure.add_axes((0, 0, 1, 1))
    # a pixel's centre is half a pixel from its corner, from which intrinsics count
    axis.imshow(np.asarray(picture), extent=(0, width, height, 0), interpolation="nearest")
    for path in pixels[1:]:
        axis.plot(*path.T, color="white", linewidth=1, alpha=0.6)
    axis.plot(*pixels[0].T, color="white", linewidth=4.5)
    axis.plot(*pixels[0].T, color=FIRST, linewidth=2.5)
    axis.scatter(*pixels[0, 0], color=START, s=60, edgecolor="white", zorder=5)
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    return figure


def plot_denoising(denoising, names, step):
    """The first sample behind a denoising step, beside what it becomes.

    Args:
        denoising (`np.ndarray` of shape `(steps, T, D)`): robot units.
        names (`list[str]`): of the dimensions.
        step (`int`): from 1.
    """
    figure, axes = _diagrams(names)
    figure.suptitle(f"after step {step} of {len(denoising)}", fontsize=10)
    for index, axis in enumerate(axes):
        values = denoising[..., index]
        axis.plot(values[-1], color=OTHERS, linewidth=1.5, linestyle="--")
        axis.plot(values[step - 1], color=FIRST, linewidth=2, marker="o", markersize=3)
        room = max(0.08 * np.ptp(values), 0.05)
        axis.set_ylim(values.min() - room, values.max() + room)  # the same for all steps
    return figure


def plot_depth(depth):
    """A depth map with its scale in metres."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axis = figure.add_subplot()
    shown = axis.imshow(depth, cmap="viridis_r")
    axis.set_axis_off()
    bar = figure.colorbar(shown, ax=axis, shrink=0.85)
    bar.set_label("metres along the optical axis")
    bar.outline.set_visible(False)
    return figure


def plot_directions(chances, edges, chosen):
    """Directions of a translation, as a map of the sphere and as the sphere, and the chosen cell.

    Args:
        chances (`np.ndarray` of shape `(n_theta, n_phi)`): probabilities.
        edges (`tuple[np.ndarray, np.ndarray]`): of the cells, theta (from +z) and phi (from +x towards +y), radians.
        chosen (`tuple[int, int]`): row and column of the chosen one.
    """
    theta, phi = (np.asarray(each) for each in edges)
    figure = Figure(figsize=(5.4, 3), layout="constrained")
    flat = figure.add_subplot(1, 2, 1)
    mesh = flat.pcolormesh(np.degrees(phi), np.degrees(theta), chances, cmap="Blues", vmin=0)
    row, column = chosen
    corner = np.degrees((phi[column], theta[row]))
    size = np.degrees((phi[column + 1] - phi[column], theta[row + 1] - theta[row]))
    flat.add_patch(Rectangle(corner, *size, fill=False, edgecolor="#dc2626", linewidth=2))
    flat.set(xlim=(-180, 180), ylim=(180, 0), xticks=(-180, -90, 0, 90, 180), yticks=(0, 45, 90, 135, 180))
    flat.set_xlabel("phi, degrees (0: +x, 90: +y)", fontsize=9)
    flat.set_ylabel("theta, degrees (0: +z, 180: -z)", fontsize=9)
    flat.tick_params(labelsize=8)
    bar = figure.colorbar(mesh, ax=flat, orientation="horizontal", shrink=0.9)
    bar.set_label("probability of the cell", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    ball = figure.add_subplot(1, 2, 2, projection="3d")
    t, p = np.meshgrid(theta, phi, indexing="ij")
    surface = _direction(t, p)
    colours = matplotlib.colormaps["Blues"](chances / max(chances.max(), 1e-12))
    ball.plot_surface(*surface, facecolors=colours, rstride=1, cstride=1, shade=False, edgecolor="#cbd5e1", lw=0.2)
    middle = (theta[row] + theta[row + 1]) / 2, (phi[column] + phi[column + 1]) / 2
    arrow = _direction(*middle)
    ball.plot(*np.outer(arrow, (1, 1.5)), color="#dc2626", linewidth=3, zorder=10)
    for axis, name in zip(np.eye(3), "xyz", strict=True):
        ball.plot(*np.outer(axis, (1, 1.35)), color="#64748b", linewidth=1)
        ball.text(*1.55 * axis, f"+{name}", color="#334155", ha="center", va="center", fontsize=10)
    height = np.clip(90 - np.degrees(middle[0]) + 15, -60, 60)
    ball.view_init(elev=height, azim=np.degrees(middle[1]) + 35)  # the chosen direction is to be seen
    ball.set_box_aspect((1, 1, 1), zoom=1.6)
    ball.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), zlim=(-1.6, 1.6))
    ball.set_axis_off()
    return figure


def _direction(theta, phi):
    return np.array([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)])


def plot_tokens(tokens):
    """How sure the model was of each token that it chose."""
    figure = Figure(figsize=(5, 2), layout="constrained")
    axis = figure.add_subplot()
    kinds = list(dict.fromkeys(token["block"] for token in tokens))
    colours = dict(zip(kinds, ("#1d4ed8", "#0891b2", "#94a3b8", "#64748b"), strict=False))
    for kind in kinds:
        places = [(place, token["probability"]) for place, token in enumerate(tokens) if token["block"] == kind]
        axis.bar(*zip(*places, strict=True), color=colours.get(kind, "#1d4ed8"), label=kind)
    axis.tick_params(labelsize=8)
    axis.set(ylim=(0, 1.02), xlabel="token of the chunk", ylabel="probability")
    if len(kinds) > 1:
        axis.legend(fontsize=9, ncols=len(kinds), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return figure
