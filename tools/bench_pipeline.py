"""Throughput of the training pipeline by method, beside no erasing and beside torchvision.

    python tools/bench_pipeline.py --data imagenet/train --json tools/results/pipeline_cpu.json

Rows: a method each, or several joined by +; `none (again)`, a second pipeline like `none`, which
shows the noise floor; `native METHOD`, DALI's own counterpart of a method, with DALI's random
numbers; `torchvision METHOD`, the same recipe with torchvision's in a DataLoader with as many
workers as DALI has threads, decoded with Pillow as ImageFolder does; `torchvision (decode_image)`,
that of Random Erasing with torchvision's own decoder.
`ratio` is a row's rate over that of `none`; `versus_native` and `versus_torchvision` are those over
the counterparts, which for SCAE are those of Random Erasing.
`cpu_ms_per_image` counts the work instead of the time: it bears other load on the machine.

All rows live at once and take turns. Methods run with their default settings; SCAE where λ is
largest, from a cache of random maps, and where nothing of a tail is mixed: the classes have one
size (bench_mixing.py has a tail).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import _torchvision
import torch
from _live import (
    GUIDED,
    SEED,
    Row,
    device_number,
    endless,
    epoch_index,
    medians,
    random_cache,
    settle,
)
from nvidia.dali import Pipeline, fn, math, pipeline_def, types
from nvidia.dali.auto_aug import auto_augment, rand_augment, trivial_augment

import _bench
import _path  # noqa: F401
from pipelines import train
from pipelines.config import ExecConfig, ImageConfig
from pipelines.images import crop_planned, normalise, read_shuffled, resolve_decode
from scae_dali.cache import SaliencyCache
from scae_dali.config import (
    AutoAugmentConfig,
    PolicyConfig,
    RandAugmentConfig,
    RandomErasingConfig,
    TrivialAugmentConfig,
)
from scae_dali.dataset import ImageIndex
from scae_dali.iterator import Loader
from scae_dali.methods import BUILT_IN
from scae_dali.methods.policy import deprecations_hidden
from scae_dali.ops import Stage
from scae_dali.rng import derive


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="DIR/<class>/<image>")
    parser.add_argument("--methods", default=",".join(BUILT_IN), metavar="A,B,...")
    parser.add_argument("--backends", default="numpy", help="of SCAE's plan: numpy, torch or both")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=0, help="a round; default: an epoch's")
    parser.add_argument("--repeat", type=int, default=1, help="times each file is in an epoch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=224, help="side of the crop in pixels")
    parser.add_argument("--device-id", default="cpu", metavar="N|cpu")
    parser.add_argument("--dtype", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--layout", choices=["NCHW", "NHWC"], default="NCHW")
    parser.add_argument("--decode", choices=["auto", "roi", "full"], default="auto")
    parser.add_argument("--no-torchvision", action="store_true")
    args = _bench.parse(
        parser,
        argv,
        rounds=5,
        quick={"rounds": 3, "batches": 3},
        counts=("batch_size", "repeat", "threads", "size"),
    )
    args.methods = args.methods.split(",")
    args.backends = args.backends.split(",")
    if "none" not in args.methods:
        parser.error("--methods must name none, the row that the ratios are to")
    if unknown := {part for name in args.methods for part in name.split("+")} - set(BUILT_IN):
        parser.error(f"--methods: no method {', '.join(unknown)}; there are {', '.join(BUILT_IN)}")
    if unknown := set(args.backends) - {"numpy", "torch"}:
        parser.error(f"--backends must be numpy, torch or both, got {', '.join(unknown)}")
    args.device_id = device_number(parser, args.device_id)
    return args


def native_erase(images: Any, image: ImageConfig) -> Any:
    """A random rectangle by DALI's operators alone."""
    erasing = RandomErasingConfig()
    area = fn.random.uniform(range=erasing.area, seed=derive(SEED, "area"))
    aspect = fn.random.uniform(range=erasing.aspect, seed=derive(SEED, "aspect"))
    place = fn.random.uniform(range=(0.0, 1.0), shape=2, seed=derive(SEED, "place"))
    erase = fn.random.coin_flip(probability=erasing.prob, seed=derive(SEED, "erase"))
    shape = fn.stack(math.sqrt(area * aspect), math.sqrt(area / aspect))
    shape = math.min(shape, 1.0) * erase
    return fn.erase(
        images,
        anchor=place * (1.0 - shape),
        shape=shape,
        normalized=True,
        axis_names="HW",
        fill_value=image.mean,
    )


