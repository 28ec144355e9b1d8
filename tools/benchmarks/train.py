"""Measure what SCAE adds to the time of training, with saliency passes.

    python tools/benchmark.py train --data imagenet --repeat 20 --model resnet50 --device 0 \\
        --batch-size 256 --threads 16 --amp bf16 --channels-last --pass-every 10 --json OUT
    python tools/benchmark.py train --source memory --model cifar_resnet32 --device 0 \\
        --batch-size 128 --amp bf16 --channels-last --compile reduce-overhead --json OUT

Rows train a network as train.py does: `synthetic` on one batch that is on the device already;
`none` and `scae` on batches of the pipeline, SCAE where λ is largest, with random maps; `harvest`,
if the network allows it, as `scae`, while it gathers maps from the forward passes. The row
`saliency pass`: Grad-CAM of --pass-steps batches, stretched to --pass-size, into a cache, without
its start; a pipeline's first batches are slower, so give many on a fast GPU. `ratio` is to `none`.
`overhead` is the time that SCAE adds to that of `none`, by its steps and by a pass over
--pass-share of the images every --pass-every epochs; and what `harvest` adds to that of `scae`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipelines.config import ExecConfig
from pipelines.data import Data
from pipelines.loaders import Loaders
from scae_dali.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.harvest import Harvest
from scae_dali.stage.loader import Batch
from scae_dali.stage.stage import Stage
from scae_dali.training.losses import Loss, LossConfig
from scae_dali.training.networks import make_network
from scae_dali.training.optim import OptimConfig
from scae_dali.training.precision import autocast
from tools.benchmarks.passes import Passes
from tools.common import bench
from tools.common.live import GUIDED, Row, endless, medians, settle
from tools.common.made_up import SEED, random_cache
from tools.common.options import add_batch_size, add_device, add_precision, count, share
from tools.common.source import add_source, check_source, open_source


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = bench.parser_of(__doc__, __name__)
    add_source(parser)
    parser.add_argument(
        "--arrays", dest="source", action="store_const", const="memory", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--model",
        default="resnet50",
        help="name of the network, as --model of train.py takes it; default: %(default)s",
    )
    add_batch_size(parser, 64, "images in a batch")
    add_precision(parser)
    modes = ["none", "default", "reduce-overhead", "max-autotune"]
    parser.add_argument(
        "--compile",
        choices=modes,
        default="none",
        help="mode of torch.compile; default: %(default)s",
    )
    parser.add_argument(
        "--pass-every",
        type=int,
        default=0,
        metavar="EPOCHS",
        help="epochs between two saliency passes; default: 0, no passes",
    )
    parser.add_argument(
        "--pass-size",
        type=count,
        help="side in pixels of the images in a saliency pass; default: --size",
    )
    parser.add_argument(
        "--pass-steps", type=count, help="number of batches in a saliency pass; default: --steps"
    )
    parser.add_argument(
        "--pass-share",
        type=share,
        default=1.0,
        help="share of the images, from 0 to 1, that a saliency pass sees; default: %(default)s",
    )
    parser.add_argument(
        "--steps", type=count, help="training steps of a row in a round; default: one epoch"
    )
    parser.add_argument(
        "--threads", type=count, default=2, help="CPU threads of DALI; default: %(default)s"
    )
    load = ExecConfig.hw_decoder_load
    parser.add_argument(
        "--hw-decoder-load",
        type=share,
        default=load,
        help="share of a batch, from 0 to 1, that the GPU's JPEG engine decodes; default: "
        "%(default)s",
    )
    add_device(parser)
    args = bench.parse(
        parser,
        argv,
        rounds=5,
        quick={"rounds": 3, "steps": 4, "images": 2560, "batch_size": 4},
    )
    check_source(parser, args)
    if args.pass_every < 0:
        parser.error(f"--pass-every must be at least 0, got {args.pass_every}; 0 makes no passes")
    if args.pass_share == 0:
        parser.error("--pass-share must be above 0")
    return args


class Network:
    """A network in training, as train.py trains it.

    harvests: whether it gathers maps. Raises ValueError for a network that cannot be harvested.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        index: ImageIndex,
        size: int,
        device: torch.device,
        *,
        harvests: bool = False,
    ) -> None:
        self._amp, self._device = args.amp, device
        torch.manual_seed(SEED)
        self._layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.net = make_network(args.model, index.num_classes)
        self.net.to(device, memory_format=self._layout)  # type: ignore[call-overload]
        self.grid = GradCAM(self.net).grid(size)
        self._harvest: Harvest | None = None
        if harvests:
            self._harvest = Harvest(
                self.net,
                None,
                samples=len(index),
                num_classes=index.num_classes,
                grid=self.grid,
                size=size,
            )
        self._model: Callable = self.net
        if args.compile != "none":
            # One network has a hook and one has none. Without this guard both run the same code.
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            self._model = torch.compile(self.net, mode=args.compile)
        self._optimizer = OptimConfig(lr=1e-3).optimizer([{"params": list(self.net.parameters())}])
        self._scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self._criterion = Loss(LossConfig(), index.class_counts, device).at(0)
        self._score = torch.zeros(2, device=device)  # as train.py sums it

    def step(self, batch: Batch) -> torch.Tensor:
        """Train on a batch; returns its images."""
        images = batch.images.contiguous(memory_format=self._layout)
        with autocast(self._amp, self._device):
            logits = self._model(images)
        if self._harvest is not None:
            self._harvest.add(batch)
        loss = self._criterion(logits, batch.labels, batch.partners, batch.mu)
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        hits = (logits.argmax(1) == batch.labels).sum()
        self._score += torch.stack([loss.detach() * len(images), hits])
        return images


