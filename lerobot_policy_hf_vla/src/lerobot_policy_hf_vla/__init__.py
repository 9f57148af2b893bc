"""hf_vla's models as a LeRobot policy; importing this registers the policy type `hf_vla`."""

from lerobot_policy_hf_vla.configuration_hf_vla import HfVlaConfig

__all__ = ["HfVlaConfig"]
