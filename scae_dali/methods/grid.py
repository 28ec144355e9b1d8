"""Shared by the methods that erase a grid of squares (GridMask): its geometry, and the operators.

A grid repeats a cell of d x d pixels, whose square of side d - ceil(d · ratio) is erased, and is
turned about the image's centre. The plan has what fn.grid_mask takes: with

    g_x = x·cos θ - y·sin θ - shift_x,    g_y = x·sin θ + y·cos θ - shift_y

pixel (y, x) is erased where g_x mod d and g_y mod d are both below the square's side. Shifts are of
half pixels where θ = 0, so that no pixel lies on an edge and float32 decides as float64 does.

The GPU erases by fn.grid_mask. On the CPU, that and filling what it leaves black would take much of
a training pipeline's time. There fn.erase does it: a Python operator, which sees plans and no
images, cuts the squares into rows of pixels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import fn, types

from scae_dali.checks import check
from scae_dali.methods import erasing
from scae_dali.methods.base import DataNode, Run, Samples
from scae_dali.methods.erasing import Erasing, ErasingConfig
from scae_dali.plan.random import Stream

# d, share of its side that is erased, θ in radians, shift_y, shift_x, and (H, W) of the crop.
FIELDS = {"grid": 7}
_CELL, _SHARE, _ANGLE, _SHIFT_Y, _SHIFT_X = range(5)
_DRAWS = 4  # of Stream.GRID
_RADIANS = np.radians(np.arange(361))  # by whole degrees
_COS, _SIN = np.cos(_RADIANS), np.sin(_RADIANS)


@dataclass(frozen=True, kw_only=True)
class GridConfig(ErasingConfig):
    """A grid of squares that are erased, one in every cell of d x d pixels.

    Args:
        d_min: Smallest side d of a cell of the grid in pixels.
        d_max: Upper end of a cell's side in pixels; the side is drawn from [d_min, d_max).
        ratio: Share of a cell's side that is kept between two erased squares, rounded up to whole
            pixels. About (1 - ratio)² of the image is erased.
        rotate: The grid is turned by a whole number of degrees, drawn from [0, rotate). 0 leaves it
            upright.
    """

    d_min: int = 96
    d_max: int = 224
    ratio: float = 0.6
    rotate: int = 360

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            1 <= self.d_min < self.d_max,
            f"d_min and d_max must be 1 <= d_min < d_max, got {self.d_min} and {self.d_max}; the "
            "authors' are 96 and 224 for ImageNet, 24 and 32 for CIFAR-10",
        )
        check(
            0 < self.ratio < 1,
            f"ratio must be in (0, 1), got {self.ratio}; the authors' is 0.6 for ImageNet and 0.4 "
            "for CIFAR-10",
        )
        check(
            0 <= self.rotate <= 360,
            f"rotate must be in [0, 360] degrees, got {self.rotate}; 0 leaves the grid upright",
        )


class Grid(Erasing):
    """Erases a grid of each sample that is chosen; a subclass says where it lies (`_locate`)."""

    def __init__(self, config: Any, run: Run) -> None:
        super().__init__(config, run)
        self.fields = {**self.fields, **FIELDS}

    def apply(self, images: DataNode, plan: Any) -> DataNode:
        return erase(images, plan, self.run, self.config)

    def _regions(self, samples: Samples, prob: np.ndarray) -> dict[str, np.ndarray]:
        status, grids = np.zeros_like(samples.ids), none(samples)
        rows = np.flatnonzero(samples.draw(self.run, Stream.ERASE, 1)[:, 0] < prob)
        if len(rows):
            grids[rows], status[rows] = self._locate(samples.take(rows))
        return {"status": status, "grid": grids}

    def _locate(self, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
        """`grid`, float64 [B, 7], and status, int64 [B], for samples that are all erased."""
        raise NotImplementedError


def none(samples: Samples) -> np.ndarray:
    """`grid` of samples that are left as they are: squares of no size. float64 [B, 7]."""
    grid = np.zeros((len(samples.ids), FIELDS["grid"]))
    grid[:, _CELL] = 1.0
    grid[:, 5:] = samples.size_px
    return grid


def draw(samples: Samples, run: Run, config: GridConfig) -> np.ndarray:
    """`grid` of samples that are erased, d, offset and θ uniform: float64 [B, 7]."""
    u = samples.draw(run, Stream.GRID, _DRAWS)
    cell = config.d_min + np.floor(u[:, 0] * (config.d_max - config.d_min))
    side = cell - np.ceil(cell * config.ratio)
    degrees = np.floor(u[:, 1] * config.rotate).astype(np.int64)
    grid = none(samples)
    grid[:, _CELL] = cell
    grid[:, _SHARE] = side / cell
    grid[:, _ANGLE] = _RADIANS[degrees]
    # Where a square begins: a whole pixel of the upright grid, which is turned about the centre.
    offset = np.floor(u[:, 2:] * cell[:, None])
    half = samples.size_px / 2
    return _shifted(grid, degrees, half - 0.5, half - offset)


def place_draws(samples: Samples, run: Run) -> np.ndarray:
    """Two uniform numbers that `draw` does not use, float64 [B, 2]."""
    return samples.draw(run, Stream.GRID, _DRAWS + 2)[:, _DRAWS:]


def centred(grid: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The same grids, with the centre of a square at a pixel. centre: int64 [B, 2], (y, x).

    The centre of a square that begins at pixel y and is h high is pixel y + h // 2, as in `region`.
    """
    degrees = np.round(grid[:, _ANGLE] * (180 / np.pi)).astype(np.int64)
    side = np.round(grid[:, _CELL] * grid[:, _SHARE])
    half = side // 2 + 0.5
    return _shifted(grid.copy(), degrees, centre, np.stack([half, half], axis=1))