class Bench:
    """The data of the benchmark, and the rows that are made from it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cpu" if args.device_id is None else f"cuda:{args.device_id}")
        batch_size, where = args.batch_size, args.device_id
        self.execution = ExecConfig(
            batch_size=batch_size,
            device_id=where,
            threads=args.threads,
            hw_decoder_load=args.hw_decoder_load,
        )
        self.source = open_source(args, batch_size)
        self.index = self.source.index
        self.image = self.source.image(
            args.size,
            dtype="fp32" if args.amp == "none" else "fp16",
            layout="NHWC" if args.channels_last else "NCHW",
        )
        self.steps = args.steps or len(self.index) // batch_size

    def network(self, *, harvests: bool = False) -> Network:
        return Network(self.args, self.index, self.image.size, self.device, harvests=harvests)

    def row(
        self,
        network: Network,
        method: str,
        cache: SaliencyCache | None = None,
        *,
        synthetic: bool = False,
    ) -> Row:
        stage = Stage(
            self.index,
            method,
            batch_size=self.execution.batch_size,
            cache=cache,
            **GUIDED,
        )
        loader = self.source.loader(stage, self.image, self.execution)
        if synthetic:
            return Row(map(network.step, itertools.repeat(next(iter(loader)))), ahead=0)
        ahead = self.source.ahead(self.execution)
        if self.args.device_id is None:  # plans take no time beside a step there
            ahead = self.execution.prefetch + 1
        return Row(map(network.step, endless(loader)), ahead, stage)

    def pass_rate(self, network: Network, folder: str) -> Callable[[], float]:
        """A function that makes a saliency pass over some images and returns img/s."""
        images = (self.args.pass_steps or self.steps) * self.execution.batch_size
        part = self.index.subset(range(min(images, len(self.index))))
        pixels = self.source.pixels
        pixels = None if pixels is None else pixels[: len(part)]
        data = Data(part, part, pixels, pixels)
        loaders = Loaders(data, self.image, sampling="shuffle", seed=SEED)
        amp = partial(autocast, self.args.amp, self.device)
        side = self.args.pass_size or self.image.size
        image, execution = (
            replace(self.image, size=side, val_resize=side),
            self.execution.for_inference(side),
        )
        if len(part) <= execution.batch_size:
            raise SystemExit(
                f"a pass needs at least two batches of {execution.batch_size}, got {len(part)} "
                "images; pass a larger --pass-steps, or more images"
            )
        passes = Passes(network.net, None, part, loaders, execution, amp)
        return passes.maps(image, Path(folder, "pass.lmdb"))


def overhead(samples: dict[str, list[float]], args: argparse.Namespace) -> dict[str, float]:
    """The time that SCAE adds, as a share of the time of `none`: medians over the rounds."""
    none = np.array(samples["none"])
    found = {"steps": none / samples["scae"] - 1}
    if "harvest" in samples:
        found["harvest"] = np.array(samples["scae"]) / samples["harvest"] - 1
    if args.pass_every:
        a_pass = args.pass_share * none / np.array(samples["saliency pass"])
        found["passes"] = a_pass / args.pass_every
        found["total"] = found["steps"] + found["passes"]
    return {name: round(float(np.median(shares)), 4) for name, shares in found.items()}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.device_id is not None:
        torch.cuda.set_device(args.device_id)
    torch.backends.cudnn.benchmark = True  # as train.py does
    data = Bench(args)
    network = data.network()
    harvested: Network | None = None
    with suppress(ValueError):  # of a network that cannot be harvested
        harvested = data.network(harvests=True)
    with tempfile.TemporaryDirectory() as folder:
        cache = random_cache(os.path.join(folder, "maps.lmdb"), data.index, network.grid)
        live = {
            "synthetic": data.row(network, "none", synthetic=True),
            "none": data.row(network, "none"),
            "scae": data.row(network, "scae", cache),
        }
        if harvested is not None:
            live["harvest"] = data.row(harvested, "scae", cache)
        calls: dict[str, Callable] = {
            name: partial(row.measure, data.steps) for name, row in live.items()
        }
        if args.pass_every:
            calls["saliency pass"] = data.pass_rate(network, folder)
        settle()
        samples = bench.interleaved(calls, args.rounds)
    extra = {
        "overhead": overhead(samples, args),
        **medians(live),
        "settings": bench.settings(args)
        | {"size": data.image.size, "images": len(data.index), "steps_per_round": data.steps},
    }
    bench.report(bench.rows(samples, "none"), args, extra)
