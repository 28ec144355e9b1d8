"""How the maps of an open cache are looked up, in LMDB or in a copy that is kept in memory.

Every look-up sees the newest snapshot: LMDB shows a reader all of a commit or nothing of it.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import lmdb
import numpy as np
from numpy.typing import ArrayLike, NDArray

from scae_dali.cache.environment import (
    DATA_FILE,
    Environment,
    environment_at,
    new_directory,
    require_data_file,
)
from scae_dali.cache.format import (
    KEY_BYTES,
    META,
    NEIGHBORS,
    CacheError,
    CacheMeta,
    Maps,
    check_contents,
    checked_epoch,
    checked_ids,
    flat,
    from_json,
    neighbors_from_bytes,
    record_type,
    rows,
    split,
)
from scae_dali.data.index import ImageIndex
from scae_dali.plan.random import Stream, uniforms

__all__ = ["CacheReader", "Coverage", "RecordKeys", "ResidentCache", "Snapshot"]

T = TypeVar("T")
Reader = TypeVar("Reader", bound="CacheReader")


class Coverage(NamedTuple):
    """found: samples that have a map. flat: those of them whose map is the same everywhere."""

    found: int
    flat: int


class Snapshot(NamedTuple):
    """All maps of one moment: maps u8[N,h,w], found bool[N], and the cache's `version` then."""

    maps: Maps
    found: NDArray[np.bool_]
    version: tuple[int, bytes]


class _Neighbors(NamedTuple):
    """What `read_neighbors` gives, u16[K, m] or None, and the cache's `version` then."""

    version: tuple[int, bytes]
    table: NDArray[np.uint16] | None


