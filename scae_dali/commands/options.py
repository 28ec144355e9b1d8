"""Options of the commands: the parser, options that several commands have, and types of values.

A type turns the text of an option into its value, or raises an error that says what it takes.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scae_dali.data.index import ARCHIVES
from scae_dali.data.tfrecord import IMAGE, LABEL

__all__ = [
    "CIFAR",
    "add_archives",
    "add_batch_size",
    "add_cache",
    "add_data",
    "add_device",
    "add_images",
    "add_precision",
    "check_format",
    "count",
    "device",
    "existing_folder",
    "grid",
    "need_data",
    "output_file",
    "parser_of",
    "picture_file",
    "train_folder",
    "training_images",
    "usable_device",
]

CIFAR = ("cifar10", "cifar100")
# Options about images that not all formats have, and the formats that have them.
_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("list", "split"), ("folder",)),
    "exclude": ("folder", *ARCHIVES),
    **dict.fromkeys(("archives", "first_label", "index_cache"), ARCHIVES),
    **dict.fromkeys(("image_field", "label_field"), ("tfrecord",)),
    "imbalance": CIFAR,
}


class OneSpelling(argparse.HelpFormatter):
    """Shows only the first long name of an option: the others are older, and still work."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        long = [name for name in action.option_strings if name.startswith("--")]
        shown.option_strings = [name for name in action.option_strings if name not in long[1:]]
        return super()._format_action_invocation(shown)


