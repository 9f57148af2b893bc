"""Where the examples say that the camera stood, against the simulator that took them."""

import json

import numpy as np
import pytest

from .conftest import SHIPPED, SPACE

pytestmark = pytest.mark.sim


@pytest.mark.parametrize("name", SHIPPED[:3])
def test_the_camera_stands_where_the_simulator_has_it(name):
    pytest.importorskip("metaworld")
    from hf_vla.evaluation.envs.registry import simulator

    env = simulator("metaworld")("button-press-topdown-v3", cameras={"corner4": (96, 96)})
    env.reset(seed=0)
    scene = json.loads((SPACE / "checkpoints" / name / "frame.json").read_text())["scene"]
    assert np.allclose(env.camera_pose("corner4"), scene["camera_to_world"]["corner4"], atol=1e-8)
    env.close()
