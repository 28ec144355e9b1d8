"""Throughput of the training pipeline by method, beside no erasing and beside torchvision.

    python tools/bench_pipeline.py --data imagenet/train --json tools/results/pipeline_cpu.json

Rows: a method each; `none (again)`, a second pipeline like `none`, which shows the noise floor;
`native_erase`, a random rectangle by DALI's own operators alone; `torchvision`, the same recipe in
a DataLoader with as many workers as DALI has threads, decoded with Pillow as ImageFolder does;
`torchvision (decode_image)`, the same with torchvision's own decoder.
`ratio` is a row's rate over that of `none`.
`cpu_ms_per_image` counts the work instead of the time: it bears other load on the machine.

All rows live at once and take turns. SCAE runs where λ is largest, from a cache of random maps.
What a row has read ahead is drawn off before its clock starts, and its clock's turn is over only
when it has filled its queue again, so that no row works during another's turn.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import _torchvision
import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types

import _bench
import _path  # noqa: F401
from pipelines import train
from pipelines.config import ExecConfig, ImageConfig
from pipelines.images import crop_planned, normalise, read_shuffled, resolve_decode
from scae_dali.cache import SaliencyCache
from scae_dali.config import RandomErasingConfig
from scae_dali.dataset import ImageIndex
from scae_dali.iterator import Loader
from scae_dali.methods import BUILT_IN
from scae_dali.ops import Stage
from scae_dali.rng import derive

SEED = 7
GRID = (7, 7)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="DIR/<class>/<image>")
    parser.add_argument("--methods", default="none,random_erasing,scae", metavar="A,B,...")
    parser.add_argument("--backends", default="numpy", help="of SCAE's plan: numpy, torch or both")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=0, help="a round; default: an epoch's")
    parser.add_argument("--repeat", type=int, default=1, help="times each file is in an epoch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=224, help="side of the crop in pixels")
    parser.add_argument("--device-id", default="cpu", metavar="N|cpu")
    parser.add_argument("--dtype", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--layout", choices=["NCHW", "NHWC"], default="NCHW")
    parser.add_argument("--decode", choices=["auto", "roi", "full"], default="auto")
    parser.add_argument("--no-torchvision", action="store_true")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT")
    args = parser.parse_args(argv)
    args.methods = args.methods.split(",")
    args.backends = args.backends.split(",")
    if "none" not in args.methods:
        parser.error("--methods must name none, the row that the ratios are to")
    if unknown := set(args.methods) - set(BUILT_IN):
        parser.error(f"--methods: no method {', '.join(unknown)}; there are {', '.join(BUILT_IN)}")
    if unknown := set(args.backends) - {"numpy", "torch"}:
        parser.error(f"--backends must be numpy, torch or both, got {', '.join(unknown)}")
    if args.device_id != "cpu" and not args.device_id.isdigit():
        parser.error(f"--device-id must be cpu or the number of a GPU, got {args.device_id!r}")
    args.device_id = None if args.device_id == "cpu" else int(args.device_id)
    for name in ("batch_size", "rounds", "repeat", "threads", "size"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 1, got {getattr(args, name)}")
    return args


def epoch_index(args: argparse.Namespace) -> ImageIndex:
    """The files, repeated, without those that would leave the last batch incomplete."""
    index = ImageIndex(args.data)
    n = len(index) * args.repeat // args.batch_size * args.batch_size
    if n == 0:
        raise SystemExit(
            f"--data {args.data} has {len(index)} images, fewer than --batch-size "
            f"{args.batch_size}; pass a smaller one, or --repeat "
            f"{-(-args.batch_size // len(index))}"
        )
    labels = np.tile(index.labels, args.repeat)[:n]
    files = (index.files * args.repeat)[:n]
    return ImageIndex.from_arrays(files, labels, index.root, classes=index.classes)


def random_cache(path: str, index: ImageIndex) -> SaliencyCache:
    """A map for every sample: a smooth bump somewhere, about as wide as Grad-CAM's are."""
    rng = np.random.default_rng(SEED)
    y, x = (np.arange(g)[:, None] / (g - 1) for g in GRID)
    centre, width = rng.random((2, len(index), 1, 1)), rng.uniform(0.1, 0.5, (len(index), 1, 1))
    maps = np.exp(-((y - centre[0]) ** 2 + (x.T - centre[1]) ** 2) / width**2)
    maps -= maps.min((1, 2), keepdims=True)
    maps /= maps.max((1, 2), keepdims=True)
    cache = SaliencyCache.create(path, index, grid=GRID)
    ids = cache.begin_pass(0)
    cache.write(ids, maps[ids], epoch=0)
    cache.end_pass(0)
    return cache


class Row:
    """Something that yields batches without end, and is timed a round at a time.

    ahead: batches that may be finished before anybody asks for them.
    """

    def __init__(self, batches: Iterator, ahead: int, stage: Stage | None = None) -> None:
        self._batches, self._ahead, self._stage = batches, ahead, stage
        self.plan_ms: list[float] = []  # a batch, of every round
        self.cpu_ms: list[float] = []  # an image

    def measure(self, n: int) -> float:
        """-> img/s over n batches."""
        planned = self._stage.seconds if self._stage else 0.0
        cpu = cpu_seconds()
        images_ahead = sum(len(next(self._batches)) for _ in range(self._ahead))
        start = time.perf_counter()
        images = sum(len(next(self._batches)) for _ in range(n))
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        settle()
        # Every batch drawn has been made again, so n + ahead were planned and made since.
        self.cpu_ms.append(1e3 * (cpu_seconds() - cpu) / (images + images_ahead))
        if self._stage:
            self.plan_ms.append(1e3 * (self._stage.seconds - planned) / (n + self._ahead))
        return images / seconds


