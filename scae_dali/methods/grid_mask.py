"""GridMask (Chen et al., 2020): a grid of squares is erased, more often from epoch to epoch."""

from typing import Any

import numpy as np

from scae_dali.config import GridMaskConfig as Config
from scae_dali.methods import grid, rectangle
from scae_dali.methods.base import DataNode, Run, Samples, Status
from scae_dali.plan.random import Stream

__all__ = ["Config", "Method"]


class Method(rectangle.Erasing):
    """Erase with probability prob · min(1, epoch / ramp_epochs); the grid is uniform."""

    config: Config

    def __init__(self, config: Config, run: Run) -> None:
        super().__init__(config, run)
        self.fields |= grid.FIELDS

    def plan(self, samples: Samples) -> dict[str, np.ndarray]:
        prob: float | np.ndarray = self.config.prob
        if self.config.ramp_epochs:
            prob = prob * np.minimum(samples.epoch / self.config.ramp_epochs, 1.0)
        rows = np.flatnonzero(samples.draw(self.run, Stream.ERASE, 1)[:, 0] < prob)
        grids, status = grid.none(samples), np.zeros_like(samples.ids)
        grids[rows] = grid.draw(samples.take(rows), self.run, self.config)
        status[rows] = int(Status.ERASED)
        fill = rectangle.fill_fields(samples, self.run, self.config)
        return {"status": status, "grid": grids} | fill

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        return grid.erase(images, plan, self.run, self.config)
