"""Shared by the methods that mix images of one batch: who is whose partner, and the partners.

The permutation is a function of (seed, iteration) alone. Everything else is drawn for each sample
from (seed, epoch, id), or, where `per` is `batch`, once for all from (seed, iteration), as in the
authors' code.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from nvidia.dali import fn, types

from scae_dali.checks import check, check_choice, check_prob
from scae_dali.methods import base
from scae_dali.methods.base import DataNode, Kind, Run, Samples
from scae_dali.plan.mixing import mix_weight
from scae_dali.plan.random import Stream, uniforms

# `source`: the partner's position in the batch; `source_flip`: 1 if the two flips differ.
FIELDS = {"source": 1, "source_flip": 1}
DRAWS = 4  # of a sample or a batch: whether, the weight, and two for the method


@dataclass(frozen=True, kw_only=True)
class BatchMixConfig(base.Config):
    """Mixing images of one batch.

    Args:
        prob: Probability that an image, or with per=batch a batch, is mixed.
        alpha: The weight of a mix is drawn from Beta(alpha, alpha).
        per: `sample` draws for each image, `batch` draws once for all images of a batch, as the
            authors' code does.
    """

    prob: float = 1.0
    alpha: float = 1.0
    per: Literal["sample", "batch"] = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prob("prob", self.prob)
        check(
            0 < self.alpha <= 100,
            f"alpha must be in (0, 100], got {self.alpha}; published ones are 1, and for MixUp on "
            "ImageNet 0.2",
        )
        check_choice("per", self.per, ("sample", "batch"))


class BatchMix(base.Method):
    """Mixes each image with another one of its batch.

    A subclass says what is mixed (`plan_where`), and how DALI does it (`mix`).
    """

    kinds: tuple[Kind, ...] = ("mix",)
    config: Any  # a BatchMixConfig

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        return self.plan_where(samples, np.ones(len(samples.ids), np.bool_))

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        return self.mix(images, partner_images(images, plan), plan)

    def plan_where(self, samples: Samples, wanted: np.ndarray) -> dict[str, np.ndarray]:
        """The plan, in which samples that are not wanted, bool [B], are not mixed."""
        raise NotImplementedError

    def mix(self, images: DataNode, others: DataNode, plan: Any) -> DataNode:
        """Do what is planned. images: HWC. others: those of their partners, see partner_images."""
        raise NotImplementedError


def draw(
    samples: Samples, run: Run, config: BatchMixConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which samples are mixed, bool [B]; their weights by Beta(alpha, alpha), float64 [B]; and two
    more uniforms, float64 [B, 2]."""
    if config.per == "batch":
        u = uniforms(run.seed, Stream.BATCH_MIX, samples.iteration, 0 * samples.place, DRAWS)
    else:
        u = samples.draw(run, Stream.MIX, DRAWS)
    return u[:, 0] < config.prob, mix_weight(u[:, 1], config.alpha), u[:, 2:]


def partners(
    samples: Samples, run: Run, mixed: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The rows of the partners, int64 [B], and FIELDS; a sample that is not mixed is its own."""
    u = uniforms(run.seed, Stream.PERMUTATION, samples.iteration, samples.place, 1)[:, 0]
    # A plan may be of several batches. Each is permuted by itself.
    batch = np.cumsum(samples.place == 0)
    rows = np.where(mixed, np.argsort(batch + u, stable=True), np.arange(len(u)))
    flip = samples.flip != samples.flip[rows]
    return rows, {"source": samples.place[rows], "source_flip": flip.astype(np.float64)}


def partner_images(images: DataNode, plan: Any) -> DataNode:
    """The images of the partners, HWC, flipped as the images that they are mixed into."""
    other = fn.permute_batch(images, indices=plan.scalar("source", types.INT32))
    return fn.flip(other, horizontal=plan.scalar("source_flip", types.INT32))
