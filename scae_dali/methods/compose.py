"""Methods by name, one or several: `rand_augment+scae` transforms first and erases then.

Whatever the order of the names, a policy comes first, then what is erased, then what is mixed
within the batch. The samples of the tail that SCAE itself mixes are mixed as crops, before all of
that. Saliency is that of the crop before the policy.
"""

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from scae_dali.config import GuidedConfig
from scae_dali.methods.base import DataNode, Kind, Method, Run, Samples, load, make_config

_WHY_ONE = {
    "policy": "an image is transformed by one policy",
    "erase": "one region of an image is planned to be erased",
    "mix": (
        "an image is mixed with one other at most (scae and semantic_grid_mask mix where the data "
        "set has classes of the tail: their mix_prob=0 switches it off)"
    ),
}


def split(names: str) -> list[str]:
    """`a+b` -> its names. ValueError where one is empty or comes twice."""
    out = [name.strip() for name in names.split("+")]
    if not all(out) or len(set(out)) < len(out):
        raise ValueError(
            f"method must be a name, or different ones joined by +, got {names!r}; for instance "
            "scae, or rand_augment+scae"
        )
    return out


def make(names: str, settings: Mapping[str, Any], run: Run) -> Method:
    """The method, or the composition of several.

    settings: of a single method its Config's; of several {name: its Config's}.
    """
    parts = split(names)
    if len(parts) == 1:
        module = load(parts[0])
        return module.Method(make_config(module, settings), run)
    if unknown := sorted(set(settings) - set(parts)):
        raise ValueError(
            f"settings of {names!r} go by the method's name, as in {parts[0]}={{...}}, got "
            f"{', '.join(unknown)}"
        )
    made = {}
    for name in parts:
        module, given = load(name), settings.get(name, {})
        if not isinstance(given, Mapping):
            raise ValueError(
                f"settings of {name} must be a mapping, as in {name}={{...}}, got {name}={given!r}"
            )
        made[name] = module.Method(make_config(module, given), run)
    _check(made)
    order = get_args(Kind)
    return Composition(sorted(made.values(), key=lambda one: order.index(one.kinds[0])))


def guides(method: Method) -> list[GuidedConfig]:
    """The Config of every part of a method that looks at saliency maps."""
    parts = method.methods if isinstance(method, Composition) else [method]
    configs = (getattr(part, "config", None) for part in parts)
    return [config for config in configs if isinstance(config, GuidedConfig) and config.guided]


def _check(methods: Mapping[str, Method]) -> None:
    """Raise ValueError where methods do not combine."""
    of: dict[str, str] = {}  # kind -> the method that has it
    plans: dict[str, str] = {}  # field -> likewise
    for name, method in methods.items():
        kinds = getattr(method, "kinds", ())
        if not kinds:
            raise ValueError(
                f"method {name} combines with no other, got {'+'.join(methods)}: "
                + ("leave it out" if name == "none" else "its Method has no kinds")
            )
        for kind in kinds:
            if kind in of:
                raise ValueError(f"{of[kind]} and {name} do not combine: {_WHY_ONE[kind]}")
            of[kind] = name
        for field in method.fields:
            if field in plans:
                raise ValueError(
                    f"{plans[field]} and {name} do not combine: both plan a field {field!r}"
                )
            plans[field] = name


class Composition:
    """Methods one after the other, in this order."""

    def __init__(self, methods: list[Method]) -> None:
        self.methods = methods
        self.kinds = tuple(kind for method in methods for kind in method.kinds)
        self.conditional = any(getattr(method, "conditional", False) for method in methods)
        self.fields = {name: width for method in methods for name, width in method.fields.items()}

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        plans = [method.plan(samples) for method in self.methods]
        status = plans[0]["status"]
        for plan in plans[1:]:
            status = status | plan["status"]
        return {name: value for plan in plans for name, value in plan.items()} | {"status": status}

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        for method in self.methods:
            images = method.apply(images, plan)
        return images
