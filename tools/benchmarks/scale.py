"""Measure how time and memory grow with the number of samples: start-up, cache, plans, an epoch.

    python tools/benchmark.py scale --json tools/results/scale_cpu.json
    python tools/benchmark.py scale --samples 1e5,1e6,1e7,1e8 --parts sizes --json OUT    # an hour

Rows: the plans of a whole epoch (`--epoch`, ImageNet's size) at the highest λ, with crop and flip,
and maps from LMDB or from memory; `epoch` shows how memory changes meanwhile. `sizes`: for each
number of samples, once and in a process of its own, every step from the list of names to a plan:
its seconds, the bytes that its result holds, and the process's bytes at the peak. `startup`: the
time for a tree of empty images (`--files`) until index and cache are open and DALI is ready.

Nothing here reads pixels: names, labels, shapes of images and maps are made up. A process may take
`SHARE` of the memory that is free at the start. A step that would need more, estimated from the
size before, is left out with a note; if a step needs more than estimated, it ends with MemoryError.
If the names do not fit, the other steps use an index without names (`index: "synthetic"`).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipelines.config import ExecConfig, ImageConfig
from pipelines.files import train_pipeline
from scae_dali.cache import ChunkWriter, SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import Order
from scae_dali.stage.images import READER
from scae_dali.stage.stage import Stage
from scae_dali.stage.table import COMMON, columns_of
from tools.benchmarks.growth import SyntheticIndex, draw, labels_of, maps_of, names_of, salts
from tools.common import bench, memory
from tools.common.bench import interleaved, iqr, rows
from tools.common.options import add_batch_size, count, existing_folder, sizes

GRID = (7, 7)
SEED = 7
CROP_PX = 224
PHOTOGRAPHS = 500  # different shapes of images
SHARE = 0.7  # of the free memory that a process may take
MARKS = 20  # points of an epoch at which memory is looked at
FOLDERS = 1000
PARTS = ("epoch", "sizes", "startup")
SOURCES = {"an epoch of plans, LMDB": False, "an epoch of plans, resident copy": True}

T = TypeVar("T")


def fill(cache: SaliencyCache, epoch: int) -> None:
    """Makes a whole pass of made-up maps."""
    with ChunkWriter(cache, epoch) as writer:
        for first in range(0, len(writer.pending), 4096):
            ids = writer.pending[first : first + 4096]
            writer.write(ids, maps_of(ids, epoch, GRID))


def labelled(names: list[str]) -> ImageIndex:
    return ImageIndex.from_arrays(names, labels_of(len(names)))


def stage_of(index: Any, cache: SaliencyCache, batch: int, resident: bool) -> Stage:
    """A stage with λ(t) = λ_max from the first epoch on."""
    settings: dict[str, Any] = {"epochs": 1, "start_epoch": 1, "batch_size": batch, "seed": SEED}
    return Stage(index, "scae", cache=cache, resident=resident, **settings)


def order_of(index: Any, batch: int) -> Order:
    return Order(index.labels, batch_size=batch, seed=SEED, start_epoch=1)


def plans(stage: Stage, order: Callable[[int], np.ndarray]) -> Iterator[np.ndarray]:
    """Plans batch after batch: float64 [B, K]. order: number of the batch -> its samples."""
    planner = stage.planner(CropConfig())
    shapes = np.random.default_rng(SEED).integers(200, 600, (PHOTOGRAPHS, 2)).astype(np.float64)
    size_px = np.full((stage.batch_size, 2), CROP_PX)
    for number in itertools.count():
        ids = order(number)
        iteration = np.full(len(ids), number)
        yield planner(ids, iteration, size_px, shapes[ids % PHOTOGRAPHS])


class Steps:
    """Measures steps; `found` has what each took, by name.

    known: bytes per sample at the peak of each step at the size before. By them, a step that would
    exceed `limit` bytes is left out.
    """

    def __init__(self, samples: int, known: dict[str, float], limit: int) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self._samples, self._known, self._limit = samples, known, limit

    def take(self, name: str, work: Callable[[], T], items: int = 0) -> T | None:
        """work(), measured; None if it does not fit. items: how many it handles, for a rate."""
        gc.collect()
        before = memory.usage()["own"]
        needs = before + int(self._known.get(name, 0.0) * self._samples)
        if needs > self._limit:
            self._leave_out(name, f"it would need {needs / 1e9:.1f} GB")
            return None
        start = time.perf_counter()
        try:
            with memory.Watch() as watch:
                result = work()
        except MemoryError:
            self._leave_out(name, "MemoryError")
            return None
        seconds = time.perf_counter() - start
        gc.collect()
        self.found[name] = {
            "seconds": round(seconds, 4),
            "holds_bytes": memory.usage()["own"] - before,
            "adds_bytes": watch.peak - before,
            "peak_bytes": watch.peak,
        }
        if items:
            self.found[name]["per_s"] = round(items / seconds)
        return result

    def _leave_out(self, name: str, why: str) -> None:
        allowed = f"of {self._limit / 1e9:.1f} GB that it may have"
        self.found[name] = {"left_out": f"{why} {allowed}"}


def at_size(
    n: int, batch: int, lookups: int, folder: str, known: dict[str, float], limit: int
) -> dict[str, Any]:
    """Takes every step at one size, in this process."""
    memory.limit(limit)
    steps = Steps(n, known, limit)
    path = os.path.join(folder, "maps.lmdb")
    index: Any = named(n, steps, path) or SyntheticIndex(n)

    cache = SaliencyCache.create(path, index, grid=GRID)
    steps.take("first pass", lambda: fill(cache, 1), n)
    steps.take("second pass", lambda: fill(cache, 2), n)
    size = cache.size_bytes
    cache.close()
    cache = steps.take("open the cache", lambda: SaliencyCache(path, index=index)) or cache
    steps.take("stamps", cache.stamps, n)
    steps.take("census", cache.census, n)
    steps.take("stalest quarter", lambda: cache.stalest(n // 4, epoch=3), n)
    steps.take("begin a pass", lambda: cache.begin_pass(3), n)

    rng = np.random.default_rng(SEED)
    batches = [rng.integers(0, n, batch) for _ in range(-(-lookups // batch))]
    items = batch * len(batches)
    check(steps.take("lookups", lambda: look_up(cache.read, batches), items), batches)
    resident = steps.take("load the resident copy", cache.resident, n)
    if resident is not None:
        copied = steps.take("lookups in the copy", partial(look_up, resident.read, batches), items)
        check(copied, batches)
    del resident
    steps.take("order of an epoch", lambda: order_of(index, batch).keys(0), n)
    stage = steps.take("stage", lambda: stage_of(index, cache, batch, resident=False))
    if stage is not None:
        planned = plans(stage, lambda number: batches[number % len(batches)])
        steps.take("first plan", lambda: next(planned), batch)
        steps.take("plans", lambda: sum(len(next(planned)) for _ in batches), items)
    cache.close()
    return {
        "samples": n,
        "index": "synthetic" if isinstance(index, SyntheticIndex) else "ImageIndex",
        "cache_bytes": size,
        "limit_bytes": limit,
        "steps": steps.found,
    }


def named(n: int, steps: Steps, path: str) -> ImageIndex | None:
    """An index with names; measures the steps that need names. None if it does not fit."""
    names = steps.take("names", lambda: names_of(n))
    if names is None:
        return None
    index = steps.take("index", partial(labelled, names))
    del names
    if index is None:
        return None
    if steps.take("fingerprint", lambda: index.fingerprint, n) is None:
        return None
    if steps.take("path keys", lambda: index.keys("path"), n) is not None:
        # An empty cache: the keys are sorted as a full one's are.
        create = partial(SaliencyCache.create, f"{path}.path", index, grid=GRID, naming="path")
        steps.take("open the cache by path", create)
    return index


def look_up(read: Callable[[np.ndarray], Any], batches: list[np.ndarray]) -> list[Any]:
    return [read(ids) for ids in batches]


def check(looked_up: list[Any] | None, batches: list[np.ndarray]) -> None:
    """Raises RuntimeError unless every map is its sample's, of the second pass."""
    if looked_up is None:  # it was left out
        return
    for ids, (maps, found) in zip(batches, looked_up, strict=True):
        if not found.all() or (salts(ids, maps) != 2).any():
            raise RuntimeError("a map is not the one that was written")


