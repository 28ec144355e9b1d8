"""Compare a saliency pass with plain inference, at several sizes of the images.

    python tools/benchmark.py saliency_pass --data imagenet --sizes 224,160 --json OUT
    python tools/benchmark.py saliency_pass --data demo/data --model resnet18 --layer layer3 \\
        --weights demo/run/weights.pt --sizes 128,96,64 --json OUT

Rows, for each size: `images`, the pipeline alone; `inference`, the logits of its images; `pass`,
their maps in a cache. `ratio` is to the inference of the first size, `of_inference` that of a pass
to the inference of its own size (goal: 0.90). With `--weights`: `agreement`, the mean rank
correlation (Spearman) of a size's maps with those of the first.

`forward …`: the network alone on one batch, as it is, with BatchNorm folded into the convolutions
(torch.fx), and with the memory format changed. These rows show what the pass could gain.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.functional import interpolate

from pipelines.config import ExecConfig, ImageConfig
from pipelines.data import Data
from pipelines.loaders import Loaders
from scae_dali.cache import SaliencyCache
from scae_dali.commands.build_cache import load_model
from scae_dali.saliency.refresh import agreement
from scae_dali.training.precision import autocast
from tools.benchmarks.passes import Passes
from tools.common import bench, live
from tools.common.made_up import SEED, epoch_index
from tools.common.options import (
    add_batch_size,
    add_data,
    add_device,
    add_precision,
    count,
    whole_numbers,
)

Amp = Callable[[], AbstractContextManager]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = bench.parser_of(__doc__, __name__)
    add_data(parser, required=True)
    parser.add_argument(
        "--repeat",
        type=count,
        default=1,
        help="how many times a pass reads each file; default: %(default)s",
    )
    parser.add_argument("--images", type=count, help="number of images in a pass; default: all")
    parser.add_argument(
        "--model",
        default="resnet50",
        help="name of the network, as --model of train.py takes it; default: %(default)s",
    )
    parser.add_argument(
        "--weights", metavar="PT", help="weights.pt of a run of train.py; default: random weights"
    )
    parser.add_argument(
        "--layer",
        help="name of the layer that the maps are made from; default: the usual one of the network",
    )
    parser.add_argument(
        "--sizes",
        type=whole_numbers,
        default="224,160",
        metavar="A,B,...",
        help="sides in pixels that images are resized to; default: %(default)s",
    )
    add_batch_size(parser, 32, "images in a batch")
    add_precision(parser)
    parser.add_argument(
        "--threads", type=count, default=2, help="CPU threads of DALI; default: %(default)s"
    )
    add_device(parser)
    return bench.parse(
        parser,
        argv,
        rounds=5,
        quick={"rounds": 2, "batch_size": 4, "images": 12},
    )


def forwards(net: nn.Module, images: torch.Tensor, amp: Amp) -> dict[str, Callable[[], float]]:
    """Name -> a function that runs a variant of the network, in evaluation mode, on a batch, and
    returns img/s."""
    last = images.is_contiguous(memory_format=torch.channels_last)
    layout = torch.contiguous_format if last else torch.channels_last
    turned = deepcopy(net).to(memory_format=layout)
    nets = {
        "forward": (net, images),
        "forward, BatchNorm folded": (fuse(deepcopy(net).eval()), images),
        f"forward, {'contiguous' if last else 'channels-last'}": (
            turned,
            images.contiguous(memory_format=layout),
        ),
    }

    @torch.inference_mode()
    def measure(candidate: nn.Module, given: torch.Tensor) -> float:
        training = candidate.training
        candidate.eval()
        live.synchronize()
        start = time.perf_counter()
        with amp():
            candidate(given)
        live.synchronize()
        seconds = time.perf_counter() - start
        candidate.train(training)
        return len(given) / seconds

    return {name: partial(measure, *of) for name, of in nets.items()}


def agreements(caches: Mapping[int, SaliencyCache], samples: int) -> dict[str, float]:
    """The mean rank correlation of each size's maps with those of the first, both bilinear on the
    finest grid of all."""
    finest = max((cache.meta.grid for cache in caches.values()), key=np.prod)
    maps = {}
    for size, cache in caches.items():
        stored = torch.from_numpy(cache.read(np.arange(samples))[0])[:, None].float()
        wide = interpolate(stored, finest, mode="bilinear", align_corners=False)
        maps[size] = wide[:, 0].numpy()
    first = next(iter(maps.values()))
    found = {size: agreement(first, other, np.ones_like(first)) for size, other in maps.items()}
    return {str(size): round(float(np.nanmean(values)), 3) for size, values in found.items()}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device("cpu" if args.device_id is None else f"cuda:{args.device_id}")
    if args.device_id is not None:
        torch.cuda.set_device(device)
    index = epoch_index(args.data, args.repeat, args.batch_size)
    if args.images is not None:
        index = index.subset(range(min(args.images, len(index))))
    if len(index) <= args.batch_size:
        raise SystemExit(
            f"a pass needs at least two batches, got {len(index)} images and --batch-size "
            f"{args.batch_size}; pass a smaller one, or more images"
        )
    torch.manual_seed(SEED)
    torch.backends.cudnn.benchmark = True  # as train.py does
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    net = load_model(args.model, args.weights, index.num_classes, args.sizes[0])
    net.to(device, memory_format=layout)  # type: ignore[call-overload]
    amp = partial(autocast, args.amp, device)
    execution = ExecConfig(
        batch_size=args.batch_size, device_id=args.device_id, threads=args.threads
    )
    image = ImageConfig(
        dtype="fp32" if args.amp == "none" else "fp16",
        layout="NHWC" if args.channels_last else "NCHW",
    )
    images = {size: replace(image, size=size, val_resize=size) for size in args.sizes}
    loaders = Loaders(
        Data(index, index, None, None), images[args.sizes[0]], sampling="shuffle", seed=0
    )
    passes = Passes(net, args.layer, index, loaders, execution, amp)
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], float]] = {}
        paths = {size: Path(folder, f"{size}.lmdb") for size in args.sizes}
        for size, image in images.items():
            calls[f"images, {size}"] = passes.pipeline(image)
            calls[f"inference, {size}"] = passes.inference(image)
            calls[f"pass, {size}"] = passes.maps(image, paths[size])
        batch = torch.randn(args.batch_size, 3, args.sizes[0], args.sizes[0], device=device)
        calls |= forwards(net, batch.contiguous(memory_format=layout), amp)
        samples = bench.interleaved(calls, args.rounds)
        caches = {size: SaliencyCache(path, index=index) for size, path in paths.items()}
        extra: dict[str, Any] = {
            "of_inference": {
                str(size): round(median(np.array(made) / np.array(inferred)), 3)
                for size in args.sizes
                for made, inferred in [(samples[f"pass, {size}"], samples[f"inference, {size}"])]
            },
            "goal": "of_inference >= 0.90",
        }
        if args.weights:
            extra["agreement"] = agreements(caches, len(index))
    extra["settings"] = bench.settings(args) | {"images": len(index)}
    bench.report(bench.rows(samples, f"inference, {args.sizes[0]}"), args, extra)
