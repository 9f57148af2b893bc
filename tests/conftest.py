import importlib.util
import os
import sys
import warnings
from pathlib import Path

import pytest

from hf_vla.models.auto import FAMILIES

SCHEDULING = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None  # not on every system


@pytest.fixture(autouse=True)
def priority_stays():
    """No test leaves its process real-time, which SVT-AV1 makes root's when it encodes: all others would wait."""
    yield
    if SCHEDULING is not None and (now := os.sched_getscheduler(0)) != SCHEDULING:
        os.sched_setscheduler(0, SCHEDULING, os.sched_param(0))
        pytest.fail(f"The scheduling was {SCHEDULING} and is {now}: encode in usual_priority().")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of recorded inputs and outputs of the published systems."""
    return Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def demos() -> Path:
    """The embedded LeRobot dataset of robosuite demonstrations."""
    return Path(__file__).parents[1] / "scripts" / "data" / "robosuite_demos"


@pytest.fixture(scope="session")
def pem(tmp_path_factory) -> Path:
    """A private key, its certificate for this machine, and that of who signed it, in one file."""
    import trustme

    authority, path = trustme.CA(), tmp_path_factory.mktemp("tls") / "localhost.pem"
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
    authority.cert_pem.write_to_path(path, append=True)
    return path


@pytest.fixture(scope="session")
def demo_item(demos):
    """One frame of it: images float (C, H, W), state, action, task."""
    from hf_vla.data.lerobot import LeRobotEpisodes

    return LeRobotEpisodes(demos)[100]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A saved, untrained tiny SpatialVLA for the robot of `demos`: 7 dimensions, camera `agentview`, chunks of 4."""
    import torch

    from hf_vla.actions.spec import ActionSpec, CameraSpec, GripperSpec
    from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer
    from hf_vla.models.spatialvla.configuration_spatialvla import SpatialVLAConfig
    from hf_vla.models.spatialvla.modeling_spatialvla import SpatialVLAForConditionalGeneration
    from hf_vla.models.spatialvla.processing_spatialvla import SpatialVLAProcessor

    names = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
    spec = ActionSpec(names, "delta_ee", "axis_angle", "world", 20.0, GripperSpec(6, -1.0, 1.0))
    limits = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "min": [-1.0] * 7, "max": [1.0] * 7}
    grid = GaussianGridTokenizer(num_bins=(8, 16, 8, 8, 8, 8), distribution="uniform")
    action_config = {
        "chunk_size": 4,
        "normalization": {"mode": ["quantile"] * 6 + ["zero_one"], "clip": True, "convention": "spatialvla"},
        "tokenizer": {"type": "gaussian_grid", **grid.to_dict()},
        "specs": {"robosuite": {"action": spec.to_dict()}},
    }
    camera = CameraSpec("agentview", 96, 96, [[115.9, 0.0, 48.0], [0.0, 115.9, 48.0], [0.0, 0.0, 1.0]])
    config = SpatialVLAConfig.from_preset("tiny")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    SpatialVLAForConditionalGeneration(config).save_pretrained(folder)
    processor = SpatialVLAProcessor.from_scratch(
        config, {"robosuite": {"action": limits}}, action_config, {"robosuite": camera.to_dict()}
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reasoning_checkpoint(tmp_path_factory) -> Path:
    """A saved, untrained tiny DiVLA for both cameras of `demos`: it says up to 7 tokens, others for other pictures."""
    import torch

    from hf_vla.actions.spec import CameraSpec
    from hf_vla.models.divla.configuration_divla import DiVLAConfig
    from hf_vla.models.divla.modeling_divla import DiVLAForActionPrediction
    from hf_vla.models.divla.processing_divla import DiVLAProcessor

    # a regression starts from no noise
    config = DiVLAConfig.from_preset(
        "tiny", head_config={"type": "regression"}, action_dim=7, state_dim=None, chunk_size=4, max_reasoning_tokens=8
    )
    torch.manual_seed(0)
    model = DiVLAForActionPrediction(config)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
        for parameter in model.film.parameters():  # which the reasoning would not modulate at first
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    folder = tmp_path_factory.mktemp("reasoning")
    model.save_pretrained(folder)
    action_config = {"chunk_size": 4, "normalization": {"mode": "identity", "clip": False, "convention": "lerobot"}}
    limits = {"min": [-1.0] * 7, "max": [1.0] * 7}
    cameras = [CameraSpec(name, 96, 96).to_dict() for name in ("agentview", "wrist")]
    DiVLAProcessor.from_scratch(
        config, {"robosuite": {"action": limits}}, action_config, {"robosuite": cameras}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request):
    """The name of every family."""
    return request.param


@pytest.fixture(scope="session")
def sawyer():
    """Make a tiny, untrained model of a family, and its processor, for Meta-World's robot: `sawyer(family, **config)`.

    Chunks of 4, camera `corner4` of 48 pixels; pictures and words move the actions.
    """
    import torch

    from hf_vla.actions.spec import ActionSpec, CameraSpec, GripperSpec, StateSpec
    from hf_vla.actions.tokenizers.gaussian_grid import GaussianGridTokenizer
    from hf_vla.models.auto import family_class

    names = ("x", "y", "z", "gripper")
    action = ActionSpec(names, "delta_ee", frame="world", gripper=GripperSpec(3, -1.0, 1.0)).to_dict()
    camera = CameraSpec("corner4", 48, 48, ((41.6, 0.0, 24.0), (0.0, 41.6, 24.0), (0.0, 0.0, 1.0))).to_dict()
    limits = {"q01": [-1.0] * 4, "q99": [1.0] * 4, "min": [-1.0] * 4, "max": [1.0] * 4}
    plain = {"mode": "min_max", "clip": True, "convention": "lerobot"}
    head = {"type": "diffusion", "denoiser": {"type": "conditional_unet1d", "down_dims": [16, 32]}}
    sizes = {"action_dim": 4, "state_dim": 4, "chunk_size": 4, "head_config": head}
    own = {
        "tinyvla": sizes,
        "divla": {**sizes, "max_reasoning_tokens": 8},
        "spatialvla": {"chunk_size": 4, "spatial_token_num": 10, "action_block_sizes": [8, 2]},
        "pi0_vla": {"chunk_size": 4},
    }

    def make(family, **options):
        config = family_class(family, "configuration").from_preset("tiny", **{**own[family], **options})
        torch.manual_seed(0)
        model = family_class(family, "modeling")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "film" in name:  # which the reasoning would not modulate at first
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
                elif parameter.ndim > 1 and "action_head" not in name:
                    parameter.mul_(3.0)
        specs = {"action": action, "state": StateSpec(names, frame="world").to_dict()}
        action_config = {"chunk_size": 4, "normalization": plain, "state_normalization": plain}
        cameras = [camera]
        if family == "spatialvla":
            grid = GaussianGridTokenizer(num_bins=(2, 2, 2), distribution="uniform")
            mode = {"mode": ["quantile"] * 3 + ["zero_one"], "clip": True, "convention": "spatialvla"}
            tokenizer = {"type": "gaussian_grid", **grid.to_dict()}
            action_config, cameras = {"chunk_size": 4, "normalization": mode, "tokenizer": tokenizer}, camera
            del specs["state"]
        action_config["specs"] = {"metaworld": specs}
        action_config |= {name: options[name] for name in ("n_obs_steps",) if name in options}
        statistics = {"metaworld": {"action": limits, "state": limits}}
        processor = family_class(family, "processing").from_scratch(
            config, statistics, action_config, {"metaworld": cameras}
        )
        return model, processor

    return make


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A real HTTP server that this process and its children take for the Hub; see `tests/hub.py`. Nobody is signed in.

    Sign in with `monkeypatch.setenv("HF_TOKEN", hub.token)`, or give `token=hub.token`.
    """
    from huggingface_hub import close_session, constants, hf_api

    spec = importlib.util.spec_from_file_location("hf_vla_tests_hub", Path(__file__).parent / "hub.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    # huggingface_hub's own uploads use what its HTTP client has given up
    warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
    home = tmp_path_factory.mktemp("hub")
    (home / "content").mkdir()
    server = module.Hub(home / "content")
    # Children read the environment; this process has read it already, so what came of it is set as well.
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(home / "home"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    here = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": constants.HF_URL_HOSTS | {"127.0.0.1"},
        "HF_HUB_CACHE": str(home / "home" / "hub"),
        "HF_TOKEN_PATH": str(home / "home" / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "home" / "stored_tokens"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in here.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made once, for the Hub of that moment
    yield server
    server.close()
    close_session()
