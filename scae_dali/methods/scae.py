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
from scae_dali.methods.base import MIX_FIELDS, DataNode, Kind, Run, Samples, Status
from scae_dali.plan import region, schedule
from scae_dali.plan.mixing import Partners, mix_weight
from scae_dali.plan.random import Stream

__all__ = ["ClassAdaptive", "Config", "Method"]


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
        # A class without samples is neither mixed nor a partner.
        tail = (frequency < config.tail) & (frequency > 0)
        erase_prob = schedule.erase_prob(frequency, config.p_min, config.p_max, config.gamma)
        lam_max = np.full(len(frequency), float(config.lam_max))
        if config.tail_erase == "always":
            erase_prob[tail] = 1.0
        if config.tail_lambda is not None:
            lam_max[tail] = config.tail_lambda
        self._tail, self._erase_prob, self._lam_max = tail, erase_prob, lam_max
        self.mixes = bool(config.mix_prob and tail.any())
        self.kinds: tuple[Kind, ...] = ("erase", "mix") if self.mixes else ("erase",)
        if self.mixes:
            self.partners = Partners(run.labels, len(frequency))
            self.fields |= MIX_FIELDS

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        prob = self._erase_prob[samples.labels]
        if not self.mixes:
            return self._erase(samples, prob)
        rows, mix = self._mix(samples)
        prob[rows] = 0.0
        plan = self._erase(samples, prob) | mix
        plan["status"][rows] = int(Status.MIXED)
        return plan

    def _erase(self, samples: Samples, prob: np.ndarray) -> dict[str, np.ndarray]:
        """The plan without mixing. prob: float64 [B], of erasing."""
        raise NotImplementedError

    def _mix(self, samples: Samples) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Eq. 8: which samples are mixed, int64 [n] rows, and the plan's `mu` and `partner_id`."""
        tail = np.flatnonzero(self._tail[samples.labels])
        u = samples.take(tail).draw(self.run, Stream.MIX, 2)
        mixed = u[:, 0] < self.config.mix_prob
        rows, chosen = tail[mixed], samples.take(tail[mixed])
        mu = np.ones(len(samples.ids))
        mu[rows] = mix_weight(u[mixed, 1], self.config.mix_alpha)
        v = chosen.draw(self.run, Stream.PARTNER, 2)
        partner = samples.ids.copy()
        partner[rows] = self.partners.draw(v, chosen.ids, chosen.labels, self._neighbors())
        return rows, {"mu": mu, "partner_id": partner}

    def _neighbors(self) -> np.ndarray | None:
        """int [K, m] of the nearest classes, or None before they are known."""
        known = self.run.neighbors() if self.config.neighbors and self.run.neighbors else None
        return None if known is None else known[:, : self.config.neighbors]

    def _guidance(self, samples: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """λ float64 [B], Â float64 [B, gh, gw], status int64 [B]; λ = 0 where there is no map."""
        status = np.full_like(samples.ids, int(Status.ERASED))
        lam = schedule.lam(samples.epoch, self.run.epochs, self._lam_max[samples.labels])
        if not lam.any():
            return lam, np.zeros((len(lam), 1, 1)), status
        saliency, known, missing = guidance.maps(samples, self.run)
        status = status + np.where(lam != 0, missing, 0)
        return np.where(known, lam, 0.0), saliency, status

    def _draw_centre(
        self,
        samples: Samples,
        saliency: np.ndarray,
        lam: np.ndarray,
        first: np.ndarray,
        last: np.ndarray,
    ) -> np.ndarray:
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

    def _erase(self, samples: Samples, prob: np.ndarray) -> dict[str, np.ndarray]:
        status = np.zeros_like(samples.ids)
        box = np.zeros((len(samples.ids), 4))
        erased, hw, fitted = rectangle.choose(samples, self.run, self.config, prob)
        status[erased] = int(Status.NO_FIT)
        erased, hw = erased[fitted], hw[fitted]
        if len(erased):
            box[erased], status[erased] = self._place(samples.take(erased), hw)
        fill = rectangle.fill_fields(samples, self.run, self.config)
        return {"status": status, "box": box} | fill

    def _place(self, samples: Samples, hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes int64 [B, 4] and status int64 [B] for samples that are erased, of sizes hw."""
        lam, saliency, status = self._guidance(samples)
        first, last = region.centre_range(hw, samples.size_px, self.config.border)
        centre = self._draw_centre(samples, saliency, lam, first, last)
        return region.box_at(centre, hw, samples.size_px), status
