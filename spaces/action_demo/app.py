"""The Space: an image and an instruction go in, a chunk of robot actions comes out, and what the model computed.

`python app.py`, or `hf-vla space` from a clone. This file has the layout and the events; predict.py the models.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

try:
    import spaces  # patches torch, so that it has to come before torch and gradio; only ZeroGPU has it

    on_gpu = spaces.GPU(duration=60)
except (ImportError, AttributeError):  # AttributeError: the folder of that name in a clone
    spaces = None

    def on_gpu(function):
        """Leave a function as it is, where there is no ZeroGPU."""
        return function


import gradio as gr
from form import FIELDS, change_dataset, change_model, check_upload, form, num_pictures, restore, show_camera
from guards import (
    MAX_MEGABYTES,
    MAX_SAMPLES,
    MAX_SEED,
    MAX_STEPS,
    Refused,
    check_instruction,
    parse_state,
    parse_whole,
    read_picture,
    sentences,
)
from page import CSS, INTRODUCTION, make_picture, results, share_link, tabs
from predict import CHECKPOINTS, example_pictures, find, load
from texts import query, record

HERE = Path(__file__).parent
SHIPPED = ("tinyvla_metaworld", "spatialvla_metaworld", "divla_metaworld", "spatialvla_robosuite")
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model"}
PRIVATE = {"api_visibility": "private"}


@on_gpu
def run(name, *arguments):
    """Predict with a checkpoint; plain data in and out, since on ZeroGPU this is another process."""
    return CHECKPOINTS[name].run(*arguments)


def ask(model, dataset, instruction, state, seed, num_samples, num_steps, paths):
    """Check what was asked, predict, and return checkpoint, pictures, answer and what was asked."""
    checkpoint = find(model)
    key = checkpoint.key(dataset)
    names = checkpoint.names(key)[1]
    if names is None and (state or "").strip():
        raise Refused("This model is not told the robot's state: leave the state out.")
    asked = {
        "model": model,
        "dataset": key,
        "instruction": check_instruction(instruction),
        "state": parse_state(state, names) if names else None,
        "seed": parse_whole(seed, "The seed", 0, MAX_SEED),
        "num_samples": parse_whole(num_samples, "The number of samples", 1, MAX_SAMPLES),
        "num_inference_steps": None,
    }
    if checkpoint.denoises and num_steps:
        asked["num_inference_steps"] = parse_whole(num_steps, "The number of denoising steps", 1, MAX_STEPS)
    pictures = {
        name: read_picture(path)
        for name, path in zip(checkpoint.cameras(key), paths, strict=False)
        if path is not None
    }
    options = (asked["seed"], asked["num_samples"], asked["num_inference_steps"])
    prediction = run(model, pictures, asked["instruction"], asked["state"], key, *options)
    return checkpoint, pictures, prediction, asked


@sentences
def predict(
    image: str,
    instruction: str,
    model: str = "",
    dataset: str = "",
    state: str = "",
    seed: float = 0,
    num_samples: float = 1,
    num_inference_steps: float = 0,
    *more_images: str,
) -> dict:
    """Predict a chunk of robot actions from a camera picture and an instruction.

    Args:
        image: picture of the robot's first camera (PNG, JPEG, WebP, GIF or BMP; at most 24 megapixels).
        instruction: what the robot is to do, such as "Open a drawer".
        model: name of the model; empty for the first one.
        dataset: whose robot acts (unnorm_key); empty for the model's first dataset.
        state: the robot's state in the dataset's units, numbers parted by blanks; empty where the model takes none.
        seed: whole number that makes the noise repeatable.
        num_samples: how many chunks to draw, 1 to 16; further ones use the seeds that follow.
        num_inference_steps: denoising steps of diffusion and flow heads; 0 for the model's own.
        more_images: pictures of the robot's further cameras, in the checkpoint's order.

    Returns:
        JSON with names (of the dimensions), spec (kind, frame, rotation, rate, gripper), actions (chunk x dimensions,
        robot units), samples (all chunks), reasoning, denoising, tokens, seconds, device and notes.
    """
    model = model or next(iter(CHECKPOINTS))
    steps = parse_whole(num_inference_steps or 0, "The number of denoising steps", 0, MAX_STEPS)
    checkpoint, _, prediction, asked = ask(
        model, dataset, instruction, state, seed, num_samples, steps, [image, *more_images]
    )
    return record(checkpoint, prediction, asked)


@sentences
def press(model, dataset, camera, instruction, state, seed, num_samples, num_steps, *paths):
    """What the button does: predict, and fill all of the page's results."""
    checkpoint, pictures, prediction, asked = ask(
        model, dataset, instruction, state, seed, num_samples, num_steps, paths
    )
    example = checkpoint.is_example(pictures)
    link = query(
        model=model,
        dataset=asked["dataset"],
        camera=camera,
        instruction=asked["instruction"],
        state=state if asked["state"] is not None else None,
        seed=asked["seed"],
        samples=asked["num_samples"],
        steps=asked["num_inference_steps"],
        picture=None if example else "own",
    )
    return results(checkpoint, pictures, prediction, asked, camera, example, link)


