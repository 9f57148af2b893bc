import json
import shutil

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from hf_vla.models.auto import FAMILIES, family_class

PUBLISHED = {"spatialvla": "spatialvla/zoe1_spatial_chunk4/checkpoint"}
STATISTICS = {"robot": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}
SIZES = {
    "divla": {"action_dim": 7, "state_dim": None, "chunk_size": 4},
    "tinyvla": {"action_dim": 7, "state_dim": None, "chunk_size": 4},
}
REMOTE = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X", "AutoProcessor": "processing_x.X"}


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture
def checkpoint(family, goldens, tmp_path):
    """A published or new checkpoint that, like those on the Hub, also points to Python files of its own."""
    if family in PUBLISHED:
        shutil.copytree(goldens / PUBLISHED[family], tmp_path, dirs_exist_ok=True)
    else:
        config = family_class(family, "configuration").from_preset("tiny", **SIZES.get(family, {}))
        family_class(family, "modeling")(config).save_pretrained(tmp_path)
        processor = family_class(family, "processing").from_scratch(config, STATISTICS, {"chunk_size": 4}, {})
        processor.save_pretrained(tmp_path)
    for name in ("config.json", "processor_config.json"):
        content = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(content | {"auto_map": REMOTE}))
    return tmp_path


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_installed_classes_win_over_remote_code(family, checkpoint, trust):
    assert type(AutoConfig.from_pretrained(checkpoint, **trust)) is family_class(family, "configuration")
    assert type(AutoProcessor.from_pretrained(checkpoint, **trust)) is family_class(family, "processing")
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        assert type(auto_class.from_pretrained(checkpoint, **trust)) is family_class(family, "modeling")


def test_from_config(family):
    config = family_class(family, "configuration").from_preset("tiny")
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        assert type(auto_class.from_config(config)) is family_class(family, "modeling")


def test_what_the_auto_classes_save_they_load(family, checkpoint, tmp_path):
    AutoModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "saved")
    assert type(AutoModel.from_pretrained(tmp_path / "saved")) is family_class(family, "modeling")
    assert type(AutoProcessor.from_pretrained(tmp_path / "saved")) is family_class(family, "processing")
    assert {file.suffix for file in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}
