"""All maps of a cache in memory, as a copy that is taken anew only when asked.

When a new copy is due is decided by whoever reads; `stale` tells whether it would differ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scae_dali.cache.format import Maps, checked_ids
from scae_dali.cache.reader import CacheReader

__all__ = ["ResidentCache"]


class ResidentCache:
    """A read-only copy in memory: maps u8[N,h,w], found bool[N]; `refresh` takes a new one."""

    def __init__(self, cache: CacheReader) -> None:
        self._cache = cache
        self.refresh()

    @property
    def maps(self) -> Maps:
        return self._copy[0]

    @property
    def found(self) -> NDArray[np.bool_]:
        return self._copy[1]

    def read(self, ids: ArrayLike) -> tuple[Maps, NDArray[np.bool_]]:
        """As `SaliencyCache.read`."""
        maps, found, _ = self._copy
        ids = checked_ids(ids, len(maps))
        return maps[ids], found[ids]

    def stale(self) -> bool:
        """Whether a pass was completed since this copy was taken (one small read of LMDB)."""
        return self._cache.meta.passes != self._copy[2]

    def refresh(self) -> None:
        """Takes a new copy, of one snapshot; other threads see the old or the new one, whole."""
        copy = self._cache.snapshot()
        for array in copy[:2]:
            array.setflags(write=False)
        self._copy = copy
