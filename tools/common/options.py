"""Options of the tools: those of the commands, and types of values that tools alone take."""

from __future__ import annotations

import math
import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from scae_dali.commands.options import (
    add_batch_size,
    add_data,
    add_device,
    add_precision,
    count,
    device,
    existing_folder,
    output_file,
    parser_of,
    picture_file,
    train_folder,
    training_images,
    usable_device,
)

__all__ = [
    "add_batch_size",
    "add_data",
    "add_device",
    "add_precision",
    "count",
    "device",
    "existing_file",
    "existing_folder",
    "output_file",
    "parser_of",
    "picture_file",
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
    if not found or found[0] < 1 or found[-1] > 1e12:
        raise ArgumentTypeError(
            f"must be numbers of samples up to 1e12, such as 1e5,1281167, got {text!r}"
        )
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


def usable_devices(text: str) -> list[int | None]:
    """0,1 -> [0, 1]; cpu -> [None]."""
    return [usable_device(part) for part in text.split(",")]


def existing_file(text: str) -> Path:
    """A file that exists."""
    if not os.path.isfile(text):
        raise ArgumentTypeError(f"must be a file, and there is none at {text!r}")
    return Path(text)
