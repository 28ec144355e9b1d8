"""SCAE with a grid: where, how strongly and how often as there, what is erased as in GridMask.

A pixel is drawn by eq. 4, and a square of the grid is centred there. The pixel is drawn from one
period of the grid, d x d pixels that lie anywhere in the crop, as likely one place as another: over
the whole crop, some offsets would have more pixels than others, and λ = 0 would not be GridMask.
"""

from typing import Any

import numpy as np

from scae_dali.config import SemanticGridMaskConfig as Config
from scae_dali.methods import grid, rectangle, scae
from scae_dali.methods.base import DataNode, Run, Samples
from scae_dali.plan import region
from scae_dali.plan.random import Stream

__all__ = ["Config", "Method"]


class Method(scae.ClassAdaptive):
    """A grid with the centre of a square drawn from P. Where λ = 0 it is GridMask's, grid by grid.

    As λ goes to 0 the offset becomes uniform, if the grid is upright and its period fits into the
    crop; otherwise nearly so.
    """

    config: Config

    def __init__(self, config: Config, run: Run) -> None:
        super().__init__(config, run, grid.FIELDS | rectangle.fields(config, run))

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        return grid.erase(images, plan, self.run, self.config)

    def _erase(self, samples: Samples, prob: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.flatnonzero(samples.draw(self.run, Stream.ERASE, 1)[:, 0] < prob)
        grids, status = grid.none(samples), np.zeros_like(samples.ids)
        if len(rows):
            grids[rows], status[rows] = self._place(samples.take(rows))
        fill = rectangle.fill_fields(samples, self.run, self.config)
        return {"status": status, "grid": grids} | fill

    def _place(self, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
        """Grids float64 [B, 7] and status int64 [B] for samples that are erased."""
        grids = grid.draw(samples, self.run, self.config)
        lam, saliency, status = self._guidance(samples)
        guided = np.flatnonzero(lam)
        if len(guided):
            chosen = samples.take(guided)
            period = np.minimum(chosen.size_px, grids[guided, :1].astype(np.int64))  # [n, 2]
            u = grid.place_draws(chosen, self.run)
            first = region.uniform_centre(u, np.zeros_like(period), chosen.size_px - period)
            last = first + period - 1
            centre = self._draw_centre(chosen, saliency[guided], lam[guided], first, last)
            grids[guided] = grid.centred(grids[guided], centre)
        return grids, status
