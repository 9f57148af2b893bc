"""Checkpoints with their code: transformers alone computes what the installed classes compute, bit for bit."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import hf_vla
from hf_vla.hub.export import export_remote_code
from hf_vla.models import remote_code
from hf_vla.models.auto import FAMILIES, KINDS, family_class
from hf_vla.models.remote_code import auto_map, flattened_code

PROGRAM = Path(__file__).parent / "outputs.py"
DOCS = Path(__file__).parents[2] / "docs" / "remote_code.md"
spec = importlib.util.spec_from_file_location("hf_vla_tests_outputs", PROGRAM)
outputs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(outputs)


def save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def without_us(folder, offline=False, **places):
    """What checkpoints compute in a process that cannot import hf_vla, by their names here."""
    modules = folder / ("modules_offline" if offline else "modules")
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": str(int(offline))}
    command = [sys.executable, PROGRAM, folder / "found.npz", *(f"{name}={path}" for name, path in places.items())]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, env=environment, cwd=folder, **options)
    assert done.returncode == 0, done.stderr
    found = {name: {} for name in places}
    for key, value in np.load(folder / "found.npz").items():
        name, _, field = key.partition("/")
        found[name][field] = value
    return found


def differences(found, wanted):
    """Names of what is not the same, to the last bit."""
    same = [name for name in found.keys() & wanted.keys() if np.array_equal(found[name], wanted[name])]
    return sorted((found.keys() | wanted.keys()) - set(same))


@pytest.fixture
def exported(family, sawyer, tmp_path):
    """A saved, tiny, untrained checkpoint with its code."""
    folder = save(tmp_path / "exported", *sawyer(family))
    export_remote_code(folder)
    return folder


def code_of(folder):
    return {path.name: path.read_text() for path in folder.glob("*.py")}


def test_transformers_alone_computes_the_same(family, exported, tmp_path):
    """Loaded, in half precision, saved and moved twice, and as the installed classes saved it."""
    model, processor = outputs.load(exported)
    for part, kind in ((model.config, KINDS[0]), (model, KINDS[1]), (processor, KINDS[2])):
        assert type(part) is family_class(family, kind)
    wanted = outputs.outputs(model, processor)
    assert {name.split(".")[0] for name in wanted} >= {"predicted", "loss"}
    assert ("predicted.reasoning" in wanted) == (family == "divla") and ("depth" in wanted) == (family == "spatialvla")
    resaved = save(tmp_path / "resaved", model, processor)
    assert code_of(resaved) == code_of(exported) == flattened_code(family)
    names = dict.fromkeys(("exported", "again", "text_to_text", "bfloat16"), exported)
    found = without_us(tmp_path, **names, resaved=resaved)
    half = outputs.outputs(*outputs.load(exported, dtype=torch.bfloat16))
    assert differences(half, wanted)
    for name, values in found.items():
        assert not differences(values, half if name == "bfloat16" else wanted), name

    last = tmp_path / "moved_moved_exported_0_1"
    assert code_of(last) == code_of(exported)
    model, processor = outputs.load(last)  # the installed classes again
    assert type(model) is family_class(family, "modeling") and type(processor) is family_class(family, "processing")
    assert not differences(outputs.outputs(model, processor), wanted)
    assert code_of(save(tmp_path / "back", model, processor)) == code_of(exported)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["auto_map"] == auto_map(family)


def test_the_hub_serves_it(hub, sawyer, goldens, tmp_path):
    """By name and by revision, then offline; a published repository likewise, whose own code stays where it is."""
    first, second = tmp_path / "first", tmp_path / "second"
    model, processor = sawyer("spatialvla")
    export_remote_code(save(first, model, processor))
    with torch.no_grad():
        model.spatial_embed_tokens.weight.add_(1.0)
    export_remote_code(save(second, model, processor))
    (second / "models_outputs.py").write_text((second / "models_outputs.py").read_text() + "# another version\n")
    commit = hub.upload("somebody/arm", first, kind="model")
    hub.upload("somebody/arm", second, kind="model")
    shutil.copytree(goldens / "spatialvla/zoe1_spatial_chunk4/checkpoint", tmp_path / "published")
    own = {"AutoModel": "modeling_spatialvla.SpatialVLAForConditionalGeneration"}
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    (tmp_path / "published" / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    (tmp_path / "published" / "modeling_spatialvla.py").write_text("raise RuntimeError('this code is another')")
    export_remote_code(tmp_path / "published")

    wanted = {name: outputs.outputs(*outputs.load(tmp_path / name)) for name in ("first", "second", "published")}
    places = {"second": "somebody/arm", "first": f"somebody/arm@{commit}"}
    found = without_us(tmp_path, **places, published=tmp_path / "published")
    assert all(not differences(found[name], wanted[name]) for name in wanted) and len(found) == 3
    asked = len(hub.log)
    found = without_us(tmp_path, offline=True, **places)
    assert all(not differences(found[name], wanted[name]) for name in places) and len(hub.log) == asked
    assert (tmp_path / "published" / "modeling_spatialvla.py").read_text().startswith("raise RuntimeError")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own uploads
def test_what_transformers_pushes_brings_the_code(hub, sawyer, tmp_path, monkeypatch):
    """Both of its ways; one of them uploads only what it saw being written."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    export_remote_code(save(tmp_path / "exported", *sawyer("spatialvla")))
    for number, part in enumerate(outputs.load(tmp_path / "exported")):
        part.push_to_hub(f"somebody/pushed_{number}")
        part.save_pretrained(f"{tmp_path}/{number}", push_to_hub=True, repo_id=f"somebody/saved_{number}")
        for name in (f"somebody/pushed_{number}", f"somebody/saved_{number}"):
            assert flattened_code("spatialvla").keys() <= set(hub.files(name, kind="model")), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_an_adapter_brings_the_code(sawyer, tmp_path):
    """Its base model lies in a folder of its own; both move."""
    from hf_vla.training.lora import add_lora

    model, processor = sawyer("tinyvla", head_config={"type": "regression"})
    base = save(tmp_path / "run" / "base", model, processor)
    model.name_or_path = str(base)
    adapted = add_lora(model, r=4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(tmp_path / "run")
    model.config.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    export_remote_code(tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    wanted = outputs.outputs(*outputs.load(moved))
    assert "predicted.actions" in differences(wanted, outputs.outputs(*outputs.load(moved / "base")))
    assert not differences(without_us(tmp_path, adapter=moved)["adapter"], wanted)


def imports(source):
    """Names of the modules that a text imports; those of its own folder with a point."""
    nodes = list(ast.walk(ast.parse(source)))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return found | {"." * node.level + node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def test_files_are_ours_but_for_their_imports(family):
    source = Path(hf_vla.__file__).parent
    code = flattened_code(family)
    for name, text in code.items():
        origin, licence, *lines = text.split("\n")
        module = re.fullmatch(rf"# Written by hf_vla {hf_vla.__version__}: its module (hf_vla\S+)\. .*", origin)[1]
        assert module.removeprefix("hf_vla.").replace(".", "_") + ".py" == name and "Apache-2.0" in licence
        original = source.joinpath(*module.split(".")[1:]).with_suffix(".py").read_text().split("\n")
        changed = [(old, new) for old, new in zip(original, lines, strict=True) if old != new]
        assert all(new.startswith("from .") and old.startswith("from hf_vla.") for old, new in changed)
        assert len(changed) == len([target for target in imports(text) if target.startswith(".")])
        assert not [target for target in imports(text) if target.split(".")[0] == "hf_vla"]
    assert not [name for name in code if not name.startswith(("actions_", "models_"))]
    assert not [name for name in code if other_family(name, family)]


def other_family(name, family):
    return any(f"models_{each}_" in name for each in FAMILIES if each != family) or "convert" in name


def test_transformers_finds_every_file(family, exported):
    """By its own search, in regular expressions; what it demands of the environment is documented."""
    code, demanded = code_of(exported), set()
    for name, text in code.items():
        relative = {target[1:] for target in imports(text) if target.startswith(".")}
        assert set(get_relative_imports(exported / name)) == relative
        assert {f"{target}.py" for target in relative} <= code.keys()
        demanded |= set(get_imports(exported / name)) - set(sys.stdlib_module_names)
    assert demanded <= {"numpy", "scipy", "torch", "transformers", "huggingface_hub", "tokenizers", "PIL", "diffusers"}
    assert ("diffusers" in demanded) == (family in ("divla", "tinyvla"))
    for package in demanded:
        assert f"`{'pillow' if package == 'PIL' else package}`" in DOCS.read_text()


@pytest.mark.parametrize("rules", [["format", "--check"], ["check"]])
def test_files_are_as_tidy_as_ours(rules, exported):
    command = [sys.executable, "-m", "ruff", *rules, "--config", DOCS.parents[1] / "pyproject.toml", exported]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_was_written_is_returned_and_an_older_export_goes(exported):
    (exported / "models_of_old.py").write_text("# Written by hf_vla 0.0.1: its module hf_vla.models.of_old.\n")
    (exported / "mine.py").write_text("# Written by me\n")
    (exported / "empty.py").touch()
    (exported / "models_outputs.py").write_text("# Written by hf_vla 0.0.1: its module hf_vla.models.outputs.\n")
    before = {name: json.loads((exported / name).read_text()) for name in ("config.json", "processor_config.json")}
    written = export_remote_code(str(exported))
    family = before["config.json"]["model_type"]
    names = [*flattened_code(family), "processor_config.json", "config.json"]
    assert [path.relative_to(exported).as_posix() for path in written] == names
    own = {name: text for name, text in code_of(exported).items() if name not in ("mine.py", "empty.py")}
    assert own == flattened_code(family) and len(code_of(exported)) == len(own) + 2
    assert {name: json.loads((exported / name).read_text()) for name in before} == before
    assert not [path for path in exported.iterdir() if path.name.startswith(".")]


def test_a_model_without_a_processor(sawyer, tmp_path):
    sawyer("spatialvla")[0].save_pretrained(tmp_path)
    assert export_remote_code(tmp_path)[-1].name == "config.json"
    assert not (tmp_path / "processor_config.json").exists()


def test_others_files_are_not_replaced(sawyer, tmp_path):
    model, processor = sawyer("tinyvla")
    save(tmp_path, model, processor)
    (tmp_path / "models_base.py").write_text("# mine")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds \['models_base.py'\], which hf_vla did not write"):
        export_remote_code(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    model.config.auto_map = auto_map("tinyvla")
    with pytest.raises(ValueError, match="which hf_vla did not write"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "models_base.py").read_text() == "# mine"


def test_the_code_of_others_is_not_named_where_it_is_not(family, sawyer, tmp_path):
    model, processor = sawyer(family)
    processor.auto_map = {"AutoProcessor": "processing_x.X"}
    model.config.auto_map = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X"}
    save(tmp_path, model, processor)
    assert not any("auto_map" in json.loads(path.read_text()) for path in tmp_path.glob("*config.json"))
    assert not code_of(tmp_path)


def test_a_configuration_alone_brings_the_code(exported, tmp_path):
    AutoConfig.from_pretrained(exported).save_pretrained(tmp_path / "alone")
    assert code_of(tmp_path / "alone") == code_of(exported)


def test_stopped_anywhere_the_checkpoint_still_loads(sawyer, tmp_path, monkeypatch):
    model, processor = sawyer("spatialvla")
    save(tmp_path, model, processor)
    count = len(flattened_code("spatialvla")) + 2
    replace = os.replace
    for stop in range(count):
        calls = []

        def stopped(*arguments, calls=calls, stop=stop):
            calls.append(arguments)
            if len(calls) > stop:
                raise KeyboardInterrupt
            replace(*arguments)

        monkeypatch.setattr(remote_code.os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            export_remote_code(tmp_path)
        for name in ("config.json", "processor_config.json"):
            named = json.loads((tmp_path / name).read_text()).get("auto_map", {}).values()
            assert all((tmp_path / f"{each.split('.')[0]}.py").exists() for each in named)
    monkeypatch.undo()
    assert type(AutoModel.from_pretrained(tmp_path)) is type(model)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is type(processor)
    export_remote_code(tmp_path)
    assert code_of(tmp_path) == flattened_code("spatialvla")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        export_remote_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="families .*'spatialvla'.*got 'bert'"):
        export_remote_code(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="Expected JSON in"):
        export_remote_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "line", ["import hf_vla.models.names", "from hf_vla.models import names", "from hf_vla import x"]
)
def test_imports_that_no_folder_has_are_refused(line, tmp_path, monkeypatch):
    """Where somebody writes one in a family's module, the export fails here and not on the Hub."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "new.py").write_text(f"def f():\n    {line}\n")
    monkeypatch.setattr(remote_code, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match="Expected `from module import name` in hf_vla.models.new, line 2"):
        remote_code._flattened("hf_vla.models.new")
