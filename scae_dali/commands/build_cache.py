"""Build a saliency cache offline, from a trained network.

    scae-dali build-cache --data /data/imagenet --model resnet50 \\
        --weights resnet50.pt --out imagenet.lmdb

Under torchrun each process makes its share of the maps, on the GPU of its own number, and one
process of each node writes. LMDB cannot be written from two machines: of nodes that see the same
folder the first one writes for all.

    torchrun --nproc-per-node 8 --no-python scae-dali build-cache --data …

Started again, it goes on where it stopped, with any number of processes. It never replaces a cache
of another network, of other weights or settings, and one process writes to a cache at a time.
`--method scorecam` takes as many forward passes an image as the layer has channels.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from scae_dali.cache import SaliencyCache
from scae_dali.cache.format import EPOCHS, check_neighbors, settings_of
from scae_dali.cache.imports import IMPORTED
from scae_dali.checks import IMAGENET_MEAN, IMAGENET_STD
from scae_dali.commands.images import open_images
from scae_dali.commands.options import (
    add_batch_size,
    add_device,
    add_images,
    add_precision,
    count,
    parser_of,
)
from scae_dali.data.broken import of_training
from scae_dali.data.index import ARCHIVES, ImageIndex
from scae_dali.data.pixels import ArrayImages, index_of
from scae_dali.saliency.cam import CAM
from scae_dali.saliency.layers import classifier_of
from scae_dali.saliency.package import PREFIX
from scae_dali.saliency.refresh import (
    METHODS,
    PassReport,
    factory_of,
    flat_note,
    refresh_cache,
)
from scae_dali.saliency.scorecam import ScoreCAM
from scae_dali.saliency.weights import weights_digest
from scae_dali.saliency.whole import whole_loader
from scae_dali.stage.loader import ImageError
from scae_dali.training.networks import check_fits, make_network
from scae_dali.training.precision import autocast
from scae_dali.training.ranks import Ranks, lost_another, nodes_that_see, together
from scae_dali.training.weights import load_weights


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, prog=prog)
    add_images(parser, required=True)
    parser.add_argument(
        "--model", required=True, help="name of the network, as --model of train.py takes it"
    )
    parser.add_argument(
        "--weights",
        help="file of the network's weights (a state_dict), such as weights.pt of a run of "
        "train.py, or its checkpoint.pt, of which the average of the weights is taken if there is "
        "one; without it the weights are random",
    )
    parser.add_argument(
        "--method",
        default="gradcam",
        help=f"how the maps are made: {', '.join(METHODS)}, or {PREFIX}NAME for a method of the "
        f"package pytorch-grad-cam, such as {PREFIX}LayerCAM; default: %(default)s",
    )
    parser.add_argument(
        "--layer",
        help="name of the layer that the maps are made from; default: the usual one of the network",
    )
    parser.add_argument(
        "--out", required=True, help="folder of the cache, which is made if it does not exist"
    )
    parser.add_argument(
        "--naming",
        choices=["index", "path"],
        default="index",
        help="what a map is found by: the place of its image in the list (index), or a hash of "
        "the image's path (path); default: %(default)s",
    )
    parser.add_argument(
        "--size",
        type=count,
        default=224,
        help="side in pixels that images are resized to; default: %(default)s",
    )
    parser.add_argument(
        "--mean",
        type=float,
        nargs=3,
        default=IMAGENET_MEAN,
        help="mean of each channel (RGB) that is subtracted, from 0 to 255; default: that of "
        "ImageNet",
    )
    parser.add_argument(
        "--std",
        type=float,
        nargs=3,
        default=IMAGENET_STD,
        help="standard deviation of each channel (RGB) that the images are divided by; default: "
        "that of ImageNet",
    )
    parser.add_argument(
        "--neighbors",
        type=int,
        default=1,
        help="how many of the most similar classes are stored for each class; default: %(default)s",
    )
    add_batch_size(parser, 64, "images in a batch of one process")
    parser.add_argument(
        "--threads",
        type=count,
        default=4,
        help="CPU threads of DALI in one process; default: %(default)s",
    )
    add_device(
        parser,
        "auto",
        help="cpu, auto, or the number of a GPU; under torchrun each process takes the GPU of its "
        "own number",
    )
    add_precision(parser)
    parser.add_argument(
        "--epoch",
        type=int,
        default=0,
        help="epoch that is stored with the maps, from 0 to 65535; default: %(default)s",
    )
    arguments = parser.parse_args(argv)
    if arguments.neighbors < 0:
        parser.error(f"--neighbors must be at least 0, got {arguments.neighbors}")
    if min(arguments.std) <= 0:
        parser.error(f"--std must be positive, got {arguments.std}")
    if not 0 <= arguments.epoch < EPOCHS:
        parser.error(f"--epoch must be in 0..{EPOCHS - 1}, got {arguments.epoch}")
    return arguments


def load_model(
    name: str, weights: str | None, classes: int, size: int, told: bool = True
) -> torch.nn.Module:
    """The network for images of this size, in eval mode. told: whether to print notes, such as
    that it is random. Raises ValueError where weights and network do not fit."""
    torch.manual_seed(0)
    model = make_network(name, classes, size)
    if weights is None:
        if told:
            print(
                "no --weights: the network is random, and so is what it looks at", file=sys.stderr
            )
        return model.eval()
    if (note := load_weights(model, weights)) and told:
        print(f"note: {note}", file=sys.stderr)
    return model.eval()


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the maps depend on, besides the network. --channels-last and the device are
    left out: they only change the order of rounding."""
    return {
        "mean": list(arguments.mean),
        "std": list(arguments.std),
        "amp": arguments.amp,
    }


