"""CutMix (Yun et al., ICCV 2019): a box of another image of the batch, labels by area."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from scae_dali.methods import batch, paste
from scae_dali.methods.base import DataNode, Samples, Status
from scae_dali.plan import region

__all__ = ["Config", "Method"]


@dataclass(frozen=True, kw_only=True)
class Config(batch.BatchMixConfig):
    """CutMix (Yun et al., ICCV 2019).

    Published probabilities are 0.5 for PyramidNet on CIFAR and 1 for ResNets.
    """


class Method(batch.BatchMix):
    """Paste a box of the partner, with probability `prob`. The box has the area 1 - λ, with λ ~
    Beta(alpha, alpha), and a uniform centre. It is clipped at the border; μ is the area that the
    image keeps.
    """

    fields = batch.FIELDS | paste.fields("paste")

    def plan_where(self, samples: Samples, wanted: np.ndarray) -> dict[str, np.ndarray]:
        mixed, lam, u = batch.draw(samples, self.run, self.config)
        mixed &= wanted
        rows, source = batch.partners(samples, self.run, mixed)
        size_px = samples.size_px
        centre = region.uniform_centre(u, np.zeros_like(size_px), size_px - 1)
        centre, status = self._centre(samples, rows, mixed, centre)
        box = paste.around("paste", np.where(mixed, 1 - lam, 0.0), centre, size_px)
        status = np.where(mixed, status | int(Status.MIXED_IN_BATCH), 0)
        return {"status": status} | source | box

    def mix(self, images: DataNode, others: DataNode, plan: Any) -> DataNode:
        return paste.paste("paste", images, others, plan)

    def _centre(
        self, samples: Samples, rows: np.ndarray, mixed: np.ndarray, uniform: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Centres of the boxes, int64 [B, 2], and status, int64 [B].

        rows: int64 [B], of the partners. uniform: int64 [B, 2], pixels anywhere.
        """
        return uniform, np.zeros_like(samples.ids)
