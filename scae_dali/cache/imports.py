"""One's own maps into a cache, as a pass of the method "imported"."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scae_dali.cache.cache import SaliencyCache
from scae_dali.cache.files import DATA_FILE
from scae_dali.cache.format import CHUNK, CacheError, Maps, checked_grid
from scae_dali.cache.resample import SCALES, levels
from scae_dali.cache.sources import source_of
from scae_dali.cache.writer import ChunkWriter
from scae_dali.checks import check, check_choice
from scae_dali.data.index import ImageIndex
from scae_dali.data.scan import Path

__all__ = ["IMPORTED", "Imported", "import_maps"]

IMPORTED = "imported"  # the method of such maps in a cache


class Imported(NamedTuple):
    """What an import has done.

    ids: int64 [n], ascending, places in the index of the samples that got a map. missing: int64, of
    those without one. unused: names of maps that are of no sample. highest: of all values, of 255.
    """

    ids: NDArray[np.int64]
    missing: NDArray[np.int64]
    unused: list[str]
    highest: int


def import_maps(
    path: Path,
    index: ImageIndex,
    maps: Path | NDArray[Any],
    *,
    grid: tuple[int, int] | None = None,
    names: Sequence[str] | None = None,
    scale: str = "none",
    naming: str | None = None,
    model: str | None = None,
    progress: Callable[[int], object] = lambda maps: None,
) -> Imported:
    """Puts maps into the cache at `path`, which is made if there is none.

    maps: an array [N, h, w], or its .npy file, in the order of the index; or a folder that holds
    `class/name.npy` or `class/name.png`, [h, w] each, for an image `class/name.jpg`. Where two
    images differ only in the extension, `class/name.jpg.npy`. A map covers the whole upright image;
    shapes may differ. Types, and how maps are brought to the grid: see `levels`.

    grid: (h, w) of a cache that is made; it may be left out for one that is there. names: of the
    samples that the rows of an array are of, in any order; those that `export_maps` marks as
    missing, and of no sample of the index, are left out. scale: see `levels`. naming: see
    `SaliencyCache.create`. model: what made the maps; it is recorded. progress: called with the
    number of maps read since its last call.

    A pass is recorded of the method "imported" over the samples that have a map here, of the epoch
    after the newest map of the cache. Other maps stay. All maps are read and checked before any is
    written; they are in memory meanwhile, N·h·w bytes in 8 bits. Raises ValueError for maps that
    cannot be used, with their name, and CacheError for a cache of something else.
    """
    check_choice("scale", scale, SCALES)
    path = os.fspath(path)
    cache = _existing(path, index, grid, naming)
    try:
        if cache is None:
            check(grid is not None, f"grid must be given, (h, w): there is no cache at {path!r}")
        wanted = checked_grid(grid if cache is None else cache.meta.grid)  # type: ignore[arg-type]
        source = source_of(maps, index, names)
        found = np.empty((len(source.ids), *wanted), np.uint8)
        for ids, values, called in source.blocks:
            found[np.searchsorted(source.ids, ids)] = _levels(values, wanted, scale, called)
            progress(len(ids))
        if cache is None:
            given: dict[str, Any] = {"naming": naming, "method": IMPORTED, "model": model}
            cache = SaliencyCache.create(path, index, grid=wanted, exist_ok=True, **given)
        begin: dict[str, Any] = {"method": IMPORTED, "model": model, "settings": {"scale": scale}}
        if len(source.ids) < len(index):
            begin["ids"] = source.ids
        with ChunkWriter(cache, int(cache.stamps().max()) + 1, **begin) as writer:
            for start in range(0, len(writer.pending), CHUNK):
                ids = writer.pending[start : start + CHUNK]
                writer.write(ids, found[np.searchsorted(source.ids, ids)])
    finally:
        if cache is not None:
            cache.close()
    missing = np.setdiff1d(np.arange(len(index)), source.ids, assume_unique=True)
    return Imported(source.ids, missing, source.unused, int(found.max()))


def _existing(
    path: str, index: ImageIndex, grid: tuple[int, int] | None, naming: str | None
) -> SaliencyCache | None:
    """The cache that is at `path`, claimed; None where there is none. Raises CacheError where its
    maps are of another method."""
    if not os.path.exists(os.path.join(path, DATA_FILE)):
        return None
    cache = SaliencyCache(path, index=index, grid=grid)
    meta = cache.meta
    made = meta.under_way or meta.last_pass
    try:
        if made["epoch"] is not None and made["method"] != IMPORTED:
            raise CacheError(
                f"saliency cache {path!r} has maps by {made['method']!r}; import maps into a cache "
                "of their own, at another path"
            )
        if naming not in (None, meta.naming):
            raise CacheError(
                f"saliency cache {path!r} names its samples by {meta.naming!r}, not by {naming!r}; "
                "leave naming out, or choose another path"
            )
        cache.claim()
    except BaseException:
        cache.close()
        raise
    return cache


def _levels(
    maps: NDArray[Any], grid: tuple[int, int], scale: str, called: Callable[[int], str]
) -> Maps:
    """`levels`, whose error names the map. called: the name of row k."""
    try:
        return levels(maps, grid, scale)
    except ValueError:
        for k in range(len(maps)):
            try:
                levels(maps[k : k + 1], grid, scale)
            except ValueError as error:
                raise ValueError(f"{called(k)}: {error}") from None
        raise
