"""Everything that a checkpoint computes; run as a program, with hf_vla barred from being imported.

`outputs.py TARGET NAME=FOLDER ...` loads checkpoints as remote code and saves what they compute as TARGET, by name. A
folder may also be a name on the Hub, with `@revision` behind it. A name that ends with `again` stands for what is
saved, moved and loaded twice before.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor


class Barrier:
    """An entry of `sys.meta_path` that refuses hf_vla."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_vla":
            raise ModuleNotFoundError("No module named 'hf_vla'", name=name)


def load(path, auto_class=AutoModel, trust=True, dtype=None, **options):
    options |= {"trust_remote_code": trust}
    return auto_class.from_pretrained(path, dtype=dtype, **options), AutoProcessor.from_pretrained(path, **options)


def outputs(model, processor):
    """What a model and its processor make of two random samples, as arrays by name."""
    rng, codec = np.random.default_rng(0), processor.action_codec
    key = codec.keys[0]
    cameras = processor.camera_specs(key)
    pictures = [
        {camera.name: rng.integers(0, 255, (camera.height, camera.width, 3), np.uint8) for camera in cameras}
        for _ in range(2)
    ]
    options = {"images": pictures, "text": ["push the puck", "open it"], "unnorm_key": key}
    spatial = model.config.model_type == "spatialvla"
    if spatial:
        options["images"] = [picture.popitem()[1] for picture in pictures]
    elif codec.takes_state:
        options["state"] = rng.uniform(-1, 1, (2, codec.normalizer(key).action_dim))
    found = {}

    def predict(name, **others):
        inputs = processor(**options, **others).to(model.dtype)
        random = {} if spatial else {"generator": torch.Generator().manual_seed(0)}
        output = model.predict_action(**inputs, **random)
        found.update({f"{name}.{field}": output[field] for field in ("actions", "action_ids") if field in output})
        if spatial:
            found[f"{name}.logits"] = output.logits
        found[f"{name}.robot"] = processor.decode_actions(output, key)
        if getattr(output, "reasoning_ids", None) is not None:
            found[f"{name}.reasoning"] = np.array(processor.decode_reasoning(output))

    predict("predicted")
    if spatial:  # the depth of ZoeDepth, then the robot's own
        pixels = processor(**options)["pixel_values"].to(model.dtype)
        if model.config.use_vision_zoe:
            found["depth"] = model.estimate_depth(pixels)
        predict("with_depth", depth=rng.uniform(0.5, 2.0, (2, 40, 40)))
    if model.config.model_type == "divla":
        options["reasoning"] = ["the puck is red", ""]
        predict("told")
    actions = rng.uniform(-0.5, 0.5, (2, codec.chunk_size, codec.normalizer(key).action_dim))
    batch = processor(**options, actions=actions).to(model.dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        found["loss"] = model(**batch).loss
    arrays = {name: torch.as_tensor(x).float().numpy() for name, x in found.items() if not isinstance(x, np.ndarray)}
    return {name: arrays.get(name, x) for name, x in found.items()}


def check_refusal(path):
    """Without trust nothing of it runs, and nothing else is loaded in its place."""
    for auto_class in (AutoModel, AutoProcessor):
        for trust in (None, False):
            try:
                auto_class.from_pretrained(path, trust_remote_code=trust)
            except ValueError as error:
                assert "trust_remote_code=True" in str(error), error
            else:
                raise AssertionError(f"{auto_class.__name__} loaded {path} with trust_remote_code={trust}")


def again(path, generations=2):
    """Save, move and load; returns the last folder."""
    for generation in range(generations):
        model, processor = load(path)
        saved = Path(f"{path}_{generation}")
        model.save_pretrained(saved)
        processor.save_pretrained(saved)
        path = saved.rename(saved.with_name(f"moved_{saved.name}"))
        assert all(file.read_text().startswith("# Written by hf_vla ") for file in path.glob("*.py"))
    return path


def main(target, *places):
    sys.meta_path.insert(0, Barrier())
    found, first = {}, places[0].partition("=")[2].partition("@")[0]
    check_refusal(first)
    for place in places:
        name, _, path = place.partition("=")
        path, _, revision = path.partition("@")
        options = {"revision": revision} if revision else {}
        auto_class = AutoModelForImageTextToText if name == "text_to_text" else AutoModel
        options |= {"dtype": torch.bfloat16} if name == "bfloat16" else {}
        model, processor = load(again(path) if name.endswith("again") else path, auto_class, **options)
        for part in (model, processor, model.config):
            assert type(part).__module__.startswith("transformers_modules."), type(part)
        found |= {f"{name}/{field}": value for field, value in outputs(model, processor).items()}
    assert not [name for name in sys.modules if name.split(".")[0] == "hf_vla"]
    np.savez(target, **found)

    sys.meta_path.pop(0)  # whoever installs it later gets the installed classes
    import hf_vla  # noqa: F401

    for trust in (None, True):
        model, processor = load(first, trust=trust)
        for part in (model, processor, model.config):
            assert type(part).__module__.startswith("hf_vla."), type(part)


if __name__ == "__main__":
    main(*sys.argv[1:])
