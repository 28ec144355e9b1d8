"""What every augmentation has: settings, a run and samples that it plans for, and two halves.

A method is a module with a dataclass `Config`, its settings, and a class `Method`, made as
Method(config, run). `plan` decides with arrays alone and is pure; `apply` turns the plan into DALI
operators. This module has the base classes of both, and the classes of their arguments.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Literal

import numpy as np
from nvidia.dali import Pipeline
from nvidia.dali.pipeline import do_not_convert

from scae_dali.checks import IMAGENET_MEAN, IMAGENET_STD, check
from scae_dali.plan.random import Stream, uniforms

DataNode = Any
Triple = tuple[float, float, float]
Kind = Literal["policy", "erase", "mix"]
# Fields of a method that mixes in a partner, which the pipeline fetches.
MIX_FIELDS = {"partner_id": 1}
# What errors advise where partners cannot be fetched.
NO_PARTNERS = "set the method's mix_prob=0, or leave cmo out"


class Status(IntFlag):
    """What happened to a sample, for the counts in the log."""

    ERASED = 1
    NO_MAP = 2  # erased, or pasted into, without guidance: the cache holds no map
    FLAT_MAP = 4  # erased, or pasted into, without guidance: the map is constant
    NO_FIT = 8  # not erased: no rectangle fitted into the crop
    MIXED = 16  # with a partner that the pipeline fetches
    MIXED_IN_BATCH = 32  # with a partner of the same batch


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a plan knows of the training: all that it may depend on besides the samples.

    epochs: T of eq. 5. labels: int64 [N], of all samples. class_counts: int64 [K], samples of each
    class. mean, std: of the images as `apply` gets them.
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
    keys: int64 [B], what the random numbers hang on: the id in the low 32 bits, and above them how
    often the sample came before within the epoch.
    iteration, place: int64 [B], the batch's number in the run, the sample's position in the batch.
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


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a method, and what a run must do for it; by default it needs nothing."""

    # These are not annotated, so they are no fields. A subclass may have a field of the same name.
    refresh_every = 0  # epochs between two saliency passes; 0: the cache was built offline
    lam_max = 0.0  # λ at the end of the run (eq. 5)
    neighbors = 0  # nearest classes that a partner may come from, besides the image's own

    def __post_init__(self) -> None:
        """Subclasses check their fields here, and call this method of their bases."""

    @property
    def guided(self) -> bool:
        """Whether the method looks at saliency maps with these settings."""
        return False

    @property
    def wants_neighbors(self) -> bool:
        """Whether every saliency pass must find the nearest classes of each."""
        return False

    def neighbors_for(self, class_counts: np.ndarray) -> int:
        """How many of the nearest classes the method asks for, of data with so many samples of each
        class; 0: none. class_counts: int64 [K]."""
        return self.neighbors


@dataclass(frozen=True, kw_only=True)
class GuidedConfig(Config):
    """The settings of a method that looks at saliency maps.

    Args:
        refresh_every: Epochs between two saliency passes. 0 makes no passes: the cache was built
            beforehand and stays as it is.
    """

    refresh_every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.refresh_every >= 0, f"refresh_every must be >= 0, got {self.refresh_every}")

    @property
    def guided(self) -> bool:
        return True


class Method(ABC):
    """An augmentation of one run.

    kinds: what it does, in the order of Kind. Methods combine if no two have a kind in common; a
    method without kinds combines with none. conditional: whether `apply` needs a pipeline with
    `enable_conditionals=True`. fields: what `plan` returns besides `status`, `box` and `mu`, with
    the width of each. pastes: whether `apply` pastes boxes of the partners that the pipeline
    fetches. Otherwise the pipeline blends these partners with the crops before `apply`.
    """

    kinds: tuple[Kind, ...] = ()
    conditional: bool = False
    fields: Mapping[str, int] = {}
    pastes: bool = False

    def __init__(self, config: Any, run: Run) -> None:
        self.config = config
        self.run = run

    @abstractmethod
    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        """Decide for samples, by arrays alone.

        Returns `status` (int64 [B], of Status); `box` (float64 [B, 4], (y, x, h, w) in pixels of
        the crop, of no area where nothing is erased) if there is any; and for each of `fields`
        float64 [B, width], or [B] if the width is 1.

        A method that mixes in partners which the pipeline fetches has MIX_FIELDS. It gives the
        status MIXED to the samples that are mixed, and plans `partner_id` (the sample's own id
        where it is not mixed) and `mu` (float64 [B], the weight of the own sample). A method
        that mixes within the batch gives those samples the status MIXED_IN_BATCH, and plans `mu`
        and `source` (int64 [B], the partner's position in the batch; the own one without partner).
        """

    def settle(
        self, plan: dict[str, np.ndarray], window: np.ndarray, flip: np.ndarray
    ) -> dict[str, np.ndarray]:
        """What changes in the plan once it is known how the fetched partners are cropped.

        plan: what `plan` returned for the n mixed samples, as float64. window: float64 [n, 4], the
        partners' crops (y, x, h, w) as shares of their full frames. flip: bool [n], whether a
        partner's crop is turned left to right before it is mixed in. Returns the fields that
        change, with their new values.
        """
        return {}

    def partner_weights(self, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
        """How likely each image of a batch is the partner of each that is mixed, where partners
        must be of the batch because no others can be fetched: float64 [n, B], up to a factor. The
        default is: all are equally likely.

        labels: int64 [n], of the mixed images. others: int64 [B], of all images of the batch.
        """
        return np.ones((len(labels), len(others)))

    @abstractmethod
    def apply(self, images: DataNode, plan: Any) -> DataNode:
        """Do what is planned, inside a graph. images: HWC, already blended with fetched partners
        unless the method pastes them. plan: a PlanNodes of scae_dali.stage.stage, which has the
        plan's fields by name."""

    @property
    def mixes(self) -> bool:
        """Whether it mixes in partners, which the pipeline must fetch."""
        return MIX_FIELDS.keys() <= self.fields.keys()

    @property
    def moves_pixels(self) -> bool:
        """Whether a pixel may end elsewhere than the plan's window and flip say."""
        return "policy" in self.kinds


@contextmanager
def branches_explained() -> Iterator[None]:
    """Within it, DALI's error for a branch in a pipeline that may branch says why it could not.

    DALI rewrites the branches from the source of the function that defines the pipeline. Code of
    `python -c`, of stdin and of `exec` has none.
    """
    try:
        yield
    except TypeError as error:
        allowed = getattr(Pipeline.current(), "_conditionals_enabled", False)
        if not (allowed and "conditional context" in str(error)):
            raise
        raise ValueError(
            "the function that defines the pipeline must have its source in a file or a notebook "
            "where the stage branches, got one of python -c, stdin or exec (or one that is marked "
            "do_not_convert), which DALI cannot rewrite: put it into a file"
        ) from error


@do_not_convert
def require_conditionals(where: str, remedy: str) -> None:
    """Raise ValueError if the pipeline that is being defined may not branch on data.

    where: what needs it. remedy: how to do without.
    """
    if not getattr(Pipeline.current(), "_conditionals_enabled", True):
        raise ValueError(
            f"enable_conditionals must be True where {where}: define the pipeline with "
            f"@pipeline_def(enable_conditionals=True, ...), or {remedy}"
        )
