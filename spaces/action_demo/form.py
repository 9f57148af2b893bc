"""The form: what a model, a link, an example or an upload writes into its fields."""

from pathlib import Path

import gradio as gr
from guards import MAX_SAMPLES, MAX_SEED, MAX_STEPS, Refused, parse_whole, read_picture, sentences
from predict import CHECKPOINTS, example_pictures, find

FIELDS = ("model", "dataset", "camera", "instruction", "state", "seed", "samples", "steps")


def num_pictures():
    """Places for pictures on the page: as many as the model of most cameras has."""
    return max(len(each.cameras(key)) for each in CHECKPOINTS.values() for key in each.codec.keys)


def form(model, dataset=None, **given):
    """Values and labels of the form for a model: its example, or what is given instead.

    Args:
        model (`str`): a checkpoint's name.
        dataset (`str`, *optional*): one of its datasets.
        given (`dict`): camera, instruction, state, seed, samples, steps and pictures (paths by camera).

    Returns:
        `list`: updates of model, dataset, camera, instruction, state, seed, samples, steps and the pictures.
    """
    checkpoint = find(model)
    key, example = checkpoint.key(dataset), checkpoint.example or {}
    cameras = [*checkpoint.cameras(key)]
    camera = given.get("camera") if given.get("camera") in cameras else cameras[0]
    names = checkpoint.names(key)[1]
    pictures = given.get("pictures", checkpoint.pictures if key == checkpoint.key() else {})
    updates = [
        gr.update(value=model),
        gr.update(choices=checkpoint.codec.keys, value=key, interactive=len(checkpoint.codec.keys) > 1),
        gr.update(choices=cameras, value=camera, interactive=len(cameras) > 1),
        gr.update(value=given.get("instruction", example.get("task", ""))),
        gr.update(
            visible=names is not None,
            value=given.get("state", checkpoint.default_state(key)) if names else "",
            info=", ".join(names or []),
        ),
        gr.update(value=given.get("seed", 0)),
        gr.update(value=given.get("samples", 4)),
        gr.update(value=given.get("steps", checkpoint.num_steps), visible=checkpoint.denoises),
    ]
    for place in range(num_pictures()):
        name = cameras[place] if place < len(cameras) else None
        label = "Picture" if name is None else f"Picture of the camera {name}"
        updates.append(gr.update(value=pictures.get(name), label=label, visible=name == camera))
    return updates


@sentences
def restore(request: gr.Request):
    """Fill the form as a link says, or with the first model's example."""
    wanted = dict(request.query_params)
    model = wanted.get("model") or next(iter(CHECKPOINTS))
    if model not in CHECKPOINTS:
        gr.Warning(f"The link is for the model {model[:80]!r}, which is not served here.")
        return form(next(iter(CHECKPOINTS)))
    given = {name: wanted[name][:2000] for name in ("camera", "instruction", "state") if name in wanted}
    try:
        bounds = {"seed": (0, MAX_SEED), "samples": (1, MAX_SAMPLES), "steps": (1, MAX_STEPS)}
        for name, (least, most) in bounds.items():
            if name in wanted:
                given[name] = parse_whole(float(wanted[name]), f"The link's {name}", least, most)
        if wanted.get("picture") == "own":
            gr.Info("The link was made with a picture of somebody's own, which a link does not hold: give it anew.")
            given["pictures"] = {}
        return form(model, wanted.get("dataset"), **given)
    except ValueError as error:
        gr.Warning(f"The link is not usable: {error}")
        return form(model)


@sentences
def change_model(model, instruction, *paths):
    """Take another model: with its example, but what the user gave of his own stays."""
    checkpoint, own = find(model), {}
    examples = [each.example["task"] for each in CHECKPOINTS.values() if each.example]
    if (instruction or "").strip() and instruction not in examples:
        own["instruction"] = instruction
    given = [path for path in paths if path is not None]
    if given and not any(_is_shipped(path) for path in given):
        own["pictures"] = dict(zip(checkpoint.cameras(), paths, strict=False))
    return form(model, **own)


def _is_shipped(path):
    own = Path(path).read_bytes() if Path(path).is_file() else None  # else gradio has deleted it
    return any(own == Path(each).read_bytes() for each in example_pictures())


@sentences
def change_dataset(model, dataset, instruction, *paths):
    """Take another dataset of the model: its cameras and state."""
    pictures = dict(zip(find(model).cameras(dataset), paths, strict=False))
    return form(model, dataset, instruction=instruction, pictures=pictures)


def check_upload(path):
    """Say at once that a picture is no use, and take it out of the form."""
    try:
        read_picture(path)
    except Refused as error:
        gr.Warning(error.message, duration=None, title="That is no picture for this")
        return None
    return gr.skip()


def show_camera(camera, model, dataset):
    """Show the place of a camera's picture and hide the others."""
    cameras = [*find(model).cameras(dataset)]
    return [gr.update(visible=cameras[place : place + 1] == [camera]) for place in range(num_pictures())]
