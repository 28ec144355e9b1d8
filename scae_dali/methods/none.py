"""No augmentation beyond crop and flip: the baseline that every figure is a ratio to."""

from typing import ClassVar

import numpy as np

from scae_dali.config import NoneConfig as Config
from scae_dali.methods.base import Kind, Run

__all__ = ["Config", "Method"]


class Method:
    """Plans nothing and leaves the images as they are."""

    kinds: ClassVar[tuple[Kind, ...]] = ()
    conditional: ClassVar[bool] = False
    fields: ClassVar[dict[str, int]] = {}

    def __init__(self, config: Config, run: Run) -> None:
        pass

    def plan(self, samples):
        return {"status": np.zeros_like(samples.ids)}

    def apply(self, images, plan):
        return images
