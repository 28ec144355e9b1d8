"""The saliency cache: one LMDB environment that holds a small map for every sample of a data set.

Decides which samples a cache serves, under which keys, and when a stored map may be trusted. The
bytes of a record are of `records`, those of the meta record of `cache_meta`; how LMDB is opened,
grown and recovered is of `store`. What the maps mean, and when a pass is due, is decided elsewhere.

Format 1, without pickle; the keys of records are big-endian so that LMDB's byte order is their
numeric order:

    b"meta"       UTF-8 JSON: the fields of `CacheMeta`
    8 bytes       uint64 BE, position in the index or hash of the path: epoch stamp (uint16 LE)
                  + h*w bytes, round(255*A); a value of any other length is no map (the empty one
                  marks a withdrawn map)
    b"neighbors"  uint16 LE [K, m] in C order; its shape is the field `neighbors` of the meta record

Durability: every commit is synced (LMDB's default). A killed process or a lost machine loses the
records since the last commit, that is at most two chunks, and never damages what was committed.
LMDB wants a local file system.

One process writes at a time. It claims the cache (see `store`) when it begins its first pass or
asks for it, and keeps it. A map belongs to the pass that made it: once another pass has been begun
in the cache, whoever goes on with the former is told so, and nothing of it is written. Nor is
anything written to a cache that was deleted or replaced since it was opened.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol, TypeVar

import lmdb
import numpy as np
from numpy.typing import ArrayLike, NDArray

from scae_dali.cache import environment
from scae_dali.cache.meta import (
    FORMAT_VERSION,
    PROVENANCE,
    CacheError,
    CacheMeta,
    checked_provenance,
    checked_settings,
    describe_pass,
    from_json,
    same_pass,
    settings_of,
    to_json,
)
from scae_dali.cache.records import (
    CHUNK,
    CLASSES,
    KEY_BYTES,
    Maps,
    checked_epoch,
    checked_ids,
    checked_maps,
    expected_bytes,
    flat,
    put_ascending,
    record_type,
    rows,
    split,
)
from scae_dali.cache.resident import ResidentCache, Snapshot
from scae_dali.cache.writer import ChunkWriter, require_no_writer
from scae_dali.plan.random import Stream, uniforms

__all__ = [
    "CHUNK",
    "FORMAT_VERSION",
    "CacheError",
    "CacheMeta",
    "ChunkWriter",
    "Coverage",
    "Index",
    "ResidentCache",
    "SaliencyCache",
]

_META, _NEIGHBORS = b"meta", b"neighbors"

PATIENCE = 2.0  # seconds that a claim waits for a process that is about to end, or to begin a pass
_ADVICE = (
    "take a cache of your own (build_cache.py: another --out; train.py: another --saliency.cache, "
    "or none)"
)

T = TypeVar("T")


class Coverage(NamedTuple):
    """found: samples that have a map. flat: those of them whose map is the same everywhere."""

    found: int
    flat: int


class Index(Protocol):
    """What a cache needs of a data set's index, such as `ImageIndex`."""

    @property
    def fingerprint(self) -> str:
        """Hex digest over names and labels, in order."""

    def __len__(self) -> int: ...

    def keys(self, naming: str) -> NDArray[np.uint64]:
        """naming "index" or "path" -> the unique keys of the samples, u64[N]."""


