"""Take the vision-language model out of a TinyVLA: `python scripts/take_backbone.py TINYVLA OUT`.

What one model learnt to see, others can begin with: OUT is a checkpoint of transformers' for image and text to text,
the `model.backbone` of a DiVLA, and OUT/vision its vision tower alone, the `model.vision_model` of a SpatialVLA. The
head over its words is none that TinyVLA has; it begins as the words' embeddings.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from hf_vla.models.tinyvla.modeling_tinyvla import TinyVLAForActionPrediction


def main(arguments: list[str] | None = None):
    """Load, take apart, save.

    Args:
        arguments (`list[str]`, *optional*): instead of those of the command line.

    Raises:
        SystemExit: the checkpoint is no TinyVLA.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tinyvla", help="folder or Hub name")
    parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    model, processor = (auto.from_pretrained(options.tinyvla) for auto in (AutoModel, AutoProcessor))
    if not isinstance(model, TinyVLAForActionPrediction):
        raise SystemExit(f"Expected a TinyVLA, {options.tinyvla!r} is a {model.config.model_type}.")
    vlm = AutoModelForImageTextToText.from_config(model.config.backbone_config)
    vlm.model.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        vlm.get_output_embeddings().weight.copy_(vlm.get_input_embeddings().weight)
    vlm.save_pretrained(options.out)
    processor.tokenizer.save_pretrained(options.out)
    processor.image_processor.save_pretrained(options.out)
    vlm.model.vision_tower.save_pretrained(options.out / "vision")


if __name__ == "__main__":
    main()
