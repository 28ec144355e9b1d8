"""MixUp (Zhang et al., ICLR 2018): an image plus another one of its batch, weighed at random."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import types

from scae_dali.methods import batch
from scae_dali.methods.base import DataNode, Samples, Status

__all__ = ["Config", "Method"]


@dataclass(frozen=True, kw_only=True)
class Config(batch.BatchMixConfig):
    """MixUp (Zhang et al., ICLR 2018).

    Published alphas are 1 for CIFAR and 0.2 for ImageNet.
    """


class Method(batch.BatchMix):
    """μ·image + (1 - μ)·other, μ ~ Beta(alpha, alpha), with probability `prob`."""

    fields = batch.FIELDS | {"weight": 1}

    def plan_where(self, samples: Samples, wanted: np.ndarray) -> dict[str, np.ndarray]:
        mixed, mu, _ = batch.draw(samples, self.run, self.config)
        mixed &= wanted
        _, source = batch.partners(samples, self.run, mixed)
        mu = np.where(mixed, mu, 1.0)
        status = np.where(mixed, int(Status.MIXED_IN_BATCH), 0)
        return {"status": status, "mu": mu, "weight": mu} | source

    def mix(self, images: DataNode, others: DataNode, plan: Any) -> DataNode:
        """Returns float images: rounding to bytes would cost as much as the mixing."""
        weight = plan.scalar("weight", types.FLOAT)
        return images * weight + others * (1.0 - weight)
