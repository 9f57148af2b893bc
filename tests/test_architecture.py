"""The house rules of the package's layout, read from the source with `ast`; each rule is shown to fire below."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
# room -> floor; a room may import itself and any lower floor, so rooms on one floor do not know each other
FLOORS = {
    "actions": 0,
    "models": 1,
    "data": 1,
    "training": 2,
    "policy": 2,
    "evaluation": 3,
    "serving": 3,
    "hub": 4,
    "cli": 5,
}
# in these folders a file is one implementation: it imports the folder's base, and only the registry knows them all
IMPLEMENTATIONS = ("hf_vla.actions.tokenizers", "hf_vla.actions.heads", "hf_vla.evaluation.envs")
SHARED = ("base", "mujoco", "networks", "rendering")
MAX_LINES = 400


def read_package():
    """{dotted module name: source} of every file; a package is named like its folder."""
    files = sorted((SRC / "hf_vla").rglob("*.py"))
    parts = {path: path.relative_to(SRC).with_suffix("").parts for path in files}
    return {".".join(p[:-1] if p[-1] == "__init__" else p): path.read_text() for path, p in parts.items()}


SOURCES = read_package()


def imported_modules(tree, modules):
    """hf_vla modules that a tree imports, wherever in the file; relative imports come back with their dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "hf_vla")
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "hf_vla":
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules else node.module for name in submodules)


def import_errors(module, tree, modules):
    packages = {name.rpartition(".")[0] for name in modules}
    folder, _, leaf = module.rpartition(".")
    for target in imported_modules(tree, modules):
        if target.startswith("."):
            yield f"relative import {target}"
        elif target in packages:
            yield f"imports the package {target}, not a concrete module"
        else:
            own, other = module.split(".")[1], target.split(".")[1]
            if other != own and FLOORS[other] >= FLOORS[own]:
                yield f"{own} must not import {other}"
            sibling = target.removeprefix(f"{folder}.").split(".")[0]
            if folder in IMPLEMENTATIONS and target.startswith(f"{folder}.") and leaf not in ("registry", *SHARED):
                if sibling not in SHARED:
                    yield f"the implementation {leaf} imports its sibling {sibling}"


def statement_errors(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if {"pickle", "dill", "joblib"} & {(name or "").split(".")[0] for name in names}:
                yield "imports pickle"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
            if called in ("print", "eval", "exec") or (called == "torch.load" and not safe):
                yield f"calls {called}"
            elif called.endswith(".cuda"):
                yield "calls .cuda()"
            elif any(k.arg == "allow_pickle" and getattr(k.value, "value", True) for k in node.keywords):
                yield "allows pickle"


def errors(module, source, modules=None):
    """Every broken rule of one file, as text."""
    tree = ast.parse(source)
    found = list(statement_errors(tree))
    if module != "hf_vla":  # the public names and the registration are the root's whole job
        found += import_errors(module, tree, {*SOURCES, module} if modules is None else modules)
    if source.count("\n") > MAX_LINES and not module.rpartition(".")[2].startswith("modeling_"):
        found.append(f"longer than {MAX_LINES} lines")
    return found


def package_errors(module, source):
    """A package's __init__ holds a docstring and nothing else."""
    body = ast.parse(source).body
    documented = len(body) == 1 and ast.get_docstring(ast.Module(body, [])) is not None
    return [] if documented else [f"{module}/__init__.py holds more or less than a docstring"]


def circle(graph):
    """One import circle as a list of modules, or None."""
    done = set()

    def walk(module, path):
        if module in path:
            return path[path.index(module) :] + [module]
        if module not in done:
            done.add(module)
            for target in graph.get(module, ()):
                if found := walk(target, [*path, module]):
                    return found
        return None

    return next((found for module in graph if (found := walk(module, []))), None)


@pytest.mark.parametrize("module", SOURCES)
def test_file_keeps_the_rules(module):
    assert not errors(module, SOURCES[module])


@pytest.mark.parametrize("module", sorted({m.rpartition(".")[0] for m in SOURCES} - {"", "hf_vla"}))
def test_package_init_is_only_a_docstring(module):
    assert not package_errors(module, SOURCES.get(module, ""))


def test_imports_have_no_circle():
    graph = {m: set(imported_modules(ast.parse(s), SOURCES)) - {"hf_vla"} for m, s in SOURCES.items() if m != "hf_vla"}
    assert circle(graph) is None


MODULES = {
    "hf_vla",
    "hf_vla.actions",
    "hf_vla.actions.codec",
    "hf_vla.actions.tokenizers",
    "hf_vla.actions.tokenizers.base",
    "hf_vla.actions.tokenizers.fast",
    "hf_vla.actions.tokenizers.registry",
    "hf_vla.actions.tokenizers.uniform",
    "hf_vla.data",
    "hf_vla.data.lerobot",
    "hf_vla.models",
    "hf_vla.models.outputs",
    "hf_vla.policy",
    "hf_vla.training",
    "hf_vla.training.trainer",
}


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("hf_vla.actions.codec", "from hf_vla.models.outputs import VLAOutput", "actions must not import models"),
        ("hf_vla.actions.codec", "def f():\n    import hf_vla.policy", "actions must not import policy"),
        ("hf_vla.models.outputs", "from hf_vla.data.lerobot import x", "models must not import data"),
        ("hf_vla.data.lerobot", "from hf_vla.models import outputs", "data must not import models"),
        ("hf_vla.policy", "from hf_vla.training.trainer import train", "policy must not import training"),
        ("hf_vla.actions.tokenizers.fast", "from hf_vla.actions.tokenizers.uniform import x", "its sibling uniform"),
        ("hf_vla.actions.tokenizers.fast", "from hf_vla.actions.tokenizers.registry import x", "its sibling registry"),
        ("hf_vla.policy", "from hf_vla.actions import ActionCodec", "the package hf_vla.actions"),
        ("hf_vla.policy", "import hf_vla", "the package hf_vla,"),
        ("hf_vla.policy", "from .actions.codec import x", "relative import .actions.codec"),
        ("hf_vla.policy", "print('hello')", "calls print"),
        ("hf_vla.policy", "eval('1')", "calls eval"),
        ("hf_vla.policy", "torch.load('x')", "calls torch.load"),
        ("hf_vla.policy", "torch.load('x', weights_only=False)", "calls torch.load"),
        ("hf_vla.policy", "model.cuda()", "calls .cuda()"),
        ("hf_vla.policy", "import pickle", "imports pickle"),
        ("hf_vla.policy", "from pickle import loads", "imports pickle"),
        ("hf_vla.policy", "np.load('x', allow_pickle=True)", "allows pickle"),
        ("hf_vla.policy", "\n" * 401, "longer than 400 lines"),
    ],
)
def test_each_rule_fires(module, source, message):
    assert any(message in error for error in errors(module, source, MODULES))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hf_vla.actions.tokenizers.fast", "from hf_vla.actions.tokenizers.base import ActionTokenizer"),
        ("hf_vla.actions.tokenizers.registry", "from hf_vla.actions.tokenizers.uniform import UniformTokenizer"),
        ("hf_vla.policy", "from hf_vla.models.outputs import VLAOutput\nmodel.eval()"),
        ("hf_vla.models.spatialvla.modeling_spatialvla", "\n" * 401),
    ],
)
def test_no_rule_fires_on_good_code(module, source):
    assert errors(module, source, MODULES) == []


def test_package_rule_fires():
    assert package_errors("hf_vla.actions", '"""Actions."""\nimport os') and package_errors("hf_vla.actions", "")


def test_circle_rule_fires():
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) is None
