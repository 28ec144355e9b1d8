"""What the maps of a cache look like: their means by class, the most and the least focused ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scae_dali.cache.format import Maps, flat
from scae_dali.cache.reader import CacheReader

__all__ = ["Extreme", "Survey", "focus", "survey"]


class Extreme(NamedTuple):
    """A map that stands out. focus: see `focus`. sample: its place in the index, -1 where that is
    not known. map: uint8 [h, w]."""

    focus: float
    sample: int
    map: Maps


class Survey(NamedTuple):
    """mean: float64 [h, w] in [0, 1], of all maps; zeros where there is none. counts: int64 [C],
    the maps of each class that was asked for. means: float64 [C, h, w], of these. most, least: the
    maps of most and of least focus, in this order; flat maps have none."""

    mean: NDArray[np.float64]
    counts: NDArray[np.int64]
    means: NDArray[np.float64]
    most: list[Extreme]
    least: list[Extreme]


def focus(maps: Maps) -> NDArray[np.float64]:
    """How much maps are concentrated in few cells, u8[n,h,w] -> f64[n] in [0, 1].

    1 − H / log(h·w), with H the entropy of a map that is divided by its sum: 1 where all lies in
    one cell, 0 where all cells are equal. NaN for a map of zeros.
    """
    cells = maps.reshape(len(maps), math.prod(maps.shape[1:])).astype(np.float64)
    with np.errstate(invalid="ignore"):
        share = cells / cells.sum(1, keepdims=True)
    entropy = -(share * np.log(np.maximum(share, 1e-300))).sum(1)
    return 1 - entropy / math.log(max(cells.shape[1], 2))


def survey(
    cache: CacheReader,
    labels: NDArray[np.int64] | None = None,
    classes: Sequence[int] = (),
    *,
    extremes: int = 8,
) -> Survey:
    """Looks at all maps of one moment once; memory does not grow with their number.

    labels: int64 [N], of all samples, for the means by class. classes: those whose means are
    wanted. extremes: how many maps of most and of least focus.
    """
    grid = cache.meta.grid
    row = {k: c for c, k in enumerate(classes)}
    lookup = np.full(0 if labels is None else int(labels.max(initial=-1)) + 1, -1)
    lookup[[k for k in row if k < len(lookup)]] = [c for k, c in row.items() if k < len(lookup)]
    total, number = np.zeros(grid), 0
    sums, counts = np.zeros((len(classes), *grid)), np.zeros(len(classes), np.int64)
    most: list[Extreme] = []
    least: list[Extreme] = []

    def look(ids: NDArray[np.int64] | None, records: NDArray[Any]) -> None:
        nonlocal total, number, most, least
        maps = records["map"]
        total += maps.sum(0, dtype=np.int64)
        number += len(maps)
        if ids is not None and labels is not None:
            rows = lookup[labels[ids]]
            np.add.at(sums, rows[rows >= 0], maps[rows >= 0])
            np.add.at(counts, rows[rows >= 0], 1)
        kept = np.flatnonzero(~flat(maps))
        values = focus(maps[kept])
        order = np.argsort(values, kind="stable")
        ends = [
            [
                Extreme(float(values[k]), -1 if ids is None else int(ids[kept[k]]), maps[kept[k]])
                for k in some
            ]
            for some in (order[: -extremes - 1 : -1], order[:extremes])
        ]
        most = sorted([*most, *ends[0]], key=lambda one: -one.focus)[:extremes]
        least = sorted([*least, *ends[1]], key=lambda one: one.focus)[:extremes]

    cache.visit(look)
    means = sums / 255 / np.maximum(counts, 1)[:, None, None]
    return Survey(total / 255 / max(number, 1), counts, means, most, least)
