"""Vision-language-action models for robots as ordinary Hugging Face models.

Importing this package is cheap (no torch, no transformers) and makes every family known to transformers' AutoConfig,
AutoModel, AutoModelForImageTextToText and AutoProcessor. The public names below are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

import hf_vla.models.auto  # noqa: F401  (registers the Auto classes)

if TYPE_CHECKING:
    from hf_vla.actions.codec import ActionCodec as ActionCodec
    from hf_vla.actions.spec import ActionSpec as ActionSpec
    from hf_vla.actions.spec import CameraSpec as CameraSpec
    from hf_vla.actions.spec import GripperSpec as GripperSpec
    from hf_vla.actions.spec import StateSpec as StateSpec
    from hf_vla.data.lerobot import LeRobotEpisodes as LeRobotEpisodes
    from hf_vla.data.recorder import LeRobotRecorder as LeRobotRecorder
    from hf_vla.data.streaming import LeRobotStream as LeRobotStream
    from hf_vla.models.divla.configuration_divla import DiVLAConfig as DiVLAConfig
    from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction as DiVLAForActionPrediction
    from hf_vla.models.divla.processing_divla import DiVLAProcessor as DiVLAProcessor
    from hf_vla.models.outputs import VLAOutput as VLAOutput
    from hf_vla.models.pi0_vla.configuration_pi0_vla import PI0VLAConfig as PI0VLAConfig
    from hf_vla.models.pi0_vla.modeling_pi0_vla import PI0VLAForActionPrediction as PI0VLAForActionPrediction
    from hf_vla.models.pi0_vla.processing_pi0_vla import PI0VLAProcessor as PI0VLAProcessor
    from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig as SpatialVLAConfig
    from hf_vla.models.spatialvla.modeling_spatialvla import (
        SpatialVLAForConditionalGeneration as SpatialVLAForConditionalGeneration,
    )
    from hf_vla.models.spatialvla.processing_spatialvla import SpatialVLAProcessor as SpatialVLAProcessor
    from hf_vla.models.tinyvla.configuration_tinyvla import TinyVLAConfig as TinyVLAConfig
    from hf_vla.models.tinyvla.modeling_tinyvla import TinyVLAForActionPrediction as TinyVLAForActionPrediction
    from hf_vla.models.tinyvla.processing_tinyvla import TinyVLAProcessor as TinyVLAProcessor
    from hf_vla.policy import Policy as Policy

__version__ = "0.1.0"

_MODULES = {
    "ActionCodec": "hf_vla.actions.codec",
    "ActionSpec": "hf_vla.actions.spec",
    "CameraSpec": "hf_vla.actions.spec",
    "DiVLAConfig": "hf_vla.models.divla.configuration_divla",
    "DiVLAForActionPrediction": "hf_vla.models.divla.modeling_divla",
    "DiVLAProcessor": "hf_vla.models.divla.processing_divla",
    "GripperSpec": "hf_vla.actions.spec",
    "LeRobotEpisodes": "hf_vla.data.lerobot",
    "LeRobotRecorder": "hf_vla.data.recorder",
    "LeRobotStream": "hf_vla.data.streaming",
    "PI0VLAConfig": "hf_vla.models.pi0_vla.configuration_pi0_vla",
    "PI0VLAForActionPrediction": "hf_vla.models.pi0_vla.modeling_pi0_vla",
    "PI0VLAProcessor": "hf_vla.models.pi0_vla.processing_pi0_vla",
    "Policy": "hf_vla.policy",
    "SpatialVLAConfig": "hf_vla.models.spatialvla.configuration_spatialvla",
    "SpatialVLAForConditionalGeneration": "hf_vla.models.spatialvla.modeling_spatialvla",
    "SpatialVLAProcessor": "hf_vla.models.spatialvla.processing_spatialvla",
    "StateSpec": "hf_vla.actions.spec",
    "TinyVLAConfig": "hf_vla.models.tinyvla.configuration_tinyvla",
    "TinyVLAForActionPrediction": "hf_vla.models.tinyvla.modeling_tinyvla",
    "TinyVLAProcessor": "hf_vla.models.tinyvla.processing_tinyvla",
    "VLAOutput": "hf_vla.models.outputs",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__():
    return sorted({*globals(), *_MODULES})
