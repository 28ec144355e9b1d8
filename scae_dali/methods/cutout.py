"""Cutout (DeVries and Taylor, 2017): a square whose centre is any pixel, clipped at the border."""

from scae_dali.config import CutoutConfig as Config
from scae_dali.methods import rectangle
from scae_dali.methods.base import Samples, Status, zeros
from scae_dali.plan import region
from scae_dali.plan.random import Array, Stream, array_namespace

__all__ = ["Config", "Method"]


class Method(rectangle.Erasing):
    """Erase with probability `prob`, the centre uniform over the pixels of the crop."""

    config: Config

    def plan(self, samples: Samples) -> dict[str, Array]:
        xp = array_namespace(samples.ids)
        status = xp.zeros_like(samples.ids)
        box = zeros(samples.ids, samples.ids.shape[0], 4)
        erased = xp.nonzero(samples.draw(self.run, Stream.ERASE, 1)[:, 0] < self.config.prob)[0]
        chosen = samples.take(erased)
        hw = xp.full_like(chosen.size_px, self.config.length)
        first, last = region.centre_range(hw, chosen.size_px, "clip")
        centre = region.uniform_centre(chosen.draw(self.run, Stream.CENTRE, 2), first, last)
        box[erased] = xp.astype(region.box_at(centre, hw, chosen.size_px), xp.float64)
        status[erased] = int(Status.ERASED)
        return {"status": status, "box": box} | rectangle.fill_fields(
            samples, self.run, self.config
        )
