"""The saliency cache: a small map for every sample of a data set, read at any time, made in passes.

A pass makes the maps of one epoch, of all samples or of some, by one model; its maps carry its
epoch. A map is trusted if the pass that made it is known to be the same as the one that asks.

One process writes at a time. It claims the cache when it begins its first pass or asks for it, and
keeps it. A map belongs to the pass that made it: once another pass has been begun in the cache,
whoever goes on with the former is told so, and nothing of it is written. Nor is anything written to
a cache that was deleted or replaced since it was opened.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lmdb
import numpy as np
from numpy.typing import ArrayLike, NDArray

from scae_dali.cache.environment import Claim, environment_at, make_directory
from scae_dali.cache.format import (
    CHUNK,
    FORMAT_VERSION,
    META,
    NEIGHBORS,
    PROVENANCE,
    CacheError,
    CacheMeta,
    Maps,
    checked_epoch,
    checked_grid,
    checked_ids,
    checked_maps,
    checked_neighbors,
    checked_provenance,
    checked_settings,
    describe_pass,
    digest_of_samples,
    expected_bytes,
    put_ascending,
    same_pass,
    settings_of,
    split,
    to_json,
)
from scae_dali.cache.reader import CacheReader
from scae_dali.data.index import ImageIndex

__all__ = ["SaliencyCache"]

PATIENCE = 2.0  # seconds that a claim waits for a process that is about to end, or to begin a pass
_ADVICE = (
    "take a cache of your own (scae-dali build-cache: another --out; train.py: another "
    "--saliency.cache, or none)"
)


_turn = threading.Lock()  # held while a reservation is made


@dataclass(eq=False)
class Reservation:
    """Leaves the passes of one SaliencyCache object to a ChunkWriter, as long as that keeps it.
    begun: whether the writer has begun its pass, of `epoch`."""

    epoch: int
    begun: bool = False


class SaliencyCache(CacheReader):
    """LMDB store of one data set's saliency maps; opens an existing one, `create` makes one.

    All objects of a process share one LMDB environment a path. It is opened at first use, closed
    around a fork and opened anew on both sides, so that an inherited one is never touched. Safe to
    use from several threads. All pages are looked at when it is opened, unless they were before in
    this process. Where LMDB's locks cannot be taken, because of the file system or of permissions,
    the cache is read-only, and is read from a copy in memory, which is renewed now and then.
    """

    _pass: dict[str, Any] | None = None  # the one that this object has begun and not ended
    _reserved: weakref.ref[Reservation] | None = None

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        index: ImageIndex,
        *,
        grid: tuple[int, int],
        naming: str | None = None,
        exist_ok: bool = False,
        method: str | None = "gradcam",
        model: str | None = None,
        layer: str | None = None,
        input_size: int | tuple[int, int] | None = None,
    ) -> SaliencyCache:
        """Makes an empty cache for `index`; with exist_ok, opens and checks one that is there.

        With exist_ok, several processes may call it at once. grid: (h, w) of the maps. naming:
        "index" or "path", see `index.keys`; None: that of the one that is there, or "index". The
        rest says how the maps are made; `begin_pass` may change it later. Raises CacheError where
        something else is at `path`.
        """
        path = os.fspath(path)
        if naming not in ("index", "path", None):
            raise ValueError(f'naming must be "index" or "path", got {naming!r}')
        grid = checked_grid(grid)
        given = {"method": method, "model": model, "layer": layer, "input_size": input_size}
        made_by = checked_provenance(given)
        make_directory(path, exist_ok=exist_ok)
        meta = CacheMeta(
            FORMAT_VERSION, grid, len(index), index.fingerprint, naming or "index", **made_by
        )

        def initialise(txn: lmdb.Transaction) -> None:
            if txn.stat()["entries"] == 0:
                txn.put(META, to_json(meta))
            elif not exist_ok:
                raise CacheError(
                    f"another process has just created {path!r}; pass exist_ok=True to share it"
                )

        env = environment_at(os.path.realpath(path))
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
        maps depend on, such as the mean of the normalisation, as JSON can hold it; one that
        only one of two passes names counts as equal. Maps with this epoch are done if the pass
        under way, or the last complete one, has the same epoch, weights, samples, provenance and
        settings. If not they are stale: they are withdrawn (emptied) first, and the pass begins
        only then. A pass of no samples makes no maps, and withdraws none.

        Claims the cache for this process if there is anything to do. Raises CacheError where
        another process has claimed it, unless that one makes the same pass with the same weights:
        then both make what is missing, and both end. CacheError as well while this object has a
        pass under way in a ChunkWriter.
        """
        self._require_unreserved()
        epoch = checked_epoch(epoch)
        given = {"method": method, "model": model, "layer": layer, "input_size": input_size}
        given = checked_provenance(given)
        known = checked_settings(settings)
        if not isinstance(weights, str):
            raise ValueError(f'weights must be a hex digest or "", got {weights!r}')
        chosen = np.full(self._samples, ids is None)
        part, which = None, None
        if ids is not None:
            chosen[checked_ids(ids, self._samples)] = True
            part, which = int(np.count_nonzero(chosen)), digest_of_samples(chosen)
        asked = {"epoch": epoch, "weights": weights, "part": part, "which": which} | given
        asked |= {} if known is None else {"settings": known}
        self._environment().drop_stale_readers()
        patience = _Patience()
        while (pending := self._try_to_begin(asked, chosen, patience)) is None:
            pass
        return pending

    def claim(self) -> None:
        """Makes this process the one that writes to the cache, until it closes it or ends.

        `begin_pass` does so by itself; a run whose first pass comes late calls this at its start,
        to fail early. Raises CacheError where another process has claimed the cache,
        PermissionError where it is read-only.
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
        # In ascending order of the keys; of equal keys the last.
        order = len(ids) - 1 - np.unique(self._keys.of(ids)[::-1], return_index=True)[1]
        keys = self._keys.bytes_of(ids[order])
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
            txn.put(META, to_json(done))

        self._update(finish)
        self._pass = None

    def write_neighbors(self, neighbors: ArrayLike) -> None:
        """neighbors: u16[K, m], for each of K <= 65536 classes its m neighbouring ones, nearest
        first. Raises CacheError where another process writes to the cache."""
        table = checked_neighbors(neighbors)
        if self._pass is None:
            self.claim()

        def put(txn: lmdb.Transaction) -> None:
            meta = self._meta(txn)
            if self._pass is not None:
                self._still_under_way(meta, "write_neighbors")
            txn.put(NEIGHBORS, table.astype("<u2").tobytes())
            txn.put(META, to_json(replace(meta, neighbors=table.shape)))

        self._update(put)

    def reserve(self, epoch: int) -> Reservation:
        """Leaves the passes of this object to whoever keeps the Reservation, until `unreserve`.

        Raises CacheError where another reservation is still kept.
        """
        with _turn:
            self._require_unreserved(or_who_begins=True)
            reservation = Reservation(epoch)
            self._reserved = weakref.ref(reservation)
        return reservation

    def unreserve(self) -> None:
        """Ends the reservation."""
        self._reserved = None

    def _require_unreserved(self, *, or_who_begins: bool = False) -> None:
        """Raises CacheError where a pass of this very object is under way in a ChunkWriter.

        or_who_begins: also where one is about to begin its pass.
        """
        reservation = None if self._reserved is None else self._reserved()
        if reservation is not None and (reservation.begun or or_who_begins):
            raise CacheError(
                f"this SaliencyCache object has a pass of epoch {reservation.epoch} under way in a "
                "ChunkWriter; begin another one once that has ended"
            )

    def _try_to_begin(
        self, asked: Mapping[str, Any], chosen: NDArray[np.bool_], patience: _Patience
    ) -> NDArray[np.int64] | None:
        """One try of `begin_pass` -> the ids to do; None where it must read the cache again.

        asked: the fields of the pass; the provenance that is None there is the last pass's.
        chosen: bool[N], the samples of the pass.
        """
        meta, epoch = self.meta, asked["epoch"]
        kept = {name: getattr(meta, name) for name in PROVENANCE if asked[name] is None}
        wanted = {**asked, **kept}
        recorded = meta.under_way or meta.last_pass
        goes_on = same_pass(recorded, wanted)
        if goes_on and (known := settings_of(recorded) | settings_of(wanted)):
            wanted["settings"] = known
        if not goes_on and not self._claimed(meta, patience):
            return None
        trusted = asked["part"] == 0 or any(
            same_pass(done, wanted) for done in (meta.under_way, meta.last_pass)
        )
        stamps = self.stamps()
        pending = self._keys.ascending(chosen & (stamps != epoch) if trusted else chosen)
        if goes_on and not pending.size:
            self._pass = wanted
            return pending
        if goes_on and not self._claimed(meta, patience, joins=bool(asked["weights"])):
            return None
        if not trusted and epoch in (meta.epoch, (meta.under_way or {}).get("epoch")):
            # Nobody writes maps of this epoch, or believes them, from here on.
            emptied = replace(meta, under_way=None)
            if meta.epoch == epoch:
                emptied = replace(emptied, epoch=None)
            self._replace_meta(meta, emptied)
            return None
        if not trusted:
            # Emptied rather than deleted: the place in the page is kept, and the file stays
            # packed. In chunks before the meta record rather than with it: a crash between
            # leaves fewer maps but none that is taken for new.
            self._withdraw(self._keys.ascending(stamps == epoch))
        if not self._replace_meta(meta, replace(meta, under_way=wanted)):
            return None
        self._pass = wanted
        return pending

    def _update(self, change: Callable[[lmdb.Transaction], None]) -> None:
        full = expected_bytes(self._samples, self._kind.itemsize)
        try:
            lacking = full - self.size_bytes
        except FileNotFoundError:  # `update` raises the error
            lacking = full
        self._environment().update(change, needs=max(lacking, 1 << 20))

    def _claimed(self, meta: CacheMeta, patience: _Patience, *, joins: bool = False) -> bool:
        """Whether this process may change a cache that says `meta`; if not, read meta again.

        joins: whether it makes the very maps that the process with the claim makes.
        Raises CacheError once another process has had the cache for too long.
        """
        claim = self._environment().claim()
        if claim is Claim.TAKEN:
            try:
                self._update(lambda txn: None)
            except BaseException:  # it cannot write, so it must not keep others from it
                self._environment().disclaim()
                raise
            return False
        # A child may make a pass while its parent makes none.
        lent = claim is Claim.PARENTS and meta.under_way is None
        if claim is Claim.OURS or lent or joins:
            return True
        if not patience.wait():
            busy = "" if meta.under_way is None else f" ({describe_pass(meta.under_way)})"
            raise CacheError(
                f"another process is writing to saliency cache {self.path!r}{busy}; wait until it "
                f"has ended, or call close() on the cache there, or {_ADVICE}"
            )
        return False

    def _still_under_way(self, meta: CacheMeta, call: str) -> bool:
        """Whether the pass of this object is under way; False if it is complete already. Raises
        CacheError where another one was begun since."""
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
        """Writes `new` if the meta record still is `old`; returns whether it was."""
        unchanged = False

        def put(txn: lmdb.Transaction) -> None:
            nonlocal unchanged
            unchanged = self._meta(txn) == old
            if unchanged:
                txn.put(META, to_json(new))

        self._update(put)
        return unchanged

    def _withdraw(self, ids: NDArray[np.int64]) -> None:
        """Empties the records of these ids, i64[n] in key order."""
        for start in range(0, len(ids), CHUNK):
            keys = self._keys.bytes_of(ids[start : start + CHUNK])
            self._update(partial(put_ascending, keys=keys, values=[b""] * len(keys)))


class _Patience:
    """How long a claim waits for another process."""

    def __init__(self) -> None:
        self._end = time.monotonic() + PATIENCE

    def wait(self) -> bool:
        """Waits for a moment; False once PATIENCE is over."""
        time.sleep(0.02)
        return time.monotonic() < self._end
