"""All maps of a cache in memory, up to date with the cache by themselves."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scae_dali.cache.meta import CacheMeta
from scae_dali.cache.records import Maps, checked_ids

__all__ = ["ResidentCache", "Snapshot"]


class Snapshot(NamedTuple):
    """All maps of one moment: maps u8[N,h,w], found bool[N], and the cache's `version` then."""

    maps: Maps
    found: NDArray[np.bool_]
    version: tuple[int, bytes]


class Source(Protocol):
    """What a copy needs of its `SaliencyCache`."""

    @property
    def meta(self) -> CacheMeta: ...

    def version(self) -> tuple[int, bytes]: ...

    def read(self, ids: ArrayLike) -> tuple[Maps, NDArray[np.bool_]]: ...

    def snapshot(self) -> Snapshot: ...


class ResidentCache:
    """A copy of a cache in memory, N·h·w bytes, and twice as much while a new copy is taken.

    `read` gives what `SaliencyCache.read` gives at the same moment, and checks that by one small
    read of LMDB. After a pass, of this process or another, the next `read` takes a new copy; while
    a pass is under way, maps are looked up in LMDB. The first copy is taken at first use.

    Every process has its own copy, and so has every ResidentCache: two pipelines on one machine
    hold the maps twice.
    """

    def __init__(self, cache: Source) -> None:
        self._cache = cache
        self._copy: Snapshot | None = None

    @property
    def maps(self) -> Maps:
        """Those of the copy, u8[N,h,w]; read-only."""
        return (self._copy or self.refresh()).maps

    @property
    def found(self) -> NDArray[np.bool_]:
        """Which samples have a map in the copy, bool[N]; read-only."""
        return (self._copy or self.refresh()).found

    def read(self, ids: ArrayLike) -> tuple[Maps, NDArray[np.bool_]]:
        """As `SaliencyCache.read`."""
        copy = self._copy
        if copy is None or self._cache.version() != copy.version:
            if not self._settled():
                return self._cache.read(ids)
            copy = self.refresh()
        ids = checked_ids(ids, len(copy.maps))
        return copy.maps[ids], copy.found[ids]

    def stale(self) -> bool:
        """Whether the next `read` takes a new copy."""
        changed = self._copy is None or self._cache.version() != self._copy.version
        return changed and self._settled()

    def refresh(self) -> Snapshot:
        """Takes a new copy, of one snapshot; other threads see the old or the new one, whole."""
        copy = self._cache.snapshot()
        for array in (copy.maps, copy.found):
            array.setflags(write=False)
        self._copy = copy
        return copy

    def _settled(self) -> bool:
        """Whether the maps are those of complete passes; otherwise they may change at any batch."""
        return self._cache.meta.token is not None
