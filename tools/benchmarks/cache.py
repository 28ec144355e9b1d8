"""Measure lookups and writes of the saliency cache, cold and warm, with one process and several.

    python tools/benchmark.py cache --json tools/results/cache_cpu.json

Lookups are of random samples, a batch in a transaction, as a shuffling pipeline makes them. A write
is a whole pass over an existing cache; the first pass, which appends, is timed once. Plain LMDB
does the same gets and puts with keys and values at hand, and so is the limit for a cache. Cold
means that the environment is closed and its file dropped from the page cache (`cold_kept` is the
share that stayed); a disk or a host may still hold it. Several processes read random batches, in
turns with and without another process that writes passes meanwhile; `epochs_seen` has the passes
whose maps they met. A map tells its sample and pass: a reader that finds a map of two passes, or
none, fails the benchmark. Before that, the check itself is tested.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from scae_dali.cache import ChunkWriter, SaliencyCache
from scae_dali.cache.files import DATA_FILE
from scae_dali.cache.format import CHUNK, Maps, split
from tools.benchmarks.growth import SyntheticIndex, draw, maps_of, salts
from tools.common import bench
from tools.common.bench import interleaved, iqr, rows
from tools.common.memory import drop_pages
from tools.common.options import (
    add_batch_size,
    count,
    existing_folder,
    positive,
    sizes,
    whole_numbers,
)

PLAIN_READ, PLAIN_WRITE = "LMDB get", "LMDB put, pass"
READ, WRITE = "cache, {} keys, read", "cache, {} keys, pass"
RESIDENT = "resident copy, read"
COLD = 0.01  # with at most this share of the file in the page cache, a read counts as cold


def timed_pass(cache: SaliencyCache, epoch: int, batch: int) -> float:
    """Makes a whole pass, begin to end, of maps that are at hand; returns records a second."""
    meta = cache.meta
    maps = np.empty((meta.samples, *meta.grid), np.uint8)
    for first in range(0, len(maps), CHUNK):
        some = maps[first : first + CHUNK]
        some[:] = maps_of(np.arange(first, first + len(some)), epoch, meta.grid)
    start = time.perf_counter()
    with ChunkWriter(cache, epoch) as writer:
        for first in range(0, len(writer.pending), batch):
            ids = writer.pending[first : first + batch]
            writer.write(ids, maps[ids])
    return len(maps) / (time.perf_counter() - start)


def plain_pass(env: lmdb.Environment, n: int, grid: Sequence[int], append: bool) -> float:
    """Writes records of the same size in the same chunks; returns records a second."""
    seconds = 0.0
    for first in range(0, n, CHUNK):
        ids = np.arange(first, min(first + CHUNK, n))
        keys = split(ids.astype(">u8").tobytes(), 8)
        values = [b"\0\0" + one.tobytes() for one in maps_of(ids, 0, grid)]
        start = time.perf_counter()
        with env.begin(write=True) as txn:
            txn.cursor().putmulti(zip(keys, values, strict=True), append=append)
        seconds += time.perf_counter() - start
    return n / seconds


def map_size(n: int, grid: Sequence[int]) -> int:
    """Bytes that LMDB may take for n records while passes rewrite them; what is unused costs
    nothing. A record of half a page or more has pages of its own."""
    record = math.prod(grid)
    return max(4 * n * (record + (128 if record < 1500 else 8192)), 1 << 26)


def lookups(read: Callable[[Any], object], batches: Sequence[Any]) -> float:
    """Reads every batch; returns lookups a second."""
    start = time.perf_counter()
    for ids in batches:
        read(ids)
    return sum(map(len, batches)) / (time.perf_counter() - start)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "iqr": iqr(values)}


def cold_reads(path: Path, index: Any, batches: Sequence[Any], rounds: int) -> dict:
    """Reads of a cache that nobody has open, in turns with its pages dropped and kept."""
    found: dict[str, list[float]] = {}
    for number, cold in enumerate([True, False] * rounds):
        mine = batches[number // 2 :: rounds]  # warm: these have just been read
        kept = drop_pages(path / DATA_FILE) if cold else 1.0
        start = time.perf_counter()
        with SaliencyCache(path, index=index) as cache:
            opened = time.perf_counter() - start
            first, rest = (lookups(cache.read, some) for some in (mine[:1], mine[1:]))
        kept = max(kept, drop_pages(path / DATA_FILE)) if cold else 1.0
        with SaliencyCache(path, index=index) as cache:
            start = time.perf_counter()
            cache.resident()
            loaded = time.perf_counter() - start
        for name, value in {
            "kept": kept,
            "open_s": opened,
            "first_batch_ms": 1e3 * len(mine[0]) / first,
            "lookups_per_s": rest,
            "resident_load_s": loaded,
        }.items():
            found.setdefault(f"{'cold' if cold else 'warm'}_{name}", []).append(value)
    return {
        "cold": max(found["cold_kept"]) < COLD,
        "batches_after_the_first": len(batches) // rounds - 1,
        **{name: spread(values) for name, values in found.items() if name != "warm_kept"},
    }


@dataclass
class Seen:
    """Counts what a reader has met: maps, torn maps, missing maps, and epochs % 256."""

    maps: int = 0
    torn: int = 0
    missing: int = 0
    epochs: frozenset[int] = frozenset()

    def add(self, ids: np.ndarray, maps: Maps, found: np.ndarray) -> None:
        told = salts(ids[found], maps[found])
        self.maps += len(ids)
        self.torn += int((told < 0).sum())
        self.missing += int((~found).sum())
        self.epochs |= set(told[told >= 0].tolist())


def check_the_check() -> None:
    """Raises if `Seen` overlooks a torn map, a map of another sample, or a missing one."""
    ids = np.arange(4)
    maps, found = maps_of(ids, 1), np.array([True, True, True, False])
    maps[0, 3:] = maps_of(ids, 2)[0, 3:]
    maps[1] = maps_of(ids, 1)[2]
    seen = Seen()
    seen.add(ids, maps, found)
    if (seen.torn, seen.missing, seen.epochs) != (2, 1, {1}):
        raise RuntimeError(f"the check for torn maps does not work: {seen}")


_barrier: Any = None  # in a process that reads or writes: lets all begin at once


def _set_barrier(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def reader(path: str, seed: int, batch: int, seconds: float) -> tuple[float, Seen]:
    """Looks random batches up; returns lookups a second of the time in `read`, and what it met."""
    rng, seen, reading = np.random.default_rng(seed), Seen(), 0.0
    with SaliencyCache(path) as cache:
        n = cache.meta.samples
        cache.read(rng.integers(0, n, batch))
        _barrier.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            ids = rng.integers(0, n, batch)
            start = time.perf_counter()
            maps, found = cache.read(ids)
            reading += time.perf_counter() - start
            seen.add(ids, maps, found)
    return seen.maps / reading, seen


class _TimeIsUp(Exception):  # noqa: N818 - no error
    pass


def writer(path: str, batch: int, seconds: float) -> float:
    """Writes passes until the time is up, the last one in part; returns records a second."""
    written, start = 0, 0.0
    with SaliencyCache(path) as cache, suppress(_TimeIsUp):
        meta = cache.meta
        begin = (meta.epoch or 0) + 1 if meta.under_way is None else meta.under_way["epoch"]
        for epoch in itertools.count(begin):
            with ChunkWriter(cache, epoch) as chunks:
                if not start:
                    _barrier.wait()
                    start = time.perf_counter()
                for first in range(0, len(chunks.pending), batch):
                    if time.perf_counter() > start + seconds:
                        raise _TimeIsUp
                    ids = chunks.pending[first : first + batch]
                    chunks.write(ids, maps_of(ids, epoch, meta.grid))
                    written += len(ids)
    return written / (time.perf_counter() - start)


def together(path: str, readers: int, writes: bool, batch: int, seconds: float) -> dict[str, Any]:
    """Runs readers, with or without a writer, at the same time, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    count = readers + writes
    with ProcessPoolExecutor(
        count,
        spawn,
        initializer=_set_barrier,
        initargs=(spawn.Barrier(count, timeout=120),),
    ) as pool:
        writing = [pool.submit(writer, path, batch, seconds)] if writes else []
        reading = [pool.submit(reader, path, seed, batch, seconds) for seed in range(readers)]
        met = [future.result() for future in reading]
        written = [future.result() for future in writing]
    return {
        "readers": readers,
        "writer": writes,
        "lookups_per_s": [round(rate) for rate, _ in met],
        "torn": sum(seen.torn for _, seen in met),
        "missing": sum(seen.missing for _, seen in met),
        "checked": sum(seen.maps for _, seen in met),
        "epochs_seen": sorted(frozenset().union(*(seen.epochs for _, seen in met))),
        "written_per_s": round(written[0]) if written else None,
    }


