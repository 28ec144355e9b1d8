"""Made-up data: indices, images and caches, so that a measurement works with any data or none."""

from __future__ import annotations

import io
import os
import tarfile

import numpy as np

from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages

__all__ = [
    "SEED",
    "epoch_index",
    "evened",
    "long_tailed",
    "packed",
    "random_cache",
    "random_images",
    "smooth_maps",
    "with_profile",
]

SEED = 7


def epoch_index(root: str, repeat: int, batch_size: int, shards: int = 1) -> ImageIndex:
    """The files, repeated, without those that would leave the last batch of a shard incomplete."""
    index = ImageIndex(root)
    together = shards * batch_size
    n = len(index) * repeat // together * together
    if n == 0:
        of = "" if shards == 1 else f" for each of {shards} shards"
        raise SystemExit(
            f"--data {root} has {len(index)} images, fewer than --batch-size {batch_size}{of}; "
            f"pass a smaller one, or --repeat {-(-together // len(index))}"
        )
    labels = np.tile(index.labels, repeat)[:n]
    files = (index.files * repeat)[:n]
    return ImageIndex.from_arrays(files, labels, index.root, classes=index.classes)


def evened(index: ImageIndex) -> ImageIndex:
    """The same files in classes of one size, so that none is a tail class whatever the data."""
    labels = np.arange(len(index)) % len(index.classes)
    return ImageIndex.from_arrays(index.files, labels, index.root, classes=index.classes)


def long_tailed(index: ImageIndex, share: float) -> ImageIndex:
    """The same files: class 0, and a tail of this share of the samples in classes of two or three,
    drawn at random."""
    n = len(index)
    tail = np.random.default_rng(SEED).permutation(n)[: max(2, round(share * n))]
    labels = np.zeros(n, np.int64)
    labels[tail] = 1 + np.minimum(np.arange(len(tail)) // 2, len(tail) // 2 - 1)
    return ImageIndex.from_arrays(index.files, labels, index.root)


def with_profile(index: ImageIndex, counts: np.ndarray) -> ImageIndex:
    """The same samples, drawn at random into classes whose sizes are in proportion to `counts`."""
    n = len(index)
    place = np.random.default_rng(SEED).permutation(n)
    ends = np.cumsum(counts) / counts.sum() * n
    labels = np.searchsorted(ends, place, side="right").clip(max=len(counts) - 1)
    return ImageIndex.from_arrays(index.files, labels, index.root, num_classes=len(counts))


def packed(index: ImageIndex, folder: str, archives: int) -> ImageIndex:
    """The same samples, from their files packed into so many tars."""
    files = list(dict.fromkeys(index.files))  # an index may have a file several times
    if archives > len(files):
        raise SystemExit(
            f"--tars must be at most the number of images, {len(files)}, got {archives}"
        )
    for k in range(archives):
        with tarfile.open(os.path.join(folder, f"{k:04d}.tar"), "w") as archive:
            for i in range(len(files) * k // archives, len(files) * (k + 1) // archives):
                suffix = os.path.splitext(files[i])[1]
                archive.add(os.path.join(index.root, files[i]), f"{i:08d}{suffix}")
                label = tarfile.TarInfo(f"{i:08d}.cls")
                label.size = 1
                archive.addfile(label, io.BytesIO(b"0"))
    tars = ImageIndex.from_webdataset("*.tar", folder)
    place = {name: i for i, name in enumerate(files)}
    ids = np.array([place[name] for name in index.files])
    return tars.subset(ids).relabelled(index.labels, index.classes)


def random_images(n: int, size: int, classes: int = 100) -> ArrayImages:
    """n images of random pixels, in classes of about one size."""
    pixels = np.random.default_rng(SEED).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    names = [f"{i}" for i in range(n)]
    index = ImageIndex.from_arrays(names, np.arange(n) % classes, num_classes=classes)
    return ArrayImages(index, pixels)


def smooth_maps(n: int, grid: tuple[int, int]) -> np.ndarray:
    """Maps with a bump somewhere, as wide as Grad-CAM's: float64 [n, h, w] in [0, 1]."""
    rng = np.random.default_rng(SEED)
    y, x = ((np.arange(g)[:, None] + 0.5) / g for g in grid)
    centre, width = rng.random((2, n, 1, 1)), rng.uniform(0.1, 0.5, (n, 1, 1))
    maps = np.exp(-((y - centre[0]) ** 2 + (x.T - centre[1]) ** 2) / width**2)
    maps -= maps.min((1, 2), keepdims=True)
    return maps / np.maximum(maps.max((1, 2), keepdims=True), 1e-9)


def random_cache(path: str, index: ImageIndex, grid: tuple[int, int] = (7, 7)) -> SaliencyCache:
    """A new cache with a smooth random map for every sample."""
    maps = smooth_maps(len(index), grid)
    cache = SaliencyCache.create(path, index, grid=grid)
    ids = cache.begin_pass(0)
    cache.write(ids, maps[ids], epoch=0)
    cache.end_pass(0)
    return cache
