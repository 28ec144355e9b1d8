"""GridMask (Chen et al., 2020): a grid of squares is erased, more often from epoch to epoch."""

from typing import Any

from scae_dali.config import GridMaskConfig as Config
from scae_dali.methods import grid, rectangle
from scae_dali.methods.base import DataNode, Run, Samples, Status
from scae_dali.plan.random import Array, Stream, array_namespace

__all__ = ["Config", "Method"]


class Method(rectangle.Erasing):
    """Erase with probability prob · min(1, epoch / ramp_epochs); the grid is uniform."""

    config: Config

    def __init__(self, config: Config, run: Run) -> None:
        super().__init__(config, run)
        self.fields |= grid.FIELDS

    def plan(self, samples: Samples) -> dict[str, Array]:
        xp = array_namespace(samples.ids)
        prob: float | Array = self.config.prob
        if self.config.ramp_epochs:
            epoch = xp.astype(samples.epoch, xp.float64)
            prob = prob * (epoch / self.config.ramp_epochs).clip(max=1.0)
        rows = xp.nonzero(samples.draw(self.run, Stream.ERASE, 1)[:, 0] < prob)[0]
        grids, status = grid.none(samples), xp.zeros_like(samples.ids)
        grids[rows] = grid.draw(samples.take(rows), self.run, self.config)
        status[rows] = int(Status.ERASED)
        fill = rectangle.fill_fields(samples, self.run, self.config)
        return {"status": status, "grid": grids} | fill

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        return grid.erase(images, plan, self.run, self.config)
