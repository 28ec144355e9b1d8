"""Cutout (DeVries and Taylor, 2017): a square whose centre is any pixel, clipped at the border."""

from dataclasses import dataclass

import numpy as np

from scae_dali.checks import check, check_prob
from scae_dali.methods.base import Samples
from scae_dali.methods.erasing import ErasingConfig
from scae_dali.methods.rectangle import Rectangle
from scae_dali.plan.random import Stream

__all__ = ["Config", "Method"]


@dataclass(frozen=True, kw_only=True)
class Config(ErasingConfig):
    """Cutout (DeVries and Taylor, 2017).

    Args:
        prob: Probability that an image is erased.
        length: Side of the square in pixels, an even number. The authors take 8 for CIFAR-100 and
            16 for CIFAR-10.
    """

    prob: float = 1.0
    length: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prob("prob", self.prob)
        check(
            self.length >= 2 and self.length % 2 == 0,
            "length must be a positive even number of pixels, half on each side of the centre, got "
            f"{self.length}; the authors' is 8 for CIFAR-100 and 16 for CIFAR-10",
        )


class Method(Rectangle):
    """Erase with probability `prob`, the centre uniform over the pixels of the crop."""

    def _choose(
        self, samples: Samples, prob: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = np.flatnonzero(samples.draw(self.run, Stream.ERASE, 1)[:, 0] < prob)
        return rows, np.full((len(rows), 2), self.config.length), np.ones(len(rows), np.bool_)

    def _locate(self, samples: Samples, hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._locate_anywhere(samples, hw, "clip")
