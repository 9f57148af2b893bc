"""The client that the documentation prints works as it is printed."""

import re
from pathlib import Path

import numpy as np

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_plain_client_of_the_documentation_gets_actions(shipped, serve):
    each = shipped("tinyvla_metaworld")
    running = serve(each.models)
    (code,) = re.findall(r"test_docs.py -->\n```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    seen = {"image": each.observation["observation.images.corner4"], "state": each.observation["observation.state"]}
    exec(code.replace("ws://127.0.0.1:8000", running.url), seen)
    wanted = each.models.policy().predict_chunk({**each.observation, "task": "press the button"})
    assert np.array_equal(seen["chunk"], wanted) and seen["contract"]["model"] == "tinyvla_metaworld"
