"""Where a stage looks up saliency maps: in a cache that is there, or in one that is made later."""

import os

import numpy as np

from scae_dali.cache import ResidentCache, SaliencyCache
from scae_dali.data.index import ImageIndex

RESIDENT_BYTES = 10**9  # maps of at most this size are kept in memory, unless told otherwise


class Lookup:
    """Maps and neighbouring classes of the samples of an index.

    cache: a cache of the index, or the path of one. Where nothing is at the path yet, no sample has
    a map, until `attach` brings the cache. resident: see Stage.

    path: of the cache. cache: None until it is there.
    """

    def __init__(
        self,
        index: ImageIndex,
        cache: SaliencyCache | str | os.PathLike[str],
        resident: bool | None,
    ) -> None:
        self._index, self._resident = index, resident
        self.cache: SaliencyCache | None = None
        if isinstance(cache, SaliencyCache):
            self.path = cache.path
            self.attach(cache)
        else:
            self.path = os.fspath(cache)
            if os.path.lexists(self.path):
                self.attach(SaliencyCache(self.path, index=index))

    def attach(self, cache: SaliencyCache) -> None:
        """Look maps up in this cache from now on."""
        resident = self._resident
        if resident is None:
            resident = cache.map_bytes <= RESIDENT_BYTES
        self._read = ResidentCache(cache).read if resident else cache.read
        self.cache = cache

    def maps(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids: int64 [B] -> maps uint8 [B, h, w], and whether there is one, bool [B]."""
        if self.cache is None:
            return np.zeros((len(ids), 1, 1), np.uint8), np.zeros(len(ids), np.bool_)
        return self._read(ids)

    def neighbors(self) -> np.ndarray | None:
        """The nearest other classes of each class, int [K, m]; None as long as they are unknown."""
        return None if self.cache is None else self.cache.read_neighbors()
