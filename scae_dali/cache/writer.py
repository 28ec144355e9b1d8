"""A whole pass over a data set as one context: begun, written in chunks, ended, or resumed.

Decides how many maps are committed together, and that whoever makes them does not wait for the
disk. What begins, resumes and ends a pass is decided in `cache`.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scae_dali.cache.meta import CacheError
from scae_dali.cache.records import CHUNK, Maps

__all__ = ["ChunkWriter", "require_no_writer"]


class Target(Protocol):
    """What a pass needs of its `SaliencyCache`."""

    def begin_pass(self, epoch: int, *args: Any, **kwargs: Any) -> NDArray[np.int64]: ...

    def checked(self, ids: ArrayLike, maps: ArrayLike) -> tuple[NDArray[np.int64], Maps]: ...

    def write(self, ids: ArrayLike, maps: ArrayLike, *, epoch: int) -> None: ...

    def end_pass(self, epoch: int) -> None: ...


class ChunkWriter:
    """One pass as a context: begins it, commits every `commit_every` maps, ends it.

        with ChunkWriter(cache, epoch, weights=digest) as writer:
            for ids, maps in saliency_of(writer.pending):
                writer.write(ids, maps)

    pending: i64[P], the ids still to do in key order, known once entered. Until the context is
    left, its cache object begins no other pass (CacheError). Chunks are committed in a thread, one
    at a time: a commit that fails raises when the next one is due, or at the end. If the body
    fails, what it wrote is committed and the pass stays under way, to be resumed by the same lines.
    """

    def __init__(
        self, cache: Target, epoch: int, *, commit_every: int = CHUNK, **begin: Any
    ) -> None:
        """begin: weights and provenance, as of `SaliencyCache.begin_pass`."""
        if commit_every < 1:
            raise ValueError(f"commit_every must be at least 1 record, got {commit_every}")
        self._cache, self._every, self._begin = cache, commit_every, begin
        self._ids: list[NDArray[np.int64]] = []
        self._maps: list[Maps] = []
        self._held = 0
        self._thread = ThreadPoolExecutor(1, "commit")
        self._commit: tuple[NDArray[np.int64], Maps, Future[None]] | None = None
        self.pending = np.empty(0, np.int64)
        self.epoch, self.begun = epoch, False

    def __enter__(self) -> ChunkWriter:
        with _turn:
            require_no_writer(self._cache, or_who_begins=True)
            _writers[self._cache] = ref(self)
        try:
            self.pending = self._cache.begin_pass(self.epoch, **self._begin)
        except BaseException:
            _writers.pop(self._cache, None)
            raise
        self.begun = True
        return self

    def write(self, ids: ArrayLike, maps: ArrayLike) -> None:
        """As `SaliencyCache.write`; checked at once, committed when enough are together."""
        ids, maps = self._cache.checked(ids, maps)
        self._hold(ids, maps.copy())
        if self._held >= self._every:
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
            _writers.pop(self._cache, None)

    def _hold(self, ids: NDArray[np.int64], maps: Maps) -> None:
        self._ids.append(ids)
        self._maps.append(maps)
        self._held += len(ids)

    def _submit(self) -> None:
        ids, maps = np.concatenate(self._ids), np.concatenate(self._maps)
        self._ids, self._maps, self._held = [], [], 0
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


_writers: WeakKeyDictionary[Target, ref[ChunkWriter]] = WeakKeyDictionary()  # entered, not left
_turn = threading.Lock()  # of whoever enters


def require_no_writer(cache: Target, *, or_who_begins: bool = False) -> None:
    """Raises CacheError where a pass of this very object is under way in a ChunkWriter.

    or_who_begins: also where one is about to begin its pass.
    """
    known = _writers.get(cache)
    writer = None if known is None else known()
    if writer is not None and (writer.begun or or_who_begins):
        raise CacheError(
            f"this SaliencyCache object has a pass of epoch {writer.epoch} under way in a "
            "ChunkWriter; begin another one once that has ended"
        )