_caches: weakref.WeakSet[SaliencyCache] = weakref.WeakSet()  # open ones


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
        self._pass: dict[str, Any] | None = None  # that this object has begun and not ended
        environment.require_data_file(self.path)
        environment.environment(self._real).forget_if_replaced()
        meta = self.meta
        self._check(meta, index, grid)
        self._grid, self._samples = meta.grid, meta.samples
        self._kind = record_type(meta.grid)
        # Of naming "index" the key is the id, and at 10^8 samples a table of keys is a gigabyte.
        self._key_is_id = meta.naming == "index"
        self._keys: NDArray[np.uint64] | None = None
        if index is not None and not self._key_is_id:
            self._keys = np.asarray(index.keys(meta.naming), np.uint64)
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
        naming: str | None = None,
        exist_ok: bool = False,
        method: str | None = "gradcam",
        model: str | None = None,
        layer: str | None = None,
        input_size: int | tuple[int, int] | None = None,
    ) -> SaliencyCache:
        """An empty cache for `index`; with exist_ok, the one that is there, checked.

        Several processes may do the latter at once. grid: (h, w) of the maps. naming: "index" or
        "path", see `index.keys`; None: that of the one that is there, or "index". The rest says how
        the maps come about; `begin_pass` may say otherwise later. Raises CacheError where something
        else is at `path`.
        """
        path = os.fspath(path)
        if naming not in ("index", "path", None):
            raise ValueError(f'naming must be "index" or "path", got {naming!r}')
        if len(grid) != 2 or not all(isinstance(n, int | np.integer) and n >= 1 for n in grid):
            raise ValueError(f"grid must be (h, w) of positive integers, got {grid!r}")
        record_type((int(grid[0]), int(grid[1])))  # before anything is made
        given = {"method": method, "model": model, "layer": layer, "input_size": input_size}
        made_by = checked_provenance(given)
        environment.make_directory(path, exist_ok=exist_ok)
        meta = CacheMeta(
            FORMAT_VERSION,
            (int(grid[0]), int(grid[1])),
            len(index),
            index.fingerprint,
            naming or "index",
            **made_by,
        )

        def initialise(txn: lmdb.Transaction) -> None:
            if txn.stat()["entries"] == 0:
                txn.put(_META, to_json(meta))
            elif not exist_ok:
                raise CacheError(
                    f"another process has just created {path!r}; pass exist_ok=True to share it"
                )

        env = environment.environment(os.path.realpath(path))
        env.forget_if_replaced()
        env.update(initialise, needs=1 << 16)
        cache = cls(path, index=index, grid=meta.grid)
        if naming is not None and (stored := cache.meta.naming) != naming:
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
        return os.path.getsize(os.path.join(self._real, environment.DATA_FILE))

    def read(self, ids: ArrayLike) -> tuple[Maps, NDArray[np.bool_]]:
        """ids: int[B], positions in the index -> maps u8[B,h,w] (255 = 1.0), found bool[B].

        All of one snapshot, the newest. A sample without a map has found False and an all-zero map.
        Raises IndexError for an id outside the index.
        """
        ids = checked_ids(ids, self._samples)
        names = split(self._names(ids).tobytes(), KEY_BYTES)
        values = self._view(lambda txn: [txn.get(name, b"") for name in names])
        found = np.fromiter(map(len, values), np.int64, len(values)) == self._kind.itemsize
        if not found.all():
            blank = bytes(self._kind.itemsize)
            values = [value if ok else blank for value, ok in zip(values, found, strict=True)]
        return np.frombuffer(b"".join(values), self._kind)["map"].copy(), found

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

        def count(txn: lmdb.Transaction) -> Coverage:
            known = self._key_is_id or self._keys is not None
            blocks = self._scan(txn) if known else ((k, r) for k, r, _ in rows(txn, self._kind))
            each = [(len(ids), int(flat(records["map"]).sum())) for ids, records in blocks]
            return Coverage(sum(found for found, _ in each), sum(same for _, same in each))

        return self._view(count)

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
        return self._in_key_order(_lowest(rank, count))

    def begin_pass(
        self,
        epoch: int,
        *,
        ids: ArrayLike | None = None,
        weights: str = "",
        method: str | None = None,
        model: str | None = None,
        layer: str | None = None,
        input_size: int | tuple[int, int] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> NDArray[np.int64]:
        """Begins or resumes the pass of `epoch` (0..65535) -> i64[P], ids to do in key order.

        ids: int[B], the samples of the pass, each once; None: all. Maps of other epochs stay as
        they are. weights: hex digest of the model's weights; "" where unknown, which trusts any
        other unknown one. The provenance is the last pass's unless given. settings: what else the
        maps depend on, such as the mean of the normalisation, as JSON can hold it; what one of two
        passes does not name counts as the same. Maps that carry this epoch are done if the pass
        under way, or the last complete one, has the same epoch, weights, samples, provenance and
        settings. If not they are stale: they are withdrawn (emptied) first, and the pass begins
        only then. A pass of no samples makes no maps, and withdraws none.

        Claims the cache for this process if there is anything to do. Raises CacheError where
        another process has claimed it, unless that one makes the same pass with the same weights:
        then both make what is missing, and both end. CacheError as well while this object has a
        pass under way in a ChunkWriter.
        """
        require_no_writer(self)
        epoch = checked_epoch(epoch)
        given = {"method": method, "model": model, "layer": layer, "input_size": input_size}
        given = checked_provenance(given)
        asked = checked_settings(settings)
        if not isinstance(weights, str):
            raise ValueError(f'weights must be a hex digest or "", got {weights!r}')
        ours = np.full(self._samples, ids is None)
        part, which = None, None
        if ids is not None:
            ours[checked_ids(ids, self._samples)] = True
            part = int(np.count_nonzero(ours))
            which = blake2b(np.packbits(ours).tobytes(), digest_size=16).hexdigest()
        fixed = {"epoch": epoch, "weights": weights, "part": part, "which": which}
        patience = _Patience()
        while True:  # until nobody has changed the cache between the look and the change
            meta = self.meta
            kept = {name: getattr(meta, name) for name in PROVENANCE if given[name] is None}
            wanted = fixed | given | kept | ({} if asked is None else {"settings": asked})
            recorded = meta.under_way or meta.last_pass
            goes_on = same_pass(recorded, wanted)
            if goes_on and (known := settings_of(recorded) | settings_of(wanted)):
                wanted["settings"] = known
            if not goes_on and not self._claimed(meta, patience):
                continue
            trusted = part == 0 or any(
                same_pass(done, wanted) for done in (meta.under_way, meta.last_pass)
            )
            stamps = self.stamps()
            pending = self._in_key_order(ours & (stamps != epoch) if trusted else ours)
            if goes_on and not pending.size:
                break
            if goes_on and not self._claimed(meta, patience, joins=bool(weights)):
                continue
            if not trusted and epoch in (meta.epoch, (meta.under_way or {}).get("epoch")):
                # Nobody writes maps of this epoch, or believes them, from here on.
                emptied = replace(meta, under_way=None)
                if meta.epoch == epoch:
                    emptied = replace(emptied, epoch=None)
                self._replace_meta(meta, emptied)
                continue
            if not trusted:
                # Emptied rather than deleted: the place in the page is kept, and the file stays
                # packed. In chunks before the meta record rather than with it: a crash between
                # leaves fewer maps but none that is taken for new.
                self._withdraw(self._in_key_order(stamps == epoch))
            if self._replace_meta(meta, replace(meta, under_way=wanted)):
                break
        self._pass = wanted
        return pending

    def claim(self) -> None:
        """Makes this process the one that writes to the cache, until it closes it or ends.

        `begin_pass` does so by itself; a run that will begin its first pass much later had better
        know at its start. Raises CacheError where another process is the one, PermissionError where
        the cache is read-only.
        """
        patience = _Patience()
        while not self._claimed(self.meta, patience):
            pass

    def write(self, ids: ArrayLike, maps: ArrayLike, *, epoch: int) -> None:
        """Commits maps of the pass that this object has begun, all or none.

        ids: int[B]; maps: u8[B,h,w], or float in [0, 1]. Of an id that comes twice the later map
        counts. Chunks in key order (that of `begin_pass`) make the smallest file. Where another
        process has completed the same pass, with the same weights, nothing is left to write. Raises
        ValueError for maps of another shape, dtype or range, CacheError if no pass of `epoch` is
        under way or another one was begun since, OSError if the disk is full; what was committed
        before stays.
        """
        epoch = checked_epoch(epoch)
        ids, maps = self.checked(ids, maps)
        records = np.empty(len(ids), self._kind)
        records["stamp"] = epoch
        records["map"] = maps
        names = self._names(ids)
        # Ascending, and of twins the last.
        order = len(ids) - 1 - np.unique(names[::-1], return_index=True)[1]
        keys = split(names[order].tobytes(), KEY_BYTES)
        values = split(records[order].tobytes(), self._kind.itemsize)

        def commit(txn: lmdb.Transaction) -> None:
            meta = self._meta(txn)
            under_way = meta.under_way
            if self._pass is None or self._pass["epoch"] != epoch:
                found = "none" if under_way is None else f"that of epoch {under_way['epoch']}"
                raise CacheError(
                    f"write(epoch={epoch}): the pass under way in {self.path!r} is {found}; call "
                    f"begin_pass({epoch})"
                )
            if self._still_under_way(meta, f"write(epoch={epoch})"):
                put_ascending(txn, keys, values)

        self._update(commit)

    def checked(self, ids: ArrayLike, maps: ArrayLike) -> tuple[NDArray[np.int64], Maps]:
        """What `write` would take -> ids i64[B], maps u8[B,h,w]; raises what it would raise."""
        ids = checked_ids(ids, self._samples)
        return ids, checked_maps(maps, ids, self._grid)

    def end_pass(self, epoch: int) -> None:
        """Marks the pass of `epoch` complete; nothing to do if it is. Raises CacheError if maps are
        missing."""
        epoch = checked_epoch(epoch)

        def finish(txn: lmdb.Transaction) -> None:
            meta = self._meta(txn)
            begun = self._pass is not None and self._pass["epoch"] == epoch
            if not begun and meta.under_way is None and meta.epoch == epoch:
                return
            if not begun:
                raise CacheError(
                    f"end_pass({epoch}): no such pass is under way in {self.path!r}; call "
                    "begin_pass"
                )
            if meta.under_way is None and same_pass(meta.last_pass, self._pass):
                return
            self._still_under_way(meta, f"end_pass({epoch})")
            assert meta.under_way is not None
            part = meta.under_way["part"]
            wanted = self._samples if part is None else part
            lacking = np.flatnonzero(self._stamps(txn) != epoch)
            if (missing := wanted - (self._samples - lacking.size)) > 0:
                first = f" (the first: sample {lacking[0]})" if part is None else ""
                raise CacheError(
                    f"end_pass({epoch}): {missing} of {wanted} maps are missing{first}; write "
                    "them, begin_pass with the same arguments lists them all"
                )
            made = {"settings": None} | meta.under_way
            done = replace(meta, **made, under_way=None, passes=meta.passes + 1)
            txn.put(_META, to_json(done))

        self._update(finish)
        self._pass = None

    def write_neighbors(self, neighbors: ArrayLike) -> None:
        """neighbors: u16[K, m], for each of K <= 65536 classes its m neighbouring ones, nearest
        first. Raises CacheError where another process writes to the cache."""
        table = np.asarray(neighbors)
        if table.dtype != np.uint16 or table.ndim != 2:
            raise ValueError(
                f"neighbors must be uint16 [K, m], got {table.dtype} {list(table.shape)}"
            )
        if len(table) > CLASSES:
            raise ValueError(
                f"neighbors must be of at most {CLASSES} classes (they are stored in 16 bits), got "
                f"{len(table)}"
            )
        if table.size and table.max() >= len(table):
            raise ValueError(
                f"neighbors must be classes 0..{len(table) - 1} (it has K rows), got {table.max()}"
            )

        if self._pass is None:
            self.claim()

        def put(txn: lmdb.Transaction) -> None:
            meta = self._meta(txn)
            if self._pass is not None:
                self._still_under_way(meta, "write_neighbors")
            txn.put(_NEIGHBORS, table.astype("<u2").tobytes())
            txn.put(_META, to_json(replace(meta, neighbors=table.shape)))

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

    @property
    def map_bytes(self) -> int:
        """What all maps take in memory, N·h·w."""
        return self._samples * math.prod(self._grid)

    def version(self) -> tuple[int, bytes]:
        """Changes with everything that anybody writes to the cache: the number of LMDB's last
        transaction, and the meta record, which tells a cache from one that has replaced it."""
        return self._view(_version)

    def snapshot(self) -> Snapshot:
        """All maps, of one moment."""

        def copy(txn: lmdb.Transaction) -> Snapshot:
            maps = np.zeros((self._samples, *self._grid), np.uint8)
            found = np.zeros(self._samples, np.bool_)
            for ids, records in self._scan(txn):
                maps[ids] = records["map"]
                found[ids] = True
            return Snapshot(maps, found, _version(txn))

        return self._view(copy)

    def resident(self) -> ResidentCache:
        """All maps in memory, N·h·w bytes."""
        resident = ResidentCache(self)
        resident.refresh()
        return resident

    def close(self) -> None:
        """Closes LMDB too, unless another SaliencyCache of this process has the same path."""
        self._closed = True
        _caches.discard(self)
        if not any(cache._real == self._real for cache in _caches):
            environment.environment(self._real).close()

    def __enter__(self) -> SaliencyCache:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _view(self, look: Callable[[lmdb.Transaction], T]) -> T:
        return self._environment().view(look)

    def _update(self, change: Callable[[lmdb.Transaction], None]) -> None:
        full = expected_bytes(self._samples, self._kind.itemsize)
        try:
            lacking = full - self.size_bytes
        except FileNotFoundError:  # `update` tells it
            lacking = full
        self._environment().update(change, needs=max(lacking, 1 << 20))

    def _claimed(self, meta: CacheMeta, patience: _Patience, *, joins: bool = False) -> bool:
        """Whether this process may change a cache that says `meta`; if not, look at it again.

        joins: whether it makes the very maps that the process makes that has claimed the cache.
        Raises CacheError once another process has had the cache for too long.
        """
        claim = self._environment().claim()
        if claim is environment.Claim.TAKEN:
            try:
                self._update(lambda txn: None)
            except BaseException:  # it cannot write, so it must not keep others from it
                self._environment().disclaim()
                raise
            return False
        # A child may make a pass while its parent makes none.
        lent = claim is environment.Claim.PARENTS and meta.under_way is None
        if claim is environment.Claim.OURS or lent or joins:
            return True
        if not patience.wait():
            busy = "" if meta.under_way is None else f" ({describe_pass(meta.under_way)})"
            raise CacheError(
                f"another process is writing to saliency cache {self.path!r}{busy}; wait until it "
                f"has ended, or call close() on the cache there, or {_ADVICE}"
            )
        return False

    def _still_under_way(self, meta: CacheMeta, call: str) -> bool:
        """Whether the pass of this object is; False if it is complete already. Raises CacheError
        where another one was begun since."""
        assert self._pass is not None
        if same_pass(meta.under_way, self._pass):
            return True
        complete = meta.under_way is None and same_pass(meta.last_pass, self._pass)
        if complete and self._pass["weights"]:
            return False
        mine, other = self._pass, meta.under_way or meta.last_pass
        # Its epoch is None where the other one has withdrawn the maps and not yet begun.
        which = "" if other["epoch"] is None else f" ({describe_pass(other, mine)})"
        raise CacheError(
            f"{call}: another pass{which} has been begun in saliency cache {self.path!r} since "
            f"this one ({describe_pass(mine, other)}), of which nothing more was written; {_ADVICE}"
        )

    def _replace_meta(self, old: CacheMeta, new: CacheMeta) -> bool:
        """Puts `new` unless the record is no longer `old`; whether it was."""
        unchanged = False

        def put(txn: lmdb.Transaction) -> None:
            nonlocal unchanged
            unchanged = self._meta(txn) == old
            if unchanged:
                txn.put(_META, to_json(new))

        self._update(put)
        return unchanged

    def _environment(self) -> environment.Environment:
        if self._closed:
            raise CacheError(
                f"saliency cache {self.path!r} is closed; open it again with SaliencyCache(...)"
            )
        return environment.environment(self._real)

    def _meta(self, txn: lmdb.Transaction) -> CacheMeta:
        return from_json(bytes(txn.get(_META, b"")), self.path)

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

    def _names(self, ids: NDArray[np.int64]) -> NDArray[np.uint64]:
        return (ids if self._key_is_id else self._known_keys()[ids]).astype(">u8")

    def _in_key_order(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """bool[N] -> i64, the ids of those that are chosen."""
        if self._key_is_id:
            return np.flatnonzero(chosen)
        return self._order[chosen[self._order]]

    def _known_keys(self) -> NDArray[np.uint64]:
        if self._keys is None:
            raise CacheError(
                f"saliency cache {self.path!r} names its samples by path, so it needs to know "
                "them; pass index=..."
            )
        return self._keys

    def _withdraw(self, ids: NDArray[np.int64]) -> None:
        """ids in key order."""
        for start in range(0, len(ids), CHUNK):
            keys = split(self._names(ids[start : start + CHUNK]).tobytes(), KEY_BYTES)
            self._update(partial(put_ascending, keys=keys, values=[b""] * len(keys)))

    def _scan(self, txn: lmdb.Transaction) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
        """ids i64[n] and records[n] of the samples that have a map, in key order."""
        if not self._key_is_id:
            self._known_keys()
        for keys, records, _ in rows(txn, self._kind):
            if self._key_is_id:
                ids, ours = keys.astype(np.int64), keys < self._samples
            else:
                place = np.minimum(np.searchsorted(self._sorted, keys), self._samples - 1)
                ids, ours = self._order[place], self._sorted[place] == keys
            yield ids[ours], records[ours]

    def _stamps(self, txn: lmdb.Transaction) -> NDArray[np.int32]:
        stamps = np.full(self._samples, -1, np.int32)
        for ids, records in self._scan(txn):
            stamps[ids] = records["stamp"]
        return stamps


def _version(txn: lmdb.Transaction) -> tuple[int, bytes]:
    return txn.id(), bytes(txn.get(_META, b""))


class _Patience:
    """How long a claim waits for another process."""

    def __init__(self) -> None:
        self._end = time.monotonic() + PATIENCE

    def wait(self) -> bool:
        """A moment; False once it was enough."""
        time.sleep(0.02)
        return time.monotonic() < self._end


def _lowest(values: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Whether each is one of the `count` lowest; of equal ones the first are."""
    if count == 0:
        return np.zeros(len(values), np.bool_)
    bound = np.partition(values, count - 1)[count - 1]
    chosen = values < bound
    chosen[np.flatnonzero(values == bound)[: count - np.count_nonzero(chosen)]] = True
    return chosen
