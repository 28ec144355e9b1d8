"""Random Erasing (Zhong et al., AAAI 2020): a rectangle anywhere in the crop, with one probability.

Area and aspect are uniform as in the paper and its code; torchvision and timm draw the aspect
log-uniform, and their settings are presets.
"""

import numpy as np

from scae_dali.config import RandomErasingConfig as Config
from scae_dali.methods import rectangle
from scae_dali.methods.base import Samples, Status
from scae_dali.plan import region
from scae_dali.plan.random import Stream

__all__ = ["Config", "Method"]


class Method(rectangle.Erasing):
    """Erase with probability `prob`, the position uniform over those that fit."""

    config: Config

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        status = np.zeros_like(samples.ids)
        box = np.zeros((len(samples.ids), 4))
        erased, hw, fitted = rectangle.choose(samples, self.run, self.config, self.config.prob)
        chosen = samples.take(erased)
        first, last = region.centre_range(hw, chosen.size_px, "inside")
        centre = region.uniform_centre(chosen.draw(self.run, Stream.CENTRE, 2), first, last)
        box[erased] = region.box_at(centre, hw, chosen.size_px) * fitted[:, None]
        status[erased] = np.where(fitted, int(Status.ERASED), int(Status.NO_FIT))
        return {"status": status, "box": box} | rectangle.fill_fields(
            samples, self.run, self.config
        )