def _shifted(
    grid: np.ndarray, degrees: np.ndarray, pixel: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """`grid` with the shifts that bring a pixel to `target`, float64 [B, 2], its (g_y, g_x)."""
    cos, sin = _COS[degrees], _SIN[degrees]
    y, x = pixel[:, 0], pixel[:, 1]
    grid[:, _SHIFT_Y] = (x * sin + y * cos - target[:, 0]) % grid[:, _CELL]
    grid[:, _SHIFT_X] = (x * cos - y * sin - target[:, 1]) % grid[:, _CELL]
    return grid


def erase(images: DataNode, plan: Any, run: Run, config: GridConfig) -> DataNode:
    """Erases the plan's `grid`. images: HWC with 3 channels, CPU or GPU."""
    if images.device == "gpu":
        return erase_by_mask(images, plan, run, config)
    anchor, shape = fn.python_function(
        plan.part("grid", types.FLOAT64), function=_regions, batch_processing=True, num_outputs=2
    )
    return erasing.erase_rectangles(images, anchor, shape, plan, run, config)


def erase_by_mask(images: DataNode, plan: Any, run: Run, config: GridConfig) -> DataNode:
    """Does `erase` by fn.grid_mask. Where the grid is turned, pixels on an edge may differ."""
    part = plan.part("grid", types.FLOAT)
    keep = fn.grid_mask(
        fn.cast(images * 0 + 1, dtype=types.UINT8),
        tile=fn.cast(part[_CELL], dtype=types.INT32),
        ratio=part[_SHARE],
        angle=part[_ANGLE],
        shift_y=part[_SHIFT_Y],
        shift_x=part[_SHIFT_X],
    )
    return erasing.fill_where(images, keep, plan, run, config)


def _regions(grids: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rectangles as fn.erase takes them: anchors and shapes, float32 [2n] a sample."""
    sample, boxes = rectangles(np.stack(grids))
    ends = 2 * np.cumsum(np.bincount(sample, minlength=len(grids)))[:-1]
    boxes = boxes.astype(np.float32)
    return np.split(boxes[:, :2].ravel(), ends), np.split(boxes[:, 2:].ravel(), ends)


def rectangles(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is erased, in rectangles of whole pixels that do not overlap.

    grid: float64 [B, 7]. Returns int64 [n], the samples they belong to, in ascending order, and
    int64 [n, 4], (y, x, h, w): whole squares where no grid is turned, else rows one pixel high.
    """
    sample, begin = _squares(grid)
    cell, share, angle, _, _, height, width = grid[sample].T
    side = np.round(cell * share)
    if not angle.any():
        top, left = np.ceil(begin.T)
        bottom, right = np.minimum(top + side, height), np.minimum(left + side, width)
        top, left = np.maximum(top, 0), np.maximum(left, 0)
        seen = (bottom > top) & (right > left)
        boxes = np.stack([top, left, bottom - top, right - left], axis=1)[seen]
        return sample[seen], boxes.astype(np.int64)
    # Where the squares' centres lie in the image, and how far they reach from there.
    sin, cos = np.sin(angle), np.cos(angle)
    middle_y, middle_x = (begin + side[:, None] / 2).T
    y, x = middle_y * cos - middle_x * sin, middle_y * sin + middle_x * cos
    reach = side / 2 * (np.abs(sin) + np.abs(cos))
    seen = (np.abs(y - height / 2) < height / 2 + reach) & (
        np.abs(x - width / 2) < width / 2 + reach
    )
    sample, begin = sample[seen], begin[seen]
    side, sin, cos, top, reach = (v[seen, None] for v in (side, sin, cos, y - reach, reach))
    top, left, right = _rows(side, sin, cos, top, reach, begin)
    left, right = np.maximum(left, 0), np.minimum(right, width[seen, None])
    inside = (right > left) & (top >= 0) & (top < height[seen, None])
    top, left, right = top[inside], left[inside], right[inside]
    boxes = np.stack([top, left, np.ones_like(top), right - left], axis=1).astype(np.int64)
    return sample[np.nonzero(inside)[0]], boxes


def _squares(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The squares that may lie in the crop: samples int64 [n], and where they begin in the turned
    frame, (x·sin θ + y·cos θ, x·cos θ - y·sin θ), float64 [n, 2]."""
    cell, share, angle, _, _, height, width = grid.T
    shift, side = grid[:, 3:5], np.round(cell * share)
    sin, cos = np.sin(angle), np.cos(angle)
    y, x = np.stack([0 * height, 0 * height, height, height]), np.stack([0 * width, width] * 2)
    corners = np.stack([x * sin + y * cos, x * cos - y * sin], axis=2) - shift  # [4, B, 2]
    first = np.floor((corners.min(axis=0) - side[:, None]) / cell[:, None])
    last = np.floor(corners.max(axis=0) / cell[:, None])
    last = np.where(side[:, None] > 0, last, first - 1)
    steps = np.arange(int((last - first).max(initial=-1)) + 1)
    at = first[:, :, None] + steps  # [B, 2, steps]
    within = at <= last[:, :, None]
    sample, i, j = np.nonzero(within[:, 0, :, None] & within[:, 1, None, :])
    begin = np.stack([at[sample, 0, i], at[sample, 1, j]], axis=1) * cell[sample, None]
    return sample, begin + shift[sample]


def _rows(side, sin, cos, top, reach, begin):
    """Turned squares in rows of pixels: y, first x and one past the last, float64 [n, rows].

    side, sin, cos, top (where a square begins in the image), reach (half its height there):
    float64 [n, 1]. begin: float64 [n, 2], as of _squares.
    """
    sin, cos = (np.where(np.abs(v) < 1e-9, 1e-9, v) for v in (sin, cos))  # no division by 0
    y = np.ceil(top) + np.arange(int(2 * reach.max(initial=0)) + 1)
    # Each pair of a square's edges bounds x along a row: the square is where both do.
    x0, x1 = (begin[:, 1:] + y * sin) / cos, (begin[:, :1] - y * cos) / sin
    across, along = side / cos, side / sin
    low = np.maximum(np.minimum(x0, x0 + across), np.minimum(x1, x1 + along))
    high = np.minimum(np.maximum(x0, x0 + across), np.maximum(x1, x1 + along))
    return y, np.ceil(low), np.ceil(high)
