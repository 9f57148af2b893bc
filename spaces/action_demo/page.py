"""Parts of the page: the picture's input, and the tabs of results."""

import gradio as gr
from guards import Refused, sentences
from plots import (
    picture_path,
    plot_denoising,
    plot_depth,
    plot_dimensions,
    plot_directions,
    plot_path,
    plot_picture,
    plot_tokens,
)
from texts import downloads, meaning, record, summary, table, to_html, token_table

INTRODUCTION = """<div class="introduction"><h1>What would the robot do?</h1>
<p>A picture from the robot's camera and an instruction go in; a chunk of actions comes out, in the robot's own units.
These models are tiny and know simulated scenes; press the button, then open the tabs.</p></div>"""

EMPTY = """<div class="empty"><p><b>Press the button</b> to see the actions that this model predicts for
the picture.</p><p>Here come a table of them, the path of the hand, a diagram for each dimension, and what the model
computed on the way: how noise became actions, the depth that it saw, or the cells of its action grid.</p></div>"""

CSS = """
.introduction h1 {font-size: 1.5rem; margin: 0} .introduction p {margin: .25rem 0 0; max-width: 60rem}
.empty {border: 1px dashed var(--border-color-primary); border-radius: 8px; padding: 2.5rem 1.5rem; text-align: center}
.empty p {max-width: 34rem; margin: .3rem auto}
.summary p {margin: .2rem 0} .summary .reasoning {font-size: 1.05rem}
.summary .reasoning q {font-style: italic}
.files a.file {display: inline-block; margin: 0 .5rem .3rem 0; padding: .3rem .8rem; border-radius: 6px;
 border: 1px solid var(--border-color-primary); color: var(--body-text-color); text-decoration: none}
.files a.file:hover {background: var(--background-fill-secondary)}
.numbers {overflow-x: auto; contain: inline-size; border: 1px solid var(--border-color-primary); border-radius: 8px}
.numbers table {width: 100%; margin: 0; border: 0 !important; border-collapse: collapse; font-size: .9rem}
.numbers th, .numbers td {text-align: right; padding: .3rem .5rem; white-space: nowrap; border: 0 !important;
 font-variant-numeric: tabular-nums}
.numbers thead th {border-bottom: 1px solid var(--border-color-primary) !important; font-weight: 600}
.numbers tr {border: 0 !important}
.numbers tbody tr:nth-child(even) {background: var(--background-fill-secondary)}
#tokens th, #tokens td {text-align: left}
.gradio-container .fillable {padding: 12px clamp(8px, 2.5vw, 32px) !important}
[id^=picture] img {width: 100%; height: 100%; object-fit: contain}
.gradio-container {max-width: 1240px !important; margin: auto}
"""


def make_picture(**options):
    """A picture's input that hands on the file as it is: who uses it decides what may be decoded."""
    return gr.Image(type="filepath", image_mode=None, **options)


# gradio's own opens the file before anybody has checked it. On the class, since sessions build components anew, and
# not in a class of our own, for which gradio would write a stub beside this file.
gr.Image.preprocess = lambda self, payload: None if payload is None else payload.path
_keep = gr.Image.async_move_resource_to_block_cache


async def keep(self, path):
    """Refuse addresses: gradio would fetch what lies there, however large it is, before anybody has checked it."""
    if isinstance(path, str) and path.startswith(("http://", "https://")):
        raise Refused("Send the picture itself, not its address: an upload, or data:image/png;base64,...")
    return await _keep(self, path)


gr.Image.async_move_resource_to_block_cache = keep


