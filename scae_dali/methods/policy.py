"""Shared by the policies, which transform an image by operations that are chosen at random.

The operations are those of nvidia.dali.auto_aug. What its own functions draw with DALI's random
operators is planned here, so that it depends on the sample alone: which operation, the sign of its
magnitude, and the magnitude. A policy is a sequence of levels; at each, one of a list of
operations is applied.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import types
from nvidia.dali.auto_aug.core import select, signed_bin

from scae_dali.checks import check
from scae_dali.methods import base
from scae_dali.methods.base import DataNode, Kind, Run, Samples, require_conditionals
from scae_dali.plan.random import Stream

Operation = Any  # an Augmentation of nvidia.dali.auto_aug


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(base.Config):
    """What all policies have to set: translations, and what comes in from outside the image.

    Args:
        max_translate_rel: Largest translation as a share of the crop. null translates by a number
            of pixels that does not depend on the crop: up to 100 for RandAugment, 32 for
            TrivialAugment and 250 for AutoAugment.
        fill_value: Grey level of what translation, shear and rotation leave empty, from 0 to 255.
    """

    max_translate_rel: float | None = 100 / 224
    fill_value: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = self.max_translate_rel
        check(
            largest is None or 0 <= largest <= 1,
            f"max_translate_rel must be in [0, 1] or None, got {largest}; 100/224 is usual",
        )
        check(
            0 <= self.fill_value <= 255,
            f"fill_value must be a grey level in [0, 255], got {self.fill_value}",
        )


def translation(config: PolicyConfig) -> dict[str, Any]:
    """The arguments by which a suite of auto_aug is told the largest translation."""
    relative = config.max_translate_rel
    return {"use_shape": relative is not None, "max_translate_rel": relative}


class Policy(base.Method):
    """Every operation of a level, either sign and every magnitude is as likely as the others.

    levels: the operations to choose from. bins: into how many steps a range of magnitudes is
    divided. magnitude: the step of all operations; None: it is drawn too.

    The plan's fields are, for level k, `op{k}`, the index in levels[k]; `sign{k}`, 1 where the
    magnitude is negated; and, where it is drawn, `bin{k}`. Whole numbers, float64 [B].
    """

    kinds: tuple[Kind, ...] = ("policy",)
    conditional = True

    def __init__(
        self,
        config: PolicyConfig,
        run: Run,
        levels: Sequence[Sequence[Operation]],
        bins: int,
        magnitude: int | None = None,
    ) -> None:
        super().__init__(config, run)
        self.levels, self.bins, self.magnitude = levels, bins, magnitude
        self._values: dict[str, int] = {}  # field -> how many values it has
        for k, operations in enumerate(levels):
            self._values |= {f"op{k}": len(operations), f"sign{k}": 2}
            if magnitude is None:
                self._values[f"bin{k}"] = bins
        self.fields = dict.fromkeys(self._values, 1)

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        u = samples.draw(self.run, Stream.POLICY, len(self._values))
        drawn = {
            name: np.floor(u[:, j] * values)
            for j, (name, values) in enumerate(self._values.items())
        }
        return {"status": np.zeros_like(samples.ids)} | drawn

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        """images: HWC uint8, CPU or GPU. Raises ValueError in a pipeline without conditionals."""
        require_conditionals("a policy is applied", "leave the policy out")
        settings: dict[str, Any] = {"fill_value": self.config.fill_value}
        if self.config.max_translate_rel is not None:
            settings["shape"] = images.shape()
        for k, operations in enumerate(self.levels):
            magnitude = self.magnitude
            if magnitude is None:
                magnitude = plan.scalar(f"bin{k}", types.INT32)
            with deprecations_hidden():
                images = select(
                    operations,
                    plan.scalar(f"op{k}", types.INT32),
                    data=images,
                    magnitude_bin=signed_bin(magnitude, plan.scalar(f"sign{k}", types.INT32)),
                    num_magnitude_bins=self.bins,
                    **settings,
                )
        return images


@contextmanager
def deprecations_hidden() -> Iterator[None]:
    """Hides DALI's warnings that auto_aug calls operators by deprecated names."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for one in caught:
        if not issubclass(one.category, DeprecationWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