def build():
    """The page, for the checkpoints that are loaded.

    Returns:
        `gradio.Blocks`
    """
    first = next(iter(CHECKPOINTS))
    values = [{name: value for name, value in update.items() if name != "__type__"} for update in form(first)]
    start = dict(zip(FIELDS, values, strict=False))
    with gr.Blocks(
        title="hf_vla: actions of small robot models", analytics_enabled=False, delete_cache=(300, 1800)
    ) as page:
        gr.HTML(INTRODUCTION)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=300):
                model = gr.Dropdown([*CHECKPOINTS], label="Model", elem_id="model", **start["model"])
                pictures = [
                    make_picture(
                        height=230, elem_id=f"picture{place}", sources=["upload", "webcam", "clipboard"], **options
                    )
                    for place, options in enumerate(values[len(FIELDS) :])
                ]
                copies = map(pictures[0].move_resource_to_block_cache, example_pictures())
                pictures[0].keep_in_cache.update(copies)  # uploads are deleted, they are not
                instruction = gr.Textbox(
                    label="Instruction", elem_id="instruction", max_length=500, **start["instruction"]
                )
                button = gr.Button("Predict the actions", variant="primary", elem_id="predict", interactive=False)
                with gr.Accordion("State, dataset, camera, samples", open=False, elem_id="more"):
                    state = gr.Textbox(label="State of the robot", elem_id="state", **start["state"])
                    with gr.Row():
                        dataset = gr.Dropdown(
                            label="Dataset (unnorm_key)", elem_id="dataset", min_width=120, **start["dataset"]
                        )
                        camera = gr.Dropdown(label="Camera", elem_id="camera", min_width=120, **start["camera"])
                    samples = gr.Slider(1, MAX_SAMPLES, step=1, label="Samples", elem_id="samples", **start["samples"])
                    with gr.Row():
                        seed = gr.Number(
                            label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed", min_width=120,
                            **start["seed"],
                        )  # fmt: skip
                        steps = gr.Number(
                            label="Denoising steps", precision=0, minimum=1, maximum=MAX_STEPS, elem_id="steps",
                            min_width=120, **start["steps"],
                        )  # fmt: skip
                shown = [name for name, each in CHECKPOINTS.items() if each.example]
                if shown:
                    examples = gr.Dataset(
                        components=["textbox"],
                        samples=[[f"{CHECKPOINTS[name].example['task']} ({name})"] for name in shown],
                        type="index",
                        label="Examples",
                        elem_id="examples",
                    )
            with gr.Column(scale=6, min_width=300):
                outputs = tabs()

        form_parts = [model, dataset, camera, instruction, state, seed, samples, steps, *pictures]
        on_press = {"inputs": form_parts, "outputs": outputs, **ONE_AT_A_TIME, **PRIVATE}
        for event in (button.click, instruction.submit):
            event(press, **on_press).success(None, [share_link(outputs)], [share_link(outputs)], js=LINK, **PRIVATE)
        ready = page.load(restore, None, form_parts, **PRIVATE)
        ready.then(lambda: gr.update(interactive=True), None, button, **PRIVATE)  # not before the form is
        quick = {"outputs": form_parts, "show_progress": "hidden", **PRIVATE}
        model.input(change_model, [model, instruction, *pictures], **quick)
        dataset.input(change_dataset, [model, dataset, instruction, *pictures], **quick)
        camera.input(show_camera, [camera, model, dataset], pictures, **PRIVATE)
        if shown:
            examples.click(lambda index: form(shown[index]), examples, **quick)
        for picture in pictures:
            picture.upload(check_upload, picture, picture, show_progress="hidden", **PRIVATE)

        with gr.Column(visible=False):  # the API's own inputs, which know every model's datasets
            add_endpoint()
    page.queue(max_size=32, default_concurrency_limit=4)
    return page


