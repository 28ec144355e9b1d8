"""The import rule: a folder is a floor, and a module imports from floors below its own alone."""

import ast
import graphlib
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = [
    "scae_dali.checks",
    "scae_dali.plan",
    "scae_dali.data",
    "scae_dali.cache",
    "scae_dali.methods",
    "scae_dali.stage",
    "scae_dali.saliency",
    "scae_dali.training",
    "scae_dali.commands",
    "scae_dali",
    "pipelines",
    "train",
    "tools",
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FOLDERS = ("scae_dali", "pipelines", "tools")
SOURCES = sorted([*(p for f in FOLDERS for p in ROOT.glob(f"{f}/**/*.py")), ROOT / "train.py"])
MODULES = {module_name(path) for path in SOURCES}


def floor(name: str) -> int:
    """The number of a module's floor. ValueError where it has none."""
    parts = name.split(".")
    return FLOORS.index(".".join(parts[:2]) if parts[0] == "scae_dali" else parts[0])


def imported(source: str) -> set[str]:
    """Every module or package member that a source imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in full}
    return names


def of_project(source: str) -> set[str]:
    return {n for n in imported(source) if n.split(".")[0] in (*FOLDERS, "train")}


def above(name: str, source: str) -> set[str]:
    """What a module imports from floors above its own."""
    return {n for n in of_project(source) if floor(n) > floor(name)}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_a_module_imports_from_no_floor_above(path):
    assert not above(module_name(path), path.read_text())


def test_the_rule_can_fail():
    assert above("scae_dali.plan.region", "def f():\n    from scae_dali.data import index\n")
    assert above("scae_dali.cache", "import scae_dali.stage.stage")
    assert above("pipelines.data", "from tools.common import about")
    with pytest.raises(ValueError, match="not in list"):
        floor("scae_dali.somewhere.else")


def test_modules_import_in_no_circle():
    uses = {module_name(path): of_project(path.read_text()) for path in SOURCES}
    graphlib.TopologicalSorter(uses).prepare()  # raises CycleError


def test_few_modules_lie_beside_the_folders():
    assert len(list((ROOT / "scae_dali").glob("*.py"))) <= 6


@pytest.mark.parametrize("path", sorted(ROOT.glob("scae_dali/plan/*.py")), ids=module_name)
def test_a_plan_needs_neither_dali_nor_torch_nor_lmdb(path):
    top = {name.split(".")[0] for name in imported(path.read_text())}
    assert not top & {"torch", "torchvision", "nvidia", "lmdb"}
