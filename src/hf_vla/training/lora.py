"""LoRA with the published targets of each family."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from hf_vla.training.optimization import PROJECTORS

logger = logging.getLogger(__name__)

# What vision-language models of transformers call their two parts.
PARTS = {"vision": ("vision_tower", "vision_model", "visual"), "language": ("language_model", "text_model")}


@dataclass(frozen=True)
class LoraRecipe:
    """Where a family's adapters sit, and how they are trained.

    Args:
        r (`int`), alpha (`int`), dropout (`float`): see [`~hf_vla.training.arguments.LoraArguments`].
        parts (`tuple[str, ...]`): of [`PARTS`], where adapters sit by default; an action expert always has some.
        targets (`list[str]` or `str`): ends of the layers' names, or "all-linear".
        excluded (`str`): regular expression of whole names that get none all the same.
        in_full (`tuple[str, ...]`): modules trained whole and saved with the adapter, as far as a model has them.
        init (`bool` or `str`): of the adapters, see peft's `init_lora_weights`.
    """

    r: int
    alpha: int
    dropout: float
    targets: list[str] | str
    excluded: str
    in_full: tuple[str, ...] = ()
    init: bool | str = True
    parts: tuple[str, ...] = ("vision", "language")


PUBLISHED = {
    "divla": LoraRecipe(
        r=64,
        alpha=256,
        dropout=0.05,
        targets="all-linear",  # of vision tower and language model: peft spares the language head, and what is in full
        excluded=rf"(.*\.)?({'|'.join(PROJECTORS)})(\..*)?",  # stays frozen
        # the parts of `film`, since peft would also find another "film" in it; all robots, though one dataset trains
        # one: the others are saved along, as they were
        in_full=("action_head", "prompt_proj", "reasoning_proj", "film.film", "embodiments"),
    ),
    "pi0_vla": LoraRecipe(
        r=32,  # openpi's in the expert, beside 16 in the language model, whose scale alpha / r is 1 as well
        alpha=32,
        dropout=0.0,
        targets="all-linear",  # of language model and action expert
        excluded=rf"(.*\.)?({'|'.join(PROJECTORS)})(\..*)?",  # frozen like the vision tower
        in_full=("embed_action_time", "action_out_proj"),
        parts=("language",),
    ),
    "spatialvla": LoraRecipe(
        r=32,
        alpha=32,
        dropout=0.0,
        targets=[
            *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),  # language model
            *("fc1", "fc2", "out_proj"),  # vision tower
            *("linear", "position_embedding_head.0", "position_embedding_head.3"),  # projector, Ego3D encoding
        ],
        excluded=r"vision_zoe_model\..*",  # parts of the frozen depth model bear the names of targets as well
        in_full=("action_mask_embedding",),  # of discrete diffusion
        init="gaussian",
    ),
    "tinyvla": LoraRecipe(
        r=64,
        alpha=256,
        dropout=0.05,
        targets="all-linear",  # of vision tower and language model
        excluded=rf"action_head\..*|lm_head|(.*\.)?({'|'.join(PROJECTORS)})(\..*)?",
        in_full=("action_head", *PROJECTORS),
    ),
}


def add_lora(
    model: PreTrainedModel,
    r: int | None = None,
    alpha: int | None = None,
    dropout: float | None = None,
    parts: Sequence[str] | None = None,
    in_full: Sequence[str] = (),
) -> PeftModel:
    """Freeze a model and give it trainable adapters. Whatever is trained is float32, also on a bfloat16 model.

    Args:
        model (`PreTrainedModel`): loaded from a checkpoint.
        r (`int`), alpha (`int`), dropout (`float`), parts (`Sequence[str]`): see
            [`~hf_vla.training.arguments.LoraArguments`].
        in_full (`Sequence[str]`): modules that are trained whole beside the family's own, and saved with the adapter;
            SpatialVLA's spatial embedding where it was adapted to another grid than the checkpoint's.

    Returns:
        `PeftModel`: the adapters, which `save_pretrained` saves, around the same model.

    Raises:
        ValueError: nothing is published for this family, or there is no such part.

    Source: openpi's LoRA of pi0 (adapters in language model and expert, projections in full; its vision tower in
    full, too, here frozen); SpatialVLA's fine-tuning scripts (rank 32, alpha 32, Gaussian initialisation); TinyVLA's
    (rank 64, alpha 256, dropout 0.05; action head and projector trained in full); DiVLA's (the same; action head, FiLM
    and what robots have of their own trained in full).
    """
    family = model.config.model_type
    if family not in PUBLISHED:
        raise ValueError(f"No LoRA targets are published for {family!r}, only for {sorted(PUBLISHED)}.")
    recipe = PUBLISHED[family]
    parts = recipe.parts if parts is None else parts
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"Expected lora.parts among {list(PARTS)}, came {list(parts)}.")
    frozen = [name for part in PARTS if part not in parts for name in PARTS[part]]
    excluded = rf"{recipe.excluded}|(.*\.)?({'|'.join(frozen)})\..*" if frozen else recipe.excluded
    readout = list(getattr(model.config, "readout_token_ids", []))  # rows of the embedding that nothing has trained
    config = LoraConfig(
        r=recipe.r if r is None else r,
        lora_alpha=recipe.alpha if alpha is None else alpha,
        lora_dropout=recipe.dropout if dropout is None else dropout,
        target_modules=recipe.targets,
        exclude_modules=excluded,
        trainable_token_indices=readout or None,
        init_lora_weights=recipe.init,
        modules_to_save=_present(model, (*recipe.in_full, *in_full)) or None,
    )
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # in bfloat16 a small step would be rounded away
            parameter.data = parameter.data.float()
    # peft keeps an untrained twin of what is trained in full, which is part of no model
    own = [parameter for name, parameter in adapted.named_parameters() if "original_module" not in name]
    total, trainable = (sum(_size(each) for each in own if each.requires_grad >= least) for least in (False, True))
    logger.info("LoRA trains %d of %d parameters (%.2f %%).", trainable, total, 100 * trainable / total)
    return adapted


def _size(parameter: torch.Tensor) -> int:
    """Numbers in a parameter, of which 4 bits pack two into each element."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()


def _present(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Names, or ends of names, of the modules that a model has; of a dictionary of modules, which is none, its own."""
    present = []
    for name in names:
        found = [module for path, module in model.named_modules() if f".{path}".endswith(f".{name}")]
        dictionary = found and isinstance(found[0], torch.nn.ModuleDict)
        present += [f"{name}.{key}" for key in found[0]] if dictionary else [name] * bool(found)
    return present


def load_adapter(model: PreTrainedModel, path: str | Path) -> None:
    """Load an adapter into its model, in our layout or the published one, ready for inference.

    Published SpatialVLA adapters name the vision tower's parts as older versions of transformers did, and their target
    names also match the depth model, which has no adapters in them.

    Raises:
        ValueError: the adapter lacks weights, or holds some that the model has no place for.
    """
    config = PeftConfig.from_pretrained(str(path))
    config.exclude_modules = config.exclude_modules or PUBLISHED[model.config.model_type].excluded
    info = model.load_adapter(str(path), peft_config=config)
    wrong = sorted(map(str, [*info.missing_keys, *info.unexpected_keys, *info.mismatched_keys]))
    if wrong:
        raise ValueError(
            f"The adapter {str(path)!r} does not fit this {type(model).__name__}: {len(wrong)} weights are missing, "
            f"unknown or of another shape, among them {wrong[:5]}."
        )
