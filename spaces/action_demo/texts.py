"""A prediction in words, tables, files and links."""

import base64
import csv
import html
import io
import json
from urllib.parse import urlencode

import numpy as np

FRAMES = {
    "world": "the axes of the world",
    "base": "the axes of the robot's base",
    "camera": "the camera's axes (x right, y down, z ahead)",
    None: "axes that the checkpoint does not name",
}
ROTATIONS = {"axis_angle": "as a rotation vector", "rot6d": "the first two rows of a rotation matrix"}


def table(chunk, names, control_hz=None):
    """Headers and rows of a chunk `(T, D)` in robot units, four decimals."""
    headers = ["step", *(["seconds"] if control_hz else []), *names]
    rows = []
    for step, action in enumerate(chunk.tolist()):
        time = [f"{step / control_hz:.3f}"] if control_hz else []
        rows.append([str(step), *time, *(f"{value:+.4f}" for value in action)])
    return headers, rows


def to_html(headers, rows):
    """A table as HTML, which scrolls by itself where it is wider than its place."""

    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(each)}</{tag}>" for each in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="numbers"><table><thead>{line(headers, "th")}</thead><tbody>{body}</tbody></table></div>'


def record(checkpoint, prediction, asked):
    """Everything of a prediction, as JSON values; what the API answers.

    Args:
        checkpoint ([`predict.Checkpoint`]), prediction ([`predict.Prediction`]): the model and its answer.
        asked (`dict`): instruction, state, seed and so on.
    """
    key = checkpoint.key(asked["dataset"])
    spec, _ = checkpoint.codec.specs(key)
    names, state_names = checkpoint.names(key)

    def plain(array):
        return None if array is None else array.tolist()

    return {
        **asked,
        "dataset": key,
        "names": names,
        "state_names": state_names,
        "spec": None if spec is None else spec.to_dict(),
        "actions": plain(prediction.samples[0]),
        "samples": plain(prediction.samples),
        "reasoning": prediction.reasoning,
        "denoising": plain(prediction.denoising),
        "tokens": prediction.tokens,
        "seconds": prediction.seconds,
        "device": prediction.device,
        "notes": prediction.notes,
    }


