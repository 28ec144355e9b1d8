"""SCAE with a grid: it is guided and adapts to the class as SCAE does, and erases as GridMask does.

A pixel is drawn by eq. 4, and a square of the grid is centred there. The pixel is drawn from one
period of the grid, d x d pixels at a uniform position in the crop. In the whole crop, some offsets
would have more pixels than others, and λ = 0 would not be GridMask.
"""

from dataclasses import dataclass

import numpy as np

from scae_dali.methods import grid
from scae_dali.methods.base import Samples
from scae_dali.methods.class_adaptive import ClassAdaptive, ClassAdaptiveConfig
from scae_dali.plan import region

__all__ = ["Config", "Method"]


@dataclass(frozen=True, kw_only=True)
class Config(ClassAdaptiveConfig, grid.GridConfig):
    """SCAE, which erases a grid of squares instead of a rectangle."""


class Method(ClassAdaptive, grid.Grid):
    """A grid with the centre of a square drawn from P of eq. 4. For λ = 0, each is GridMask's grid.

    As λ goes to 0 the offset becomes uniform, if the grid is upright and its period fits into the
    crop; otherwise nearly so.
    """

    config: Config

    def _locate(self, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
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
