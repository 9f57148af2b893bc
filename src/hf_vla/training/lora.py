"""LoRA for SpatialVLA with the published targets."""

import logging
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TARGETS = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),  # language model
    *("fc1", "fc2", "out_proj"),  # vision tower
    *("linear", "position_embedding_head.0", "position_embedding_head.3"),  # projector, Ego3D encoding
]
# Parts of the frozen depth model bear the names of targets as well.
EXCLUDED = r"vision_zoe_model\..*"
SPATIAL_EMBEDDING = "spatial_embed_tokens"


def add_lora(
    model: PreTrainedModel, r: int = 32, alpha: int = 32, dropout: float = 0.0, train_spatial_embedding: bool = False
) -> PeftModel:
    """Freeze a model and give it trainable adapters.

    Args:
        model (`PreTrainedModel`): loaded from a checkpoint.
        r (`int`), alpha (`int`), dropout (`float`): see [`~hf_vla.training.arguments.LoraArguments`].
        train_spatial_embedding (`bool`): train the spatial embedding whole and save it with the adapter; needed where
            it was adapted to another grid than the checkpoint's.

    Returns:
        `PeftModel`: the adapters, which `save_pretrained` saves, around the same model.

    Source: SpatialVLA's fine-tuning scripts (rank 32, alpha 32, Gaussian initialisation).
    """
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=TARGETS,
        exclude_modules=EXCLUDED,
        init_lora_weights="gaussian",
        modules_to_save=[SPATIAL_EMBEDDING] if train_spatial_embedding else None,
    )
    adapted = get_peft_model(model, config)
    trainable, total = adapted.get_nb_trainable_parameters()
    logger.info("LoRA trains %d of %d parameters (%.2f %%).", trainable, total, 100 * trainable / total)
    return adapted


def load_adapter(model: PreTrainedModel, path: str | Path) -> None:
    """Load an adapter into its model, in our layout or the published one, ready for inference.

    Published adapters name the vision tower's parts as older versions of transformers did, and their target names
    also match the depth model, which has no adapters in them.

    Raises:
        ValueError: the adapter lacks weights, or holds some that the model has no place for.
    """
    config = PeftConfig.from_pretrained(str(path))
    config.exclude_modules = EXCLUDED
    info = model.load_adapter(str(path), peft_config=config)
    wrong = sorted(map(str, [*info.missing_keys, *info.unexpected_keys, *info.mismatched_keys]))
    if wrong:
        raise ValueError(
            f"The adapter {str(path)!r} does not fit this {type(model).__name__}: {len(wrong)} weights are missing, "
            f"unknown or of another shape, among them {wrong[:5]}."
        )
