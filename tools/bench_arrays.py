"""Throughput of the in-memory pipeline by method, for images as small as CIFAR's.

    python tools/bench_arrays.py --data cifar100/train --json tools/results/arrays_cpu.json

Rows: `none`; `none (again)`, a second pipeline like it, which shows the noise floor;
`random_erasing`; `scae`, from a cache of random maps where λ is largest, all classes of one size;
`scae, long tail`, the same images relabelled by the profile of CIFAR-100-LT, so that samples of the
tail are mixed (`mixed_share`: how many). Crop and flip are CIFAR's: shifted by up to 4 pixels.
`ratio` is a row's rate over that of `none`. Goals on two cores: 50,000 img/s for none, 0.85 of it
for SCAE. `plan_ms_per_batch` is spent in a thread beside DALI's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from functools import partial

import numpy as np
import torch
from _live import (
    GUIDED,
    SEED,
    Counter,
    Row,
    endless,
    medians,
    memory_loader,
    planned_ahead,
    random_cache,
    random_images,
    settle,
)
from _options import count, existing_folder, usable_device

import _bench
import _path  # noqa: F401
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.cache.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.data.longtail import profile
from scae_dali.data.pixels import ArrayImages
from scae_dali.plan.crop import CropConfig
from scae_dali.stage.stage import Stage

CLASSES, IMBALANCE = 100, 100


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data",
        type=existing_folder,
        metavar="DIR",
        help="DIR/<class>/<image>, of one size; default: random pixels",
    )
    parser.add_argument("--images", type=count, default=50_000, help="how many of random pixels")
    parser.add_argument("--size", type=count, default=32, help="their side")
    parser.add_argument("--grid", type=count, default=8, help="side of the maps")
    parser.add_argument("--batch-size", type=count, default=128)
    parser.add_argument("--threads", type=count, default=2)
    parser.add_argument("--device-id", type=usable_device, default="cpu", metavar="N|cpu")
    parser.add_argument("--dtype", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--layout", choices=["NCHW", "NHWC"], default="NCHW")
    return _bench.parse(
        parser,
        argv,
        rounds=7,
        quick={"rounds": 3, "images": 4096},
    )


def open_images(args: argparse.Namespace) -> ArrayImages:
    if args.data is None:
        return random_images(args.images, args.size, CLASSES)
    return ArrayImages.from_index(ImageIndex(args.data), threads=args.threads)


def relabelled(index: ImageIndex, counts: np.ndarray) -> ImageIndex:
    """The same images, drawn at random into classes whose sizes are as `counts` to each other."""
    n = len(index)
    place = np.random.default_rng(SEED).permutation(n)
    ends = np.cumsum(counts) / counts.sum() * n
    labels = np.searchsorted(ends, place, side="right").clip(max=len(counts) - 1)
    return ImageIndex.from_arrays(index.files, labels, num_classes=len(counts))


def live_rows(
    args: argparse.Namespace, images: ArrayImages, folder: str
) -> tuple[dict[str, Row], dict[str, Counter]]:
    """Every row, running, and what is counted of it."""
    side = images.pixels.shape[1]
    image = ImageConfig(
        size=side,
        val_resize=side,
        crop=CropConfig(kind="pad"),
        dtype=args.dtype,
        layout=args.layout,
    )
    run = ExecConfig(batch_size=args.batch_size, device_id=args.device_id, threads=args.threads)
    even = relabelled(images.index, np.ones(CLASSES, np.int64))
    tailed = relabelled(images.index, profile(500, CLASSES, IMBALANCE))
    out: dict[str, Row] = {}
    counts: dict[str, Counter] = {}

    def add(name: str, index: ImageIndex, method: str, cache: SaliencyCache | None = None) -> None:
        stage = Stage(
            index, method, batch_size=args.batch_size, cache=cache, resident=True, **GUIDED
        )
        loader = memory_loader(stage, images.pixels, image, run)
        counts[name] = Counter()
        ahead = run.prefetch + 1 + planned_ahead(images.pixels, args.batch_size)
        out[name] = Row(counts[name](endless(loader)), ahead, stage)

    def cache(name: str, index: ImageIndex) -> SaliencyCache:
        return random_cache(os.path.join(folder, name), index, (args.grid, args.grid))

    add("none", even, "none")
    add("random_erasing", even, "random_erasing")
    add("scae", even, "scae", cache("even.lmdb", even))
    add("scae, long tail", tailed, "scae", cache("tailed.lmdb", tailed))
    add("none (again)", even, "none")
    return out, counts


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.device_id is not None:
        torch.cuda.set_device(args.device_id)
    images = open_images(args)
    batches = len(images) // args.batch_size
    if batches == 0:
        raise SystemExit(
            f"there are {len(images)} images, fewer than --batch-size {args.batch_size}; pass a "
            "smaller one, or more --images"
        )
    with tempfile.TemporaryDirectory() as folder:
        live, counts = live_rows(args, images, folder)
        settle()
        samples = _bench.interleaved(
            {name: partial(row.measure, batches) for name, row in live.items()}, args.rounds
        )
    settings = _bench.settings(args)
    extra = {
        "mixed_share": {name: counter.share for name, counter in counts.items()},
        **medians(live),
        "settings": settings | {"images": len(images), "batches_per_round": batches},
    }
    _bench.report(_bench.rows(samples, "none"), args, extra)


if __name__ == "__main__":
    _bench.run(main)