def beside_a_writer(path: str, readers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Lookups a second of one of `readers` readers, in turns without a writer and beside one."""
    met: list[dict[str, Any]] = []

    def run(writes: bool) -> float:
        met.append(together(path, readers, writes, args.batch_size, args.seconds))
        return statistics.mean(met[-1]["lookups_per_s"])

    alone, beside = "alone", "beside a writer"
    rates = interleaved({alone: partial(run, False), beside: partial(run, True)}, args.rounds, 0)
    return {
        "readers": readers,
        "lookups": rows(rates, alone),
        "written_per_s": spread([one["written_per_s"] for one in met if one["writer"]]),
        **{name: sum(one[name] for one in met) for name in ("torn", "missing", "checked")},
        "epochs_seen": sorted({epoch for one in met for epoch in one["epochs_seen"]}),
    }


def measure(n: int, args: argparse.Namespace, folder: Path) -> tuple[list[dict], dict[str, Any]]:
    """The rows of a cache of n records, and further figures."""
    rng = np.random.default_rng(0)
    index: Any = SyntheticIndex(n)  # for a cache it looks like an ImageIndex
    grid = tuple(args.grid)
    env = lmdb.open(str(folder / "plain.lmdb"), map_size=map_size(n, grid))
    first_pass = {PLAIN_WRITE: plain_pass(env, n, grid, append=True)}
    caches: dict[str, SaliencyCache] = {}
    bytes_on_disk: dict[str, dict[str, int]] = {}
    for naming in ("index", "path"):
        cache = SaliencyCache.create(folder / f"{naming}.lmdb", index, grid=grid, naming=naming)
        cache.write_neighbors(np.zeros((1000, 5), np.uint16))
        first_pass[WRITE.format(naming)] = timed_pass(cache, 0, args.batch_size)
        bytes_on_disk[naming] = {"first_pass": cache.size_bytes}
        caches[naming] = cache

    def rewrite(cache: SaliencyCache) -> float:
        return timed_pass(cache, (cache.meta.epoch or 0) + 1, args.batch_size)

    writing = interleaved(
        {
            PLAIN_WRITE: partial(plain_pass, env, n, grid, append=False),
            **{WRITE.format(naming): partial(rewrite, cache) for naming, cache in caches.items()},
        },
        args.rounds,
    )
    for naming, cache in caches.items():
        bytes_on_disk[naming]["after_passes"] = cache.size_bytes
        bytes_on_disk[naming]["passes"] = cache.meta.passes

    resident = caches["index"].resident()
    batches = [rng.integers(0, n, args.batch_size) for _ in range(args.batches)]
    named = [split(ids.astype(">u8").tobytes(), 8) for ids in batches]

    def plain_read(names: list[bytes]) -> list[bytes | None]:
        with env.begin() as txn:
            return [txn.get(name) for name in names]

    reading = interleaved(
        {
            PLAIN_READ: partial(lookups, plain_read, named),
            **{
                READ.format(naming): partial(lookups, cache.read, batches)
                for naming, cache in caches.items()
            },
            RESIDENT: partial(lookups, resident.read, batches),
        },
        args.rounds,
    )
    env.close()
    for cache in caches.values():
        cache.close()
    path = folder / "index.lmdb"
    extra = {
        "records": n,
        "bytes_on_disk": bytes_on_disk,
        "bytes_per_record": round(bytes_on_disk["index"]["after_passes"] / n, 1),
        "first_pass_records_per_s": first_pass,
        "cold": cold_reads(path, index, batches, args.rounds),
        "processes": [beside_a_writer(str(path), readers, args) for readers in args.processes],
    }
    table = rows(reading, PLAIN_READ) + rows(writing, PLAIN_WRITE)
    return [{**row, "name": f"{row['name']}, {n:,}"} for row in table], extra


def growth(table: Sequence[dict], found: Sequence[dict], batch: int) -> dict[str, Any]:
    """Microseconds a record against the number of records, for `draw`."""
    rates = {row["name"]: row["img_per_s"] for row in table}

    def lines(names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
        ns = [one["records"] for one in found]
        return {name: [(n, 1e6 / rates[f"{name}, {n:,}"]) for n in ns] for name in names}

    namings = ("index", "path")
    looked = lines([PLAIN_READ, *(READ.format(naming) for naming in namings), RESIDENT])
    if all(one["cold"]["cold"] for one in found):
        looked["first batch of a cold file"] = [
            (one["records"], 1e3 * one["cold"]["cold_first_batch_ms"]["median"] / batch)
            for one in found
        ]
    written = lines([PLAIN_WRITE, *(WRITE.format(naming) for naming in namings)])
    return {"µs a lookup": looked, "µs a record of a pass": written}


def main(argv: list[str] | None = None) -> None:
    parser = bench.parser_of(__doc__, __name__)
    parser.add_argument(
        "--records",
        type=sizes,
        default="1e5,1281167,1e7",
        help="numbers of maps in a cache, each measured in turn; default: %(default)s",
    )
    parser.add_argument(
        "--grid",
        type=count,
        nargs=2,
        default=[7, 7],
        metavar=("H", "W"),
        help="height and width of a map in cells; default: 7 7",
    )
    add_batch_size(parser, 256, "maps that are looked up in one transaction")
    parser.add_argument(
        "--batches",
        type=count,
        default=400,
        help="batches of a row in a round; default: %(default)s",
    )
    parser.add_argument(
        "--processes",
        type=whole_numbers,
        default="1,2,4",
        help="numbers of processes that read at once; default: %(default)s",
    )
    parser.add_argument(
        "--seconds",
        type=positive,
        default=2,
        help="seconds for which the processes read; default: %(default)s",
    )
    parser.add_argument(
        "--dir",
        type=existing_folder,
        help="folder for the caches, which are removed at the end; default: the system's "
        "temporary folder",
    )
    quick = {"rounds": 2, "records": [100_000], "batches": 50, "processes": [1, 2], "seconds": 0.5}
    args = bench.parse(parser, argv, rounds=3, quick=quick)
    if args.batches < 2 * args.rounds:
        parser.error(f"--batches must be at least two a round, got {args.batches}")
    check_the_check()
    table: list[dict] = []
    found: list[dict] = []
    for n in args.records:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            lines, extra = measure(n, args, Path(folder))
        table += lines
        found.append(extra)
    plot = partial(draw, growth(table, found, args.batch_size), xlabel="records")
    bench.report(table, args, {"settings": bench.settings(args), "sizes": found}, plot=plot)
    if faults := sum(one["torn"] + one["missing"] for s in found for one in s["processes"]):
        raise SystemExit(f"readers met {faults} maps that were torn or missing")
