"""Take the vision-language model out of a TinyVLA: `python scripts/take_backbone.py TINYVLA OUT`.

What one model learnt to see, others can begin with: OUT is a checkpoint of transformers' for image and text to text,
the `model.backbone` of a DiVLA, and OUT/vision its vision tower alone, the `model.vision_model` of a SpatialVLA, which
shows it pictures in [-1, 1], as SigLIP's are: a TinyVLA's own normalisation goes into the first weights. The head over
its words is none that TinyVLA has; it begins as the words' embeddings.
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
    tower = vlm.model.vision_tower
    take_normalization(tower.embeddings.patch_embedding, processor.image_processor)
    tower.save_pretrained(options.out / "vision")


@torch.no_grad()
def take_normalization(patches: torch.nn.Conv2d, image_processor) -> None:
    """Let a patch embedding see pictures in [-1, 1] as it saw those of its image processor."""
    mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    patches.bias += (patches.weight.sum((2, 3)) * ((0.5 - mean) / std)).sum(1)
    patches.weight *= (0.5 / std)[:, None, None]


if __name__ == "__main__":
    main()
