"""SCAE: where from the saliency map, how strongly from the epoch, how often from the class.

Eqs. 4-8. A sample whose map is missing or constant is erased without guidance (λ = 0), and its
status says so. Samples of tail classes may be mixed instead (`mixing`); the pipeline fetches the
second one. What is erased is a rectangle; `semantic_grid_mask` puts a grid in its place.
"""

from typing import Any, ClassVar

import numpy as np

from scae_dali.config import ClassAdaptiveConfig
from scae_dali.config import ScaeConfig as Config
from scae_dali.methods import guidance, rectangle
from scae_dali.methods.base import MIX_FIELDS, DataNode, Kind, Run, Samples, Status, zeros
from scae_dali.plan import region, schedule
from scae_dali.plan.mixing import Partners, mix_weight
from scae_dali.plan.random import Array, Stream, Table, array_namespace, on_host

__all__ = ["ClassAdaptive", "Config", "Method"]


def tail_classes(config: ClassAdaptiveConfig, class_counts: Any) -> np.ndarray:
    """Eq. 8: which classes are of the tail, f_k < τ: bool [K]. class_counts: int [K].

    None is where the method is not class-aware. A class without samples is none: it is neither
    mixed nor a partner.
    """
    frequency = schedule.frequency(class_counts)
    return config.class_aware & (frequency < config.tail) & (frequency > 0)


class ClassAdaptive:
    """Erase a sample of class k with probability p_k, guided by its map; or mix it.

    What is erased is for subclasses: `fields` of the plan for it, `_erase` and `apply`.
    """

    conditional: ClassVar[bool] = False

    def __init__(self, config: ClassAdaptiveConfig, run: Run, fields: dict[str, int]) -> None:
        self.config = config
        self.run = run
        self.fields = fields
        frequency = schedule.frequency(run.class_counts)
        if not config.class_aware:
            frequency = frequency**0
        tail = tail_classes(config, run.class_counts)
        erase_prob = schedule.erase_prob(frequency, config.p_min, config.p_max, config.gamma)
        lam_max = np.full(len(frequency), float(config.lam_max))
        if config.tail_erase == "always":
            erase_prob[tail] = 1.0
        if config.tail_lambda is not None:
            lam_max[tail] = config.tail_lambda
        self._tail, self._erase_prob, self._lam_max = map(Table, (tail, erase_prob, lam_max))
        self.mixes = bool(config.mix_prob and tail.any())
        self.kinds: tuple[Kind, ...] = ("erase", "mix") if self.mixes else ("erase",)
        if self.mixes:
            self.partners = Partners(run.labels, len(frequency))
            self.fields |= MIX_FIELDS

    def plan(self, samples: Samples) -> dict[str, Array]:
        prob = self._erase_prob.at(samples.labels)
        if not self.mixes:
            return self._erase(samples, prob)
        rows, mix = self._mix(samples)
        prob[rows] = 0.0
        plan = self._erase(samples, prob) | mix
        plan["status"][rows] = int(Status.MIXED)
        return plan

    def _erase(self, samples: Samples, prob: Array) -> dict[str, Array]:
        """The plan without mixing. prob: float64 [B], of erasing."""
        raise NotImplementedError

    def _mix(self, samples: Samples):
        """Eq. 8: which samples are mixed, int64 [n] rows, and the plan's `mu` and `partner_id`."""
        xp = array_namespace(samples.ids)
        device = samples.ids.device
        tail = xp.nonzero(self._tail.at(samples.labels))[0]
        chosen = samples.take(tail)
        u, v, ids, labels = map(
            on_host,
            (
                chosen.draw(self.run, Stream.MIX, 2),
                chosen.draw(self.run, Stream.PARTNER, 2),
                chosen.ids,
                chosen.labels,
            ),
        )
        k = np.flatnonzero(u[:, 0] < self.config.mix_prob)
        rows = tail[xp.asarray(k, device=device)]
        mu = zeros(samples.ids, samples.ids.shape[0]) + 1.0
        mu[rows] = xp.asarray(mix_weight(u[k, 1], self.config.mix_alpha), device=device)
        partner = xp.asarray(samples.ids, copy=True)
        partner[rows] = xp.asarray(
            self.partners.draw(v[k], ids[k], labels[k], self._neighbors()), device=device
        )
        return rows, {"mu": mu, "partner_id": partner}

    def _neighbors(self):
        """int [K, m] of the nearest classes, or None before they are known."""
        known = self.run.neighbors() if self.config.neighbors and self.run.neighbors else None
        return None if known is None else known[:, : self.config.neighbors]

    def _guidance(self, samples: Samples) -> tuple[Array, Array, Array]:
        """λ float64 [B], Â float64 [B, gh, gw], status int64 [B]; λ = 0 where there is no map."""
        xp = array_namespace(samples.ids)
        status = xp.full_like(samples.ids, int(Status.ERASED))
        lam = schedule.lam(samples.epoch, self.run.epochs, self._lam_max.at(samples.labels))
        if not xp.any(lam != 0):
            return lam, zeros(lam, lam.shape[0], 1, 1), status
        saliency, known, missing = guidance.maps(samples, self.run)
        status = status + xp.where(lam != 0, missing, xp.zeros_like(missing))
        return xp.where(known, lam, xp.zeros_like(lam)), saliency, status

    def _draw_centre(
        self, samples: Samples, saliency: Array, lam: Array, first: Array, last: Array
    ) -> Array:
        """Eq. 4; see region.draw_centre."""
        return region.draw_centre(
            samples.draw(self.run, Stream.CENTRE, region.DRAWS),
            saliency,
            lam,
            samples.window,
            samples.size_px,
            first,
            last,
            lam_bound=self.config.lam_bound,
        )


class Method(ClassAdaptive):
    """A rectangle around a centre drawn from P."""

    config: Config

    def __init__(self, config: Config, run: Run) -> None:
        super().__init__(config, run, rectangle.fields(config, run))

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        return rectangle.erase(images, plan, self.run, self.config)

    def _erase(self, samples: Samples, prob: Array) -> dict[str, Array]:
        xp = array_namespace(samples.ids)
        status = xp.zeros_like(samples.ids)
        box = zeros(samples.ids, samples.ids.shape[0], 4)
        erased, hw, fitted = rectangle.choose(samples, self.run, self.config, prob)
        status[erased] = int(Status.NO_FIT)
        erased, hw = erased[fitted], hw[fitted]
        if erased.shape[0]:
            box[erased], status[erased] = self._place(samples.take(erased), hw)
        fill = rectangle.fill_fields(samples, self.run, self.config)
        return {"status": status, "box": box} | fill

    def _place(self, samples: Samples, hw: Array) -> tuple[Array, Array]:
        """Boxes float64 [B, 4] and status int64 [B] for samples that are erased, of sizes hw."""
        xp = array_namespace(samples.ids)
        lam, saliency, status = self._guidance(samples)
        first, last = region.centre_range(hw, samples.size_px, self.config.border)
        centre = self._draw_centre(samples, saliency, lam, first, last)
        return xp.astype(region.box_at(centre, hw, samples.size_px), xp.float64), status
