"""The images that the options of a command name."""

from __future__ import annotations

import argparse
from typing import Any

from scae_dali.commands.options import train_folder
from scae_dali.data.index import ARCHIVES, ImageIndex, of_archives
from scae_dali.data.longtail import imbalanced
from scae_dali.data.pixels import ArrayImages

__all__ = ["open_archives", "open_images"]


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


def open_archives(arguments: argparse.Namespace, exclude: Any = ()) -> ImageIndex:
    """The images in the archives that the options name."""
    if not arguments.archives:
        raise ValueError(
            f"--archives must name the archives with --format {arguments.format}, got none; give a "
            "pattern relative to --data, such as 'train-{0000..1023}.tar'"
        )
    return of_archives(
        arguments.format,
        arguments.archives,
        arguments.data,
        image=arguments.image_field,
        label=arguments.label_field,
        first_label=arguments.first_label,
        exclude=exclude,
        cache=arguments.index_cache,
    )
