"""No augmentation beyond crop and flip: the baseline that every figure is a ratio to."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from scae_dali.methods import base
from scae_dali.methods.base import DataNode, Samples

__all__ = ["Config", "Method"]


@dataclass(frozen=True, kw_only=True)
class Config(base.Config):
    """There is nothing to set."""


class Method(base.Method):
    """Plans nothing and leaves the images as they are."""

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        return {"status": np.zeros_like(samples.ids)}

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        return images
