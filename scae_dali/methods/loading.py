"""Finds the module of a method by its name, and makes its settings and its method.

A new built-in method is a module in this folder, with a class `Config` and a class `Method` that
derive from those of `base`, and its name in BUILT_IN. A module of a user's own is named by its
dotted name. Its classes need not derive from anything: what they lack is filled in here.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from scae_dali.methods.base import Config, DataNode, Method, Run, Samples

BUILT_IN = (
    "none",
    "scae",
    "semantic_grid_mask",
    "random_erasing",
    "cutout",
    "grid_mask",
    "mixup",
    "cutmix",
    "saliency_mix",
    "cmo",
    "keep_augment",
    "rand_augment",
    "auto_augment",
    "trivial_augment",
)


def load(name: str) -> ModuleType:
    """The module of a method: one of BUILT_IN, or the dotted name of the user's own module."""
    if name not in BUILT_IN and "." not in name:
        raise ValueError(
            f"method must be one of {', '.join(BUILT_IN)} or the dotted name of a module with "
            f"Config and Method, got {name!r}"
        )
    try:
        module = importlib.import_module(f"scae_dali.methods.{name}" if name in BUILT_IN else name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is found, and imports something that is not
        raise ValueError(
            f"method {name!r}: there is no module {error.name!r}; put its folder on PYTHONPATH"
        ) from error
    missing = [part for part in ("Config", "Method") if not hasattr(module, part)]
    if missing:
        raise ValueError(f"method {name!r}: the module lacks {' and '.join(missing)}")
    return module


def make_config(module: ModuleType, settings: Mapping[str, Any]) -> Any:
    """module.Config(**settings); ValueError for a setting that it does not have."""
    known = [f.name for f in dataclasses.fields(module.Config)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(
            f"unknown setting {', '.join(unknown)} of {module.__name__}; it has "
            f"{', '.join(known) or 'none'}"
        )
    return module.Config(**settings)


def as_config(config: Any) -> Config:
    """The settings of a method as a Config, which says what a run must do for the method.

    The dataclass of a user's own module need not derive from Config. Names of Config that it lacks
    then have Config's own values.
    """
    if isinstance(config, Config):
        return config
    names = ("guided", "refresh_every", "lam_max", "neighbors", "wants_neighbors")
    told = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return type("Config", (Config,), told)()


class _Foreign(Method):
    """The Method of a user's own module, where it does not derive from the one here."""

    def __init__(self, method: Any, config: Any, run: Run) -> None:
        super().__init__(config, run)
        self.method = method
        self.kinds = getattr(method, "kinds", self.kinds)
        self.conditional = getattr(method, "conditional", self.conditional)
        self.fields = getattr(method, "fields", self.fields)
        self.pastes = getattr(method, "pastes", self.pastes)

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        return self.method.plan(samples)

    def settle(
        self, plan: dict[str, np.ndarray], window: np.ndarray, flip: np.ndarray
    ) -> dict[str, np.ndarray]:
        known = hasattr(self.method, "settle")
        return self.method.settle(plan, window, flip) if known else {}

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        return self.method.apply(images, plan)


def make_method(module: ModuleType, config: Any, run: Run) -> Method:
    """module.Method(config, run), with the defaults of Method for what a user's class lacks."""
    method = module.Method(config, run)
    return method if isinstance(method, Method) else _Foreign(method, config, run)
