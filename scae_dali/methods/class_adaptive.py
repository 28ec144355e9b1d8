"""What SCAE adds to a method that erases: guidance by saliency maps, and adaptation to the class.

Eqs. 4-8, whatever the shape that is erased: `scae` erases a rectangle, `semantic_grid_mask` a grid.
A sample whose map is missing or constant is erased without guidance (λ = 0); its status says so.
Samples of tail classes may be mixed with a partner instead, which the pipeline fetches.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from scae_dali.checks import check, check_choice, check_prob
from scae_dali.methods import guidance
from scae_dali.methods.base import MIX_FIELDS, GuidedConfig, Run, Samples, Status
from scae_dali.methods.erasing import Erasing
from scae_dali.plan import region, schedule
from scae_dali.plan.mixing import Partners, mix_weight
from scae_dali.plan.random import Stream

TailErase = Literal["class", "always"]


@dataclass(frozen=True, kw_only=True)
class ClassAdaptiveConfig(GuidedConfig):
    """Where, how strongly and how often SCAE erases, and when it mixes instead (eqs. 4-8).

    Args:
        lam_max: λ at the end of the run: how strongly the map guides the erasing (eq. 5). A
            negative value protects the salient region.
        p_min: Lowest probability of erasing, to which it falls for the rarest classes (eq. 7).
        p_max: Probability of erasing an image of the largest class (eq. 7).
        gamma: Exponent of the class frequency in the probability of erasing (eq. 7). 0 erases every
            class with p_max.
        class_aware: If false, every class is erased with p_max, and no image is mixed.
        tail: Classes with fewer images than this share of the largest class are tail classes (τ in
            eq. 8).
        mix_prob: Probability that an image of a tail class is mixed with another one instead of
            being erased (β in eq. 8).
        mix_alpha: The weight of a mixed image is drawn from Beta(mix_alpha, mix_alpha) (α in
            eq. 8).
        neighbors: The second image of a mix is of the image's own class, or of one of this many
            classes whose classifier weights are most alike. All of these are equally likely. 0
            takes second images of the own class alone.
        tail_erase: How often an image of a tail class that is not mixed is erased: `class` by the
            probability of its class, `always` every time.
        tail_lambda: λ of tail classes at the end of the run, instead of lam_max. -1 protects their
            salient region.
    """

    lam_max: float = 2.0
    p_min: float = 0.1
    p_max: float = 0.5
    gamma: float = 0.5
    class_aware: bool = True
    tail: float = 0.1
    mix_prob: float = 0.5
    mix_alpha: float = 0.4
    neighbors: int = 1
    tail_erase: TailErase = "class"
    tail_lambda: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("lam_max", self.lam_max), ("tail_lambda", self.tail_lambda or 0.0)):
            check(
                abs(value) <= 100,
                f"{name} must be in [-100, 100], got {value}; the paper's value is 2",
            )
        check_prob("p_min", self.p_min)
        check_prob("p_max", self.p_max)
        check(self.gamma >= 0, f"gamma must be >= 0, got {self.gamma}; the paper's value is 0.5")
        check(0 <= self.tail <= 1, f"tail must be in [0, 1], got {self.tail}; the paper's is 0.1")
        check_prob("mix_prob", self.mix_prob)
        check(
            0 < self.mix_alpha <= 100,
            f"mix_alpha must be in (0, 100], got {self.mix_alpha}; the paper's value is 0.4",
        )
        check(self.neighbors >= 0, f"neighbors must be >= 0, got {self.neighbors}")
        check_choice("tail_erase", self.tail_erase, get_args(TailErase))

    @property
    def lam_bound(self) -> float:
        """The largest |λ| that any class reaches."""
        return max(abs(self.lam_max), abs(self.tail_lambda or 0.0))

    @property
    def guided(self) -> bool:
        return self.lam_bound > 0

    @property
    def wants_neighbors(self) -> bool:
        return bool(self.mix_prob and self.neighbors and self.refresh_every)

    def neighbors_for(self, class_counts: np.ndarray) -> int:
        mixes = self.mix_prob and self.tail_classes(class_counts).any()
        return self.neighbors if mixes else 0

    def tail_classes(self, class_counts: np.ndarray) -> np.ndarray:
        """Eq. 8: which classes are of the tail, f_k < τ: bool [K]. class_counts: int [K].

        Without class_aware there is none. A class without samples is not of the tail: it is neither
        mixed nor a partner.
        """
        frequency = schedule.frequency(class_counts)
        return self.class_aware & (frequency < self.tail) & (frequency > 0)


class ClassAdaptive(Erasing):
    """Erases a sample of class k with probability p_k, guided by its map; or mixes it.

    It is combined with the class of a shape, as in Method(ClassAdaptive, Rectangle). Method says
    where the shape lies (`_locate`), with the help of `_guidance` and `_draw_centre`.
    """

    config: ClassAdaptiveConfig

    def __init__(self, config: ClassAdaptiveConfig, run: Run) -> None:
        super().__init__(config, run)
        frequency = schedule.frequency(run.class_counts)
        if not config.class_aware:
            frequency = frequency**0
        tail = config.tail_classes(run.class_counts)
        erase_prob = schedule.erase_prob(frequency, config.p_min, config.p_max, config.gamma)
        lam_max = np.full(len(frequency), float(config.lam_max))
        if config.tail_erase == "always":
            erase_prob[tail] = 1.0
        if config.tail_lambda is not None:
            lam_max[tail] = config.tail_lambda
        self._tail, self._erase_prob, self._lam_max = tail, erase_prob, lam_max
        if config.mix_prob and tail.any():
            self.kinds = ("erase", "mix")
            self.fields = {**self.fields, **MIX_FIELDS}
            self.partners = Partners(run.labels, len(frequency))

    def _prob(self, samples: Samples) -> np.ndarray:
        return self._erase_prob[samples.labels]

    def _regions(self, samples: Samples, prob: np.ndarray) -> dict[str, np.ndarray]:
        if not self.mixes:
            return super()._regions(samples, prob)
        rows, mix = self._mix(samples)
        prob[rows] = 0.0
        plan = super()._regions(samples, prob) | mix
        plan["status"][rows] = int(Status.MIXED)
        return plan

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

    def partner_weights(self, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Equal for images of the own class and of a neighbouring one, 0 for others."""
        near, classes = self._neighbors(), labels[:, None]
        if near is not None:
            classes = np.concatenate([classes, near.astype(np.int64)[labels]], axis=1)
        return (classes[:, :, None] == others).any(axis=1).astype(np.float64)

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
        saliency, known, missing = guidance.maps(samples.ids, self.run)
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
        """A centre by eq. 4, int64 [B, 2]; see region.draw_centre."""
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
