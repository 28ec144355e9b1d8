"""The saliency cache: one LMDB environment that holds a small map for every sample of a data set.

Decides the file format, when a stored map may be trusted, and how LMDB is opened, grown and
recovered. What the maps mean, and when a pass is due, is decided elsewhere.

Format 1, without pickle; the keys of records are big-endian so that LMDB's byte order is their
numeric order:

    b"meta"       UTF-8 JSON: the fields of `CacheMeta`
    8 bytes       uint64 BE, position in the index or hash of the path: epoch stamp (uint16 LE)
                  + h*w bytes, round(255*A); a value of any other length is no map (the empty one
                  marks a withdrawn map)
    b"neighbors"  uint16 LE [K, m] in C order; its shape is the field `neighbors` of the meta record

Durability: every commit is synced (LMDB's default). A killed process or a lost machine loses the
records since the last commit, that is at most one chunk, and never damages what was committed. LMDB
wants a local file system.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

import lmdb
import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "FORMAT_VERSION",
    "CacheError",
    "CacheMeta",
    "ChunkWriter",
    "ResidentCache",
    "SaliencyCache",
]

FORMAT_VERSION = 1
INITIAL_MAP_SIZE = 64 << 20  # bytes of address space, not of disk; doubled whenever it is full
CHUNK = 4096  # records a commit: some 290 KB at 7x7, one sync

_KEY, _STAMP = 8, 2  # bytes
_META, _NEIGHBORS = b"meta", b"neighbors"
_PROVENANCE = ("method", "model", "layer", "input_size")
# LMDB reports a short write as EIO, so a full disk may arrive under that name too.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

T = TypeVar("T")
Maps = NDArray[np.uint8]


class Index(Protocol):
    """What a cache needs of a data set's index, such as `ImageIndex`."""

    @property
    def fingerprint(self) -> str:
        """Hex digest over names and labels, in order."""

    def __len__(self) -> int: ...

    def keys(self, naming: str) -> NDArray[np.uint64]:
        """naming "index" or "path" -> the unique keys of the samples, u64[N]."""


