"""Maps of any size and type as a cache keeps them: in 8 bits, on its grid.

Along each axis, a map that has at least as many pixels as the grid has cells is averaged: a cell is
the mean of the area that it covers, where pixels that it covers in part count in part. A map that
has fewer is interpolated linearly between the centres of its pixels, as torch's
`interpolate(mode="bilinear", align_corners=False)` does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scae_dali.cache.format import Maps

__all__ = ["SCALES", "levels", "resized"]

SCALES = ("none", "max")
_FULL = {np.dtype(np.bool_): 1, np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}  # stand for 1


def levels(maps: NDArray[Any], grid: tuple[int, int], scale: str = "none") -> Maps:
    """[B,h,w] -> u8[B,*grid], 255 = 1.0.

    maps: float, or bool, uint8 or uint16, whose highest value (1, 255, 65535) stands for 1. scale:
    "none" takes the values as they are; they must be in [0, 1]. "max" divides each map on the grid
    by its highest cell, so that this is 1; a map of zeros stays one. Raises ValueError for other
    types, for maps without pixels, and for values that are not finite or out of range.
    """
    if maps.ndim != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"a map must be [h, w], got {list(maps.shape[1:])}")
    if maps.dtype.kind == "f":
        _check_range(maps, scale)
        values = maps.astype(np.float64)
    elif (kind := maps.dtype.newbyteorder("=")) in _FULL:
        values = maps / _FULL[kind]
    else:
        raise ValueError(f"a map must be float, bool, uint8 or uint16, got {maps.dtype}; cast it")
    values = resized(values, grid)
    if scale == "max":
        highest = values.max((1, 2), keepdims=True)
        values = np.divide(values, highest, out=values, where=highest > 0)
    return np.rint(255 * values).astype(np.uint8)


def _check_range(maps: NDArray[Any], scale: str) -> None:
    highest = 1.0 if scale == "none" else np.inf
    bad = ~((maps >= 0) & (maps <= highest) & (maps < np.inf))  # true of NaN as well
    if not bad.any():
        return
    value = maps[bad][0]
    if value > 1 and value < np.inf:
        raise ValueError(
            f"a map must be in [0, 1], got {value}; scale it, or have each map divided by its "
            'highest value by scale="max" (scae-dali import-maps: --scale max)'
        )
    raise ValueError(
        f"a map must be finite and not negative, got {value}; leave out the map of a sample that "
        "has none, and clip or scale the others"
    )


def resized(maps: NDArray[np.float64], grid: tuple[int, int]) -> NDArray[np.float64]:
    """f64[B,h,w] -> f64[B,*grid], by area along axes that shrink and linearly along others."""
    rows, columns = (_weights(n, cells) for n, cells in zip(maps.shape[1:], grid, strict=True))
    return rows @ maps @ columns.T


@lru_cache(maxsize=512)
def _weights(size: int, cells: int) -> NDArray[np.float64]:
    """The share of each pixel along an axis in each cell, f64[cells, size]; rows sum up to 1."""
    pixels = np.arange(size)
    if size >= cells:
        edges = np.arange(cells + 1)[:, None] * size / cells
        covered = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
        return covered.clip(0) * cells / size
    centres = ((np.arange(cells)[:, None] + 0.5) * size / cells - 0.5).clip(0, size - 1)
    return (1 - np.abs(centres - pixels)).clip(0)
