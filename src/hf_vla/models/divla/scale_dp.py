"""The published action experts (ScaleDP) -> a diffusion head of ours: weights to start a training from.

Source: ScaleDP, https://huggingface.co/papers/2409.14411; DexVLA, https://huggingface.co/papers/2502.05855
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from hf_vla.actions.heads.base import ActionHead
from hf_vla.actions.heads.diffusion import DiffusionHead
from hf_vla.actions.heads.networks.dit import DiT
from hf_vla.models.conversion import find_checkpoint, read_weights, rename

_SIZES = {
    "scale_dp_l": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "scale_dp_h": {"hidden_size": 1280, "depth": 32, "num_heads": 16},
}
# `head_config` of the experts `lesjie/scale_dp_l` and `lesjie/scale_dp_h`, behind ScaleDP's own condition encoder.
# The files hold trunks alone, with places for 50 actions.
SCALE_DP_HEADS: dict[str, dict[str, Any]] = {
    name: {
        "type": "diffusion",
        "condition": {"norm": False, "combine": "mlp"},
        "denoiser": {"type": "dit", **sizes, "timestep_embedding_dtype": "bfloat16"},
    }
    for name, sizes in _SIZES.items()
}
_CONDITION = (("combine.", "condition_encoder.combine."), ("norm_after_pool.", "condition_encoder.norm."))
# Weights of ScaleDP whose shapes depend on the robot, or on what conditions the actions
_ADAPTERS = re.compile(r"denoiser\.((x_embedder|cond_obs_emb|final_layer\.linear)\..*|pos_embed)")
_EXPERTS = ("policy_head.", "noise_pred_net.")
_WRAPPERS = re.compile(r"^((module|model|policy|policy_head|noise_pred_net)\.)*")


class LoadedWeights(NamedTuple):
    """What [`load_scale_dp`] did not do.

    Args:
        left_out (`list[str]`): weights of the source, by its names, that the head has no use for.
        fresh (`list[str]`): weights of the head, by its names, that are as they were.
    """

    left_out: list[str]
    fresh: list[str]


@torch.no_grad()
def load_scale_dp(head: ActionHead, source: str | Path) -> LoadedWeights:
    """Give a head the weights of a published action expert (ScaleDP), such as `lesjie/scale_dp_h`.

    [`SCALE_DP_HEADS`] has the `head_config` of each: ScaleDP-L is 24 blocks of width 1024, ScaleDP-H 32 of 1280, both
    with 16 attention heads (which no weight tells). They are published as pickles; where you trust those:

    ```python
    >>> weights = torch.load("open_scale_dp_h_backbone.ckpt", weights_only=True)["nets"]["nets"]
    >>> safetensors.torch.save_file(weights, "scale_dp_h.safetensors")
    >>> left_out, fresh = load_scale_dp(model.action_head, "scale_dp_h.safetensors")
    ```

    What depends on the robot or on the condition stays as it is where its shape differs; of longer chunks the first
    positions are taken. An expert that was trained alone (`noise_pred_net.`) was conditioned by another network: what
    reads the condition (`cond_obs_emb`) is never taken from it, as in the published fine-tuning.

    Args:
        head ([`~hf_vla.actions.heads.diffusion.DiffusionHead`]): with a denoiser `"dit"` whose conditioning is
            `"adaln_zero"` or `"cross_attention"`.
        source (`str` or `Path`): a `.safetensors` file, a folder with `model.safetensors` (or its shards), or a name
            on the Hub. Names may begin with `policy.`, `policy_head.`, `noise_pred_net.` or several of these;
            networks beside it are left out.

    Returns:
        [`LoadedWeights`]: what was left out, and what is as it was.

    Raises:
        ValueError: the head is of another kind, depth or width, or weights are pickled or missing.
        OSError: there is no such file or folder.
    """
    denoiser = getattr(head, "denoiser", None)
    if not isinstance(head, DiffusionHead) or not isinstance(denoiser, DiT) or denoiser.in_context:
        raise ValueError(
            "Expected a diffusion head with a denoiser 'dit' that is modulated by adaln_zero, as SCALE_DP_HEADS has "
            f"it, got {type(head).__name__} with {type(denoiser).__name__}."
        )
    published = _read_expert(source)
    own = head.state_dict()
    names = _of_the_expert(published)
    _check_trunk({ours: published[name] for name, ours in names.items()}, own, source)
    loaded, left_out = {}, set(published) - set(names)
    for name, ours in names.items():
        tensor = published[name]
        if ours == "denoiser.pos_embed":
            tensor = tensor[:, : own[ours].shape[1]]
        alone = "noise_pred_net." in name and ours.startswith("denoiser.cond_obs_emb.")
        if ours not in own or tensor.shape != own[ours].shape or alone:
            left_out.add(name)
        else:
            loaded[ours] = tensor
    head.load_state_dict(loaded, strict=False)
    return LoadedWeights(sorted(left_out), sorted(own.keys() - loaded.keys()))


def _read_expert(source):
    path = Path(source)
    if path.is_file() and path.suffix != ".safetensors":
        raise ValueError(
            f"Expected safetensors, came {path.name}. Pickles can run any code and are never read here: load it where "
            'you trust it, weights = torch.load(file, weights_only=True)["nets"]["nets"] (the published experts lie '
            'there), and write them with safetensors.torch.save_file(weights, "model.safetensors").'
        )
    return load_file(path) if path.is_file() else read_weights(find_checkpoint(source))


def _of_the_expert(published):
    """Names of the action expert's weights, and ours: those that say that they are its, or all, where none does."""
    bare = {name: _WRAPPERS.sub("", name) for name in published}
    named = [name for name in published if any(expert in name.removesuffix(bare[name]) for expert in _EXPERTS)]
    names = {}
    for name in named or published:
        ours = rename(bare[name], _CONDITION)
        names[name] = ours if ours != bare[name] else f"denoiser.{ours}"
    return names


def _check_trunk(published, own, source):
    """Raise where the blocks and what modulates them are not those of the head; both by our names."""
    if not any(name.startswith("denoiser.blocks.") for name in published):
        raise ValueError(f"Expected the weights of a ScaleDP (blocks.0.attn.qkv.weight, ...) in {source}; none is.")
    if (found := _trunk_sizes(published)) != (wanted := _trunk_sizes(own)):
        raise ValueError(
            f"Expected a depth of {wanted[0]}, a hidden_size of {wanted[1]} and MLPs of {wanted[2]}, as the head has, "
            f"got a depth of {found[0]}, a hidden_size of {found[1]} and MLPs of {found[2]} in {source}: build the "
            "head as SCALE_DP_HEADS says, or choose the expert of its size."
        )
    blocks = {name for name in own if name.startswith("denoiser.") and ".cross_attn." not in name}
    trunk = {name for name in blocks if not _ADAPTERS.fullmatch(name)}
    if missing := sorted(trunk - published.keys()):
        raise ValueError(f"Expected all of the trunk's weights in {source}; missing are {missing}.")


def _trunk_sizes(weights):
    """Depth, width and width of the MLPs; 0 for what cannot be seen."""
    depth = len({name.split(".")[2] for name in weights if name.startswith("denoiser.blocks.")})
    mlp_dim, width = getattr(weights.get("denoiser.blocks.0.mlp.fc1.weight"), "shape", (0, 0))
    return depth, width, mlp_dim
