"""The images that a benchmark trains on: files, or pixels in memory."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines import files
from pipelines.config import ExecConfig, ImageConfig
from scae_dali.data.index import ImageIndex
from scae_dali.data.pixels import ArrayImages
from scae_dali.plan.crop import CropConfig
from scae_dali.plan.order import Order
from scae_dali.stage.loader import Loader
from scae_dali.stage.stage import Stage
from tools.common.live import memory_loader, planned_ahead
from tools.common.made_up import SEED, epoch_index, evened, random_images
from tools.common.options import add_data, count

__all__ = ["Source", "add_source", "check_source", "open_source"]


@dataclass(frozen=True)
class Source:
    """The training images. pixels: uint8 [N, H, W, 3], in the order of the index; None: files, or
    archives."""

    index: ImageIndex
    pixels: np.ndarray | None = None

    def relabelled(self, index: ImageIndex) -> Source:
        """The same images in the classes of another index."""
        return replace(self, index=index)

    def image(self, size: int | None, **settings: Any) -> ImageConfig:
        """The crops of training: random and resized for files; shifted by up to 4 pixels, in their
        own size, for images in memory. size: side of the crop; None: 224."""
        if self.pixels is None:
            side, crop = size or 224, CropConfig()
        else:
            side, crop = self.pixels.shape[1], CropConfig(kind="pad")
        return ImageConfig(size=side, val_resize=side, crop=crop, **settings)

    def loader(self, stage: Stage, image: ImageConfig, execution: ExecConfig) -> Loader:
        """Whole batches of the training pipeline."""
        if self.pixels is not None:
            return memory_loader(stage, self.pixels, image, execution)
        order = None
        if stage.index.archives is not None:
            order = Order(
                stage.index.labels,
                batch_size=execution.batch_size,
                seed=SEED,
                start_epoch=stage.start_epoch,
            )
        pipeline = files.train_pipeline(stage, image, execution, seed=SEED, order=order)
        return Loader(pipeline, files.OUTPUTS, stage.index, drop_last=True, order=order)

    def ahead(self, execution: ExecConfig) -> int:
        """Batches that may be finished before anybody asks for them."""
        filled = 0 if self.pixels is None else planned_ahead(self.pixels, execution.batch_size)
        return execution.prefetch + 1 + filled


def add_source(parser: argparse.ArgumentParser) -> None:
    """The options that `open_source` reads."""
    parser.add_argument(
        "--source",
        choices=["files", "memory"],
        default="files",
        help="whether images are read from files, or lie in memory as CIFAR's do; default: "
        "%(default)s",
    )
    add_data(
        parser,
        help="folder of the data set, with the training images in DIR/train/<class>/; --source "
        "memory "
        "needs images of one size, and without --data it takes random pixels",
    )
    parser.add_argument(
        "--repeat",
        type=count,
        default=1,
        help="how many times an epoch reads each file; default: %(default)s",
    )
    parser.add_argument(
        "--images",
        type=count,
        default=50_000,
        help="number of images, if they are random pixels; default: %(default)s",
    )
    parser.add_argument(
        "--size",
        type=count,
        help="side of the crop in pixels; default: 224, or 32 for images in memory",
    )


def check_source(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a message where the options name no images."""
    if args.source == "files" and args.data is None:
        parser.error(
            "--data must name the folder of the images, got none; --source memory needs none"
        )


def open_source(args: argparse.Namespace, batch_size: int) -> Source:
    """Images in classes of one size, so that none is a tail class. Raises SystemExit where they do
    not fill a batch."""
    if args.source == "files":
        return Source(evened(epoch_index(args.data, args.repeat, batch_size)))
    if args.data is None:
        images = random_images(args.images, args.size or 32)
    else:
        images = ArrayImages.from_index(ImageIndex(args.data))
    if len(images) < batch_size:
        raise SystemExit(
            f"there are {len(images)} images, fewer than --batch-size {batch_size}; pass a smaller "
            "one, or more --images"
        )
    return Source(evened(images.index), images.pixels)
