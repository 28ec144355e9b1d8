"""MixUp (Zhang et al., ICLR 2018): every sample is mixed with another one of the data set.

Weight and partner are drawn for each sample on its own, so that they do not depend on the batch.
"""

from typing import ClassVar

from array_api_compat import array_namespace

from scae_dali.config import MixupConfig as Config
from scae_dali.methods.base import MIX_FIELDS, Run, Status
from scae_dali.mixing import mix_weight
from scae_dali.rng import Stream

__all__ = ["Config", "Method"]


class Method:
    """Mix with probability `prob`, with weight μ ~ Beta(alpha, alpha)."""

    fields: ClassVar[dict[str, int]] = MIX_FIELDS

    def __init__(self, config: Config, run: Run) -> None:
        self.config = config
        self.run = run

    def plan(self, samples):
        xp = array_namespace(samples.ids)
        u = samples.draw(self.run, Stream.MIX, 2)
        mixed = u[:, 0] < self.config.prob
        u_partner = samples.draw(self.run, Stream.PARTNER, 1)[:, 0]
        others = max(1, len(self.run.labels) - 1)
        partner = xp.astype(xp.floor(u_partner * others), xp.int64)
        partner = (partner + xp.astype(partner >= samples.ids, xp.int64)) % len(self.run.labels)
        return {
            "status": xp.where(mixed, int(Status.MIXED), xp.zeros_like(samples.ids)),
            "mu": xp.where(mixed, mix_weight(u[:, 1], self.config.alpha), xp.ones_like(u_partner)),
            "partner_id": xp.where(mixed, partner, samples.ids),
        }

    def apply(self, images, plan):
        return images
