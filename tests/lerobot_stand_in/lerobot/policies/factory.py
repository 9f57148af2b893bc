import importlib

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action


def make_policy_config(policy_type, **kwargs):
    return PreTrainedConfig.get_choice_class(policy_type)(**kwargs)


def get_policy_class(name):
    config_class = PreTrainedConfig.get_choice_class(name)
    stem = config_class.__name__.removesuffix("Config")
    assert stem != config_class.__name__
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    return getattr(module, f"{stem}Policy")


def make_pre_post_processors(config, pretrained_path=None, **kwargs):
    if pretrained_path:
        behind = {"to_transition": policy_action_to_transition, "to_output": transition_to_policy_action}
        return (
            PolicyProcessorPipeline.from_pretrained(
                pretrained_path, "policy_preprocessor.json", kwargs.get("preprocessor_overrides", {})
            ),
            PolicyProcessorPipeline.from_pretrained(
                pretrained_path, "policy_postprocessor.json", kwargs.get("postprocessor_overrides", {}), **behind
            ),
        )
    module = importlib.import_module(type(config).__module__.replace("configuration_", "processor_"))
    function = getattr(module, f"make_{config.type}_pre_post_processors")
    return function(config, dataset_stats=kwargs.get("dataset_stats"))


def dataset_to_policy_features(features):
    kinds = {"action": FeatureType.ACTION, "observation.state": FeatureType.STATE}
    return {
        key: PolicyFeature(FeatureType.VISUAL, (each["shape"][2], *each["shape"][:2]))
        if each["dtype"] in ("image", "video")
        else PolicyFeature(kinds[key], tuple(each["shape"]))
        for key, each in features.items()
        if each["dtype"] in ("image", "video") or key in kinds
    }


def make_policy(config, ds_meta):
    features = dataset_to_policy_features(ds_meta.features)
    config.output_features = {key: each for key, each in features.items() if each.type is FeatureType.ACTION}
    if not config.input_features:
        config.input_features = {key: each for key, each in features.items() if key not in config.output_features}
    kwargs = {"config": config, "dataset_stats": ds_meta.stats, "dataset_meta": ds_meta}
    kind = get_policy_class(config.type)
    if config.pretrained_path:
        policy = kind.from_pretrained(pretrained_name_or_path=config.pretrained_path, **kwargs)
    else:
        policy = kind(**kwargs)
    policy.to(config.device)
    expected, provided = (
        {key for key, each in own.items() if each.type is FeatureType.VISUAL}
        for own in (config.input_features, features)
    )
    if not (expected <= provided or provided <= expected):
        raise ValueError(f"Feature mismatch: expected {sorted(expected)}, provided {sorted(provided)}")
    return policy
