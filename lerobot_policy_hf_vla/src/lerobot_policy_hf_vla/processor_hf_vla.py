"""LeRobot's pipelines around the policy: they rename, batch and move, and leave every number as it is."""

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyAction,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
    UnnormalizerProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from lerobot.utils.constants import POLICY_POSTPROCESSOR_DEFAULT_NAME, POLICY_PREPROCESSOR_DEFAULT_NAME

from lerobot_policy_hf_vla.configuration_hf_vla import HfVlaConfig


def make_hf_vla_pre_post_processors(
    config: HfVlaConfig, dataset_stats: dict[str, dict[str, Any]] | None = None, **kwargs: Any
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """Make the pipelines before and behind the policy.

    The checkpoint's own processor normalises. The two steps that could are there all the same, with the mapping
    "identity": where training goes on from a LeRobot checkpoint, LeRobot hands them the dataset's statistics and the
    configuration's mapping, and raises if there are no such steps.

    Args:
        config ([`HfVlaConfig`]): of the policy.
        dataset_stats (`dict`, *optional*): of the dataset; not used.
        kwargs: what later versions of LeRobot hand over; not used.

    Returns:
        `tuple`: of `PolicyProcessorPipeline`, before and behind.
    """
    inputs, outputs = config.input_features or {}, config.output_features or {}
    before = [
        RenameObservationsProcessorStep(rename_map={}),
        AddBatchDimensionProcessorStep(),
        DeviceProcessorStep(device=config.device),
        NormalizerProcessorStep(features={**inputs, **outputs}, norm_map=config.normalization_mapping),
    ]
    behind = [
        UnnormalizerProcessorStep(features=outputs, norm_map=config.normalization_mapping),
        DeviceProcessorStep(device="cpu"),
    ]
    return (
        PolicyProcessorPipeline[dict[str, Any], dict[str, Any]](steps=before, name=POLICY_PREPROCESSOR_DEFAULT_NAME),
        PolicyProcessorPipeline[PolicyAction, PolicyAction](
            steps=behind,
            name=POLICY_POSTPROCESSOR_DEFAULT_NAME,
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        ),
    )
