"""Which part of a model a parameter belongs to, and at which learning rate that part is trained."""

from importlib.util import find_spec

import torch
from torch import nn
from transformers import BitsAndBytesConfig

SPATIAL_EMBEDDING = "spatial_embed_tokens"
ACTION_EMBEDDINGS = (SPATIAL_EMBEDDING, "action_mask_embedding")
# What vision-language models of transformers call the layers between vision tower and language model.
PROJECTORS = ("multi_modal_projector", "connector", "merger")
# What is new when a vision-language model learns to act, by the names of modules: action heads, FiLM and what a robot
# has of its own (DiVLA), projectors, SpatialVLA's 3-D encoding, pi0's expert with its projections.
HEAD = (
    *("action_head", "film", "embodiments", *PROJECTORS, "position_embedding_3d"),
    *("dit", "embed_action_time", "action_out_proj"),
)
# and what 4 or 8 bits would spoil: all of it, the scores of tokens, and SpatialVLA's depth
NOT_QUANTIZED = (*HEAD, "lm_head", "vision_zoe_model")
GROUPS = ("backbone", "lora", "head", "embeddings")


def parameter_groups(model: nn.Module, trained_only: bool = True) -> dict[str, dict[str, nn.Parameter]]:
    """Sort a model's parameters.

    Args:
        model (`nn.Module`): of this library, with or without adapters.
        trained_only (`bool`): leave frozen parameters out.

    Returns:
        `dict[str, dict[str, nn.Parameter]]`: group -> name -> parameter, for those of [`GROUPS`] that have some:
        "lora" (adapters), "embeddings" (of action and text tokens), "head" (see [`HEAD`]), "backbone" (all else).
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    of_text = set() if embedding is None else {id(parameter) for parameter in embedding.parameters()}
    groups = {group: {} for group in GROUPS}
    for name, parameter in model.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        parts = name.split(".")
        if any(part.startswith("lora_") for part in parts):
            group = "lora"
        elif any(part in HEAD for part in parts):
            group = "head"
        else:
            of_actions = any(part in ACTION_EMBEDDINGS for part in parts)
            group = "embeddings" if of_actions or id(parameter) in of_text else "backbone"
        groups[group][name] = parameter
    return {group: members for group, members in groups.items() if members}


def split_by_group(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rates: dict[str, float]) -> None:
    """Give each group of parameters its own learning rate.

    Weight decay, and what else the optimizer's own groups differ in, stays as it is; so do the ratios of the rates
    under every schedule of the Trainer, which multiplies all of them by the same factor.

    Args:
        optimizer (`torch.optim.Optimizer`): fresh; its groups are cut in place, and each bears its part's "name".
        model (`nn.Module`): whose parameters it has.
        learning_rates (`dict[str, float]`): group -> rate; the optimizer's own for those that are not named.

    Raises:
        ValueError: nothing of a group that is named is trained.
    """
    groups = parameter_groups(model)
    if missing := sorted(set(learning_rates) - set(groups)):
        sizes = {group: sum(each.numel() for each in members.values()) for group, members in groups.items()}
        raise ValueError(
            f"training.learning_rates names {missing}, of which this run trains nothing; it trains "
            f"{', '.join(f'{group} ({size} parameters)' for group, size in sizes.items())}: leave {missing} out."
        )
    place = {id(parameter): group for group, members in groups.items() for parameter in members.values()}
    whole, optimizer.param_groups = optimizer.param_groups, []
    for options in whole:
        for group in groups:
            if members := [each for each in options["params"] if place[id(each)] == group]:
                rate = learning_rates.get(group, options["lr"])
                optimizer.add_param_group({**options, "params": members, "lr": rate, "name": group})


def freeze_backbone(model: nn.Module, is_new: bool = False) -> None:
    """Leave of a model the action head and what else is in the group "head" to be trained, and action tokens.

    A part that was frozen already, such as the depth model or another robot's decoder, stays so.

    Args:
        model (`nn.Module`): of this library.
        is_new (`bool`): its head has never been trained, nor have the readout tokens, which are rows of the text's
            embedding.

    Raises:
        ValueError: nothing is left, or readout tokens would stay random.
    """
    readout = getattr(getattr(model, "config", None), "readout_token_ids", [])
    if is_new and readout:
        raise ValueError(
            f"model.tune: head freezes the embedding, in which the {len(readout)} readout tokens of a new model are "
            "still random: train them by model.lora or model.tune: full, or set model.config.num_readout_tokens to 0."
        )
    groups = parameter_groups(model)
    for name, parameter in (groups.get("backbone", {}) | groups.get("embeddings", {})).items():
        parameter.requires_grad_(any(part in ACTION_EMBEDDINGS for part in name.split(".")))
    if not parameter_groups(model):
        raise ValueError(f"model.tune: head leaves nothing of this {type(model).__name__} to be trained.")


def quantization_config(kind: str, dtype: str) -> BitsAndBytesConfig:
    """How `from_pretrained` shall keep the frozen weights under adapters.

    Args:
        kind (`str`): "4bit" (normal float, its scales quantised, too: QLoRA) or "8bit".
        dtype (`str`): in which 4-bit weights are computed with.

    Raises:
        ValueError: bitsandbytes is not installed.

    Source: QLoRA, https://huggingface.co/papers/2305.14314
    """
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"model.quantization: {kind} needs bitsandbytes: `pip install bitsandbytes`, or leave it out."
        )
    options = {"load_in_8bit": True}
    if kind == "4bit":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    return BitsAndBytesConfig(**options, llm_int8_skip_modules=[rf"(.*\.)?{name}" for name in NOT_QUANTIZED])