def open_cache(arguments: argparse.Namespace, index: ImageIndex, cam: CAM) -> SaliencyCache:
    """The cache, new or to be continued. Raises ValueError where it has maps that were made by
    another method or network, or with other weights or settings."""
    path = arguments.out
    cache = SaliencyCache.create(
        path,
        index,
        grid=cam.grid(arguments.size),
        naming=arguments.naming,
        exist_ok=True,
        method=arguments.method,
    )
    meta = cache.meta
    made = meta.under_way or meta.last_pass
    if made["epoch"] is None:
        return cache
    wanted = {"model": arguments.model, "layer": cam.layer, "input_size": arguments.size}
    wanted |= {"method": arguments.method, "weights": weights_digest(cam.model)}
    differing = {name: value for name, value in wanted.items() if made[name] != value}
    known = settings_of(made)
    asked = settings(arguments).items()
    differing |= {name: value for name, value in asked if known.get(name, value) != value}
    if not differing:
        return cache
    if meta.under_way is not None:
        cache.claim()  # raises its own error if the process that makes them is alive
    if "method" in differing:
        same = "" if made["method"] == IMPORTED else "pass the --method that it was built with, or "
        raise ValueError(
            f"saliency cache {path!r} has maps by {made['method']!r}, not {arguments.method!r}; "
            f"{same}build a new cache at another --out"
        )
    made = made | known
    told = "; ".join(
        f"--{name} {made[name] or 'unknown'}, not {value}".replace("--input_size", "--size")
        for name, value in differing.items()
    )
    ended = (
        "" if meta.under_way is None else ", delete it if it is of no use (its pass never ended)"
    )
    raise ValueError(
        f"saliency cache {path!r} has maps by {told}: build with what it was built with{ended}, or "
        "build a new cache at another --out"
    )


@dataclass(frozen=True)
class Work:
    """What the pass of a process needs. cache: None in a process that writes none. cam: an object
    of `method`, whose layer and network it tells."""

    images: ImageIndex | ArrayImages
    index: ImageIndex
    model: torch.nn.Module
    method: Callable[..., Any]
    cam: Any
    cache: SaliencyCache | None
    neighbors: int