def to_csv(record):
    """All samples as lines `sample, step, <names>`, every digit."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["sample", "step", *record["names"]])
    for sample, chunk in enumerate(record["samples"]):
        writer.writerows([sample, step, *action] for step, action in enumerate(chunk))
    return stream.getvalue()


def downloads(record):
    """Links that hold their files themselves: nothing is kept on the server, so nobody else can fetch it."""

    def link(name, mime, text):
        data = base64.b64encode(text.encode()).decode()
        return f'<a class="file" download="{name}" href="data:{mime};base64,{data}">{name}</a>'

    content = json.dumps(record, indent=1, allow_nan=False)
    return (
        '<div class="files">Download: '
        + link("actions.json", "application/json", content)
        + link("actions.csv", "text/csv", to_csv(record))
        + "</div>"
    )


def summary(checkpoint, prediction, spec):
    """What came out, in a line or two of HTML."""
    samples, (count, size) = len(prediction.samples), prediction.samples.shape[1:]
    lasting = (
        f", {count / spec.control_hz:.2g} s of motion at {spec.control_hz:g} Hz" if spec and spec.control_hz else ""
    )
    others = f" The other {samples - 1} samples are drawn in grey." if samples > 1 else ""
    lines = [
        f"<p><b>{count} actions of {size} numbers</b>{lasting}. The model took "
        f"<b>{1000 * prediction.seconds:.0f} ms</b> on {html.escape(prediction.device)} "
        f"({checkpoint.num_parameters / 1e6:.1f} million parameters).{others}</p>"
    ]
    if prediction.reasoning is not None:
        lines.append(f'<p class="reasoning">The model says: <q>{html.escape(prediction.reasoning)}</q></p>')
    lines += [f"<p>{html.escape(note)}</p>" for note in prediction.notes]
    return f'<div class="summary">{"".join(lines)}</div>'


def meaning(checkpoint, key):
    """What the numbers mean, Markdown."""
    spec, _ = checkpoint.codec.specs(key)
    names, state_names = checkpoint.names(key)
    scene = (checkpoint.example or {}).get("scene") or {}
    words = [f"A prediction is a **chunk**: {checkpoint.codec.chunk_size} actions, one for each control step"]
    words[0] += f", 1/{spec.control_hz:g} s apart." if spec and spec.control_hz else "."
    if spec is None:
        words.append("The checkpoint does not say what its dimensions mean; they are in the units of its dataset.")
    else:
        unit = scene.get("metres_per_unit")
        of = f"; one unit is {100 * unit:g} cm" if unit else ""
        kinds = {
            "delta_ee": f"how far the hand is to move in that step, along {FRAMES.get(spec.frame, spec.frame)}{of}",
            "absolute_ee": f"where the hand is to be, in {FRAMES.get(spec.frame, spec.frame)}{of}",
            "joint": "values of the joints, in the dataset's units",
        }
        if spec.kind == "joint":
            words.append(f"The numbers are {kinds['joint']}.")
        else:
            words.append(f"**{', '.join(names[:3])}**: {kinds[spec.kind]}.")
        if spec.rotation:
            last = spec.gripper.index if spec.gripper else len(names)
            turn = "how it is to turn in that step" if spec.kind == "delta_ee" else "how it is to be turned"
            unit = scene.get("radians_per_unit")
            of = f"; one unit is {unit:g} rad" if unit else ""
            how = ROTATIONS.get(spec.rotation, f"as {spec.rotation}")
            words.append(f"**{', '.join(names[3:last])}**: {turn}, {how}{of}.")
        if spec.gripper:
            grip = spec.gripper
            words.append(f"**{names[grip.index]}**: the gripper; {grip.open:+g} is open, {grip.closed:+g} is closed.")
        if spec.kind == "delta_ee":
            words.append(
                "**The path** adds these motions up, beginning at zero. It is where the hand would go if the arm "
                "followed every command exactly and at once; a real one lags behind, so it shows what is asked for, "
                "not what will happen."
            )
    words.append(
        f"The numbers are in **robot units**: the network's own, about -1 to 1, are scaled with the statistics of the "
        f"dataset `{key}`. Nearly all (98 %) of its actions lie between these:"
    )
    statistics = checkpoint.codec.statistics[key]["action"]
    words.append(_ranges(names, statistics))
    if state_names:
        words.append(
            f"**The state** is what the robot measures of itself: {', '.join(state_names)}, in the dataset's units."
        )
    if checkpoint.instructions:
        listed = "\n".join(f"- {html.escape(each)}" for each in checkpoint.instructions)
        words.append(f"**Instructions** that it was trained with; it knows them word by word:\n\n{listed}")
    return "\n\n".join(words)


def _ranges(names, statistics):
    if not {"q01", "q99"} <= statistics.keys():
        return "(the checkpoint does not say which)"
    rows = zip(names, statistics["q01"], statistics["q99"], strict=True)
    lines = [f"| {name} | {low:+.3f} | {high:+.3f} |" for name, low, high in rows]
    return "\n".join(["| | from | to |", "|---|---|---|", *lines])


def token_table(tokens, action, tokenizer):
    """Headers and rows: the candidates of one action's tokens, and how probable they were."""
    headers = ["token", "id", "", "probability", "cell (normalised units)"]
    rows = []
    for token in tokens:
        if token["action"] != action:
            continue
        for each, chance in token["candidates"]:
            chosen = "chosen" if each == token["id"] else ""
            rows.append([token["block"], str(each), chosen, f"{chance:.3f}", cell(tokenizer, token["block"], each)])
    return headers, rows


def cell(tokenizer, block, token):
    """The centre of a token's cell, in words."""
    if not hasattr(tokenizer, "num_bins") or block not in ("translation", "rotation", "gripper"):
        return ""
    start = {name: first for name, first, _ in tokenizer.blocks}[block]
    if block == "gripper":
        return f"{token - start}"
    axes = [*tokenizer.edges.items()][0 if block == "translation" else 3 :][:3]
    places = np.unravel_index(token - start, [len(edges) - 1 for _, edges in axes])
    parts = []
    for (name, edges), place in zip(axes, places, strict=True):
        middle = (edges[place] + edges[place + 1]) / 2
        parts.append(f"{name} {np.degrees(middle):.0f}°" if name in ("theta", "phi") else f"{name} {middle:.2f}")
    return ", ".join(parts)


def query(**values):
    """Query of a link that restores the form; what is None stays out."""
    return "?" + urlencode({name: value for name, value in values.items() if value not in (None, "")})
