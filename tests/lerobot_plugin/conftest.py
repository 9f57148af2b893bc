import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "lerobot_policy_hf_vla"


@pytest.fixture(scope="module")
def lerobot(tmp_path_factory):
    """The stand-in for LeRobot with the plug-in installed beside it, found by its distribution's name."""
    patch = pytest.MonkeyPatch()
    assert not any(name.split(".")[0] in ("lerobot", "lerobot_policy_hf_vla") for name in sys.modules)
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    site = tmp_path_factory.mktemp("site")
    info = site / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    for folder in (ROOT / "tests" / "lerobot_stand_in", PLUGIN / "src", site):
        patch.syspath_prepend(folder)
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies import factory
    from lerobot.utils.import_utils import register_third_party_plugins

    known_before = PreTrainedConfig.get_known_choices()
    register_third_party_plugins()
    yield SimpleNamespace(
        factory=factory, config=PreTrainedConfig, new={*PreTrainedConfig.get_known_choices()} - {*known_before}
    )
    patch.undo()
    for name in [*sys.modules]:
        if name.split(".")[0] in ("lerobot", "lerobot_policy_hf_vla"):
            del sys.modules[name]
