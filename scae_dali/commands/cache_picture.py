"""A picture of a saliency cache: mean maps by class, and the most and the least focused maps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageOps

from scae_dali.cache import SaliencyCache
from scae_dali.cache.survey import Extreme, survey
from scae_dali.data.index import ImageIndex

COLUMNS, EXTREMES = 8, 8
SIDE_INCHES = 1.5  # of a panel
SIDE_PX = 256  # of an image, at most

# The image of a sample, uint8 [H, W, 3], upright; None where it cannot be read.
Look = Callable[[int], NDArray[np.uint8] | None]


def save_picture(
    path: str | os.PathLike[str],
    cache: SaliencyCache,
    index: ImageIndex | None,
    look: Look | None,
    *,
    classes: int,
) -> None:
    """Draw a cache. index: that it was opened with; None: classes and images are not known. look:
    gives the images of the index. classes: how many are shown, the most frequent ones."""
    shown: list[int] = []
    if index is not None:
        by_size = np.argsort(-index.class_counts, kind="stable")[:classes]
        shown = [k for k in by_size.tolist() if index.class_counts[k]]
    labels = None if index is None else index.labels
    found = survey(cache, labels, shown, extremes=EXTREMES)
    means = [("all maps", found.mean)]
    for k, count, mean in zip(shown, found.counts.tolist(), found.means, strict=True):
        assert index is not None
        means.append((f"{index.classes[k]} ({count})"[:22], mean))
    rows = -(-len(means) // COLUMNS)
    rows_each = 2 * EXTREMES // COLUMNS if index is not None else EXTREMES // COLUMNS
    heights = [rows, rows_each, rows_each]
    figure = Figure(
        figsize=(SIDE_INCHES * COLUMNS, 1.15 * SIDE_INCHES * (sum(heights) + 1)),
        layout="constrained",
    )
    parts: Any = figure.subfigures(3, 1, height_ratios=[rows + 0.3 for rows in heights])
    draw_means(parts[0], means, rows)
    for part, what, some in ((parts[1], "most", found.most), (parts[2], "least", found.least)):
        told = f"the {what} focused maps (1: all in one cell, 0: the same everywhere)"
        part.suptitle(told, fontsize=10)
        draw_extremes(part, some, index, look, rows_each)
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def draw_means(part: Any, means: list[tuple[str, NDArray[np.float64]]], rows: int) -> None:
    """Draw mean maps, float64 [h, w], with their titles, on one scale."""
    highest = max(float(mean.max()) for _, mean in means)
    which = "of all maps" if len(means) == 1 else "by class, the most frequent ones first"
    part.suptitle(f"mean maps {which} (yellow: {highest:.2f})", fontsize=10)
    axes = panels(part, rows)
    for panel, (title, mean) in zip(axes, means, strict=False):
        panel.imshow(mean, "viridis", vmin=0, vmax=max(highest, 1e-9))
        panel.set_title(title, fontsize=7)


def draw_extremes(
    part: Any, some: list[Extreme], index: ImageIndex | None, look: Look | None, rows: int
) -> None:
    """Draw maps, each beside its image where there are images."""
    axes = iter(panels(part, rows))
    for one in some:
        height, width = one.map.shape
        if index is not None and look is not None:
            panel, image = next(axes), look(one.sample)
            panel.set_title(index.classes[index.labels[one.sample]][:22], fontsize=7)
            if image is None:
                panel.text(0.5, 0.5, "no image", ha="center", transform=panel.transAxes)
            else:
                panel.imshow(image)
                height, width = image.shape[:2]
        panel = next(axes)
        panel.imshow(one.map, "viridis", vmin=0, vmax=255, extent=(0, width, height, 0))
        sample = "" if one.sample < 0 else f"{one.sample}: "
        panel.set_title(f"{sample}{one.focus:.2f}", fontsize=7)


def panels(part: Any, rows: int) -> list[Any]:
    """The axes of a part of the figure, row by row, without ticks."""
    axes = part.subplots(rows, COLUMNS, squeeze=False).ravel().tolist()
    for panel in axes:
        panel.set_axis_off()
    return axes


def image_file(index: ImageIndex, sample: int) -> NDArray[np.uint8] | None:
    """The `Look` of images in files, made small."""
    try:
        with Image.open(os.path.join(index.root, index.files[sample])) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except OSError:
        return None
    upright.thumbnail((SIDE_PX, SIDE_PX))
    return np.asarray(upright)
