"""Random Erasing (Zhong et al., AAAI 2020): a rectangle anywhere in the crop, with one probability.

Area and aspect are uniform as in the paper and its code; torchvision and timm draw the aspect
log-uniform, and their settings are presets.
"""

from scae_dali.config import RandomErasingConfig as Config
from scae_dali.methods import rectangle
from scae_dali.methods.base import Samples, Status, zeros
from scae_dali.plan import region
from scae_dali.plan.random import Array, Stream, array_namespace

__all__ = ["Config", "Method"]


class Method(rectangle.Erasing):
    """Erase with probability `prob`, the position uniform over those that fit."""

    config: Config

    def plan(self, samples: Samples) -> dict[str, Array]:
        xp = array_namespace(samples.ids)
        status = xp.zeros_like(samples.ids)
        box = zeros(samples.ids, samples.ids.shape[0], 4)
        erased, hw, fitted = rectangle.choose(samples, self.run, self.config, self.config.prob)
        chosen = samples.take(erased)
        first, last = region.centre_range(hw, chosen.size_px, "inside")
        centre = region.uniform_centre(chosen.draw(self.run, Stream.CENTRE, 2), first, last)
        drawn = region.box_at(centre, hw, chosen.size_px)
        box[erased] = xp.astype(drawn * fitted[:, None], xp.float64)
        status[erased] = xp.where(fitted, int(Status.ERASED), int(Status.NO_FIT))
        return {"status": status, "box": box} | rectangle.fill_fields(
            samples, self.run, self.config
        )
