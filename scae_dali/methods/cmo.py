"""CMO, context-rich minority oversampling (Park et al., CVPR 2022): CutMix whose second images are
drawn from the whole data set, by default all classes equally often.

So the first image, which is the context, is mostly of a large class. What is pasted is of any class
equally often.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from scae_dali.checks import check
from scae_dali.methods import base, batch, guidance, paste
from scae_dali.methods.base import MIX_FIELDS, DataNode, GuidedConfig, Kind, Run, Samples, Status
from scae_dali.plan import region
from scae_dali.plan.mixing import Partners
from scae_dali.plan.random import Stream

__all__ = ["Config", "Method"]


@dataclass(frozen=True, kw_only=True)
class Config(batch.BatchMixConfig, GuidedConfig):
    """CMO (Park et al., CVPR 2022), which pastes boxes of images of all classes equally often.

    Args:
        weight_power: Second images are drawn from the whole data set, with probabilities in
            proportion to 1 / (images of their class)^weight_power. 1 draws all classes equally
            often, 0 all images.
        skip_first: Epochs at the start of the run in which nothing is mixed.
        skip_last: Epochs at the end of the run in which nothing is mixed.
        saliency: Whether the box is centred on the peak of the second image's saliency map, so that
            the object itself is pasted. If false, no maps are needed.
    """

    prob: float = 0.5
    per: Literal["sample", "batch"] = "batch"
    weight_power: float = 1.0
    skip_first: int = 3
    skip_last: int = 3
    saliency: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            0 <= self.weight_power <= 10,
            f"weight_power must be in [0, 10], got {self.weight_power}; the paper's value is 1",
        )
        for name in ("skip_first", "skip_last"):
            value = getattr(self, name)
            check(value >= 0, f"{name} must be >= 0 epochs, got {value}; the paper's value is 3")

    @property
    def guided(self) -> bool:
        return self.saliency


class Method(base.Method):
    """Paste a box of the partner, with probability `prob`. The box is that of CutMix: of the area
    1 - λ, λ ~ Beta(alpha, alpha), around a uniform centre, clipped; μ is the share of its area that
    the image keeps. With `saliency` the centre is where the saliency of the partner's crop is
    largest, unless the partner has no map or a constant one, or nothing in its crop is salient.

    In a composition, other methods transform and erase the image before the box is pasted. The
    partner is cropped, flipped and transformed by the policy, with random numbers of its own. It is
    not erased. (The authors augment both alike.)
    """

    kinds: tuple[Kind, ...] = ("mix",)
    pastes = True
    config: Config

    def __init__(self, config: Config, run: Run) -> None:
        super().__init__(config, run)
        check(
            config.skip_first + config.skip_last < run.epochs,
            f"skip_first + skip_last must be below epochs ({run.epochs}), got {config.skip_first} "
            f"+ {config.skip_last}: nothing would ever be mixed; set both to 0 (train.py: "
            "--cmo.skip_first 0 --cmo.skip_last 0)",
        )
        self.fields = MIX_FIELDS | paste.fields("paste")
        if config.saliency:
            self.fields |= {"share": 1, "centre": 2}  # 1 - λ, and a uniform pixel
        self._partners = Partners(run.labels, len(run.class_counts))

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        mixed, lam, u = batch.draw(samples, self.run, self.config)
        mixed &= self._acts(samples.epoch)
        v = samples.draw(self.run, Stream.PARTNER, 2)
        partner = self._partners.draw_from_all(v, self.config.weight_power)
        size_px = samples.size_px
        centre = region.uniform_centre(u, np.zeros_like(size_px), size_px - 1)
        share = np.where(mixed, 1 - lam, 0.0)
        return {
            "status": np.where(mixed, int(Status.MIXED), 0),
            "partner_id": np.where(mixed, partner, samples.ids),
            "share": share,
            "centre": centre,
            **paste.around("paste", share, centre, size_px),
        }

    def settle(
        self, plan: dict[str, np.ndarray], window: np.ndarray, flip: np.ndarray
    ) -> dict[str, np.ndarray]:
        if not self.config.saliency:
            return {}
        size_px = plan["paste_shapes"][:, :2].astype(np.int64)
        ids, uniform = plan["partner_id"].astype(np.int64), plan["centre"].astype(np.int64)
        centre, missing = guidance.peaks(ids, window, size_px, flip, uniform, self.run)
        status = plan["status"].astype(np.int64) | missing
        return {"status": status, **paste.around("paste", plan["share"], centre, size_px)}

    def partner_weights(self, labels: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Of each image as in the whole data set, so that on average classes come as often."""
        counts = np.asarray(self.run.class_counts, np.float64)  # integers have no negative powers
        weights = counts[others] ** -self.config.weight_power
        return np.tile(weights, (len(labels), 1))

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        return plan.paste_partners("paste", images)

    def _acts(self, epoch: np.ndarray) -> np.ndarray:
        """Whether images are mixed in these epochs: int64 [B] -> bool [B]. Beyond the last epoch,
        where a pipeline reads ahead, it is as in the last one."""
        last = self.run.epochs - 1
        t = np.minimum(epoch, last)
        return (t >= self.config.skip_first) & (t <= last - self.config.skip_last)
