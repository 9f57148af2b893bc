import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module", params=["bf16emb", "fp32emb"])
def published(request, goldens):
    """The recorded tiny UNet head in ours, with its inputs (cut to a chunk) and outputs."""
    from hf_vla.actions.heads.diffusion import DiffusionHead

    folder = goldens / "unet1d" / "tinyvla_a"
    meta = json.loads((folder / "meta.json").read_text())
    case = meta["case"]
    denoiser = {
        "type": "conditional_unet1d",
        "down_dims": case["down"],
        "diffusion_step_embed_dim": case["dsed"],
        "timestep_embedding_dtype": {"bf16emb": "bfloat16", "fp32emb": "float32"}[request.param],
    }
    head = DiffusionHead(case["C"], case["A"], case["T"], case["S"], denoiser=denoiser, reduction="published")
    names = {"norm_after_pool": "condition_encoder.norm", "combine": "condition_encoder.combine"}
    weights = {}
    for name, tensor in load_file(folder / "weights.safetensors").items():
        module, _, rest = name.partition(".")
        weights[f"{names.get(module, f'denoiser.{module}')}.{rest}"] = tensor
    head.load_state_dict(weights)
    inputs = load_file(folder / "inputs.safetensors")
    batch = {
        "features": inputs["hidden_states"],
        "feature_mask": torch.ones(inputs["hidden_states"].shape[:2], dtype=torch.bool),
        "state": inputs["states"],
    }
    chunk = {"actions": inputs["actions"][:, : case["T"]], "action_mask": ~inputs["is_pad"][:, : case["T"]]}
    outputs = load_file(folder / f"outputs_{request.param}.safetensors")
    return SimpleNamespace(
        head=head, batch=batch, chunk=chunk, inputs=inputs, outputs=outputs, param_names=meta["param_names"]
    )
