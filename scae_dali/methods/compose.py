"""Methods by name, one or several: `rand_augment+scae` transforms first and erases then, and
`mixup|cutmix` mixes each batch by one of the two.

Whatever the order of the names, images are transformed by a policy first, then erased, then mixed.
The samples of the tail that SCAE itself mixes are mixed as crops, before all of that. Images that
CMO pastes boxes of are transformed by the policy too, with random numbers of their own. The
saliency maps are those of the crop before the policy.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, get_args

import numpy as np

from scae_dali.methods import switch
from scae_dali.methods.base import DataNode, GuidedConfig, Kind, Method, Run, Samples
from scae_dali.methods.loading import load, make_config, make_method
from scae_dali.plan.random import derive

_WHY_ONE = {
    "policy": "an image is transformed by one policy",
    "erase": "one region of an image is planned to be erased",
    "mix": (
        "an image is mixed with one other at most (scae and semantic_grid_mask mix where the data "
        "set has classes of the tail: their mix_prob=0 switches it off; mixup|cutmix takes one of "
        "the two for each batch)"
    ),
}


def split(names: str) -> list[str]:
    """`a+b|c` -> [a, b, c]. Raises ValueError where a name is empty or comes twice, and where |
    joins anything but two of switch.SWITCHED."""
    out = [name.strip() for name in re.split(r"[+|]", names)]
    if not all(out) or len(set(out)) < len(out):
        raise ValueError(
            f"method must be a name, or different ones joined by +, got {names!r}; for instance "
            "scae, or rand_augment+scae"
        )
    for part in names.split("+"):
        joined = [name.strip() for name in part.split("|")]
        if len(joined) > 1 and (len(joined) > 2 or not set(joined) <= set(switch.SWITCHED)):
            raise ValueError(
                f"only two of {', '.join(switch.SWITCHED)} can be joined by |, got "
                f"{'|'.join(joined)}; join other methods by +"
            )
    return out


def switched(names: str) -> str | None:
    """The two methods that are joined by |: `a+b|c` -> `b|c`. None where there are none."""
    return next((part.replace(" ", "") for part in names.split("+") if "|" in part), None)


def configs(names: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The Config of every method in `names`, by the method's name. If a|b is among the names, the
    last Config is that of the switch between the two, under `a|b`.

    settings: of a single method the fields of its Config, or {name: its Config}; of several, for
    each by name, its Config or a mapping of its fields; and `switch_prob`, if there is a switch.
    Raises ValueError for unknown names and settings.
    """
    parts = split(names)
    modules = {name: load(name) for name in parts}
    if len(parts) == 1 and not _is_config(settings.get(parts[0]), modules[parts[0]]):
        settings = {parts[0]: settings}
    pair = switched(names)
    if pair:
        modules[pair] = switch
    if "switch_prob" in settings:
        settings = dict(settings)
        switch_prob = settings.pop("switch_prob")
        if not pair:
            raise ValueError(
                "switch_prob is for two methods that are joined by |, as in mixup|cutmix, got "
                f"{switch_prob} with method {names!r}; leave it out"
            )
        settings[pair] = {"switch_prob": switch_prob}
    if unknown := sorted(set(settings) - set(modules)):
        raise ValueError(
            f"settings of {names!r} go by the method's name, as in {parts[0]}={{...}}, got "
            f"{', '.join(unknown)}"
        )
    made = {}
    for name, module in modules.items():
        given = settings.get(name, {})
        if _is_config(given, module):
            made[name] = given
        elif isinstance(given, Mapping):
            made[name] = make_config(module, given)
        else:
            raise ValueError(
                f"settings of {name} must be a mapping, as in {name}={{...}}, or its Config, got "
                f"{name}={given!r}"
            )
    return made


def _is_config(given: Any, module: ModuleType) -> bool:
    return isinstance(given, module.Config)


