"""The table and the figure of `compare_representations.py`."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from hf_vla.evaluation.comparison import percent, table
from hf_vla.evaluation.intervals import compare_pairs, holm, mean_over_tasks, wilson
from hf_vla.evaluation.records import write_whole

BEGIN, END = "<!-- results -->", "<!-- /results -->"
TITLES = {  # and what the colour of the figure says: how an answer comes about
    "regression": ("regression", "one pass"),
    "rt1": ("RT-1, independent bins", "one pass"),
    "rt2": ("RT-2, bins and terminate", "token by token"),
    "openvla": ("OpenVLA, bins", "token by token"),
    "3d_vla": ("3D-VLA, bins", "token by token"),
    "spatialvla": ("SpatialVLA, adaptive grid", "token by token"),
    "fast": ("FAST", "token by token"),
    "discrete_diffusion": ("discrete diffusion, bins", "denoising"),
    "ddpm": ("diffusion, DDPM, 100 steps", "denoising"),
    "ddim": ("diffusion, DDIM, 10 steps", "denoising"),
    "flow_matching": ("flow matching, 10 steps", "denoising"),
    "divla": ("DiVLA, words and diffusion", "denoising"),
}
COLORS = {"one pass": "#D55E00", "token by token": "#0072B2", "denoising": "#009E73"}
SIDES = {  # how an episode with two ways ended: colour, names of counts
    "by the left": ("#4477AA", ("left", "left, lost")),
    "by the right": ("#EE8866", ("right", "right, lost")),
    "hit or lost before it": ("#DDDDDD", ("none",)),
}
METERS = 0.01  # of one unit of Meta-World's translation
HEAD = (
    "",
    "Meta-World, success (95 %)",
    "to the best, points (Holm p)",
    "two ways, success (95 %)",
    "commits to a side; left : right",
    "the same, drawn",
    "from one start, drawn: left : right",
    "action error",
    "round trip, worst (mean), mm",
    "tokens per action (of 7)",
    "tokens per chunk",
    "passes: language + head",
    "ms per chunk",
    "ms per action",
    "parameters, own",
    "samples/s in training",
)


def write_report(folder: Path, results: dict) -> None:
    """Write `representations.json`, `.png` and the table in `.md`, whose other text stays as it is.

    Args:
        folder (`Path`): where to.
        results (`dict`): "protocol", and "representations": name -> what was measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "representations.json", json.dumps(results, indent=1) + "\n")
    draw(results["representations"]).savefig(folder / "representations.png", dpi=110)
    page = folder / "representations.md"
    text = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    (before, rest), lines = text.split(BEGIN), as_table(results["representations"])
    write_whole(page, f"{before}{BEGIN}\n{lines}\n{END}{rest.split(END)[1]}")


def as_table(representations: dict) -> str:
    """One line for each representation."""
    rows, gaps = [], to_the_best(representations)
    for name, measured in representations.items():
        usual, passes = measured["two_ways"]["usual"], measured["passes"]
        total = sum(usual["episodes"].values())
        drawn = measured["two_ways"].get("sampled", usual)
        seven = measured["tokens_per_action_of_seven"]
        worst, mean = (1000 * METERS * max(measured[f"round_trip_{what}"][:3]) for what in ("worst", "mean"))
        rows.append(
            (
                TITLES[name][0],
                percent(success(measured)),
                gaps[name],
                percent(wilson(usual["episodes"]["left"] + usual["episodes"]["right"], total)),
                *(
                    f"{percent(passes_by(counts))}; {sides(counts)}"
                    for counts in (usual["episodes"], drawn["episodes"])
                ),
                ", ".join(sides(start) for start in drawn["starts"]),
                f"{measured['action_error']:.3f}",
                f"{worst:.2g} ({mean:.2g})",
                f"{measured['tokens_per_action']:.3g} ({'?' if seven is None else f'{seven:.3g}'})",
                f"{measured['tokens_per_chunk']:.3g}",
                f"{passes['language']:.3g} + {passes['head']:.3g}",
                f"{measured['ms_per_chunk']:.3g}",
                f"{measured['ms_per_action']:.3g}",
                f"{measured['parameters']['rest'] / 1e6:.2f} M",
                f"{measured['samples_per_second']:.0f}",
            )
        )
    return table(HEAD, rows)


