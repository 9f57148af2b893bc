import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration

CASES = ("zoe1_spatial_chunk4", "nozoe_nospatial_tied_batch2_pad_chunk1")


@pytest.fixture(scope="session", params=CASES)
def published(request, goldens):
    """A checkpoint in the published layout with the inputs and outputs that the published system recorded."""
    folder = goldens / "spatialvla" / request.param
    inputs, outputs = load_file(folder / "inputs.safetensors"), load_file(folder / "outputs.safetensors")
    model, info = SpatialVLAForConditionalGeneration.from_pretrained(folder / "checkpoint", output_loading_info=True)
    model.requires_grad_(False)
    return SimpleNamespace(
        name=request.param,
        path=folder / "checkpoint",
        folder=folder,
        model=model,
        info=info,
        case=json.loads((folder / "case.json").read_text()),
        inputs=inputs,
        outputs=outputs,
        infer={
            "input_ids": inputs["infer.input_ids"],
            "attention_mask": inputs["infer.attention_mask"],
            "pixel_values": inputs["infer.pixel_values"],
            "intrinsics": inputs["infer.intrinsic"],
        },
        train={
            "input_ids": inputs["train.input_ids"],
            "attention_mask": inputs["train.attention_mask"],
            "pixel_values": inputs["train.pixel_values"],
            "intrinsics": inputs["train.intrinsic"],
            "labels": inputs["train.labels"],
        },
    )


@pytest.fixture(scope="session")
def tiny_config():
    return SpatialVLAConfig.from_preset("tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    torch.manual_seed(0)
    return SpatialVLAForConditionalGeneration(tiny_config).eval()


@pytest.fixture
def tiny_inputs(tiny_config):
    """Two prompts of different length, the shorter padded on the left."""
    generator = torch.Generator().manual_seed(1)
    num_patches, image = tiny_config.num_image_tokens, tiny_config.image_token_index
    long = [image] * num_patches + [2] + list(range(40, 60)) + [13]
    short = [image] * num_patches + [2] + list(range(70, 80)) + [13]
    pad = len(long) - len(short)
    return {
        "input_ids": torch.tensor([long, [0] * pad + short]),
        "attention_mask": torch.tensor([[1] * len(long), [0] * pad + [1] * len(short)]),
        "pixel_values": torch.rand(2, 3, 84, 84, generator=generator),
        "intrinsics": torch.tensor([[90.0, 0.0, 42.0], [0.0, 90.0, 42.0], [0.0, 0.0, 1.0]]).expand(2, 3, 3),
    }