class SaliencyCache:
    """LMDB store of one data set's saliency maps; opens an existing one, `create` makes one.

    All objects of a process share one LMDB environment a path. It is opened at first use, closed
    around a fork and opened anew on both sides, so that an inherited one is never touched. Safe to
    use from several threads. Where the directory is read-only the cache is too, and without LMDB's
    locks: then nobody may write to it meanwhile.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        index: Index | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """index: None skips the check of the data set; then only a cache of naming "index" is read.

        Raises CacheError where there is no cache, or one of another data set, grid or format.
        """
        self.path = os.fspath(path)
        self._real = os.path.realpath(self.path)
        self._closed = False
        _require_data_file(self.path)
        _environment(self._real).forget_if_replaced()
        meta = self.meta
        self._check(meta, index, grid)
        self._grid, self._samples = meta.grid, meta.samples
        self._size = _STAMP + meta.grid[0] * meta.grid[1]
        self._keys: NDArray[np.uint64] | None = None
        if index is not None or meta.naming == "index":
            keys = np.arange(meta.samples) if index is None else index.keys(meta.naming)
            self._keys = np.asarray(keys, np.uint64)
            self._order = np.argsort(self._keys, kind="stable")
            self._sorted = self._keys[self._order]
            if (twins := np.flatnonzero(self._sorted[1:] == self._sorted[:-1])).size:
                first, second = self._order[twins[0] : twins[0] + 2]
                raise CacheError(
                    f"samples {first} and {second} have the same {meta.naming} key, so one map "
                    "would serve both; remove one of them or name the samples by their index"
                )
        _caches.add(self)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        index: Index,
        *,
        grid: tuple[int, int],
        naming: str = "index",
        exist_ok: bool = False,
        method: str | None = "gradcam",
        model: str | None = None,
        layer: str | None = None,
        input_size: int | None = None,
    ) -> SaliencyCache:
        """An empty cache for `index`; with exist_ok, the one that is there, checked.

        Several processes may do the latter at once. grid: (h, w) of the maps. naming: "index" or
        "path", see `index.keys`. The rest says how the maps come about; `begin_pass` may say
        otherwise later. Raises CacheError where something else is at `path`.
        """
        path = os.fspath(path)
        if naming not in ("index", "path"):
            raise ValueError(f'naming must be "index" or "path", got {naming!r}')
        if len(grid) != 2 or not all(isinstance(n, int | np.integer) and n >= 1 for n in grid):
            raise ValueError(f"grid must be (h, w) of positive integers, got {grid!r}")
        if os.path.lexists(path) and (not os.path.isdir(path) or os.listdir(path)):
            if not exist_ok:
                raise CacheError(
                    f"cannot create a saliency cache at {path!r}: something is there; open it with "
                    "SaliencyCache(...), pass exist_ok=True, or choose another path"
                )
            _require_directory(path)
            if foreign := sorted(set(os.listdir(path)) - {"data.mdb", "lock.mdb"}):
                raise CacheError(
                    f"{path!r} is no saliency cache: it holds {foreign[0]!r}; choose another path"
                )
        os.makedirs(path, exist_ok=True)
        meta = CacheMeta(
            FORMAT_VERSION,
            (int(grid[0]), int(grid[1])),
            len(index),
            index.fingerprint,
            naming,
            *(method, model, layer, input_size),
        )

        def initialise(txn: lmdb.Transaction) -> None:
            if txn.stat()["entries"] == 0:
                txn.put(_META, _encode(meta))
            elif not exist_ok:
                raise CacheError(
                    f"another process has just created {path!r}; pass exist_ok=True to share it"
                )

        environment = _environment(os.path.realpath(path))
        environment.forget_if_replaced()
        environment.update(initialise, needs=1 << 16)
        cache = cls(path, index=index, grid=meta.grid)
        if (stored := cache.meta.naming) != naming:
            cache.close()
            raise CacheError(
                f"saliency cache {path!r} names its samples by {stored!r}, not by {naming!r}; pass "
                f"naming={stored!r} or build a new cache at another path"
            )
        return cache

    @property
    def meta(self) -> CacheMeta:
        """Read from LMDB each time: another process may have changed it."""
        return self._view(self._meta)

    @property
    def size_bytes(self) -> int:
        """Length of the data file (st_size); LMDB reuses its pages, it never shrinks the file."""
        return os.stat(os.path.join(self._real, "data.mdb")).st_size

    def read(self, ids: ArrayLike) -> tuple[Maps, NDArray[np.bool_]]:
        """ids: int[B], positions in the index -> maps u8[B,h,w] (255 = 1.0), found bool[B].

        All of one snapshot, the newest. A sample without a map has found False and an all-zero map.
        Raises IndexError for an id outside the index.
        """
        ids = self._ids(ids)
        names = _split(self._names(ids).tobytes(), _KEY)
        values = self._view(lambda txn: [txn.get(name, b"") for name in names])
        found = np.fromiter(map(len, values), np.int64, len(values)) == self._size
        if not found.all():
            blank = bytes(self._size)
            values = [value if ok else blank for value, ok in zip(values, found, strict=True)]
        records = np.frombuffer(b"".join(values), np.uint8).reshape(len(ids), self._size)
        return records[:, _STAMP:].copy().reshape(len(ids), *self._grid), found

    def stamps(self) -> NDArray[np.int32]:
        """Epoch stamp of every sample, i32[N]; -1 where there is no map."""
        return self._view(self._stamps)

    def census(self) -> tuple[dict[int, int], int]:
        """Maps of each epoch stamp, ascending, and records of the wrong length; needs no index."""

        def count(txn: lmdb.Transaction) -> tuple[dict[int, int], int]:
            rows = [(_stamps_of(records), spoilt) for _, records, spoilt in self._rows(txn)]
            stamps = np.concatenate([np.empty(0, np.int64), *(block for block, _ in rows)])
            ages, counts = np.unique(stamps, return_counts=True)
            return dict(zip(ages.tolist(), counts.tolist(), strict=True)), sum(n for _, n in rows)

        return self._view(count)

    def begin_pass(
        self,
        epoch: int,
        *,
        weights: str = "",
        method: str | None = None,
        model: str | None = None,
        layer: str | None = None,
        input_size: int | None = None,
    ) -> NDArray[np.int64]:
        """Begins or resumes the pass of `epoch` (0..65535) -> i64[P], ids to do in key order.

        weights: hex digest of the model's weights; "" where unknown, which trusts any other unknown
        one. The provenance is the last pass's unless given. Maps that carry this epoch are done if
        the pass under way, or the last complete one, has the same epoch, weights and provenance. If
        not they are stale: they are withdrawn (emptied) first, and the pass begins only then.
        """
        epoch = _checked_epoch(epoch)
        given = {"method": method, "model": model, "layer": layer, "input_size": input_size}
        meta = self.meta
        kept = {
            name: getattr(meta, name) if value is None else value for name, value in given.items()
        }
        wanted = {"epoch": epoch, "weights": weights, **kept}
        stamps = self.stamps()
        order = self._order
        trusted = wanted in (meta.under_way, meta.last_pass)
        if not trusted:
            # Emptied rather than deleted: the place in the page is kept, and the file stays packed.
            # In chunks before the meta record rather than with it: a crash between leaves fewer
            # maps but none that is taken for new.
            self._withdraw(order[stamps[order] == epoch])
        pending = order[stamps[order] != epoch] if trusted else order

        def begin(txn: lmdb.Transaction) -> None:
            now = self._meta(txn)
            if pending.size or now.under_way is not None or now.last_pass != wanted:
                epoch_left = None if now.epoch == epoch and not trusted else now.epoch
                txn.put(_META, _encode(replace(now, under_way=wanted, epoch=epoch_left)))

        self._update(begin)
        return pending.astype(np.int64)

    def write(self, ids: ArrayLike, maps: ArrayLike, *, epoch: int) -> None:
        """Commits maps of the pass under way, all or none.

        ids: int[B]; maps: u8[B,h,w], or float in [0, 1]. Of an id that comes twice the later map
        counts. Chunks in key order (that of `begin_pass`) make the smallest file. Raises ValueError
        for maps of another shape, dtype or range, CacheError if no pass of `epoch` is under way,
        OSError if the disk is full; what was committed before stays.
        """
        epoch = _checked_epoch(epoch)
        ids = self._ids(ids)
        maps = self._quantised(ids, maps)
        records = np.empty((len(ids), self._size), np.uint8)
        records[:, :_STAMP] = np.frombuffer(epoch.to_bytes(_STAMP, "little"), np.uint8)
        records[:, _STAMP:] = maps.reshape(len(ids), self._size - _STAMP)
        names = self._names(ids)
        # Ascending, and of twins the last.
        order = len(ids) - 1 - np.unique(names[::-1], return_index=True)[1]
        keys = _split(names[order].tobytes(), _KEY)
        values = _split(records[order].tobytes(), self._size)

        def commit(txn: lmdb.Transaction) -> None:
            under_way = self._meta(txn).under_way
            if under_way is None or under_way["epoch"] != epoch:
                found = "none" if under_way is None else f"that of epoch {under_way['epoch']}"
                raise CacheError(
                    f"write(epoch={epoch}): the pass under way in {self.path!r} is {found}; call "
                    f"begin_pass({epoch})"
                )
            self._put(txn, keys, values)

        self._update(commit)

    def end_pass(self, epoch: int) -> None:
        """Marks the pass of `epoch` complete; nothing to do if it is. Raises CacheError if maps are
        missing."""
        epoch = _checked_epoch(epoch)

        def finish(txn: lmdb.Transaction) -> None:
            meta = self._meta(txn)
            if meta.under_way is None and meta.epoch == epoch:
                return
            if meta.under_way is None or meta.under_way["epoch"] != epoch:
                raise CacheError(
                    f"end_pass({epoch}): no such pass is under way in {self.path!r}; call "
                    "begin_pass"
                )
            if (missing := np.flatnonzero(self._stamps(txn) != epoch)).size:
                raise CacheError(
                    f"end_pass({epoch}): {missing.size} of {self._samples} maps are missing (the "
                    f"first: sample {missing[0]}); write them, begin_pass with the same arguments "
                    "lists them all"
                )
            txn.put(
                _META,
                _encode(replace(meta, **meta.under_way, under_way=None, passes=meta.passes + 1)),
            )

        self._update(finish)

    def write_neighbors(self, neighbors: ArrayLike) -> None:
        """neighbors: u16[K, m], for each of K classes its m neighbouring ones, nearest first."""
        table = np.asarray(neighbors)
        if table.dtype != np.uint16 or table.ndim != 2:
            raise ValueError(
                f"neighbors must be uint16 [K, m], got {table.dtype} {list(table.shape)}"
            )
        if table.size and table.max() >= len(table):
            raise ValueError(
                f"neighbors must be classes 0..{len(table) - 1} (it has K rows), got {table.max()}"
            )

        def put(txn: lmdb.Transaction) -> None:
            txn.put(_NEIGHBORS, table.astype("<u2").tobytes())
            txn.put(_META, _encode(replace(self._meta(txn), neighbors=table.shape)))

        self._update(put)

    def read_neighbors(self) -> NDArray[np.uint16] | None:
        """What `write_neighbors` wrote last, u16[K, m]; None before."""

        def get(txn: lmdb.Transaction) -> tuple[tuple[int, int] | None, bytes]:
            return self._meta(txn).neighbors, bytes(txn.get(_NEIGHBORS, b""))

        shape, blob = self._view(get)
        if shape is None:
            return None
        if len(blob) != 2 * shape[0] * shape[1]:
            raise CacheError(
                f"saliency cache {self.path!r}: neighbors has {len(blob)} bytes, its shape is "
                f"{shape}; write it anew"
            )
        return np.frombuffer(blob, "<u2").astype(np.uint16).reshape(shape)

    def resident(self) -> ResidentCache:
        """All maps in memory, N*h*w bytes."""
        return ResidentCache(self)

    def close(self) -> None:
        """Closes LMDB too, unless another SaliencyCache of this process has the same path."""
        self._closed = True
        _caches.discard(self)
        if not any(cache._real == self._real for cache in _caches):
            _environment(self._real).close()

    def __enter__(self) -> SaliencyCache:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _view(self, look: Callable[[lmdb.Transaction], T]) -> T:
        return self._environment().view(look)

    def _update(self, change: Callable[[lmdb.Transaction], None]) -> None:
        full = _expected_bytes(self._samples, self._size)
        self._environment().update(change, needs=max(full - self.size_bytes, 1 << 20))

    def _environment(self) -> _Environment:
        if self._closed:
            raise CacheError(
                f"saliency cache {self.path!r} is closed; open it again with SaliencyCache(...)"
            )
        return _environment(self._real)

    def _meta(self, txn: lmdb.Transaction) -> CacheMeta:
        return _decode(bytes(txn.get(_META, b"")), self.path)

    def _check(self, meta: CacheMeta, index: Index | None, grid: tuple[int, int] | None) -> None:
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

    def _ids(self, ids: ArrayLike) -> NDArray[np.int64]:
        return _checked_ids(ids, self._samples)

    def _names(self, ids: NDArray[np.int64]) -> NDArray[np.uint64]:
        return self._known_keys()[ids].astype(">u8")

    def _known_keys(self) -> NDArray[np.uint64]:
        if self._keys is None:
            raise CacheError(
                f"saliency cache {self.path!r} names its samples by path, so it needs to know "
                "them; pass index=..."
            )
        return self._keys

    def _quantised(self, ids: NDArray[np.int64], maps: ArrayLike) -> Maps:
        """f[B,h,w] in [0, 1] or u8[B,h,w] -> u8[B,h,w]."""
        values = np.asarray(maps)
        if values.shape != (len(ids), *self._grid):
            raise ValueError(
                f"maps must be [{len(ids)}, {self._grid[0]}, {self._grid[1]}], got "
                f"{list(values.shape)}"
            )
        if values.dtype == np.uint8:
            return values
        if values.dtype.kind != "f":
            raise ValueError(f"maps must be uint8, or float in [0, 1], got {values.dtype}")
        bad = ~((values >= 0) & (values <= 1))  # true of NaN as well
        if bad.any():
            row = int(np.flatnonzero(bad.any(axis=(1, 2)))[0])
            raise ValueError(
                f"maps must be in [0, 1], got {values[row][bad[row]][0]} for sample {ids[row]}; "
                "write a map of zeros where there is none"
            )
        return np.rint(255 * values.astype(np.float32)).astype(np.uint8)

    def _withdraw(self, ids: NDArray[np.int64]) -> None:
        """ids in key order."""
        keys = _split(self._names(ids).tobytes(), _KEY)
        for start in range(0, len(keys), CHUNK):
            chunk = keys[start : start + CHUNK]
            self._update(partial(self._put, keys=chunk, values=[b""] * len(chunk)))

    def _rows(self, txn: lmdb.Transaction) -> Iterator[tuple[NDArray[np.uint64], Maps, int]]:
        """Blocks of keys u64[n], records u8[n, 2 + h*w], and how many more had a wrong length."""
        rows = iter(txn.cursor())
        while block := list(islice(rows, 1024)):
            named = [row for row in block if len(row[0]) == _KEY]
            whole = [row for row in named if len(row[1]) == self._size]
            keys = np.frombuffer(b"".join([key for key, _ in whole]), ">u8").astype(np.uint64)
            blob = b"".join([value for _, value in whole])
            records = np.frombuffer(blob, np.uint8).reshape(len(whole), self._size)
            yield keys, records, len(named) - len(whole)

    def _scan(self, txn: lmdb.Transaction) -> Iterator[tuple[NDArray[np.intp], Maps]]:
        """ids i[n] and records u8[n, 2 + h*w] of the samples that have a map, in key order."""
        self._known_keys()
        for keys, records, _ in self._rows(txn):
            place = np.minimum(np.searchsorted(self._sorted, keys), self._samples - 1)
            ours = self._sorted[place] == keys
            yield self._order[place[ours]], records[ours]

    def _stamps(self, txn: lmdb.Transaction) -> NDArray[np.int32]:
        stamps = np.full(self._samples, -1, np.int32)
        for ids, records in self._scan(txn):
            stamps[ids] = _stamps_of(records)
        return stamps


def _checked_epoch(epoch: int) -> int:
    if not isinstance(epoch, int | np.integer) or not 0 <= epoch < 1 << 16:
        raise ValueError(
            f"epoch must be an integer in 0..65535 (it is stored in 16 bits), got {epoch!r}"
        )
    return int(epoch)


def _checked_ids(ids: ArrayLike, samples: int) -> NDArray[np.int64]:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"ids must be integers [B], got {array.dtype} {list(array.shape)}")
    if array.size and (array.min() < 0 or array.max() >= samples):
        worst = array[(array < 0) | (array >= samples)][0]
        raise IndexError(f"ids must be in 0..{samples - 1} (positions in the index), got {worst}")
    return array.astype(np.int64)


def _split(blob: bytes, size: int) -> list[bytes]:
    return [blob[start : start + size] for start in range(0, len(blob), size)]
