"""SCAE: erases a rectangle where the saliency map says, guided more strongly from epoch to epoch,
and the more often the more frequent the class is.

The rectangle is sized as in Random Erasing. The rest is shared with the method that erases a grid,
and is in `class_adaptive`.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np

from scae_dali.checks import check_choice
from scae_dali.methods.base import Samples
from scae_dali.methods.class_adaptive import ClassAdaptive, ClassAdaptiveConfig
from scae_dali.methods.rectangle import Rectangle, RectangleConfig
from scae_dali.plan import region
from scae_dali.plan.region import Border

__all__ = ["Config", "Method"]


@dataclass(frozen=True, kw_only=True)
class Config(ClassAdaptiveConfig, RectangleConfig):
    """SCAE, which erases a rectangle where the saliency map says.

    Args:
        border: `inside` draws the rectangle's centre where the rectangle fits into the crop. `clip`
            draws it anywhere and clips the rectangle at the border.
    """

    border: Border = "inside"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("border", self.border, get_args(Border))


class Method(ClassAdaptive, Rectangle):
    """A rectangle around a centre drawn from P of eq. 4."""

    config: Config

    def _locate(self, samples: Samples, hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lam, saliency, status = self._guidance(samples)
        first, last = region.centre_range(hw, samples.size_px, self.config.border)
        centre = self._draw_centre(samples, saliency, lam, first, last)
        return region.box_at(centre, hw, samples.size_px), status
