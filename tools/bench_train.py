"""What SCAE costs where it counts: in the time of training, saliency passes included.

    python tools/bench_train.py --data imagenet/train --repeat 20 --model resnet50 --device-id 0 \\
        --batch-size 256 --threads 16 --amp bf16 --channels-last --pass-every 10 --json OUT
    python tools/bench_train.py --arrays --model cifar_resnet32 --device-id 0 \\
        --batch-size 128 --amp bf16 --channels-last --compile reduce-overhead --json OUT

Rows train a network as train.py does: `synthetic` on a batch that lies on the device already;
`none` and `scae` on what the pipeline gives, SCAE where λ is largest, with random maps; `harvest`,
where the network allows it, another one like it that gathers maps from its forward passes besides.
The row `saliency pass`: Grad-CAM of --pass-steps batches, stretched to --pass-size, into a cache,
without its start; a pipeline's first batches are slower, so give many on a fast GPU. `ratio` is to
`none`; `overhead` what SCAE adds to the time of `none`, by its steps and by a pass over
--pass-share of the images every so many epochs, and what `harvest` adds to that of `scae`.
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

import _live
import numpy as np
import torch
from _options import count, existing_folder, share, usable_device
from _pass import Passes

import _bench
import _path  # noqa: F401
from pipelines import train
from pipelines.config import ExecConfig, ImageConfig
from pipelines.data import Data
from pipelines.loaders import Loaders
from pipelines.recipe import OptimConfig, autocast, make_network
from scae_dali.cache.cache import SaliencyCache
from scae_dali.data.index import ImageIndex
from scae_dali.plan.crop import CropConfig
from scae_dali.saliency.gradcam import GradCAM
from scae_dali.saliency.harvest import Harvest
from scae_dali.stage.loader import Batch, Loader
from scae_dali.stage.stage import Stage
from scae_dali.training.losses import Loss, LossConfig


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=existing_folder, metavar="DIR", help="DIR/<class>/<image>")
    source.add_argument("--arrays", action="store_true", help="random pixels in memory")
    parser.add_argument("--repeat", type=count, default=1, help="times each file is in an epoch")
    parser.add_argument("--images", type=count, default=50_000, help="how many of --arrays")
    parser.add_argument("--model", default="resnet50", help="a network as train.py takes it")
    parser.add_argument("--size", type=count, help="in pixels; default: 224, of --arrays 32")
    parser.add_argument("--batch-size", type=count, default=64)
    parser.add_argument("--amp", choices=["none", "bf16", "fp16"], default="none")
    parser.add_argument("--channels-last", action="store_true")
    modes = ["none", "default", "reduce-overhead", "max-autotune"]
    parser.add_argument("--compile", choices=modes, default="none")
    parser.add_argument("--pass-every", type=int, default=0, metavar="EPOCHS")
    parser.add_argument("--pass-size", type=count, help="of its images, in pixels; default: --size")
    parser.add_argument(
        "--pass-steps", type=count, help="training batches it sees; default: --steps"
    )
    parser.add_argument("--pass-share", type=share, default=1.0, help="of the images, that it sees")
    parser.add_argument("--steps", type=count, help="a round; default: an epoch's")
    parser.add_argument("--threads", type=count, default=2, help="of DALI")
    load = ExecConfig.hw_decoder_load
    parser.add_argument("--hw-decoder-load", type=share, default=load, help=f"default: {load}")
    parser.add_argument("--device-id", type=usable_device, default="cpu", metavar="N|cpu")
    args = _bench.parse(
        parser,
        argv,
        rounds=5,
        quick={"rounds": 3, "steps": 4, "images": 2560, "batch_size": 4},
    )
    if args.size is None:
        args.size = 32 if args.arrays else 224
    args.pass_size = args.pass_size or args.size
    if args.pass_share == 0:
        parser.error("--pass-share must be above 0")
    return args


class Network:
    """A network in training, as train.py trains it.

    harvests: it gathers maps besides; ValueError for one that cannot be harvested.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        index: ImageIndex,
        device: torch.device,
        *,
        harvests: bool = False,
    ) -> None:
        self._amp, self._device = args.amp, device
        torch.manual_seed(_live.SEED)
        self._layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.net = make_network(args.model, index.num_classes)
        self.net.to(device, memory_format=self._layout)  # type: ignore[call-overload]
        self.grid = GradCAM(self.net).grid(args.size)
        self._harvest: Harvest | None = None
        if harvests:
            self._harvest = Harvest(
                self.net,
                None,
                samples=len(index),
                num_classes=index.num_classes,
                grid=self.grid,
                size=args.size,
            )
        self._model: Callable = self.net
        if args.compile != "none":
            self._model = torch.compile(self.net, mode=args.compile)
        self._optimizer = OptimConfig(lr=1e-3).optimizer([{"params": list(self.net.parameters())}])
        self._scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self._criterion = Loss(LossConfig(), index.class_counts, device).at(0)
        self._score = torch.zeros(2, device=device)  # as train.py sums it

    def step(self, batch: Batch) -> torch.Tensor:
        """Train on a batch; -> its images."""
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
    """The data, and what is done with it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cpu" if args.device_id is None else f"cuda:{args.device_id}")
        batch_size, where = args.batch_size, args.device_id
        self.run = ExecConfig(
            batch_size=batch_size,
            device_id=where,
            threads=args.threads,
            hw_decoder_load=args.hw_decoder_load,
        )
        self.image = ImageConfig(
            size=args.size,
            val_resize=args.size,
            crop=CropConfig(kind="pad" if args.arrays else "resized"),
            dtype="fp32" if args.amp == "none" else "fp16",
            layout="NHWC" if args.channels_last else "NCHW",
        )
        self.pixels: np.ndarray | None = None
        if args.arrays:
            images = _live.random_images(args.images, args.size)
            self.index, self.pixels = images.index, images.pixels
        else:
            self.index = _live.evened(_live.epoch_index(args.data, args.repeat, batch_size))
        self.steps = args.steps or len(self.index) // batch_size

    def row(
        self,
        network: Network,
        method: str,
        cache: SaliencyCache | None = None,
        *,
        synthetic: bool = False,
    ) -> _live.Row:
        b = self.run.batch_size
        stage = Stage(self.index, method, batch_size=b, cache=cache, **_live.GUIDED)
        ahead = self.run.prefetch + 1
        if self.pixels is not None:
            loader = _live.memory_loader(stage, self.pixels, self.image, self.run)
            if self.args.device_id is not None:  # on a CPU plans take no time beside a step
                ahead += _live.planned_ahead(self.pixels, b)
        else:
            pipeline = train.train_pipeline(stage, self.image, self.run, seed=_live.SEED)
            loader = Loader(pipeline, train.OUTPUTS, self.index, drop_last=True)
        if synthetic:
            return _live.Row(map(network.step, itertools.repeat(next(iter(loader)))), ahead=0)
        return _live.Row(map(network.step, _live.endless(loader)), ahead, stage)

    def pass_rate(self, network: Network, folder: str) -> Callable[[], float]:
        """-> a function that makes a saliency pass over some images and gives img/s."""
        images = (self.args.pass_steps or self.steps) * self.run.batch_size
        part = self.index.subset(range(min(images, len(self.index))))
        data = Data(part, part, self.pixels, self.pixels)
        loaders = Loaders(data, self.image, sampling="shuffle", seed=_live.SEED)
        amp = partial(autocast, self.args.amp, self.device)
        side = self.args.pass_size
        image, run = replace(self.image, size=side, val_resize=side), self.run.for_inference(side)
        if len(part) <= run.batch_size:
            raise SystemExit(
                f"a pass needs at least two batches of {run.batch_size}, got {len(part)} images; "
                "pass a larger --pass-steps, or more images"
            )
        passes = Passes(network.net, None, part, loaders, run, amp)
        return passes.maps(image, Path(folder, "pass.lmdb"))


def overhead(samples: dict[str, list[float]], args: argparse.Namespace) -> dict[str, float]:
    """Time that SCAE adds to that of `none`, as a share of it: medians over the rounds."""
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
    bench = Bench(args)
    network = Network(args, bench.index, bench.device)
    harvested: Network | None = None
    with suppress(ValueError):  # of a network that cannot be harvested
        harvested = Network(args, bench.index, bench.device, harvests=True)
    with tempfile.TemporaryDirectory() as folder:
        cache = _live.random_cache(os.path.join(folder, "maps.lmdb"), bench.index, network.grid)
        live = {
            "synthetic": bench.row(network, "none", synthetic=True),
            "none": bench.row(network, "none"),
            "scae": bench.row(network, "scae", cache),
        }
        if harvested is not None:
            live["harvest"] = bench.row(harvested, "scae", cache)
        calls: dict[str, Callable] = {
            name: partial(row.measure, bench.steps) for name, row in live.items()
        }
        if args.pass_every:
            calls["saliency pass"] = bench.pass_rate(network, folder)
        _live.settle()
        samples = _bench.interleaved(calls, args.rounds)
    settings = _bench.settings(args)
    extra = {
        "overhead": overhead(samples, args),
        **_live.medians(live),
        "settings": settings | {"images": len(bench.index), "steps_per_round": bench.steps},
    }
    _bench.report(_bench.rows(samples, "none"), args, extra)


if __name__ == "__main__":
    _bench.run(main)
