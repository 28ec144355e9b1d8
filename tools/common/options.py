"""Options of the tools: the parser, options that several tools have, and types of values.

A type turns the text of an option into its value, or raises an error that says what it takes.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = [
    "add_batch_size",
    "add_data",
    "add_device",
    "add_precision",
    "count",
    "device",
    "existing_file",
    "existing_folder",
    "parser_of",
    "positive",
    "share",
    "shares",
    "sizes",
    "some_of",
    "train_folder",
    "training_images",
    "usable_device",
    "usable_devices",
    "whole_numbers",
]


class OneSpelling(argparse.HelpFormatter):
    """Shows only the first long name of an option: the others are older, and still work."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        long = [name for name in action.option_strings if name.startswith("--")]
        shown.option_strings = [name for name in action.option_strings if name not in long[1:]]
        return super()._format_action_invocation(shown)


def parser_of(doc: str | None, **settings: Any) -> argparse.ArgumentParser:
    """A parser that the first line of a module's docstring describes."""
    settings = {"formatter_class": OneSpelling} | settings
    return argparse.ArgumentParser(description=(doc or "").partition("\n")[0], **settings)


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


def whole_numbers(text: str) -> list[int]:
    """1,2 -> [1, 2]; each once, and at least 1."""
    try:
        return list(dict.fromkeys(count(part) for part in text.split(",")))
    except ArgumentTypeError as error:
        raise ArgumentTypeError(
            f"must be whole numbers from 1 on, as in 1,2, got {text}"
        ) from error


def sizes(text: str) -> list[int]:
    """100000,1e7 -> [100000, 10000000], ascending."""
    try:
        found = sorted({int(float(part)) for part in text.split(",")})
    except (ValueError, OverflowError):
        found = []
    if not found or found[0] < 1:
        raise ArgumentTypeError(f"must be numbers of samples, such as 1e5,1281167, got {text!r}")
    return found


def positive(text: str) -> float:
    """0.5 -> 0.5; more than 0."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"must be a number above 0, got {text}")
    return number


def share(text: str) -> float:
    """0.5 -> 0.5; from 0 to 1."""
    number = _number(text)
    if not 0 <= number <= 1:
        raise ArgumentTypeError(f"must be a number from 0 to 1, got {text}")
    return number


def _number(text: str) -> float:
    """The number that a text is; NaN, which lies in no range, where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def shares(text: str) -> list[float]:
    """0.5,1 -> [0.5, 1.0]; each once."""
    return list(dict.fromkeys(map(share, text.split(","))))


def some_of(*choices: str) -> Callable[[str], list[str]]:
    """A,B -> ["A", "B"], out of the choices."""

    def parse(text: str) -> list[str]:
        parts = list(dict.fromkeys(text.split(",")))
        if unknown := [part for part in parts if part not in choices]:
            raise ArgumentTypeError(
                f"must be some of {', '.join(choices)}, joined by commas, got {', '.join(unknown)}"
            )
        return parts

    return parse


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


def usable_devices(text: str) -> list[int | None]:
    """0,1 -> [0, 1]; cpu -> [None]."""
    return [usable_device(part) for part in text.split(",")]


def existing_file(text: str) -> Path:
    """A file that exists."""
    if not os.path.isfile(text):
        raise ArgumentTypeError(f"must be a file, and there is none at {text!r}")
    return Path(text)


def existing_folder(text: str) -> str:
    """A folder that exists."""
    if not os.path.isdir(text):
        raise ArgumentTypeError(f"must be a folder, and there is none at {text!r}")
    return text


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
