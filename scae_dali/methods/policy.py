"""Shared by the policies, which transform an image by operations that are chosen at random.

The operations are those of nvidia.dali.auto_aug. What its own functions draw with DALI's random
operators is planned here, so that it depends on the sample alone: which operation, the sign of its
magnitude, and the magnitude. A policy is a sequence of levels; at each, one of a list of
operations is applied.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from nvidia.dali import types
from nvidia.dali.auto_aug.core import select, signed_bin

from scae_dali.config import PolicyConfig
from scae_dali.methods import conditionals
from scae_dali.methods.base import DataNode, Kind, Run, Samples
from scae_dali.plan.random import Stream

Operation = Any  # an Augmentation of nvidia.dali.auto_aug


def translation(config: PolicyConfig) -> dict[str, Any]:
    """What a suite of auto_aug is told of the largest translation."""
    relative = config.max_translate_rel
    return {"use_shape": relative is not None, "max_translate_rel": relative}


class Policy:
    """Every operation of a level, either sign and every magnitude is as likely as the others.

    levels: the operations to choose from. bins: into how many steps a range of magnitudes is
    divided. magnitude: the step of all operations; None: it is drawn too.

    The plan's fields are, for level k, `op{k}`, the place in levels[k]; `sign{k}`, 1 where the
    magnitude is negated; and, where it is drawn, `bin{k}`. Whole numbers, float64 [B].
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("policy",)
    conditional: ClassVar[bool] = True

    def __init__(
        self,
        config: PolicyConfig,
        run: Run,
        levels: Sequence[Sequence[Operation]],
        bins: int,
        magnitude: int | None = None,
    ) -> None:
        self.config = config
        self.run = run
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
        conditionals.require("a policy is applied", "leave the policy out")
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
    """auto_aug calls operators by names that DALI deprecates; nobody here can mend that."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for one in caught:
        if not issubclass(one.category, DeprecationWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
