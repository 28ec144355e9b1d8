"""Shared by the methods that erase one rectangle of an image: its size, and how a plan is made.

`Rectangle` chooses samples and sizes, has the subclass place the rectangles, and writes boxes and
status to the rows of the samples that were chosen.
"""

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from scae_dali.checks import check, check_choice
from scae_dali.methods import erasing
from scae_dali.methods.base import DataNode, Samples, Status
from scae_dali.methods.erasing import Erasing, ErasingConfig
from scae_dali.plan import region
from scae_dali.plan.random import Stream
from scae_dali.plan.region import AspectLaw, Border, Range

_FIRST_TRIES = 3  # nearly always enough; more are drawn for the samples that need them


@dataclass(frozen=True, kw_only=True)
class RectangleConfig(ErasingConfig):
    """The erased rectangle: how large it is, and what fills it.

    Args:
        area: Share of the crop that the rectangle covers, drawn uniformly from [low, high].
        aspect: Height of the rectangle divided by its width, drawn from [low, high].
        aspect_law: `uniform` draws the aspect uniformly, `log` draws its logarithm uniformly.
        tries: How often area and aspect are drawn until the rectangle fits into the crop. If none
            fits, nothing is erased.
    """

    area: Range = (0.02, 0.33)
    aspect: Range = (0.3, 3.3)
    aspect_law: AspectLaw = "uniform"
    tries: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.area
        check(
            0 < low <= high < 1,
            f"area must be 0 < low <= high < 1, got {self.area}; the paper's range is (0.02, 0.33)",
        )
        low, high = self.aspect
        check(
            0 < low <= high,
            f"aspect must be 0 < low <= high, got {self.aspect}; the paper's range is (0.3, 3.3)",
        )
        check_choice("aspect_law", self.aspect_law, get_args(AspectLaw))
        check(1 <= self.tries <= 100, f"tries must be in [1, 100], got {self.tries}")


class Rectangle(Erasing):
    """Erases one rectangle of each sample that is chosen.

    A subclass says where rectangles lie (`_locate`) and, where its settings are no RectangleConfig,
    which samples are erased and by how large a rectangle (`_choose`).
    """

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        return erasing.erase_boxes(images, plan, self.run, self.config)

    def _regions(self, samples: Samples, prob: np.ndarray) -> dict[str, np.ndarray]:
        status = np.zeros_like(samples.ids)
        box = np.zeros((len(samples.ids), 4))
        rows, hw, fitted = self._choose(samples, prob)
        status[rows] = int(Status.NO_FIT)
        rows, hw = rows[fitted], hw[fitted]
        if len(rows):
            box[rows], status[rows] = self._locate(samples.take(rows), hw)
        return {"status": status, "box": box}

    def _choose(
        self, samples: Samples, prob: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which samples are erased, and how large the rectangle is.

        prob: of erasing, float64 [B]. Returns int64 [n], rows of `samples`; int64 [n, 2],
        (h, w) in pixels, see region.draw_size; bool [n], whether a size fitted.
        """
        config = self.config
        tries = min(_FIRST_TRIES, config.tries)
        u = samples.draw(self.run, Stream.ERASE, 1 + 2 * tries)
        rows = np.flatnonzero(u[:, 0] < prob)
        hw, fitted = _sizes(u[rows, 1:], samples.size_px[rows], config)
        again = np.flatnonzero(~fitted)
        if len(again) and config.tries > tries:
            unfit = samples.take(rows[again])
            u = unfit.draw(self.run, Stream.ERASE, 1 + 2 * config.tries)
            hw[again], fitted[again] = _sizes(u[:, 1:], unfit.size_px, config)
        return rows, hw, fitted

    def _locate(self, samples: Samples, hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rectangles of sizes hw, int64 [B, 2] in pixels, for samples that are all erased.

        Returns boxes, int64 or float64 [B, 4], (y, x, h, w) in pixels, and status, int64 [B].
        """
        raise NotImplementedError

    def _locate_anywhere(
        self, samples: Samples, hw: np.ndarray, border: Border
    ) -> tuple[np.ndarray, np.ndarray]:
        """`_locate` with all centres equally likely. border: see region.centre_range."""
        first, last = region.centre_range(hw, samples.size_px, border)
        centre = region.uniform_centre(samples.draw(self.run, Stream.CENTRE, 2), first, last)
        status = np.full_like(samples.ids, int(Status.ERASED))
        return region.box_at(centre, hw, samples.size_px), status


def _sizes(u, size_px, config):
    pairs = u.reshape(len(u), u.shape[1] // 2, 2)
    return region.draw_size(pairs, size_px, config.area, config.aspect, config.aspect_law)
