"""GridMask (Chen et al., 2020): a grid of squares is erased, more often from epoch to epoch."""

from dataclasses import dataclass

import numpy as np

from scae_dali.checks import check, check_prob
from scae_dali.methods import grid
from scae_dali.methods.base import Samples, Status

__all__ = ["Config", "Method"]


@dataclass(frozen=True, kw_only=True)
class Config(grid.GridConfig):
    """GridMask (Chen et al., 2020), by default with the authors' grid for ImageNet.

    The authors have, of d, ratio, rotate, prob and ramp_epochs: ImageNet 96 … 224, 0.6, 360, 0.8,
    240 of 300 epochs; CIFAR-10 24 … 32, 0.4, 0, 0.8.

    Args:
        prob: Probability that an image is erased, reached after ramp_epochs.
        ramp_epochs: Epochs over which the probability grows from 0 to prob. 0 starts with prob at
            once.
    """

    prob: float = 0.8
    ramp_epochs: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prob("prob", self.prob)
        check(
            self.ramp_epochs >= 0,
            f"ramp_epochs must be >= 0, got {self.ramp_epochs}; 0 is no ramp, the authors' is 240 "
            "of 300 epochs",
        )


class Method(grid.Grid):
    """Erase with probability prob · min(1, epoch / ramp_epochs); the grid is uniform."""

    config: Config

    def _prob(self, samples: Samples) -> np.ndarray:
        prob = super()._prob(samples)
        if self.config.ramp_epochs:
            prob = prob * np.minimum(samples.epoch / self.config.ramp_epochs, 1.0)
        return prob

    def _locate(self, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
        grids = grid.draw(samples, self.run, self.config)
        return grids, np.full_like(samples.ids, int(Status.ERASED))