def prepare(arguments: argparse.Namespace, ranks: Ranks, writes: bool) -> Work:
    """Open the images, the network and, in a process that writes, the cache. Raises ValueError and
    OSError."""
    if arguments.format in ARCHIVES:  # one process of each node writes down what they hold
        together(ranks, partial(open_images, arguments) if ranks.local == 0 else None)
    images = open_images(arguments)
    index = index_of(images)
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    model = load_model(
        arguments.model, arguments.weights, index.num_classes, arguments.size, ranks.first
    )
    model.to(ranks.device, memory_format=layout)  # type: ignore[call-overload]
    neighbors = arguments.neighbors
    try:
        classifier_of(model, index.num_classes)
    except ValueError as error:
        if ranks.first:
            print(f"the cache gets no neighbouring classes: {error}", file=sys.stderr)
        neighbors = 0
    check_neighbors(neighbors, index.num_classes)
    check_fits(
        model,
        arguments.model,
        arguments.size,
        index.num_classes,
        ranks.device,
        amp=arguments.amp,
    )
    method: Callable[..., Any] = factory_of(arguments.method)
    if arguments.method == "scorecam":
        method = partial(ScoreCAM, chunk=arguments.batch_size)
    cam = method(model, arguments.layer)
    with autocast(arguments.amp, ranks.device):
        cache = open_cache(arguments, index, cam) if writes else None
    return Work(images, index, model, method, cam, cache, neighbors)


def build(arguments: argparse.Namespace) -> None:
    """Make the maps by one pass, with a progress bar, and print its rate. All processes call it."""
    number = arguments.device_id
    ranks = Ranks("cpu" if number is None else "cuda", number or 0)
    device = ranks.device
    torch.backends.cudnn.benchmark = True  # images are of one size
    first_node = min(nodes_that_see(Path(arguments.out).resolve().parent, ranks))
    writes = ranks.local == 0 and ranks.node == first_node
    works: list[Work] = []
    together(ranks, lambda: works.append(prepare(arguments, ranks, writes)))
    (work,) = works
    batch_size = arguments.batch_size
    if arguments.method == "scorecam":
        batch_size = max(1, batch_size // 64)  # layers have 64 channels or more

    def loader_for(ids):
        bar.reset(total=len(ids) * ranks.world)
        return whole_loader(
            work.images,
            ids,
            size=arguments.size,
            mean=tuple(arguments.mean),
            std=tuple(arguments.std),
            dtype="fp16" if arguments.amp == "fp16" else "fp32",
            layout="NHWC" if arguments.channels_last else "NCHW",
            batch_size=batch_size,
            device_id=device.index,
            threads=arguments.threads,
            remedy=of_training,
        )

    bar = tqdm(unit="img", desc="saliency", disable=not ranks.first)
    with warnings.catch_warnings(), bar:
        warnings.filterwarnings("ignore", ".* saliency maps of layer .* are flat")  # told below
        report = refresh_cache(
            work.model,
            work.cache,
            work.index,
            loader_for,
            epoch=arguments.epoch,
            method=work.method,
            layer=arguments.layer,
            name=arguments.model,
            input_size=arguments.size,
            settings=settings(arguments),
            neighbors=work.neighbors,
            autocast=partial(autocast, arguments.amp, device),
            progress=bar.update,
        )
    if ranks.first and work.cache is not None:  # the first one always writes
        tell(arguments.out, work.cache, report, work.cam.layer)
    ranks.close()


def tell(out: str, cache: SaliencyCache, report: PassReport, layer: str) -> None:
    """Print what a pass has made of the cache."""
    found, flat = cache.coverage()
    if report.images == 0:
        print(f"{out} is complete already: {found} maps, {flat} of them flat")
    else:
        rate = report.images / report.seconds
        print(
            f"{out}: {report.images} maps of {cache.meta.samples} in {report.seconds:.1f} s, "
            f"{rate:.{0 if rate >= 10 else 2}f} img/s, {cache.size_bytes / 1e6:.1f} MB; "
            f"{flat} of {found} maps are flat"
        )
    if (note := flat_note(flat, found, layer)) is not None:
        print(f"warning: {note}", file=sys.stderr)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    arguments = parse(argv, prog)
    try:
        build(arguments)
    except (ValueError, OSError, ImageError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not lost_another(error):
            raise
        sys.exit("error: another process has ended before its time; its own message says why")
