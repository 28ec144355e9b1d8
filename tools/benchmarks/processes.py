"""Measure how much processes that share one saliency cache slow each other down.

    python tools/benchmark.py processes --data imagenet --json tools/results/processes_cpu.json

The processes are like those of torchrun: each has its own interpreter, shard, pipeline of --threads
and cache object. Rows, for each N of --processes: if --data is given, `none × N` and `scae × N`,
the training pipeline by method. Without pixels: `plan × N`, SCAE's plan of a batch; `plan without
maps × N`, Random Erasing's plan, which reads no cache and so shows how N processes slow each other
anyway; `lookups × N`, looking up a batch's maps alone.

The rate is that of the slowest of the N processes, as ranks wait for each other. `ratio` is to the
same row with one process alone; `scae_to_none` has the ratio of these two rows for each N. The
processes of a row begin each round together, and rows take turns. λ is largest, maps are random.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import ExitStack
from functools import partial
from threading import Barrier
from typing import Any

import numpy as np
import torch

from pipelines import files
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.plan.crop import CropConfig
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage
from tools.common import bench
from tools.common.live import GUIDED, Row, endless, settle
from tools.common.made_up import SEED, epoch_index, evened, random_cache
from tools.common.options import (
    add_batch_size,
    add_data,
    add_device,
    count,
    usable_devices,
    whole_numbers,
)

PLANS = {"plan": "scae", "plan without maps": "random_erasing"}  # row, method
FILES = ("none", "scae")
PATIENCE_S = 300.0  # for the other processes of a round


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = bench.parser_of(__doc__, __name__)
    add_data(
        parser,
        help="folder of the data set, with the training images in DIR/train/<class>/; default: no "
        "pipeline is measured",
    )
    parser.add_argument(
        "--processes",
        type=whole_numbers,
        default="1,2",
        metavar="N,...",
        help="numbers of processes; default: %(default)s",
    )
    add_batch_size(parser, 64, "images in a batch of one process")
    parser.add_argument(
        "--batches", type=count, help="batches of a process in a round; default: those of one epoch"
    )
    parser.add_argument(
        "--repeat",
        type=count,
        default=1,
        help="how many times an epoch reads each file; default: %(default)s",
    )
    parser.add_argument(
        "--threads",
        type=count,
        default=1,
        help="CPU threads of DALI in one process; default: %(default)s",
    )
    parser.add_argument(
        "--size", type=count, default=224, help="side of the crop in pixels; default: %(default)s"
    )
    parser.add_argument(
        "--samples",
        type=count,
        default=100_000,
        help="number of maps in the cache that the plans use; default: %(default)s",
    )
    parser.add_argument(
        "--plans",
        type=count,
        default=2000,
        help="number of batches that a process plans in a round; default: %(default)s",
    )
    add_device(
        parser, type=usable_devices, help="a GPU for each process, or cpu", metavar="A,B,..."
    )
    args = bench.parse(
        parser,
        argv,
        rounds=7,
        quick={"rounds": 3, "batches": 3, "samples": 10_000, "plans": 500},
    )
    most = max(args.processes)
    if 1 not in args.processes:
        parser.error(f"--processes must name 1, which ratios are to, got {args.processes}")
    if args.device_id == [None]:
        args.device_id *= most
    if len(args.device_id) < most:
        parser.error(
            f"--device must name a GPU for each of {most} processes, got {args.device_id}; "
            "name more of them, or give fewer --processes"
        )
    return args


def random_index(samples: int) -> ImageIndex:
    """Names without files, in classes of about one size."""
    names = [f"{i}" for i in range(samples)]
    return ImageIndex.from_arrays(names, np.arange(samples) % 100)


def plan_rows(args: argparse.Namespace, index: ImageIndex, cache: str, rank: int) -> dict[str, Row]:
    """The rows without pixels; each process goes through the samples in an order of its own."""
    order = np.random.default_rng([SEED, rank]).permutation(len(index))
    size_px = np.full((args.batch_size, 2), args.size)
    full_px = np.full((args.batch_size, 2), 400.0)

    def batches() -> Iterator[np.ndarray]:
        place, step = np.arange(args.batch_size), args.batch_size
        while True:
            yield order.take(place, mode="wrap")
            place += step

    def plans(method: str) -> Iterator[np.ndarray]:
        stage = Stage(index, method, batch_size=args.batch_size, cache=cache, **GUIDED)
        planner = stage.planner(CropConfig())
        for number, ids in enumerate(batches()):
            iteration = np.full(args.batch_size, number)
            yield planner(ids, iteration, size_px, full_px)

    maps = SaliencyCache(cache, index=index)
    out = {name: Row(plans(method), ahead=0) for name, method in PLANS.items()}
    return out | {"lookups": Row((maps.read(ids)[0] for ids in batches()), ahead=0)}


def file_rows(
    args: argparse.Namespace, index: ImageIndex, cache: str, rank: int, processes: int
) -> dict[str, Row]:
    """The rows of the training pipeline, in one of so many processes."""
    image = ImageConfig(size=args.size, val_resize=args.size)
    execution = ExecConfig(
        batch_size=args.batch_size,
        device_id=args.device_id[rank],
        threads=args.threads,
        shard=rank,
        num_shards=processes,
    )

    def row(method: str) -> Row:
        stage = Stage(
            index,
            method,
            batch_size=args.batch_size,
            cache=cache,
            num_shards=processes,
            **GUIDED,
        )
        pipeline = files.train_pipeline(stage, image, execution, seed=SEED)
        loader = Loader(pipeline, files.OUTPUTS, index, drop_last=False)
        return Row((batch.images for batch in endless(loader)), execution.prefetch + 1, stage)

    return {method: row(method) for method in FILES}


# In a process that was started: its rows and barriers, by name and number of processes.
_live: dict[tuple[str, int], Row] = {}
_barriers: dict[int, Barrier] = {}


def start(
    args: argparse.Namespace,
    indices: Mapping[str, ImageIndex],
    barriers: Mapping[int, Barrier],
    rank: int,
) -> None:
    """The first call in a process. indices: cache -> index, first the made-up one, then files."""
    if args.device_id[rank] is not None:
        torch.cuda.set_device(args.device_id[rank])
    (plans, made_up), *others = indices.items()
    alike = plan_rows(args, made_up, plans, rank)
    for n in args.processes:
        if rank < n:
            rows = dict(alike)
            for cache, index in others:
                rows |= file_rows(args, index, cache, rank, n)
            _live.update({(name, n): row for name, row in rows.items()})
    _barriers.update(barriers)
    settle()


def take_turn(name: str, processes: int, batches: int) -> tuple[float, float]:
    """Measures a row in one of so many processes; returns img/s and CPU time of an image in ms."""
    row = _live[name, processes]
    rate = row.measure(batches, partial(_barriers[processes].wait, PATIENCE_S))
    return rate, row.cpu_ms[-1]


def together(
    ranks: Sequence[ProcessPoolExecutor], barrier: Barrier, name: str, batches: int
) -> list[tuple[float, float]]:
    """What `take_turn` returns in each process."""
    turns = [rank.submit(take_turn, name, len(ranks), batches) for rank in ranks]
    for turn in wait(turns, return_when=FIRST_EXCEPTION).done:
        if error := turn.exception():
            barrier.abort()  # the others wait there
            raise error
    return [turn.result() for turn in turns]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    context = multiprocessing.get_context("spawn")
    barriers = {n: context.Barrier(n) for n in args.processes}
    names = [*PLANS, "lookups"]
    batches = dict.fromkeys(names, args.plans)
    cpu_ms: dict[str, list[float]] = {}
    candidates: dict[str, Callable[[], float]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as pools:
        indices = {os.path.join(folder, "plans.lmdb"): random_index(args.samples)}
        if args.data is not None:
            # Shards of whole batches for each N.
            shards = math.lcm(*args.processes)
            index = evened(epoch_index(args.data, args.repeat, args.batch_size, shards))
            indices[os.path.join(folder, "files.lmdb")] = index
            names = [*FILES, *names]
            shard = len(index) // args.batch_size // max(args.processes)
            batches |= dict.fromkeys(FILES, args.batches or shard)
        for path, index in indices.items():
            random_cache(path, index).close()
        ranks = [
            pools.enter_context(
                ProcessPoolExecutor(1, context, start, (args, indices, barriers, rank))
            )
            for rank in range(max(args.processes))
        ]

        def turn(name: str, n: int) -> float:
            found = together(ranks[:n], barriers[n], name, batches[name])
            cpu_ms.setdefault(f"{name} × {n}", []).append(statistics.mean(ms for _, ms in found))
            return min(rate for rate, _ in found)

        for name in names:
            for n in args.processes:
                candidates[f"{name} × {n}"] = partial(turn, name, n)
        samples = bench.interleaved(candidates, args.rounds)
    table = []
    for name in names:
        alike = {f"{name} × {n}": samples[f"{name} × {n}"] for n in args.processes}
        table += bench.rows(alike, f"{name} × 1")
    extra: dict[str, Any] = {
        "batches_per_s": {row["name"]: round(row["img_per_s"] / args.batch_size) for row in table},
        "cpu_ms_per_image": {name: round(statistics.median(ms), 4) for name, ms in cpu_ms.items()},
        "settings": bench.settings(args) | {"batches_per_round": batches},
    }
    if args.data is not None:
        extra["scae_to_none"] = {
            str(n): round(
                statistics.median(
                    a / b
                    for a, b in zip(samples[f"scae × {n}"], samples[f"none × {n}"], strict=True)
                ),
                3,
            )
            for n in args.processes
        }
    bench.report(table, args, extra)
