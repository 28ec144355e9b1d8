"""Build a saliency cache offline, from a trained network.

    scae-dali build-cache --data /data/imagenet --model resnet50 \\
        --weights resnet50.pt --out imagenet.lmdb

Started again, it goes on where it stopped. It never replaces a cache of another network, of other
weights or settings, and one process writes to a cache at a time. `--method scorecam` takes as many
forward passes an image as the layer has channels.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from scae_dali.cache import SaliencyCache
from scae_dali.cache.format import EPOCHS, check_neighbors, settings_of
from scae_dali.checks import IMAGENET_MEAN, IMAGENET_STD
from scae_dali.commands.options import (
    ARCHIVES,
    add_archives,
    add_batch_size,
    add_data,
    add_device,
    add_precision,
    count,
    open_archives,
    parser_of,
    train_folder,
)
from scae_dali.data.broken import of_training
from scae_dali.data.index import ImageIndex
from scae_dali.data.longtail import imbalanced
from scae_dali.data.pixels import ArrayImages
from scae_dali.saliency.cam import CAM
from scae_dali.saliency.layers import classifier_of
from scae_dali.saliency.package import PREFIX
from scae_dali.saliency.refresh import METHODS, factory_of, flat_note, refresh_cache
from scae_dali.saliency.scorecam import ScoreCAM
from scae_dali.saliency.weights import weights_digest
from scae_dali.saliency.whole import whole_loader
from scae_dali.stage.loader import ImageError
from scae_dali.training.networks import make_network
from scae_dali.training.precision import autocast


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__, prog=prog)
    add_data(
        parser,
        type=str,
        required=True,
        help="folder of the data set: the training images are in DIR/train/<class>/, or the "
        "archives or CIFAR's files in DIR",
    )
    parser.add_argument(
        "--format",
        choices=["folder", *ARCHIVES, "cifar10", "cifar100"],
        default="folder",
        help="what --data holds: folders of images, tars (webdataset), TFRecord files, or the "
        "files of CIFAR as torchvision downloads them; default: %(default)s",
    )
    add_archives(parser)
    parser.add_argument(
        "--imbalance",
        type=float,
        help="take the long-tailed subset of CIFAR's files, as --data.imbalance of train.py does; "
        "for folders give --list",
    )
    parser.add_argument(
        "--list",
        help="text file of the images, instead of folders; each line is a path relative to "
        "--data, a space and the number of the class",
    )
    parser.add_argument(
        "--exclude",
        default=(),
        help="text file of images to leave out, one path a line; scae-dali check-images writes one",
    )
    parser.add_argument(
        "--model", required=True, help="name of the network, as --model of train.py takes it"
    )
    parser.add_argument(
        "--weights",
        help="file of the network's weights (a state_dict); without it the weights are random",
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
    add_batch_size(parser, 64, "images in a batch")
    parser.add_argument(
        "--threads", type=count, default=4, help="CPU threads of DALI; default: %(default)s"
    )
    add_device(parser, "auto")
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


def load_model(name: str, weights: str | None, classes: int) -> torch.nn.Module:
    """The network in eval mode. Raises ValueError where weights and network do not fit."""
    torch.manual_seed(0)
    model = make_network(name, classes)
    if weights is None:
        print("no --weights: the network is random, and so is what it looks at", file=sys.stderr)
        return model.eval()
    state = torch.load(weights, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(state.get("net", state))
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()
        raise ValueError(
            f"weights {weights!r} are not those of {name} with {classes} classes: {detail}"
        ) from error
    return model.eval()


def open_images(arguments: argparse.Namespace) -> ImageIndex | ArrayImages:
    """The training images: files, archives, or CIFAR's in memory."""
    if arguments.format.startswith("cifar"):
        if arguments.list or arguments.exclude:
            raise ValueError(
                f"--list and --exclude are of --format folder, got --format {arguments.format}"
            )
        images = ArrayImages.from_cifar(arguments.data, arguments.format, train=True)
        if arguments.imbalance is not None:
            index = images.index
            ids = imbalanced(index.labels, index.num_classes, arguments.imbalance)
            images = images.subset(ids)
        return images
    if arguments.imbalance is not None:
        raise ValueError(
            f"--imbalance is of CIFAR's own files, got {arguments.imbalance} with --format "
            f"{arguments.format}; tools/make_longtail.py writes a --list of any folder"
        )
    if arguments.format in ARCHIVES:
        if arguments.list:
            raise ValueError(
                f"--list is of --format folder, got --format {arguments.format}; leave it out"
            )
        return open_archives(arguments, arguments.exclude)
    if arguments.list:
        return ImageIndex.from_list(arguments.list, root=arguments.data, exclude=arguments.exclude)
    return ImageIndex(train_folder(arguments.data), exclude=arguments.exclude)


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
        raise ValueError(
            f"saliency cache {path!r} has maps by {made['method']!r}, not {arguments.method!r}; "
            "pass the --method that it was built with, or build a new cache at another --out"
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


def build(arguments: argparse.Namespace) -> None:
    """Make the maps by one pass, with a progress bar, and print its rate."""
    images = open_images(arguments)
    index = images.index if isinstance(images, ArrayImages) else images
    number = arguments.device_id
    device = torch.device("cpu") if number is None else torch.device("cuda", number)
    torch.backends.cudnn.benchmark = True  # images are of one size
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    model = load_model(arguments.model, arguments.weights, index.num_classes)
    model.to(device, memory_format=layout)  # type: ignore[call-overload]
    neighbors = arguments.neighbors
    try:
        classifier_of(model, index.num_classes)
    except ValueError as error:
        print(f"the cache gets no neighbouring classes: {error}", file=sys.stderr)
        neighbors = 0
    check_neighbors(neighbors, index.num_classes)
    method: Callable[..., Any] = factory_of(arguments.method)
    batch_size, commit_every = arguments.batch_size, 4096
    if arguments.method == "scorecam":
        method = partial(ScoreCAM, chunk=batch_size)
        # Layers have 64 channels or more, so that few images fill a chunk; and a kill loses little.
        batch_size, commit_every = max(1, batch_size // 64), 16
    cam = method(model, arguments.layer)
    cache = open_cache(arguments, index, cam)

    def loader_for(ids):
        bar.reset(total=len(ids))
        return whole_loader(
            images,
            ids,
            size=arguments.size,
            mean=tuple(arguments.mean),
            std=tuple(arguments.std),
            dtype="fp16" if arguments.amp == "fp16" else "fp32",
            layout="NHWC" if arguments.channels_last else "NCHW",
            batch_size=batch_size,
            device_id=number,
            threads=arguments.threads,
            remedy=of_training,
        )

    with warnings.catch_warnings(), tqdm(unit="img", desc="saliency") as bar:
        warnings.filterwarnings("ignore", ".* saliency maps of layer .* are flat")  # told below
        report = refresh_cache(
            model,
            cache,
            index,
            loader_for,
            epoch=arguments.epoch,
            method=method,
            layer=arguments.layer,
            name=arguments.model,
            input_size=arguments.size,
            settings=settings(arguments),
            neighbors=neighbors,
            autocast=partial(autocast, arguments.amp, device),
            progress=bar.update,
            commit_every=commit_every,
        )
    found, flat = cache.coverage()
    if report.images == 0:
        print(f"{arguments.out} is complete already: {found} maps, {flat} of them flat")
    else:
        rate = report.images / report.seconds
        print(
            f"{arguments.out}: {report.images} maps of {len(index)} in {report.seconds:.1f} s, "
            f"{rate:.{0 if rate >= 10 else 2}f} img/s, {cache.size_bytes / 1e6:.1f} MB; "
            f"{flat} of {found} maps are flat"
        )
    if (note := flat_note(flat, found, cam.layer)) is not None:
        print(f"warning: {note}", file=sys.stderr)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    arguments = parse(argv, prog)
    try:
        build(arguments)
    except (ValueError, OSError, ImageError) as error:
        sys.exit(f"error: {error}")
