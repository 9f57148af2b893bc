"""Pictures of evaluations."""

from textwrap import fill

from matplotlib.figure import Figure

TASK, MEAN, PROBE = "tab:blue", "tab:orange", "tab:gray"


def plot_success(report, title):
    """Draw success by task, best first, with its mean over tasks, and success of all episodes under each probe.

    Behind a name stands how many episodes were solved, of how many.

    Args:
        report (`dict`): see [`~hf_vla.evaluation.report.summarize`].
        title (`str`): shown above.

    Returns:
        `matplotlib.figure.Figure`: horizontal bars with 95 % intervals.
    """
    tasks = sorted(report["tasks"].items(), key=lambda task: -task[1]["success"]["estimate"])
    bars = [(name, task, task["success"], TASK) for name, task in tasks]
    if len(tasks) > 1:
        bars.append(("mean over tasks", report["overall"], report["overall"]["mean_over_tasks"], MEAN))
    bars += [
        (f"probe {name}, all episodes", probe, probe["success"], PROBE) for name, probe in report["probes"].items()
    ]
    names, counts, rates, colors = zip(*bars, strict=True)
    names = [f"{name}  {count['successes']}/{count['episodes']}" for name, count in zip(names, counts, strict=True)]
    width = max(7.0, 4.5 + 0.07 * max(map(len, names)))  # inches; LIBERO's names have a hundred letters
    figure = Figure(figsize=(width, 1.2 + 0.24 * len(bars)), layout="constrained")
    axis = figure.subplots()
    values = [100 * rate["estimate"] for rate in rates]
    below = [100 * (rate["estimate"] - rate["low"]) for rate in rates]
    above = [100 * (rate["high"] - rate["estimate"]) for rate in rates]
    whiskers = {"ecolor": "black", "elinewidth": 1, "capsize": 2}
    axis.barh(range(len(bars)), values, color=colors, height=0.7, xerr=(below, above), error_kw=whiskers)
    axis.set_yticks(range(len(bars)), names, fontsize=8, parse_math=False)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_xlim(0, 100)
    axis.set_xlabel("success in % of episodes, with 95 % intervals", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", linewidth=0.4)
    axis.set_axisbelow(True)
    figure.suptitle(fill(title, 90), fontsize=10, parse_math=False)
    return figure


def plot_open_loop(recorded, frames, chunks, names, title):
    """Draw what was recorded in an episode, and over it the chunks that were predicted along it.

    Args:
        recorded (`np.ndarray` of shape `(length, action_dim)`): robot units.
        frames (`np.ndarray` of shape `(n,)`): at which the chunks begin.
        chunks (`np.ndarray` of shape `(n, chunk_size, action_dim)`): robot units.
        names (`Sequence[str]`): of the dimensions.
        title (`str`): shown above.

    Returns:
        `matplotlib.figure.Figure`: a row for each dimension.
    """
    figure = Figure(figsize=(7.0, 1.0 + 1.15 * len(names)), layout="constrained", dpi=90)
    figure.suptitle(fill(title, 90), fontsize=10, parse_math=False)
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for dimension, (axis, name) in enumerate(zip(axes, names, strict=True)):
        axis.plot(recorded[:, dimension], color="0.35", linewidth=1.5, label="recorded")
        for frame, chunk in zip(frames, chunks, strict=True):
            shown = chunk[: len(recorded) - frame, dimension]
            label = "predicted chunks, from the dot on" if frame == frames[0] else None
            line = axis.plot(range(frame, frame + len(shown)), shown, color=MEAN, linewidth=1, label=label)
            axis.plot(frame, shown[0], "o", color=line[0].get_color(), markersize=3)
        axis.set_ylabel(name, fontsize=8, parse_math=False)
        axis.tick_params(labelsize=7)
    axes[0].legend(fontsize=7, loc="best")
    axes[-1].set_xlabel("row of the episode", fontsize=8)
    return figure