class HomeParser(argparse.ArgumentParser):
    """Takes a leading ~ for the home folder: a shell does so at the beginning of a word, and many
    not in --option=~/file. Only paths begin with ~."""

    def parse_known_args(self, args=None, namespace=None):
        given = [_at_home(text) for text in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(given, namespace)


def _at_home(text: str) -> str:
    option, equals, value = text.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={os.path.expanduser(value)}"
    return os.path.expanduser(text)


def parser_of(doc: str | None, **settings: Any) -> argparse.ArgumentParser:
    """A parser that the first line of a module's docstring describes."""
    settings = {"formatter_class": OneSpelling} | settings
    return HomeParser(description=(doc or "").partition("\n")[0], **settings)


def add_data(
    parser: argparse.ArgumentParser | argparse._MutuallyExclusiveGroup,
    *,
    type: Callable[[str], Any] | None = None,
    required: bool = False,
    help: str = "folder of the data set, with the training images in DIR/train/<class>/",
) -> None:
    """--data DIR, the folder that holds train/ and val/. type: by default `training_images`."""
    parser.add_argument(
        *("--data", "--root"),
        metavar="DIR",
        type=type or training_images,
        required=required,
        help=help,
    )


def add_cache(parser: argparse.ArgumentParser) -> None:
    """CACHE, the folder of a cache that is there."""
    parser.add_argument("cache", metavar="CACHE", help="folder of the cache, such as imagenet.lmdb")


def add_archives(parser: argparse.ArgumentParser) -> None:
    """The options of `images.open_archives`, for a parser that has --data and --format."""
    of_tfrecord = "feature of a TFRecord that holds"
    parser.add_argument(
        "--archives",
        metavar="PATTERN",
        help="archives in --data, such as 'train-{0000..1023}.tar' or 'train-*', for --format "
        "webdataset and tfrecord",
    )
    parser.add_argument(
        "--first-label",
        type=int,
        help="number that the archives give to the first class; default: 1 if their labels run "
        "from 1, otherwise 0",
    )
    parser.add_argument(
        "--image-field", metavar="NAME", help=f"{of_tfrecord} the image; default: {IMAGE}"
    )
    parser.add_argument(
        "--label-field",
        metavar="NAME",
        help=f"{of_tfrecord} the number of the class; default: {LABEL}",
    )
    parser.add_argument(
        "--index-cache",
        metavar="DIR",
        help="folder in which it is kept what the archives hold; default: beside each of them",
    )


def add_images(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--data, --format, the options of `add_archives`, --imbalance, --list and --exclude: the
    training images of a cache, which `images.open_images` opens. required: whether --data must
    be given."""
    add_data(
        parser,
        type=str,
        required=required,
        help="folder of the data set: the training images are in DIR/train/<class>/, or the "
        "archives or CIFAR's files in DIR",
    )
    parser.add_argument(
        "--format",
        choices=["folder", *ARCHIVES, *CIFAR],
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
        help="text file of images to leave out, one path a line; scae-dali check-images writes one",
    )


def check_format(arguments: argparse.Namespace) -> None:
    """Raise ValueError where an option is given that --format has no use for."""
    for name, formats in _OF.items():
        value = getattr(arguments, name, None)
        if value is None or arguments.format in formats:
            continue
        tail = "; tools/make_longtail.py writes a --list of any folder" * (name == "imbalance")
        raise ValueError(
            f"{_option(name)} is for --format {' or '.join(formats)}, got {value!r} with --format "
            f"{arguments.format}; leave it out, or give another --format{tail}"
        )


def need_data(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End with an error where options of `add_images` are given without --data."""
    given = [name for name in _OF if getattr(arguments, name, None) is not None]
    given += ["format"] * (arguments.format != "folder")
    if given and arguments.data is None:
        parser.error(f"{_option(given[0])} is about the images in --data; give --data DIR too")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def add_batch_size(
    parser: argparse.ArgumentParser,
    default: int | str,
    help: str = "",
    *,
    type: Callable[[str], Any] | None = None,
    metavar: str = "N",
) -> None:
    """--batch-size N. type: by default `count`."""
    said = f"{help}; default: {default}" if help else f"default: {default}"
    names = ("--batch-size", "--batch")
    parser.add_argument(*names, metavar=metavar, type=type or count, default=default, help=said)


def add_device(
    parser: argparse.ArgumentParser,
    default: str = "cpu",
    *,
    type: Callable[[str], Any] | None = None,
    help: str = "cpu, auto, or the number of a GPU",
    metavar: str = "NAME",
) -> None:
    """--device NAME, as `device_id`: the number of a GPU, or None for the CPU, as DALI has it.
    type: by default `usable_device`."""
    parser.add_argument(
        *("--device", "--device-id"),
        dest="device_id",
        metavar=metavar,
        type=type or usable_device,
        default=default,
        help=f"{help}; default: {default}",
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """--amp and --channels-last: how a network computes."""
    parser.add_argument(
        "--amp",
        choices=["none", "bf16", "fp16"],
        default="none",
        help="mixed precision; default: %(default)s",
    )
    parser.add_argument(
        "--channels-last", action="store_true", help="use the channels-last memory format"
    )


def count(text: str) -> int:
    """5 -> 5; at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise ArgumentTypeError(f"must be a whole number, at least 1, got {text}")
    return number


def grid(text: str) -> tuple[int, int]:
    """7,5 -> (7, 5), height and width."""
    try:
        height, width = map(int, text.split(","))
    except ValueError:
        height = width = 0
    if min(height, width) < 1:
        raise ArgumentTypeError(f"must be height,width in cells, such as 7,7, got {text!r}")
    return height, width


def device(text: str) -> int | None:
    """3 and cuda:3 -> 3; cuda -> 0; cpu -> None; auto -> 0, or None if there is no GPU."""
    if text == "auto":
        import torch

        return 0 if torch.cuda.device_count() else None
    found = re.fullmatch(r"cpu|cuda|(?:cuda:)?(\d+)", text)
    if found is None:
        raise ArgumentTypeError(f"must be cpu, auto, cuda or the number of a GPU, got {text}")
    return None if text == "cpu" else int(found[1] or 0)


def usable_device(text: str) -> int | None:
    """A `device` that exists."""
    import torch

    number, found = device(text), torch.cuda.device_count()
    if number is not None and number >= found:
        raise ArgumentTypeError(
            f"must be cpu or one of the {found} GPUs that torch can use here, from 0 on, got {text}"
        )
    return number


def existing_folder(text: str) -> str:
    """A folder that exists."""
    if not os.path.isdir(text):
        raise ArgumentTypeError(f"must be a folder, and there is none at {text!r}")
    return text


def output_file(text: str) -> Path:
    """A file that can be written, with folders above it that may be still to be made. It is known
    before anything is computed for it."""
    path = Path(text).absolute()
    if path.is_dir():
        raise ArgumentTypeError(
            f"must be a file to write, got the folder {text!r}; add the name of a file"
        )
    if path.exists() and not os.access(path, os.W_OK):
        raise ArgumentTypeError(f"must be a file that may be written, got {text!r}; pass another")
    above = next(folder for folder in path.parents if folder.exists())
    try:
        if not path.exists():
            tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise ArgumentTypeError(
            f"must be a file that can be written, got {text!r} ({error.strerror} in "
            f"'{above}'); pass another"
        ) from error
    return Path(text)


def picture_file(text: str) -> Path:
    """An `output_file` with a suffix that matplotlib knows."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ArgumentTypeError("needs matplotlib; pip install 'scae-dali[train]'") from error
    known, suffix = FigureCanvasBase.filetypes, Path(text).suffix.lower().removeprefix(".")
    if suffix and suffix not in known:
        raise ArgumentTypeError(
            f"must be a picture with a suffix such as .png, .pdf or .svg, got {text!r}"
        )
    return output_file(text)


def train_folder(root: str) -> str:
    """The folder with the classes of the training images: root/train, or root itself, if there is
    no such folder or it is a class."""
    inner = os.path.join(root, "train")
    if not os.path.isdir(inner):
        return root
    with os.scandir(inner) as entries:
        return inner if any(entry.is_dir() for entry in entries) else root


def training_images(text: str) -> str:
    """The `train_folder` of a folder that exists."""
    return train_folder(existing_folder(text))