class RecordKeys:
    """The record keys of a cache's N samples: their ids, or hashes of their paths.

    No table is kept of keys that are ids: for 10^8 samples it would take a gigabyte.
    """

    def __init__(self, path: str, meta: CacheMeta, index: ImageIndex | None) -> None:
        """path: of the cache, for messages. index: None leaves hashes of paths unknown.

        Raises CacheError where two samples have the same key.
        """
        self._path, self._samples = path, meta.samples
        self._are_ids = meta.naming == "index"
        self._keys: NDArray[np.uint64] | None = None
        if index is not None and not self._are_ids:
            self._keys = np.asarray(index.keys(meta.naming), np.uint64)
            self._order = np.argsort(self._keys, kind="stable")
            self._sorted = self._keys[self._order]
            if (twins := np.flatnonzero(self._sorted[1:] == self._sorted[:-1])).size:
                first, second = self._order[twins[0] : twins[0] + 2]
                raise CacheError(
                    f"samples {first} and {second} have the same {meta.naming} key, so one map "
                    "would serve both; remove one of them or name the samples by their index"
                )

    @property
    def known(self) -> bool:
        """Whether samples can be told by their keys."""
        return self._are_ids or self._keys is not None

    def require(self) -> None:
        """Raises CacheError where they are not known."""
        if not self.known:
            raise CacheError(
                f"saliency cache {self._path!r} names its samples by path, so it needs to know "
                "them; pass index=..."
            )

    def of(self, ids: NDArray[np.int64]) -> NDArray[np.int64] | NDArray[np.uint64]:
        """i64[n] -> the keys as numbers, [n]."""
        self.require()
        return ids if self._keys is None else self._keys[ids]

    def bytes_of(self, ids: NDArray[np.int64]) -> list[bytes]:
        """i64[n] -> the n keys as LMDB has them."""
        return split(self.of(ids).astype(">u8").tobytes(), KEY_BYTES)

    def ids_of(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """u64[n] -> ids i64[n], and bool[n], whether the key is of a sample at all."""
        self.require()
        if self._are_ids:
            return keys.astype(np.int64), keys < self._samples
        found = np.minimum(np.searchsorted(self._sorted, keys), self._samples - 1)
        return self._order[found], self._sorted[found] == keys

    def ascending(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """bool[N] -> i64, the ids of those that are chosen, in key order."""
        if self._are_ids:
            return np.flatnonzero(chosen)
        self.require()
        return self._order[chosen[self._order]]


_open: weakref.WeakSet[CacheReader] = weakref.WeakSet()  # in this process


class CacheReader:
    """An open cache, and all that can be read from it."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        index: ImageIndex | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """index: None skips the check of the data set; then only a cache of naming "index" is read.

        Raises CacheError where there is no cache, a damaged one, or one of another data set, grid
        or format; PermissionError where this user may not read it. Warns (RuntimeWarning), once for
        each cache, where it must be read from a copy in memory.
        """
        self.path = os.fspath(path)
        self._real = os.path.realpath(self.path)
        self._closed = False
        require_data_file(self.path)
        environment_at(self._real).forget_if_replaced()
        meta = self._view(self._opened)
        self._check(meta, index, grid)
        self._grid, self._samples = meta.grid, meta.samples
        self._kind = record_type(meta.grid)
        self._keys = RecordKeys(self.path, meta, index)
        self._neighbors: _Neighbors | None = None  # what was read last
        _open.add(self)

    @property
    def meta(self) -> CacheMeta:
        """The meta record, read from LMDB each time: another process may have changed it."""
        return self._view(self._meta)

    @property
    def size_bytes(self) -> int:
        """Length of the data file (st_size); LMDB reuses its pages, it never shrinks the file."""
        return os.path.getsize(os.path.join(self._real, DATA_FILE))

    def read(self, ids: ArrayLike) -> tuple[Maps, NDArray[np.bool_]]:
        """ids: int[B], positions in the index -> maps u8[B,h,w] (255 = 1.0), found bool[B].

        All maps are of the newest snapshot. Without a map, found is False and the map all zero.
        Raises IndexError for an id outside the index.
        """
        ids = checked_ids(ids, self._samples)
        keys = self._keys.bytes_of(ids)
        values = self._view(lambda txn: [txn.get(key, b"") for key in keys])
        found = np.fromiter(map(len, values), np.int64, len(values)) == self._kind.itemsize
        if not found.all():
            values = [value for value, ok in zip(values, found, strict=True) if ok]
        maps = np.frombuffer(b"".join(values), self._kind)["map"]
        if found.all():
            return maps.copy(), found
        every = np.zeros((len(ids), *self._grid), np.uint8)
        every[found] = maps
        return every, found

    @property
    def map_bytes(self) -> int:
        """What all maps take in memory, N·h·w."""
        return self._samples * math.prod(self._grid)

    def version(self) -> tuple[int, bytes]:
        """Changes with everything that anybody writes to the cache: the number of LMDB's last
        transaction, and the meta record, which tells a cache from one that has replaced it."""
        return self._view(_version)

    def snapshot(self) -> Snapshot:
        """A copy of all maps, at one moment."""

        def copy(txn: lmdb.Transaction) -> Snapshot:
            maps = np.zeros((self._samples, *self._grid), np.uint8)
            found = np.zeros(self._samples, np.bool_)
            for ids, records in self._scan(txn):
                maps[ids] = records["map"]
                found[ids] = True
            return Snapshot(maps, found, _version(txn))

        return self._view(copy)

    def visit(self, look: Callable[[NDArray[np.int64] | None, NDArray[Any]], object]) -> None:
        """Calls look(ids, records) for all maps of one moment, some at a time, in key order.

        ids: i64[n]; None where the cache names samples by path and was opened without an index.
        records: [n] of the fields stamp, u16, and map, u8[h,w].
        """

        def scan(txn: lmdb.Transaction) -> None:
            if self._keys.known:
                for ids, records in self._scan(txn):
                    look(ids, records)
            else:
                for _, records, _ in rows(txn, self._kind):
                    look(None, records)

        self._view(scan)

    def records(self) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """What `visit` shows, at once: ids i64[n] and records [n], in key order."""
        self._keys.require()
        ids, records = [np.empty(0, np.int64)], [np.empty(0, self._kind)]

        def keep(some: NDArray[np.int64] | None, theirs: NDArray[Any]) -> None:
            assert some is not None
            ids.append(some)
            records.append(theirs)

        self.visit(keep)
        return np.concatenate(ids), np.concatenate(records)

    def copy(self, path: str | os.PathLike[str]) -> None:
        """Copies the cache, as it is at one moment, to a new folder.

        Any process may write to it meanwhile. The copy has no free pages, so it may be smaller. It
        is there as a whole or not at all. Raises CacheError where something is at `path`, or where
        that is within this cache, and OSError where the disk is full.
        """
        with new_directory(os.fspath(path), self.path) as hidden:
            self._environment().copy(hidden)

    def resident(self) -> ResidentCache:
        """The same cache with all maps in memory, N·h·w bytes."""
        resident = ResidentCache(self)
        resident.refresh()
        return resident

    def stamps(self) -> NDArray[np.int32]:
        """Epoch stamp of every sample, i32[N]; -1 where there is no map."""
        return self._view(self._stamps)

    def census(self) -> tuple[dict[int, int], int]:
        """Maps of each epoch stamp, ascending, and records of the wrong length; needs no index."""

        def count(txn: lmdb.Transaction) -> tuple[dict[int, int], int]:
            # Copied: a view would keep the maps too.
            blocks = [(records["stamp"].copy(), bad) for _, records, bad in rows(txn, self._kind)]
            stamps = np.concatenate([np.empty(0, np.uint16), *(block for block, _ in blocks)])
            ages, counts = np.unique(stamps, return_counts=True)
            by_age = dict(zip(ages.tolist(), counts.tolist(), strict=True))
            return by_age, sum(bad for _, bad in blocks)

        return self._view(count)

    def coverage(self) -> Coverage:
        """How many samples have a map, and how many of those maps say nothing: they are flat."""

        found = same = 0

        def count(_: NDArray[np.int64] | None, records: NDArray[Any]) -> None:
            nonlocal found, same
            found += len(records)
            same += int(flat(records["map"]).sum())

        self.visit(count)
        return Coverage(found, same)

    def stalest(self, count: int, *, epoch: int) -> NDArray[np.int64]:
        """The samples for a pass of `epoch` that makes `count` maps -> i64[count], in key order.

        Those that carry its stamp come first, so that a pass that is resumed keeps to its samples;
        then those without a map, or with one of an epoch to come, which is another run's; then by
        age. Ties are broken by an order that changes with the epoch.
        """
        epoch = checked_epoch(epoch)
        if not 0 <= count <= self._samples:
            raise ValueError(f"count must be in 0..{self._samples}, the samples, got {count}")
        stamps = self.stamps()
        # Age, and behind the point what breaks ties: exact, with 17 and 33 bits.
        rank = uniforms(0, Stream.STALEST, epoch, np.arange(self._samples), 1)[:, 0]
        rank += np.where(stamps == epoch, -2, np.where(stamps > epoch, -1, stamps))
        return self._keys.ascending(_lowest(rank, count))

    def read_neighbors(self) -> NDArray[np.uint16] | None:
        """What `write_neighbors` wrote last, u16[K, m], read-only; None before."""
        self._neighbors = self._view(self._newest_neighbors)
        return self._neighbors.table

    def close(self) -> None:
        """Closes LMDB too, unless another SaliencyCache of this process has the same path."""
        self._closed = True
        _open.discard(self)
        if not any(cache._real == self._real for cache in _open):
            environment_at(self._real).close()

    def __enter__(self: Reader) -> Reader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _view(self, look: Callable[[lmdb.Transaction], T]) -> T:
        return self._environment().view(look)

    def _environment(self) -> Environment:
        if self._closed:
            raise CacheError(
                f"saliency cache {self.path!r} is closed; open it again with SaliencyCache(...)"
            )
        return environment_at(self._real)

    def _meta(self, txn: lmdb.Transaction) -> CacheMeta:
        return from_json(bytes(txn.get(META, b"")), self.path)

    def _newest_neighbors(self, txn: lmdb.Transaction) -> _Neighbors:
        """Those that were read last, if nothing was written since: every batch asks for them."""
        version = _version(txn)
        if self._neighbors is not None and self._neighbors.version == version:
            return self._neighbors
        shape, table = self._meta(txn).neighbors, None
        if shape is not None:
            table = neighbors_from_bytes(bytes(txn.get(NEIGHBORS, b"")), shape, self.path)
            table.setflags(write=False)
        return _Neighbors(version, table)

    def _opened(self, txn: lmdb.Transaction) -> CacheMeta:
        """The meta record, once the file is sound and the other records fit it."""
        self._environment().require_sound()
        meta = self._meta(txn)
        check_contents(txn, meta, self.path)
        return meta

    def _scan(self, txn: lmdb.Transaction) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """ids i64[n] and records[n] of the samples that have a map, in key order."""
        self._keys.require()
        for keys, records, _ in rows(txn, self._kind):
            ids, ours = self._keys.ids_of(keys)
            yield ids[ours], records[ours]

    def _stamps(self, txn: lmdb.Transaction) -> NDArray[np.int32]:
        stamps = np.full(self._samples, -1, np.int32)
        for ids, records in self._scan(txn):
            stamps[ids] = records["stamp"]
        return stamps

    def _check(
        self, meta: CacheMeta, index: ImageIndex | None, grid: tuple[int, int] | None
    ) -> None:
        remedy = "build a new cache at another path"
        if index is not None and (meta.fingerprint, meta.samples) != (
            index.fingerprint,
            len(index),
        ):
            raise CacheError(
                f"saliency cache {self.path!r} is of another data set: {meta.samples} samples, "
                f"fingerprint {meta.fingerprint[:16]}; the index has {len(index)} and "
                f"{index.fingerprint[:16]}. Pass the data it was built from, or {remedy}"
            )
        if grid is not None and tuple(grid) != meta.grid:
            raise CacheError(
                f"saliency cache {self.path!r} has grid {meta.grid}, not {tuple(grid)}; {remedy}"
            )


class ResidentCache:
    """A copy of a cache in memory, N·h·w bytes, and twice as much while a new copy is taken.

    `read` gives what `SaliencyCache.read` gives at the same moment, and checks that by one small
    read of LMDB. After a pass, of this process or another, the next `read` takes a new copy; while
    a pass is under way, maps are looked up in LMDB. The first copy is taken at first use.

    Every process has its own copy, and so has every ResidentCache: two pipelines on one machine
    hold the maps twice.
    """

    def __init__(self, cache: CacheReader) -> None:
        self._cache = cache
        self._copy: Snapshot | None = None

    @property
    def maps(self) -> Maps:
        """The maps of the copy, u8[N,h,w]; read-only."""
        return (self._copy or self.refresh()).maps

    @property
    def found(self) -> NDArray[np.bool_]:
        """Which samples have a map in the copy, bool[N]; read-only."""
        return (self._copy or self.refresh()).found

    def read(self, ids: ArrayLike) -> tuple[Maps, NDArray[np.bool_]]:
        """What `SaliencyCache.read` gives for the same ids."""
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


def _version(txn: lmdb.Transaction) -> tuple[int, bytes]:
    return txn.id(), bytes(txn.get(META, b""))


def _lowest(values: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Whether each is one of the `count` lowest; of equal ones the first are."""
    if count == 0:
        return np.zeros(len(values), np.bool_)
    bound = np.partition(values, count - 1)[count - 1]
    chosen = values < bound
    chosen[np.flatnonzero(values == bound)[: count - np.count_nonzero(chosen)]] = True
    return chosen