def tabs():
    """Lay out what a prediction fills; returns the components in the order of `results`."""
    head = gr.HTML(EMPTY, elem_id="summary")
    state = gr.State(time_to_live=3600)
    with gr.Tabs(visible=False, elem_id="results") as box:
        with gr.Tab("Table"):
            grid = gr.HTML(elem_id="table", padding=False)
            files = gr.HTML(elem_id="files")
        with gr.Tab("Path"):
            path = gr.Plot(show_label=False, elem_id="path", format="png")
            path_note = gr.Markdown(elem_id="path-note")
            overlay = gr.Plot(show_label=False, elem_id="overlay", format="png")
        with gr.Tab("Per dimension"):
            dimensions = gr.Plot(show_label=False, elem_id="dimensions", format="png")
        with gr.Tab("What the model computed"):
            with gr.Column(visible=False) as denoising_box:
                gr.Markdown(
                    "The head begins with noise and takes it away step by step. Blue: the first sample behind a step; "
                    "dashed: what it becomes."
                )
                denoising_step = gr.Slider(1, 2, step=1, label="Denoising step", elem_id="denoising-step")
                denoising = gr.Plot(show_label=False, elem_id="denoising", format="png")
            with gr.Column(visible=False) as grid_box:
                gr.Markdown(
                    "The model chooses a cell of its action grid: direction and length of the hand's motion in one "
                    "token. Red: the direction of the chosen cell."
                )
                action = gr.Slider(0, 1, step=1, label="Action of the chunk", elem_id="action")
                sphere = gr.Plot(show_label=False, elem_id="sphere", format="png")
            with gr.Column(visible=False) as token_box:
                tokens = gr.HTML(elem_id="tokens", padding=False)
                gr.Markdown("How sure it was of each token that it chose:")
                sure = gr.Plot(show_label=False, elem_id="sure", format="png")
            with gr.Column(visible=False) as depth_box:
                gr.Markdown("The depth that the model estimates from the picture, by which it places what it sees.")
                depth = gr.Plot(show_label=False, elem_id="depth", format="png")
            nothing = gr.Markdown("This model computes its actions in one pass: there is nothing in between to show.")
        with gr.Tab("Meaning"):
            words = gr.Markdown(elem_id="meaning")
    link = gr.Textbox(
        label="Link to this prediction", buttons=["copy"], interactive=False, visible=False, elem_id="link",
        info="Restores model, example, instruction, state and seed; a picture of your own stays here.",
    )  # fmt: skip
    quick = {"queue": True, "show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}
    denoising_step.change(show_denoising, [state, denoising_step], denoising, **quick)
    action.change(show_action, [state, action], [sphere, tokens], **quick)
    return [
        *(head, state, box, grid, files, path, path_note, overlay, dimensions),
        *(denoising_box, denoising_step, denoising, grid_box, action, sphere, token_box, tokens, sure),
        *(depth_box, depth, nothing, words, link),
    ]


def share_link(outputs):
    """The link among the components of `tabs`."""
    return outputs[-1]


def results(checkpoint, pictures, prediction, asked, camera, example, link):
    """Values of the components of `tabs`.

    Args:
        checkpoint ([`predict.Checkpoint`]), prediction ([`predict.Prediction`]): the model and its answer.
        pictures (`dict[str, PIL.Image.Image]`): what it saw.
        asked (`dict`): instruction, state, seed and so on.
        camera (`str`): whose picture the path is drawn into.
        example (`bool`): whether the pictures are the example's.
        link (`str`): query of the link that restores the form.
    """
    key = asked["dataset"]
    spec, _ = checkpoint.codec.specs(key)
    names, samples = checkpoint.names(key)[0], prediction.samples
    headers, rows = table(samples[0], names, spec.control_hz if spec else None)
    path, reason = plot_path(samples, spec)
    overlay, hidden = None, None
    if reason is None and camera in pictures:
        scene, seen = (checkpoint.example or {}).get("scene"), pictures[camera]
        pixels, hidden = picture_path(samples, spec, checkpoint.cameras(key)[camera], scene, example, seen.size)
        overlay = None if pixels is None else plot_picture(seen, pixels)
    inside = {"denoising": prediction.denoising, "names": names, "tokens": prediction.tokens}
    inside |= {"directions": prediction.directions, "tokenizer": checkpoint.codec.tokenizer}
    denoising, tokens = prediction.denoising, prediction.tokens
    steps = 0 if denoising is None else len(denoising)
    note = reason or "\n\n".join(filter(None, [path_words(spec), hidden]))
    sphere, candidates = show_action(inside, 0)
    return [
        summary(checkpoint, prediction, spec),
        inside,
        gr.update(visible=True),
        to_html(headers, rows),
        downloads(record(checkpoint, prediction, asked)),
        gr.update(value=path, visible=path is not None),
        note,
        gr.update(value=overlay, visible=overlay is not None),
        plot_dimensions(samples, names),
        gr.update(visible=steps > 0),
        gr.update(maximum=max(steps, 2), value=1),
        plot_denoising(denoising, names, 1) if steps else None,
        gr.update(visible=prediction.directions is not None),
        gr.update(maximum=max(len(samples[0]) - 1, 1), value=0),
        sphere,
        gr.update(visible=tokens is not None),
        candidates,
        plot_tokens(tokens) if tokens else None,
        gr.update(visible=prediction.depth is not None),
        None if prediction.depth is None else plot_depth(prediction.depth),
        gr.update(visible=denoising is None and tokens is None),
        meaning(checkpoint, key),
        gr.update(value=link, visible=True),
    ]


def path_words(spec):
    """What the drawn path is, in a sentence or two."""
    if spec.kind == "absolute_ee":
        return "Where the hand is asked to be, in robot units; blue is the first sample, grey are the others."
    return (
        "The motions of the actions, added up from where the hand is now (green), in robot units: where the hand "
        "would go if the arm followed each command exactly. Blue is the first sample, grey are the others."
    )


@sentences
def show_denoising(inside, step):
    """Draw another denoising step of this visitor's last prediction."""
    if not inside or inside["denoising"] is None:
        return None
    step = max(1, min(int(step), len(inside["denoising"])))
    return plot_denoising(inside["denoising"], inside["names"], step)


@sentences
def show_action(inside, action):
    """Draw the grid cells, and list the candidates, of another action of this visitor's last prediction."""
    if not inside or inside["tokens"] is None:
        return None, None
    tokens, tokenizer = inside["tokens"], inside["tokenizer"]
    action = max(0, min(int(action), tokens[-1]["action"]))
    candidates = to_html(*token_table(tokens, action, tokenizer))
    if inside["directions"] is None:
        return None, candidates
    chances = inside["directions"][action]
    chosen = next(token["id"] for token in tokens if token["action"] == action)  # translation comes first
    row, column = divmod(chosen // tokenizer.num_bins[2], tokenizer.num_bins[1])
    edges = tokenizer.edges["theta"], tokenizer.edges["phi"]
    return plot_directions(chances, edges, (row, column)), candidates
