"""No augmentation beyond crop and flip: the baseline that every figure is a ratio to."""

from typing import ClassVar

from scae_dali.config import NoneConfig as Config
from scae_dali.methods.base import Kind, Run
from scae_dali.plan.random import array_namespace

__all__ = ["Config", "Method"]


class Method:
    """Plans nothing and leaves the images as they are."""

    kinds: ClassVar[tuple[Kind, ...]] = ()
    conditional: ClassVar[bool] = False
    fields: ClassVar[dict[str, int]] = {}

    def __init__(self, config: Config, run: Run) -> None:
        pass

    def plan(self, samples):
        xp = array_namespace(samples.ids)
        return {"status": xp.zeros_like(samples.ids)}

    def apply(self, images, plan):
        return images
