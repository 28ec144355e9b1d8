"""A whole pass over a data set as one context: begun, written in chunks, ended, or resumed.

Maps are committed many at a time, in a thread, so that whoever makes them does not wait for the
disk. A process that is killed loses at most two chunks, or what it has made within a minute.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scae_dali.cache.cache import Reservation, SaliencyCache
from scae_dali.cache.format import CHUNK, CacheError, Maps

__all__ = ["ChunkWriter"]

COMMIT_S = 30.0  # a commit is due after so many seconds, however few maps are held


class ChunkWriter:
    """One pass as a context: begins it, commits every `commit_every` maps or COMMIT_S, ends it.

        with ChunkWriter(cache, epoch, weights=digest) as writer:
            for ids, maps in saliency_of(writer.pending):
                writer.write(ids, maps)

    pending: i64[P], the ids still to do in key order, known once entered. Until the context is
    left, its cache object begins no other pass (CacheError). Chunks are committed in a thread, one
    at a time: a commit that fails raises when the next one is due, or at the end. If the body
    fails, what it wrote is committed and the pass stays under way, to be resumed by the same lines.
    """

    def __init__(
        self, cache: SaliencyCache, epoch: int, *, commit_every: int = CHUNK, **begin: Any
    ) -> None:
        """begin: weights and provenance, as of `SaliencyCache.begin_pass`."""
        if commit_every < 1:
            raise ValueError(f"commit_every must be at least 1 record, got {commit_every}")
        self._cache, self._every, self._begin = cache, commit_every, begin
        self._ids: list[NDArray[np.int64]] = []
        self._maps: list[Maps] = []
        self._held = 0
        self._committed = time.monotonic()
        self._thread = ThreadPoolExecutor(1, "commit")
        self._commit: tuple[NDArray[np.int64], Maps, Future[None]] | None = None
        self.pending = np.empty(0, np.int64)
        self.epoch = epoch
        self._reservation: Reservation | None = None

    def __enter__(self) -> ChunkWriter:
        self._reservation = self._cache.reserve(self.epoch)
        try:
            self.pending = self._cache.begin_pass(self.epoch, **self._begin)
        except BaseException:
            self._cache.unreserve()
            raise
        self._reservation.begun = True
        return self

    def write(self, ids: ArrayLike, maps: ArrayLike) -> None:
        """Takes what `SaliencyCache.write` takes: checked at once, committed in chunks."""
        ids, maps = self._cache.checked(ids, maps)
        self._hold(ids, maps.copy())
        if self._held >= self._every or time.monotonic() - self._committed >= COMMIT_S:
            self._settle()
            self._submit()

    def flush(self) -> None:
        """Commits what is held, and waits for it; keeps holding it if that fails."""
        self._settle()
        if self._held:
            self._submit()
            self._settle()

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        try:
            with self._thread:
                if kind is None:
                    self.flush()
                    self._cache.end_pass(self.epoch)
                else:
                    with suppress(OSError, CacheError):  # the body's own error is the one to report
                        self.flush()
        finally:
            self._cache.unreserve()

    def _hold(self, ids: NDArray[np.int64], maps: Maps) -> None:
        self._ids.append(ids)
        self._maps.append(maps)
        self._held += len(ids)

    def _submit(self) -> None:
        ids, maps = np.concatenate(self._ids), np.concatenate(self._maps)
        self._ids, self._maps, self._held = [], [], 0
        self._committed = time.monotonic()
        commit = self._thread.submit(self._cache.write, ids, maps, epoch=self.epoch)
        self._commit = ids, maps, commit

    def _settle(self) -> None:
        """Wait for the commit under way; what it could not write is held again."""
        if self._commit is None:
            return
        ids, maps, commit = self._commit
        self._commit = None
        try:
            commit.result()
        except BaseException:
            self._hold(ids, maps)
            raise
