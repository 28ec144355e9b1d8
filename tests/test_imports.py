"""The import rule: a module imports only from earlier ranks of the design."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANKS = [
    {
        "scae_dali.config",
        "scae_dali.plan.random",
        "scae_dali.saliency.isolation",
        "scae_dali.saliency.look",
    },
    {f"scae_dali.{name}" for name in ("scan", "cache_meta", "records", "longtail", "layout")},
    {"scae_dali.data.names", "scae_dali.saliency.reach"},
    {
        "scae_dali.data.index",
        "scae_dali.plan.schedule",
        "scae_dali.cache.environment",
        "scae_dali.saliency.layers",
    },
    {f"scae_dali.{name}" for name in ("resident", "chunk_writer", "cam", "limits")},
    {f"scae_dali.{n}" for n in ("region", "crop", "mixing", "order", "gradcam", "cache", "verify")},
    {"scae_dali.saliency.scorecam"},
    {
        "scae_dali.training.losses",
        "scae_dali.training.networks",
        "scae_dali.training.ranks",
        "scae_dali.training.checkpoint",
        "scae_dali.training.ema",
        "scae_dali.data.pixels",
    },
    {f"scae_dali.{name}" for name in ("second_stage", "evaluation", "lock", "divergence")},
    {"scae_dali.methods.base", "scae_dali.methods.conditionals", "scae_dali.stage.graph"},
    {f"scae_dali.methods.{n}" for n in ("rectangle", "guidance", "batch", "paste", "policy")},
    {f"scae_dali.methods.{n}" for n in ("none", "random_erasing", "scae", "mixup", "cutmix")},
    {f"scae_dali.methods.{n}" for n in ("cutout", "grid")},
    {f"scae_dali.methods.{n}" for n in ("grid_mask", "semantic_grid_mask")},
    {f"scae_dali.methods.{n}" for n in ("rand_augment", "auto_augment", "trivial_augment")},
    {"scae_dali.methods.saliency_mix", "scae_dali.methods.keep_augment"},
    {"scae_dali.methods.compose"},
    {"scae_dali.methods"},
    {"scae_dali.stage.table"},
    {"scae_dali.stage.history"},
    {"scae_dali.stage.wiring"},
    {"scae_dali.stage.partner", "scae_dali.stage.loader", "scae_dali.training.log"},
    {"scae_dali.stage.stage", "scae_dali.saliency.harvest"},
    {"scae_dali.saliency.refresh"},
    {"scae_dali"},
    {"pipelines.config", "pipelines.classes"},
    {"pipelines.data"},
    {"pipelines.images", "pipelines.recipe"},
    {f"pipelines.{name}" for name in ("train", "val", "saliency", "arrays", "resume")},
    {"pipelines.loaders"},
    {"pipelines.guide"},
    {"pipelines.state"},
    {"pipelines"},
    {"train"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
NUMPY_ALONE = ("rng", "schedule", "region", "crop", "config", "longtail")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Every module or package member that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in RANK else node.module for name in full}
    return names


SOURCES = sorted([*ROOT.glob("scae_dali/**/*.py"), *ROOT.glob("pipelines/*.py"), ROOT / "train.py"])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path))
def test_a_module_imports_only_from_earlier_ranks(path):
    name = module_name(path)
    assert name in RANK, f"give {name} a rank"
    project = {n for n in imported(path) if n.split(".")[0] in ("scae_dali", "pipelines", "train")}
    late = {n for n in project if RANK[n] >= RANK[name]}
    assert not late


@pytest.mark.parametrize("name", NUMPY_ALONE)
def test_the_pure_core_needs_only_numpy(name):
    top = {n.split(".")[0] for n in imported(ROOT / "scae_dali" / f"{name}.py")}
    assert not top & {"torch", "torchvision", "nvidia", "lmdb"}