LINK = """(link) => {
    if (!link) return link;
    const url = new URL(link.slice(link.indexOf("?")), window.location.origin + window.location.pathname);
    window.history.replaceState(null, "", url);
    return url.toString();
}"""


def add_endpoint():
    """The endpoint /predict, which is the MCP tool, too."""
    inputs = [
        make_picture(label="Picture of the first camera"),
        gr.Textbox(label="Instruction"),
        gr.Textbox(label="Model", value=next(iter(CHECKPOINTS))),
        gr.Textbox(label="Dataset (unnorm_key)", value=""),
        gr.Textbox(label="State of the robot", value=""),
        gr.Number(label="Seed", value=0),
        gr.Number(label="Samples", value=1),
        gr.Number(label="Denoising steps", value=0),
        *(make_picture(label=f"Picture of camera {place + 2}") for place in range(num_pictures() - 1)),
    ]
    gr.Button().click(predict, inputs, gr.JSON(label="prediction"), api_name="predict", **ONE_AT_A_TIME)


def launch(models=None, host="127.0.0.1", port=7860, share=False):
    """Serve checkpoints until the process is stopped.

    Args:
        models (`list[str]`, *optional*): folders or Hub names; the embedded ones by default.
        host (`str`), port (`int`): address to listen at.
        share (`bool`): also under a public address, through gradio's servers.

    Raises:
        ValueError, OSError: a checkpoint cannot be served, there is none, or the port is taken.
    """
    load(models or shipped(), warm_up=spaces is None)
    font = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # of the reader's machine
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=font, font_mono=("ui-monospace", "monospace")
    )
    page = build()
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=theme,
            css=CSS,
            max_file_size=MAX_MEGABYTES * 10**6,
            allowed_paths=example_pictures(),  # which may lie anywhere
            mcp_server=True,
            footer_links=["api"],
            ssr_mode=False,
            show_error=False,
            quiet=not share,  # its advice is for programmers; a public address must be told
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise OSError(f"The port {port} of {host} cannot be listened at: choose another one with --port.") from error
    print(f"Serving {', '.join(CHECKPOINTS)} at http://{host}:{port} (Ctrl-C stops it)", flush=True)
    page.block_thread()


def shipped():
    """Folders of the embedded checkpoints.

    Raises:
        ValueError: they are not there.
    """
    folders = [HERE / "checkpoints" / name for name in SHIPPED]
    if missing := [folder.name for folder in folders if not (folder / "config.json").is_file()]:
        raise ValueError(
            f"The checkpoints {', '.join(missing)} are not in {HERE / 'checkpoints'}: they come with a clone of the "
            "repository, not with the installed package. Give --model FOLDER_OR_HUB_NAME, or use a clone."
        )
    return [str(folder) for folder in folders]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="folder or Hub name; several times for several")
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", 7860)))
    parser.add_argument("--share", action="store_true")
    given = parser.parse_args()
    launch(given.model, given.host, given.port, given.share)
