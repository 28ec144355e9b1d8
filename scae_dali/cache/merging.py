"""Several caches as one: of parts of a data set, or of all of it with different samples filled."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import lmdb
import numpy as np
from numpy.typing import NDArray

from scae_dali.cache.environment import environment_at, new_directory
from scae_dali.cache.format import (
    CHUNK,
    FORMAT_VERSION,
    META,
    NEIGHBORS,
    PROVENANCE,
    CacheError,
    CacheMeta,
    digest_of_samples,
    expected_bytes,
    put_ascending,
    record_type,
    settings_of,
    split,
    to_json,
)
from scae_dali.cache.imports import IMPORTED
from scae_dali.cache.reader import CacheReader, RecordKeys
from scae_dali.checks import check
from scae_dali.data.index import ImageIndex

__all__ = ["Merged", "merge_caches"]

_SHAPE = ("grid", "naming")  # what caches must have alike besides the making of their maps


class Merged(NamedTuple):
    """What a merged cache holds.

    samples: of its data set. found: those that have a map. conflicts: places, int64 [c], of samples
    of which caches had different maps. neighbors: whether it has neighbouring classes; False too
    where those of the caches differ.
    """

    samples: int
    found: int
    conflicts: NDArray[np.int64]
    neighbors: bool


def merge_caches(
    path: str | os.PathLike[str],
    caches: Sequence[CacheReader],
    *,
    index: ImageIndex | None = None,
    shards: Sequence[ImageIndex] | None = None,
    keep_first: bool = False,
) -> Merged:
    """Makes a cache at `path` of the maps of several, which stay as they are.

    index: of the merged cache. None: the one that all caches are of; it is needed where they name
    samples by path. shards: for each cache the index that it was opened with, whose samples are
    some of those of `index`, by their names and with the same labels. None: all caches are of
    `index`. keep_first: of different maps of one sample take that of the cache that comes first;
    without it they are an error. Maps keep the epochs that they were made at.

    All maps are in memory meanwhile, N·h·w bytes. The merged cache appears as a whole or not at
    all. Where maps are missing, its pass is under way: the same pass, such as build-cache makes,
    goes on with them. Imported maps are a complete pass over some of the samples instead.

    Raises CacheError where the caches differ in grid, naming, method, network, weights or settings,
    where one is of other samples, where maps differ, and where something is at `path`.
    """
    check(len(caches) > 0, "caches must not be empty")
    check(
        shards is None or (index is not None and len(shards) == len(caches)),
        f"shards must be an index for each of the {len(caches)} caches, beside the index of all",
    )
    metas = [cache.meta for cache in caches]
    made_by = _made_by(caches, metas)
    first = metas[0]
    samples, fingerprint = first.samples, first.fingerprint
    if index is not None:
        samples, fingerprint = len(index), index.fingerprint
    whole = fingerprint, samples
    try:
        records = np.zeros(samples, record_type(first.grid))
        found, conflicting = np.zeros((2, samples), np.bool_)
    except MemoryError as error:
        raise CacheError(
            f"there is no memory for all maps of {samples:,} samples, the number that saliency "
            f"cache {caches[0].path!r} tells; if there are fewer, give the index of all samples"
        ) from error
    for cache, shard in zip_longest(caches, shards or ()):
        of = whole if shard is None else (shard.fingerprint, len(shard))
        if (cache.meta.fingerprint, cache.meta.samples) != of:
            which = "the merged one" if shard is None else "its shard"
            raise CacheError(
                f"saliency cache {cache.path!r} is of another data set than {which}; give the "
                "index of all samples, and as shards that of each cache, in their order"
            )
        ids, theirs = cache.records()
        if shard is not None:
            assert index is not None
            ids = _places(shard, index, cache.path)[ids]
        same = (records["map"][ids] == theirs["map"]).all((1, 2))
        differs = ids[found[ids] & ~same]
        if differs.size and not keep_first:
            raise CacheError(
                f"saliency cache {cache.path!r} has other maps than a cache before it; samples: "
                f"{differs.size} (the first: {differs.min()}). Leave one of them out, or keep the "
                "map of the first cache (keep_first=True; scae-dali merge-caches: --keep-first)"
            )
        conflicting[differs] = True
        new = ~found[ids]
        records[ids[new]] = theirs[new]
        found[ids] = True
    tables = [table for cache in caches if (table := cache.read_neighbors()) is not None]
    agree = bool(tables) and all(np.array_equal(table, tables[0]) for table in tables)
    fields: dict[str, Any] = {
        "fingerprint": fingerprint,
        "naming": first.naming,
        "samples": samples,
    }
    fields |= _pass(made_by, metas, records["stamp"], found)
    fields |= {"neighbors": tables[0].shape if agree else None}
    meta = CacheMeta(format=FORMAT_VERSION, grid=first.grid, **fields)
    keys = RecordKeys(os.fspath(path), meta, index)
    with new_directory(os.fspath(path), *(cache.path for cache in caches)) as hidden:
        env = environment_at(os.path.realpath(hidden))
        pending = keys.ascending(found)

        def finish(txn: lmdb.Transaction) -> None:
            txn.put(META, to_json(meta))
            if agree:
                txn.put(NEIGHBORS, tables[0].astype("<u2").tobytes())

        needs = expected_bytes(len(pending), records.itemsize)
        try:
            for start in range(0, len(pending), CHUNK):
                ids = pending[start : start + CHUNK]
                values = split(records[ids].tobytes(), records.itemsize)
                put = partial(put_ascending, keys=keys.bytes_of(ids), values=values)
                env.update(put, needs=needs)
            env.update(finish, needs=needs)
        except OSError as error:
            code = error.errno or errno.EIO
            told = f"{os.strerror(code)}: nothing was merged; make room for about {needs:,} bytes"
            raise OSError(code, told, os.fspath(path)) from error
        finally:
            env.close()
    return Merged(samples, int(found.sum()), np.flatnonzero(conflicting), agree)


def _made_by(caches: Sequence[CacheReader], metas: Sequence[CacheMeta]) -> dict[str, Any]:
    """The fields that tell how the maps of all were made; raises CacheError where they differ."""
    passes = [{"settings": None} | (meta.under_way or meta.last_pass) for meta in metas]
    first, path = passes[0], caches[0].path
    settings: dict[str, Any] = {}
    for cache, meta, its in zip(caches, metas, passes, strict=True):
        if its["epoch"] is None:
            raise CacheError(f"saliency cache {cache.path!r} has no maps; leave it out")
        named = {name: (its[name], first[name]) for name in ("weights", *PROVENANCE)}
        named |= {name: (getattr(meta, name), getattr(metas[0], name)) for name in _SHAPE}
        known = settings_of(its)
        named |= {name: (known[name], settings[name]) for name in known if name in settings}
        settings |= known
        told = [
            f"{name.replace('_', ' ')} {one or 'unknown'}, not {other or 'unknown'}"
            for name, (one, other) in named.items()
            if one != other
        ]
        if told:
            raise CacheError(
                f"saliency cache {cache.path!r} is of another kind than {path!r}: "
                f"{'; '.join(told)}. Leave it out, or build it as the other one was built"
            )
    made_by = {name: first[name] for name in ("weights", *PROVENANCE)}
    return made_by | {"settings": settings or None}


def _pass(
    made_by: dict[str, Any],
    metas: Sequence[CacheMeta],
    stamps: NDArray[np.uint16],
    found: NDArray[np.bool_],
) -> dict[str, Any]:
    """The fields of the meta record that tell the pass which made the maps."""
    epoch = max((meta.under_way or meta.last_pass)["epoch"] for meta in metas)
    of_it = found & (stamps == epoch)
    lacking = not found.all() or any(meta.under_way is not None for meta in metas)
    if lacking and not of_it.all() and made_by["method"] != IMPORTED:
        under_way = {"epoch": epoch, "part": None, "which": None} | made_by
        if under_way["settings"] is None:
            del under_way["settings"]
        return made_by | {"weights": "", "settings": None, "under_way": under_way}
    part: dict[str, Any] = {}
    if not of_it.all():
        part = {"part": int(of_it.sum()), "which": digest_of_samples(of_it)}
    return made_by | {"epoch": epoch, "passes": 1} | part


def _places(shard: ImageIndex, index: ImageIndex, path: str) -> NDArray[np.int64]:
    """For each sample of a shard its place in the index, int64 [n]. path: of its cache."""
    ids = index.ids_of([os.path.join(shard.root, name) for name in shard.files])
    differ = np.flatnonzero(index.labels[ids] != shard.labels)
    if differ.size:
        k = differ[0]
        raise CacheError(
            f"sample {shard.files[k]!r} of {path!r} has label {shard.labels[k]}, and the index of "
            f"all has {index.labels[ids[k]]} for it: maps are of labels, so number the classes "
            "alike in all lists"
        )
    return ids