def to_the_best(representations: dict) -> dict[str, str]:
    """How far each is behind the one that succeeds most, by pairs of equal task and seed, with p of all together."""
    best = max(representations, key=lambda name: success(representations[name]).estimate)
    tests = {}
    for name in representations:
        if name != best:
            outcomes = zip(_outcomes(representations[best]), _outcomes(representations[name]), strict=True)
            tests[name] = compare_pairs([*outcomes])
    corrected = holm({name: test.p_value for name, test in tests.items()})
    said = {name: f"{100 * test.difference.estimate:+.1f} ({corrected[name]:.2g})" for name, test in tests.items()}
    return {**said, best: "the best"}


def _outcomes(measured):
    """Whether each episode was solved, task by task, seed by seed."""
    counts = measured["metaworld"].items()
    return [seed in measured["solved"].get(task, ()) for task, (_, runs) in counts for seed in range(runs)]


def success(measured):
    """On Meta-World, each task alike."""
    return mean_over_tasks([tuple(counts) for counts in measured["metaworld"].values()])


def passes_by(counts: dict[str, int]):
    """The share that gets past the obstacle."""
    total = sum(counts.values())
    return wilson(total - counts["none"], total)


def sides(counts: dict[str, int]) -> str:
    """How often by the left and how often by the right, whether the goal was reached or not."""
    return " : ".join(str(counts[side] + counts[f"{side}, lost"]) for side in ("left", "right"))


def draw(representations: dict) -> Figure:
    """Success, the ways taken, time and resolution of every representation."""
    names, places = [*representations], range(len(representations))
    figure = Figure(figsize=(15, 1.6 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    colors = [COLORS[TITLES[name][1]] for name in names]
    rates = [success(representations[name]) for name in names]
    errors = [
        [100 * (rate.estimate - rate.low) for rate in rates],
        [100 * (rate.high - rate.estimate) for rate in rates],
    ]
    axes[0].barh(places, [100 * rate.estimate for rate in rates], color=colors, xerr=errors, ecolor="#444444")
    axes[0].set(xlim=(0, 100), xlabel="%", title="Meta-World: success")
    _draw_ways(axes[1], [representations[name]["two_ways"]["usual"]["episodes"] for name in names])
    axes[2].barh(places, [representations[name]["ms_per_chunk"] for name in names], color=colors)
    axes[2].set(xscale="log", xlabel="ms", title="a chunk of 16 actions")
    for what, alpha in (("worst", 0.35), ("mean", 1.0)):
        errors = [1000 * METERS * max(representations[name][f"round_trip_{what}"][:3]) for name in names]
        axes[3].barh(places, errors, color=colors, alpha=alpha)
    axes[3].set(xscale="log", xlim=(0.001, None), xlabel="mm", title="round trip: mean, and worst (pale)")
    axes[0].set_yticks(places, [TITLES[name][0] for name in names])
    axes[0].invert_yaxis()
    for way, color in COLORS.items():
        axes[2].barh([0], [0], color=color, label=way)
    axes[2].legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_ways(axis, counts):
    left = [0.0] * len(counts)
    for label, (color, names) in SIDES.items():
        shares = [100 * sum(each[name] for name in names) / sum(each.values()) for each in counts]
        axis.barh(range(len(counts)), shares, left=left, color=color, label=label)
        left = [low + share for low, share in zip(left, shares, strict=True)]
    axis.set(xlim=(0, 100), xlabel="%", title="two ways: past the obstacle")
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
