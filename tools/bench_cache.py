"""Measure the saliency cache: lookups and writes against plain LMDB, size on disk, time to load.

    python tools/bench_cache.py --json tools/results/cache_cpu.json

Lookups are of random samples, a batch in a transaction, as a shuffling pipeline makes them. A write
is a whole pass over an existing cache; the first pass, which appends, is timed once. Plain LMDB
does the same gets and puts with keys and values at hand, and so is the limit for a cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from _bench import interleaved, iqr, parse, report, rows
from scae_dali.cache import CHUNK, ChunkWriter, ResidentCache, SaliencyCache

PLAIN_READ, PLAIN_WRITE = "LMDB get", "LMDB put, pass"


@dataclass(frozen=True)
class SyntheticIndex:
    """As many samples as asked for; keys as an index or path hashes would give them."""

    samples: int
    fingerprint: str = "0" * 32

    def __len__(self) -> int:
        return self.samples

    def keys(self, naming: str) -> NDArray[np.uint64]:
        if naming == "index":
            return np.arange(self.samples, dtype=np.uint64)
        return np.random.default_rng(1).integers(0, 2**64, self.samples, np.uint64)


def timed_pass(cache: SaliencyCache, epoch: int, maps: NDArray[np.uint8], batch: int) -> float:
    """A whole pass -> records a second."""
    start = time.perf_counter()
    with ChunkWriter(cache, epoch) as writer:
        for first in range(0, len(writer.pending), batch):
            ids = writer.pending[first : first + batch]
            writer.write(ids, maps[ids])
    return len(maps) / (time.perf_counter() - start)


def plain_pass(env: lmdb.Environment, records: list[tuple[bytes, bytes]], append: bool) -> float:
    """The same records in the same chunks -> records a second."""
    start = time.perf_counter()
    for first in range(0, len(records), CHUNK):
        with env.begin(write=True) as txn:
            txn.cursor().putmulti(records[first : first + CHUNK], append=append)
    return len(records) / (time.perf_counter() - start)


def lookups(read: Callable[[Any], object], batches: list[Any], batch: int) -> Callable[[], float]:
    """A candidate: reads every batch -> lookups a second."""

    def run() -> float:
        start = time.perf_counter()
        for ids in batches:
            read(ids)
        return len(batches) * batch / (time.perf_counter() - start)

    return run


def measure(args: argparse.Namespace, folder: Path) -> None:
    rng = np.random.default_rng(0)
    index = SyntheticIndex(args.records)
    maps = rng.integers(0, 256, (args.records, *args.grid), np.uint8)
    records = [(i.to_bytes(8, "big"), b"\0\0" + maps[i].tobytes()) for i in range(args.records)]
    env = lmdb.open(str(folder / "plain.lmdb"), map_size=max(4 * args.records * 128, 1 << 26))
    first_pass = {PLAIN_WRITE: plain_pass(env, records, append=True)}

    caches: dict[str, SaliencyCache] = {}
    bytes_on_disk: dict[str, dict[str, int]] = {}
    for naming in ("index", "path"):
        cache = SaliencyCache.create(
            folder / f"{naming}.lmdb", index, grid=tuple(args.grid), naming=naming
        )
        cache.write_neighbors(np.zeros((1000, 5), np.uint16))
        first_pass[f"cache, {naming} keys, pass"] = timed_pass(cache, 0, maps, args.batch)
        bytes_on_disk[naming] = {"first_pass": cache.size_bytes}
        caches[naming] = cache

    def rewrite(cache: SaliencyCache) -> Callable[[], float]:
        return lambda: timed_pass(cache, (cache.meta.epoch or 0) + 1, maps, args.batch)

    writing = interleaved(
        {
            PLAIN_WRITE: lambda: plain_pass(env, records, append=False),
            **{f"cache, {naming} keys, pass": rewrite(cache) for naming, cache in caches.items()},
        },
        args.rounds,
    )
    for naming, cache in caches.items():
        bytes_on_disk[naming]["after_passes"] = cache.size_bytes
        bytes_on_disk[naming]["passes"] = cache.meta.passes

    loads = []
    resident: ResidentCache | None = None
    for _ in range(args.rounds):
        start = time.perf_counter()
        resident = caches["index"].resident()
        loads.append(time.perf_counter() - start)
    assert resident is not None

    batches = [rng.integers(0, args.records, args.batch) for _ in range(args.batches)]
    named = [[int(i).to_bytes(8, "big") for i in ids] for ids in batches]

    def plain_read(names: list[bytes]) -> list[bytes | None]:
        with env.begin() as txn:
            return [txn.get(name) for name in names]

    reading = interleaved(
        {
            PLAIN_READ: lookups(plain_read, named, args.batch),
            "cache, index keys, read": lookups(caches["index"].read, batches, args.batch),
            "cache, path keys, read": lookups(caches["path"].read, batches, args.batch),
            "resident copy, read": lookups(resident.read, batches, args.batch),
        },
        args.rounds,
    )
    extra = {
        "records": args.records,
        "grid": args.grid,
        "batch": args.batch,
        "rounds": args.rounds,
        "bytes_on_disk": bytes_on_disk,
        "resident_load_s": {"median": statistics.median(loads), "iqr": iqr(loads)},
        "first_pass_records_per_s": first_pass,
    }
    report(rows(reading, PLAIN_READ) + rows(writing, PLAIN_WRITE), args, extra)
    for cache in caches.values():
        cache.close()
    env.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=int, default=1_281_167, help="default: ImageNet's")
    parser.add_argument("--grid", type=int, nargs=2, default=[7, 7], metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=256, help="lookups a transaction")
    parser.add_argument("--batches", type=int, default=400, help="batches a round")
    parser.add_argument("--dir", help="where to put the caches meanwhile; default: the temporary")
    quick = {"rounds": 2, "records": 100_000, "batches": 50}
    args = parse(parser, None, rounds=5, quick=quick)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
