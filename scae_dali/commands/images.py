"""The images that the options of a command name."""

from __future__ import annotations

import argparse
from typing import Any

from scae_dali.commands.options import CIFAR, check_format, train_folder
from scae_dali.data.broken import check_regular
from scae_dali.data.index import ARCHIVES, ImageIndex, of_archives
from scae_dali.data.longtail import imbalanced
from scae_dali.data.pixels import ArrayImages

__all__ = ["open_archives", "open_images"]


def open_images(arguments: argparse.Namespace) -> ImageIndex | ArrayImages:
    """The training images: files, archives, or CIFAR's in memory."""
    check_format(arguments)
    if arguments.format in CIFAR:
        images = ArrayImages.from_cifar(arguments.data, arguments.format, train=True)
        if arguments.imbalance is not None:
            index = images.index
            ids = imbalanced(index.labels, index.num_classes, arguments.imbalance)
            images = images.subset(ids)
        return images
    exclude = () if arguments.exclude is None else arguments.exclude
    if arguments.format in ARCHIVES:
        return open_archives(arguments, exclude)
    if arguments.list is not None:
        index = ImageIndex.from_list(arguments.list, root=arguments.data, exclude=exclude)
        check_regular(index)
        return index
    return ImageIndex(train_folder(arguments.data), exclude=exclude)


def open_archives(arguments: argparse.Namespace, exclude: Any = ()) -> ImageIndex:
    """The images in the archives that the options name."""
    if not arguments.archives:
        raise ValueError(
            f"--archives must name the archives with --format {arguments.format}, got none; give a "
            "pattern relative to --data, such as 'train-{0000..1023}.tar'"
        )
    features = {"image": arguments.image_field, "label": arguments.label_field}
    return of_archives(
        arguments.format,
        arguments.archives,
        arguments.data,
        first_label=arguments.first_label,
        exclude=exclude,
        cache=arguments.index_cache,
        **{what: name for what, name in features.items() if name is not None},
    )
