"""Cutout (DeVries and Taylor, 2017): a square whose centre is any pixel, clipped at the border."""

import numpy as np

from scae_dali.config import CutoutConfig as Config
from scae_dali.methods import rectangle
from scae_dali.methods.base import Samples, Status
from scae_dali.plan import region
from scae_dali.plan.random import Stream

__all__ = ["Config", "Method"]


class Method(rectangle.Erasing):
    """Erase with probability `prob`, the centre uniform over the pixels of the crop."""

    config: Config

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        status = np.zeros_like(samples.ids)
        box = np.zeros((len(samples.ids), 4))
        erased = np.flatnonzero(samples.draw(self.run, Stream.ERASE, 1)[:, 0] < self.config.prob)
        chosen = samples.take(erased)
        hw = np.full_like(chosen.size_px, self.config.length)
        first, last = region.centre_range(hw, chosen.size_px, "clip")
        centre = region.uniform_centre(chosen.draw(self.run, Stream.CENTRE, 2), first, last)
        box[erased] = region.box_at(centre, hw, chosen.size_px)
        status[erased] = int(Status.ERASED)
        return {"status": status, "box": box} | rectangle.fill_fields(
            samples, self.run, self.config
        )