def settle(window_s: float = 0.05, patience_s: float = 10.0) -> None:
    """Wait until this process and its DataLoader's workers rest."""
    give_up = time.monotonic() + patience_s
    quiet = 0
    while quiet < 3 and time.monotonic() < give_up:
        before = cpu_seconds()
        time.sleep(window_s)
        quiet = quiet + 1 if cpu_seconds() - before < 0.25 * window_s else 0


def cpu_seconds() -> float:
    """CPU time of this process and of its DataLoader's workers."""
    ticks = 0
    for worker in torch.multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def dali_row(pipeline, stage: Stage, run: ExecConfig) -> Row:
    loader = Loader(pipeline, train.OUTPUTS, stage.index, drop_last=False)
    batches = (batch.images for _ in itertools.count() for batch in loader)
    return Row(batches, run.prefetch + 1, stage)


def native_erase_pipeline(stage: Stage, image: ImageConfig, run: ExecConfig):
    """As train_pipeline with the method `none`, and a rectangle by DALI's operators alone."""
    erasing = RandomErasingConfig()

    @pipeline_def(enable_checkpointing=True, **run.arguments())
    def define():
        encoded, ids = read_shuffled(stage.index, run, SEED)
        images, plan = crop_planned(stage, encoded, ids, image, run)
        area = fn.random.uniform(range=erasing.area, seed=derive(SEED, "area"))
        aspect = fn.random.uniform(range=erasing.aspect, seed=derive(SEED, "aspect"))
        place = fn.random.uniform(range=(0.0, 1.0), shape=2, seed=derive(SEED, "place"))
        erase = fn.random.coin_flip(probability=erasing.prob, seed=derive(SEED, "erase"))
        shape = fn.stack(math.sqrt(area * aspect), math.sqrt(area / aspect))
        shape = math.min(shape, 1.0) * erase
        images = fn.erase(
            images,
            anchor=place * (1.0 - shape),
            shape=shape,
            normalized=True,
            axis_names="HW",
            fill_value=image.mean,
        )
        images = normalise(images, image, mirror=plan.part("flip", types.INT32))
        return images, plan.row

    return define()


def live_rows(
    args: argparse.Namespace,
    index: ImageIndex,
    cache: SaliencyCache,
    image: ImageConfig,
) -> dict[str, Row]:
    """Every row's pipeline or DataLoader, running."""
    run = ExecConfig(batch_size=args.batch_size, device_id=args.device_id, threads=args.threads)
    device = "cpu" if args.device_id is None else f"cuda:{args.device_id}"

    def stage(method: str, **keywords) -> Stage:
        keywords |= {"cache": cache} if method == "scae" else {}
        # λ(t) = λ_max from epoch T on
        start = {"epochs": 1, "start_epoch": 1, "batch_size": args.batch_size, "seed": SEED}
        return Stage(index, method, **start, **keywords)

    def row(build: Callable, method: str, **keywords) -> Row:
        of = stage(method, **keywords)
        return dali_row(build(of, image, run), of, run)

    ours = partial(train.train_pipeline, seed=SEED)
    out = {}
    for method in args.methods:
        if method != "scae" or "numpy" in args.backends:
            out[method] = row(ours, method)
        if method == "scae" and "torch" in args.backends:
            out["scae (torch)"] = row(ours, method, backend="torch", torch_device=device)
    out["native_erase"] = row(native_erase_pipeline, "none")
    out["none (again)"] = row(ours, "none")
    for decoder in () if args.no_torchvision else _torchvision.DECODERS:
        batches = _torchvision.endless(
            index,
            image,
            decoder=decoder,
            batch_size=args.batch_size,
            workers=args.threads,
            device=device,
        )
        out[decoder] = Row(batches, args.threads * (_torchvision.AHEAD + 1))
    return out


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.device_id is not None:
        torch.cuda.set_device(args.device_id)
    image = ImageConfig(
        size=args.size,
        val_resize=args.size,
        decode=args.decode,
        dtype=args.dtype,
        layout=args.layout,
    )
    index = epoch_index(args)
    batches = args.batches or len(index) // args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        cache = random_cache(os.path.join(folder, "maps.lmdb"), index)
        live = live_rows(args, index, cache, image)
        settle()
        samples = _bench.interleaved(
            {name: partial(row.measure, batches) for name, row in live.items()}, args.rounds
        )
    table = _bench.rows(samples, "none")
    plan_ms = {
        name: round(statistics.median(row.plan_ms), 3) for name, row in live.items() if row.plan_ms
    }
    cpu_ms = {name: round(statistics.median(row.cpu_ms), 3) for name, row in live.items()}
    versus = None
    if {"scae", "torchvision"} <= samples.keys():
        pairs = zip(samples["scae"], samples["torchvision"], strict=True)
        versus = statistics.median(ours / theirs for ours, theirs in pairs)
    extra = {
        "plan_ms_per_batch": plan_ms,
        "cpu_ms_per_image": cpu_ms,
        "scae_vs_torchvision": versus,
        "settings": {k: v for k, v in vars(args).items() if k not in ("data", "json")}
        | {
            "images": len(index),
            "batches_per_round": batches,
            "decode_resolved": resolve_decode(image.decode, args.device_id),
        },
    }
    _bench.report(table, args.json, extra)


if __name__ == "__main__":
    main()