def an_epoch(n: int, batch: int, path: str, resident: bool) -> dict[str, Any]:
    """Plans every batch of an epoch, in this process, and watches its memory."""
    index = labelled(names_of(n))
    with SaliencyCache(path, index=index) as cache, memory.Watch() as watch:
        stage = stage_of(index, cache, batch, resident)
        planned = plans(stage, order_of(index, batch).keys)
        start = time.perf_counter()
        statuses = np.bincount(_status(next(planned)), minlength=32)
        first_s = time.perf_counter() - start
        gc.collect()
        objects = len(gc.get_objects())
        ends = np.linspace(0, stage.batches_per_epoch - 1, MARKS + 1).astype(int).tolist()
        marks, seconds = [memory.usage()], []
        for here, there in itertools.pairwise(ends):
            start = time.perf_counter()
            for _ in range(here, there):
                statuses += np.bincount(_status(next(planned)), minlength=32)
            seconds.append(time.perf_counter() - start)
            marks.append(memory.usage())
        rates = np.diff(ends) * batch / np.array(seconds)
        garbage = gc.collect()
        more_objects = len(gc.get_objects()) - objects
        own = np.array([mark["own"] for mark in marks])
        result = {
            "samples": n,
            "batches": stage.batches_per_epoch,
            "seconds": round(first_s + sum(seconds), 2),
            "first_batch_s": round(first_s, 3),  # with the order of the epoch, and the copy
            "ms_per_batch": round(1e3 * batch / statistics.median(rates.tolist()), 3),
            "samples_per_s": (ends[-1] * batch) / sum(seconds),
            "samples_per_s_iqr": iqr(rates.tolist()),  # of the parts of the epoch
            "erased": round(float(statuses[1::2].sum() / statuses.sum()), 4),
            "no_map": int(statuses[2::4].sum() + statuses[3::4].sum()),
            "own_bytes": {
                "begin": int(own[0]),
                "middle": int(own[MARKS // 2]),
                "end": int(own[-1]),
            },
            "file_bytes": {"begin": marks[0]["file"], "end": marks[-1]["file"]},
            # From a quarter on: allocators fill up first.
            "own_bytes_per_batch": round(
                float(np.polyfit(ends[MARKS // 4 :], own[MARKS // 4 :], 1)[0]), 1
            ),
            "garbage_objects": garbage,
            "more_objects": more_objects,
        }
        # The first batch of the next epoch draws its order.
        result["traced_bytes_per_batch"] = traced_growth(planned, batches=min(200, ends[-1]))
    return result | {"peak_own_bytes": watch.peak}


def _status(plan: np.ndarray) -> np.ndarray:
    return plan[:, columns_of(COMMON)["status"].start].astype(np.int64)


def traced_growth(planned: Iterator[np.ndarray], batches: int, stretches: int = 4) -> list[float]:
    """By how many bytes per batch Python's and NumPy's memory has grown after each stretch.

    The growth falls: NumPy keeps freed blocks below 1 KB, up to seven of each size.
    """
    tracemalloc.start()
    for _ in range(3):
        next(planned)
    held = []
    for _ in range(stretches + 1):
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        for _ in range(batches):
            next(planned)
    tracemalloc.stop()
    return [round((after - before) / batches, 1) for before, after in itertools.pairwise(held)]


def tree(root: str, n: int) -> None:
    """Makes n empty files, named as ImageNet's."""
    for k in range(min(FOLDERS, n)):
        folder = os.path.join(root, f"n{k:08d}")
        os.mkdir(folder)
        for i in range(k, n, FOLDERS):
            os.close(os.open(f"{folder}/n{k:08d}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))
    time.sleep(2.5)  # an index cache does not trust folders that have just changed


def built(index: ImageIndex, cache: SaliencyCache, batch: int) -> int:
    """Builds a training pipeline that reads no file yet; returns its reader's number of samples."""
    stage = stage_of(index, cache, batch, resident=False)
    execution = ExecConfig(batch_size=batch, threads=1)
    pipeline = train_pipeline(stage, ImageConfig(), execution, seed=SEED)
    pipeline.build()
    return pipeline.reader_meta(READER)["epoch_size"]


def start_up(n: int, batch: int, rounds: int, folder: str) -> dict[str, Any]:
    """Seconds until index, cache and pipeline are ready; the kernel has the folders cached."""
    root, stored = os.path.join(folder, "images"), os.path.join(folder, "index.npz")
    path = os.path.join(folder, "maps.lmdb")
    os.mkdir(root)
    start = time.perf_counter()
    tree(root, n)
    found: dict[str, list[float]] = {}
    made = time.perf_counter() - start

    def take(name: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = work()
        found.setdefault(name, []).append(time.perf_counter() - start)
        return result

    index = ImageIndex(root)
    with SaliencyCache.create(path, index, grid=GRID) as cache:
        fill(cache, 1)
    for _ in range(rounds):
        Path(stored).unlink(missing_ok=True)
        take("ImageIndex(root)", lambda: ImageIndex(root))
        take("ImageIndex(root, cache=...), the first time", lambda: ImageIndex(root, cache=stored))
        index = take("ImageIndex(root, cache=...)", lambda: ImageIndex(root, cache=stored))
        take("fingerprint", partial(getattr, index, "fingerprint"))
        take("path keys", partial(index.keys, "path"))
        with take("open the cache", partial(SaliencyCache, path, index=index)) as cache:
            take("training pipeline, built", partial(built, index, cache, batch))
    if len(index) != n:
        raise RuntimeError(f"of {n} files the index has {len(index)}")
    return {
        "files": n,
        "folders": min(FOLDERS, n),
        "make_tree_s": round(made, 2),
        "seconds": {
            name: {"median": round(statistics.median(s), 4), "iqr": round(iqr(s), 4)}
            for name, s in found.items()
        },
    }


def alone(work: Callable[..., T], *args: Any) -> T:
    """work(*args) in a fresh process, so that one measurement's memory does not affect another."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def all_sizes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What each size took, up to the first size whose process is killed."""
    found: list[dict[str, Any]] = []
    known: dict[str, float] = {}
    for n in args.samples:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            limit = int(SHARE * memory.available())
            try:
                found.append(alone(at_size, n, args.batch_size, args.lookups, folder, known, limit))
            except BrokenProcessPool:  # the results of smaller sizes are kept
                break
        for name, step in found[-1]["steps"].items():
            if "left_out" not in step:
                known[name] = max(step["adds_bytes"], 0) / n
        print_steps(found[-1])
    return found


def print_steps(one: dict[str, Any]) -> None:
    n = one["samples"]
    a_record = one["cache_bytes"] / n
    print(f"{n:,} samples, index: {one['index']}, cache: {a_record:.1f} bytes a sample")
    for name, step in one["steps"].items():
        if "left_out" in step:
            print(f"  {name:24} left out: {step['left_out']}")
            continue
        held, most = step["holds_bytes"] / n, step["adds_bytes"] / n
        print(
            f"  {name:24}{step['seconds']:10.3f} s  holds {held:7.1f}, at its peak {most:7.1f} "
            f"bytes a sample"
        )


def growth(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Lines for `draw`: seconds, and peak bytes, of every step against the number of samples."""
    seconds: dict[str, list[tuple[float, float]]] = {}
    peaks: dict[str, list[tuple[float, float]]] = {}
    for one in found:
        for name, step in one["steps"].items():
            if "left_out" not in step:
                seconds.setdefault(name, []).append((one["samples"], step["seconds"]))
                peaks.setdefault(name, []).append((one["samples"], step["peak_bytes"] / 1e9))
    return {"seconds": seconds, "GB of the process at the peak of a step": peaks}


def breaks(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The three steps that would fill this machine's memory first, by their growth with size."""
    peaks: dict[str, list[tuple[int, int]]] = {}
    for one in found:
        for name, step in one["steps"].items():
            if "left_out" not in step:
                peaks.setdefault(name, []).append((one["samples"], step["peak_bytes"]))
    a_sample = {
        name: (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
        for name, points in peaks.items()
        if len(points) > 1
    }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        {
            "step": name,
            "bytes_per_sample": round(size, 1),  # of the process, with all that it holds by then
            "samples_that_fill_memory": round(memory / size),
        }
        for name, size in sorted(a_sample.items(), key=lambda item: -item[1])[:3]
    ]


def epochs(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of plans a second, and the last epoch of each source."""
    told: dict[str, Any] = dict.fromkeys(SOURCES)
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        path = os.path.join(folder, "maps.lmdb")
        index = labelled(names_of(args.epoch))
        with SaliencyCache.create(path, index, grid=GRID) as cache:
            fill(cache, 1)
        del index

        def run(source: str) -> float:
            told[source] = alone(an_epoch, args.epoch, args.batch_size, path, SOURCES[source])
            return told[source]["samples_per_s"]

        rates = interleaved({name: partial(run, name) for name in SOURCES}, args.rounds, warmup=0)
    return rows(rates, next(iter(SOURCES))), told


def main(argv: list[str] | None = None) -> None:
    parser = bench.parser_of(__doc__, __name__)
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="parts to measure; default: %(default)s"
    )
    parser.add_argument(
        "--samples",
        type=sizes,
        default="1e5,1e6,1e7",
        help="numbers of images that the part `sizes` goes through; default: %(default)s",
    )
    parser.add_argument(
        "--epoch",
        type=count,
        default=1_281_167,
        help="number of images of the part `epoch`; default: %(default)s",
    )
    parser.add_argument(
        "--files",
        type=count,
        default=1_281_167,
        help="number of files of the part `startup`; default: %(default)s",
    )
    add_batch_size(parser, 256, "images in a batch")
    parser.add_argument(
        "--lookups",
        type=count,
        default=100_000,
        help="number of lookups, and of plans, at each size; default: %(default)s",
    )
    parser.add_argument(
        "--dir",
        type=existing_folder,
        help="folder for caches and files, which are removed at the end; default: the system's "
        "temporary folder",
    )
    quick = {
        "rounds": 1,
        "samples": [10_000, 100_000],
        "epoch": 50_000,
        "files": 10_000,
        "lookups": 20_000,
    }
    args = bench.parse(parser, argv, rounds=3, quick=quick)
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts must be of {', '.join(PARTS)}, got {sorted(unknown)[0]!r}")
    if args.epoch <= MARKS * args.batch_size:
        parser.error(
            f"--epoch must be more than {MARKS} batches of {args.batch_size}, got {args.epoch}"
        )
    table, told = epochs(args) if "epoch" in parts else ([], {})
    started = None
    if "startup" in parts:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            started = start_up(args.files, args.batch_size, args.rounds, folder)
    found = all_sizes(args) if "sizes" in parts else []
    extra = {"settings": bench.settings(args), "epoch": told, "startup": started, "sizes": found}
    extra["breaks_first"] = breaks(found)
    bench.report(table, args, extra, plot=partial(draw, growth(found)))
    if "sizes" in parts and len(found) < len(args.samples):
        raise SystemExit(
            f"error: the process of {args.samples[len(found)]:,} samples was killed, perhaps for "
            "its memory"
        )
