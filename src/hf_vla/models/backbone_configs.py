"""Backbones' configurations, as parts of a family's."""

from difflib import get_close_matches
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


def check_model_type(backbone_config: dict[str, Any]) -> None:
    """Raise where a `backbone_config` does not say, by its `"model_type"`, of which model of transformers it is.

    Raises:
        ValueError: it does not.
    """
    model_type = backbone_config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        close = get_close_matches(str(model_type), CONFIG_MAPPING.keys(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ", such as 'qwen2_vl'."
        raise ValueError(f"Expected backbone_config['model_type'] of transformers, got {model_type!r}{hint}")


def implementations(backbone_config: PreTrainedConfig | dict | None) -> dict[str, dict]:
    """How a backbone computes attention and experts, as the configuration around it takes it, to leave it as it is.

    Left to itself, transformers would forget it, even that of a backbone which is built already.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, *optional*): the backbone's, if it has been built.
    """
    if not isinstance(backbone_config, PreTrainedConfig):
        return {}
    kinds = ("attn_implementation", "experts_implementation")
    return {kind: {"backbone_config": _implementation(backbone_config, kind)} for kind in kinds}


def _implementation(config: PreTrainedConfig, kind: str) -> dict[str, Any]:
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    of_parts = {name: _implementation(part, kind) for name, part in parts.items() if part is not None}
    return {"": getattr(config, f"_{kind}"), **of_parts}
