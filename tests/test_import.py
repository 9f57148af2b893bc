"""`import hf_vla` is cheap, and the Auto classes know the families whichever comes first."""

import ast
import inspect
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import hf_vla
from hf_vla.models.auto import FAMILIES, KINDS, family_module

ROOT = Path(__file__).parents[1]


def run(code, *arguments):
    """Run code in a fresh interpreter, warnings as errors, and return what it printed."""
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def best_cpu_time(code, *arguments, tries=5):
    """Seconds of CPU of a fresh interpreter; unlike the wall clock it does not count what other programs take."""

    def once():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(tries))


def test_import_takes_less_than_0_15_s():
    assert best_cpu_time("import hf_vla") - best_cpu_time("pass") < 0.15


def test_help_takes_less_than_a_second():
    assert best_cpu_time("from hf_vla.cli.main import app; app()", "--help", tries=3) < 1.0


def test_import_loads_no_heavy_library():
    heavy = "{'torch', 'transformers', 'numpy', 'scipy', 'av', 'pyarrow', 'PIL', 'matplotlib'}"
    assert run(f"import sys, hf_vla; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_public_names_are_the_typed_names():
    tree = ast.parse(inspect.getsource(hf_vla))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname: node.module for node in block.body for alias in node.names}
    assert typed == hf_vla._MODULES
    assert set(hf_vla.__all__) <= set(dir(hf_vla))


@pytest.mark.parametrize("name", sorted(hf_vla._MODULES))
def test_public_name_is_importable(name):
    assert getattr(hf_vla, name).__name__ == name


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'Polcy'"):
        hf_vla.Polcy  # noqa: B018


CHECK = """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from hf_vla.models.auto import FAMILIES, family_class
for model_type, (config_name, model_name, processor_name) in FAMILIES.items():
    config_class = family_class(model_type, "configuration")
    assert type(AutoConfig.for_model(model_type)) is config_class, model_type
    assert processor_class_from_name(processor_name).__name__ == processor_name
    assert PROCESSOR_MAPPING[config_class] is family_class(model_type, "processing")
    for auto_class in (AutoModel, AutoModelForImageTextToText):
        (model_class,) = auto_class._model_mapping[config_class]
        assert model_class is family_class(model_type, "modeling"), model_class
print("known")
"""
ENTRY_POINTS = [
    "import transformers",
    "from transformers import AutoModel",
    "from transformers import AutoConfig",
    "from transformers import AutoProcessor",
    "from transformers import AutoTokenizer",
    "from transformers import AutoImageProcessor",
    "from transformers import AutoModelForImageTextToText",
    "from transformers import PreTrainedModel",
    "from transformers import PreTrainedConfig",
    "from transformers import ProcessorMixin",
    "from transformers import GenerationMixin",
    "from transformers import Trainer",
    "from transformers import pipeline",
    "from transformers import Gemma2ForCausalLM",
    "from transformers import SiglipVisionModel",
    "from transformers import ZoeDepthForDepthEstimation",
    "from transformers.models.auto.modeling_auto import AutoModel",
    "from transformers.models.auto.processing_auto import AutoProcessor",
    "from transformers.models.auto.configuration_auto import AutoConfig",
    "from transformers.models.auto.auto_factory import _LazyAutoMapping",
    "from transformers.modeling_layers import GradientCheckpointingLayer",
    "from transformers.generation.utils import GenerationMixin",
    "from transformers.modeling_utils import PreTrainedModel",
    "from transformers.processing_utils import ProcessorMixin",
    "from transformers.image_processing_utils import BaseImageProcessor",
    "from transformers.tokenization_utils_base import PreTrainedTokenizerBase",
    "import peft",
    "import accelerate",
    "import datasets",
    *(f"from hf_vla import {name}" for name in sorted(hf_vla._MODULES)),
    *(f"import {family_module(model_type, kind)}" for model_type in FAMILIES for kind in KINDS),
]
FAST_ENTRY_POINTS = [
    "from transformers import AutoProcessor",
    "from hf_vla import SpatialVLAConfig",
]


@pytest.mark.parametrize("entry_point", FAST_ENTRY_POINTS)
@pytest.mark.parametrize("order", ["hf_vla first", "hf_vla last"])
def test_auto_classes_know_the_families(entry_point, order):
    lines = ["import hf_vla", entry_point]
    assert run("\n".join(lines if order == "hf_vla first" else lines[::-1]) + CHECK) == "known"


@pytest.mark.slow
@pytest.mark.parametrize("entry_point", [e for e in ENTRY_POINTS if e not in FAST_ENTRY_POINTS])
@pytest.mark.parametrize("order", ["hf_vla first", "hf_vla last"])
def test_auto_classes_know_the_families_from_any_entry_point(entry_point, order):
    lines = ["import hf_vla", entry_point]
    assert run("\n".join(lines if order == "hf_vla first" else lines[::-1]) + CHECK) == "known"


def test_other_families_load_without_ours():
    code = """
import sys, hf_vla
from transformers import AutoModel, BertConfig
config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
assert type(AutoModel.from_config(config)).__name__ == "BertModel"
print([name for name in sys.modules if name.startswith("hf_vla.models.") and ".modeling_" in name])
"""
    assert run(code) == "[]"


def test_importing_and_reloading_again_is_harmless():
    assert run("import importlib, hf_vla, hf_vla.models.auto as auto\nimportlib.reload(hf_vla)" + CHECK) == "known"
    code = "from transformers import AutoProcessor, AutoModel\nimport importlib, hf_vla, hf_vla.models.auto as auto"
    assert run(code + "\nimportlib.reload(auto); importlib.reload(hf_vla)" + CHECK) == "known"