def make(configs: Mapping[str, Any], run: Run) -> Method:
    """The method of these settings, or the composition of several.

    configs: {name: its Config}, see `configs`. Raises ValueError where methods do not combine.
    """
    made: dict[str, Any] = {}
    for name, config in configs.items():
        if "|" in name:
            made[name] = switch.Method(config, run, {one: made.pop(one) for one in name.split("|")})
        else:
            made[name] = make_method(load(name), config, run)
    if len(made) == 1:
        return next(iter(made.values()))
    _check(made)
    order = get_args(Kind)
    methods = sorted(made.values(), key=lambda one: order.index(one.kinds[0]))
    if not any(method.pastes for method in methods):
        return Composition(methods, configs, run)
    other = dataclasses.replace(run, seed=derive(run.seed, "partners"))
    policies = [name for name, method in made.items() if tuple(method.kinds) == ("policy",)]
    twins = [make_method(load(name), configs[name], other) for name in policies]
    return Composition(methods, configs, run, twins)


def guided(configs: Mapping[str, Any]) -> list[GuidedConfig]:
    """Those of the Configs whose methods look at saliency maps."""
    return [one for one in configs.values() if isinstance(one, GuidedConfig) and one.guided]


def _check(methods: Mapping[str, Method]) -> None:
    """Raise ValueError where methods do not combine."""
    of: dict[str, str] = {}  # kind -> the method that has it
    plans: dict[str, str] = {}  # field -> the method that plans it
    for name, method in methods.items():
        if not method.kinds:
            raise ValueError(
                f"method {name} combines with no other, got {'+'.join(methods)}: "
                + ("leave it out" if name == "none" else "its Method has no kinds")
            )
        for kind in method.kinds:
            if kind in of:
                raise ValueError(f"{of[kind]} and {name} do not combine: {_WHY_ONE[kind]}")
            of[kind] = name
        for field in method.fields:
            if field in plans:
                raise ValueError(
                    f"{plans[field]} and {name} do not combine: both plan a field {field!r}"
                )
            plans[field] = name


class _OfPartner:
    """The plan for a partner. Its fields stand in the plan of the sample, under names that begin
    with `partner_`."""

    def __init__(self, plan: Any) -> None:
        self._plan = plan

    @staticmethod
    def field(name: str) -> str:
        return f"partner_{name}"

    def part(self, name: str, *how: Any) -> DataNode:
        return self._plan.part(self.field(name), *how)

    def scalar(self, name: str, dtype: Any) -> DataNode:
        return self._plan.scalar(self.field(name), dtype)


class Composition(Method):
    """Methods one after the other, in this order.

    twins: the policies once more, with other random numbers. They transform partners that are
    pasted.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        configs: Mapping[str, Any],
        run: Run,
        twins: Sequence[Method] = (),
    ) -> None:
        super().__init__(configs, run)
        self.methods, self.twins = methods, twins
        self.kinds = tuple(kind for method in methods for kind in method.kinds)
        self.conditional = any(method.conditional for method in methods)
        self.fields = {name: width for method in methods for name, width in method.fields.items()}
        for twin in twins:
            self.fields |= {_OfPartner.field(name): n for name, n in twin.fields.items()}
        self.pastes = any(method.pastes for method in methods)

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        plans = [method.plan(samples) for method in self.methods]
        status = plans[0]["status"]
        for plan in plans[1:]:
            status = status | plan["status"]
        both = {name: value for plan in plans for name, value in plan.items()} | {"status": status}
        for twin in self.twins:
            ids = both["partner_id"]
            theirs = dataclasses.replace(samples, ids=ids, labels=self.run.labels[ids])
            plan = twin.plan(theirs)
            both |= {_OfPartner.field(name): plan[name] for name in twin.fields}
        return both

    def settle(
        self, plan: dict[str, np.ndarray], window: np.ndarray, flip: np.ndarray
    ) -> dict[str, np.ndarray]:
        return self._mixing.settle(plan, window, flip)

    def partner_weights(self, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
        return self._mixing.partner_weights(labels, others)

    @property
    def _mixing(self) -> Method:
        """The method that mixes in partners which the pipeline fetches."""
        return next(method for method in self.methods if method.mixes)

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        if self.twins:
            plan.transform_partners = self._transform
        for method in self.methods:
            images = method.apply(images, plan)
        return images

    def _transform(self, images: DataNode, plan: Any) -> DataNode:
        """The partners' crops as the policies transform them."""
        for twin in self.twins:
            images = twin.apply(images, _OfPartner(plan))
        return images
