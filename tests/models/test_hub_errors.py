"""What the Hub refuses is said in a sentence; what is no fault of the Hub stays what it is."""

import json
import re
import shutil

import httpx2
import pytest
import torch
from huggingface_hub.utils import hf_raise_for_status
from peft import LoraConfig
from transformers import AutoModel

from hf_vla.models.hub_errors import hub_errors
from hf_vla.models.loading import load_checkpoint


@pytest.fixture(scope="module")
def saved(sawyer, tmp_path_factory):
    """A whole checkpoint, and adapters of it."""
    whole, adapters = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("adapters")
    model, processor = sawyer("tinyvla")
    model.save_pretrained(whole)
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(whole)
    targets = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    model.add_adapter(LoraConfig(r=2, target_modules=targets))
    model.save_pretrained(adapters)
    for folder in (whole, adapters):
        processor.save_pretrained(folder)
    return whole, adapters


def refuse(status, said):
    request = httpx2.Request("POST", "http://127.0.0.1/api/models/somebody/robot/commit/main")
    hf_raise_for_status(httpx2.Response(status, json={"error": said}, request=request))


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [
        (403, "Private storage quota exceeded.", "write to 'somebody/robot' (Private storage quota exceeded): it may"),
        (400, "Invalid metadata in README.md", "refuses 'somebody/robot' (status 400): Invalid metadata in README.md"),
        (413, "Payload too large", "(status 413): Payload too large"),
        (
            429,
            "Too many requests:\n try again in 5 minutes",
            "(status 429): Too many requests: try again in 5 minutes",
        ),
        (507, "", "The Hub failed for 'somebody/robot' (status 507)"),
    ],
)
def test_why_the_hub_refuses_is_said(status, said, message):
    with pytest.raises(OSError, match=re.escape(message)), hub_errors("somebody/robot", write=True):
        refuse(status, said)


def test_other_errors_stay_themselves(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(KeyError, match="a bug"), hub_errors("somebody/robot"):
        try:
            refuse(503, "")
        except OSError:
            raise KeyError("a bug")  # noqa: B904
    with pytest.raises(TypeError, match="a bug"), hub_errors("somebody/robot"):
        raise TypeError("a bug")


@pytest.mark.parametrize("offline", [False, True])
def test_what_is_wrong_with_a_folder_is_not_the_hub_s(hub, saved, tmp_path, monkeypatch, offline):
    whole, adapters = saved
    folder = shutil.copytree(whole, tmp_path / "whole")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"action_dim": 9}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load_checkpoint(folder)
    (folder / "processor_config.json").write_text("{")
    with pytest.raises(OSError, match="processor_config.json") as caught:
        load_checkpoint(folder)
    assert "Hub" not in str(caught.value)
    folder = shutil.copytree(adapters, tmp_path / "adapters")
    config = json.loads((folder / "adapter_config.json").read_text())
    for base in (None, "", 3):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=r"adapter_config\.json: expected .* as base_model_name_or_path, came"):
            load_checkpoint(folder)
    shutil.copytree(whole, folder / "base")
    with pytest.raises(ValueError, match="as base_model_name_or_path, came 3"):
        load_checkpoint(folder)
    shutil.rmtree(folder / "base")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json: expected JSON with base_model_name_or_path"):
        load_checkpoint(folder)
    config["base_model_name_or_path"] = "somebody/private"  # which is the Hub's business
    (folder / "adapter_config.json").write_text(json.dumps(config))
    missing = "HF_HUB_OFFLINE is set, and 'somebody/private'" if offline else "'somebody/private' is not on the Hub"
    with pytest.raises(OSError, match=missing):
        load_checkpoint(folder)
