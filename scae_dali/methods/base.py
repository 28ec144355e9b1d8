"""What every augmentation shares: the run it belongs to, the samples it plans for, its two halves.

A method is a module with a class `Method`, made from (config, run), and a dataclass `Config`:
`plan` decides with arrays alone and is pure; `apply` turns the plan into DALI operators. A new
method is a new module of this shape; `load` finds it by name.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntFlag
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np

from scae_dali.config import IMAGENET_MEAN, IMAGENET_STD
from scae_dali.plan.random import Stream, uniforms

DataNode = Any
Triple = tuple[float, float, float]
BUILT_IN = (
    "none",
    "random_erasing",
    "cutout",
    "grid_mask",
    "scae",
    "semantic_grid_mask",
    "rand_augment",
    "auto_augment",
    "trivial_augment",
    "keep_augment",
    "mixup",
    "cutmix",
    "saliency_mix",
)
Kind = Literal["policy", "erase", "mix"]
# Of a method that mixes in a second sample, which the pipeline fetches.
MIX_FIELDS = {"partner_id": 1}


class Status(IntFlag):
    """What happened to a sample, for the counts in the log."""

    ERASED = 1
    NO_MAP = 2  # erased without guidance: the cache holds no map of it
    FLAT_MAP = 4  # erased without guidance: its map is constant
    NO_FIT = 8  # not erased: no rectangle fitted into the crop
    MIXED = 16  # with a second sample that the pipeline fetches
    MIXED_IN_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a plan may depend on besides the samples.

    epochs: T of eq. 5. labels: int64 [N], of all samples. class_counts: int64 [K], of them.
    mean, std: of the images as `apply` gets them.
    saliency: ids int64 [B] -> (maps uint8 [B, gh, gw], found bool [B]); None: there are no maps.
    neighbors: () -> int [K, m], the nearest other classes, or None as long as they are unknown.
    """

    seed: int
    epochs: int
    labels: Any
    class_counts: Any
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    saliency: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    neighbors: Callable[[], Any] | None = None

    @property
    def grey_levels(self) -> bool:
        """Whether the images are in [0, 255]; otherwise they are normalised, or in [0, 1]."""
        return max(*self.mean, *self.std) > 1


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A batch as the plan sees it.

    ids, labels, epoch: int64 [B]. window: float64 [B, 4], the crop (y, x, h, w) as shares of the
    full frame. size_px: int64 [B, 2], (H, W) of the crop as the network sees it.
    keys: int64 [B], of the random numbers: the id, and in its high 32 bits how often the sample
    came before within the epoch.
    iteration, place: int64 [B], the number of the batch in the run, and the place in it.
    flip: bool [B], whether the crop is flipped later, as far as the stage knows.
    """

    ids: np.ndarray
    keys: np.ndarray
    labels: np.ndarray
    epoch: np.ndarray
    window: np.ndarray
    size_px: np.ndarray
    iteration: np.ndarray
    place: np.ndarray
    flip: np.ndarray

    def take(self, rows: np.ndarray) -> "Samples":
        """The samples of these rows (int64 [n] or bool [B])."""
        fields = {f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)}
        return Samples(**fields)

    def draw(self, run: Run, stream: Stream, n: int) -> np.ndarray:
        """Uniforms in (0, 1) of one stream: float64 [B, n]."""
        return uniforms(run.seed, stream, self.epoch, self.keys, n)


class Method(Protocol):
    """An augmentation, made by Method(config, run).

    plan(samples) returns `status` (int64 [B], of Status); `box` (float64 [B, 4], (y, x, h, w) in
    pixels of the crop) where it is not the do-nothing one, of no area; and for each of `fields`
    float64 [B, width], or [B] if the width is 1. A method that mixes in second samples has
    MIX_FIELDS, gives the status MIXED alone to the samples that are mixed, and plans `partner_id`
    (the sample's own where it is not mixed) and `mu` (float64 [B], the weight of the own sample).
    A method that mixes within the batch gives those samples the status MIXED_IN_BATCH and plans
    `source` (int64 [B], the place in the batch of the second sample; its own where there is none)
    and `mu`.
    apply(images, plan) turns HWC images, mixed already, and the plan inside a graph
    (ops.PlanNodes) into images.

    kinds: what it does, of Kind in this order; a list of methods has each kind once at most. A
    method without kinds combines with none. conditional: whether apply needs a pipeline with
    `enable_conditionals=True`.
    """

    @property
    def kinds(self) -> tuple[Kind, ...]: ...

    @property
    def conditional(self) -> bool: ...

    @property
    def fields(self) -> Mapping[str, int]: ...

    def plan(self, samples: Samples) -> dict[str, np.ndarray]: ...

    def apply(self, images: DataNode, plan: Any) -> DataNode: ...


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


def mixes(method: Method) -> bool:
    """Whether a method mixes in second samples, which the pipeline must fetch."""
    return MIX_FIELDS.keys() <= method.fields.keys()
