"""Shared by benchmarks of growing data sets: stand-ins for data sets of any size, and a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["SyntheticIndex", "draw", "labels_of", "maps_of", "names_of", "salts"]

CLASSES = 1000
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: different ids have different products
_STEP = 11  # between the maps of one sample in two epochs; odd as well


def names_of(n: int) -> list[str]:
    """Paths as ImageNet has them, in classes of one size."""
    folders = [f"n{k:08d}/n{k:08d}_" for k in range(CLASSES)]
    return [f"{folders[i % CLASSES]}{i}.JPEG" for i in range(n)]


def labels_of(n: int) -> NDArray[np.int64]:
    """Labels of the samples in `names_of`, int64 [N]."""
    return np.arange(n) % CLASSES


@dataclass(frozen=True)
class SyntheticIndex:
    """An index of any number of samples, without names; record keys are ids, or like path hashes.

    It is enough for a cache, and for plans without partners.
    """

    samples: int
    fingerprint: str = "0" * 32
    num_classes: int = CLASSES

    def __len__(self) -> int:
        return self.samples

    def keys(self, naming: str) -> NDArray[np.uint64]:
        if naming == "index":
            return np.arange(self.samples, dtype=np.uint64)
        return np.random.default_rng(1).integers(0, 2**64, self.samples, np.uint64)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        return labels_of(self.samples)

    @cached_property
    def class_counts(self) -> NDArray[np.int64]:
        return np.bincount(self.labels, minlength=CLASSES)


def maps_of(ids: ArrayLike, epoch: int, grid: Sequence[int] = (7, 7)) -> NDArray[np.uint8]:
    """Made-up maps, u8[B,h,w]: no two samples have the same, and all cells change each epoch."""
    cells = np.arange(grid[0] * grid[1])
    mixed = (np.asarray(ids, np.uint64)[:, None] * _MIX).view(np.uint8)  # [B, 8]
    maps = mixed[:, cells % 8] + (cells + _STEP * epoch).astype(np.uint8)
    return maps.reshape(-1, *grid)


def salts(ids: ArrayLike, maps: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The epochs % 256 of maps from `maps_of`, int[B]; -1 for a map that mixes epochs."""
    moved = (maps - maps_of(ids, 0, maps.shape[1:])).reshape(len(maps), -1)
    whole = (moved == moved[:, :1]).all(axis=1)
    return np.where(whole, moved[:, 0].astype(np.int64) * pow(_STEP, -1, 256) % 256, -1)


def draw(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: Path,
    xlabel: str = "samples",
) -> None:
    """Draws lines on two logarithmic axes: panels[label of the y axis][name] = points (x, y)."""
    from matplotlib.figure import Figure  # needs the extra `train`

    figure = Figure(figsize=(7.5 * len(panels), 6), layout="constrained")
    for axes, (label, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for number, (name, points) in enumerate(lines.items()):
            marker = "osv^"[number // 10 % 4]  # there are ten colours
            axes.plot(*zip(*points, strict=True), marker=marker, label=name)
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=label)
        axes.grid(which="both", alpha=0.25)
        if lines:
            axes.legend(fontsize="x-small", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
