import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module", params=["bf16emb", "fp32emb"])
def published(request, goldens):
    """The UNet head of a recorded TinyVLA in ours, with its inputs (cut to a chunk) and outputs.

    It pooled over padding, too. Gradients were recorded with the bfloat16 embedding only.
    """
    from hf_vla.actions.heads.diffusion import DiffusionHead

    folder = goldens / "tinyvla" / "clip_2cam_a"
    sizes = json.loads((folder / "checkpoint" / "config.json").read_text())["golden_unet"]
    dtype = {"bf16emb": "bfloat16", "fp32emb": "float32"}[request.param]
    denoiser = {"type": "conditional_unet1d", "timestep_embedding_dtype": dtype, **sizes}
    head = DiffusionHead(48, 10, 16, 7, denoiser=denoiser, reduction="published")
    names = {"norm_after_pool": "condition_encoder.norm", "combine": "condition_encoder.combine"}

    def of_the_head(values):
        parts = {name: name.split(".", 2) for name in values if name.startswith("embed_out.")}
        return {f"{names.get(m, f'denoiser.{m}')}.{rest}": values[name] for name, (_, m, rest) in parts.items()}

    head.load_state_dict(of_the_head(load_file(folder / "checkpoint" / "model.safetensors")))
    inputs = load_file(folder / "inputs.safetensors")
    features = load_file(folder / "outputs_bf16emb.safetensors")["hidden_2"]
    outputs = load_file(folder / f"outputs_{request.param}.safetensors")
    norms = outputs.get("grad_norm_per_param")
    listed = json.loads((folder / "grad_norm_names.json").read_text())
    listed = of_the_head(dict(zip(listed, [None] * len(listed) if norms is None else norms.tolist(), strict=True)))
    return SimpleNamespace(
        head=head,
        batch={
            "features": features,
            "feature_mask": torch.ones(features.shape[:2], dtype=torch.bool),
            "state": inputs["states"],
        },
        chunk={"actions": inputs["actions"][:, :16], "action_mask": ~inputs["is_pad"][:, :16]},
        inputs=inputs,
        outputs=outputs,
        names=set(listed),
        gradients={} if norms is None else listed,
    )