def native_policy(policy: Callable, config: PolicyConfig, **settings) -> Callable:
    """One of auto_aug's own, with the settings of ours."""

    def augment(images: Any, image: ImageConfig) -> Any:
        largest, moved = config.max_translate_rel, {}
        if largest is not None:
            moved = {"shape": (image.size, image.size), "max_translate_rel": largest}
        with deprecations_hidden():
            return policy(images, fill_value=config.fill_value, seed=SEED, **settings, **moved)

    return augment


RAND, AUTO, TRIVIAL = RandAugmentConfig(), AutoAugmentConfig(), TrivialAugmentConfig()
NATIVE = {
    "random_erasing": native_erase,
    "rand_augment": native_policy(
        rand_augment.rand_augment, RAND, n=RAND.n, m=RAND.m, num_magnitude_bins=RAND.bins
    ),
    "auto_augment": native_policy(auto_augment.auto_augment, AUTO, policy_name=AUTO.policy),
    "trivial_augment": native_policy(
        trivial_augment.trivial_augment_wide, TRIVIAL, num_magnitude_bins=TRIVIAL.bins
    ),
}


def native_pipeline(
    stage: Stage, image: ImageConfig, run: ExecConfig, augment: Callable
) -> Pipeline:
    """As train_pipeline with the method `none`, and one of NATIVE."""

    @pipeline_def(enable_checkpointing=True, enable_conditionals=True, **run.arguments())
    def define():
        encoded, ids = read_shuffled(stage.index, run, SEED)
        images, plan = crop_planned(stage, encoded, ids, image, run)
        images = augment(images, image)
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
        keywords |= GUIDED | {"cache": cache}
        return Stage(index, method, batch_size=args.batch_size, **keywords)

    def row(build: Callable, method: str, **keywords) -> Row:
        of = stage(method, **keywords)
        loader = Loader(build(of, image, run), train.OUTPUTS, index, drop_last=False)
        return Row((batch.images for batch in endless(loader)), run.prefetch + 1, of)

    ours = partial(train.train_pipeline, seed=SEED)
    out = {}
    for method in args.methods:
        if method != "scae" or "numpy" in args.backends:
            out[method] = row(ours, method)
        if method == "scae" and "torch" in args.backends:
            out["scae (torch)"] = row(ours, method, backend="torch", torch_device=device)
    for method in args.methods:
        if method in NATIVE:
            native = partial(native_pipeline, augment=NATIVE[method])
            out[f"native {method}"] = row(native, "none")
    out["none (again)"] = row(ours, "none")
    for method, decoder in counterparts(args):
        batches = _torchvision.endless(
            index,
            image,
            method=method,
            decoder=decoder,
            batch_size=args.batch_size,
            workers=args.threads,
            device=device,
        )
        name = f"torchvision {method}" if decoder == "torchvision" else decoder
        out[name] = Row(batches, args.threads * (_torchvision.AHEAD + 1))
    return out


def counterparts(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The rows of torchvision: method and decoder."""
    if args.no_torchvision:
        return []
    methods = [name for name in args.methods if name in _torchvision.COUNTERPARTS]
    pillow, *others = _torchvision.DECODERS
    return [(name, pillow) for name in methods] + [("random_erasing", name) for name in others]


def versus(samples: Mapping[str, Sequence[float]], peer: str) -> dict[str, float]:
    """The median over rounds of each method's rate over that of its counterpart."""
    out = {}
    for name, ours in samples.items():
        theirs = samples.get(f"{peer} {'random_erasing' if name == 'scae' else name}")
        if theirs is not None:
            out[name] = round(
                statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3
            )
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
    index = epoch_index(args.data, args.repeat, args.batch_size)
    batches = args.batches or len(index) // args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        cache = random_cache(os.path.join(folder, "maps.lmdb"), index)
        live = live_rows(args, index, cache, image)
        settle()
        samples = _bench.interleaved(
            {name: partial(row.measure, batches) for name, row in live.items()}, args.rounds
        )
    table = _bench.rows(samples, "none")
    extra: dict[str, Any] = medians(live)
    for peer in ("native", "torchvision"):
        extra[f"versus_{peer}"] = versus(samples, peer)
    extra["settings"] = _bench.settings(args) | {
        "images": len(index),
        "batches_per_round": batches,
        "decode_resolved": resolve_decode(image.decode, args.device_id),
    }
    _bench.report(table, args, extra)


if __name__ == "__main__":
    main()
