"""SCAE: where from the saliency map, how strongly from the epoch, how often from the class.

Eqs. 4-7. A sample whose map is missing or constant is erased without guidance (λ = 0), and its
status says so.
"""

from array_api_compat import array_namespace

from scae_dali import region, schedule
from scae_dali.config import ScaeConfig as Config
from scae_dali.methods import rectangle
from scae_dali.methods.base import Run, Samples, Status, zeros
from scae_dali.rng import Stream

__all__ = ["Config", "Method"]


class Method:
    """Erase a sample of class k with probability p_k, around a centre drawn from P."""

    def __init__(self, config: Config, run: Run) -> None:
        self.config = config
        self.run = run
        self.fields = rectangle.fields(config)
        frequency = schedule.frequency(run.class_counts)
        if not config.class_aware:
            frequency = frequency**0
        self.erase_prob = schedule.erase_prob(frequency, config.p_min, config.p_max, config.gamma)

    def plan(self, samples):
        xp = array_namespace(samples.ids)
        status = xp.zeros_like(samples.ids)
        box = zeros(samples.ids, samples.ids.shape[0], 4)
        prob = xp.asarray(self.erase_prob, device=samples.ids.device)[samples.labels]
        erased, hw, fitted = rectangle.choose(samples, self.run, self.config, prob)
        status[erased] = int(Status.NO_FIT)
        erased, hw = erased[fitted], hw[fitted]
        if erased.shape[0]:
            box[erased], status[erased] = self._place(samples.take(erased), hw)
        return {"status": status, "box": box} | rectangle.fill_fields(
            samples, self.run, self.config
        )

    def apply(self, images, plan):
        return rectangle.erase(images, plan, self.run, self.config)

    def _place(self, samples: Samples, hw):
        """Boxes float64 [B, 4] and status int64 [B] for samples that are erased, of sizes hw."""
        xp = array_namespace(samples.ids)
        lam, saliency, status = self._guidance(samples)
        first, last = region.centre_range(hw, samples.size_px, self.config.border)
        centre = region.draw_centre(
            samples.draw(self.run, Stream.CENTRE, region.DRAWS),
            saliency,
            lam,
            samples.window,
            samples.size_px,
            first,
            last,
            lam_bound=abs(self.config.lam_max),
        )
        return xp.astype(region.box_at(centre, hw, samples.size_px), xp.float64), status

    def _guidance(self, samples: Samples):
        """λ float64 [B], Â float64 [B, gh, gw], status int64 [B]; λ = 0 where there is no map."""
        xp = array_namespace(samples.ids)
        status = xp.full_like(samples.ids, int(Status.ERASED))
        lam = schedule.lam(samples.epoch, self.run.epochs, self.config.lam_max)
        if self.run.saliency is None or not xp.any(lam != 0):
            return 0.0 * lam, zeros(lam, lam.shape[0], 1, 1), status
        maps, found = self.run.saliency(samples.ids)
        flat = found & (xp.max(maps, axis=(1, 2)) == xp.min(maps, axis=(1, 2)))
        guided = lam != 0
        status = status + xp.where(guided & ~found, int(Status.NO_MAP), 0)
        status = status + xp.where(guided & flat, int(Status.FLAT_MAP), 0)
        lam = xp.where(found & ~flat, lam, xp.zeros_like(lam))
        return lam, xp.astype(maps, xp.float64) / 255, status
